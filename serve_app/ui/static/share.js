// Parameters as something to hand on: a command for curl, a program in Python, a link to this page.
//
// A link carries them behind its #, which browsers never send to a server.

import { atHost, make, put } from "./controls.js";
import { fileButton } from "./drop.js";
import { button, controlsNow, copy, note, setAllControls } from "./keep.js";
import { say } from "./words.js";

const PATH = "/v1/images/generations";
const MARK = "#p=";
const MOST_CHARACTERS = 200_000;
/** What OpenAI's client has names of its own for; the rest goes into its `extra_body`. */
const OPENAI_FIELDS = ["model", "prompt", "n", "size", "quality"];

// --- copies ------------------------------------------------------------------------------------------------------

/** Half a character, as a broken paste leaves it, is nothing that UTF-8 can say. */
const wellFormed = (text) => text.replace(/[\uD800-\uDBFF](?![\uDC00-\uDFFF])|(?<![\uD800-\uDBFF])[\uDC00-\uDFFF]/g, "\uFFFD");

const asked = (parameters) =>
  Object.fromEntries(
    Object.entries(parameters)
      .filter(([name, value]) => value !== null && value !== undefined && !(name === "n" && value === 1))
      .map(([name, value]) => [name, typeof value === "string" ? wellFormed(value) : value]),
  );

const inShell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** A command that draws with these parameters and saves zimage.png, or zimage-1.png and so on for several. */
export function curlOf(parameters, origin = location.origin) {
  const body = asked(parameters);
  const saving =
    (body.n ?? 1) > 1
      ? `while read -r picture; do i=$((i+1)); printf %s "$picture" | base64 -d > zimage-$i.png; done`
      : "base64 -d > zimage.png";
  return [
    `curl -fsS ${inShell(origin + PATH)} \\`,
    `  -H "Authorization: Bearer \${ZIMAGE_API_KEY:-none}" \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  --data-raw ${inShell(JSON.stringify(body))} \\`,
    `  | grep -o '"b64_json": *"[^"]*"' | cut -d '"' -f 4 | ${saving}`,
  ].join("\n");
}

/** A literal of Python's: what JSON writes is one but for three words. */
function inPython(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null || value === undefined) return "None";
  if (Array.isArray(value)) return `[${value.map(inPython).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, each]) => `${JSON.stringify(key)}: ${inPython(each)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** A program for OpenAI's client that does the same. */
export function pythonOf(parameters, origin = location.origin) {
  const body = { model: "zimage-turbo", ...asked(parameters) };
  const own = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.includes(name));
  const named = OPENAI_FIELDS.filter((name) => name in body).map((name) => `    ${name}=${inPython(body[name])},`);
  const extra = own.map(([name, value]) => `        ${JSON.stringify(name)}: ${inPython(value)},`);
  return [
    "import base64",
    "import os",
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${inPython(`${origin}/v1`)}, api_key=os.environ.get("ZIMAGE_API_KEY", "none"))`,
    "answer = client.images.generate(",
    ...named,
    ...(extra.length ? ["    extra_body={", ...extra, "    },"] : []),
    ")",
    "for number, picture in enumerate(answer.data, start=1):",
    `    Path(f"zimage-{number}.png").write_bytes(base64.b64decode(picture.b64_json))`,
    "",
  ].join("\n");
}

/** A link to this page with these parameters in its controls. */
export function linkOf(parameters, page = location.origin + location.pathname) {
  const bytes = new TextEncoder().encode(JSON.stringify(asked(parameters)));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return page + MARK + btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** Words, what it makes of parameters, and what is said when it has been copied. */
const COPIES = [
  ["copy_curl", curlOf, "copied_curl"],
  ["copy_python", pythonOf, "copied_python"],
  ["copy_link", linkOf, "copied_link"],
];

/** A button for each way to copy what `parameters()` gives. */
export const copyButtons = (parameters) =>
  COPIES.map(([words, make, said]) => button(say(words), () => copy(make(parameters()), say(said))));

// --- links that come in ------------------------------------------------------------------------------------------

const isText = (most) => (value) => typeof value === "string" && value.length <= most && !value.includes("\0");
const isWhole = (least, most) => (value) => Number.isInteger(value) && value >= least && value <= most;
const isNumber = (least, most) => (value) => Number.isFinite(value) && value >= least && value <= most;
const isSwitch = (value) => typeof value === "boolean";
const isLora = (value) =>
  isText(300)(value) ||
  (typeof value === "object" && value !== null && isText(300)(value.name) &&
    Object.keys(value).every((name) => name === "name" || name === "weight") &&
    (value.weight === undefined || isNumber(-10, 10)(value.weight)));

/** What a link may set, and what each may be. Whatever else it says, it is not one of ours. */
const FIELDS = {
  prompt: isText(32_000),
  negative_prompt: isText(32_000),
  size: (value) => typeof value === "string" && /^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$/.test(value),
  num_inference_steps: isWhole(1, 100),
  guidance_scale: isNumber(0, 20),
  seed: isWhole(0, 2 ** 32 - 1),
  enhance: isSwitch,
  refine: isSwitch,
  exact: isSwitch,
  loras: (value) => Array.isArray(value) && value.length <= 8 && value.every(isLora),
  profile: (value) => typeof value === "string" && /^[a-z]{1,20}$/.test(value),
  model: isText(300),
  quality: (value) => ["low", "medium", "high", "auto"].includes(value),
  n: isWhole(1, 10),
};

/** The parameters in what stands behind #p=; null where it is not a whole and sound link of this page. */
export function parametersIn(text) {
  if (text.length > MOST_CHARACTERS || !/^[\w-]+$/.test(text)) return null;
  let parameters;
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (sign) => sign.charCodeAt(0));
    parameters = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    return null;
  }
  if (typeof parameters !== "object" || parameters === null || Array.isArray(parameters)) return null;
  const sound = Object.entries(parameters).every(([name, value]) => Object.hasOwn(FIELDS, name) && FIELDS[name](value));
  return sound && Object.keys(parameters).length ? parameters : null;
}

function openLink() {
  if (!location.hash.startsWith(MARK)) return;
  const parameters = parametersIn(location.hash.slice(MARK.length));
  // Once is enough: a reload must not undo what was changed since.
  history.replaceState(history.state, "", location.pathname + location.search);
  if (parameters === null) {
    note(say("link_unusable"), { stay: true });
    return;
  }
  setAllControls(parameters);
  note(say("link_filled"));
}
window.addEventListener("hashchange", openLink);
openLink();

// --- on the page -------------------------------------------------------------------------------------------------

atHost("share", (place) => {
  put(
    place,
    make(
      "div",
      { class: "keep-row", role: "group", "aria-label": say("share_title") },
      make("span", { class: "keep-label" }, say("share_title")),
      ...copyButtons(controlsNow),
    ),
    make("div", { class: "keep-row" }, fileButton(), make("span", { class: "keep-hint" }, say("drop_hint"))),
  );
});
