// All runs: how far each is, its curves in small, alarms, and two to choose for a comparison.
"use strict";

(function (agentropy) {
  const { h, link, percent, brief, count, ago, notice, code } = agentropy;

  const range = (success) => (success ? `${percent(success.low)}–${percent(success.high)}`.replace(" %–", "–") : "");

  function held(success, before) {
    if (!success) return h("span", { class: "faint", text: "not evaluated" });
    const better = before && before.step !== success.step ? `from ${percent(before.rate)}, ` : "";
    return [
      h("b", { class: "big", text: percent(success.rate) }),
      " ",
      h("span", { class: "faint", text: range(success) }),
      h("div", { class: "faint", text: `${better}${success.tasks} tasks of ${success.split.replaceAll("_", " ")}` }),
    ];
  }

  const alarmsOf = (run) =>
    run.alarms.map((alarm) =>
      h(
        "span",
        { class: "alarm", title: alarm.text },
        h("span", { "aria-hidden": "true" }, "▲ "),
        `${alarm.kind} at step ${alarm.step}`,
      )
    );

  function state(run) {
    const share = run.steps ? Math.min(1, run.step / run.steps) : 0;
    return [
      h("span", {
        class: run.live ? "live" : "",
        text: run.live ? "live" : run.step >= run.steps ? "finished" : "stopped",
      }),
      run.step < run.steps &&
      h(
        "div",
        { class: "progress", role: "img", "aria-label": `${run.step} of ${run.steps} steps` },
        h("i", { style: { width: `${100 * share}%` } }),
      ),
      h("div", { class: "faint", text: `step ${run.step} of ${run.steps}` }),
      run.updated && !run.live ? h("div", { class: "faint", text: ago(run.updated) }) : "",
    ].filter(Boolean);
  }

  // The newest number of training under its curve, and the first one.
  function last(rows, name, format, unit = "") {
    const line = agentropy.seriesOf(rows, name).find((one) => !one.points);
    if (!line) return "";
    return h(
      "div",
      {},
      format(line.y[line.y.length - 1]),
      h("span", { class: "faint", text: line.y.length > 1 ? `, from ${format(line.y[0])}${unit}` : unit }),
    );
  }

  const CELLS = ["run", "state", "held", "success", "entropy", "episodes"];

  function row(run, choose, chosen) {
    const box = h("input", {
      type: "checkbox",
      "aria-label": `Compare ${run.name}`,
      value: run.id,
      on: { change: () => choose(run.id, box.checked) },
    });
    box.checked = chosen.includes(run.id);
    const cells = {};
    const element = h(
      "tr",
      { "data-run": run.id },
      h("td", { class: "pick" }, box),
      CELLS.map((
        name,
      ) => (cells[name] = h(name === "run" ? "th" : "td", {
        class: `c-${name}`,
        scope: name === "run" ? "row" : null,
      }))),
    );
    cells.run.append(
      h("a", { class: "main-link", href: link(["run", run.id]), text: run.name }),
      h(
        "div",
        { class: "faint about" },
        [
          run.algorithm + (run.preset ? ` ${run.preset}` : ""),
          agentropy.shortEnv(run.env),
          agentropy.shortPath(run.model),
          `seed ${run.seed}`,
        ].map((part) => h("span", { text: part })),
      ),
      h("div", { class: "alarms" }),
    );
    let drawn = null;

    function update(now) {
      cells.run.querySelector(".alarms").replaceChildren(...alarmsOf(now));
      cells.state.replaceChildren(...state(now));
      cells.held.replaceChildren(...[held(now.success, now.before)].flat());
      cells.episodes.replaceChildren(
        h("a", {
          href: link(["run", now.id, "trajectories"]),
          text: now.trajectories === null ? "browse" : now.trajectories.toLocaleString("en"),
        }),
      );
      if (drawn === now.metrics) return;
      drawn = now.metrics;
      agentropy.metrics(now).then(({ rows }) => {
        cells.success.replaceChildren(agentropy.successSpark(rows), last(rows, agentropy.SUCCESS, percent));
        cells.entropy.replaceChildren(agentropy.entropySpark(rows), last(rows, "entropy/action_mean", brief, " nats"));
      }, (error) => cells.success.replaceChildren(h("span", { class: "faint", text: error.message })));
    }

    update(run);
    return { element, update };
  }

  agentropy.runsView = ({ runs, query }) => {
    const chosen = (query.get("choose") || "").split(",").filter((id) => runs.some((run) => run.id === id));
    const compare = h("a", { class: "button", role: "button" }), body = h("tbody"), known = new Map();
    const title = h("h1"), actions = h("div", { class: "actions" }), page = h("div", { class: "page" });
    let size = null;

    function choose(id, on) {
      if (on && !chosen.includes(id)) chosen.push(id);
      if (!on && chosen.includes(id)) chosen.splice(chosen.indexOf(id), 1);
      while (chosen.length > 2) {
        const first = chosen.shift();
        body.querySelector(`tr[data-run="${CSS.escape(first)}"] input`).checked = false;
      }
      agentropy.remember([], { choose: chosen.join(",") });
      offer();
    }

    function offer() {
      const ready = chosen.length === 2;
      compare.textContent = ready
        ? "Compare the two chosen runs"
        : chosen.length
        ? "Choose one more to compare"
        : "Choose two to compare";
      compare.classList.toggle("off", !ready);
      compare.setAttribute("aria-disabled", String(!ready));
      if (ready) compare.href = link(["compare", ...chosen]);
      else compare.removeAttribute("href");
    }

    const all = h("a", { href: link(["trajectories"]), text: "All trajectories" });
    const table = h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { class: "pick" }, h("span", { class: "unseen", text: "Compare" })),
          ["Run", "State", "Held-out success, 95 %", "Success", "Entropy", "Trajectories"].map((text, at) =>
            h("th", { class: `c-${CELLS[at]}`, scope: "col", text })
          ),
        ),
      ),
      body,
    );
    const whole = [
      h("div", { class: "heading" }, title, actions),
      table,
      h(
        "p",
        { class: "faint caption" },
        h("i", { class: "key", style: { background: "var(--first)" } }),
        "training, with its 95 % band  ",
        h("i", { class: "key dot", style: { background: "var(--second)" } }),
        "held-out tasks  ",
        h("i", { class: "key", style: { background: "var(--third)" } }),
        "entropy of the policy, from 0",
      ),
    ];
    const none = notice("There are no runs here yet", [
      "Train one with ",
      code("agentropy train --run-dir runs/first"),
      "; it appears by itself.",
    ]);

    // What stands around the rows depends on how many there are.
    function frame(now) {
      size = now;
      title.textContent = count(size, "run");
      table.className = size > 1 ? "runs" : "runs single";
      agentropy.arrange(actions, size > 1 ? [all, compare] : []);
      agentropy.arrange(page, size ? whole : [none]);
    }

    function fill(now) {
      const ids = new Set(now.map((run) => run.id));
      for (const id of known.keys()) {
        if (ids.has(id)) continue;
        known.delete(id);
        if (chosen.includes(id)) choose(id, false);
      }
      for (const run of now) {
        if (known.has(run.id)) known.get(run.id).update(run);
        else known.set(run.id, row(run, choose, chosen));
      }
      agentropy.arrange(body, now.map((run) => known.get(run.id).element));
      if (size !== now.length) frame(now.length);
    }

    fill(runs);
    offer();
    return { title: "Runs", crumbs: [["Runs", "#/"]], element: page, refresh: fill };
  };
})(window.agentropy);
