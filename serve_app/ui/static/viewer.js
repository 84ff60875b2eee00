// One picture, large: how it was drawn, and all that can be done with it.

import { make, put } from "./controls.js";
import { button, factsOf, note, rehomeNote, setAllControls, setControls, showControls } from "./keep.js";
import { copyButtons } from "./share.js";
import { language, say } from "./words.js";

/** Kinds of file, with the words on the button. */
const FILES = [["png", "PNG"], ["webp", "WebP"], ["jpeg", "JPEG"]];

/** Facts of so many characters stand side by side. */
const SHORT = 14;

let dialog = null;
let source = null;
let item = null;
let parts = null;

/** Show the picture at this place of `from.items()`; the others are its neighbours.
 *
 * Of `from`, `more()` loads further ones, `remove(item)` removes one, `compare(item)` begins to compare it,
 * `closed(item)` is called at the end; all but `items` may be missing.
 */
export function openViewer(from, at) {
  source = from;
  build();
  show(from.items()[at]);
  if (!dialog.open) dialog.showModal();
  rehomeNote();
}

function build() {
  if (dialog) return;
  parts = {
    image: make("img", { class: "viewed", draggable: "false" }),
    facts: make("dl", { class: "viewer-facts" }),
    actions: make("div", { class: "viewer-actions" }),
    place: make("span", { class: "keep-label", role: "status" }),
    before: button("‹", () => step(-1), { class: "viewer-step", "aria-label": say("viewer_newer") }),
    after: button("›", () => step(1), { class: "viewer-step", "aria-label": say("viewer_older") }),
  };
  const close = button("×", () => dialog.close(), { class: "keep-close", "aria-label": say("keep_close") });
  dialog = make(
    "dialog",
    { id: "viewer", class: "keep-dialog kept", "aria-label": say("viewer_title") },
    make("div", { class: "viewer-stage" }, parts.before, parts.image, parts.after),
    make("div", { class: "viewer-side" },
      make("div", { class: "viewer-top" }, parts.place, close), parts.actions, parts.facts),
  );
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea, input")) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) {
      event.preventDefault();
      step(by);
    }
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    parts.image.removeAttribute("src");
    rehomeNote();
    const last = item;
    item = null;
    source.closed?.(last);
  });
  document.body.append(dialog);
}

async function step(by) {
  const from = source;
  const to = from.items().indexOf(item) + by;
  if (to >= from.items().length) await from.more?.();
  const next = from.items()[to];
  if (next && source === from && dialog.open) show(next);
}

function show(wanted) {
  item = wanted;
  const all = source.items();
  const at = all.indexOf(item);
  const { image } = parts;
  image.alt = item.parameters.prompt || say("gallery_untold");
  image.width = item.width;
  image.height = item.height;
  image.src = item.url;
  parts.place.textContent = item.created
    ? new Date(item.created * 1000).toLocaleString(language() === "zh" ? "zh-CN" : "en", { dateStyle: "medium", timeStyle: "short" })
    : "";
  parts.before.disabled = at <= 0;
  parts.after.disabled = at === all.length - 1 && !source.more;
  const rows = factsOf({ size: `${item.width}x${item.height}`, ...item.parameters, n: undefined });
  if (item.revised_prompt && item.revised_prompt !== item.parameters.prompt) {
    rows.splice(1, 0, [say("fact_drawn"), item.revised_prompt]);
  }
  put(parts.facts, ...rows.map(([words, text]) =>
    make("div", { class: text.length > SHORT ? "long" : "" }, make("dt", {}, words), make("dd", {}, text))));
  showActions();
}

function showActions() {
  const { parameters } = item;
  const had = parts.actions.contains(document.activeElement) ? [...parts.actions.querySelectorAll("button, a")].indexOf(document.activeElement) : -1;
  const fill = (set, fields, said) => () => {
    set(fields);
    const from = source;
    source = { ...source, closed: () => {} };
    dialog.close();
    source = from;
    showControls();
    note(say(said));
  };
  const kinds = item.id ? FILES : FILES.slice(0, 1);
  put(
    parts.actions,
    button(say("viewer_put_back"), fill(setAllControls, { ...parameters, n: 1 }, "viewer_put_back_done"), { class: "keep-button first" }),
    Number.isInteger(parameters.seed)
      ? button(say("viewer_use_seed"), fill(setControls, { seed: parameters.seed }, "viewer_use_seed_done"))
      : null,
    row("viewer_save", ...kinds.map(([kind, words]) => file(kind, words))),
    row("viewer_copy", ...copyButtons(() => ({ ...parameters, n: undefined }))),
    make("div", { class: "keep-row" },
      source.compare ? button(say("viewer_compare"), toCompare) : null,
      source.remove ? button(say("viewer_remove"), toRemove) : null),
  );
  if (had >= 0) [...parts.actions.querySelectorAll("button, a")][had]?.focus();
}

const row = (words, ...children) =>
  make("div", { class: "keep-row", role: "group", "aria-label": say(words) },
    make("span", { class: "keep-label" }, say(words)), ...children);

function file(kind, words) {
  const address = item.id ? `${item.url}?format=${kind}&download=1` : item.url;
  return make("a", { class: "keep-button", href: address, download: `zimage-${item.parameters.seed ?? "picture"}.${kind}` }, words);
}

function toCompare() {
  const chosen = item;
  const { compare } = source;
  const from = source;
  source = { ...source, closed: () => {} };
  dialog.close();
  source = from;
  compare(chosen);
}

function toRemove() {
  const all = source.items();
  const at = all.indexOf(item);
  const next = all[at + 1] ?? all[at - 1];
  source.remove(item);
  if (next) show(next);
  else dialog.close();
}
