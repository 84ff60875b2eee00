// Runs before everything else of the page: the language and the colours that a person has chosen are what
// Gradio's own scripts find the browser to want. Where nothing was chosen the browser's own wishes hold.

(() => {
  const remembered = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // a browser that keeps nothing
    }
  };

  const language = remembered("zimage:language");
  const wished = language === "en" || language === "zh" ? language : navigator.language || "en";
  // Gradio knows two of the many locales of Chinese by their whole names.
  const locale = !/^zh/i.test(wished) ? wished : /^zh-(tw|hk|mo|hant)/i.test(wished) ? "zh-TW" : "zh-CN";
  if (locale !== navigator.language) {
    Object.defineProperty(navigator, "language", { get: () => locale, configurable: true });
    Object.defineProperty(navigator, "languages", { get: () => [locale], configurable: true });
  }
  document.documentElement.lang = locale;

  // Gradio asks once which colours the system wants, and listens for changes: both are answered by the choice.
  const ask = window.matchMedia.bind(window);
  const DARK = "(prefers-color-scheme: dark)";
  let forThisPage = null; // where the browser keeps nothing
  const choice = () => {
    const theme = forThisPage ?? remembered("zimage:theme");
    return theme === "dark" || theme === "light" ? theme : null;
  };
  window.matchMedia = (query) => {
    const answer = ask(query);
    if (query.replace(/\s+/g, " ") !== DARK) return answer;
    return new Proxy(answer, {
      get(target, name) {
        if (name === "matches") return choice() ? choice() === "dark" : target.matches;
        const value = Reflect.get(target, name, target);
        return typeof value === "function" ? value.bind(target) : value;
      },
    });
  };

  window.zimageTheme = {
    /** "light", "dark" or null: as the system wants it. */
    chosen: choice,
    /** "light", "dark" or "system", from now on. */
    choose(theme) {
      try {
        if (theme === "system") localStorage.removeItem("zimage:theme");
        else localStorage.setItem("zimage:theme", theme);
      } catch {
        forThisPage = theme;
      }
      apply();
    },
  };

  function apply() {
    const dark = window.matchMedia(DARK).matches;
    const root = document.documentElement;
    root.classList.add("turning"); // frame.css
    requestAnimationFrame(() => requestAnimationFrame(() => root.classList.remove("turning")));
    root.dataset.theme = dark ? "dark" : "light";
    root.style.colorScheme = root.dataset.theme;
    document.body?.classList.toggle("dark", dark);
  }
  ask(DARK).addEventListener("change", apply);
  apply();
})();
