// Tokens under the pointer or with the focus: what their numbers are, and going from one to the next with keys.
// - agentropy.tips: the read-out. - agentropy.rove: the keys.
"use strict";

(function (agentropy) {
  const { h, number, signed, brief } = agentropy;

  // Everything that is known of a token, as pairs.
  function reading(tree, member, span) {
    const at = Number(span.dataset.node), place = Number(span.dataset.place), node = tree.nodes[at];
    const value = (measure) => agentropy.valueOf(tree, member, at, measure, place);
    const logprob = value("logprob"),
      rows = [["entropy", number(value("entropy"), 4) + " nats"], ["log-probability", number(logprob, 4)], [
        "probability",
        logprob === null ? "–" : brief(Math.exp(logprob)),
      ]];
    if (value("advantage") !== null) rows.push(["advantage", signed(value("advantage"), 4)]);
    if (value("weight") !== null) rows.push(["weight", number(value("weight"), 4)]);
    if (place < 0) return { title: "mean of the action's tokens", rows };
    const piece = node.pieces[place];
    rows.push(["token", `${place + 1} of ${node.tokens.length}, id ${node.ids[place]}`]);
    return {
      title: piece === ""
        ? "(part of a character)"
        : JSON.stringify(piece).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "␣"),
      rows,
    };
  }

  // One floating read-out for the token under the pointer or with the focus.
  function tips(root, lookup) {
    const tip = h("div", { class: "tip", role: "tooltip", id: "token-tip", hidden: true });
    document.body.append(tip);
    let shown = null;
    function show(span) {
      if (shown) (shown.classList.remove("read"), shown.removeAttribute("aria-describedby"));
      shown = span;
      tip.hidden = !span;
      if (!span) return;
      const [tree, member] = lookup(span), { title, rows } = reading(tree, member, span);
      span.classList.add("read");
      span.setAttribute("aria-describedby", tip.id);
      tip.replaceChildren(
        h("div", { class: "tip-title", text: title }),
        h("dl", {}, rows.map(([name, text]) => [h("dt", { text: name }), h("dd", { text })])),
      );
      const box = span.getClientRects()[0] || span.getBoundingClientRect(), size = tip.getBoundingClientRect();
      const below = box.bottom + 8 + size.height < innerHeight;
      tip.style.left = `${Math.max(8, Math.min(innerWidth - size.width - 8, box.left))}px`;
      tip.style.top = `${Math.max(8, below ? box.bottom + 8 : box.top - size.height - 8)}px`;
    }
    root.addEventListener("pointerover", (event) => event.target.classList.contains("token") && show(event.target));
    root.addEventListener(
      "pointerout",
      (event) => event.target === shown && document.activeElement !== shown && show(null),
    );
    root.addEventListener("focusin", (event) => event.target.classList.contains("token") && show(event.target));
    root.addEventListener("focusout", () => show(null));
    const hide = () => shown && document.activeElement !== shown && show(null);
    window.addEventListener("scroll", hide, { passive: true });
    return { show, remove: () => (tip.remove(), window.removeEventListener("scroll", hide)) };
  }

  // Arrow keys go from token to token; one token at a time can be reached with Tab.
  function rove(root) {
    const all = () => [...root.querySelectorAll(".token")];
    const reset = () => all().forEach((span, at) => span.setAttribute("tabindex", at ? "-1" : "0"));
    function go(from, to) {
      if (!to) return;
      from?.setAttribute("tabindex", "-1");
      to.setAttribute("tabindex", "0");
      to.focus();
      to.scrollIntoView({ block: "nearest" });
    }
    root.addEventListener("keydown", (event) => {
      const span = event.target.closest?.(".token");
      if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
      const list = all(), at = list.indexOf(span), turn = (one) => one.closest(".turn");
      const aim = {
        ArrowRight: () => list[at + 1],
        ArrowLeft: () => list[at - 1],
        Home: () => turn(span).querySelector(".token"),
        End: () => [...turn(span).querySelectorAll(".token")].pop(),
        ArrowDown: () => list.slice(at).find((one) => turn(one) !== turn(span)),
        ArrowUp: () =>
          [...list.slice(0, at)].reverse().map(turn).find((one) => one !== turn(span))?.querySelector(".token"),
      }[event.key];
      if (!aim) return;
      event.preventDefault();
      event.stopPropagation();
      go(span, aim());
    });
    root.addEventListener(
      "click",
      (event) =>
        event.target.classList.contains("token") && go(root.querySelector('.token[tabindex="0"]'), event.target),
    );
    return {
      reset,
      focus: (section) => go(root.querySelector('.token[tabindex="0"]'), (section || root).querySelector(".token")),
    };
  }

  Object.assign(agentropy, { tips, rove });
})(window.agentropy);
