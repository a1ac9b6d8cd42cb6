// A conversation: prompt, actions token by token in colour, observations, rewards, and how it ended.
// - agentropy.promptBlock, agentropy.turnBlock, agentropy.ending: its parts. - agentropy.paint: their tokens' colours.
"use strict";

(function (agentropy) {
  const { h, number, signed, MEASURES } = agentropy;
  const LONG = 1500;

  // Text that an environment wrote; what is very long opens on demand.
  function passage(text, name) {
    const whole = text.trim();
    if (whole.length <= LONG) return h("div", { class: name, text: whole || "(nothing)" });
    const body = h("span", { text: whole.slice(0, LONG) + " …" });
    const more = h("button", {
      type: "button",
      class: "linked",
      text: `Show all ${whole.length.toLocaleString("en")} characters`,
    });
    more.addEventListener("click", () => ((body.textContent = whole), more.remove()));
    return h("div", { class: name }, body, " ", more);
  }

  const special = (piece) => /^\s*<[^<>\s]+>\s*$/.test(piece);

  function token(node, at, place) {
    const piece = node.pieces[place];
    const name = "token" + (special(piece) ? " special" : "") + (piece === "" ? " empty" : "") +
      (/^\s*\n\s*$/.test(piece) ? " newline" : "") + (piece.length > 24 || piece.includes("\n") ? " long" : "");
    return h("span", { class: name, "data-node": String(at), "data-place": String(place), text: piece });
  }

  // What was decided at a turn where a rule looked at the rise of entropy.
  function decision(own, turn) {
    const record = (own.info.branching || []).find((one) => one.turn === turn);
    if (!record) return null;
    const digits = Math.abs(record.delta_entropy) < 0.005 ? 4 : 2;
    return h(
      "div",
      {
        class: "decision",
        title: "rise of entropy as the branching rule measured it, and the probability to fork it gave",
      },
      `ΔH ${signed(record.delta_entropy, digits)}, P ${number(record.probability)}: `,
      record.forks
        ? h("span", { class: "fork" }, `forked ${record.forks === 1 ? "once" : `${record.forks} times`} here`)
        : "not forked",
    );
  }

  const promptBlock = (tree, parts) =>
    h(
      "section",
      { class: "prompt-block", "aria-label": "Prompt" },
      (parts.length ? parts[0].before : []).map((at) => passage(tree.nodes[at].text, "prompt")),
    );

  // A turn: action, what was heard, figures at the side; forks are buttons to branches that go another way after it.
  function turnBlock(tree, member, part, place, forks = []) {
    const own = tree.trajectories[member], node = part.act === null ? null : tree.nodes[part.act];
    const body = h("div", { class: "turn-body" });
    for (const one of place ? part.before.map((at) => tree.nodes[at]) : []) {
      body.append(
        h(
          "details",
          { class: "context" },
          h("summary", {
            text: `What the policy read at turn ${part.turn}: ${agentropy.count(one.tokens.length, "token")}`,
          }),
          // Its text is the newest observation alone; its tokens are all that was read.
          passage(one.pieces ? one.pieces.join("") : one.text, "prompt"),
        ),
      );
    }
    if (node) {
      const said = h("div", { class: "said" });
      // Lines break before the space of a token, never between it and its word.
      if (node.pieces) {
        node.pieces.forEach((piece, at) =>
          said.append(...(/^\s/.test(piece) ? [h("wbr")] : []), token(node, part.act, at))
        );
      } else {said.append(
          h("span", {
            class: "token whole",
            "data-node": String(part.act),
            "data-place": "-1",
            text: node.text || "(no words)",
          }),
        );}
      body.append(said);
    }
    for (const at of part.after) body.append(passage(tree.nodes[at].text, "heard"));
    const decided = node && decision(own, part.turn);
    if (decided || forks.length) body.append(h("div", { class: "leaving" }, decided, forks));
    const figures = h("div", { class: "turn-figures" });
    if (node) {
      figures.append(h("div", { class: "turn-mean" }));
      if (node.reward) {
        figures.append(h("div", { class: node.reward > 0 ? "good" : "bad", text: `r ${signed(node.reward)}` }));
      }
    }
    const shared = node && place < own.shared;
    return h(
      "section",
      {
        class: shared ? "turn shared" : "turn",
        "data-place": String(place),
        "data-turn": String(part.turn),
        "aria-label": node ? `Turn ${part.turn}` : "Prompt",
      },
      h("div", { class: "turn-number", text: node ? String(part.turn) : "" }),
      body,
      figures,
    );
  }

  function ending(own) {
    const why = own.info.error
      ? `: ${own.info.error}`
      : own.info.overflow
      ? ": the context was full"
      : own.outcome === "cut"
      ? ": the limit of turns"
      : "";
    const last = own.info.last_observation;
    return h(
      "section",
      { class: "ending", "aria-label": "How it ended" },
      last ? passage(String(last), "heard") : "",
      h(
        "div",
        { class: "end" },
        agentropy.outcome(own.outcome),
        h("span", { class: "faint" }, why),
        h("span", {}, `return ${number(own.reward)}`),
        own.score ? h("span", {}, `score ${number(own.score)}`) : "",
        h("span", { class: "faint" }, agentropy.count(own.turns, "turn")),
      ),
    );
  }

  // Colour every token below root by its number; spans carry it as data-value.
  function paint(root, tree, member, measure, domain) {
    for (const span of root.querySelectorAll(".token")) {
      const { node, place } = span.dataset;
      const value = agentropy.valueOf(tree, member, Number(node), measure, Number(place));
      span.style.backgroundColor = domain ? agentropy.colour(measure, value, domain) : "";
      if (value === null || value === undefined) delete span.dataset.value;
      else span.dataset.value = String(value);
      span.classList.toggle("masked", measure === "weight" && value === 0);
    }
    for (const section of root.querySelectorAll(".turn")) {
      const cell = section.querySelector(".turn-mean"), first = section.querySelector(".token");
      if (!cell) continue;
      const value = first ? agentropy.valueOf(tree, member, Number(first.dataset.node), measure) : null;
      cell.replaceChildren(
        h("span", { class: "faint", text: MEASURES[measure].sign + " " }),
        measure === "advantage" ? signed(value) : number(value),
      );
      cell.title = `mean ${MEASURES[measure].label.toLowerCase()} of the turn's tokens`;
    }
  }

  Object.assign(agentropy, { promptBlock, turnBlock, ending, paint });
})(window.agentropy);
