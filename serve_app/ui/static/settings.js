// The settings beside the sliders of Gradio's: profile, golden ranges, shape and size, seed, number of pictures,
// model and LoRAs. What a value means is told on a line of its own beside it, which is always there.

import { atHost, changed, fill, held, host, input, make, parameters, put, readSize, showSize, whenChanged } from "./controls.js";
import { icon } from "./frame.js";
import { model, status } from "./status.js";
import { say } from "./words.js";

const SEEDS = 2 ** 32;

function note(id, text, kind = "") {
  const place = host(id);
  if (!place) return;
  if (!place.firstChild) put(place, make("p", { class: "note", id: `${id}-text`, "aria-live": "polite" }));
  const line = place.firstChild;
  if (line.textContent !== text) line.textContent = text;
  line.classList.toggle("warning", kind === "warning");
}

/** A row of choices of which one holds: radio buttons, so that arrow keys and screen readers know them. */
function choices(place, id, title, rows, choose) {
  const legend = make("legend", {}, title);
  const labels = rows.map((row) => {
    const radio = make("input", { type: "radio", name: `zimage-${id}`, value: row.value });
    // Before anybody looks at what is checked.
    radio.addEventListener("input", (event) => {
      event.stopPropagation();
      choose(row.value);
    });
    return make("label", { class: "choice", title: row.title }, radio, row.picture, make("span", {}, row.text));
  });
  put(place, make("fieldset", { class: `choices ${id}` }, legend, make("div", { class: "row" }, ...labels)));
}

function check(place, value) {
  for (const radio of place?.querySelectorAll("input[type=radio]") ?? []) {
    const is = radio.value === String(value);
    if (radio.checked !== is) radio.checked = is;
  }
}

// --- profile --------------------------------------------------------------------------------------------------

let profilesShown = "";

function showProfiles() {
  const place = host("profile");
  const known = model();
  if (!place || !known) return;
  const names = known.profiles.map((each) => each.name);
  if (profilesShown !== names.join() || !place.querySelector(".choices")) {
    profilesShown = names.join();
    choices(
      place,
      "profile",
      say("profile"),
      names.map((name) => ({ value: name, text: say(`profile_${name}`) })),
      (name) => {
        const profile = model().profiles.find((each) => each.name === name);
        fill({ num_inference_steps: profile.steps, guidance_scale: profile.guidance_scale, refine: profile.refine });
      },
    );
    place.append(make("p", { class: "note" }));
  }
  const now = parameters();
  const is = known.profiles.find(
    (each) =>
      each.steps === now.num_inference_steps &&
      Math.abs(each.guidance_scale - now.guidance_scale) < 0.001 &&
      each.refine === now.refine,
  );
  check(place, is?.name);
  const hint = is
    ? say(`profile_${is.name}_hint`, { steps: is.steps, guidance: is.guidance_scale })
    : say("profile_own_hint");
  const line = place.querySelector(".note");
  if (line.textContent !== hint) line.textContent = hint;
}

/** A profile by its name, from outside. */
window.addEventListener("zimage:parameters", (event) => {
  const profile = model()?.profiles.find((each) => each.name === event.detail?.profile);
  if (!profile) return;
  const { num_inference_steps, guidance_scale, refine } = event.detail;
  fill({
    num_inference_steps: num_inference_steps ?? profile.steps,
    guidance_scale: guidance_scale ?? profile.guidance_scale,
    refine: refine ?? profile.refine,
  });
});

// --- golden ranges --------------------------------------------------------------------------------------------

function showRange(id, good, value, best, off) {
  const block = document.getElementById(id);
  const range = block?.querySelector("input[type=range]");
  if (!range) return;
  const [low, high] = good;
  const part = (at) => Math.min(1, Math.max(0, (at - Number(range.min)) / (Number(range.max) - Number(range.min))));
  for (const [name, at] of [["--good-from", low], ["--good-to", high]]) {
    const value = part(at).toFixed(4);
    if (block.style.getPropertyValue(name) !== value) block.style.setProperty(name, value);
  }
  const side = value === undefined || off ? null : value < low ? "below" : value > high ? "above" : null;
  block.classList.toggle("outside", side !== null);
  const key = off ? `${id}_off` : `${id}_${side ?? "good"}`;
  // Off is a choice of its own: told, but no warning.
  note(`${id}-note`, say(key, { low, high, best }), side ? "warning" : "");
  for (const each of block.querySelectorAll("input")) describe(each, `${id}-note-text`);
}

function describe(field, id) {
  if (field.getAttribute("aria-describedby") !== id) field.setAttribute("aria-describedby", id);
}

function showRanges() {
  const known = model();
  if (!known) return;
  const { num_inference_steps: steps, guidance_scale: guidance } = parameters();
  showRange("steps", known.good_steps, steps, known.steps, false);
  showRange("guidance", known.good_guidance, guidance, known.guidance, guidance <= 1 && known.guidance > 1);
}

// --- shape and size -------------------------------------------------------------------------------------------

let sizesShown = "";
/** What the last typed size became, told until the next. */
let snapped = null;

function nearest(size) {
  const { multiple, max_side: most } = model();
  const longest = Math.floor(most / multiple) * multiple;
  return size.map((side) => Math.min(longest, Math.max(multiple, Math.round(side / multiple) * multiple)));
}

function frameOf([width, height]) {
  const scale = 15 / Math.max(width, height);
  const frame = make("i", { class: "frame", "aria-hidden": "true" });
  frame.style.width = `${(width * scale).toFixed(1)}px`;
  frame.style.height = `${(height * scale).toFixed(1)}px`;
  return frame;
}

function showAspects() {
  const place = host("aspect");
  const known = model();
  if (!place || !known) return;
  const rows = Object.entries(known.sizes);
  if (sizesShown !== JSON.stringify(rows) || !place.querySelector(".choices")) {
    sizesShown = JSON.stringify(rows);
    choices(
      place,
      "aspect",
      say("aspect"),
      rows.map(([aspect, size]) => ({
        value: size.join("x"),
        text: aspect,
        title: showSize(size),
        picture: frameOf(aspect.split(":").map(Number)),
      })),
      (size) => {
        snapped = null;
        fill({ size });
      },
    );
  }
  check(place, parameters().size);
}

function sizeNote() {
  const known = model();
  const field = input("size");
  if (!known || !field) return;
  const example = showSize(known.native);
  const typed = field.value.trim();
  const size = readSize(typed);
  describe(field, "size-note-text");
  if (!typed) return note("size-note", say("size_empty", { example }));
  if (!size) return note("size-note", say("size_unreadable", { example }), "warning");
  const fits = nearest(size);
  const asked = fits.join() === size.join() ? snapped : size;
  if (asked && nearest(asked).join() === fits.join() && asked.join() !== fits.join()) {
    return note("size-note", snapNote(asked, fits, known));
  }
  const area = Math.sqrt((size[0] * size[1]) / (known.native[0] * known.native[1]));
  if (area < known.good_side[0] || area > known.good_side[1]) return note("size-note", say("size_far"), "warning");
  if (size.join() === known.native.join()) return note("size-note", say("size_native"));
  const isPreset = Object.values(known.sizes).some((each) => each.join() === size.join());
  note("size-note", isPreset ? say("size_as_wide") : say("size_empty", { example }));
}

function snapNote(asked, fits, known) {
  const changes = asked
    .map((side, at) => (side === fits[at] ? null : `${side} → ${fits[at]}`))
    .filter(Boolean)
    .join(", ");
  const isBounded = asked.some((side) => side > known.max_side || side < known.multiple);
  return isBounded
    ? say("size_bounded", { changes, least: known.multiple, most: known.max_side })
    : say("size_snapped", { changes, multiple: known.multiple });
}

/** What was typed becomes what the model can draw, and is told. */
function snap() {
  const size = readSize(input("size")?.value ?? "");
  if (!model() || !size) return;
  const fits = nearest(size);
  if (fits.join() === size.join()) return;
  snapped = size;
  fill({ size: fits.join("x") });
}

document.addEventListener("input", (event) => {
  if (event.target.closest?.("#size")) snapped = null;
});
document.addEventListener("focusout", (event) => event.target.closest?.("#size") && snap());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.closest?.("#size")) snap();
});
// Drawn with Ctrl-Enter from within the field: before its value goes to the server.
document.addEventListener("change", (event) => event.target.closest?.("#size") && snap());

// --- seed -----------------------------------------------------------------------------------------------------

const DICE = "M5 3h14a2 2 0 0 1 2 2v14a2 2 0 0 1-2 2H5a2 2 0 0 1-2-2V5a2 2 0 0 1 2-2M8 8h.01M16 8h.01M12 12h.01M8 16h.01M16 16h.01";
const LOCKED = "M6 11h12a1 1 0 0 1 1 1v8a1 1 0 0 1-1 1H6a1 1 0 0 1-1-1v-8a1 1 0 0 1 1-1M8 11V7a4 4 0 0 1 8 0v4";
const UNLOCKED = "M6 11h12a1 1 0 0 1 1 1v8a1 1 0 0 1-1 1H6a1 1 0 0 1-1-1v-8a1 1 0 0 1 1-1M8 11V7a4 4 0 0 1 7.7-1.5";

let locked = false;
let lastSeed = null;

atHost("seed-tools", (place) => {
  const dice = make("button", { type: "button", class: "tool dice", "aria-label": say("dice"), title: say("dice") }, icon(DICE));
  dice.addEventListener("click", () => {
    fill({ seed: crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS });
  });
  const lock = make("button", { type: "button", class: "tool lock", "aria-label": say("lock"), title: say("lock") });
  const show = () => {
    lock.setAttribute("aria-pressed", String(locked));
    put(lock, icon(locked ? LOCKED : UNLOCKED));
  };
  lock.addEventListener("click", () => {
    locked = !locked;
    if (locked && lastSeed !== null && !input("seed")?.value.trim()) fill({ seed: lastSeed });
    if (!locked) fill({ seed: null });
    show();
  });
  show();
  put(place, dice, lock);
});

let inThisDrawing = null;
window.addEventListener("zimage:drawn", (event) => {
  const seed = event.detail?.parameters?.seed;
  if (seed === undefined) return;
  // Of several pictures the first one's: from it the others follow again.
  if (inThisDrawing === null) {
    lastSeed = inThisDrawing = seed;
    queueMicrotask(() => (inThisDrawing = null));
    if (locked && !input("seed")?.value.trim()) fill({ seed });
  }
});

// --- number of pictures ---------------------------------------------------------------------------------------

atHost("count", (place) => {
  const rows = [1, 2, 3, 4].map((count) => ({ value: count, text: String(count) }));
  choices(place, "count", say("count"), rows, (count) => {
    held.n = Number(count);
    changed();
  });
  check(place, held.n);
});

// --- exactness ------------------------------------------------------------------------------------------------

/** Comes with a picture that was drawn without what is quicker here, and stands until it is unticked. */
function showExact() {
  const place = host("count");
  const line = place?.querySelector(".exact");
  if (!held.exact) return line?.remove();
  if (!place || line) return;
  const tick = make("input", { type: "checkbox" });
  tick.checked = true;
  tick.addEventListener("input", (event) => {
    event.stopPropagation();
    held.exact = null;
    changed();
  });
  place.append(make("label", { class: "note exact" }, tick, " ", say("exact_asked")));
}
whenChanged(showExact);

// --- model ----------------------------------------------------------------------------------------------------

function stateOf(each) {
  if (each.state === "loading") {
    return each.progress === null
      ? say("model_loading_now")
      : say("model_loading_part", { percent: Math.round(100 * each.progress) });
  }
  return say(`model_${each.state}`);
}

function showModels() {
  const place = host("model");
  const models = status?.models ?? [];
  if (!place || status?.state === "away") return;
  if (models.length < 2) {
    if (place.firstChild) put(place);
    return;
  }
  let select = place.querySelector("select");
  if (!select) {
    select = make("select", { id: "model-select" });
    select.addEventListener("input", (event) => {
      event.stopPropagation();
      held.model = select.value === status.models[0].id ? null : select.value;
      window.dispatchEvent(new CustomEvent("zimage:model"));
      changed();
    });
    put(place, make("label", { class: "field" }, make("span", { class: "field-title" }, say("model")), select));
  }
  const rows = models.map((each) => [each.id, `${each.id} (${stateOf(each)})`, each.reason ?? ""]);
  if (select.dataset.rows !== JSON.stringify(rows)) {
    select.dataset.rows = JSON.stringify(rows);
    // The list keeps its options where only their words change: an open list stays open.
    while (select.options.length > rows.length) select.lastChild.remove();
    rows.forEach(([id, text, reason], at) => {
      const option = select.options[at] ?? select.appendChild(make("option"));
      option.value = id;
      option.title = reason;
      if (option.textContent !== text) option.textContent = text;
    });
  }
  const chosen = held.model ?? models[0].id;
  if (select.value !== chosen) select.value = chosen;
}

// --- LoRAs ----------------------------------------------------------------------------------------------------

let loras = [];
let lorasFor;

async function askLoras() {
  const name = held.model ?? "";
  if (status?.state !== "ready" || lorasFor === name) return;
  const isLoaded = !name || status.models?.find((each) => each.id === name)?.state === "ready";
  if (!isLoaded) return;
  lorasFor = name;
  try {
    const response = await fetch(`/v1/loras${name ? `?model=${encodeURIComponent(name)}` : ""}`);
    loras = response.ok ? (await response.json()).data.filter((each) => each.fits) : [];
  } catch {
    lorasFor = undefined; // asked again with the next status
    return;
  }
  showLoras(true);
}

function weightOf(name) {
  return held.loras?.find((each) => each.name === name)?.weight;
}

function setWeight(name, weight) {
  const others = (held.loras ?? []).filter((each) => each.name !== name);
  const rest = weight === null ? others : [...others, { name, weight }];
  held.loras = rest.length ? rest : null; // none chosen: those that the server draws with by itself
  changed();
}

function loraRow(lora) {
  const tick = make("input", { type: "checkbox" });
  const slider = make("input", { type: "range", min: 0, max: 2, step: 0.05, "aria-label": say("lora_weight", { name: lora.name }) });
  const shown = make("output", {});
  tick.addEventListener("input", (event) => {
    event.stopPropagation();
    setWeight(lora.name, tick.checked ? Number(slider.value) : null);
  });
  slider.addEventListener("input", (event) => {
    event.stopPropagation();
    setWeight(lora.name, Number(slider.value));
  });
  const words = lora.trigger_words.length ? say("lora_words", { words: lora.trigger_words.join(", ") }) : "";
  const row = make(
    "div",
    { class: "lora" },
    make("label", {}, tick, make("span", {}, lora.name)),
    make("span", { class: "weight" }, slider, shown),
    words ? make("p", { class: "note" }, words) : null,
  );
  row.show = () => {
    const weight = weightOf(lora.name);
    tick.checked = weight !== undefined;
    const value = String(weight ?? (slider.value && row.shownOnce ? slider.value : 1));
    row.shownOnce = true;
    if (slider.value !== value) slider.value = value;
    shown.textContent = Number(slider.value).toFixed(2);
    row.classList.toggle("on", tick.checked);
  };
  return row;
}

function showLoras(anew = false) {
  const place = host("loras");
  if (!place) return;
  if (anew) {
    const rows = loras.map(loraRow);
    const list = make("fieldset", { class: "loras" }, make("legend", {}, say("loras")), ...rows);
    put(place, rows.length ? list : null);
  }
  for (const row of place.querySelectorAll(".lora")) row.show();
}

// --- all of them ----------------------------------------------------------------------------------------------

const show = () => {
  showProfiles();
  showRanges();
  showAspects();
  sizeNote();
  check(host("count"), held.n);
  showModels();
  showLoras();
};
whenChanged(show);
for (const id of ["profile", "aspect", "model", "loras", "steps-note", "guidance-note", "size-note"]) atHost(id, show);
window.addEventListener("zimage:status", askLoras);
window.addEventListener("zimage:model", askLoras);
