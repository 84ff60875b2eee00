// Two pictures over one another with a line to wipe, and in what their parameters differ.

import { make, put } from "./controls.js";
import { button, differences, rehomeNote } from "./keep.js";
import { say } from "./words.js";

const STEP = 2;
const LEAP = 10;

let dialog = null;
let parts = null;
let percent = 50;

/** Lay the first over the second: left of the line is the first. */
export function compare(first, second) {
  build();
  for (const [image, item, which] of [[parts.first, first, "compare_first"], [parts.second, second, "compare_second"]]) {
    image.src = item.url;
    image.alt = say(which, { prompt: item.parameters.prompt || say("gallery_untold") });
  }
  parts.stage.style.aspectRatio = `${second.width} / ${second.height}`;
  parts.stage.style.setProperty("--wide", second.width / second.height);
  const of = (item) => ({ size: `${item.width}x${item.height}`, ...item.parameters, n: undefined });
  const rows = differences(of(first), of(second));
  put(
    parts.told,
    rows.length
      ? make("table", {},
          make("caption", {}, say("compare_differences")),
          make("thead", {}, make("tr", {}, make("td", {}),
            make("th", { scope: "col" }, say("compare_left")), make("th", { scope: "col" }, say("compare_right")))),
          make("tbody", {}, ...rows.map(([words, left, right]) =>
            make("tr", {}, make("th", { scope: "row" }, words), make("td", {}, left), make("td", {}, right)))))
      : make("p", { class: "keep-hint" }, say("compare_same")),
  );
  wipe(50);
  if (!dialog.open) dialog.showModal();
  rehomeNote();
  parts.line.focus();
}

function build() {
  if (dialog) return;
  parts = {
    first: make("img", { class: "over", draggable: "false" }),
    second: make("img", { draggable: "false" }),
    line: make("div", {
      class: "line", role: "slider", tabindex: 0, "aria-label": say("compare_slider"),
      "aria-valuemin": 0, "aria-valuemax": 100, "aria-orientation": "horizontal",
    }),
    told: make("div", { class: "compare-told" }),
  };
  parts.stage = make("div", { class: "compare-stage" }, parts.second, parts.first, parts.line);
  const close = button("×", () => dialog.close(), { class: "keep-close", "aria-label": say("keep_close") });
  dialog = make("dialog", { id: "compare", class: "keep-dialog kept", "aria-label": say("compare_title") },
    make("div", { class: "viewer-top" }, make("h2", {}, say("compare_title")), close), parts.stage, parts.told);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    parts.first.removeAttribute("src");
    parts.second.removeAttribute("src");
    rehomeNote();
  });
  parts.stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    parts.stage.setPointerCapture(event.pointerId);
    parts.line.focus();
    toPointer(event);
  });
  parts.stage.addEventListener("pointermove", (event) => parts.stage.hasPointerCapture(event.pointerId) && toPointer(event));
  parts.line.addEventListener("keydown", (event) => {
    const to = {
      ArrowLeft: percent - STEP, ArrowDown: percent - STEP, ArrowRight: percent + STEP, ArrowUp: percent + STEP,
      PageDown: percent - LEAP, PageUp: percent + LEAP, Home: 0, End: 100,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    wipe(to);
  });
  document.body.append(dialog);
}

function toPointer(event) {
  const box = parts.stage.getBoundingClientRect();
  wipe((100 * (event.clientX - box.left)) / box.width);
}

function wipe(to) {
  percent = Math.round(Math.min(100, Math.max(0, to)));
  parts.stage.style.setProperty("--at", `${percent}%`);
  parts.line.setAttribute("aria-valuenow", percent);
  parts.line.setAttribute("aria-valuetext", say("compare_at", { percent }));
}
