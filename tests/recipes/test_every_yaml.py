"""Every YAML that is shipped is composed, judged and, where its checkpoint is on this disk, planned."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from framework.compose import Composition, compose_run, read_sweep
from framework.plan.build import build_run_plan
from framework.schema import RunConfig
from framework.schema.json_schema import VRAM
from framework.schema.names import known_paths
from framework.schema.validate import validate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
CONF = sorted((ROOT / "conf").rglob("*.yaml"))
# Those of conf/hydra/ belong to sweeps; tests/architecture/test_schemas.py holds them against their schema.
OPTIONS = [
    p for p in CONF if p.parent != ROOT / "conf" and ROOT / "conf" / "hydra" not in p.parents
]
# What an option of a group leaves to the user, so that it can be judged as a whole.
GIVEN = ["data.path=pictures"]
MAX_COLUMNS = 120


def composed(overrides: Sequence[str]) -> Composition:
    composition = compose_run(overrides)
    assert composition.faults == ()
    return composition


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def recipe_of(path: Path) -> str:
    return path.relative_to(ROOT / "recipes").with_suffix("").as_posix()


def leaves(node: object, path: str = "") -> list[str]:
    """Dotted path of every value."""
    if not isinstance(node, dict):
        return [path]
    return [
        leaf for key, value in node.items() for leaf in leaves(value, f"{path}.{key}".lstrip("."))
    ]


def test_the_walk_finds_files() -> None:
    assert len(RECIPES) >= 4
    assert len(OPTIONS) >= 6
    assert not list(ROOT.glob("conf/**/*.yml")) + list(ROOT.glob("recipes/**/*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_valid_and_warns_of_nothing(path: Path) -> None:
    composition = composed([f"recipe={recipe_of(path)}", *GIVEN])
    config, warnings = validate(composition.values, composition.where)
    assert warnings == []
    assert config.run.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_says_how_to_use_it(path: Path) -> None:
    """Its header names what to prepare, the command, and one override worth trying, which works."""
    text = path.read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.startswith("# Prepare:") for line in header)
    assert any(line.startswith("# Run:") and f"recipe={recipe_of(path)}" in line for line in header)
    override = next(
        line.partition(":")[2].strip() for line in header if line.startswith("# Worth trying:")
    )
    assert max(len(line) for line in text.splitlines()) <= MAX_COLUMNS
    composed([f"recipe={recipe_of(path)}", *GIVEN, override])


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_planned_where_its_checkpoint_is_here(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    composition = composed([f"recipe={recipe_of(path)}", *GIVEN])
    config, _ = validate(composition.values, composition.where)
    if not Path(config.model.source, "transformer", "config.json").is_file():
        pytest.skip(f"{config.model.source} is not on this disk")
    plan = build_run_plan(config, device="cpu")
    assert plan.phase("train").device_bytes > 0


@pytest.mark.parametrize("path", OPTIONS, ids=name_of)
def test_an_option_of_a_group_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object()
    )  # extras needn't be installed
    group = path.parent.relative_to(ROOT / "conf").as_posix()
    beside = {
        "wandb": ["logger.wandb.project=x"],
        "sdxl": ["objective=ddpm"],
        "ddpm": ["model=sdxl"],
        "qwen_image_edit": ["sample.prompts=[]"],
    }
    given = beside.get(path.stem, [])
    section = "model" if group == VRAM else group
    composition = composed(["recipe=pocket_lora", f"{group}={path.stem}", *GIVEN, *given])
    validate(composition.values, composition.where)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    written = [f"{section}.{leaf}" for leaf in leaves(values)]
    assert set(written) <= set(known_paths(RunConfig)), "a key that the schema lacks"


def test_the_root_configuration_puts_the_recipe_last() -> None:
    root = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text(encoding="utf-8"))
    assert root["defaults"][-2:] == ["_self_", {"recipe": "???"}]
    groups = {next(iter(entry)) for entry in root["defaults"] if isinstance(entry, dict)}
    assert groups <= {*RunConfig.model_fields, VRAM, "recipe"}


@pytest.mark.parametrize("recipe", [recipe_of(path) for path in RECIPES])
def test_fp8_can_be_asked_of_a_recipe_on_the_command_line(recipe: str) -> None:
    overrides = [f"recipe={recipe}", *GIVEN, "model.dit.precision=fp8", "model.dit.trainable=lora"]
    composition = composed(overrides)
    config, _ = validate(composition.values, composition.where)
    assert config.model.dit.precision == "fp8"


def test_a_lora_recipe_becomes_a_full_one_by_overrides() -> None:
    composition = composed(
        ["recipe=pocket_lora", "model.dit.trainable=full", "model.dit.precision=bf16"]
    )
    config, warnings = validate(composition.values, composition.where)
    assert config.model.dit.trainable == "full"
    assert [fault.path for fault in warnings] == ["model.dit.lora"]


COMMANDS = sorted(
    {
        match[1]
        for path in [*RECIPES, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for match in re.finditer(
            r"^#?\s+(?:Run:\s+)?(?:python train\.py|octavo plan|octavo train) (?:-m )?(recipe=.*)$",
            re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8")),
            re.MULTILINE,
        )
    }
)


def test_commands_are_found_in_pages_and_recipes() -> None:
    assert len(COMMANDS) >= 4
    assert "recipe=qwen_image_lora model.dit.precision=fp8" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_a_page_or_recipe_is_valid_as_it_stands(command: str) -> None:
    request = read_sweep(shlex.split(command, comments=True))
    assert request.faults == ()
    if any(dimension.choices is None for dimension in request.dimensions):
        return  # a search; its ends are judged by the sweep's own tests
    for point in request.points():
        composition = composed(point)
        _, warnings = validate(composition.values, composition.where)
        assert warnings == []


def test_a_short_try_of_a_recipe_is_no_fault() -> None:
    composition = composed(["recipe=pocket_lora", "trainer.max_steps=6"])
    _, warnings = validate(composition.values, composition.where)
    assert [fault.path for fault in warnings] == ["optim.warmup_steps"]
