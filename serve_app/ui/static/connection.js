// Whether the server answers. When it does not, a calm line says so, and again when it is back; what was typed
// stays through all of it. Where Gradio's own connection broke, its page does nothing more until it is loaded
// again: that is done here, as soon as the server is back, and `controls.js` keeps the controls over it.

import { atHost } from "./controls.js";
import { say } from "./words.js";

const PATH = "/page/status";
const NAME = "/gradio_api/app_id";
const ANSWER_MS = 5_000;
const RETRY_MS = [500, 1_000, 2_000, 4_000, 8_000];
const SAID_MS = 8_000;
const BEFORE = "zimage:connection";
/** What the proxy before a server answers while there is none behind it. */
const GONE = new Set([502, 503, 504]);

const root = document.documentElement;
const isDrawing = () => document.querySelector("#progress .progress") !== null;

let place = null;
let key = null;
let lost = false;
let retries = 0;
let timer = 0;
let saidTimer = 0;
let checking = false;
let mustReload = false;
let wasDrawing = false;

function line(wanted) {
  clearTimeout(saidTimer);
  key = wanted;
  if (!place) return;
  const told = document.createElement("span");
  told.className = "connection-line";
  if (key) told.textContent = say(key);
  place.replaceChildren(...(key ? [told] : []));
}

function isBack(wanted) {
  root.dataset.connection = "again";
  line(wanted);
  saidTimer = setTimeout(() => {
    line(null);
    delete root.dataset.connection;
  }, SAID_MS);
}

function isLost() {
  wasDrawing ||= isDrawing();
  if (lost) return;
  lost = true;
  retries = 0;
  root.dataset.connection = "lost";
  line("connection_lost");
}

async function answers() {
  try {
    const response = await fetch(PATH, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
    return !GONE.has(response.status);
  } catch {
    return false;
  }
}

/** Whether a server that knows nothing of this page has taken the place of the one that the page came from. */
async function isAnother() {
  try {
    const response = await fetch(NAME, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
    return response.ok && (await response.json()).app_id !== window.gradio_config?.app_id;
  } catch {
    return false;
  }
}

async function check() {
  clearTimeout(timer);
  if (checking) return;
  checking = true;
  const isThere = await answers();
  // Of a stream that a server ends in good order Gradio's page takes no notice, and waits for ever.
  if (isThere && lost && isDrawing()) mustReload ||= await isAnother();
  checking = false;
  if (!isThere) {
    isLost();
    timer = setTimeout(check, RETRY_MS[Math.min(retries++, RETRY_MS.length - 1)]);
  } else if (mustReload) {
    location.reload();
  } else if (lost) {
    lost = false;
    wasDrawing = false;
    isBack("connection_again");
  }
}

// `status.js` asks all the time while somebody looks; here only when that was in vain.
window.addEventListener("zimage:status", (event) => {
  if (event.detail?.state === "away" && !lost) check();
});
window.addEventListener("online", check);
window.addEventListener("offline", check);

// Gradio tells of its own lost stream in a toast, which is hidden while the line says the same.
new MutationObserver((changes) => {
  for (const change of changes)
    for (const node of change.addedNodes) {
      if (node.nodeType !== Node.ELEMENT_NODE) continue;
      const toast = node.matches(".toast-body") ? node : node.querySelector(".toast-body");
      if (!toast?.textContent.includes("Connection Lost")) continue;
      mustReload = true;
      isLost();
      check();
    }
}).observe(document.documentElement, { childList: true, subtree: true });

// Gradio loads its page again by itself too: whoever does, the page that comes says what happened.
window.addEventListener("pagehide", () => {
  if (!mustReload) return;
  try {
    sessionStorage.setItem(BEFORE, wasDrawing ? "drawing_interrupted" : "connection_again");
  } catch {
    // a browser that keeps nothing: the page comes back without a word
  }
});

atHost("connection", (host) => {
  place = host;
  place.setAttribute("role", "status");
  place.setAttribute("aria-live", "polite");
  try {
    const before = sessionStorage.getItem(BEFORE);
    sessionStorage.removeItem(BEFORE);
    if (before) isBack(before);
    else line(key);
  } catch {
    line(key);
  }
});
