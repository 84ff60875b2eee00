// The frame of the page: language and colours by a switch, keys that draw, and what a finished drawing tells.

import { atHost, fill, keepOverReload, make, put } from "./controls.js";
import { language, say } from "./words.js";

const remember = (key, value) => {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch {
    // a browser that keeps nothing: the choice holds for this page
  }
};

// --- language -------------------------------------------------------------------------------------------------

atHost("language-switch", (place) => {
  const other = language() === "zh" ? "en" : "zh";
  const button = make("button", { type: "button", class: "switch", lang: other === "zh" ? "zh-CN" : "en" });
  button.textContent = other === "zh" ? "中文" : "English";
  button.title = say("language_switch");
  button.addEventListener("click", () => {
    remember("zimage:language", other);
    keepOverReload();
    location.reload();
  });
  put(place, button);
});

// --- colours --------------------------------------------------------------------------------------------------

const THEMES = ["system", "light", "dark"];
const DRAWN = {
  system: "M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18M12 3v18M12 7.5h5M12 12h8M12 16.5h5",
  light: "M12 8a4 4 0 1 0 0 8a4 4 0 1 0 0-8M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  dark: "M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5",
};

/** A line drawing of 24 by 24. */
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", "aria-hidden": "true", class: "icon" })) {
    svg.setAttribute(key, value);
  }
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

atHost("theme-switch", (place) => {
  const button = make("button", { type: "button", class: "switch round" });
  const show = () => {
    const now = window.zimageTheme.chosen() ?? "system";
    put(button, icon(DRAWN[now]));
    button.setAttribute("aria-label", say(`theme_${now}`));
    button.title = say(`theme_${now}`);
  };
  button.addEventListener("click", () => {
    const now = window.zimageTheme.chosen() ?? "system";
    window.zimageTheme.choose(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
    show();
  });
  show();
  put(place, button);
});

// --- keys -----------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  // What was typed last is a control's value once the control is left.
  document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
  requestAnimationFrame(() => document.querySelector("#generate")?.click());
});

// --- the empty frame -------------------------------------------------------------------------------------------

// Gradio names the place of the picture that is still to come, and in English, but does not say what it is.
function nameEmptyFrame() {
  for (const empty of document.querySelectorAll("#picture div[aria-label]:not([role])")) {
    empty.setAttribute("role", "img");
    empty.setAttribute("aria-label", say("no_picture"));
  }
}
new MutationObserver(nameEmptyFrame).observe(document.documentElement, { childList: true, subtree: true });

// --- a finished drawing ---------------------------------------------------------------------------------------

let told = null;
new MutationObserver(() => {
  const drawn = document.querySelector("#facts .facts[data-drawn]")?.dataset.drawn;
  if (!drawn || drawn === told) return;
  told = drawn;
  for (const detail of JSON.parse(drawn)) {
    window.dispatchEvent(new CustomEvent("zimage:drawn", { detail }));
  }
}).observe(document.documentElement, {
  childList: true,
  subtree: true,
  // Gradio may put the new facts into the element of the old ones.
  attributes: true,
  attributeFilter: ["data-drawn"],
});

document.addEventListener("click", (event) => {
  const seed = event.target.closest?.("#pictures .use-seed");
  if (seed) fill({ seed: Number(seed.dataset.seed) });
  const larger = event.target.closest?.("#pictures .larger");
  if (larger) {
    const pictures = larger.closest(".pictures");
    const is = larger.closest("figure").classList.toggle("large");
    pictures.classList.toggle("one", is);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const each of document.querySelectorAll("#pictures .one, #pictures .large")) each.classList.remove("one", "large");
});
