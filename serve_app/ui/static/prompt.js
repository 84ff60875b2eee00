// What a prompt says and what will be added to it, while it is written. Nothing here takes the focus, touches
// what is being typed, or speaks to a screen reader with each key.

import { atHost, host, input, make, parameters, put, whenChanged } from "./controls.js";
import { status } from "./status.js";
import { language, say } from "./words.js";

const KINDS = ["subject", "style", "material", "light", "scene", "quality", "quoted"];
/** The preview of what is added waits for a pause: it is read, not glanced at. */
const PAUSE_MS = 250;
const REST_CHARACTERS = 60;
/** From this part of the room on, how much of it is taken is told. */
const NEARLY_FULL = 0.75;

/** Asks the newest question alone: one that is under way is given up for it. */
function newest(address) {
  let asking = null;
  return async (body) => {
    asking?.abort();
    const now = (asking = new AbortController());
    try {
      const response = await fetch(address, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: now.signal,
      });
      return asking === now && response.ok ? await response.json() : null;
    } catch {
      return null; // given up for a newer one, or the server is away: the next key asks again
    }
  };
}

const analyze = newest("/v1/prompts/analyze");
const enhance = newest("/v1/prompts/enhance");

// --- what the words say ---------------------------------------------------------------------------------------

let analysed = null;

async function showKeywords() {
  const text = input("prompt")?.value ?? "";
  if (text === analysed || composing) return;
  analysed = text;
  const answer = text.trim() ? await analyze({ prompt: text }) : { spans: [] };
  if (!answer || text !== analysed) return;
  const place = host("keywords");
  if (!place) return;
  const groups = KINDS.map((kind) => [kind, answer.spans.filter((span) => span.kind === kind)]).filter(
    ([, spans]) => spans.length,
  );
  put(
    place,
    groups.length
      ? make("ul", { class: "keywords", "aria-label": say("keywords") }, ...groups.map(([kind, spans]) => group(kind, spans)))
      : null,
    room(text, answer),
  );
}

function group(kind, spans) {
  const words = new Map(spans.map((span) => [`${span.text}\0${span.negated}`, span]));
  return make(
    "li",
    { class: `kind ${kind}` },
    make("b", {}, say(`kind_${kind}`)),
    ...[...words.values()].map((span) =>
      span.negated
        ? make("s", { title: say("not_wanted") }, span.text)
        : make("span", {}, span.text),
    ),
  );
}

/** How much of the model's room the prompt takes: nothing while there is plenty, at the end what is cut off. */
function room(text, answer) {
  const { tokens, token_limit: limit, cut_at: cut } = answer;
  if (Number.isInteger(cut)) {
    return make("p", { class: "note warning room" }, say("cut_at", { tokens, limit, rest: restOf(text, cut) }));
  }
  if (!tokens || !limit || tokens < NEARLY_FULL * limit) return null;
  return make("p", { class: "note room" }, say("tokens", { tokens, limit }));
}

/** What will not be read. The server counts Unicode's characters, a script halves of some: hence the array. */
function restOf(text, start) {
  const rest = [...text].slice(start);
  return rest.slice(0, REST_CHARACTERS).join("") + (rest.length > REST_CHARACTERS ? "…" : "");
}

// --- what will be added ---------------------------------------------------------------------------------------

let previewed = null;
let pause = 0;

function previewSoon() {
  const { prompt, negative_prompt, enhance: wanted } = parameters();
  const asked = JSON.stringify([prompt, negative_prompt, wanted]);
  if (asked === previewed || composing) return;
  previewed = asked;
  clearTimeout(pause);
  pause = setTimeout(() => preview(prompt, negative_prompt, wanted), PAUSE_MS);
}

async function preview(prompt, negative, wanted) {
  const place = host("enhance-preview");
  if (!place) return;
  if (!wanted || !prompt.trim()) {
    tell(say(wanted ? "will_add_later" : "will_add_off"), []);
    return;
  }
  const answer = await enhance({ prompt, negative_prompt: negative ?? null, enhance: "rules" });
  if (!answer) return;
  const of = (field) => answer.additions.filter((each) => each.field === field);
  const positive = of("prompt");
  const list = positive.map((each) => each.phrase).join(language() === "zh" ? "，" : ", ");
  // A language model takes seconds and a turn among the pictures: it writes when the picture is drawn.
  const rewrites = status?.enhancer && status.enhancer !== "rules";
  const summary = say(rewrites ? "will_rewrite" : list ? "will_add" : "will_add_nothing", { phrases: list || "–" });
  // Kept out of nothing while there is nothing to keep out by: without guidance it has no effect.
  tell(summary, [
    phrases("added", positive),
    phrases("added_negative", of("negative_prompt")),
    phrases("respected", answer.left_out),
  ]);
}

function phrases(key, rows) {
  if (!rows.length) return null;
  return make(
    "section",
    { class: key },
    make("h2", {}, say(key)),
    make("ul", {}, ...rows.map((row) => make("li", {}, make("b", {}, row.phrase), " ", make("span", {}, why(row))))),
  );
}

/** The server's reason is a sentence in English; for readers of Chinese the page has its own. */
function why(row) {
  return language() === "en" && row.because ? row.because : say(`reason_${row.reason}`, { about: row.about });
}

function tell(summary, sections) {
  const place = host("enhance-preview");
  if (!place.querySelector("details")) {
    put(place, make("details", { class: "preview" }, make("summary", {}, make("span")), make("div", { class: "why" })));
  }
  const details = place.querySelector("details");
  const line = details.querySelector("summary span");
  if (line.textContent !== summary) line.textContent = summary;
  line.title = summary;
  const rows = sections.filter(Boolean);
  details.classList.toggle("empty", rows.length === 0);
  put(details.querySelector(".why"), ...rows);
}

// --- noticing -------------------------------------------------------------------------------------------------

// While an input method composes, as for Chinese, the text is not yet what is meant.
let composing = false;
document.addEventListener("compositionstart", () => (composing = true));
document.addEventListener("compositionend", () => {
  composing = false;
  look();
});

const look = () => {
  showKeywords();
  previewSoon();
};
whenChanged(look);
atHost("keywords", look);
atHost("enhance-preview", () => {
  tell(say("will_add_later"), []);
  look();
});
