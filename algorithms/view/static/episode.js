// One task's episodes: the tree of branches, and the open one as a conversation.
"use strict";

(function (agentropy) {
  const { h, link, number, MEASURES } = agentropy;

  // Episodes that go another way than the open one, by the turn at which they do; one for each other action.
  function leaving(tree, member) {
    const own = tree.trajectories[member], out = new Map();
    for (const other of tree.trajectories) {
      if (other.member === member) continue;
      let shared = 0;
      while (shared < own.acts.length && own.acts[shared] === other.acts[shared]) shared++;
      if (!shared || shared >= other.acts.length) continue;
      const at = other.acts[shared], turn = Math.min(shared, own.acts.length - 1);
      if (!out.has(turn)) out.set(turn, new Map());
      const here = out.get(turn);
      if (here.has(at)) here.get(at).more++;
      else here.set(at, { other, place: shared, more: 0 });
    }
    return out;
  }

  function whyMissing(tree, run) {
    return (measure) => {
      if (tree.domains[measure]) return null;
      if (measure === "entropy" || measure === "logprob") return "No token of this task was sampled by the policy.";
      return run.credit
        ? `Nothing is stored of this task's ${MEASURES[measure].label.toLowerCase()}s: learning did not use it.`
        : "This run stored no advantages and weights; a run made with this version does.";
    };
  }

  function places(index) {
    const seen = new Set(), out = [];
    for (let row = 0; row < index.count; row++) {
      const key = `${index.columns.step[row]}/${index.columns.tree[row]}`;
      if (!seen.has(key)) (seen.add(key), out.push([index.columns.step[row], index.columns.tree[row]]));
    }
    return out;
  }

  agentropy.episodeView = async ({ runs, ids, query }) => {
    const run = agentropy.findRun(runs, ids[0]), step = Number(ids[1]), number_ = Number(ids[2]);
    const [tree, index] = await Promise.all([
      agentropy.treeOf(run, step, number_),
      agentropy.index(run).catch(() => null),
    ]);
    const all = index ? places(index) : [], here = all.findIndex(([one, other]) => one === step && other === number_);
    const size = tree.trajectories.length;
    let member = Math.min(size - 1, Math.max(0, Number(query.get("branch")) || 0)), place = 0;
    let measure = Object.hasOwn(MEASURES, query.get("colour")) ? query.get("colour") : "entropy";
    let sections = [], map = null, following = 0;
    const missing = whyMissing(tree, run);
    if (missing(measure)) measure = "entropy";

    const talk = h("div", { class: "talk", role: "log", "aria-live": "off", "aria-label": "Conversation" }),
      mapHost = h("div", { class: "map-host" });
    const facts = h("dl", { class: "facts tight" });
    const lanes = agentropy.lanes({ tree, open: (other, turn) => open(other, turn, true) });
    const colours = agentropy.colouring({ missing, change: recolour });
    const tips = agentropy.tips(talk, () => [tree, member]), tokens = agentropy.rove(talk);

    const remember = () =>
      agentropy.remember(["run", run.id, "tree", step, number_], {
        branch: member,
        turn: place || "",
        colour: measure === "entropy" ? "" : measure,
      });

    function recolour(next) {
      if (missing(next)) return agentropy.announce(missing(next));
      measure = next;
      paint();
      remember();
      agentropy.announce(`Tokens are coloured by ${MEASURES[measure].label.toLowerCase()}.`);
    }

    function paint() {
      agentropy.paint(talk, tree, member, measure, tree.domains[measure]);
      colours.show(measure, tree.domains[measure]);
      lanes.show({ member, turn: place, measure });
      if (map) map.layout();
    }

    function forkButton({ other, place: at, more }) {
      const words = agentropy.command(tree.nodes[other.acts[at]].text);
      return h(
        "button",
        {
          type: "button",
          class: "branch-off",
          "data-branch": String(other.member),
          on: { click: () => open(other.member, at, true) },
        },
        h("span", { class: "fork" }, agentropy.forkSign()),
        h("span", { class: "faint" }, at < tree.trajectories[member].acts.length ? "instead, " : "goes on, "),
        `#${other.member}: `,
        h("span", { class: "words", text: words }),
        agentropy.outcome(other.outcome, true),
        h(
          "span",
          { class: "faint" },
          ` ${number(other.reward)}${more ? `, and ${agentropy.count(more, "branch", "branches")} more` : ""}`,
        ),
      );
    }

    function drawTalk() {
      const own = tree.trajectories[member], parts = agentropy.turnsOf(tree, member), forks = leaving(tree, member);
      tips.show(null);
      talk.replaceChildren(
        agentropy.promptBlock(tree, parts),
        ...parts.filter((part) => part.act !== null).map((part, at) =>
          agentropy.turnBlock(tree, member, part, at, [...(forks.get(at) || new Map()).values()].map(forkButton))
        ),
        agentropy.ending(own),
      );
      if (!own.acts.length) {
        talk.prepend(
          agentropy.notice(
            "This episode has no action",
            own.info.error ? `The world broke: ${own.info.error}` : "It ended before the policy said anything.",
          ),
        );
      }
      if (!tree.pieces) {
        talk.prepend(
          h("p", {
            class: "warning",
            text: "The run's tokenizer was not found, so actions are coloured whole, by the mean of their tokens.",
          }),
        );
      }
      sections = [...talk.querySelectorAll(".turn")];
      tokens.reset();
      if (map) map.remove();
      map = agentropy.minimap({
        sections,
        go: (at) => goTo(at, true),
        values: own.acts.map((at) => agentropy.valueOf(tree, member, at, "entropy")),
      });
      mapHost.replaceChildren(map.element);
      facts.replaceChildren(
        ...[
          ["branch", `#${member} of ${size}`],
          ["result", agentropy.outcome(own.outcome)],
          ["return", number(own.reward)],
          ["turns", own.turns],
          ["tokens", own.tokens.toLocaleString("en")],
          own.parent >= 0 && ["left", `#${own.parent}, sharing ${agentropy.count(own.shared, "turn")}`],
          own.info.invalid !== undefined && ["invalid", own.info.invalid],
        ].filter(Boolean)
          .map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", {}, value))),
      );
    }

    function goTo(at, scroll) {
      place = Math.min(Math.max(0, at), Math.max(0, sections.length - 1));
      sections.forEach((section, one) => section.classList.toggle("now", one === place));
      if (scroll && sections[place]) {
        following = Date.now() + 700;
        sections[place].scrollIntoView({ block: place ? "center" : "end", behavior: "instant" });
      }
      lanes.moveTo(place);
      if (map) map.show(place);
      remember();
    }

    function open(other, turn, scroll) {
      const changed = other !== member;
      member = other;
      if (changed) {
        drawTalk();
        paint();
        agentropy.announce(agentropy.describeBranch(tree, member));
      }
      goTo(turn, scroll);
    }

    const sibling = (by) => {
      const at = tree.order.indexOf(member) + by;
      if (at < 0 || at >= size) return;
      const next = tree.trajectories[tree.order[at]];
      open(next.member, Math.min(place, Math.max(0, next.acts.length - 1)), true);
    };
    const other = (by) =>
      all[here + by] && here >= 0 &&
      (location.hash = link(["run", run.id, "tree", ...all[here + by]], {
        colour: measure === "entropy" ? "" : measure,
      }));

    // The turn nearest the middle of the window is the current one.
    const follow = () => {
      if (Date.now() < following || !sections.length) return;
      const middle = innerHeight * 0.45,
        at = sections.findIndex((section) => section.getBoundingClientRect().bottom > middle);
      const next = scrollY < 4 ? 0 : at < 0 ? sections.length - 1 : at;
      if (next !== place) goTo(next, false);
    };
    const onTheme = () => paint();
    window.addEventListener("scroll", follow, { passive: true });
    document.addEventListener("agentropy:theme", onTheme);

    const won = tree.trajectories.filter((own) => own.won).length,
      forked = tree.trajectories.filter((own) => own.parent >= 0).length;
    const [family, rest] = agentropy.taskParts(tree.task);
    const neighbour = (by, text) =>
      h("a", {
        class: "button",
        href: all[here + by] && here >= 0 ? link(["run", run.id, "tree", ...all[here + by]]) : null,
        "aria-disabled": all[here + by] && here >= 0 ? null : "true",
        role: "link",
        text,
      });
    const title = h("h1", { class: "task-title" }, family, h("span", { class: "faint", text: rest }));

    drawTalk();
    return {
      title: `${tree.task}, step ${step}`,
      crumbs: [["Runs", "#/"], [run.name, link(["run", run.id])], [
        "Trajectories",
        link(["run", run.id, "trajectories"], { from: step, to: step }),
      ], [`step ${step}, task ${number_}`, ""]],
      element: h(
        "div",
        { class: "page episode" },
        h(
          "div",
          { class: "heading" },
          h(
            "div",
            {},
            title,
            h(
              "p",
              { class: "faint" },
              `step ${step} · ${tree.split} · ${won} of ${agentropy.count(size, "episode")} won · ${
                agentropy.count(forked, "fork")
              }`,
            ),
          ),
          h("div", { class: "actions" }, neighbour(-1, "Previous task"), neighbour(1, "Next task")),
        ),
        h(
          "div",
          { class: "workbench" },
          h(
            "aside",
            { class: "side", "aria-label": "Branches and colours" },
            h(
              "section",
              {},
              h("h2", { text: forked ? "Branches" : size === 1 ? "Episode" : "Episodes" }),
              lanes.element,
            ),
            facts,
            h("section", { class: "colour-section" }, h("h2", { text: "Colour tokens by" }), colours.element),
          ),
          talk,
          mapHost,
        ),
      ),
      keys: {
        ...colours.keys,
        j: () => goTo(place + 1, true),
        k: () => goTo(place - 1, true),
        "]": () => sibling(1),
        "[": () => sibling(-1),
        n: () => other(1),
        p: () => other(-1),
        Enter: () => tokens.focus(sections[place]),
        b: () => lanes.focus(),
      },
      shown: () => {
        paint();
        const asked = Number(query.get("turn")) || 0;
        goTo(asked, asked > 0);
      },
      leave: () => {
        tips.remove();
        if (map) map.remove();
        window.removeEventListener("scroll", follow);
        document.removeEventListener("agentropy:theme", onTheme);
      },
    };
  };
})(window.agentropy);
