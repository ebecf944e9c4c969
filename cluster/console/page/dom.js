// Elements without innerHTML: whatever comes from the service is text.

export const byId = (id) => document.getElementById(id);

/** An element with attributes (null and false leave one out) and children, which are nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Set text only where it differs: most of a look is as it was. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value === null || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
}

/** A table whose rows are kept by key. Columns: {name, title, text, kind, cell}; `cell` fills a node itself. */
export class Table {
  constructor(place, caption, columns) {
    this.columns = columns;
    this.rows = new Map();
    this.body = el("tbody");
    const head = el("tr", {}, ...columns.map((column) =>
      el("th", { scope: "col", class: column.kind || null, title: column.title || null }, column.name)));
    place.replaceChildren(el("table", {}, el("caption", { class: "unseen" }, caption), el("thead", {}, head), this.body));
  }

  update(items, keyOf, classOf = () => "") {
    const seen = new Set();
    let before = null;
    for (const item of items) {
      const key = keyOf(item);
      seen.add(key);
      let row = this.rows.get(key);
      if (!row) {
        row = el("tr", {}, ...this.columns.map((column, at) => el(at ? "td" : "th", { class: column.kind || null, scope: at ? null : "row" })));
        this.rows.set(key, row);
      }
      setAttribute(row, "class", classOf(item) || null);
      this.columns.forEach((column, at) => {
        const cell = row.children[at];
        if (column.cell) column.cell(cell, item);
        else setText(cell, column.text(item));
      });
      const wanted = before ? before.nextSibling : this.body.firstChild;
      if (wanted !== row) this.body.insertBefore(row, wanted);
      before = row;
    }
    for (const [key, row] of this.rows) {
      if (!seen.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
  }
}
