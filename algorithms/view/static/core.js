// What every part of the page uses: elements, numbers as words, and notices.
// Text always becomes text nodes: what an environment or a model wrote is never read as HTML.
"use strict";

window.agentropy = window.agentropy || {};

(function (agentropy) {
  const SVG = "http://www.w3.org/2000/svg";

  // properties: class, text, data-*, aria-*, on: {event: handler}; false and null leave an attribute out.
  function fill(element, properties, children) {
    for (const [name, value] of Object.entries(properties || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") {
        for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
      } else if (name === "text") element.textContent = value;
      else if (name === "style") {
        for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
      } else if (name === "value") element.value = value;
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    append(element, children);
    return element;
  }

  function append(element, children) {
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      element.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
  }

  const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
  const svg = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

  function number(value, digits = 2) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const text = Math.abs(value).toFixed(digits);
    return (value < 0 && Number(text) !== 0 ? "−" : "") + text;
  }

  const signed = (value, digits = 2) =>
    value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value, digits);

  // At most four significant digits, without trailing zeros; very small and large ones with an exponent.
  function brief(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    const far = size !== 0 && (size < 1e-3 || size >= 1e7);
    if (far) return value.toExponential(1).replace("-", "−").replace("e+", "e");
    if (Number.isInteger(value) && size >= 1000) return value.toLocaleString("en").replace("-", "−");
    if (size >= 1000) return Math.round(value).toLocaleString("en").replace("-", "−");
    return String(Number(value.toPrecision(size < 1 ? 3 : 4))).replace("-", "−");
  }

  const percent = (
    value,
    digits = 0,
  ) => (value === null || value === undefined ? "–" : number(100 * value, digits) + " %");
  const count = (value, thing, things) =>
    `${value.toLocaleString("en")} ${value === 1 ? thing : things || thing + "s"}`;

  function ago(seconds) {
    const past = Math.max(0, Date.now() / 1000 - seconds);
    if (past < 90) return "just now";
    for (const [size, unit] of [[60, "minute"], [3600, "hour"], [86400, "day"]]) {
      const next = unit === "minute" ? 5400 : unit === "hour" ? 129600 : Infinity;
      if (past < next) return count(Math.round(past / size), unit) + " ago";
    }
  }

  // Round up to few digits: ends of scales that read well.
  function nice(value) {
    if (!(value > 0)) return 1;
    const power = 10 ** Math.floor(Math.log10(value));
    return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999) * power;
  }

  function quantile(values, share) {
    if (!values.length) return 0;
    const sorted = Float64Array.from(values).sort();
    return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  }

  const mean = (values) => {
    let sum = 0, size = 0;
    for (const value of values) {
      if (value !== null && value !== undefined && !Number.isNaN(value)) (sum += value), size++;
    }
    return size ? sum / size : null;
  };

  const OUTCOMES = {
    won: { sign: "✓", word: "won" },
    lost: { sign: "✗", word: "lost" },
    cut: { sign: "■", word: "cut off" },
    failed: { sign: "!", word: "failed" },
  };

  // "family-rest/trial" as two parts, so that the eye finds the family.
  function taskParts(task) {
    const at = task.search(/-(?=[A-Z])|\//);
    return at > 0 ? [task.slice(0, at), task.slice(at)] : [task, ""];
  }

  // The end of a path says which model it is; the whole is in the configuration.
  const shortPath = (
    path,
  ) => (path.length > 28 && path.includes("/") ? "…/" + path.split("/").filter(Boolean).pop() : path);

  // The package that environments of our own come from says nothing of them.
  const shortEnv = (env) => env.replace("agentropy/", "");

  // An address within the page; query is an object, or pairs where a name occurs several times.
  function link(parts, query = {}) {
    const pairs = Array.isArray(query) ? query : Object.entries(query);
    const search = new URLSearchParams(
      pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false),
    ).toString();
    return "#/" + parts.map(encodeURIComponent).join("/") + (search ? "?" + search : "");
  }

  // The address follows what is shown, without a new entry in the history.
  function remember(parts, query) {
    const hash = link(parts, query);
    if (hash !== location.hash) history.replaceState(null, "", hash);
  }

  function findRun(runs, id) {
    const run = runs.find((one) => one.id === id);
    if (!run) throw Object.assign(new Error(`there is no run '${id}' here`), { status: 404 });
    return run;
  }

  // A line that leaves another: drawn, since few fonts have the sign.
  const forkSign = () =>
    svg(
      "svg",
      { class: "fork-sign", viewBox: "0 0 12 12", width: "12", height: "12", "aria-hidden": "true" },
      svg("path", { d: "M1 3.5H11M4 3.5C6.5 3.5 5 9.5 8 9.5H11" }),
      svg("circle", { cx: 4, cy: 3.5, r: 1.6 }),
    );

  const outcomeOf = (won, truncated, failed) => (failed ? "failed" : won ? "won" : truncated ? "cut" : "lost");

  const outcome = (kind, short) =>
    h(
      "span",
      { class: `outcome ${kind}` },
      h("span", { "aria-hidden": "true" }, OUTCOMES[kind].sign),
      short ? h("span", { class: "unseen" }, OUTCOMES[kind].word) : " " + OUTCOMES[kind].word,
    );

  // A place that has nothing to show says why, and what to do about it.
  const notice = (title, ...advice) =>
    h("div", { class: "notice", role: "status" }, h("h2", { text: title }), advice.map((one) => h("p", {}, one)));

  const code = (text) => h("code", { text });

  // A table that scrolls sideways; every row begins with its name.
  const table = (label, head, rows, name = "") =>
    h(
      "div",
      { class: "sideways", tabindex: "0", role: "region", "aria-label": label },
      h(
        "table",
        { class: `numbers ${name}`.trim() },
        h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col", text })))),
        h(
          "tbody",
          {},
          rows.map(([text, ...cells]) =>
            h("tr", {}, h("th", { scope: "row", text }), cells.map((cell) => h("td", { text: cell })))
          ),
        ),
      ),
    );

  // These children in this order; what stands right is not touched, and keeps the focus.
  function arrange(host, elements) {
    const kept = new Set(elements);
    for (const child of [...host.children]) if (!kept.has(child)) child.remove();
    elements.forEach((element, at) => {
      if (host.children[at] !== element) host.insertBefore(element, host.children[at] || null);
    });
  }

  // What a screen reader should hear of a change elsewhere on the page.
  function announce(text) {
    const region = document.getElementById("announcements");
    if (region) region.textContent = text;
  }

  function debounced(action, milliseconds) {
    let waiting = 0;
    return (...given) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => action(...given), milliseconds);
    };
  }

  Object.assign(agentropy, {
    h,
    svg,
    number,
    signed,
    brief,
    percent,
    count,
    ago,
    nice,
    quantile,
    mean,
    OUTCOMES,
    outcomeOf,
    outcome,
    forkSign,
    shortPath,
    shortEnv,
    link,
    remember,
    findRun,
    taskParts,
    notice,
    code,
    table,
    arrange,
    announce,
    debounced,
  });
})(window.agentropy);
