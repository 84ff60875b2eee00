// A picture that tells how it was drawn, dropped onto the page, pasted or chosen: its parameters fill the controls.

import { make } from "./controls.js";
import { Refused, ask, button, note, setAllControls, showControls } from "./keep.js";
import { say } from "./words.js";

const KINDS = ["image/png", "image/webp", "image/jpeg"];
/** The server words its reasons in English: those that are common have words of the page's own. */
const REASONS = {
  "there is no such setting here": "drop_no_setting",
  "there is no model of this name here; the default one draws": "drop_no_model",
  "there is no LoRA of this name here": "drop_no_lora",
};
const SOURCES = { "zimage-turbo": "drop_from_here", automatic1111: "drop_from_a1111", comfyui: "drop_from_comfyui" };

let reading = 0;

/** Read the first of these files, fill the controls and say what came of it. */
export async function read(files) {
  const file = files[0];
  if (!file) return;
  if (!KINDS.includes(file.type)) {
    note(say("drop_other_kind", { name: file.name }), { stay: true });
    return;
  }
  const turn = ++reading;
  note(say("drop_reading", { name: file.name }), { stay: true });
  try {
    const form = new FormData();
    form.append("image", file);
    const answer = await ask("/v1/images/parameters", { method: "POST", body: form });
    const { parameters, source, ignored = [] } = await answer.json();
    if (turn !== reading) return;
    setAllControls(parameters);
    showControls();
    const lines = ignored.map(({ field, value, reason }) =>
      say("drop_ignored", { field, value: short(value), reason: REASONS[reason] ? say(REASONS[reason]) : reason }));
    if (files.length > 1) lines.push(say("drop_only_first", { pictures: files.length }));
    note(say(SOURCES[source] ?? "drop_from_here", { name: file.name }), { lines, stay: lines.length > 0 });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (turn === reading) note(say("drop_failed", { name: file.name }), { lines: [error.message], stay: true });
  }
}

const short = (value) => {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.length > 80 ? `${text.slice(0, 79)}…` : text;
};

/** For those who drag nothing. */
export function fileButton() {
  const input = make("input", { type: "file", accept: KINDS.join(","), hidden: true, "aria-label": say("drop_choose") });
  input.addEventListener("change", async () => {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    await read(files);
  });
  return make("span", { class: "keep-file" }, button(say("drop_choose"), () => input.click()), input);
}

// --- the whole window is the target --------------------------------------------------------------------------------

let own = false;
let veil = null;

const isFile = (event) => !own && [...(event.dataTransfer?.types ?? [])].includes("Files");

function show() {
  if (veil) return;
  veil = make("div", { id: "keep-veil", "aria-hidden": "true" }, make("p", {}, say("drop_here")));
  document.body.append(veil);
}
function hide() {
  veil?.remove();
  veil = null;
}

// A picture of this page that is dragged about is none that comes from outside.
document.addEventListener("dragstart", () => (own = true), true);
document.addEventListener("dragend", () => (own = false), true);
for (const name of ["dragenter", "dragover"]) {
  window.addEventListener(name, (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    event.stopPropagation();
    event.dataTransfer.dropEffect = "copy";
    show();
  }, true);
}
// Of all that the pointer leaves only the window itself has nothing behind it.
window.addEventListener("dragleave", (event) => event.relatedTarget === null && hide(), true);
window.addEventListener("drop", (event) => {
  hide();
  if (!isFile(event)) return;
  event.preventDefault();
  event.stopPropagation();
  read([...event.dataTransfer.files]);
}, true);

window.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  const isText = [...(event.clipboardData?.types ?? [])].includes("text/plain");
  if (!files.length || isText) return;
  event.preventDefault();
  event.stopPropagation();
  read(files);
}, true);
