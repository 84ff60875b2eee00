// Grids: the same picture under seeds that lie next to one another, or under several steps and guidances.
//
// The cells are asked for one behind the other, so that the queue treats a grid as a person who draws one picture
// after the other; each is kept as every picture is.

import { atHost, make, put } from "./controls.js";
import { Refused, ask, button, controlsNow, note, save } from "./keep.js";
import { openViewer } from "./viewer.js";
import { say } from "./words.js";

const CELL_PATH = "/page/cell";
const MOST_CELLS = 25;
const MOST_SEED = 2 ** 32 - 1;
/** A full queue is waited for so often, and at most so long each time. */
const TRIES = 6;
const MOST_WAIT_SECONDS = 30;
const PACE = "zimage:pace";

let parts = null;
let kind = "seeds";
let seeds = 4;
let running = null;
let grid = null;

// --- what is to be drawn -----------------------------------------------------------------------------------------

/** Numbers of a comma list, each once, in order; null where one of them is none or out of bounds. */
export function numbersIn(text, least, most, whole) {
  const words = text.split(/[,，、;\s]+/).filter(Boolean);
  const numbers = words.map(Number);
  const fine = (value) => Number.isFinite(value) && value >= least && value <= most && (!whole || Number.isInteger(value));
  return words.length && numbers.every(fine) ? [...new Set(numbers)] : null;
}

const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** The grid that is asked for: labels of its columns and rows, and the parameters of each cell, row by row.
 * Throws Refused with what to change. */
function planned() {
  const base = { ...controlsNow() };
  delete base.n;
  const seed = base.seed ?? anySeed();
  if (kind === "seeds") {
    const first = Math.min(seed, MOST_SEED - seeds + 1);
    const all = Array.from({ length: seeds }, (_, at) => ({ ...base, seed: first + at }));
    const across = Math.sqrt(seeds);
    return { kind, columns: Array(across).fill(""), rows: Array(across).fill(""), cells: all, base: { ...base, seed: first } };
  }
  const steps = numbersIn(parts.steps.value, 1, 100, true);
  if (!steps) throw new Refused(say("grid_steps_unreadable"));
  const guidances = numbersIn(parts.guidance.value, 0, 20, false);
  if (!guidances) throw new Refused(say("grid_guidance_unreadable"));
  if (steps.length * guidances.length > MOST_CELLS) {
    throw new Refused(say("grid_too_many", { pictures: steps.length * guidances.length, most: MOST_CELLS }));
  }
  return {
    kind,
    columns: steps.map((each) => say("grid_column", { steps: each })),
    rows: guidances.map((each) => say("grid_row", { guidance: each })),
    cells: guidances.flatMap((guidance_scale) =>
      steps.map((num_inference_steps) => ({ ...base, seed, num_inference_steps, guidance_scale }))),
    base: { ...base, seed },
  };
}

/** Passes through the model, the measure of how long a cell takes: guidance doubles them. */
const passes = (cell) => (cell.num_inference_steps ?? 8) * ((cell.guidance_scale ?? 1.8) > 1 ? 2 : 1);

/** Seconds a pass of this size, as measured; null where nothing of this size was drawn in this tab. */
function pace(size, measured = null) {
  try {
    const known = JSON.parse(sessionStorage.getItem(PACE) ?? "{}");
    if (measured === null) return known[size] ?? null;
    sessionStorage.setItem(PACE, JSON.stringify({ ...known, [size]: measured }));
  } catch {
    // a browser that keeps nothing: then it is told once the first cell is there
  }
  return measured;
}

const sizeOf = (cell) => cell.size ?? "native";

function howLong(cells) {
  const known = cells.length ? pace(sizeOf(cells[0])) : null;
  if (known === null) return say("grid_count", { pictures: cells.length });
  const seconds = known * cells.reduce((sum, cell) => sum + passes(cell), 0);
  const time = seconds < 90 ? say("grid_seconds", { seconds: Math.max(1, Math.round(seconds)) })
    : say("grid_minutes", { minutes: Math.round(seconds / 60) });
  return say("grid_count_and_time", { pictures: cells.length, time });
}

function foretell() {
  if (!parts || running) return;
  try {
    parts.told.textContent = howLong(planned().cells);
    parts.draw.disabled = false;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    parts.told.textContent = error.message;
    parts.draw.disabled = true;
  }
}

// --- drawing -----------------------------------------------------------------------------------------------------

const wait = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal.addEventListener("abort", stop, { once: true });
  });

async function drawnCell(parameters, signal) {
  for (let tried = 1; ; tried++) {
    try {
      const answer = await ask(CELL_PATH, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(parameters),
        signal,
      });
      return await answer.json();
    } catch (error) {
      const isLater = error instanceof Refused && (error.status === 429 || error.status === 503);
      if (!isLater || tried === TRIES) throw error;
      parts.told.textContent = say("grid_waits");
      await wait(Math.min(MOST_WAIT_SECONDS, error.laterSeconds || 2), signal);
    }
  }
}

async function draw() {
  if (running) return;
  let plan;
  try {
    plan = planned();
    if (!plan.base.prompt?.trim()) throw new Refused(say("grid_prompt_empty"));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    parts.told.textContent = error.message;
    return;
  }
  drop();
  grid = { ...plan, items: plan.cells.map(() => null) };
  showGrid();
  running = new AbortController();
  const { signal } = running;
  showRunning();
  parts.stop.focus();
  let said = null;
  try {
    for (const [at, cell] of plan.cells.entries()) {
      parts.told.textContent = `${say("grid_at", { number: at + 1, pictures: plan.cells.length })} ${howLong(plan.cells.slice(at))}`;
      parts.cells[at].classList.add("drawing");
      const drawn = await drawnCell(cell, signal);
      pace(sizeOf(cell), drawn.seconds / passes(cell));
      grid.items[at] = itemOf(drawn);
      showCell(at);
      parts.sheet.hidden = false;
      window.dispatchEvent(new CustomEvent("zimage:drawn", { detail: { id: drawn.id, parameters: drawn.parameters } }));
    }
    said = say("grid_done", { pictures: plan.cells.length });
  } catch (error) {
    const isStopped = error.name === "AbortError";
    if (!isStopped && !(error instanceof Refused)) throw error;
    const done = grid.items.filter(Boolean).length;
    said = say(isStopped ? "grid_stopped" : "grid_ended", { number: done, pictures: plan.cells.length });
    if (!isStopped) said += ` ${error.message}`;
  } finally {
    running = null;
    for (const cell of parts.cells) cell.classList.remove("drawing");
    const had = document.activeElement === parts.stop;
    showRunning();
    if (had) parts.draw.focus();
    if (said) parts.told.textContent = said;
  }
}

function itemOf(drawn) {
  if (drawn.id) return { ...drawn, created: Date.now() / 1000 };
  const bytes = Uint8Array.from(atob(drawn.b64_json), (sign) => sign.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  return { ...drawn, b64_json: undefined, url, thumbnail_url: url, created: Date.now() / 1000 };
}

/** The one before gives its memory back. */
function drop() {
  for (const item of grid?.items ?? []) if (item && !item.id) URL.revokeObjectURL(item.url);
  grid = null;
}

// --- showing -----------------------------------------------------------------------------------------------------

const labelOf = (cell) => (grid.kind === "seeds" ? say("grid_seed", { seed: cell.seed })
  : say("grid_cell", { steps: cell.num_inference_steps, guidance: cell.guidance_scale }));

function showGrid() {
  parts.cells = grid.cells.map(() => make("td", {}));
  const across = grid.columns.length;
  const named = grid.kind === "steps";
  const rows = grid.rows.map((words, row) =>
    make("tr", {}, named ? make("th", { scope: "row" }, words) : null, ...parts.cells.slice(row * across, (row + 1) * across)));
  put(parts.sheetPlace,
    make("table", { class: `grid-table ${grid.kind}`, style: `--across: ${across}` },
      make("caption", {}, say("grid_caption", { prompt: grid.base.prompt, seed: grid.base.seed })),
      named ? make("thead", {}, make("tr", {}, make("td", {}),
        ...grid.columns.map((words) => make("th", { scope: "col" }, words)))) : null,
      make("tbody", {}, ...rows)));
  for (const at of grid.cells.keys()) showCell(at);
  parts.sheet.hidden = true;
}

function showCell(at) {
  const [cell, item] = [grid.cells[at], grid.items[at]];
  const label = grid.kind === "seeds" ? make("span", { class: "keep-label" }, String(cell.seed)) : null;
  const [width, height] = (cell.size ?? "1x1").split("x");
  const shape = `aspect-ratio: ${item?.width ?? width} / ${item?.height ?? height}`;
  if (!item) {
    put(parts.cells[at], make("span", { class: "pending", style: shape }), label);
    return;
  }
  const image = make("img", { src: item.thumbnail_url, alt: labelOf(cell), draggable: "false", style: shape });
  const open = make("button", { type: "button", class: "tile" }, image);
  const there = () => grid.items.filter(Boolean);
  open.addEventListener("click", () => openViewer({ items: there, closed: () => open.focus() }, there().indexOf(item)));
  parts.cells[at].classList.remove("drawing");
  put(parts.cells[at], open, label);
}

function showRunning() {
  parts.draw.hidden = running !== null;
  parts.stop.hidden = running === null;
  for (const each of parts.root.querySelectorAll("fieldset")) each.disabled = running !== null;
}

// --- one labelled sheet ------------------------------------------------------------------------------------------

const CELL_PX = 512;
const MOST_PX = 8000;
const LINE_PX = 30;
const GAP_PX = 12;

const loaded = (address) => new Promise((resolve, reject) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = () => reject(new Refused(say("grid_sheet_failed")));
  image.src = address;
});

async function saveSheet() {
  const { cells, items, columns, rows, base, kind: of } = grid;
  try {
    const images = await Promise.all(items.map((item) => (item ? loaded(item.url) : null)));
    const some = images.find(Boolean);
    const across = columns.length;
    const room = (MOST_PX - 200) / Math.max(across, rows.length) - GAP_PX - LINE_PX;
    const scale = Math.min(1, CELL_PX / Math.max(some.width, some.height), room / Math.max(some.width, some.height));
    const [wide, high] = [Math.round(some.width * scale), Math.round(some.height * scale)];
    const isSeeds = of === "seeds";
    const left = isSeeds ? 0 : 120;
    const caption = say("grid_caption", { prompt: base.prompt, seed: base.seed });
    const canvas = document.createElement("canvas");
    canvas.width = left + across * (wide + GAP_PX) + GAP_PX;
    const top = 2 * LINE_PX + (isSeeds ? 0 : LINE_PX);
    const step = high + GAP_PX + (isSeeds ? LINE_PX : 0);
    canvas.height = top + rows.length * step + GAP_PX;
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#ffffff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = "#292524";
    pen.textBaseline = "middle";
    const write = (text, x, y, most, align = "left", size = 18) => {
      pen.font = `${size}px system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif`;
      pen.textAlign = align;
      pen.fillText(fitting(pen, text, most), x, y);
    };
    write(caption.replace(/\s+/g, " "), GAP_PX, LINE_PX, canvas.width - 2 * GAP_PX, "left", 20);
    for (const at of cells.keys()) {
      const [row, column] = [Math.floor(at / across), at % across];
      const [x, y] = [left + GAP_PX + column * (wide + GAP_PX), top + row * step];
      if (row === 0 && !isSeeds) write(columns[column], x + wide / 2, top - LINE_PX / 2, wide, "center");
      if (column === 0 && !isSeeds) write(rows[row], GAP_PX, y + high / 2, left - GAP_PX);
      if (images[at]) pen.drawImage(images[at], x, y, wide, high);
      if (isSeeds) write(labelOf(cells[at]), x + wide / 2, y + high + LINE_PX / 2, wide, "center");
    }
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    if (!blob) throw new Refused(say("grid_sheet_failed"));
    save(blob, `zimage-grid-${base.seed}.png`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    note(error.message, { stay: true });
  }
}

/** As much of the text as fits into so many pixels. */
function fitting(pen, text, most) {
  if (pen.measureText(text).width <= most) return text;
  const signs = [...text];
  let [fits, too_long] = [0, signs.length];
  while (too_long - fits > 1) {
    const half = (fits + too_long) >> 1;
    if (pen.measureText(`${signs.slice(0, half).join("")}…`).width <= most) fits = half;
    else too_long = half;
  }
  return `${signs.slice(0, fits).join("")}…`;
}

// --- on the page -------------------------------------------------------------------------------------------------

const choice = (name, words, value, isNow, choose) => {
  const input = make("input", { type: "radio", name, value });
  input.checked = isNow;
  input.addEventListener("change", () => {
    choose(value);
    showKind();
    foretell();
  });
  return make("label", { class: "keep-choice" }, input, make("span", {}, words));
};

function showKind() {
  parts.ofSeeds.hidden = kind !== "seeds";
  parts.ofSteps.hidden = kind !== "steps";
}

const listInput = (words, value) => {
  const input = make("input", { type: "text", class: "keep-input", value, maxlength: 200, inputmode: "decimal", autocomplete: "off" });
  input.addEventListener("input", foretell);
  return [input, make("label", { class: "keep-field" }, make("span", { class: "keep-label" }, words), input)];
};

atHost("grid", (place) => {
  running?.abort();
  drop();
  const [steps, stepsField] = listInput(say("grid_steps"), "4, 8, 12");
  const [guidance, guidanceField] = listInput(say("grid_guidance"), "1, 1.8, 2.5");
  parts = {
    steps,
    guidance,
    cells: [],
    root: make("details", { class: "keep-section grid" }),
    ofSeeds: make("fieldset", {}, make("legend", { class: "keep-label" }, say("grid_how_many")),
      ...[4, 9].map((number) => choice("grid-seeds", String(number), number, number === seeds, (value) => (seeds = value)))),
    ofSteps: make("fieldset", {}, stepsField, guidanceField),
    told: make("p", { class: "keep-told", role: "status" }),
    draw: button(say("grid_draw"), draw, { class: "keep-button first" }),
    stop: button(say("grid_stop"), () => running?.abort(), { hidden: true }),
    sheet: button(say("grid_sheet"), saveSheet, { hidden: true }),
    sheetPlace: make("div", { class: "grid-place", role: "region", tabindex: 0, "aria-label": say("grid_title") }),
  };
  parts.root.append(
    make("summary", {}, make("h2", {}, say("grid_title")), make("span", { class: "keep-hint" }, say("grid_hint"))),
    make("fieldset", {}, make("legend", { class: "keep-label" }, say("grid_kind")),
      choice("grid-kind", say("grid_of_seeds"), "seeds", kind === "seeds", (value) => (kind = value)),
      choice("grid-kind", say("grid_of_steps"), "steps", kind === "steps", (value) => (kind = value))),
    parts.ofSeeds,
    parts.ofSteps,
    parts.told,
    make("div", { class: "keep-row" }, parts.draw, parts.stop, parts.sheet),
    parts.sheetPlace,
  );
  parts.root.addEventListener("toggle", foretell);
  showKind();
  put(place, parts.root);
});

for (const name of ["input", "change", "zimage:parameters"]) window.addEventListener(name, () => parts?.root.open && foretell());

// What a drawing of the page took tells how long a cell takes.
window.addEventListener("zimage:drawn", (event) => {
  const seconds = Number.parseFloat(document.querySelector("#facts .used_time")?.textContent ?? "");
  const { parameters } = event.detail ?? {};
  if (parameters && !running && seconds > 0) pace(sizeOf(parameters), seconds / passes(parameters) / (parameters.n ?? 1));
  if (parts?.root.open) foretell();
});
