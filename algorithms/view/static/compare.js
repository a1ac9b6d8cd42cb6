// Two runs side by side: curves over each other, what differs in their configurations, and one task turn by turn.
"use strict";

(function (agentropy) {
  const { h, link, percent, number, MEASURES } = agentropy;
  const SIDES = [{ sign: "A", colour: "--first", held: ["--first", "--first"] }, {
    sign: "B",
    colour: "--second",
    held: ["--second", "--second"],
  }];

  function flat(values, prefix = "", out = {}) {
    for (const [name, value] of Object.entries(values || {})) {
      if (value !== null && typeof value === "object" && !Array.isArray(value)) flat(value, `${prefix}${name}.`, out);
      else out[prefix + name] = JSON.stringify(value);
    }
    return out;
  }

  function differences(configs) {
    const [a, b] = configs.map((config) => flat(config && config.values));
    const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((name) =>
      a[name] !== b[name] && name !== "run_dir"
    ).sort();
    if (!names.length) return h("p", { class: "faint", text: "The configurations are equal." });
    return agentropy.table(
      "Configuration that differs",
      ["setting", ...SIDES.map((side) => side.sign)],
      names.map((name) => [name, ...[a, b].map((one) => one[name] ?? "not set")]),
      "settings",
    );
  }

  // How often each was better on the same held-out tasks, at the last step and split at which both played some.
  function paired(evaluations) {
    const [a, b] = evaluations.map((list) => list.filter((one) => one.tasks && one.won));
    const both = (one) => {
      const other = b.find((two) => two.step === one.step && two.split === one.split);
      const places = new Map(other ? other.tasks.map((task, place) => [task, place]) : []);
      const shared = one.tasks.map((task, at) => [at, places.get(task)]).filter(([, place]) => place !== undefined);
      return shared.map(([at, place]) => [one.won[at], other.won[place]]);
    };
    const last = [...a].reverse().find((one) => both(one).length);
    if (!last) return "";
    const shared = both(last), counts = { A: 0, B: 0, won: 0, lost: 0 };
    for (const pair of shared) {
      const [x, y] = pair.map((won) => agentropy.mean(won.map(Number)));
      counts[x > y ? "A" : y > x ? "B" : x > 0 ? "won" : "lost"]++;
    }
    return h(
      "p",
      { class: "paired" },
      `Of the same ${agentropy.count(shared.length, "task")} of ${
        last.split.replaceAll("_", " ")
      } after step ${last.step}, A is better on `,
      h("b", { text: counts.A }),
      " and B on ",
      h("b", { text: counts.B }),
      `; both win ${counts.won} and lose ${counts.lost} alike.`,
    );
  }

  // Tasks that both have played: how often, how often won, and where.
  function tasksOf(index) {
    const out = new Map();
    for (let row = 0; row < index.count; row++) {
      const name = index.tasks[index.columns.task[row]];
      if (!out.has(name)) out.set(name, []);
      const get = (column) => index.columns[column][row];
      out.get(name).push({
        step: get("step"),
        tree: get("tree"),
        trajectory: get("trajectory"),
        won: get("won"),
        reward: get("reward"),
        outcome: agentropy.outcomeOf(get("won"), get("truncated"), get("failed")),
      });
    }
    return out;
  }

  const wins = (list) => `${list.filter((one) => one.won).length} of ${list.length}`;
  const keyOf = (one) => `${one.step}.${one.tree}.${one.trajectory}`;

  // Rows of turns, a cell each side: what happened at the same turn is beside each other whatever its length.
  async function panes(host, runs, picks, state) {
    const trees = await Promise.all(picks.map((one, side) => agentropy.treeOf(runs[side], one.step, one.tree)));
    const all = trees.map((tree, side) => agentropy.turnsOf(tree, picks[side].trajectory));
    const parts = all.map((turns) => turns.filter((part) => part.act !== null));
    const cell = (side, content) =>
      h("div", { class: `pane pane-${SIDES[side].sign}`, "data-side": String(side) }, content);
    const end = (side) => agentropy.ending(trees[side].trajectories[picks[side].trajectory]);
    const prompts = [0, 1].map((side) => agentropy.promptBlock(trees[side], all[side])),
      same = prompts[0].textContent === prompts[1].textContent;
    const rows = [
      h(
        "div",
        { class: same ? "pair first same-prompt" : "pair first" },
        same ? prompts[0] : prompts.map((prompt, side) => cell(side, prompt)),
      ),
    ];
    for (let at = 0; at <= Math.max(parts[0].length, parts[1].length); at++) {
      rows.push(
        h(
          "div",
          { class: "pair", role: "group", "aria-label": `Turn ${at}` },
          [0, 1].map((side) =>
            cell(
              side,
              parts[side][at]
                ? agentropy.turnBlock(trees[side], picks[side].trajectory, parts[side][at], at)
                : at === parts[side].length
                ? end(side)
                : "",
            )
          ),
        ),
      );
    }
    rows[rows.length - 1].classList.add("last");
    const domain = {};
    for (const measure of Object.keys(MEASURES)) {
      const there = trees.map((tree) => tree.domains[measure]).filter(Boolean);
      domain[measure] = there.length
        ? [Math.min(...there.map((one) => one[0])), Math.max(...there.map((one) => one[1]))]
        : null;
    }
    return {
      trees,
      picks,
      rows,
      sections: rows.slice(1),
      domain,
      paint: () =>
        [0, 1].forEach((side) => {
          for (const pane of host.querySelectorAll(`.pane-${SIDES[side].sign}`)) {
            agentropy.paint(pane, trees[side], picks[side].trajectory, state.measure, domain[state.measure]);
          }
        }),
    };
  }

  agentropy.compareView = async ({ runs: all, ids, query }) => {
    let runs = ids.map((id) => agentropy.findRun(all, id));
    const numbersOf = (those) =>
      Promise.all([Promise.all(those.map(agentropy.metrics)), Promise.all(those.map(agentropy.evaluations))]);
    let [[metrics, evaluations], indexes, configs] = await Promise.all([
      numbersOf(runs),
      Promise.all(runs.map((run) => agentropy.index(run).catch(() => null))),
      Promise.all(runs.map((run) => agentropy.config(run).catch(() => null))),
    ]);
    const versus = h("div", { class: "versus" }), verdict = h("div");
    const charts = h("div", { class: "charts" }),
      host = h("div", { class: "panes" }),
      picker = h("div", { class: "picker" });
    const tasks = indexes.map((index) => (index ? tasksOf(index) : new Map()));
    const common = [...tasks[0].keys()].filter((name) => tasks[1].has(name)).sort();
    const state = {
      measure: Object.hasOwn(MEASURES, query.get("colour")) ? query.get("colour") : "entropy",
      task: query.get("task") || "",
      place: 0,
    };
    let shown = null, picks = null, shows = 0, left = false;
    const missing = (
      measure,
    ) => (shown && !shown.domain[measure]
      ? `Neither run stored ${MEASURES[measure].label.toLowerCase()}s of this task.`
      : null);
    const colours = agentropy.colouring({ missing, change: recolour });
    const tips = agentropy.tips(host, (span) => {
      const side = Number(span.closest("[data-side]").dataset.side);
      return [shown.trees[side], shown.picks[side].trajectory];
    });
    const tokens = agentropy.rove(host);

    const remember = () =>
      agentropy.remember(["compare", ...ids], {
        task: state.task,
        a: picks && keyOf(picks[0]),
        b: picks && keyOf(picks[1]),
        colour: state.measure === "entropy" ? "" : state.measure,
      });

    function recolour(measure) {
      if (!shown || missing(measure)) return agentropy.announce(missing(measure) || "Choose a task first.");
      state.measure = measure;
      paint();
      remember();
    }

    function paint() {
      if (!shown) return;
      shown.paint();
      colours.show(state.measure, shown.domain[state.measure]);
    }

    function drawCharts() {
      const rows = metrics.map((one) => one.rows);
      const both = agentropy.DEFAULTS.filter((name) => rows.some((own) => agentropy.seriesOf(own, name).length));
      agentropy.redraw(charts, () =>
        both.map((name) =>
          agentropy.curve(
            name,
            SIDES.flatMap((side, at) =>
              agentropy.seriesOf(rows[at], name, { label: side.sign, colour: side.colour, held: side.held })
            ),
          )
        ));
    }

    function drawHead() {
      versus.replaceChildren(
        ...runs.map((run, at) =>
          h(
            "div",
            { class: `side-card side-${SIDES[at].sign}` },
            h("span", { class: "letter", text: SIDES[at].sign }),
            h(
              "div",
              {},
              h("a", { href: link(["run", run.id]), class: "main-link", text: run.name }),
              h("div", {
                class: "faint",
                text: `${run.algorithm} · ${
                  agentropy.shortEnv(run.env)
                } · seed ${run.seed} · step ${run.step} of ${run.steps}`,
              }),
              run.success
                ? h(
                  "div",
                  {},
                  h("b", { text: percent(run.success.rate) }),
                  h("span", {
                    class: "faint",
                    text: ` [${percent(run.success.low)}, ${
                      percent(run.success.high)
                    }] of ${run.success.tasks} held-out tasks`,
                  }),
                )
                : h("div", { class: "faint", text: "not evaluated" }),
            ),
          )
        ),
      );
      verdict.replaceChildren(paired(evaluations));
    }

    function drawPicker() {
      const list = h(
        "datalist",
        { id: "common-tasks" },
        common.slice(0, 500).map((name) => h("option", { value: name })),
      );
      const field = h("input", {
        type: "search",
        list: "common-tasks",
        "aria-label": "Task that both runs played",
        placeholder: `Search ${agentropy.count(common.length, "task")} that both played`,
        value: state.task,
      });
      field.addEventListener("change", () => {
        const name = tasks[0].has(field.value) && tasks[1].has(field.value)
          ? field.value
          : common.find((one) => one.toLowerCase().includes(field.value.toLowerCase()));
        if (name) choose(name);
      });
      const selects = picks
        ? [0, 1].map((side) => {
          const select = h(
            "select",
            { "aria-label": `Episode of ${SIDES[side].sign}` },
            tasks[side].get(state.task).map((one) => {
              const option = h("option", {
                value: keyOf(one),
                text: `step ${one.step}, #${one.trajectory}: ${agentropy.OUTCOMES[one.outcome].word}, ${
                  number(one.reward)
                }`,
              });
              option.selected = keyOf(one) === keyOf(picks[side]);
              return option;
            }),
          );
          select.addEventListener("change", () => {
            picks[side] = tasks[side].get(state.task).find((one) => keyOf(one) === select.value);
            show();
          });
          return h(
            "label",
            { class: `pick-${SIDES[side].sign}` },
            h("span", { class: "letter", text: SIDES[side].sign }),
            h("span", { class: "faint", text: ` won ${wins(tasks[side].get(state.task))} ` }),
            select,
          );
        })
        : [];
      const step = (by, text) =>
        h("button", {
          type: "button",
          on: { click: () => choose(common[(common.indexOf(state.task) + by + common.length) % common.length]) },
        }, text);
      picker.replaceChildren(
        h("div", { class: "picker-line" }, field, list, step(-1, "Previous task"), step(1, "Next task")),
        picks ? h("div", { class: "picker-line two" }, selects) : "",
      );
    }

    async function show() {
      const mine = ++shows, found = await panes(host, runs, [...picks], state);
      if (mine !== shows) return;
      shown = found;
      host.replaceChildren(...shown.rows);
      tokens.reset();
      drawPicker();
      if (missing(state.measure)) state.measure = "entropy";
      colours.element.hidden = false;
      paint();
      remember();
    }

    function choose(name, asked = []) {
      state.task = name;
      state.place = 0;
      picks = [0, 1].map((side) => {
        const list = tasks[side].get(name);
        return list.find((one) => keyOf(one) === asked[side]) || list[list.length - 1];
      });
      return show();
    }

    function goTo(at) {
      if (!shown) return;
      state.place = Math.min(shown.sections.length - 1, Math.max(0, at));
      shown.sections.forEach((section, one) => section.classList.toggle("now", one === state.place));
      shown.sections[state.place].scrollIntoView({ block: "center", behavior: "instant" });
    }

    drawHead();
    drawPicker();
    colours.element.hidden = true;
    if (!common.length) {
      picker.replaceChildren(
        agentropy.notice(
          "These runs share no saved task",
          "Only tasks that both have trajectories of can be read side by side. Runs of one seed play the same tasks.",
        ),
      );
    }
    const onTheme = () => paint();
    document.addEventListener("agentropy:theme", onTheme);
    const title = runs.map((run) => run.name).join(" and ");
    return {
      title: `Compare ${title}`,
      crumbs: [["Runs", link([], { choose: ids.join(",") })], ["Compare", ""]],
      element: h(
        "div",
        { class: "page compare" },
        h("h1", { class: "unseen", text: `Compare ${title}` }),
        versus,
        verdict,
        charts,
        h(
          "details",
          { class: "config" },
          h("summary", { text: "What differs in their configurations" }),
          differences(configs),
        ),
        h(
          "section",
          { class: "same" },
          h("h2", { text: "The same task, turn by turn" }),
          picker,
          colours.element,
          host,
        ),
      ),
      keys: {
        ...colours.keys,
        j: () => goTo(state.place + 1),
        k: () => goTo(state.place - 1),
        "/": () => picker.querySelector("input")?.focus(),
        Enter: () => shown && tokens.focus(shown.sections[state.place]),
      },
      shown: () => {
        drawCharts();
        const name = state.task && common.includes(state.task) ? state.task : common[0];
        if (name) choose(name, [query.get("a"), query.get("b")]);
      },
      leave: () => {
        left = true;
        shows++; // panes that are still on their way are not shown
        tips.remove();
        document.removeEventListener("agentropy:theme", onTheme);
      },
      refresh: async (now) => {
        const next = ids.map((id) => now.find((one) => one.id === id));
        if (!next.every(Boolean) || next.every((run, at) => run.metrics === runs[at].metrics)) return;
        const found = await numbersOf(next);
        if (left) return;
        runs = next;
        [metrics, evaluations] = found;
        drawHead();
        drawCharts();
      },
    };
  };
})(window.agentropy);
