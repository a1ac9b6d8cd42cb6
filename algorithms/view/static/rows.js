// Trajectories of some runs as rows.
// - agentropy.tableOf: all of them, column by column. - agentropy.select: those that pass filters, sorted.
"use strict";

(function (agentropy) {
  // All trajectories of some runs as one table of columns.
  function tableOf(sources) {
    const size = sources.reduce((sum, { index }) => sum + index.count, 0);
    const from = new Uint16Array(size), at = new Int32Array(size), outcome = new Array(size), text = new Array(size);
    let row = 0;
    sources.forEach(({ index }, source) => {
      const { won, truncated, failed, task } = index.columns, words = index.tasks.map((one) => one.toLowerCase());
      for (let place = 0; place < index.count; place++, row++) {
        from[row] = source;
        at[row] = place;
        outcome[row] = agentropy.outcomeOf(won[place], truncated[place], failed[place]);
        text[row] = words[task[place]];
      }
    });
    const get = (name, one) => {
      if (name === "outcome") return outcome[one];
      const { index } = sources[from[one]], value = index.columns[name][at[one]];
      return name === "task" ? index.tasks[value] : value;
    };
    return { size, get, text, run: (one) => sources[from[one]].run };
  }

  const inside = (value, low, high) => (low === "" || value >= Number(low)) && (high === "" || value <= Number(high));

  // Rows that pass the filters, in the order asked for.
  function select(rows, filter) {
    const words = filter.q.toLowerCase().split(/\s+/).filter(Boolean), out = [];
    for (let row = 0; row < rows.size; row++) {
      if (filter.result && rows.get("outcome", row) !== filter.result) continue;
      if (
        !inside(rows.get("reward", row), filter.low, filter.high) ||
        !inside(rows.get("step", row), filter.from, filter.to)
      ) continue;
      if (filter.forks && !(rows.get("forks", row) > 0 || rows.get("left", row) >= 0)) continue;
      if (filter.recipe && rows.run(row).algorithm !== filter.recipe) continue;
      if (filter.run && rows.run(row).id !== filter.run) continue;
      if (words.length && !words.every((word) => rows.text[row].includes(word))) continue;
      out.push(row);
    }
    if (!filter.sort) return out;
    const sign = filter.down ? -1 : 1, values = new Map(out.map((row) => [row, rows.get(filter.sort, row)]));
    return out.sort((one, other) => {
      const a = values.get(one), b = values.get(other);
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -sign : a > b ? sign : 0) || one - other;
    });
  }

  Object.assign(agentropy, { tableOf, select });
})(window.agentropy);
