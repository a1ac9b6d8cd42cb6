// Runs before anything is drawn, so that the page never flashes in the other theme.
"use strict";

window.agentropy = window.agentropy || {};

(function (agentropy) {
  const NAME = "agentropy.theme", system = matchMedia("(prefers-color-scheme: dark)");

  function remembered() {
    try {
      return localStorage.getItem(NAME);
    } catch {
      return null; // storage may be forbidden; the theme then lasts as long as the page
    }
  }

  // As chosen, or else as the system has it. Asked for every token that is painted.
  agentropy.theme = () => document.documentElement.dataset.theme || (system.matches ? "dark" : "light");

  agentropy.setTheme = (theme) => {
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(NAME, theme);
    } catch {
      // see above
    }
    document.dispatchEvent(new Event("agentropy:theme"));
  };

  const before = remembered();
  if (before === "light" || before === "dark") document.documentElement.dataset.theme = before;
  system.addEventListener("change", () => document.dispatchEvent(new Event("agentropy:theme")));
})(window.agentropy);
