"use strict";
// What the scripts of sections may call. They run after this one, once the page is parsed.
const page = {
  // The JSON value of a section's data, by its name. Unpacked on each call: keep it.
  async data(name) {
    return page.unpacked(name).json();
  },
  // Run a library, at the first call for it.
  library(name) {
    return page.libraries[name] ??= page.unpacked(name).text().then((code) => {
      const script = document.createElement("script");
      script.textContent = code;  // one whose hash the policy names
      document.head.append(script);
    });
  },
  libraries: {},
  unpacked(name) {
    const text = atob(document.getElementById(name).textContent);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
  },
  // Is the page dark now, by the button or by the system?
  dark() {
    return (document.documentElement.dataset.theme || (page.system.matches ? "dark" : "light")) === "dark";
  },
  // Call a function whenever light and dark are switched; it is given page.dark().
  onTheme(call) {
    document.addEventListener("page-theme", () => call(page.dark()));
  },
  system: matchMedia("(prefers-color-scheme: dark)"),
};

(() => {
  const button = document.getElementById("theme");
  const saved = (value) => {  // a page opened as a file may have no storage
    try {
      return value === undefined ? localStorage.getItem("theme") : localStorage.setItem("theme", value);
    } catch { return null; }
  };
  const show = () => {
    button.textContent = page.dark() ? "light" : "dark";
    button.title = button.ariaLabel = `switch to ${button.textContent} colours`;
    document.dispatchEvent(new Event("page-theme"));
  };
  button.addEventListener("click", () => {
    const theme = page.dark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    saved(theme);
    show();
  });
  page.system.addEventListener("change", show);
  if (["light", "dark"].includes(saved())) document.documentElement.dataset.theme = saved();
  button.hidden = false;
  show();
})();

// A watched page asks its server for its version, and loads itself again when there is a newer one.
(() => {
  const mine = document.documentElement.dataset.watched;
  if (!mine) return;
  setInterval(async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== mine) location.reload();
    } catch { /* the server has ended */ }
  }, 3000);
})();
