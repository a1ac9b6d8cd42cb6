// Curves over steps, drawn as SVG at the size they have: lines, 95 % bands, held-out points, and a shared cursor.
// - agentropy.chart: a figure with a title, axes, and a read-out of the step under the pointer or chosen with arrows.
// - agentropy.sparkline: the same curve without axes, for tables.
// - agentropy.scatter: points of two numbers and a line through them.
// - agentropy.heatmap: a list of numbers at every step.
"use strict";

(function (agentropy) {
  const { h, svg, brief } = agentropy;

  function ticks(low, high, about, least = 0) {
    const rough = (high - low) / about, power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(least, [1, 2, 2.5, 5, 10].find((size) => size * power >= rough * 0.999) * power);
    const out = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) {
      out.push(Number(at.toPrecision(12)));
    }
    return out;
  }

  const known = (value) => typeof value === "number" && Number.isFinite(value);

  function extent(lists) {
    let low = Infinity, high = -Infinity;
    for (const list of lists) {
      for (const value of list || []) if (known(value)) (low = Math.min(low, value)), (high = Math.max(high, value));
    }
    return low <= high ? [low, high] : null;
  }

  function padded([low, high]) {
    if (low === high) return [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
    const room = (high - low) * 0.06;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  }

  // The path of a line; a number that is missing breaks it.
  function path(xs, ys, px, py) {
    let out = "", open = false;
    xs.forEach((x, at) => {
      if (known(ys[at])) (out += `${open ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[at]).toFixed(1)}`), (open = true);
      else open = false;
    });
    return out;
  }

  function band(one, px, py) {
    const there = one.x.map((_, at) => at).filter((at) => known(one.low[at]) && known(one.high[at]));
    if (there.length < 2) return "";
    const point = (at, value) => `${px(one.x[at]).toFixed(1)} ${py(value).toFixed(1)}`;
    const up = there.map((at) => point(at, one.high[at])),
      down = [...there].reverse().map((at) => point(at, one.low[at]));
    return `M${up.join("L")}L${down.join("L")}Z`;
  }

  const cursorsOf = new Map();

  // Charts of one group show the same step.
  function moveTo(group, step) {
    for (const cursor of cursorsOf.get(group) || []) cursor(step);
  }

  const recolours = new Set();
  document.addEventListener("agentropy:theme", () => recolours.forEach((draw) => draw()));

  // Forget the charts of the view before.
  function clearCharts() {
    cursorsOf.clear();
    recolours.clear();
  }

  function nearest(xs, step) {
    let best = -1;
    xs.forEach((x, at) => {
      if (best < 0 || Math.abs(x - step) < Math.abs(xs[best] - step)) best = at;
    });
    return best;
  }

  // Space for labels on the left depends on how long they are.
  function frame(host, width, height, xDomain, yDomain, { format = brief, xLabel = "", whole = false }) {
    const labels = ticks(yDomain[0], yDomain[1], 4).filter((at) => at >= yDomain[0] && at <= yDomain[1]);
    const left = Math.max(...labels.map((at) => format(at).length), 1) * 7 + 8;
    const box = { left, right: width - 10, top: 8, bottom: height - 20 };
    const px = (x) => box.left + ((x - xDomain[0]) / (xDomain[1] - xDomain[0] || 1)) * (box.right - box.left);
    const py = (y) => box.bottom - ((y - yDomain[0]) / (yDomain[1] - yDomain[0] || 1)) * (box.bottom - box.top);
    for (const at of labels) {
      const y = Math.round(py(at)) + 0.5;
      host.append(
        svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }),
        svg("text", { class: "tick", x: box.left - 6, y: y + 3.5, "text-anchor": "end" }, format(at)),
      );
    }
    ticks(xDomain[0], xDomain[1], Math.max(2, Math.floor((box.right - box.left) / 90)), whole ? 1 : 0).forEach((at) => {
      const x = px(at);
      const anchor = x < box.left + 8 ? "start" : x > box.right - 14 ? "end" : "middle";
      host.append(svg("text", { class: "tick", x, y: height - 5, "text-anchor": anchor }, brief(at)));
    });
    if (xLabel) {
      host.append(svg("text", { class: "tick axis", x: box.right, y: height - 5, "text-anchor": "end" }, xLabel));
    }
    return { box, px, py };
  }

  // What draws itself again when its width changes.
  function sized(host, draw) {
    let drawn = 0;
    const observer = new ResizeObserver(() => {
      const width = Math.floor(host.clientWidth);
      if (width > 0 && width !== drawn) draw(drawn = width);
    });
    observer.observe(host);
  }

  // series: [{label, colour, x, y, low, high, points}]; colour names a custom property.
  function chart({ title, series, group = "steps", domain = null, format = brief }) {
    const height = 170;
    const drawn = series.filter((one) => one.x.length);
    const reading = h("span", { class: "reading" }), when = h("span", { class: "when faint" });
    const plot = h("div", { class: "plot", tabindex: "0", role: "img" });
    const figure = h(
      "figure",
      { class: drawn.length > 1 ? "chart several" : "chart", "data-metric": title },
      h("figcaption", {}, h("span", { class: "chart-title", text: title }), when, reading),
      plot,
    );
    if (!drawn.length) {
      plot.replaceChildren(h("p", { class: "faint", text: "No numbers yet." }));
      return figure;
    }
    const steps = [...new Set(drawn.flatMap((one) => one.x))].sort((one, other) => one - other);
    const xDomain = [steps[0], steps[steps.length - 1] === steps[0] ? steps[0] + 1 : steps[steps.length - 1]];
    const yDomain = domain || padded(extent(drawn.flatMap((one) => [one.y, one.low, one.high])) || [0, 1]);
    let chosen = null, place = null, mark = null;

    function read(step) {
      when.textContent = `step ${brief(step === null ? steps[steps.length - 1] : step)}`;
      reading.replaceChildren(...drawn.map((one) => {
        const at = step === null ? one.x.length - 1 : nearest(one.x, step);
        const span = known(one.low && one.low[at]) ? ` [${format(one.low[at])}, ${format(one.high[at])}]` : "";
        return h(
          "span",
          {},
          drawn.length > 1 &&
            h("i", { class: one.points ? "key dot" : "key", style: { background: `var(${one.colour})` } }),
          drawn.length > 1 && h("span", { class: "faint", text: one.label + " " }),
          h("b", { text: format(one.y[at]) }),
          span && h("span", { class: "faint", text: span }),
          step !== null && one.x[at] !== step && h("span", { class: "faint", text: ` at ${brief(one.x[at])}` }),
        );
      }));
    }

    function show(step) {
      chosen = step;
      read(step);
      if (!mark || !place) return;
      mark.replaceChildren();
      if (step === null) return;
      const x = place.px(step);
      if (x < place.box.left - 1 || x > place.box.right + 1) return;
      mark.append(svg("line", { class: "cursor", x1: x, x2: x, y1: place.box.top, y2: place.box.bottom }));
      for (const one of drawn) {
        const at = nearest(one.x, step);
        if (known(one.y[at])) {
          mark.append(
            svg("circle", {
              cx: place.px(one.x[at]),
              cy: place.py(one.y[at]),
              r: 3.5,
              style: { fill: `var(${one.colour})` },
            }),
          );
        }
      }
    }

    function draw(width) {
      const image = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      place = frame(image, width, height, xDomain, yDomain, { format, whole: true });
      for (const one of drawn) {
        const style = { stroke: `var(${one.colour})`, fill: `var(${one.colour})` };
        if (one.low && !one.points) {
          image.append(svg("path", { class: "band", d: band(one, place.px, place.py), style }));
        }
        if (one.points) {
          one.x.forEach((x, at) => {
            if (!known(one.y[at])) return;
            const cx = place.px(x);
            if (one.low && known(one.low[at])) {
              image.append(
                svg("line", {
                  class: "whisker",
                  x1: cx,
                  x2: cx,
                  y1: place.py(one.low[at]),
                  y2: place.py(one.high[at]),
                  style,
                }),
              );
            }
            image.append(svg("circle", { class: "held", cx, cy: place.py(one.y[at]), r: 3.5, style }));
          });
        } else {
          image.append(svg("path", { class: "line", d: path(one.x, one.y, place.px, place.py), style }));
          if (one.x.length === 1) {
            image.append(svg("circle", { cx: place.px(one.x[0]), cy: place.py(one.y[0]), r: 2.5, style }));
          }
        }
      }
      mark = svg("g", { class: "mark" });
      image.append(mark);
      plot.replaceChildren(image);
      show(chosen);
    }

    const last = drawn.map((one) => `${one.label} ${format(one.y[one.y.length - 1])}`).join(", ");
    plot.setAttribute(
      "aria-label",
      `${title}: ${last} at step ${brief(xDomain[1])}. Arrow keys move through the steps.`,
    );
    plot.addEventListener("pointermove", (event) => {
      if (!place) return;
      const share = (event.clientX - plot.getBoundingClientRect().left - place.box.left) /
        (place.box.right - place.box.left);
      moveTo(group, steps[nearest(steps, xDomain[0] + share * (xDomain[1] - xDomain[0]))]);
    });
    plot.addEventListener("pointerleave", () => moveTo(group, null));
    plot.addEventListener("blur", () => moveTo(group, null));
    plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const now = chosen === null ? steps.length - (move < 0 ? 0 : 1) : steps.indexOf(steps[nearest(steps, chosen)]);
      moveTo(group, steps[Math.min(steps.length - 1, Math.max(0, now + move))]);
      agentropy.announce(`${title}, ${when.textContent}: ${reading.textContent}`);
    });
    if (!cursorsOf.has(group)) cursorsOf.set(group, new Set());
    cursorsOf.get(group).add(show);
    read(null);
    sized(plot, draw);
    return figure;
  }

  function sparkline({ series, domain, label }) {
    const width = 200, height = 46;
    const drawn = series.filter((one) => one.x.length);
    if (!drawn.length) return h("span", { class: "faint", text: "no numbers yet" });
    const [first, last] = extent(drawn.map((one) => one.x));
    const [low, high] = domain;
    const px = (x) => 4 + ((x - first) / (last - first || 1)) * (width - 8);
    const py = (y) => height - 4 - ((y - low) / (high - low || 1)) * (height - 8);
    const image = svg("svg", {
      class: "spark",
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      "aria-label": label,
    });
    image.append(svg("line", { class: "grid", x1: 0, x2: width, y1: height - 3.5, y2: height - 3.5 }));
    for (const one of drawn) {
      const style = { stroke: `var(${one.colour})`, fill: `var(${one.colour})` };
      if (one.low && !one.points) image.append(svg("path", { class: "band", d: band(one, px, py), style }));
      if (one.points) {
        one.x.forEach((x, at) =>
          known(one.y[at]) &&
          image.append(svg("circle", { class: "held", cx: px(x), cy: py(one.y[at]), r: 2.6, style }))
        );
      } else image.append(svg("path", { class: "line", d: path(one.x, one.y, px, py), style }));
    }
    return image;
  }

  // points: [[x, y]]; fit: y as a function of x, or null.
  function scatter({ title, points, fit, xLabel, note }) {
    const height = 220;
    const plot = h("div", { class: "plot", role: "img", "aria-label": `${title}. ${note}` });
    const xDomain = padded(extent([points.map((one) => one[0])])),
      yDomain = padded(extent([points.map((one) => one[1])]));
    sized(plot, (width) => {
      const image = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      const { px, py } = frame(image, width, height, xDomain, yDomain, { xLabel });
      if (fit) {
        const xs = Array.from({ length: 60 }, (_, at) => xDomain[0] + ((xDomain[1] - xDomain[0]) * at) / 59);
        const ys = xs.map(fit).map((y) => (y < yDomain[0] || y > yDomain[1] ? null : y));
        image.append(svg("path", { class: "line", d: path(xs, ys, px, py), style: { stroke: "var(--second)" } }));
      }
      for (const [x, y] of points) image.append(svg("circle", { class: "dot", cx: px(x), cy: py(y), r: 3 }));
      plot.replaceChildren(image);
    });
    return h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("span", { class: "chart-title", text: title })),
      plot,
      h("p", { class: "chart-note", text: note }),
    );
  }

  // rows: one list of numbers a step; columns of the picture are steps, rows are places in the list.
  function heatmap({ title, x, rows, label, note }) {
    const height = 170;
    const reading = h("span", { class: "reading" });
    const plot = h("div", { class: "plot", role: "img", "aria-label": `${title}. ${note}` });
    const depth = Math.max(...rows.map((row) => (row || []).length));
    const all = rows.flatMap((row) => (row || []).filter(known));
    const domain = agentropy.domainOf("entropy", all);
    let place = null;
    function draw(width) {
      const image = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      const left = 30, wide = (width - left - 10) / x.length, high = (height - 28) / depth;
      place = { left, wide, high };
      rows.forEach((row, column) =>
        (row || []).forEach((value, at) =>
          known(value) && image.append(svg("rect", {
            x: left + column * wide,
            y: 8 + at * high,
            width: wide + 0.4,
            height: high + 0.4,
            fill: agentropy.colour("entropy", value, domain),
          }))
        )
      );
      for (const at of [0, depth - 1]) {
        image.append(
          svg("text", { class: "tick", x: left - 6, y: 8 + (at + 0.5) * high + 3.5, "text-anchor": "end" }, at),
        );
      }
      [0, x.length - 1].forEach((at) =>
        image.append(
          svg("text", {
            class: "tick",
            x: left + (at + 0.5) * wide,
            y: height - 5,
            "text-anchor": at ? "end" : "start",
          }, brief(x[at])),
        )
      );
      plot.replaceChildren(image);
    }
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - place.left) / place.wide),
        at = Math.floor((event.clientY - box.top - 8) / place.high);
      const value = rows[column] && rows[column][at];
      reading.replaceChildren(
        ...(known(value)
          ? [h("span", { class: "faint", text: `step ${x[column]}, ${label} ${at} ` }), h("b", { text: brief(value) })]
          : []),
      );
    });
    plot.addEventListener("pointerleave", () => reading.replaceChildren());
    recolours.add(() => plot.isConnected && draw(Math.floor(plot.clientWidth)));
    sized(plot, draw);
    const legend = h(
      "span",
      { class: "ramp-inline", "aria-hidden": "true" },
      brief(domain[0]),
      h("i", { class: "ramp", "data-ramp": "entropy", style: { background: agentropy.gradient("entropy") } }),
      brief(domain[1]) + " nats",
    );
    return h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("span", { class: "chart-title", text: title }), reading),
      plot,
      h("p", { class: "chart-note" }, note, " ", legend),
    );
  }

  Object.assign(agentropy, { chart, sparkline, scatter, heatmap, clearCharts });
})(window.agentropy);
