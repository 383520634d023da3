// The reader's choice of light or dark, kept in this browser only. A classic script in <head>, not a module:
// it has to run before the first paint, or a dark page would flash white.
(() => {
  "use strict";
  const KEY = "e2a-theme";
  const root = document.documentElement;

  const stored = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage is forbidden in this browser: follow the system
    }
  };

  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

  const apply = (theme) => {
    if (theme === "dark" || theme === "light") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };

  const show = () => {
    for (const button of document.querySelectorAll("[data-theme-toggle]")) {
      button.setAttribute("aria-pressed", String(isDark()));
    }
  };

  apply(stored());
  document.addEventListener("DOMContentLoaded", show);
  document.addEventListener("click", (event) => {
    if (!event.target.closest?.("[data-theme-toggle]")) return;
    const theme = isDark() ? "light" : "dark";
    apply(theme);
    show();
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      return; // the choice holds for this page only
    }
  });
})();
