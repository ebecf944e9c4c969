// What the page knows: the last answer, and the parts that answers leave out while they are unchanged.

const KEPT_S = 900;

export class Store {
  constructor() {
    this.data = null;
    this.points = [];
    this.placement = null;
    this.load = null;
    this.log = { events: [], history: [], decisions: [] };
    this.have = { placement: "", load: "", log: "" };
  }

  names() {
    const since = this.points.length ? this.points[this.points.length - 1][0] : 0;
    return { since, ...this.have };
  }

  /** Take an answer; returns which of the large parts are new. */
  take(data) {
    this.data = data;
    const fresh = { placement: false, load: false, log: false };
    if (data.points.length) {
      // Another replica of the console may have other points.
      const merged = this.points.length && data.points[0][0] <= this.points[this.points.length - 1][0]
        ? [...this.points, ...data.points].sort((a, b) => a[0] - b[0])
        : [...this.points, ...data.points];
      const oldest = merged[merged.length - 1][0] - KEPT_S;
      this.points = merged.filter((point) => point[0] >= oldest);
    }
    for (const part of ["placement", "load", "log"]) {
      if (data[part]) {
        this[part] = part === "placement" ? new Placement(data.placement) : data[part];
        fresh[part] = true;
      }
      if (data[part] || !this.have[part]) this.have[part] = data[`${part}_name`];
    }
    return fresh;
  }
}

/** Which ranks hold each expert of each layer; experts are numbered layer * numExperts + expert. */
export class Placement {
  constructor({ num_layers, num_experts, experts }) {
    this.numLayers = num_layers;
    this.numExperts = num_experts;
    this.ofRank = new Map(Object.entries(experts).map(([rank, list]) => [Number(rank), Uint32Array.from(list)]));
    const size = num_layers * num_experts;
    this.copies = new Uint16Array(size);
    for (const list of this.ofRank.values()) for (const index of list) this.copies[index] += 1;
    this.starts = new Uint32Array(size + 1);
    for (let index = 0; index < size; index += 1) this.starts[index + 1] = this.starts[index] + this.copies[index];
    this.ranks = new Uint16Array(this.starts[size]);
    const filled = new Uint16Array(size);
    for (const rank of [...this.ofRank.keys()].sort((a, b) => a - b)) {
      for (const index of this.ofRank.get(rank)) {
        this.ranks[this.starts[index] + filled[index]] = rank;
        filled[index] += 1;
      }
    }
  }

  ranksOf(index) {
    return [...this.ranks.subarray(this.starts[index], this.starts[index + 1])];
  }

  /** How many experts only this rank has. */
  soleOf(rank) {
    let count = 0;
    for (const index of this.ofRank.get(rank) || []) if (this.copies[index] === 1) count += 1;
    return count;
  }
}
