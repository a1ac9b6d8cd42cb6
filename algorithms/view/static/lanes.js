// The rollout tree of a task: a lane for every episode, turns to the right, what several share drawn once.
// - agentropy.lanes: the drawing; it calls open(member, turn) for a click or Enter. - agentropy.describeBranch: in words.
"use strict";

(function (agentropy) {
  const { h, svg, number, OUTCOMES } = agentropy;

  function described(tree, member) {
    const own = tree.trajectories[member];
    const from = own.parent >= 0
      ? `, leaves ${own.parent} at turn ${tree.nodes[own.acts[own.shared] ?? own.acts[own.shared - 1]].turn}`
      : "";
    return `Branch ${member}${from}, ${OUTCOMES[own.outcome].word}, return ${number(own.reward)}, ${
      agentropy.count(own.turns, "turn")
    }`;
  }

  agentropy.describeBranch = described;

  agentropy.lanes = ({ tree, open }) => {
    const order = tree.order, pitch = order.length > 12 ? 20 : 24, top = 22;
    const longest = Math.max(1, ...tree.trajectories.map((own) => own.acts.length));
    const label = (member) => `#${member} ✗ ${number(tree.trajectories[member].reward)}`;
    const labels = Math.max(...order.map((member) => label(member).length)) * 7.2 + 14;
    const host = h("div", { class: "lanes", role: "tree", "aria-label": "Branches of this task" });
    const left = 16, here = svg("rect", { class: "here", height: 16, rx: 2 });
    let state = { member: 0, turn: 0, measure: "entropy" }, focused = 0, width = 0, cell = 0;
    const items = new Map();

    const x = (turn) => left + turn * cell;
    const y = (member) => top + tree.trajectories[member].lane * pitch + pitch / 2;

    // The value of an action's cell: the mean over its tokens, as the first episode that played it has them.
    const valueOf = (member, at) => agentropy.valueOf(tree, member, at, state.measure);

    function draw() {
      if (!width) return;
      cell = Math.max(1.5, Math.min(20, (width - left - labels) / longest));
      const domain = tree.domains[state.measure], height = top + order.length * pitch + 4;
      const image = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
      const every = [1, 2, 5, 10, 20, 50, 100].find((step) => step * cell >= 26) || 200;
      for (let turn = 0; turn < longest; turn += every) {
        image.append(svg("text", { class: "tick", x: x(turn) + cell / 2, y: 13, "text-anchor": "middle" }, turn));
      }
      const started = order.filter((member) => tree.trajectories[member].parent < 0);
      image.append(
        svg("line", { class: "rail", x1: 6, x2: 6, y1: y(started[0]), y2: y(started[started.length - 1]) }),
        svg("circle", { class: "root", cx: 6, cy: y(started[0]), r: 3 }),
      );
      image.append(svg("path", { class: "way", d: way() }));
      items.clear();
      for (const member of order) image.append(lane(member, domain));
      image.append(here);
      mark();
      host.replaceChildren(image);
    }

    // The cell of the current turn.
    function mark() {
      const there = state.turn < tree.trajectories[state.member].acts.length;
      here.style.display = there ? "" : "none";
      if (!there) return;
      here.setAttribute("x", x(state.turn) - 1);
      here.setAttribute("y", y(ownerOf(state.member, state.turn)) - 8);
      here.setAttribute("width", Math.max(3, cell));
    }

    // Whose lane the cell of a turn stands in.
    function ownerOf(member, turn) {
      const own = tree.trajectories[member];
      return own.parent >= 0 && turn < own.shared ? ownerOf(own.parent, turn) : member;
    }

    const elbow = (member) => {
      const own = tree.trajectories[member];
      const at = own.parent < 0 ? 6 : x(own.shared) - cell * 0.15,
        from = own.parent < 0 ? y(member) : y(ownerOf(own.parent, Math.max(0, own.shared - 1)));
      return { at, from, to: y(member) };
    };

    // The line of the open branch: along the lanes of those that it left.
    function way() {
      const points = [];
      let member = state.member, end = x(tree.trajectories[member].acts.length);
      for (;;) {
        const own = tree.trajectories[member], { at, from, to } = elbow(member);
        points.unshift([at, from], [at, to], [end, to]);
        if (own.parent < 0) break;
        end = at;
        member = ownerOf(own.parent, Math.max(0, own.shared - 1));
      }
      return "M" + points.map((point) => point.map((one) => one.toFixed(1)).join(" ")).join("L");
    }

    function lane(member, domain) {
      const own = tree.trajectories[member],
        chosen = member === state.member,
        end = x(own.acts.length),
        fork = own.parent >= 0;
      const { at, from, to } = elbow(member);
      const item = svg("g", {
        class: chosen ? "lane open" : "lane",
        role: "treeitem",
        tabindex: member === focused ? "0" : "-1",
        "aria-level": String(own.depth + 1),
        "aria-selected": String(chosen),
        "aria-label": described(tree, member),
        "data-branch": String(member),
        on: { click: (event) => open(member, turnAt(event, own)), keydown: (event) => key(event, member) },
      });
      item.append(
        svg("rect", {
          class: "reach",
          x: fork ? at - 3 : 0,
          y: to - pitch / 2,
          width: width - (fork ? at - 3 : 0),
          height: pitch,
        }),
      );
      item.append(svg("path", { class: "rail", d: `M${at} ${from}L${at} ${to}L${end} ${to}` }));
      own.acts.slice(own.shared).forEach((node, place) => {
        const turn = own.shared + place, value = valueOf(member, node);
        item.append(
          svg("rect", {
            class: value === null ? "cell none" : "cell",
            "data-turn": String(turn),
            "data-value": value === null ? null : String(value),
            x: x(turn) + 0.5,
            y: to - 6,
            width: Math.max(1, cell - 1),
            height: 12,
            fill: domain && value !== null ? agentropy.colour(state.measure, value, domain) : "",
          }),
        );
      });
      if (fork) {
        item.append(
          svg("circle", { class: "forked", cx: at, cy: from, r: 3.5, "data-fork": String(member) }),
          svg("circle", { class: "reach", cx: at, cy: from, r: 9, "data-fork": String(member) }),
        );
      }
      item.append(
        svg(
          "text",
          { class: "leaf", x: end + 8, y: to + 4, "data-leaf": String(member) },
          svg("tspan", { class: "name" }, `#${member} `),
          svg("tspan", { class: own.outcome }, OUTCOMES[own.outcome].sign),
          svg("tspan", {}, ` ${number(own.reward)}`),
        ),
      );
      items.set(member, item);
      return item;
    }

    // A cell opens the branch at its turn, the fork's dot where it left, the end at the end.
    function turnAt(event, own) {
      const { turn, fork, leaf } = event.target.closest("[data-turn], [data-fork], [data-leaf]")?.dataset || {};
      if (turn !== undefined) return Number(turn);
      if (leaf !== undefined) return Math.max(0, own.acts.length - 1);
      return fork !== undefined || own.shared ? Math.min(own.shared, Math.max(0, own.acts.length - 1)) : 0;
    }

    function key(event, member) {
      const at = order.indexOf(member), own = tree.trajectories[state.member];
      const aim = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: order.length - 1 }[event.key];
      if (aim !== undefined) focusOn(order[Math.min(order.length - 1, Math.max(0, aim))]);
      else if (event.key === "Enter" || event.key === " ") {
        open(
          member,
          Math.min(tree.trajectories[member].shared, Math.max(0, tree.trajectories[member].acts.length - 1)),
        );
      } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
        open(
          state.member,
          Math.min(own.acts.length - 1, Math.max(0, state.turn + (event.key === "ArrowLeft" ? -1 : 1))),
        );
      } else return;
      event.preventDefault();
      event.stopPropagation();
    }

    function focusOn(member) {
      items.get(focused)?.setAttribute("tabindex", "-1");
      focused = member;
      items.get(member).setAttribute("tabindex", "0");
      items.get(member).focus();
    }

    function show(next) {
      const had = host.contains(document.activeElement);
      state = next;
      focused = next.member;
      draw();
      if (had) items.get(focused)?.focus();
    }

    // Scrolling calls it at every turn: nothing else is drawn again.
    function moveTo(turn) {
      state.turn = turn;
      mark();
    }

    new ResizeObserver(() => {
      if (Math.floor(host.clientWidth) !== width) (width = Math.floor(host.clientWidth)), draw();
    }).observe(host);
    return { element: host, show, moveTo, focus: () => focusOn(state.member) };
  };
})(window.agentropy);
