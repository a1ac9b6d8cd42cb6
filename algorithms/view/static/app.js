// The frame of the page: which view an address names, keys, the theme, and asking a live run for what is new.
"use strict";

(function (agentropy) {
  const { h, code } = agentropy;
  const main = document.getElementById("main"), crumbs = document.getElementById("crumbs");
  const trouble = document.getElementById("trouble"), pulse = document.getElementById("pulse");

  const ROUTES = [
    [/^\/?$/, () => agentropy.runsView],
    [/^\/trajectories$/, () => agentropy.browseView],
    [/^\/run\/([^/]+)$/, () => agentropy.runView],
    [/^\/run\/([^/]+)\/trajectories$/, () => agentropy.browseView],
    [/^\/run\/([^/]+)\/tree\/(\d+)\/(\d+)$/, () => agentropy.episodeView],
    [/^\/compare\/([^/]+)\/([^/]+)$/, () => agentropy.compareView],
  ];

  const KEYS = [
    ["Anywhere", [["?", "these keys"], ["t", "light or dark"], [
      "u",
      "up: from an episode to the list, to the run, to all runs",
    ]]],
    ["A run", [["b", "its trajectories"], ["/", "search metrics"], [
      "← →",
      "step by step, once a chart has the focus",
    ]]],
    ["Trajectories", [["/", "search"], ["↑ ↓ PgUp PgDn Home End", "move"], ["Enter", "open"]]],
    ["An episode", [
      ["1 2 3 4", "colour by entropy, log-probability, advantage, weight"],
      ["j k", "next and previous turn"],
      ["] [", "next and previous branch"],
      ["n p", "next and previous task"],
      ["Enter", "to the tokens of the turn"],
      ["← → ↑ ↓", "from token to token"],
      ["b", "to the tree of branches"],
    ]],
    ["The tree", [["↑ ↓", "from branch to branch"], ["Enter", "open the branch"], ["← →", "turn by turn"]]],
  ];

  let current = null, turn = 0, polled = 0;

  function parse() {
    const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
    return { path, query: new URLSearchParams(query) };
  }

  function failed(error) {
    const offline = error.status === 0;
    return h(
      "div",
      { class: "page" },
      h("h1", { text: offline ? "The server does not answer" : "This could not be shown" }),
      h(
        "div",
        { class: "notice" },
        h("p", { text: `${error.message[0].toUpperCase()}${error.message.slice(1)}.`.replace(/\.\.$/, ".") }),
        h(
          "p",
          {},
          offline
            ? ["Start it again with ", code("agentropy view RUN"), " and reload this page."]
            : [h("a", { href: "#/" }, "Go to all runs"), ", or reload the page if the run was changed meanwhile."],
        ),
      ),
    );
  }

  async function route() {
    const mine = ++turn, { path, query } = parse();
    if (current && current.leave) current.leave();
    current = null;
    agentropy.clearCharts();
    const found = ROUTES.map(([form, view]) => [path.match(form), view]).find(([match]) => match);
    main.setAttribute("aria-busy", "true");
    const slow = setTimeout(
      () => mine === turn && main.replaceChildren(h("p", { class: "loading", text: "Reading the run…" })),
      250,
    );
    let view;
    try {
      if (!found) throw Object.assign(new Error("this address names nothing that the page can show"), { status: 404 });
      const runs = await agentropy.runs();
      growing ||= grows(runs);
      view = await found[1]()({ runs, ids: found[0].slice(1).map(decodeURIComponent), query });
    } catch (error) {
      if (!error.status && error.status !== 0) console.error(error);
      view = { title: "Not shown", crumbs: [["Runs", "#/"], ["Not shown", ""]], element: failed(error) };
    }
    clearTimeout(slow);
    if (mine !== turn) return view.leave && view.leave();
    current = view;
    main.removeAttribute("aria-busy");
    main.className = view.fills ? "fills" : "";
    main.replaceChildren(view.element);
    document.title = `${view.title} · agentropy`;
    crumbs.replaceChildren(
      ...view.crumbs.map(([text, href], at) =>
        h(
          "li",
          {},
          at === view.crumbs.length - 1 ? h("span", { "aria-current": "page", text }) : h("a", { href, text }),
        )
      ),
    );
    window.scrollTo(0, 0);
    (view.focus || main).focus({ preventScroll: true });
    if (view.shown) view.shown();
    schedule();
  }

  // More may come: a run is under way, or there is none yet.
  const grows = (runs) => !runs.length || runs.some((run) => run.live);

  // Only what grows is asked for more, and only while somebody looks.
  function schedule() {
    clearTimeout(polled);
    if (agentropy.live) polled = setTimeout(poll, 2000);
  }

  let growing = true;

  async function poll() {
    if (document.hidden || !growing) return;
    try {
      const runs = await agentropy.runs();
      growing = grows(runs);
      pulse.hidden = !runs.some((run) => run.live);
      trouble.hidden = true;
      if (current && current.refresh) await current.refresh(runs);
    } catch (error) {
      trouble.hidden = false;
      trouble.textContent = `What you see is no longer live: ${error.message}. ` +
        "Start it again with “agentropy view RUN”; this page then goes on by itself.";
    }
    schedule();
  }

  document.addEventListener("visibilitychange", () => {
    growing = true;
    if (!document.hidden && agentropy.live) poll();
  });

  function help() {
    const dialog = document.getElementById("keys");
    dialog.replaceChildren(
      h(
        "form",
        { method: "dialog" },
        h("header", {}, h("h2", { id: "keys-title", text: "Keys" }), h("button", { class: "quiet" }, "Close")),
        KEYS.map((
          [title, rows],
        ) => [
          h("h3", { text: title }),
          h(
            "dl",
            {},
            rows.map(([keys, text]) => [
              h(
                "dt",
                {},
                keys.split(" ").map((key) => h("kbd", { text: key })),
              ),
              h("dd", { text }),
            ]),
          ),
        ]),
      ),
    );
    dialog.showModal();
  }

  const themeButton = document.getElementById("theme");

  function label() {
    const dark = agentropy.theme() === "dark";
    themeButton.textContent = dark ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", dark ? "Light theme" : "Dark theme");
    for (const ramp of document.querySelectorAll("[data-ramp]")) {
      ramp.style.background = agentropy.gradient(ramp.dataset.ramp);
    }
  }

  const flip = () => agentropy.setTheme(agentropy.theme() === "dark" ? "light" : "dark");

  function up() {
    const links = crumbs.querySelectorAll("a");
    if (links.length) location.hash = links[links.length - 1].getAttribute("href");
  }

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea, dialog")) return;
    // Enter is for the link or button that has the focus, before it is a key of the page.
    if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
    const keys = { "?": help, t: flip, u: up, ...(current && current.keys) };
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });

  document.getElementById("help").addEventListener("click", help);
  themeButton.addEventListener("click", flip);
  document.addEventListener("agentropy:theme", label);
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  window.addEventListener("hashchange", route);
  label();
  route();
})(window.agentropy);
