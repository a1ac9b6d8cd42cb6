// What of a run's metrics becomes a curve: training rows as lines, held-out ones as points.
// - agentropy.seriesOf: the series of one metric of one run.
// - agentropy.metricNames: what a run has numbers of.
"use strict";

(function (agentropy) {
  const { columns, percent, brief } = agentropy;

  const SUCCESS = "success/rate";
  const TITLES = {
    "success/rate": "Success",
    "entropy/action_mean": "Entropy of the policy, nats",
    reward: "Return of an episode",
    turns: "Turns of an episode",
    grad_norm: "Norm of the gradient",
    loss: "Loss",
    "kl/old": "KL from the sampler's policy, nats",
  };
  const DEFAULTS = [SUCCESS, "entropy/action_mean", "reward", "turns", "loss", "grad_norm"];
  const HELD = ["--second", "--third", "--fourth"];

  const isHeld = (phase) => phase === "eval" || phase.startsWith("eval/");
  const isNumber = (value) => typeof value === "number";

  // Metric names with numbers in rows of training and evaluation, and those of the warm-up as "sft: name".
  function metricNames(rows) {
    const names = new Set();
    for (const row of rows) {
      for (const [name, value] of Object.entries(row)) {
        if (name !== "step" && name !== "phase" && isNumber(value)) {
          names.add(row.phase === "sft" ? `sft: ${name}` : name);
        }
      }
    }
    return [...names].sort((one, other) => one.startsWith("sft") - other.startsWith("sft") || one.localeCompare(other));
  }

  function present(steps, values) {
    const at = steps.map((_, place) => place).filter((place) => isNumber(values[place]));
    return (list) => at.map((place) => list[place]);
  }

  function bounds(own, name, pick) {
    if (name !== SUCCESS || !own["success/low"]) return {};
    return { low: pick(own["success/low"]), high: pick(own["success/high"]) };
  }

  // colours: for the line and for points; label: what to call the run where there are two.
  function seriesOf(rows, name, { label = "", colour = "--first", held = HELD } = {}) {
    const prefix = label ? label + " " : "";
    if (name.startsWith("sft: ")) {
      const own = columns(rows, "sft"), values = own[name.slice(5)];
      if (!values) return [];
      const pick = present(own.step, values);
      return [{ label: label || "warm-up", colour, x: pick(own.step), y: pick(values) }];
    }
    const out = [], train = columns(rows, "train");
    if (train[name]) {
      const pick = present(train.step, train[name]);
      out.push({
        label: label || "training",
        colour,
        x: pick(train.step),
        y: pick(train[name]),
        ...bounds(train, name, pick),
      });
    }
    const phases = [...new Set(rows.map((row) => row.phase))].filter(isHeld);
    let at = 0;
    for (const phase of phases) {
      const all = columns(rows, phase);
      const splits = all.split ? [...new Set(all.split)] : [null];
      for (const split of splits) {
        const own = split === null ? all : columns(rows.filter((row) => row.split === split), phase);
        if (!own[name]) continue;
        const pick = present(own.step, own[name]);
        out.push({
          label: prefix + (split || "held out").replaceAll("_", " "),
          colour: held[Math.min(at++, held.length - 1)],
          points: true,
          x: pick(own.step),
          y: pick(own[name]),
          ...bounds(own, name, pick),
        });
      }
    }
    return out.filter((one) => one.x.length);
  }

  const titleOf = (name) => TITLES[name] || name;
  const formatOf = (name) => (/^success\/(rate|low|high)$/.test(name) ? percent : brief);

  function curve(name, series) {
    return agentropy.chart({
      title: titleOf(name),
      series,
      domain: name === SUCCESS ? [0, 1] : null,
      format: formatOf(name),
      group: name.startsWith("sft: ") ? "sft" : "steps",
    });
  }

  // Other curves in place of those in host; the focus stays with its own.
  function redraw(host, draw) {
    const focused = host.contains(document.activeElement) && document.activeElement.closest("figure")?.dataset.metric;
    agentropy.clearCharts();
    host.replaceChildren(...draw());
    if (focused) host.querySelector(`figure[data-metric="${CSS.escape(focused)}"] .plot`)?.focus();
  }

  // Small pictures for tables.
  const successSpark = (rows) =>
    agentropy.sparkline({
      series: seriesOf(rows, SUCCESS),
      domain: [0, 1],
      label: "Success by step, line and 95 % band: training; points: held out",
    });
  const entropySpark = (rows) => {
    const series = seriesOf(rows, "entropy/action_mean").filter((one) => !one.points);
    const top = Math.max(0, ...series.flatMap((one) => one.y));
    return agentropy.sparkline({
      series: series.map((one) => ({ ...one, colour: "--third" })),
      domain: [0, top * 1.1 || 1],
      label: "Entropy by step, from 0",
    });
  };

  Object.assign(agentropy, {
    SUCCESS,
    DEFAULTS,
    metricNames,
    seriesOf,
    isHeld,
    curve,
    redraw,
    successSpark,
    entropySpark,
  });
})(window.agentropy);
