// Shards and routers.

import { el, setAttribute, setText, Table } from "./dom.js";
import { ago, bytes, many, NONE, percent, ranges, short, whole } from "./format.js";

const GLYPHS = { serving: "\u25cf", filling: "\u25d1", partial: "\u25d1", joining: "\u25cb", draining: "\u25d4", lost: "\u2715", missing: "\u2715", fault: "\u2715" };

/** What people should see first: a router gave it up, or it says itself that it cannot answer. */
export function stateOf(shard) {
  if (shard.state === "missing") return "missing";
  if (shard.fault) return "fault";
  return (shard.lost_by || []).length ? "lost" : shard.state;
}

export function stateCell(cell, state) {
  if (!cell.firstChild) cell.append(el("i", { "aria-hidden": "true" }), el("span"));
  setText(cell.firstChild, GLYPHS[state] || "?");
  setText(cell.lastChild, state);
  setAttribute(cell, "data-state", state);
}

export class Shards {
  constructor({ place, note, detail, onRank }) {
    Object.assign(this, { place, note, detail, onRank });
    this.rank = null;
    this.table = new Table(place, "Shards by rank", [
      { name: "Rank", kind: "rank", cell: (cell, shard) => this.#rank(cell, shard) },
      { name: "State", kind: "status", cell: (cell, shard) => stateCell(cell, stateOf(shard)) },
      { name: "Node", text: (shard) => (shard.node ? `${shard.host || ""} ${short(shard.node)}`.trim() : NONE) },
      { name: "Experts", kind: "number", title: "Held, of the slots of all layers", text: (shard) => (shard.held === undefined ? NONE : whole(shard.held)) },
      { name: "Sole", kind: "number", title: "Experts that no other shard has", text: (shard) => (this.placement ? whole(this.placement.soleOf(shard.rank)) : NONE) },
      { name: "To come", kind: "number", title: "Experts that the target gives it and it lacks", text: (shard) => (shard.missing ? whole(shard.missing) : "") },
      { name: "Copying", kind: "number", title: "Copies of experts under way into it", text: (shard) => (shard.copying ? whole(shard.copying) : "") },
      { name: "Load, last minute", kind: "load", cell: (cell, shard) => this.#load(cell, shard) },
      { name: "Heard", kind: "number", title: "Since its last sign of life", text: (shard) => (shard.silent_s === undefined ? NONE : ago(shard.silent_s)) },
    ]);
  }

  update(shards, placement) {
    this.placement = placement;
    this.shards = shards;
    const pairs = shards.map((shard) => shard.pairs || 0);
    this.most = Math.max(...pairs, 0);
    const busy = pairs.filter(Boolean);
    this.mean = busy.length ? busy.reduce((a, b) => a + b, 0) / busy.length : 0;
    this.table.update(shards, (shard) => shard.rank, (shard) => (shard.rank === this.rank ? "chosen" : ""));
    const states = new Map();
    for (const shard of shards) states.set(stateOf(shard), (states.get(stateOf(shard)) || 0) + 1);
    setText(this.note, [...states].map(([state, count]) => `${count} ${state}`).join(" \u00b7 "));
    this.#tell();
  }

  choose(rank, reveal = false) {
    this.rank = rank;
    if (this.shards) this.update(this.shards, this.placement);
    const row = reveal && this.table.rows.get(rank);
    if (row) this.place.scrollTop = row.offsetTop - this.place.clientHeight / 2;
  }

  #rank(cell, shard) {
    if (!cell.firstChild) {
      cell.append(el("button", { type: "button", title: "Frame its experts in the map", onclick: () => this.onRank(shard.rank) }, String(shard.rank)));
    }
    setAttribute(cell.firstChild, "aria-pressed", String(shard.rank === this.rank));
    setAttribute(cell.firstChild, "aria-label", `Rank ${shard.rank}`);
  }

  #load(cell, shard) {
    if (!cell.firstChild) cell.append(el("meter", { min: "0", max: "1", "aria-hidden": "true" }), el("span"));
    const pairs = shard.pairs || 0;
    setAttribute(cell.firstChild, "value", (this.most ? pairs / this.most : 0).toFixed(3));
    setText(cell.lastChild, this.mean ? `${(pairs / this.mean).toFixed(2)}\u00d7` : NONE);
  }

  /** The shard that is chosen. */
  #tell() {
    const shard = this.shards.find((each) => each.rank === this.rank);
    this.detail.hidden = !shard;
    if (!shard) return;
    const copies = Object.entries(shard.copies || {}).filter(([, count]) => count).map(([source, count]) => `${count} by ${source}`);
    const facts = [
      ["Process", shard.pid ? `${shard.pid} at ${shard.host}:${shard.port}` : null],
      ["Device", shard.device ? `${shard.device}, kernel ${shard.kernel}` : null],
      ["Slots", shard.slots ? `${shard.slots} a layer` : null],
      ["Weights", shard.bytes === undefined ? null : bytes(shard.bytes)],
      ["Resident", resident(shard.offload)],
      ["Copied in", copies.length ? copies.join(", ") : null],
      ["Handed out", shard.handed_out ? many(shard.handed_out, "expert") : null],
      ["Given up by", (shard.lost_by || []).map(short).join(", ") || null],
      ["Fault", shard.fault || null],
      ["Last error", shard.last_error ? `${shard.last_error} (${whole(shard.errors)} in all)` : null],
      ["Replica", shard.id || null],
    ].filter(([, text]) => text);
    facts.unshift(["Rank", String(shard.rank)]);
    fill(this.detail, facts);
  }
}

/** What a shard with more experts than memory says of itself, since it started. */
function resident(told) {
  if (!told) return null;
  const asked = told.hits + told.misses;
  const rate = asked ? `, ${Math.round((100 * told.hits) / asked)} % found there` : "";
  const early = told.prefetched ? `, ${whole(told.prefetched)} fetched early (${whole(told.prefetches_wasted)} in vain)` : "";
  const pace = told.copy_bytes_per_s ? ` for copies at ${bytes(told.copy_bytes_per_s)}/s` : "";
  return `${bytes(told.resident_bytes)}${rate}, ${told.wait_seconds.toFixed(1)} s waited${pace}${early}`;
}

/** Names and texts as a list, changed only where it differs. */
export function fill(place, facts) {
  const name = JSON.stringify(facts);
  if (place.dataset.of === name) return;
  place.dataset.of = name;
  place.replaceChildren(el("dl", {}, ...facts.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text)))));
}

export class Routers {
  constructor({ place, note }) {
    this.note = note;
    this.table = new Table(place, "Routers", [
      { name: "Router", cell: (cell, router) => {
        setText(cell, router.pool ? `${short(router.id)} (${router.pool})` : short(router.id));
        setAttribute(cell, "title", router.id);
      } },
      { name: "State", kind: "status", cell: (cell, router) => stateCell(cell, !router.answers ? "missing" : lostRanks(router).length ? "partial" : "serving") },
      { name: "Epoch", kind: "number", text: (router) => whole(router.epoch) },
      { name: "Workers", kind: "number", title: "Of its engine, which compute each step together (tensor parallelism)", text: (router) => (router.answers ? whole(router.workers) : NONE) },
      { name: "Shards", kind: "number", text: (router) => (router.answers ? `${router.connected} of ${router.num_ranks}` : NONE) },
      { name: "Without", text: (router) => lostRanks(router).length ? `rank ${ranges(lostRanks(router))}` : "" },
      { name: "Running", kind: "number", text: (router) => (router.counted ? whole(router.running) : NONE) },
      { name: "Waiting", kind: "number", text: (router) => (router.counted ? whole(router.waiting) : NONE) },
      { name: "KV cache", kind: "number", text: (router) => (router.counted ? percent(router.kv_cache) : NONE) },
      { name: "Fallback", kind: "number", title: "Row-expert pairs it computed itself since it started", text: (router) => (router.answers ? whole(router.fallback_pairs) : NONE) },
      { name: "Way", text: (router) => (router.transports || []).join(", ") },
    ]);
  }

  update(routers) {
    this.table.update(routers, (router) => router.id);
    const silent = routers.filter((router) => !router.answers).length;
    setText(this.note, `${routers.length - silent} answering${silent ? ` \u00b7 ${silent} silent` : ""}`);
  }
}

function lostRanks(router) {
  return Object.keys(router.lost || {}).map(Number).sort((a, b) => a - b);
}
