// Stopping what is drawn: the button beside "Draw", there only while something is drawn, and Escape.

import { held } from "./controls.js";

/** The page's own name, which no other page can guess; it goes with every drawing. */
const name = Array.from(crypto.getRandomValues(new Uint8Array(16)), (each) => each.toString(16).padStart(2, "0")).join("");
Object.defineProperty(held, "page", { value: name, enumerable: true });

const button = () => document.getElementById("stop");
const isShown = (shown) => shown !== null && shown.checkVisibility({ visibilityProperty: true });

/** Whether Escape has something nearer to close. */
const belongsToAnother = (event) =>
  event.defaultPrevented ||
  event.isComposing ||
  document.fullscreenElement !== null ||
  document.querySelector("dialog[open], [role=dialog][aria-modal=true]") !== null ||
  event.target.getAttribute?.("aria-expanded") === "true";

async function stop() {
  // The button goes with what it stopped: whoever uses the keyboard goes on at the one that draws.
  document.getElementById("generate")?.focus({ preventScroll: true });
  try {
    await fetch("/page/stop", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ page: name }),
    });
  } catch {
    // `connection.js` tells that the server is away; what was drawn there ends with it.
  }
}

document.addEventListener("click", (event) => {
  if (event.target.closest?.("#stop")) stop();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || belongsToAnother(event) || !isShown(button())) return;
  event.preventDefault();
  stop();
});
