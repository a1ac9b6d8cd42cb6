"""The command ``agentropy``.

- ``main``: parse the arguments, run one command, print errors as one sentence, return the exit status.

Commands import what they need when they run, so that ``--help`` and wrong options answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import AgentropyError, UsageError

if TYPE_CHECKING:
    from .config import RunConfig

# Flags with a name of their own, and the option of the configuration that each one sets.
FLAGS = {
    "algorithm": ("algorithm.name", "recipe, such as epo or grpo"),
    "preset": ("algorithm.preset", "named defaults of the recipe, such as paper"),
    "steps": ("train.steps", "steps of reinforcement learning"),
    "seed": ("seed", "seed of every random choice"),
    "env": ("env.id", "world: alfworld, scienceworld, textworld, search, tools, bfcl, or any Gymnasium id"),
    "source": ("env.kwargs.source", "where ALFWorld's games come from: generated, dataset or pack"),
    "data": ("env.kwargs.data", "folder or file of the dataset or pack"),
    "model": ("model.path", "pretrained model, by local path or hub name; a small new one when left out"),
    "run-dir": ("run_dir", "folder of the run"),
    "device": ("device", "auto, cpu or cuda"),
}

_NUMBERS = frozenset({"steps", "seed"})
"""Flags whose values are TOML; all others are text, also where they look like numbers or dates."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 on success, 2 on wrong input, 130 when interrupted."""
    # Threads that wait by spinning starve each other on shared cores; it must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(serving="serve" in argv[:1]).parse_args(argv)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"agentropy: {error}", file=sys.stderr)
        return 2
    except AgentropyError as error:
        print(f"agentropy: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader, such as `head`, is gone; nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        again = "the same command" if argv[:1] == ["bench"] else "`agentropy train --resume RUN`"
        print(f"agentropy: interrupted; {again} goes on where this stopped", file=sys.stderr)
        return 130


def _parser(serving: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agentropy", description="Train language-model agents by reinforcement learning in text worlds."
    )
    parser.add_argument("--version", action="version", version=f"agentropy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="warm start, then reinforcement learning", allow_abbrev=False)
    _configuration(train)
    train.add_argument("--resume", metavar="RUN", help="continue this run folder; takes no other options")
    train.set_defaults(run=_train, sft_only=False)

    sft = commands.add_parser("sft", help="supervised training on expert play alone", allow_abbrev=False)
    _configuration(sft)
    sft.add_argument("--resume", metavar="RUN", help="continue this run folder; takes no other options")
    sft.set_defaults(run=_train, sft_only=True)

    evaluate = commands.add_parser("eval", help="success on a fixed panel of tasks", allow_abbrev=False)
    evaluate.add_argument("checkpoint", help="run folder, checkpoint folder, or hub name of a model")
    evaluate.add_argument("--split", required=True, help="split of the panel, such as valid_unseen")
    evaluate.add_argument("--tasks", type=int, help="size of the panel; the whole split when left out")
    evaluate.add_argument("--temperature", type=float, help="of sampling; 0 takes the most probable token")
    evaluate.add_argument("--out", metavar="FILE", help="write the result as JSON")
    _configuration(evaluate, only=("env", "source", "data", "device", "seed"))
    evaluate.set_defaults(run=_eval)

    play = commands.add_parser("play", help="play a world in the terminal, or watch an agent", allow_abbrev=False)
    play.add_argument("--agent", default="human", help="human, expert, random, or a checkpoint")
    play.add_argument("--split", help="split of the task; the world's held-out one when left out")
    play.add_argument("--task", help="task id; a random one of the split when left out")
    _configuration(play, only=("env", "source", "data", "device", "seed"))
    play.set_defaults(run=_play)

    recipes = commands.add_parser("recipes", help="list the algorithms, or show one", allow_abbrev=False)
    recipes.set_defaults(run=_recipes)
    show = recipes.add_subparsers(title="actions", metavar="ACTION").add_parser(
        "show", help="presets, slots, equations, sources and options of one recipe"
    )
    show.add_argument("name", help="recipe, such as epo, or several joined by +")
    show.set_defaults(run=_recipe)

    data = commands.add_parser("data", help="prepare datasets", allow_abbrev=False)
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    pack = actions.add_parser("pack", help="pack a published ALFWorld dataset into one compressed file")
    pack.add_argument("root", help="folder that holds json_2.1.1, or that folder itself")
    pack.add_argument("out", help="folder that receives the pack, or a name ending in .jsonl.xz or .jsonl.gz")
    pack.set_defaults(run=_pack)
    bfcl = actions.add_parser("bfcl", help="fetch BFCL's tasks and simulators, once, and say where they are")
    bfcl.set_defaults(run=_bfcl)

    served = commands.add_parser("serve", help="serve environments, a model or a retriever over HTTP")
    if serving:
        _servers(served)

    view = commands.add_parser("view", help="look at runs in the browser, or in the terminal", allow_abbrev=False)
    view.add_argument("run_folders", metavar="RUN", nargs="+", help="run folder, or a folder with runs in it")
    view.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone when left out")
    view.add_argument("--port", type=int, help="0 for any free one; a free one from 8765 on when left out")
    view.add_argument("--no-browser", action="store_true", help="only print the address")
    view.add_argument("--export", metavar="DIR", help="write the page as files that open without a server")
    view.add_argument("--text", action="store_true", help="draw one task's episodes as a tree in the terminal")
    view.add_argument("--step", type=int, metavar="N", help="of --text: whose rollouts; the newest when left out")
    view.add_argument("--task", help="of --text: task id, or number of a tree; most forks when left out")
    view.add_argument("--depth", type=int, metavar="N", help="of --text: turns to draw; all when left out")
    view.set_defaults(run=_view)

    bench = commands.add_parser("bench", help="measure", allow_abbrev=False)
    measures = bench.add_subparsers(title="what", metavar="WHAT", required=True)
    algorithms = measures.add_parser(
        "algorithms", help="compare methods on equal terms: recipes × environments × seeds"
    )
    algorithms.add_argument(
        "--config", required=True, metavar="FILE", help="TOML file of the grid; or laptop, gpu, cluster"
    )
    algorithms.add_argument("--out", metavar="FOLDER", help="folder of all runs; runs/bench-NAME when left out")
    algorithms.add_argument("--jobs", type=int, metavar="N", help="runs at once; resources.jobs when left out")
    algorithms.add_argument(
        "--backend", choices=("processes", "ray"), default="processes", help="where runs are started"
    )
    algorithms.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="any key of the file"
    )
    algorithms.add_argument("--results", metavar="FOLDER", help="write the report there as well, as algorithms-NAME.*")
    algorithms.add_argument("--report", action="store_true", help="only report what is finished")
    algorithms.add_argument("--dry-run", action="store_true", help="check every run of the grid, list them, and stop")
    algorithms.set_defaults(run=_bench_algorithms)

    report = commands.add_parser("report", help="write report.html of a run again", allow_abbrev=False)
    report.add_argument("run_folder", metavar="RUN")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="what works on this machine, and what would fix the rest")
    doctor.set_defaults(run=_doctor)
    return parser


def _servers(parser: argparse.ArgumentParser) -> None:
    """Add what can be served; only then is it imported, since Gymnasium alone takes longer than all other commands."""
    from .agents import model_command as model
    from .envs.search import server as retriever
    from .envs.serve import command as envs

    servers = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    for name, module, help in (
        ("envs", envs, "environments for remote trainers, as agentropy/Remote-v0 plays them"),
        ("model", model, "a checkpoint, for this trainer and any client of OpenAI's interface"),
        ("retriever", retriever, "a retriever of passages, for the search environment and others"),
    ):
        server = servers.add_parser(name, help=help)
        module.add_arguments(server)
        server.set_defaults(run=module.main)


def _configuration(parser: argparse.ArgumentParser, only: Sequence[str] = tuple(FLAGS)) -> None:
    group = parser.add_argument_group("configuration", "a TOML file, then flags, then --set; later ones win")
    group.add_argument("--config", metavar="FILE", help="TOML file with any part of the configuration")
    for flag in only:
        group.add_argument(f"--{flag}", dest=f"flag_{flag}", metavar="VALUE", help=FLAGS[flag][1])
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="any other option",
    )
    group.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def _overrides(arguments: argparse.Namespace) -> list[str]:
    flags = [
        f"{option}={value if flag in _NUMBERS else json.dumps(value, ensure_ascii=False)}"
        for flag, (option, _) in FLAGS.items()
        if (value := getattr(arguments, f"flag_{flag}", None)) is not None
    ]
    return flags + arguments.overrides


def _resolve(arguments: argparse.Namespace) -> RunConfig:
    from .config import load_config

    return load_config(arguments.config, _overrides(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from .config import to_toml

    if arguments.resume and (arguments.config or _overrides(arguments) or arguments.dry_run):
        raise UsageError("--resume takes no other options: the run folder's config.toml holds them all")
    if not arguments.resume:
        config = _resolve(arguments)
        if arguments.sft_only:
            config.train.steps = 0
        if arguments.dry_run:
            print(to_toml(config), end="")
            return 0

    from rich.console import Console

    console = Console()
    console.print("loading …", style="dim")
    from .algorithms.display import Display
    from .algorithms.report import write_report
    from .algorithms.runs import RunFolder
    from .algorithms.trainer import Trainer

    with Display(console) as display:
        if arguments.resume:
            run = RunFolder.open(arguments.resume)
            trainer = Trainer(run, display)
        else:
            # The run folder is made last: a wrong option leaves nothing behind.
            trainer = Trainer(RunFolder.plan(config), display)
            run = trainer.run
        display.say(trainer.describe())
        summary = trainer.train()
    report = write_report(run)
    run.close()
    console.print(f"[bold]{summary}[/bold]", highlight=False)
    console.print(f"run folder {run.path}\nreport     {report}", highlight=False, soft_wrap=True)
    return 0


def _checkpoint_of(name: str) -> tuple[str, Path | None]:
    """The model's path, and the run folder that it belongs to, of a run, checkpoint or model name."""
    path = Path(name)
    if (path / "checkpoints").is_dir():
        from .algorithms.checkpoint import latest_checkpoint

        checkpoint = latest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise UsageError(f"'{name}' has no checkpoint yet")
        return str(checkpoint), path
    run = path.parent.parent
    return name, run if (run / "config.toml").is_file() else None


def _agent_config(arguments: argparse.Namespace, name: str) -> tuple[RunConfig, str]:
    """The configuration that a checkpoint was trained under, with this command's options on top."""
    from .config import load_config

    path, run = _checkpoint_of(name)
    base = arguments.config or (run / "config.toml" if run else None)
    # A model that no run made is a pretrained one: the defaults of small models are not for it.
    model = [] if base else [f"model.path={json.dumps(path, ensure_ascii=False)}"]
    return load_config(base, model + _overrides(arguments)), path


def _eval(arguments: argparse.Namespace) -> int:
    config, path = _agent_config(arguments, arguments.checkpoint)
    if arguments.tasks is not None:
        config.eval.tasks = arguments.tasks
    if arguments.temperature is not None:
        config.eval.temperature = arguments.temperature
    if arguments.dry_run:
        from .config import to_toml

        print(to_toml(config), end="")
        return 0
    from .algorithms.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, path, arguments.split, out=arguments.out)
    return 0


def _play(arguments: argparse.Namespace) -> int:
    if arguments.agent in ("human", "expert", "random"):
        config, path = _resolve(arguments), None
    else:
        config, path = _agent_config(arguments, arguments.agent)
    if arguments.dry_run:
        from .config import to_toml

        print(to_toml(config), end="")
        return 0
    from .algorithms.play import play

    return play(config, arguments.agent, arguments.split or config.env.eval_split, arguments.task, checkpoint=path)


def _recipes(arguments: argparse.Namespace) -> int:
    from .algorithms.recipes import METHODS

    for name, method in sorted(METHODS.items()):
        print(f"{name:12} {method.summary}{f' (on {method.base})' if method.base else ''}")
    return 0


def _recipe(arguments: argparse.Namespace) -> int:
    from .algorithms.recipes import describe

    print(describe(arguments.name))
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from .envs.alfworld.pack import write_pack

    counts = write_pack(arguments.root, arguments.out)
    print(", ".join(f"{split}: {count} games" for split, count in counts.items()), "in", arguments.out)
    return 0


def _bfcl(arguments: argparse.Namespace) -> int:
    from .envs.bfcl.source import fetch

    print(fetch())
    return 0


def _view(arguments: argparse.Namespace) -> int:
    from .algorithms.view.command import view

    options = {name: getattr(arguments, name) for name in ("export", "text", "step", "task", "depth", "host", "port")}
    return view(arguments.run_folders, browser=not arguments.no_browser, **options)


def _bench_algorithms(arguments: argparse.Namespace) -> int:
    from .benchmarks.comparison.command import main as bench

    return bench(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from .algorithms.report import write_report
    from .algorithms.runs import RunFolder

    print(write_report(RunFolder.open(arguments.run_folder)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor()
