// What moves, what the autopilot thinks, and what happened.

import { el, setText, Table } from "./dom.js";
import { bytes, clock, figure, many, NONE, percent, short, signed, whole } from "./format.js";
import { fill } from "./tables.js";

const SHOWN_EVENTS = 80;
const GLYPHS = { lost: "\u2715", unserved: "\u2715", refused: "\u2715", failover: "\u21bb", fallback: "\u21bb", serve: "\u25cf", back: "\u25cf", served: "\u25cf", join: "\u25cb", drain: "\u25d4", left: "\u25cb", target: "\u2192" };
const BAD = new Set(["lost", "unserved", "refused"]);

export class Movement {
  constructor({ place, note }) {
    this.note = note;
    this.bar = el("progress", { max: "1", "aria-label": "Copies done" });
    this.words = el("p", { class: "moving" });
    this.facts = el("div", { class: "detail flat" });
    this.list = el("div", { class: "table" });
    place.replaceChildren(this.words, this.bar, this.facts, this.list);
    this.table = new Table(this.list, "Targets, newest first", [
      { name: "Target", text: (entry) => String(entry.version) },
      { name: "Why", text: (entry) => entry.origin },
      { name: "Set", kind: "number", text: (entry) => clock(entry.begun) },
      { name: "Took", kind: "number", text: (entry) => (entry.ended ? `${figure(entry.ended - entry.begun)} s` : NONE) },
      { name: "Copies", kind: "number", text: (entry) => whole(entry.copies) },
      { name: "Bytes", kind: "number", text: (entry) => bytes(entry.copied_bytes) },
      { name: "Outcome", text: (entry) => entry.outcome },
    ]);
  }

  update(migration, history) {
    const current = history.find((entry) => entry.version === migration.target_version);
    const done = current ? current.copies : 0;
    const all = done + migration.copies_left;
    const target = migration.target_version ? `target ${migration.target_version} (${migration.origin})` : "no target yet";
    this.bar.hidden = !migration.moving;
    if (migration.moving && all) this.bar.value = done / all;
    else this.bar.removeAttribute("value");
    const paused = migration.paused ? ", paused" : "";
    setText(this.words, migration.problem || (migration.moving
      ? `Towards ${target}${paused}: ${many(migration.copies_in_flight, "copy", "copies")} in flight, ${whole(migration.copies_left)} of ${whole(all)} left (${bytes(migration.bytes_left)}).`
      : `Nothing moves: every expert is where ${target} wants it${paused}.`));
    this.words.classList.toggle("bad", Boolean(migration.problem));
    setText(this.note, migration.moving ? `${migration.phase}${paused}` : migration.paused ? "paused" : "still");
    fill(this.facts, [
      ["Rounds", whole(migration.rounds)],
      ["Copies", whole(migration.copies)],
      ["Copied", bytes(migration.copied_bytes)],
      ["Failed", whole(migration.failed_copies)],
      ["Sole copies", whole(migration.sole_copies)],
      ["On no shard", whole(migration.unserved)],
    ]);
    this.table.update(history.slice(0, 6), (entry) => entry.version);
  }
}

export class Autopilot {
  constructor({ place, note }) {
    this.note = note;
    this.words = el("p", { class: "moving" });
    this.facts = el("div", { class: "detail flat" });
    this.list = el("div", { class: "table" });
    place.replaceChildren(this.words, this.facts, this.list);
    this.table = new Table(this.list, "Decisions, newest first", [
      { name: "Plan", text: (decision) => `${decision.number} ${decision.kind}` },
      { name: "At", kind: "number", text: (decision) => clock(decision.at) },
      { name: "Why", text: (decision) => decision.why },
      { name: "Predicted", kind: "number", text: (decision) => signed(decision.predicted_gain) },
      { name: "Measured", kind: "number", text: (decision) => signed(decision.measured_gain) },
      { name: "Outcome", text: (decision) => decision.outcome },
    ]);
  }

  update(view, decisions) {
    setText(this.note, view.mode === "off" ? "off" : `${view.mode} \u00b7 ${view.state}`);
    const why = view.problem || view.frozen;
    setText(this.words, view.mode === "off"
      ? "The placement does not follow the traffic (autopilot.mode is off)."
      : why ? `It plans nothing for now: ${why}.` : view.window ? "" : "It waits for its first window of traffic.");
    this.words.hidden = !this.words.textContent;
    const { window } = view;
    fill(this.facts, window ? [
      ["Window", `${Math.round(window.seconds)} s`],
      ["Tokens", whole(Object.values(window.tokens).reduce((a, b) => a + b, 0))],
      ["Fan-out", figure(window.fan_out)],
      ["Balancedness", percent(window.balancedness)],
      ...(window.found === null ? [] : [["Experts found in memory", percent(window.found)]]),
      ["Drift", signed(window.drift)],
      ["Drifting", many(view.drifting, "window")],
    ] : []);
    this.facts.hidden = !window;
    this.list.hidden = !decisions.length;
    this.table.update(decisions.slice(0, 6), (decision) => decision.number);
  }
}

export class Events {
  constructor({ place, note, alert }) {
    Object.assign(this, { place, note, alert });
    this.newest = null;
  }

  update(events) {
    this.place.replaceChildren(...events.slice(0, SHOWN_EVENTS).map((event) => this.#entry(event)));
    setText(this.note, events.length ? `${many(events.length, "event")} \u00b7 newest first` : "none yet");
    const lost = events.find((event) => BAD.has(event.kind));
    if (lost && this.newest !== null && lost.at > this.newest) setText(this.alert, words(lost));
    this.newest = events.length ? events[0].at : 0;
  }

  #entry(event) {
    return el("li", { class: BAD.has(event.kind) ? "bad" : null },
      el("time", {}, clock(event.at)), el("i", { "aria-hidden": "true" }, GLYPHS[event.kind] || "\u00b7"),
      el("span", {}, words(event)), el("small", { title: "Epoch afterwards" }, `e${event.epoch}`));
  }
}

function words(event) {
  const rank = event.rank === null ? "" : `rank ${event.rank}`;
  if (event.by === "router") {
    const who = event.routers.length === 1 ? `router ${short(event.routers[0])}` : many(event.routers.length, "router");
    return rank ? `R${rank.slice(1)}: ${event.text} (${who})` : `${who[0].toUpperCase()}${who.slice(1)} ${event.text}`;
  }
  const text = rank ? `${rank}: ${event.text}` : event.text;
  return text[0].toUpperCase() + text.slice(1);
}
