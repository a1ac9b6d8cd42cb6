// One run: curves of chosen metrics, entropy by place, the law of reward and entropy, and its configuration.
"use strict";

(function (agentropy) {
  const { h, link, percent, brief, number } = agentropy;

  const LISTS = {
    "entropy/by_turn": ["turn", "Entropy by turn"],
    "entropy/by_position": ["place", "Entropy by place in the turn"],
  };

  // Lists of names, not of sizes: a picture of them would say nothing.
  const NAMES = new Set(["entropy/fork_tokens"]);

  agentropy.tabs = (run, here) =>
    h(
      "nav",
      { class: "tabs", "aria-label": "Parts of the run" },
      h("a", { href: link(["run", run.id]), "aria-current": here === "curves" ? "page" : null, text: "Curves" }),
      h(
        "a",
        { href: link(["run", run.id, "trajectories"]), "aria-current": here === "browse" ? "page" : null },
        "Trajectories",
        run.trajectories !== null && h("span", { class: "faint", text: " " + run.trajectories.toLocaleString("en") }),
      ),
    );

  function facts(run) {
    const held = run.success;
    return h(
      "dl",
      { class: "facts" },
      [
        ["recipe", run.algorithm + (run.preset ? ` (${run.preset})` : "")],
        ["environment", agentropy.shortEnv(run.env)],
        ["model", agentropy.shortPath(run.model)],
        ["seed", run.seed],
        ["steps", `${run.step} of ${run.steps}${run.live ? ", live" : ""}`],
        held &&
        [
          "held out",
          `${percent(held.rate)} [${percent(held.low)}, ${percent(held.high)}] of ${held.tasks} tasks` +
          (run.before && run.before.step !== held.step ? `, from ${percent(run.before.rate)}` : ""),
        ],
      ]
        .filter(Boolean).map(([name, value]) =>
          h("div", {}, h("dt", { text: name }), h("dd", { text: String(value) }))
        ),
    );
  }

  function lists(rows) {
    const train = agentropy.columns(rows, "train");
    const names = Object.keys(train).filter((name) => !NAMES.has(name) && train[name].some(Array.isArray));
    return names.map((name) => {
      const at = train[name].map((_, place) => place).filter((place) =>
        Array.isArray(train[name][place]) && train[name][place].length
      );
      const [label, title] = LISTS[name] || ["place", name];
      return at.length &&
        agentropy.heatmap({
          title,
          label,
          x: at.map((place) => train.step[place]),
          rows: at.map((place) => train[name][place]),
          note: `Across: steps. Down: ${label}.`,
        });
    });
  }

  function lawFigure(law) {
    if (!law || !law.points || law.points.length < 3) return null;
    const sign = law.b < 0 ? "−" : "+", fall = law.a < 0 ? "" : "−";
    return agentropy.scatter({
      title: "Success against entropy",
      points: law.points,
      fit: (entropy) => -law.a * Math.exp(entropy) + law.b,
      xLabel: "entropy, nats",
      note:
        `R = ${fall}${brief(Math.abs(law.a))} exp(H) ${sign} ${brief(Math.abs(law.b))}. Ceiling at H = 0: ${
          number(law.ceiling, 2)
        }. R² ${number(law.r2, 2)}` + (law.heldout_error === null || law.heldout_error === undefined
          ? "."
          : `; error on steps left out ${number(law.heldout_error, 3)}.`),
    });
  }

  // Success by family of tasks, an evaluation a column.
  function families(rows) {
    const own = rows.filter((row) => agentropy.isHeld(row.phase) && typeof row["success/rate"] === "number");
    const names = [...new Set(own.flatMap((row) => Object.keys(row)))].filter((name) =>
      name.startsWith("success/") && !/\/(rate|low|high|wins|tasks)$/.test(name)
    );
    if (!own.length || !names.length) return null;
    const few = own.length > 8 ? [own[0], ...own.slice(-7)] : own;
    return h(
      "section",
      {},
      h("h2", { text: "Held-out success by family of tasks" }),
      agentropy.table(
        "Success by family",
        ["family", ...few.map((row) => `step ${row.step}`)],
        [["all tasks", "success/rate"], ...names.map((name) => [name.slice(8).replaceAll("_", " "), name])].map((
          [text, name],
        ) => [text, ...few.map((row) => percent(row[name]))]),
      ),
    );
  }

  // show: the names to choose from, and those that are chosen.
  function chooser(change) {
    const list = h("div", { class: "metric-list" }),
      search = h("input", { type: "search", placeholder: "Search metrics", "aria-label": "Search metrics" });
    const boxes = new Map();
    function made(name) {
      const box = h("input", { type: "checkbox", value: name, on: { change: () => change(name, box.checked) } });
      return { box, label: h("label", { title: name }, box, h("span", { text: name })) };
    }
    function sift() {
      const words = search.value.toLowerCase().split(/\s+/);
      for (const [name, { label }] of boxes) label.hidden = !words.every((word) => name.toLowerCase().includes(word));
    }
    function show(names, chosen) {
      for (const name of names) if (!boxes.has(name)) boxes.set(name, made(name));
      for (const [name, { box }] of boxes) box.checked = chosen.includes(name);
      agentropy.arrange(list, names.map((name) => boxes.get(name).label));
      sift();
    }
    search.addEventListener("input", sift);
    return {
      element: h(
        "details",
        { class: "chooser", open: matchMedia("(min-width: 900px)").matches },
        h("summary", { text: "Metrics" }),
        search,
        list,
      ),
      search,
      show,
    };
  }

  agentropy.runView = async ({ runs, ids, query }) => {
    let run = agentropy.findRun(runs, ids[0]);
    const [{ rows: first }, config] = await Promise.all([
      agentropy.metrics(run),
      agentropy.config(run).catch(() => null),
    ]);
    let rows = first, drawings = 0, left = false;
    let chosen = query.getAll("m").filter(Boolean), touched = chosen.length > 0;
    const charts = h("div", { class: "charts" }),
      more = h("div", { class: "charts" }),
      extra = h("div"),
      head = h("div");

    function drawHead() {
      head.replaceChildren(
        h("div", { class: "heading" }, h("h1", { text: run.name }), agentropy.tabs(run, "curves")),
        facts(run),
        run.alarms.length
          ? h(
            "ul",
            { class: "alarm-list" },
            run.alarms.map((alarm) =>
              h("li", {}, h("span", { class: "alarm", text: `▲ step ${alarm.step}` }), " ", alarm.text)
            ),
          )
          : "",
      );
    }

    // Until somebody chooses, what is shown follows what the run has numbers of: of the warm start, then of training.
    function follow() {
      const names = agentropy.metricNames(rows);
      if (!touched) {
        chosen = agentropy.DEFAULTS.filter((name) => names.includes(name));
        if (!chosen.length) chosen = names.slice(-4);
      }
      pick.show(names, chosen);
    }

    function draw() {
      agentropy.redraw(
        charts,
        () => chosen.map((name) => agentropy.curve(name, agentropy.seriesOf(rows, name))),
      );
      if (!rows.length) {
        charts.replaceChildren(
          agentropy.notice(
            "No numbers yet",
            "The run has written no metrics so far. They appear here by themselves while it trains.",
          ),
        );
      } else if (!chosen.length) {
        charts.replaceChildren(agentropy.notice("No metric is chosen", "Tick one in the list of metrics."));
      }
      more.replaceChildren(...lists(rows).filter(Boolean));
      extra.replaceChildren(...[families(rows)].filter(Boolean));
      const mine = ++drawings;
      agentropy.law(run).then((law) => {
        const figure = mine === drawings && lawFigure(law);
        if (figure) more.append(figure);
      });
    }

    const pick = chooser((name, on) => {
      touched = true;
      chosen = on ? [...chosen, name] : chosen.filter((one) => one !== name);
      agentropy.remember(["run", run.id], chosen.map((one) => ["m", one]));
      draw();
    });

    drawHead();
    follow();
    return {
      title: run.name,
      crumbs: [["Runs", "#/"], [run.name, link(["run", run.id])]],
      element: h(
        "div",
        { class: "page" },
        head,
        h(
          "div",
          { class: "with-rail" },
          pick.element,
          h(
            "div",
            { class: "stack" },
            charts,
            more,
            extra,
            config &&
              h(
                "details",
                { class: "config" },
                h("summary", { text: "Configuration" }),
                h("pre", { tabindex: "0", text: config.toml }),
              ),
          ),
        ),
      ),
      keys: {
        "/": () => ((pick.element.open = true), pick.search.focus()),
        b: () => (location.hash = link(["run", run.id, "trajectories"])),
      },
      // Drawn no earlier: a view that is no longer wanted would forget the charts of the one that is.
      shown: draw,
      leave: () => (left = true),
      refresh: async (now) => {
        const next = now.find((one) => one.id === run.id);
        if (
          !next || (next.metrics === run.metrics && next.live === run.live && next.trajectories === run.trajectories)
        ) return;
        const found = await agentropy.metrics(next);
        if (left) return;
        run = next;
        rows = found.rows;
        drawHead();
        follow();
        draw();
      },
    };
  };
})(window.agentropy);
