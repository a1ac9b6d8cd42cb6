// Beside a conversation: what its tokens are coloured by, and a map of it.
// - agentropy.colouring: the choice of four colourings, with the legend of the one that is chosen.
// - agentropy.minimap: entropy by turn, where each turn is on the page, and what of it is in view.
"use strict";

(function (agentropy) {
  const { h, number, brief, MEASURES } = agentropy;

  // Buttons, their keys and the legend; missing says what a measure lacks, or null.
  function colouring({ missing, change }) {
    const legend = h("div", { class: "legend" });
    const buttons = Object.entries(MEASURES).map(([name, one]) =>
      h(
        "button",
        {
          type: "button",
          "data-measure": name,
          on: { click: () => (missing(name) ? agentropy.announce(missing(name)) : change(name)) },
        },
        h("kbd", { "aria-hidden": "true", text: one.key }),
        one.short || one.label,
      )
    );
    const why = h("p", { class: "why" });
    function show(now, domain) {
      for (const button of buttons) {
        const name = button.dataset.measure, { label, what, key } = MEASURES[name];
        button.setAttribute("aria-pressed", String(name === now));
        // What is missing depends on what is shown.
        button.title = missing(name) || `${label}: ${what} (key ${key})`;
        if (missing(name)) button.setAttribute("aria-disabled", "true");
        else button.removeAttribute("aria-disabled");
      }
      const one = MEASURES[now];
      if (!domain) return legend.replaceChildren(h("p", { class: "faint", text: missing(now) || "No numbers here." }));
      const [low, high] = domain, middle = now === "advantage" ? 0 : now === "weight" ? 1 : (low + high) / 2;
      const at = (value) => ((value - low) / (high - low)) * 100;
      legend.replaceChildren(
        h("div", {
          class: "ramp",
          "data-ramp": now,
          "data-low": String(low),
          "data-high": String(high),
          style: { background: agentropy.gradient(now) },
          role: "img",
          "aria-label": `Scale of ${one.label} from ${brief(low)} to ${brief(high)} ${one.unit}`,
        }, h("i", { class: "notch", style: { left: `${at(middle)}%` } })),
        h(
          "div",
          { class: "ramp-ends" },
          h("span", { text: (now === "logprob" || now === "advantage" ? "≤ " : "") + brief(low) }),
          h("span", { style: { left: `${at(middle)}%` }, class: "ramp-middle", text: brief(middle) }),
          h("span", { text: (now === "logprob" ? "" : "≥ ") + brief(high) + (one.unit ? " " + one.unit : "") }),
        ),
      );
      why.textContent = `${one.label}: ${one.what}.`;
    }
    return {
      element: h(
        "div",
        { class: "colouring" },
        h("div", { class: "segments", role: "group", "aria-label": "Colour tokens by" }, buttons),
        legend,
        why,
      ),
      show,
      keys: Object.fromEntries(Object.entries(MEASURES).map(([name, { key }]) => [key, () => change(name)])),
    };
  }

  // sections: the turns on the page; values: mean entropy of each.
  function minimap({ sections, values, go }) {
    const longest = Math.max(...values.filter((value) => value !== null), 1e-9);
    const bars = h("div", { class: "bars" }), view = h("div", { class: "view" });
    const element = h(
      "div",
      {
        class: "minimap",
        role: "slider",
        tabindex: "0",
        "aria-orientation": "vertical",
        "aria-label": "Map of the turns, entropy each",
        "aria-valuemin": "0",
        "aria-valuemax": String(Math.max(0, sections.length - 1)),
      },
      bars,
      view,
    );
    let place = 0;
    const whole = () => {
      const first = sections[0].getBoundingClientRect().top,
        last = sections[sections.length - 1].getBoundingClientRect().bottom;
      return { first, size: last - first };
    };
    function layout() {
      if (!sections.length || !element.isConnected) return;
      const { first, size } = whole(), tall = element.clientHeight;
      bars.replaceChildren(...sections.map((section, at) => {
        const box = section.getBoundingClientRect(),
          value = values[at],
          share = value === null ? 0 : Math.max(0, value / longest);
        return h("i", {
          class: at === place ? "now" : null,
          style: {
            top: `${((box.top - first) / size) * tall}px`,
            height: `${Math.max(1, (box.height / size) * tall - 1)}px`,
            width: `calc(2px + ${(88 * share).toFixed(1)}%)`,
          },
        });
      }));
      scrolled();
    }
    function scrolled() {
      if (!sections.length) return;
      const { first, size } = whole(), tall = element.clientHeight;
      const from = Math.max(0, -first / size), to = Math.min(1, (innerHeight - first) / size);
      view.style.top = `${from * tall}px`;
      view.style.height = `${Math.max(4, (to - from) * tall)}px`;
    }
    function show(at) {
      place = at;
      [...bars.children].forEach((bar, one) => bar.classList.toggle("now", one === at));
      element.setAttribute("aria-valuenow", String(at));
      element.setAttribute("aria-valuetext", `turn ${at}, entropy ${number(values[at])} nats`);
    }
    const drag = (event) => {
      if (!sections.length) return;
      const { first, size } = whole(), box = element.getBoundingClientRect();
      window.scrollTo(0, scrollY + first + ((event.clientY - box.top) / box.height) * size - innerHeight / 2);
    };
    element.addEventListener(
      "pointerdown",
      (event) => (element.setPointerCapture(event.pointerId), drag(event), event.preventDefault()),
    );
    element.addEventListener("pointermove", (event) => element.hasPointerCapture(event.pointerId) && drag(event));
    element.addEventListener("keydown", (event) => {
      const to = { ArrowDown: place + 1, ArrowUp: place - 1, Home: 0, End: sections.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      go(Math.min(sections.length - 1, Math.max(0, to)));
    });
    const observer = new ResizeObserver(layout);
    observer.observe(element);
    if (sections.length) observer.observe(sections[0].parentElement);
    window.addEventListener("scroll", scrolled, { passive: true });
    return {
      element,
      layout,
      show,
      remove: () => (observer.disconnect(), window.removeEventListener("scroll", scrolled)),
    };
  }

  Object.assign(agentropy, { colouring, minimap });
})(window.agentropy);
