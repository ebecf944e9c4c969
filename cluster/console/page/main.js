// The page: asks, keeps, shows.

import { TimeLines } from "./charts.js";
import { byId, el, setText } from "./dom.js";
import { clock, many, ranges } from "./format.js";
import { HeatView } from "./heat_view.js";
import { Autopilot, Events, Movement } from "./panels.js";
import { Poll } from "./poll.js";
import { Store } from "./store.js";
import { Routers, Shards, stateOf } from "./tables.js";

const store = new Store();
const lines = new TimeLines(byId("lines"));
const heat = new HeatView({
  place: byId("heat"), controls: byId("heat-controls"), legend: byId("legend"), readout: byId("readout"),
  note: byId("experts-note"), hottest: byId("hottest"), onRank: (rank) => choose(rank, true),
});
const shards = new Shards({ place: byId("shards"), note: byId("shards-note"), detail: byId("shard-detail"), onRank: choose });
const routers = new Routers({ place: byId("routers"), note: byId("routers-note") });
const movement = new Movement({ place: byId("moves"), note: byId("moves-note") });
const pilot = new Autopilot({ place: byId("pilot"), note: byId("pilot-note") });
const events = new Events({ place: byId("events"), note: byId("events-note"), alert: byId("said") });
let chosen = null;

function choose(rank, reveal = false) {
  chosen = rank === chosen && !reveal ? null : rank;
  shards.choose(chosen, reveal);
  heat.choose(chosen);
}

function show(data) {
  const fresh = store.take(data);
  const { controller } = data;
  byId("main").hidden = false;
  byId("key-form").hidden = true;
  byId("forget").hidden = !poll.hasKey;
  if (fresh.placement) heat.setPlacement(store.placement);
  if (fresh.load) heat.setLoad(store.load);
  if (fresh.log) events.update(store.log.events);
  lines.update(store.points, data.fields, store.log.events, data.now);
  shards.update(data.shards, store.placement);
  routers.update(data.routers);
  if (controller) {
    movement.update(controller.migration, store.log.history);
    pilot.update(controller.autopilot, store.log.decisions);
  }
  sayState(data);
}

function sayState(data) {
  const { controller } = data;
  const state = byId("state");
  const bad = data.shards.filter((shard) => ["lost", "missing", "fault"].includes(stateOf(shard)));
  const problems = [];
  if (!controller) problems.push("The placement controller has not answered yet.");
  else {
    const serving = data.shards.filter((shard) => ["serving", "filling", "draining"].includes(stateOf(shard))).length;
    const answering = data.routers.filter((router) => router.answers).length;
    const parts = [`${serving} of ${data.shards.length} shards`, many(answering, "router")];
    parts.push(controller.complete ? "every expert is served" : `${controller.migration.unserved} experts on no shard`);
    setText(state, parts.join(" \u00b7 "));
    state.classList.remove("unknown");
    state.classList.toggle("bad", bad.length > 0 || !controller.complete || answering === 0);
    if (bad.length) problems.push(`Without rank ${ranges(bad.map((shard) => shard.rank))}. Requests go on: other replicas, or the routers themselves, compute its experts.`);
    if (controller.refusal) problems.push(`Shards cannot start: ${controller.refusal}`);
    if (data.now - data.controller_at > 5) problems.push(`The placement controller has not answered since ${clock(data.controller_at)}; serving goes on. Shards and movement are as of then.`);
  }
  for (const error of data.errors) if (!error.includes("controller")) problems.push(`Not answered: ${error}`);
  notices(problems);
  setText(byId("asked"), `${controller ? `epoch ${controller.epoch} \u00b7 ` : ""}${clock(data.now)}`);
}

function notices(texts, ...more) {
  const place = byId("notices");
  const name = JSON.stringify(texts);
  if (place.dataset.of === name && !more.length) return;
  place.dataset.of = name;
  place.replaceChildren(...texts.map((text) => el("p", { class: "notice" }, text)), ...more);
}

function silent({ since, nextMs, why }) {
  document.documentElement.classList.add("stale");
  const when = since === null ? "The console does not answer" : `No answer since ${clock(since)}`;
  const words = `${when} (${why}). Asking again in ${Math.round(nextMs / 1000)} s. `;
  const place = byId("notices");
  if (place.dataset.of === "silent") {
    setText(place.querySelector("span"), words); // the button, which may have the focus, stays
  } else {
    const again = el("button", { type: "button", onclick: () => poll.ask() }, "Ask now");
    notices([], el("p", { class: "notice bad", role: "alert" }, el("span", {}, words), again));
    place.dataset.of = "silent";
  }
  if (since === null) setText(byId("state"), "Not known");
}

function askForKey(why) {
  byId("state").className = "state unknown";
  byId("main").hidden = true;
  byId("key-form").hidden = false;
  notices([]);
  setText(byId("state"), "Needs an admin key");
  setText(byId("key-why"), why || "It is kept in this tab until you close it, and sent to this console only.");
  byId("key").focus();
}

const poll = new Poll({
  names: () => store.names(),
  onAnswer: (data) => {
    document.documentElement.classList.remove("stale");
    show(data);
  },
  onKey: askForKey,
  onSilence: silent,
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = byId("key");
  poll.useKey(field.value.trim());
  field.value = "";
});
byId("forget").addEventListener("click", () => poll.useKey(""));
poll.ask();
