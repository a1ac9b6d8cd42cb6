// The trajectories of one run, or of all: filters, sorting, and a list that draws only the rows that are seen.
"use strict";

(function (agentropy) {
  const { h, link, number, notice } = agentropy;

  const COLUMNS = [
    { name: "step", label: "Step", about: "training step" },
    { name: "trajectory", label: "#", about: "number of the episode among those of its task" },
    { name: "task", label: "Task" },
    { name: "outcome", label: "Result" },
    { name: "reward", label: "Return", about: "sum of the rewards of its turns" },
    { name: "turns", label: "Turns" },
    { name: "tokens", label: "Tokens", about: "sampled tokens" },
    { name: "entropy", label: "Entropy", about: "mean over its sampled tokens, nats" },
    { name: "forks", label: "Forks", about: "episodes that left it, or the one that it left itself" },
  ];
  const RESULTS = [["", "All"], ["won", "Won"], ["lost", "Lost"], ["cut", "Cut off"], ["failed", "Failed"]];
  const narrow = matchMedia("(max-width: 700px)");

  function filters(query, many, runs) {
    const initial = (name) => query.get(name) || "";
    const field = (name, label) =>
      h("input", {
        type: "number",
        step: "any",
        inputmode: "decimal",
        name,
        "aria-label": label,
        placeholder: label.split(" ")[1],
        value: initial(name),
        class: "short",
      });
    const range = (name, low, high) =>
      h("span", { class: "range" }, `${name} `, field(low, `${name} from`), " to ", field(high, `${name} to`));
    const search = h("input", {
      type: "search",
      name: "q",
      placeholder: "Search tasks",
      "aria-label": "Search tasks",
      value: initial("q"),
    });
    const forks = h("input", { type: "checkbox", name: "forks" });
    forks.checked = initial("forks") === "1";
    const result = h(
      "fieldset",
      { class: "segments" },
      h("legend", { class: "unseen", text: "Result" }),
      RESULTS.map(([value, text]) => {
        const box = h("input", { type: "radio", name: "result", value });
        box.checked = initial("result") === value;
        return h("label", {}, box, h("span", { text }));
      }),
    );
    const choice = (name, label, options) =>
      h(
        "select",
        { name, "aria-label": label },
        h("option", { value: "", text: label }),
        options.map(([value, text]) => {
          const option = h("option", { value, text });
          option.selected = initial(name) === value;
          return option;
        }),
      );
    const recipes = [...new Set(runs.map((run) => run.algorithm))];
    const form = h(
      "form",
      {
        class: "filters",
        role: "search",
        "aria-label": "Filter trajectories",
        on: { submit: (event) => event.preventDefault() },
      },
      search,
      result,
      range("Return", "low", "high"),
      range("Step", "from", "to"),
      h("label", { class: "tick-box" }, forks, " with forks"),
      many && choice("recipe", "Every recipe", recipes.map((one) => [one, one])),
      many && choice("run", "Every run", runs.map((run) => [run.id, run.name])),
      h("button", { type: "reset", class: "quiet", text: "Clear" }),
    );
    const read = () => {
      const data = new FormData(form), value = (name) => (data.get(name) || "").trim();
      return {
        q: value("q"),
        result: value("result"),
        low: value("low"),
        high: value("high"),
        from: value("from"),
        to: value("to"),
        forks: data.has("forks"),
        recipe: value("recipe"),
        run: value("run"),
      };
    };
    return { form, search, read };
  }

  // A task that stands in the row above too is written faintly, so that groups can be seen.
  function line(rows, row, many, above) {
    const get = (name) => rows.get(name, row), run = rows.run(row);
    const href = link(["run", run.id, "tree", get("step"), get("tree")], { branch: get("trajectory") });
    const [family, rest] = agentropy.taskParts(get("task")), reward = get("reward");
    const again = above !== undefined && rows.get("task", above) === get("task") &&
      rows.get("step", above) === get("step");
    const cell = (name, ...children) => h("div", { role: "gridcell", class: `c-${name}` }, ...children);
    return h(
      "div",
      { role: "row", class: "line" },
      cell("step", h("span", { class: "only-narrow faint" }, "step "), String(get("step"))),
      cell("trajectory", `#${get("trajectory")}`),
      cell(
        "task",
        h(
          "a",
          { href, tabindex: "-1", title: get("task"), class: again ? "again" : null },
          h("span", { text: family }),
          h("span", { class: "faint", text: rest }),
        ),
        many && h("span", { class: "tag", text: run.name }),
      ),
      cell("outcome", agentropy.outcome(get("outcome"))),
      cell("reward", h("span", { class: reward > 0 ? "good" : reward < 0 ? "bad" : "" }, number(reward))),
      cell("turns", String(get("turns")), h("span", { class: "only-narrow faint" }, " turns")),
      cell("tokens", get("tokens").toLocaleString("en"), h("span", { class: "only-narrow faint" }, " tokens")),
      cell(
        "entropy",
        h("i", { class: "swatch", "data-entropy": get("entropy") === null ? null : get("entropy") }),
        number(get("entropy")),
      ),
      cell(
        "forks",
        get("left") >= 0 &&
          h(
            "span",
            { class: "fork", title: `left #${get("left")} at turn ${get("left_at")}` },
            agentropy.forkSign(),
            ` of #${get("left")}`,
          ),
        get("forks") ? h("span", {}, get("left") >= 0 ? ", " : "", agentropy.count(get("forks"), "fork")) : "",
      ),
    );
  }

  agentropy.browseView = async ({ runs, ids, query }) => {
    const many = !ids.length, chosen = many ? runs : [agentropy.findRun(runs, ids[0])];
    const load = (those) => Promise.all(those.map(async (run) => ({ run, index: await agentropy.index(run) })));
    let sources = await load(chosen), left = false;
    let rows = agentropy.tableOf(sources), filter = null, seen = [], active = 0, height = 0;
    const drawn = new Map();
    const sort = {
      name: COLUMNS.some((one) => one.name === query.get("sort")) ? query.get("sort") : "",
      down: query.get("down") === "1",
    };
    const { form, search, read } = filters(query, many, chosen);
    const space = h("div", { class: "space", role: "presentation" });
    const scroller = h("div", {
      class: "scroller",
      tabindex: "0",
      role: "grid",
      "aria-label": "Trajectories",
      "aria-colcount": String(COLUMNS.length),
    });
    const orders = h(
      "select",
      { "aria-label": "Sort by", class: "only-narrow" },
      h("option", { value: "", text: "In order of steps" }),
      COLUMNS.flatMap((column) =>
        [[1, "falling"], [0, "rising"]].map(([down, word]) =>
          h("option", {
            value: `${column.name} ${down}`,
            text: `${column.label === "#" ? "Number" : column.label}, ${word}`,
          })
        )
      ),
    );
    orders.addEventListener("change", () => {
      const [name, down] = orders.value.split(" ");
      Object.assign(sort, { name, down: down === "1" });
      apply();
    });
    const tally = h("span", { class: "tally", role: "status" }), empty = h("div", { hidden: true });
    const domain = agentropy.domainOf(
      "entropy",
      sources.flatMap(({ index }) => index.columns.entropy.filter((value) => value !== null)),
    );
    const heads = COLUMNS.map((column) =>
      h(
        "div",
        { role: "columnheader", class: `c-${column.name}` },
        h(
          "button",
          { type: "button", title: column.about || null, on: { click: () => order(column.name) } },
          column.label,
          h("span", { class: "arrow", "aria-hidden": "true" }),
        ),
      )
    );
    const header = h("div", { role: "row", class: "line head", "aria-rowindex": "1" }, heads);
    scroller.append(h("div", { role: "rowgroup", class: "head-group" }, header), h("div", { role: "rowgroup" }, space));

    function order(name) {
      if (sort.name !== name) Object.assign(sort, { name, down: name !== "task" && name !== "outcome" });
      else if (sort.down === (name !== "task" && name !== "outcome")) sort.down = !sort.down;
      else Object.assign(sort, { name: "", down: false });
      apply();
    }

    // grown: there are more rows than before. Otherwise what is asked for may be what is shown already.
    function apply(grown) {
      // What was typed last may come due after the list was left; the address is then another's.
      if (left) return;
      const asked = { ...read(), sort: sort.name, down: sort.down };
      if (!grown && JSON.stringify(asked) === JSON.stringify(filter)) return;
      filter = asked;
      seen = agentropy.select(rows, filter);
      if (!grown) (active = 0), (scroller.scrollTop = 0);
      active = Math.min(active, Math.max(0, seen.length - 1));
      COLUMNS.forEach((column, at) => {
        const on = sort.name === column.name;
        heads[at].setAttribute("aria-sort", on ? (sort.down ? "descending" : "ascending") : "none");
        heads[at].querySelector(".arrow").textContent = on ? (sort.down ? "↓" : "↑") : "";
      });
      orders.value = sort.name ? `${sort.name} ${sort.down ? 1 : 0}` : "";
      tally.textContent = seen.length === rows.size
        ? agentropy.count(rows.size, "trajectory", "trajectories")
        : `${seen.length.toLocaleString("en")} of ${agentropy.count(rows.size, "trajectory", "trajectories")}`;
      scroller.setAttribute("aria-rowcount", String(seen.length + 1));
      empty.hidden = seen.length > 0 || rows.size === 0;
      measure();
      agentropy.remember(many ? ["trajectories"] : ["run", ids[0], "trajectories"], {
        ...filter,
        forks: filter.forks ? 1 : "",
        down: filter.down ? 1 : "",
      });
    }

    function measure() {
      height = narrow.matches ? 58 : 30;
      space.style.height = `${seen.length * height}px`;
      space.replaceChildren();
      drawn.clear();
      draw();
    }

    function draw() {
      const room = 8, top = Math.max(0, Math.floor(scroller.scrollTop / height) - room);
      const bottom = Math.min(seen.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / height) + room);
      for (const [at, element] of drawn) if (at < top || at >= bottom) (element.remove(), drawn.delete(at));
      let after = space.firstChild;
      for (let at = top; at < bottom; at++) {
        if (drawn.has(at)) {
          after = drawn.get(at).nextSibling;
          continue;
        }
        const element = line(rows, seen[at], many, seen[at - 1]);
        element.id = `row-${at}`;
        element.setAttribute("aria-rowindex", String(at + 2));
        element.style.transform = `translateY(${at * height}px)`;
        paint(element);
        space.insertBefore(element, after);
        drawn.set(at, element);
      }
      mark();
    }

    function paint(root) {
      for (const swatch of root.querySelectorAll("[data-entropy]")) {
        swatch.style.background = agentropy.colour("entropy", Number(swatch.dataset.entropy), domain);
      }
    }

    const onTheme = () => paint(space);

    function mark() {
      for (const [at, element] of drawn) element.classList.toggle("active", at === active);
      if (seen.length) scroller.setAttribute("aria-activedescendant", `row-${active}`);
      else scroller.removeAttribute("aria-activedescendant");
    }

    function move(to) {
      active = Math.min(seen.length - 1, Math.max(0, to));
      const top = active * height, head = header.offsetHeight, view = scroller.clientHeight - head;
      if (top < scroller.scrollTop) scroller.scrollTop = top;
      else if (top + height > scroller.scrollTop + view) scroller.scrollTop = top + height - view;
      draw();
    }

    const open = () => {
      const link = document.getElementById(`row-${active}`)?.querySelector("a");
      if (link) location.hash = link.getAttribute("href");
    };
    const page = () => Math.max(1, Math.floor((scroller.clientHeight - header.offsetHeight) / height) - 1);
    const moves = {
      ArrowDown: () => move(active + 1),
      ArrowUp: () => move(active - 1),
      PageDown: () => move(active + page()),
      PageUp: () => move(active - page()),
      Home: () => move(0),
      End: () => move(seen.length - 1),
      j: () => move(active + 1),
      k: () => move(active - 1),
      Enter: open,
    };

    scroller.addEventListener("keydown", (event) => {
      if (event.target !== scroller || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      moves[event.key]();
    });
    space.addEventListener("click", (event) => {
      const element = event.target.closest(".line");
      if (!element) return;
      active = Number(element.id.slice(4));
      if (!event.target.closest("a")) open();
    });
    scroller.addEventListener("scroll", draw, { passive: true });
    search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") (event.preventDefault(), apply(), scroller.focus());
      else if (event.key === "Escape") scroller.focus();
    });
    form.addEventListener("input", agentropy.debounced(() => apply(), 90));
    form.addEventListener("reset", () =>
      setTimeout(() => {
        for (const box of form.querySelectorAll("input[type=search], input[type=number]")) box.value = "";
        for (const box of form.querySelectorAll("input[type=checkbox]")) box.checked = false;
        for (const box of form.querySelectorAll("select")) box.selectedIndex = 0;
        form.querySelector("input[type=radio]").checked = true;
        apply();
      }));
    const observer = new ResizeObserver(measure);
    document.addEventListener("agentropy:theme", onTheme);

    empty.append(
      notice("No trajectory passes these filters", [
        "Widen them, or ",
        h("button", {
          type: "button",
          class: "linked",
          text: "clear them all",
          on: { click: () => form.reset() },
        }),
        ".",
      ]),
    );
    const broken = sources.flatMap(({ index }) => index.unreadable || []);
    const nothing = !rows.size &&
      notice(
        "No trajectories are saved yet",
        "A run saves the rollouts of every step while train.save_trajectories is on. They appear here as it trains.",
      );
    const title = many ? "All trajectories" : chosen[0].name;
    return {
      title: many ? title : `Trajectories of ${title}`,
      fills: true,
      focus: rows.size ? scroller : null,
      crumbs: [["Runs", "#/"], ...(many ? [] : [[title, link(["run", ids[0]])]]), ["Trajectories", ""]],
      element: h(
        "div",
        { class: many ? "page browse many" : "page browse" },
        h("div", { class: "heading" }, h("h1", { text: title }), many ? null : agentropy.tabs(chosen[0], "browse")),
        broken.length
          ? h("p", { class: "warning", text: `Steps ${broken.join(", ")} cannot be read: their files are damaged.` })
          : null,
        form,
        h("div", { class: "tally-line" }, tally, orders),
        nothing || [scroller, empty],
      ),
      keys: { "/": () => (search.focus(), search.select()), ...(rows.size ? moves : {}) },
      shown: () => (observer.observe(scroller), apply()),
      leave: () => ((left = true), observer.disconnect(), document.removeEventListener("agentropy:theme", onTheme)),
      refresh: async (now) => {
        const next = now.filter((run) => many || run.id === ids[0]);
        const same = (run, at) => sources[at] && sources[at].run.id === run.id && sources[at].run.index === run.index;
        if (next.length === sources.length && next.every(same)) return;
        const found = await load(next);
        if (left) return;
        if (!rows.size) return location.reload();
        // A new list: rows that are drawn meanwhile read the one that they were made of.
        sources = found;
        rows = agentropy.tableOf(sources);
        apply(true);
      },
    };
  };
})(window.agentropy);
