// One's pictures, newest first: what the server keeps, shown, opened, and removed again.

import { atHost, make, put } from "./controls.js";
import { compare } from "./compare.js";
import { Refused, ask, button, hideNote, note } from "./keep.js";
import { openViewer } from "./viewer.js";
import { say } from "./words.js";

const PATH = "/v1/history";
const A_PAGE = 48;
/** As long as a note stands that offers to undo. */
const SURE_SECONDS = 8;
const SEARCH_MS = 250;

let items = [];
let hasMore = false;
let loading = null;
let words = "";
let current = null;
let waitingToGo = null;
let firstOfTwo = null;
let parts = null;
const seen = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more());

// --- what the server has -----------------------------------------------------------------------------------------

async function page(before) {
  const query = new URLSearchParams({ limit: A_PAGE });
  if (before) query.set("before", before);
  if (words) query.set("q", words);
  return (await ask(`${PATH}?${query}`)).json();
}

/** Load the next ones; whether there are any. One at a time. */
function more() {
  if (!hasMore) return Promise.resolve(false);
  loading ??= (async () => {
    const wanted = words;
    try {
      const { data, has_more } = await page(items.at(-1)?.id);
      if (wanted !== words) return false;
      hasMore = has_more;
      add(data, "after");
      return data.length > 0;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      tell(error.message, true);
      return false;
    } finally {
      loading = null;
      showMore();
    }
  })();
  return loading;
}

/** Begin anew: at first, after a search, and when it did not work. */
async function begin() {
  const wanted = words;
  try {
    const { data, has_more } = await page(null);
    if (wanted !== words) return;
    items = [];
    put(parts.list);
    hasMore = has_more;
    add(data, "after");
    tell(null);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (wanted !== words) return;
    const off = error.code === "history_off";
    parts.root.classList.toggle("off", off);
    tell(off ? say("gallery_off") : error.message, !off);
  }
  showMore();
}

/** Put those at the top that were drawn since, here or in another window. */
async function catchUp() {
  if (!parts || words || waitingToGo || parts.root.classList.contains("off")) return;
  try {
    const { data } = await page(null);
    const known = new Set(items.map((item) => item.id));
    // More than a page has passed: what lies between is not known.
    if (items.length && !data.some((item) => known.has(item.id))) return begin();
    add(data.filter((item) => !known.has(item.id)), "before");
    tell(null);
  } catch (error) {
    if (!(error instanceof Refused)) throw error; // the next look tells more
  }
}

async function addDrawn(id) {
  if (!id || items.some((item) => item.id === id)) return;
  if (words) return;
  try {
    const item = await (await ask(`${PATH}/${id}`)).json();
    add([item], "before");
    tell(null);
  } catch (error) {
    if (!(error instanceof Refused)) throw error; // it is there at the next visit
  }
}

// --- tiles -------------------------------------------------------------------------------------------------------

function add(found, where) {
  const known = new Set(items.map((item) => item.id));
  const fresh = found.filter((item) => !known.has(item.id) && item.id !== waitingToGo?.item.id);
  if (!fresh.length) return;
  items = where === "after" ? [...items, ...fresh] : [...fresh, ...items];
  const tiles = fresh.map(tile);
  if (where === "after") parts.list.append(...tiles);
  else parts.list.prepend(...tiles);
  if (!current) rove(items[0].id);
}

function tile(item) {
  const image = make("img", {
    src: item.thumbnail_url,
    alt: item.parameters.prompt || say("gallery_untold"),
    loading: "lazy",
    decoding: "async",
    width: item.width,
    height: item.height,
    draggable: "false",
  });
  const open = make("button", { type: "button", class: "tile", "aria-keyshortcuts": "Delete", tabindex: item.id === current ? 0 : -1 }, image);
  open.addEventListener("click", () => choose(item));
  open.addEventListener("focus", () => rove(item.id));
  return make("li", { "data-id": item.id }, open);
}

const tileOf = (id) => parts.list.querySelector(`li[data-id="${CSS.escape(id)}"] .tile`);

/** One tile is in the order of Tab; the arrows lead to the others. */
function rove(id) {
  if (current && current !== id) tileOf(current)?.setAttribute("tabindex", -1);
  current = id;
  tileOf(id)?.setAttribute("tabindex", 0);
}

function columns() {
  const [first, ...others] = parts.list.children;
  if (!first) return 1;
  const next = others.findIndex((each) => each.offsetTop !== first.offsetTop);
  return next < 0 ? others.length + 1 : next + 1;
}

const MOVES = {
  ArrowRight: (at) => at + 1,
  ArrowLeft: (at) => at - 1,
  ArrowDown: (at) => at + columns(),
  ArrowUp: (at) => at - columns(),
  Home: () => 0,
  End: () => items.length - 1,
};

async function onKey(event) {
  const at = items.findIndex((item) => item.id === current);
  if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Delete") {
    event.preventDefault();
    remove(items[at]);
    (current ? tileOf(current) : parts.more)?.focus();
    return;
  }
  if (!(event.key in MOVES)) return;
  event.preventDefault();
  const to = MOVES[event.key](at);
  if (to >= items.length) await more();
  const wanted = items[Math.max(0, Math.min(items.length - 1, to))];
  if (to >= 0 && wanted) tileOf(wanted.id)?.focus();
}

function choose(item) {
  if (firstOfTwo) {
    const first = firstOfTwo;
    chooseSecond(null);
    compare(first, item);
    return;
  }
  openViewer(source, items.indexOf(item));
}

/** For the viewer: what it can step through and do with what it shows. */
const source = {
  items: () => items,
  more,
  remove,
  compare: chooseSecond,
  closed: (item) => item && tileOf(item.id)?.focus(),
};

// --- comparing ---------------------------------------------------------------------------------------------------

/** From now on the next tile is the second of two; null: no more. */
export function chooseSecond(item) {
  firstOfTwo = item;
  put(parts.choosing);
  parts.root.classList.toggle("choosing", item !== null);
  if (item === null) return;
  put(parts.choosing, make("span", {}, say("compare_choose")), button(say("keep_cancel"), () => chooseSecond(null)));
  parts.root.scrollIntoView({ block: "nearest" });
  (current ? tileOf(current) : null)?.focus();
}

// --- removing ----------------------------------------------------------------------------------------------------

/** Take it away; until the note has gone it can be brought back, and the server is not told. */
export function remove(item) {
  hideNote(); // the one before is gone for good now
  const at = items.indexOf(item);
  if (at < 0) return;
  items.splice(at, 1);
  tileOf(item.id)?.closest("li").remove();
  if (current === item.id) {
    current = null;
    const next = items[at] ?? items[at - 1];
    if (next) rove(next.id);
  }
  tell(null);
  const gone = { item, at };
  waitingToGo = gone;
  const timer = setTimeout(hideNote, SURE_SECONDS * 1000);
  note(say("gallery_removed"), {
    stay: true,
    action: [say("keep_undo"), () => {
      clearTimeout(timer);
      waitingToGo = null;
      putBack(gone);
    }],
    whenGone: () => {
      clearTimeout(timer);
      if (waitingToGo === gone) forget(gone);
    },
  });
}

function putBack({ item, at }) {
  items.splice(at, 0, item);
  parts.list.insertBefore(tile(item), parts.list.children[at] ?? null);
  if (!current) rove(item.id);
  tell(null);
}

async function forget(gone) {
  waitingToGo = null;
  try {
    await ask(`${PATH}/${gone.item.id}`, { method: "DELETE", keepalive: true });
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.code === "history_picture_not_found") return;
    putBack(gone);
    note(say("gallery_not_removed"), { lines: [error.message], stay: true });
  }
}
// Whoever leaves has not undone it.
window.addEventListener("pagehide", () => waitingToGo && hideNote());

function removeAll() {
  let timer = 0;
  const ask_first = button(say("gallery_remove_all"), () => {
    put(parts.all, make("span", {}, say("gallery_really")), really, rather_not);
    rather_not.focus();
    timer = setTimeout(back, SURE_SECONDS * 1000);
  });
  const back = () => {
    clearTimeout(timer);
    const had = parts.all.contains(document.activeElement);
    put(parts.all, ask_first);
    if (had) ask_first.focus();
  };
  const rather_not = button(say("gallery_keep"), back);
  const really = button(say("gallery_remove_them"), async () => {
    back();
    hideNote();
    try {
      await ask(PATH, { method: "DELETE" });
      current = null;
      parts.search.value = words = "";
      await begin();
      note(say("gallery_all_removed"));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      note(say("gallery_not_removed"), { lines: [error.message], stay: true });
    }
  }, { class: "keep-button danger" });
  parts.all.addEventListener("keydown", (event) => event.key === "Escape" && back());
  put(parts.all, ask_first);
}

// --- on the page -------------------------------------------------------------------------------------------------

/** What stands below the heading: null, what the tiles say themselves. */
function tell(sentence, again = false) {
  const empty = !items.length;
  parts.root.classList.toggle("empty", empty);
  const said = sentence ?? (empty ? say(words ? "gallery_none_found" : "gallery_empty") : null);
  put(parts.told, said && make("span", {}, said), again ? button(say("keep_again"), begin) : null);
  parts.told.hidden = said === null;
}

function showMore() {
  parts.more.hidden = !hasMore;
  // Told anew, so that a short page goes on until the button is out of sight.
  seen.unobserve(parts.more);
  if (hasMore) seen.observe(parts.more);
}

atHost("gallery", (place) => {
  const search = make("input", {
    type: "search",
    class: "keep-input",
    placeholder: say("gallery_search"),
    "aria-label": say("gallery_search"),
    maxlength: 200,
  });
  parts = {
    search,
    root: make("section", { class: "keep-section gallery", "aria-labelledby": "gallery-title" }),
    list: make("ul", { class: "tiles", "aria-label": say("gallery_title") }),
    told: make("p", { class: "keep-told", role: "status" }),
    choosing: make("p", { class: "keep-choosing", role: "status" }),
    all: make("span", { class: "keep-all" }),
    more: button(say("gallery_more"), more, { class: "keep-button more", hidden: true }),
  };
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      words = search.value.trim();
      current = null;
      begin();
    }, SEARCH_MS);
  });
  parts.list.addEventListener("keydown", onKey);
  parts.root.addEventListener("keydown", (event) => event.key === "Escape" && firstOfTwo && chooseSecond(null));
  removeAll();
  parts.root.append(
    make("header", {}, make("h2", { id: "gallery-title" }, say("gallery_title")), search, parts.all),
    parts.choosing,
    parts.told,
    parts.list,
    parts.more,
  );
  put(place, parts.root);
  items = [];
  current = null;
  begin();
});

window.addEventListener("zimage:drawn", (event) => parts && addDrawn(event.detail?.id));
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && catchUp());
