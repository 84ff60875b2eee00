// The controls from the scripts' side: read them, set them from outside, keep them over a reload.
//
// Reading goes one way, `window.zimageParameters()`, and so does setting: the event "zimage:parameters". Both
// speak of the fields of POST /v1/images/generations.

/** In the order of `Controls.filled` in layout.py: how each is read from what a person sees. */
const FILLED = ["prompt", "negative_prompt", "enhance", "refine", "size", "num_inference_steps", "guidance_scale", "seed"];
const KEPT = "zimage:controls";

export const element = (id) => document.getElementById(id);

/** The empty place of this id that a script fills in; null while Gradio has not made it. */
export const host = (id) => document.querySelector(`#${id} .host`);

export const input = (id) =>
  document.querySelector(`#${id} textarea, #${id} input[type=number], #${id} input:not([type=range])`);

/** What the scripts hold themselves, not Gradio: the number of pictures, LoRAs, the model, and whether
 * what makes drawing quicker stays away. */
export const held = { n: 1, loras: null, model: null, exact: null };

const listeners = new Set();
/** Call `listener` whenever a control has changed, whoever has changed it. */
export function whenChanged(listener) {
  listeners.add(listener);
}
export function changed() {
  for (const listener of listeners) listener();
}

/** "1024 × 768" or the like as [1024, 768]; null where it is no size. As `read_size` of the server reads it. */
export function readSize(text) {
  const found = /^\s*(\d{1,5})\s*(?:[xX×*,，]|\s)\s*(\d{1,5})\s*$/.exec(text);
  return found ? [Number(found[1]), Number(found[2])] : null;
}
export const showSize = (size) => `${size[0]} × ${size[1]}`;

const text = (id) => input(id)?.value ?? "";
const ticked = (id) => document.querySelector(`#${id} input[type=checkbox]`)?.checked ?? true;
const number = (id) => {
  const value = Number.parseFloat(text(id));
  return Number.isFinite(value) ? value : undefined;
};

/** What was set a moment ago and Gradio does not show yet. */
let unseen = {};

/** The fields of a request as the controls stand; what is left to the server is not in it. */
export function parameters() {
  return { ...shown(), ...withoutEmpty(unseen) };
}

function shown() {
  const size = readSize(text("size"));
  const seed = text("seed").trim();
  const all = {
    prompt: text("prompt"),
    negative_prompt: text("negative").trim() || undefined,
    size: size ? size.join("x") : undefined,
    num_inference_steps: number("steps"),
    guidance_scale: number("guidance"),
    seed: /^\d+$/.test(seed) ? Number(seed) : undefined,
    enhance: ticked("enhance"),
    refine: ticked("refine"),
    n: held.n,
    loras: held.loras ?? undefined,
    model: held.model ?? undefined,
    exact: held.exact ?? undefined,
  };
  for (const name of Object.keys(unseen)) delete all[name];
  return withoutEmpty(all);
}

const withoutEmpty = (fields) =>
  Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined && value !== null));

// --- setting ---------------------------------------------------------------------------------------------

let waiting = null;

/** Set these fields; those that are absent stay, null empties. The page shows them a moment later. */
export function fill(fields) {
  for (const name of Object.keys(held)) {
    if (name in fields) held[name] = name === "n" ? clampCount(fields.n) : normal(name, fields[name]);
  }
  const first = waiting === null;
  waiting = { ...waiting, ...fields };
  for (const name of FILLED) {
    if (name in fields && !(fields[name] === null && WITHOUT_NULL.has(name))) unseen[name] = told(name, fields[name]);
  }
  if (first) press();
}

/** As `parameters` tells it. */
function told(name, value) {
  if (name !== "size") return value;
  return readSize(String(value ?? ""))?.join("x") ?? null;
}

const clampCount = (n) => Math.min(4, Math.max(1, Math.round(Number(n)) || 1));

function normal(name, value) {
  if (name !== "loras" || value === null || value === undefined) return value || null;
  return value.map((each) => {
    if (typeof each !== "string") return { name: each.name, weight: each.weight ?? 1 };
    const found = /^(.+)=(-?[\d.]+)$/.exec(each);
    return found ? { name: found[1], weight: Number(found[2]) } : { name: each, weight: 1 };
  });
}

const PRESS_AGAIN_MS = 150;
/** By then Gradio shows what it was told. */
const SHOWN_AFTER_MS = 60;

/** Gradio's own values are set through an event of Gradio's: what its inputs show is not what it holds. While
 * the page comes up its buttons are there before they are heard. */
function press() {
  if (waiting === null) return;
  element("fill")?.click();
  setTimeout(press, PRESS_AGAIN_MS);
}

const AS_GRADIO_HOLDS = {
  prompt: (value) => String(value ?? ""),
  negative_prompt: (value) => String(value ?? ""),
  enhance: (value) => value !== false,
  refine: (value) => value !== false,
  size: (value) => {
    const size = readSize(String(value ?? ""));
    return size ? showSize(size) : "";
  },
  num_inference_steps: Number,
  guidance_scale: Number,
  seed: (value) => (value === null || value === undefined ? "" : String(value)),
};
/** Null stands for "as the server does without it": for these the control has no such place. */
const WITHOUT_NULL = new Set(["enhance", "refine", "num_inference_steps", "guidance_scale"]);

// Called by the hidden button's event with the values that Gradio holds, in the order of FILLED.
window.zimageFilled = (values) => {
  const fields = waiting ?? {};
  waiting = null;
  setTimeout(seen, SHOWN_AFTER_MS);
  return over(values, fields);
};

/** Of the values that Gradio holds, those of FILLED with these fields put over them. */
function over(values, fields) {
  return FILLED.map((name, at) => {
    if (!(name in fields) || (fields[name] === null && WITHOUT_NULL.has(name))) return values[at];
    return AS_GRADIO_HOLDS[name](fields[name]);
  });
}

function seen() {
  if (waiting !== null) return; // more has come, and will be seen with the rest
  unseen = {};
  changed();
}

/** The values that are drawn from: also what was set so lately that Gradio holds the former ones. */
window.zimageAsked = (values) => over(values, unseen);

window.zimageParameters = parameters;
/** The fields that Gradio does not hold, as the drawing handler of the page takes them. */
window.zimageMore = () => JSON.stringify(held);

let filledFromOutside = false;
window.addEventListener("zimage:parameters", (event) => {
  filledFromOutside = true;
  fill(event.detail ?? {});
});

// --- over a reload ---------------------------------------------------------------------------------------

const memory = {
  read() {
    try {
      return JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    } catch {
      return null;
    }
  },
  write(fields) {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(fields));
    } catch {
      // a browser that keeps nothing: then a reload begins anew
    }
  },
};

export function keepOverReload() {
  if (input("prompt")) memory.write({ ...parameters(), size: text("size"), seed: text("seed").trim() || null });
}
window.addEventListener("pagehide", keepOverReload);

/** What the tab's controls were set to before it was loaded anew; null on a first visit. */
export function restored() {
  return filledFromOutside ? null : memory.read();
}

// --- noticing --------------------------------------------------------------------------------------------

document.addEventListener("input", changed);
document.addEventListener("change", changed);
// What Gradio's own buttons set, such as a slider's way back, it tells nobody.
document.addEventListener("click", () => requestAnimationFrame(() => requestAnimationFrame(changed)));

/** Call `fill_in(place)` for the host of this id as soon as it is there, and again where Gradio makes it anew. */
export function atHost(id, fillIn) {
  places.push([id, fillIn]);
  look();
}
const places = [];
function look() {
  for (const [id, fillIn] of places) {
    const place = host(id);
    if (place && !place.dataset.filled) {
      place.dataset.filled = "yes";
      fillIn(place);
    }
  }
}
new MutationObserver(look).observe(document.documentElement, { childList: true, subtree: true });

/** An element with these attributes and children; text is text, never markup. */
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Put these children in place of what is there. */
export function put(place, ...children) {
  place.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}
