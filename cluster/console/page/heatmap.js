// Draws layers x experts on a canvas: one picture of a pixel an expert, scaled up, and a few paths over it.

const GUTTER = { left: 34, top: 16, right: 2, bottom: 2 };
const NARROWEST = 4;
const WIDEST = 48;
const TALLEST = 20;
const STEPS = 256;

export class HeatMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.picture = document.createElement("canvas");
    this.shape = { layers: 0, experts: 0 };
    this.shades = new Float32Array(0); // 0 to 1 by expert; below 0: not known
    this.crossed = []; // experts that no shard has
    this.outlined = []; // those of the rank that is chosen
    this.layerNames = [];
    this.cursor = -1;
    this.readColours();
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const stops = [0, 1, 2, 3, 4].map((at) => rgb(colour(`--ramp-${at}`)));
    this.ramp = Array.from({ length: STEPS }, (_, at) => {
      const place = (at / (STEPS - 1)) * (stops.length - 1);
      const low = Math.min(Math.floor(place), stops.length - 2);
      return stops[low].map((value, channel) => Math.round(value + (place - low) * (stops[low + 1][channel] - value)));
    });
    this.ramp = this.ramp.map(word);
    this.unknown = word(rgb(colour("--unknown")));
    this.colours = { page: colour("--page"), text: colour("--muted"), mark: colour("--mark"), halo: colour("--page"), bad: colour("--bad") };
    this.font = `11px ${style.fontFamily}`;
  }

  wordOf(shade) {
    return shade < 0 ? this.unknown : this.ramp[Math.round(shade * (STEPS - 1))];
  }

  /** Take other data and paint the picture; `draw` shows it. */
  set({ layers, experts, shades, crossed, layerNames }) {
    this.shape = { layers, experts };
    Object.assign(this, { shades, crossed, layerNames });
    if (!layers || !experts) return;
    this.picture.width = experts;
    this.picture.height = layers;
    const context = this.picture.getContext("2d");
    const image = context.createImageData(experts, layers);
    const words = new Uint32Array(image.data.buffer); // a pixel each: red is the lowest byte
    for (let index = 0; index < layers * experts; index += 1) words[index] = this.wordOf(shades[index]);
    context.putImageData(image, 0, 0);
  }

  /** Fit into `width` CSS pixels, or be as wide as cells that a finger can hit. */
  fit(width) {
    const { layers, experts } = this.shape;
    if (!layers || !experts) return;
    const ratio = window.devicePixelRatio || 1;
    const room = Math.max(width - GUTTER.left - GUTTER.right, 0);
    this.cellWidth = Math.min(Math.max(room / experts, NARROWEST), WIDEST);
    const wanted = Math.min(Math.max(0.3 * width, 380), 620);
    this.cellHeight = Math.round(Math.min(Math.max(wanted / layers, 6), TALLEST));
    this.width = GUTTER.left + experts * this.cellWidth + GUTTER.right;
    this.height = GUTTER.top + layers * this.cellHeight + GUTTER.bottom;
    const [pixelsX, pixelsY] = [Math.round(this.width * ratio), Math.round(this.height * ratio)];
    if (this.canvas.width !== pixelsX || this.canvas.height !== pixelsY) {
      this.canvas.width = pixelsX;
      this.canvas.height = pixelsY;
      this.canvas.style.width = `${this.width}px`;
      this.canvas.style.height = `${this.height}px`;
    }
    this.ratio = ratio;
  }

  draw() {
    const { context, shape: { layers, experts } } = this;
    if (!layers || !experts || !this.cellWidth) return;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture, GUTTER.left, GUTTER.top, experts * this.cellWidth, layers * this.cellHeight);
    this.#grid();
    this.#names();
    if (this.crossed.length) this.#cross();
    if (this.outlined.length) this.#outline(this.outlined, 1.25);
    if (this.cursor >= 0) this.#outline([this.cursor], 2.5);
  }

  /** The expert under a point of the canvas in CSS pixels, or -1. */
  at(x, y) {
    const expert = Math.floor((x - GUTTER.left) / this.cellWidth);
    const layer = Math.floor((y - GUTTER.top) / this.cellHeight);
    const { layers, experts } = this.shape;
    return expert >= 0 && expert < experts && layer >= 0 && layer < layers ? layer * experts + expert : -1;
  }

  /** Left, top, width and height of an expert's cell in CSS pixels. */
  cell(index) {
    const { experts } = this.shape;
    const x = GUTTER.left + (index % experts) * this.cellWidth;
    return [x, GUTTER.top + Math.floor(index / experts) * this.cellHeight, this.cellWidth, this.cellHeight];
  }

  #grid() {
    const { context, shape: { layers, experts } } = this;
    const [right, bottom] = [GUTTER.left + experts * this.cellWidth, GUTTER.top + layers * this.cellHeight];
    context.strokeStyle = this.colours.page;
    context.lineWidth = 1;
    context.beginPath();
    for (let layer = 1; layer < layers; layer += 1) {
      const y = GUTTER.top + layer * this.cellHeight - 0.5;
      context.moveTo(GUTTER.left, y);
      context.lineTo(right, y);
    }
    for (let expert = 1; expert < experts && this.cellWidth >= 8; expert += 1) {
      const x = Math.round(GUTTER.left + expert * this.cellWidth) - 0.5;
      context.moveTo(x, GUTTER.top);
      context.lineTo(x, bottom);
    }
    context.stroke();
  }

  #names() {
    const { context, shape: { layers, experts } } = this;
    context.fillStyle = this.colours.text;
    context.font = this.font;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyLayer = step(layers, 14 / this.cellHeight);
    for (let layer = 0; layer < layers; layer += everyLayer) {
      context.fillText(String(this.layerNames[layer] ?? layer), GUTTER.left - 6, GUTTER.top + (layer + 0.5) * this.cellHeight);
    }
    context.textAlign = "left";
    const everyExpert = step(experts, 56 / this.cellWidth);
    for (let expert = 0; expert < experts; expert += everyExpert) {
      context.fillText(String(expert), GUTTER.left + expert * this.cellWidth, GUTTER.top / 2);
    }
  }

  #cross() {
    const { context } = this;
    context.strokeStyle = this.colours.bad;
    context.lineWidth = 1.25;
    context.beginPath();
    for (const index of this.crossed) {
      const [x, y, width, height] = this.cell(index);
      context.moveTo(x + 1, y + 1);
      context.lineTo(x + width - 1, y + height - 2);
      context.moveTo(x + width - 1, y + 1);
      context.lineTo(x + 1, y + height - 2);
    }
    context.stroke();
  }

  /** A frame that shows on any shade: dark in light. */
  #outline(indices, width) {
    const { context } = this;
    context.beginPath();
    for (const index of indices) {
      const [x, y, cellWidth, cellHeight] = this.cell(index);
      context.rect(Math.round(x) - 0.5, y - 0.5, Math.round(cellWidth), cellHeight);
    }
    context.strokeStyle = this.colours.halo;
    context.lineWidth = width + 1.5;
    context.stroke();
    context.strokeStyle = this.colours.mark;
    context.lineWidth = width;
    context.stroke();
  }
}

/** The least of 1, 2, 4, 8, ... that leaves `least` cells between names, all of which fit `count`. */
function step(count, least) {
  let every = 1;
  while (every < least && every < count) every *= 2;
  return every;
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

const word = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
