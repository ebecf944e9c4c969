// The map of experts with what belongs to it: what is shown, the legend, the cursor, and the same in words.

import { el, setText } from "./dom.js";
import { figure, many, percent, ranges, whole } from "./format.js";
import { HeatMap } from "./heatmap.js";

const BRIGHTEST = 8; // times the mean of a layer
const MOST_REPLICAS = 4;
const HOTTEST = 8;
const TIMES = "\u00d7";

export class HeatView {
  /** `onRank(rank)` is called when somebody chooses a rank that holds the expert at hand. */
  constructor({ place, controls, legend, readout, note, hottest, onRank }) {
    Object.assign(this, { place, legend, readout, note, hottest, onRank });
    this.canvas = el("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map of experts", "aria-describedby": "readout" });
    place.replaceChildren(this.canvas);
    this.map = new HeatMap(this.canvas);
    this.placement = null;
    this.load = null;
    this.rank = null;
    this.kind = "load";
    this.pinned = -1;
    this.entries = [];
    this.#controls(controls);
    this.#listen();
    new ResizeObserver(() => this.#frame(true)).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.map.readColours();
      this.#paint();
    });
  }

  setPlacement(placement) {
    this.placement = placement;
    this.#paint();
  }

  setLoad(load) {
    this.load = load;
    this.#means();
    this.#paint();
    this.#listHottest();
  }

  choose(rank) {
    this.rank = rank;
    this.#outline();
    this.#tell();
    this.#frame();
  }

  get #shape() {
    if (this.placement) return [this.placement.numLayers, this.placement.numExperts];
    return this.load ? [this.load.layers.length, this.load.num_experts] : [0, 0];
  }

  get #fits() {
    const [layers, experts] = this.#shape;
    return this.load !== null && this.load.counts.length === layers * experts && this.load.tokens > 0;
  }

  #controls(place) {
    const button = (kind, text) => el("button", { type: "button", "aria-pressed": String(kind === this.kind), onclick: () => {
      this.kind = kind;
      for (const each of place.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === buttons[kind]));
      this.#paint();
    } }, text);
    const buttons = { load: button("load", "Load"), replicas: button("replicas", "Replicas") };
    place.replaceChildren(el("div", { class: "choice", role: "group", "aria-label": "What the map shows" }, ...Object.values(buttons)));
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => {
      if (this.pinned < 0) this.#point(this.map.at(event.offsetX, event.offsetY));
    });
    canvas.addEventListener("pointerleave", () => {
      if (this.pinned < 0) this.#point(-1);
    });
    canvas.addEventListener("click", (event) => {
      const index = this.map.at(event.offsetX, event.offsetY);
      this.pinned = index === this.pinned ? -1 : index;
      this.#point(index);
    });
    canvas.addEventListener("focus", () => {
      if (this.map.cursor < 0 && canvas.matches(":focus-visible")) this.#point(0);
    });
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const [layers, experts] = this.#shape;
    if (!layers) return;
    const at = Math.max(this.map.cursor, 0);
    const row = Math.floor(at / experts) * experts;
    const to = {
      ArrowLeft: Math.max(at - 1, row),
      ArrowRight: Math.min(at + 1, row + experts - 1),
      ArrowUp: at - experts >= 0 ? at - experts : at,
      ArrowDown: at + experts < layers * experts ? at + experts : at,
      Home: row,
      End: row + experts - 1,
      PageUp: at % experts,
      PageDown: (layers - 1) * experts + (at % experts),
    }[event.key];
    if (event.key === "Enter") {
      const ranks = this.placement ? this.placement.ranksOf(at) : [];
      if (ranks.length) this.onRank(ranks[(ranks.indexOf(this.rank) + 1) % ranks.length]);
    } else if (event.key === "Escape") {
      this.pinned = -1;
      this.#point(-1);
    } else if (to !== undefined) {
      this.pinned = to;
      this.#point(to);
      this.#reveal(to);
    } else return;
    event.preventDefault();
  }

  #reveal(index) {
    const [x, , width] = this.map.cell(index);
    const { place } = this;
    if (x < place.scrollLeft) place.scrollLeft = x - 40;
    else if (x + width > place.scrollLeft + place.clientWidth) place.scrollLeft = x + width - place.clientWidth + 40;
  }

  #point(index) {
    this.map.cursor = index;
    this.#tell();
    this.#frame();
  }

  /** Mean picks of an expert, by layer. */
  #means() {
    this.means = [];
    if (!this.load) return;
    const { layers, num_experts: experts, counts } = this.load;
    for (let layer = 0; layer < layers.length; layer += 1) {
      let total = 0;
      for (let index = layer * experts; index < (layer + 1) * experts; index += 1) total += counts[index];
      this.means.push(total / experts);
    }
  }

  #times(index) {
    const mean = this.means[Math.floor(index / this.load.num_experts)];
    return mean > 0 ? this.load.counts[index] / mean : 0;
  }

  #paint() {
    const [layers, experts] = this.#shape;
    if (!layers) return;
    const shades = new Float32Array(layers * experts).fill(-1);
    const crossed = [];
    for (let index = 0; index < shades.length; index += 1) {
      const copies = this.placement ? this.placement.copies[index] : 1;
      if (copies === 0) crossed.push(index);
      if (this.kind === "replicas") {
        if (this.placement) shades[index] = Math.min(copies, MOST_REPLICAS) / MOST_REPLICAS;
      } else if (this.#fits) shades[index] = Math.min(Math.sqrt(this.#times(index) / BRIGHTEST), 1);
    }
    const layerNames = this.load && this.load.layers.length === layers ? this.load.layers : [];
    this.map.set({ layers, experts, shades, crossed, layerNames });
    this.#outline();
    this.#frame(true);
    this.#legend();
    this.#tell();
    this.#describe();
  }

  #outline() {
    const list = this.placement && this.rank !== null ? this.placement.ofRank.get(this.rank) : null;
    this.map.outlined = list || [];
  }

  /** One drawing a frame, however much asks for it. */
  #frame(fit = false) {
    this.mustFit = this.mustFit || fit;
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      if (this.mustFit) this.map.fit(this.place.clientWidth);
      this.mustFit = false;
      this.map.draw();
    });
  }

  #legend() {
    const name = `${this.kind}:${this.#fits}`;
    if (this.legendOf === name) return;
    this.legendOf = name;
    const [ticks, title] = this.kind === "load"
      ? [[[0, "0"], [Math.sqrt(1 / BRIGHTEST), `1${TIMES}`], [Math.sqrt(3 / BRIGHTEST), `3${TIMES}`], [1, `${BRIGHTEST}${TIMES} or more`]], "picks, to the mean of the layer"]
      : [[0.25, 0.5, 0.75, 1].map((shade, at) => [shade, at === 0 ? "sole copy" : at === 3 ? "4 or more" : String(at + 1)]), "replicas"];
    const swatch = (shade) => `swatch shade-${Math.round(shade * 8)}`;
    this.legend.replaceChildren(
      el("span", {}, title),
      ...ticks.map(([shade, text]) => el("span", { class: "tick" }, el("i", { class: swatch(shade), "aria-hidden": "true" }), text)),
      el("span", { class: "tick" }, el("i", { class: "swatch cross", "aria-hidden": "true" }, "\u00d7"), "no shard"),
    );
  }

  #layerName(index) {
    const layer = Math.floor(index / this.#shape[1]);
    return this.map.layerNames[layer] ?? layer;
  }

  #where(index) {
    if (!this.placement) return "";
    const ranks = this.placement.ranksOf(index);
    if (!ranks.length) return "on no shard, so routers compute it";
    return ranks.length === 1 ? `sole copy, on rank ${ranks[0]}` : `${ranks.length} replicas, on ranks ${ranges(ranks)}`;
  }

  /** The expert under the cursor in words. */
  #tell() {
    const index = this.map.cursor;
    if (index < 0 || index >= this.map.shades.length) {
      const chosen = this.rank !== null && this.placement ? this.placement.ofRank.get(this.rank) : null;
      setText(this.readout, chosen
        ? `Rank ${this.rank} holds ${many(chosen.length, "expert")}, framed above; ${whole(this.placement.soleOf(this.rank))} of them nobody else has.`
        : "Point at an expert, or focus the map and use the arrow keys; Enter chooses a shard that holds it.");
      return;
    }
    const name = `Layer ${this.#layerName(index)}, expert ${index % this.#shape[1]}`;
    const load = this.#fits
      ? `${figure(this.#times(index))}${TIMES} the mean of its layer (${whole(this.load.counts[index])} picks in ${Math.round(this.load.seconds)} s)`
      : "load not known";
    setText(this.readout, [name, load, this.#where(index)].filter(Boolean).join(" \u00b7 "));
  }

  #describe() {
    const [layers, experts] = this.#shape;
    this.canvas.setAttribute("aria-label", `${layers} layers of ${experts} experts by ${this.kind === "load" ? "load" : "number of replicas"}; arrow keys move`);
    if (!this.load) setText(this.note, `${layers} layers ${TIMES} ${experts} experts \u00b7 routers begin to count`);
    else if (!this.load.tokens) setText(this.note, `${layers} layers ${TIMES} ${experts} experts \u00b7 no tokens in ${Math.round(this.load.seconds)} s`);
    else setText(this.note, `${layers} layers ${TIMES} ${experts} experts \u00b7 ${whole(this.load.tokens)} tokens of ${many(this.load.routers, "router")} in ${Math.round(this.load.seconds)} s, every one counted`);
  }

  #listHottest() {
    this.hottest.hidden = !this.#fits;
    if (!this.#fits) return;
    const experts = this.#shape[1];
    const best = []; // [times, index], the largest first
    for (let index = 0; index < this.load.counts.length; index += 1) {
      const times = this.#times(index);
      if (best.length === HOTTEST && times <= best[HOTTEST - 1][0]) continue;
      best.push([times, index]);
      best.sort((a, b) => b[0] - a[0]);
      best.length = Math.min(best.length, HOTTEST);
    }
    if (this.entries.length !== best.length) {
      this.entries = best.map(() => this.#hottestEntry());
      this.hottest.replaceChildren(el("span", {}, "Hottest (layer/expert)"), el("ol", {}, ...this.entries.map((entry) => entry.node)));
    }
    best.forEach(([times, index], at) => {
      const entry = this.entries[at];
      entry.index = index;
      setText(entry.button, `${this.#layerName(index)}/${index % experts}`);
      setText(entry.times, ` ${figure(times)}${TIMES}`);
      setText(entry.share, ` ${percent(this.load.counts[index] / (this.means[Math.floor(index / experts)] * experts), 1)}`);
    });
  }

  /** A place in the list. It stays when another expert takes it, or a button would lose the focus with every look. */
  #hottestEntry() {
    const entry = { index: -1, times: el("span"), share: el("small") };
    entry.button = el("button", { type: "button", class: "link", onclick: () => {
      this.pinned = entry.index;
      this.#point(entry.index);
      this.#reveal(entry.index);
    } });
    entry.node = el("li", {}, entry.button, entry.times, entry.share);
    return entry;
  }
}
