"""``report.html``: the curves of a run on one page that needs nothing else.

- ``write_report``: draw the run's metrics and write the page into its folder.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import to_toml
from .display import clock
from .runs import TIME_PREFIX, RunFolder, write_atomically
from .stats import Proportion, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

BLUE, ORANGE, GREY = "#2f7ed8", "#e0791b", "#808890"

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; margin-bottom: .25rem; }
.headline { font-size: 1.25rem; font-weight: 600; margin: .25rem 0 1rem; }
.muted { color: GrayText; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } figcaption { font-size: .9rem; color: GrayText; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: 1rem; background: #8881; border-radius: .4rem; font-size: .85rem; }
"""


def write_report(run: RunFolder) -> Path:
    """Write ``report.html`` into the run folder and return its path. A run under way gives the curves so far."""
    rows = list(run.rows())
    path = run.path / "report.html"
    write_atomically(path, _page(run, rows).encode())
    return path


def _page(run: RunFolder, rows: Sequence[Row]) -> str:
    config = run.config
    by_phase = {phase: [row for row in rows if row["phase"] == phase] for phase in ("sft", "train", "eval")}
    evaluations = by_phase["eval"]
    title = f"{config.algorithm.name} on {config.env.id}"
    headline = html.escape(str(Summary.of(evaluations))) if evaluations else "no evaluation yet"
    seconds = sum(
        value for row in rows for key, value in row.items() if key.startswith(TIME_PREFIX) and "seconds" in key
    )
    figures = "\n".join(
        f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in _figures(by_phase)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="headline">{headline}</p>
<p class="muted">seed {config.seed} · {len(by_phase["train"])} steps of {config.train.tasks_per_step} tasks ×
{config.train.group_size} episodes · {clock(seconds)} of work · agentropy {__version__}</p>
<div class="grid">{figures}</div>
{_evaluation_table(evaluations)}
<details><summary>Configuration</summary><pre>{html.escape(to_toml(config))}</pre></details>
</body></html>
"""


def _success(row: Row) -> Proportion:
    return Proportion(row["success/wins"], row["success/tasks"])


def _evaluation_table(rows: Sequence[Row]) -> str:
    """Success on the panel, per task family, at every evaluation."""
    if not rows:
        return ""
    fixed = {"rate", "low", "high", "wins", "tasks"}
    families = [key for key in rows[0] if key.startswith("success/") and key.removeprefix("success/") not in fixed]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["after step", "success [95 %]", "turns"])
    head += "".join(f"<th>{html.escape(key.removeprefix('success/').replace('_', ' '))}</th>" for key in families)
    body = ""
    for row in rows:
        cells = [str(row["step"]), str(_success(row)), f"{row['turns']:.1f}"]
        cells += [f"{row[key]:.2f}" for key in families]
        body += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    first = rows[0]
    note = f"Panel {first['panel']}: {first['success/tasks']} tasks of {html.escape(first['split'])}, one episode each."
    table = f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"
    return f"<h2>Held-out tasks</h2>{table}<p class='muted'>{note}</p>"


def _figures(rows: dict[str, list[Row]]) -> list[tuple[str, str]]:
    """Pairs of an SVG and its caption; curves without data are left out."""
    figures: list[tuple[str, str]] = []
    train, evaluations = rows["train"], rows["eval"]
    if train or evaluations:
        figures.append(
            (
                _success_figure(train, evaluations),
                "Success. Line: training rollouts with their 95 % "
                "interval. Points: the held-out panel with its 95 % interval.",
            )
        )
    curves = [
        ("entropy/action_mean", "nats", "Entropy of the policy, mean over sampled tokens."),
        ("turns", "turns", "Turns in an episode."),
        ("grad_norm", "norm", "Norm of the gradient before clipping."),
        ("clip_fraction", "share", "Tokens whose importance ratio was clipped."),
        (TIME_PREFIX + "tokens_per_second", "tokens/s", "Sampled tokens a second of rollout."),
    ]
    for key, unit, caption in curves:
        points = [(row["step"], row[key]) for row in train if row.get(key) is not None]
        if points:
            figures.append((_line_figure(points, unit, "step"), caption))
    warm = [(row["step"], row["loss"]) for row in rows["sft"] if row["loss"] is not None]
    if warm:
        figures.append((_line_figure(warm, "nats a token", "update"), "Warm start: loss on the expert's actions."))
    return figures


def _success_figure(train: Sequence[Row], evaluations: Sequence[Row]) -> str:
    def draw(axes: Axes) -> None:
        if train:
            steps = [row["step"] for row in train]
            axes.fill_between(
                steps,
                [row["success/low"] for row in train],
                [row["success/high"] for row in train],
                color=BLUE,
                alpha=0.2,
                linewidth=0,
            )
            axes.plot(steps, [row["success/rate"] for row in train], color=BLUE, label="training rollouts")
        if evaluations:
            rates = [row["success/rate"] for row in evaluations]
            below = [row["success/rate"] - row["success/low"] for row in evaluations]
            above = [row["success/high"] - row["success/rate"] for row in evaluations]
            axes.errorbar(
                [row["step"] for row in evaluations],
                rates,
                yerr=[below, above],
                fmt="o",
                color=ORANGE,
                capsize=4,
                label="held-out panel",
            )
        axes.set_ylim(0, 1)
        axes.set_xlabel("step")
        axes.set_ylabel("success")
        axes.legend(frameon=False, labelcolor=GREY, loc="best")

    return _svg(draw)


def _line_figure(points: Sequence[tuple[float, float]], unit: str, x_label: str) -> str:
    def draw(axes: Axes) -> None:
        axes.plot([x for x, _ in points], [y for _, y in points], color=BLUE)
        axes.set_xlabel(x_label)
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=min(0.0, *(y for _, y in points)))

    return _svg(draw)


def _svg(draw: Any) -> str:
    """An SVG with a clear background and mid-grey axes, readable on light and dark pages."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "agentropy", "font.size": 11}):
        # The object interface: pyplot would open a display and keep figures alive.
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(GREY)
        axes.tick_params(colors=GREY)
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
        axes.grid(color=GREY, alpha=0.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
