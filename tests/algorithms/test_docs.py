"""The pages on algorithms say what the code does: options, defaults, presets, slots, metrics, commands, links, code."""

import re
import shlex
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from agentropy.algorithms import recipe, recipes
from agentropy.algorithms.recipe import METHODS
from agentropy.algorithms.slots import DEFAULT_SLOTS, components
from agentropy.cli import main
from agentropy.config import RUN_OVERRIDES, load_config
from agentropy.errors import UsageError

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "algorithms" / "index.md"
PAGES = {path.stem: path for path in sorted(INDEX.parent.glob("*.md")) if path != INDEX}
EVERY_PAGE = pytest.mark.parametrize("path", [INDEX, *PAGES.values()], ids=lambda path: path.stem)
EVERY_RECIPE = pytest.mark.parametrize("name", recipes())
METHODS_TABLE = "| method | slots it fills | equation | default | what differs from the official code |"


def table(path: Path, header: str) -> list[list[str]]:
    """The cells of the rows under ``header``, which a page has once."""
    (rest,) = path.read_text().split(header + "\n")[1:]
    rows = [line for line in rest.partition("\n\n")[0].splitlines()[1:] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def ticked(text: str) -> list[str]:
    """What stands in backticks, outside of fences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def fences(path: Path, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [code for written, code in blocks if written == language]


def commands(path: Path) -> list[list[str]]:
    lines = [line for fence in fences(path, "") for line in fence.splitlines() if line.startswith("agentropy train")]
    return [shlex.split(line)[1:] for line in lines]


def test_every_recipe_has_a_page_and_a_row_with_a_link_to_it():
    assert sorted(PAGES) == list(recipes())
    links = [re.fullmatch(r"\[(\w+)\]\((.+)\)", row[0]).groups() for row in table(INDEX, METHODS_TABLE)]
    assert sorted(links) == [(name, f"{name}.md") for name in recipes()]


@EVERY_RECIPE
def test_a_page_has_every_option_with_its_default_and_no_other(name):
    rows = table(PAGES[name], "| option | default | meaning |")
    stated = {option.strip("`"): default.strip("`") for option, default, _ in rows}
    assert len(stated) == len(rows) and all(meaning for *_, meaning in rows)
    assert stated == {option: str(field.default) for option, field in METHODS[name].model_fields.items()}


@EVERY_RECIPE
def test_a_page_names_every_choice_of_an_option_that_has_a_few(name):
    meanings = {row[0].strip("`"): row[2] for row in table(PAGES[name], "| option | default | meaning |")}
    for option, field in METHODS[name].model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if len(choices) <= 3:
            assert set(choices) <= set(ticked(meanings[option])), option


@EVERY_RECIPE
def test_a_page_has_every_preset_with_its_options_and_no_other(name):
    presets = METHODS[name].presets
    header = "| preset | options | reproduces |"
    assert (header in PAGES[name].read_text()) == bool(presets)
    if presets:
        rows = table(PAGES[name], header)
        stated = {preset.strip("`"): set(ticked(options)) for preset, options, _ in rows}
        assert len(stated) == len(rows)
        assert stated == {preset: {f"{key}={value}" for key, value in presets[preset].items()} for preset in presets}


def filled(name: str, **options: object) -> set[str]:
    """The slots that a method fills on top of its base."""
    method = METHODS[name](**options)
    before = DEFAULT_SLOTS if method.base is None else recipe(method.base).slots
    after = method.compose(before, 100)
    return {slot for slot, filling in vars(after).items() if filling is not vars(before)[slot]}


def fillable(name: str) -> set[str]:
    """Those that it fills when one of its options is another, or in a preset."""
    found: set[str] = set()
    for option, field in METHODS[name].model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else (True, False, 0.5, 10**6)
        for choice in choices:
            try:
                found |= filled(name, **{option: choice})
            except (ValidationError, UsageError):
                continue
    return found


@pytest.mark.parametrize("row", table(INDEX, METHODS_TABLE), ids=lambda row: row[0])
def test_the_table_of_methods_names_the_slots_that_are_filled(row):
    name = re.match(r"\[(\w+)\]", row[0])[1]
    always, _, sometimes = row[1].rstrip(")").partition(" (")
    assert set(always.split(", ")) == filled(name)
    assert filled(name) | set(sometimes.split(", ")) - {""} == fillable(name)
    assert not filled(name) & set(sometimes.split(", ")) and all(row)


def test_the_table_of_slots_names_every_slot_and_component():
    rows = {re.search(r"`(\w+)`", row[0])[1]: row for row in table(INDEX, "| slot | what it decides | components |")}
    assert list(rows) == list(vars(DEFAULT_SLOTS))
    assert [int(row[0].split()[0]) for row in rows.values()] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10]
    for slot, row in rows.items():
        singular = slot.removesuffix("s") if isinstance(getattr(DEFAULT_SLOTS, slot), tuple) else slot
        assert row[2] == ", ".join(f"`{name}`" for name in components(singular)), slot


@EVERY_PAGE
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, heading = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.is_file(), link
        titles = re.findall(r"^#+ (.*)$", there.read_text().lower(), re.MULTILINE)
        assert not heading or heading in {re.sub(r"[^a-z0-9 -]", "", title).replace(" ", "-") for title in titles}, link


@EVERY_PAGE
def test_settings_in_the_text_are_options_that_exist(path):
    """``name=value`` names an option of a method, or of a run where it has a dot, and a value that it takes."""
    for text in ticked(path.read_text()):
        found = re.fullmatch(r"([a-z_]+)=(\S+)", text)
        if found:
            name, value = found.groups()
            assert name == "allow_conflicts" or any(takes(method, name, value) for method in METHODS), text
        if re.fullmatch(r"(train|agent|env|eval|sft)\.[a-z_]+(=\S+)?", text):
            section, _, option = text.partition("=")[0].partition(".")
            assert option in vars(getattr(load_config(), section)), text


def takes(method: str, option: str, value: str) -> bool:
    try:
        METHODS[method](**{option: None if value == "None" else value})
    except ValidationError:
        return False
    return True


@pytest.fixture(scope="module")
def metrics(ragged):
    """Names of metrics: those of the recipes, and those that stand in the modules that add others."""
    batch, logprobs, entropy = ragged(1)
    known: set[str] = set()
    for name in recipes():
        made = recipe(name, **({"kl_coef": 0.1} if "kl_coef" in METHODS[name].model_fields else {}))
        for _ in range(2):  # some begin to speak at the second step
            plan = made.plan(batch)
            known |= {*plan.metrics, *made.loss(batch, plan, logprobs, entropy, batch.values)[1]}
            made.on_step_end({})
    for module in ("budget", "learner", "trainer"):
        known |= set(re.findall(r'"([a-z_]+(?:/[a-z_]+)?)"', (ROOT / "algorithms" / f"{module}.py").read_text()))
    return known


@EVERY_PAGE
def test_metrics_in_the_text_exist(metrics, path):
    named = {text for text in ticked(path.read_text()) if re.fullmatch(r"[a-z_]+/[a-z_]+|[a-z]+_(loss|fraction)", text)}
    assert named and named <= metrics


@EVERY_PAGE
def test_commands_resolve_and_make_their_recipe(path, capsys, tmp_path):
    found = commands(path)
    assert found
    for arguments in found:
        assert main([*arguments, "--dry-run"]) == 0, arguments
        file = tmp_path / "config.toml"
        file.write_text(capsys.readouterr().out)
        algorithm = load_config(file).algorithm
        made = recipe(algorithm.name, preset=algorithm.preset, **algorithm.overrides)
        assert path == INDEX or path.stem in made.methods


def test_the_settings_that_a_run_adds_are_named():
    text = set(ticked(INDEX.read_text()))
    for options in RUN_OVERRIDES.values():
        assert {f"{key}={value}" for key, value in options.items()} <= text
