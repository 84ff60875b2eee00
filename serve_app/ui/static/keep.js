// What the scripts that keep pictures have in common: asking the server, saying so, handing files over.

import { make, put } from "./controls.js";
import { knows, language, say } from "./words.js";

/** The server did not do it; `message` is for the person at the page, `code` the server's own. */
export class Refused extends Error {
  constructor(message, code = null, status = 0, laterSeconds = 0) {
    super(message);
    this.code = code;
    this.status = status;
    this.laterSeconds = laterSeconds;
  }
}

/** The answer to a request, where it is a good one; throws Refused with a sentence otherwise. */
export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(say("keep_unreachable"));
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  // Without a body of ours it was a proxy that answered.
  const { message = `${say("keep_unreachable")} (${answer.status})`, code = null } = told.error ?? {};
  const own = code && knows(`refused_${code}`) ? say(`refused_${code}`) : null;
  const sentence = own === null ? message : language() === "zh" ? own : message;
  throw new Refused(sentence, code, answer.status, Number(answer.headers.get("retry-after")) || 0);
}

export const setControls = (parameters) =>
  window.dispatchEvent(new CustomEvent("zimage:parameters", { detail: parameters }));

/** As `setControls`, for all that draws a picture: what is not said is as it is where nobody has said anything. */
export const setAllControls = (parameters) =>
  setControls({ negative_prompt: null, size: null, seed: null, loras: null, model: null, ...parameters });

/** The controls as they stand; an empty object while the page is still being made. */
export const controlsNow = () => window.zimageParameters?.() ?? {};

export function showControls() {
  const prompt = document.querySelector("#prompt textarea");
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  prompt?.focus({ preventScroll: true });
  document.querySelector("#ask")?.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
}

export const button = (words, run, attributes = {}) => {
  const made = make("button", { type: "button", class: "keep-button", ...attributes });
  made.textContent = words;
  made.addEventListener("click", run);
  return made;
};

// --- a note at the edge of the window: never in the way, and gone by itself where nothing is to be read ------------

const NOTE_SECONDS = 7;
let noteTimer = 0;
let ended = () => {};

const noteBox = () => {
  let box = document.getElementById("keep-note");
  if (!box) box = make("div", { id: "keep-note", class: "kept", role: "status", "aria-live": "polite" });
  // An open dialog makes all beside it unreachable.
  const home = [...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body;
  if (box.parentNode !== home) home.append(box);
  return box;
};

/** Say it: `title`, then `lines`, then what else stands below. `action` is [words, what it does].
 * `whenGone` is called when the note goes for another reason than its action. */
export function note(title, { lines = [], extra = null, action = null, stay = false, whenGone = () => {} } = {}) {
  hideNote();
  const box = noteBox();
  ended = whenGone;
  const parts = [make("p", { class: "title" }, title), ...lines.map((line) => make("p", {}, line))];
  if (extra) parts.push(extra);
  const act = action && button(action[0], () => {
    ended = () => {};
    hideNote();
    action[1]();
  });
  const close = button("×", hideNote, { class: "keep-close", "aria-label": say("keep_close") });
  // What may have to be scrolled can be by keys too.
  const scrolls = lines.length > 3;
  put(box, make("div", { class: "words", tabindex: scrolls ? 0 : null }, ...parts), act, close);
  box.classList.add("shown");
  if (!stay) noteTimer = setTimeout(hideNote, NOTE_SECONDS * 1000);
}

export function hideNote() {
  clearTimeout(noteTimer);
  const box = document.getElementById("keep-note");
  if (box?.classList.contains("shown")) {
    box.classList.remove("shown");
    put(box);
  }
  const tell = ended;
  ended = () => {};
  tell();
}

/** After a dialog has opened or closed: the note belongs where it can be reached. */
export const rehomeNote = () => noteBox();

// --- files and the clipboard -------------------------------------------------------------------------------------

/** The browser saves these bytes under this name. */
export function save(blob, name) {
  const address = URL.createObjectURL(blob);
  const link = make("a", { href: address, download: name, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  // The download has begun when the click is over; its address may go a moment later.
  setTimeout(() => URL.revokeObjectURL(address), 2000);
}

/** Put the text on the clipboard and say so. Pages that came over plain HTTP from another machine have no
 * clipboard of their own: there the text is shown, selected, to be copied by hand. */
export async function copy(text, said) {
  try {
    if (!navigator.clipboard) throw new Error("this page has no clipboard");
    await navigator.clipboard.writeText(text);
    note(said);
  } catch {
    const area = make("textarea", { readonly: true, rows: 5, "aria-label": say("copy_by_hand") });
    area.value = text;
    note(say("copy_by_hand"), { extra: area, stay: true });
    area.focus();
    area.select();
  }
}

// --- how parameters are shown ------------------------------------------------------------------------------------

/** What is told of a picture, in this order: field, words for it, how its value reads. */
const onOff = (value) => say(value ? "keep_on" : "keep_off");
const loras = (value) =>
  value.map((lora) => (typeof lora === "string" ? lora : `${lora.name} × ${lora.weight ?? 1}`)).join(", ") ||
  say("keep_none");
const FACTS = [
  ["prompt", "fact_prompt", String],
  ["negative_prompt", "fact_negative", String],
  ["size", "fact_size", (value) => String(value).replace("x", " × ")],
  ["num_inference_steps", "fact_steps", String],
  ["guidance_scale", "fact_guidance", String],
  ["seed", "fact_seed", String],
  ["enhance", "fact_enhance", onOff],
  ["refine", "fact_refine", onOff],
  ["exact", "fact_exact", onOff],
  ["loras", "fact_loras", loras],
  ["profile", "fact_profile", String],
  ["model", "fact_model", String],
];

/** Rows [words, text] of what the parameters say. */
export const factsOf = (parameters) =>
  FACTS.filter(([field]) => isSaid(parameters[field])).map(([field, key, read]) => [
    say(key),
    read(parameters[field]),
  ]);

/** Rows [words, text of one, text of the other] where the two differ. */
export const differences = (one, other) =>
  FACTS.map(([field, key, read]) => [
    say(key),
    ...[one, other].map((of) => (isSaid(of[field]) ? read(of[field]) : "–")),
  ]).filter(([, left, right]) => left !== right);

const isSaid = (value) => value !== null && value !== undefined && value !== "";
