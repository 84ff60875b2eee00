// What the server is at, asked again every few seconds while somebody looks: the bar at the bottom, the badge,
// and the model's own values, which are told on as the event "zimage:status".

import { atHost, changed, element, fill, held, host, make, parameters, put, restored, whenChanged } from "./controls.js";
import { say } from "./words.js";

const EVERY_MS = 4000;
const WHILE_LOADING_MS = 1000;
const PATIENCE_MS = 8000;

/** The last answer of the server; null before the first, `state` away where it did not answer. */
export let status = null;

/** The model that would draw now: the chosen one as soon as it is known, else the default one. */
export function model() {
  const chosen = held.model && status?.models?.find((each) => each.id === held.model);
  return chosen?.model ?? status?.model ?? null;
}

let timer = 0;
let asking = null;

async function ask() {
  clearTimeout(timer);
  asking?.abort();
  const now = (asking = new AbortController());
  const late = setTimeout(() => now.abort(), PATIENCE_MS);
  try {
    const response = await fetch("/page/status", { signal: now.signal, cache: "no-store" });
    if (!response.ok) throw new Error(`status ${response.status}`);
    status = await response.json();
  } catch {
    if (asking !== now) return; // a newer question took its place
    status = { ...status, state: "away" };
  } finally {
    clearTimeout(late);
  }
  show();
  const soon = status.state === "loading" || status.models?.some((each) => each.state === "loading");
  if (!document.hidden) timer = setTimeout(ask, soon ? WHILE_LOADING_MS : EVERY_MS);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else ask();
});
window.addEventListener("zimage:drawn", () => {
  clearTimeout(timer);
  timer = setTimeout(ask, 0); // once for all pictures of a drawing
});
window.addEventListener("zimage:model", () => show());

function show() {
  if (!status) return;
  followDefaults();
  showBar();
  showLoading();
  showBadge();
  window.dispatchEvent(new CustomEvent("zimage:status", { detail: status }));
  changed();
}

/** Sets text only where it changed: what stays the same does not flicker, and is not read out again. */
function setText(place, text) {
  if (place && place.textContent !== text) place.textContent = text;
}

/** How far the model is with loading, as far as that is known. */
function loadingText() {
  const part = status.progress;
  return typeof part === "number" ? say("model_loading_read", { percent: Math.floor(100 * part) }) : say("model_loading");
}

function device() {
  if (status.state === "loading") return ["loading", loadingText()];
  if (status.state === "ready" && status.device) return ["ready", status.device];
  return ["unknown", say("device_unknown")];
}

function workers() {
  const count = status.workers ?? 0;
  return say(count === 0 ? "workers_none" : count === 1 ? "workers_one" : "workers_more", { workers: count });
}

function queue() {
  const { drawing = 0, waiting = 0 } = status;
  return say(waiting ? "queue_waiting" : drawing ? "queue_drawing" : "queue_idle", { drawing, waiting });
}

function showBar() {
  const place = host("status");
  if (!place || !status) return;
  if (!place.querySelector(".status")) {
    put(place, make("span", { class: "status" }), make("span", { class: "workers" }), make("span", { class: "queue" }));
  }
  const line = place.querySelector(".status");
  const [kind, text] = device();
  if (line.className !== `status ${kind}`) line.className = `status ${kind}`;
  setText(line, text);
  if (line.title !== (status.hint ?? "")) line.title = status.hint ?? "";
  const known = status.state === "ready";
  setText(place.querySelector(".workers"), known ? workers() : "");
  setText(place.querySelector(".queue"), known ? queue() : "");
}

function showLoading() {
  const place = host("loading");
  if (!place) return;
  const loading = status?.state === "loading";
  if (loading) setText(place.querySelector("strong"), loadingText());
  if (loading === Boolean(place.firstChild)) return;
  put(
    place,
    loading
      ? make(
          "div",
          { class: "box calm", role: "status" },
          // Read out once, not at each percent.
          make("strong", { "aria-live": "off" }, loadingText()),
          make("p", {}, say("model_loading_hint")),
        )
      : null,
  );
}

/** What would be drawn with now: `Steps: 8 | CFG: 1.8 | bfloat16`. */
function showBadge() {
  const place = host("badge");
  const known = model();
  if (!place || !known) return;
  if (!place.firstChild) put(place, make("span", { class: "badge" }));
  const { num_inference_steps: steps, guidance_scale: guidance } = parameters();
  const shown = [steps ?? known.steps, (guidance ?? known.guidance).toFixed(1)];
  setText(place.firstChild, `Steps: ${shown[0]} | CFG: ${shown[1]} | ${known.dtype}`);
}

// --- defaults that change while the page is open --------------------------------------------------------------

/** What was put into the controls for the person; they have moved a control that shows something else. */
const given = { num_inference_steps: 8, guidance_scale: 1.8, enhance: true, size: "" };

function followDefaults() {
  if (!status || status.state === "away") return;
  if (!element("fill")) {
    setTimeout(followDefaults, 50); // the page is still coming up
    return;
  }
  const known = model();
  const wanted = {
    enhance: status.default_enhance,
    ...(known && {
      num_inference_steps: known.steps,
      guidance_scale: known.guidance,
      size: known.native.join("x"),
    }),
  };
  const now = parameters();
  const fields = {};
  for (const [name, value] of Object.entries(wanted)) {
    if (value === undefined || value === given[name]) continue;
    const shown = name === "size" ? (now.size ?? document.querySelector("#size input, #size textarea")?.value ?? "") : now[name];
    if (shown === given[name]) fields[name] = value;
    given[name] = value;
  }
  if (Object.keys(fields).length) fill(fields);
}

// --- beginning ------------------------------------------------------------------------------------------------

atHost("status", () => {
  const before = restored();
  if (before) {
    // What was moved before the page was loaded anew is moved still.
    for (const [name, value] of Object.entries(before)) if (name in given && value !== given[name]) given[name] = null;
    fill(before);
  }
  ask();
});
atHost("badge", () => showBadge());
atHost("loading", () => status && showLoading());
whenChanged(showBadge);
