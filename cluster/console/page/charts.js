// Time lines: one small chart a quantity, a shared crosshair, and a mark for each loss and return.

import { el, setAttribute, setText, svg } from "./dom.js";
import { clock, duration, figure, percent, whole } from "./format.js";

const WIDTH = 1000;
const HEIGHT = 100;
const TOP = 20; // of HEIGHT, for the number that the upper line means
const SPANS_S = [120, 300, 900];
const GAP_S = 6; // without points: nobody watched, or the console was away
const MARKED = { lost: "lost", serve: "back", back: "back" };

const CHARTS = [
  { name: "Output", unit: "tokens/s", field: "tokens_per_s", text: (v) => [figure(v), "tokens/s"] },
  { name: "Between tokens, p99", field: "between_p99_ms", second: "between_p50_ms", secondName: "p50", text: duration },
  { name: "First token, p99", field: "first_p99_ms", second: "first_p50_ms", secondName: "p50", text: duration },
  { name: "Fan-out", field: "fan_out", text: (v) => [figure(v), "shards/token"] },
  { name: "Balancedness", field: "balancedness", most: 1, text: (v) => [percent(v), "mean/max"] },
  { name: "Requests", field: "running", second: "waiting", secondName: "waiting", text: (v) => [whole(v), "running"] },
];

export class TimeLines {
  constructor(place) {
    this.charts = CHARTS.map((spec) => new TimeLine(spec, (share) => this.#at(share)));
    place.replaceChildren(...this.charts.map((chart) => chart.node));
    this.share = null; // of the width, where the crosshair is
  }

  update(points, fields, events, now) {
    const oldest = points.length ? now - points[0][0] : 0;
    const span = SPANS_S.find((seconds) => seconds >= oldest) || SPANS_S[SPANS_S.length - 1];
    Object.assign(this, { points, span, now });
    const marks = events.filter((event) => MARKED[event.kind] && event.at > now - span);
    for (const chart of this.charts) chart.update(points, fields, marks, now, span);
    this.#show();
  }

  #at(share) {
    this.share = share;
    this.#show();
  }

  #show() {
    if (!this.points) return;
    let at = this.points.length - 1;
    if (this.share !== null) {
      const wanted = this.now - this.span * (1 - this.share);
      at = nearest(this.points, wanted);
    }
    for (const chart of this.charts) chart.show(this.points[at], this.share !== null);
  }
}

class TimeLine {
  constructor(spec, onShare) {
    this.spec = spec;
    this.value = el("b", {});
    this.unit = el("span", { class: "unit" });
    this.under = el("span", { class: "under" });
    this.top = el("span", { class: "scale" });
    this.left = el("span", {});
    this.marks = svg("path", { class: "marks" });
    this.backs = svg("path", { class: "backs" });
    this.line = svg("path", { class: "line" });
    this.second = svg("path", { class: "second" });
    this.cross = svg("path", { class: "crosshair" });
    this.plot = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("path", { class: "base", d: `M0 ${HEIGHT - 0.5}H${WIDTH}M0 ${TOP}H${WIDTH}` }), this.marks, this.backs, this.second, this.line, this.cross);
    this.area = el("div", { class: "plot", tabindex: "0", role: "img" }, this.plot, this.top);
    this.node = el("figure", {}, el("figcaption", {}, spec.name), el("p", { class: "value" }, this.value, this.unit, this.under),
      this.area, el("p", { class: "axis", "aria-hidden": "true" }, this.left, el("span", {}, "now")));
    const share = (event) => Math.min(Math.max(event.offsetX / this.area.clientWidth, 0), 1);
    this.area.addEventListener("pointermove", (event) => onShare(share(event)));
    this.area.addEventListener("pointerleave", () => onShare(null));
    this.area.addEventListener("blur", () => onShare(null));
    this.area.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (event.key === "Escape") onShare(null);
      else if (by) {
        this.shown = Math.min(Math.max((this.shown ?? 1) + by, 0), 1);
        onShare(this.shown);
        event.preventDefault();
      }
    });
  }

  update(points, fields, marks, now, span) {
    const { spec } = this;
    this.at = fields.indexOf(spec.field) + 1;
    this.secondAt = spec.second ? fields.indexOf(spec.second) + 1 : 0;
    const from = now - span;
    const inside = points.filter((point) => point[0] >= from);
    const known = inside.flatMap((point) => [point[this.at], this.secondAt ? point[this.secondAt] : null]).filter((v) => v !== null);
    const most = spec.most || ceiling(known.reduce((a, b) => Math.max(a, b), 0));
    Object.assign(this, { now, span });
    setAttribute(this.line, "d", path(inside, this.at, from, span, most));
    setAttribute(this.second, "d", this.secondAt ? path(inside, this.secondAt, from, span, most) : "");
    const ticks = (kind) => marks.filter((event) => MARKED[event.kind] === kind)
      .map((event) => `M${x(event.at, from, span)} ${TOP}V${HEIGHT}`).join("");
    setAttribute(this.marks, "d", ticks("lost"));
    setAttribute(this.backs, "d", ticks("back"));
    setText(this.top, known.length ? spec.text(most).slice(0, spec.text === duration ? 2 : 1).join(" ") : "");
    setText(this.left, `${span / 60} min ago`);
    const values = inside.map((point) => point[this.at]).filter((v) => v !== null);
    const words = (v) => spec.text(v).join(" ");
    setAttribute(this.area, "aria-label", values.length
      ? `${spec.name}: ${words(values[values.length - 1])} now, ${words(Math.min(...values))} to ${words(Math.max(...values))} in ${span / 60} minutes`
      : `${spec.name}: not known`);
  }

  show(point, chosen) {
    const [value, unit] = this.spec.text(point ? point[this.at] : null);
    setText(this.value, value);
    setText(this.unit, unit);
    const second = point && this.secondAt ? this.spec.text(point[this.secondAt]) : null;
    const more = second ? `${this.spec.secondName} ${this.spec.field === "running" ? second[0] : second.join(" ")}` : "";
    setText(this.under, chosen && point ? clock(point[0]) : more);
    setAttribute(this.cross, "d", chosen && point ? `M${x(point[0], this.now - this.span, this.span)} ${TOP}V${HEIGHT}` : "");
  }
}

const x = (at, from, span) => ((at - from) / span * WIDTH).toFixed(1);

function path(points, at, from, span, most) {
  let d = "";
  let before = null;
  for (const point of points) {
    const value = point[at];
    if (value === null) {
      before = null;
      continue;
    }
    const y = (HEIGHT - 1 - Math.min(value / most, 1) * (HEIGHT - 1 - TOP)).toFixed(1);
    d += `${before === null || point[0] - before > GAP_S ? "M" : "L"}${x(point[0], from, span)} ${y}`;
    before = point[0];
  }
  return d;
}

/** The next of 1, 2, 5, 10, 20, ... */
function ceiling(value) {
  if (value <= 0) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * size).find((limit) => limit >= value * 0.999);
}

function nearest(points, at) {
  let best = 0;
  for (let index = 1; index < points.length; index += 1) {
    if (Math.abs(points[index][0] - at) < Math.abs(points[best][0] - at)) best = index;
  }
  return best;
}
