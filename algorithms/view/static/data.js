// Where numbers come from: `api/KEY` of the running server, or `data/KEY.js` of an exported page.
// - agentropy.metrics, agentropy.index: what a run has so far; asked for again only after it grew.
// - agentropy.treeOf: a saved tree with its walks, lanes and every sampled token's four numbers.
"use strict";

(function (agentropy) {
  const waiting = new Map();

  agentropy.receive = (key, value) => {
    const asked = waiting.get(key);
    waiting.delete(key);
    if (asked) asked(value);
  };

  function inject(key) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      waiting.set(key, resolve);
      script.onload = () => script.remove();
      script.onerror = () => {
        script.remove();
        waiting.delete(key);
        reject(new Missing("this exported page does not hold it", 404));
      };
      script.src = `data/${key}.js`;
      document.head.append(script);
    });
  }

  class Missing extends Error {
    constructor(text, status) {
      super(text);
      this.status = status;
    }
  }

  async function request(key, query) {
    let answer;
    try {
      answer = await fetch(`api/${key}${query}`, { cache: "no-cache" });
    } catch {
      throw new Missing("the server does not answer", 0);
    }
    const value = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (!answer.ok) throw new Missing(value.error || `the server answered ${answer.status}`, answer.status);
    return value;
  }

  const load = (key, query = "") => (agentropy.live ? request(key, query) : inject(key));

  // One request per key and state, however many parts of the page ask.
  const kept = new Map();

  function keep(key, state, make) {
    const found = kept.get(key);
    if (found && found.state === state) return found.value;
    const value = make(found && found.value);
    kept.set(key, { state, value });
    value.catch(() => kept.get(key) && kept.get(key).value === value && kept.delete(key));
    return value;
  }

  // A run whose configuration cannot be read is a run all the same; one that was exported no longer grows.
  const known = (run) => ({
    ...run,
    algorithm: run.algorithm ?? "?",
    env: run.env ?? "?",
    model: run.model ?? "?",
    seed: run.seed ?? "?",
    steps: run.steps ?? "?",
    live: agentropy.live && run.live,
  });
  const runs = async () =>
    (await (agentropy.live ? load("runs") : keep("runs", 0, () => load("runs")))).runs.map(known);

  // {cursor, rows}; new rows are added to those that are there, unless the run went back to a checkpoint.
  const metrics = (run) =>
    keep(`${run.id}/metrics`, run.metrics, async (before) => {
      const old = before ? await before.catch(() => null) : null;
      const query = old && agentropy.live ? `?cursor=${encodeURIComponent(old.cursor)}` : "";
      const answer = await load(`runs/${run.id}/metrics`, query);
      return { cursor: answer.cursor, rows: answer.restart || !old ? answer.rows : [...old.rows, ...answer.rows] };
    });

  const index = (run) => keep(`${run.id}/index`, run.index, () => load(`runs/${run.id}/index`));
  const config = (run) => keep(`${run.id}/config`, 0, () => load(`runs/${run.id}/config`));
  const evaluations = (run) =>
    keep(`${run.id}/evaluations`, run.metrics, () => load(`runs/${run.id}/evaluations`)).then(
      (answer) => answer.evaluations,
      () => [],
    );
  const law = (run) => keep(`${run.id}/law`, run.metrics, () => load(`runs/${run.id}/law`)).catch(() => null);

  const trees = [];

  // The last few trees stay: going back and forth between branches and panes asks for nothing.
  function treeOf(run, step, place) {
    const key = `runs/${run.id}/trees/${step}/${place}`;
    // A run that went back to a checkpoint plays its steps again; it then has another index.
    let found = trees.find((one) => one.key === key && one.state === run.index);
    if (!found) {
      found = { key, state: run.index, value: load(key).then(model) };
      found.value.catch(() => {
        // It may have made room for another already.
        if (trees.includes(found)) trees.splice(trees.indexOf(found), 1);
      });
      trees.push(found);
      if (trees.length > 12) trees.shift();
    }
    return found.value;
  }

  // Rows of a phase as columns: {step, name: [..]}, null where a row has no such number.
  function columns(rows, phase) {
    const own = rows.filter((row) => row.phase === phase);
    const names = new Set(own.flatMap((row) => Object.keys(row)));
    const out = {};
    for (const name of names) out[name] = own.map((row) => (row[name] === undefined ? null : row[name]));
    return out;
  }

  function walkOf(nodes, leaf) {
    const walk = [];
    for (let at = leaf; at !== -1; at = nodes[at].parent) walk.push(at);
    return walk.reverse();
  }

  // A walk in window context is those of all its turns, one behind the other.
  function walkOfAll(nodes, leaves) {
    const seen = new Set(), out = [];
    for (const leaf of leaves) for (const at of walkOf(nodes, leaf)) if (!seen.has(at)) (seen.add(at), out.push(at));
    return out;
  }

  // Where a trajectory left another: as it was recorded, or else the earlier one with which it shares most.
  function origin(tree, member) {
    const own = tree.trajectories[member];
    let parent = own.left, shared = 0;
    const common = (other) => {
      const theirs = new Set(tree.trajectories[other].acts);
      const first = own.acts.findIndex((at) => !theirs.has(at));
      return first < 0 ? own.acts.length : first;
    };
    if (parent >= 0 && parent !== member) shared = common(parent);
    if (!shared) {
      parent = -1;
      for (let other = 0; other < member; other++) {
        const size = common(other);
        if (size > shared) (shared = size), (parent = other);
      }
    }
    return { parent: shared ? parent : -1, shared };
  }

  // Lanes from the first trajectory down; what leaves a lane late stands nearest, so that no line crosses another.
  function ordered(tree) {
    const out = [];
    const place = (member, depth) => {
      const own = tree.trajectories[member];
      own.lane = out.length;
      own.depth = depth;
      out.push(member);
      const below = tree.trajectories.map((_, other) => other).filter((other) =>
        tree.trajectories[other].parent === member && other !== member
      );
      below.sort((one, other) => tree.trajectories[other].shared - tree.trajectories[one].shared || one - other);
      below.forEach((other) => place(other, depth + 1));
    };
    tree.trajectories.forEach((own, member) => own.parent < 0 && place(member, 0));
    return out;
  }

  function model(raw) {
    const tree = { ...raw, nodes: raw.nodes.map((node, at) => ({ ...node, index: at })) };
    for (const node of tree.nodes) {
      node.pieces = node.tokens.map((at) => raw.vocabulary[at] && raw.vocabulary[at][1]);
      node.ids = node.tokens.map((at) => raw.vocabulary[at] && raw.vocabulary[at][0]);
      if (!raw.pieces || node.pieces.some((piece) => piece === null || piece === undefined)) node.pieces = null;
    }
    tree.trajectories = raw.trajectories.map((own, member) => {
      const walk = walkOfAll(tree.nodes, own.leaves);
      return {
        ...own,
        member,
        walk,
        acts: walk.filter((at) => tree.nodes[at].role === "action"),
        credit: new Map(),
        outcome: agentropy.outcomeOf(own.won, own.truncated, own.failed),
      };
    });
    tree.trajectories.forEach((own, member) => Object.assign(own, origin(tree, member)));
    tree.order = ordered(tree);
    for (const row of raw.credit || []) {
      let start = 0;
      for (const at of walkOf(tree.nodes, row.leaf)) {
        const node = tree.nodes[at];
        if (!node.sampled) continue;
        const stop = start + node.tokens.length;
        tree.trajectories[row.trajectory].credit.set(at, {
          advantage: row.advantage.slice(start, stop),
          weight: row.weight.slice(start, stop),
        });
        start = stop;
      }
    }
    tree.domains = {};
    for (const measure of Object.keys(agentropy.MEASURES)) {
      const all = values(tree, measure);
      tree.domains[measure] = all.length ? agentropy.domainOf(measure, all) : null;
    }
    return tree;
  }

  // Numbers of a node's tokens as trajectory `member` has them; null where there are none.
  function numbers(tree, member, at, measure) {
    const node = tree.nodes[at];
    if (!node.sampled) return null;
    if (measure === "entropy") return node.entropies;
    if (measure === "logprob") return node.logprobs;
    const credit = tree.trajectories[member].credit.get(at);
    return credit ? credit[measure] : null;
  }

  // The number of one of a node's tokens, or their mean where no place is given; null where there is none.
  function valueOf(tree, member, at, measure, place = -1) {
    const list = numbers(tree, member, at, measure);
    return !list ? null : place < 0 ? agentropy.mean(list) : list[place];
  }

  function values(tree, measure) {
    const out = [];
    for (const own of tree.trajectories) {
      for (const at of own.acts.slice(own.shared)) {
        for (const value of numbers(tree, own.member, at, measure) || []) if (value !== null) out.push(value);
      }
    }
    return out;
  }

  // The turns of a trajectory: [{turn, before: prompts and contexts, act, after: observations}].
  function turnsOf(tree, member) {
    const out = [];
    let before = [];
    for (const at of tree.trajectories[member].walk) {
      const node = tree.nodes[at];
      if (node.role === "action") (out.push({ turn: node.turn, before, act: at, after: [] }), (before = []));
      else if (node.role === "observation" && out.length) out[out.length - 1].after.push(at);
      else before.push(at);
    }
    if (before.length) out.push({ turn: -1, before, act: null, after: [] });
    return out;
  }

  // What the environment was told, in one line; the reasoning before it is left out.
  function command(text) {
    const found = [...text.matchAll(/<action>([\s\S]*?)<\/action>/g)];
    return (found.length ? found[found.length - 1][1] : text).replace(/\s+/g, " ").trim() || "(no words)";
  }

  Object.assign(agentropy, {
    runs,
    metrics,
    index,
    config,
    evaluations,
    law,
    treeOf,
    columns,
    valueOf,
    turnsOf,
    command,
  });
})(window.agentropy);
