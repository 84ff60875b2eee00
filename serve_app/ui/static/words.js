// The page's words for scripts, in the language that the page speaks. Gradio writes the language that it
// chose into the document; the words of both stand in the head.

const texts = JSON.parse(document.getElementById("page-texts").textContent);

/** "zh" or "en": what the page speaks now. */
export function language() {
  return document.documentElement.lang.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** The sentence of this key, with its {fields} filled in. Plain text: put it in as textContent. */
export function say(key, values = {}) {
  const text = texts[key];
  if (!text) throw new Error(`there are no words for ${key}`);
  return text[language()].replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** Whether there are words for this key. */
export function knows(key) {
  return key in texts;
}
