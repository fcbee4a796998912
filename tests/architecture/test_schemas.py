"""The committed JSON Schemas are what the code makes, and say about every shipped YAML what the code says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from omegaconf import OmegaConf

from framework.cli.schema import schema_text
from framework.compose import compose_run
from framework.schema.base import UNIT
from framework.schema.in_words import Json, is_section, members
from framework.schema.json_schema import (
    GROUPS,
    SWEEP_GROUPS,
    find,
    json_schema,
    run_schema,
    schema_names,
    sweep_options,
    walk_sections,
)
from framework.schema.names import known_paths
from framework.schema.run import RunConfig
from tests.unit.schema.minimal import changed

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "schemas"
SHIPPED = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
HEADER = "# yaml-language-server: $schema="


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def schema_of(path: Path) -> str:
    """Name of the schema that a shipped file must follow."""
    inside = path.relative_to(ROOT).parts
    return "recipe" if inside[0] == "recipes" or len(inside) == 2 else "/".join(inside[1:-1])


def faults(name: str, text: str) -> list[str]:
    """What an editor would underline: one message for each fault."""
    schema = json_schema(name)
    # Numbers such as 1e-4 are read as Octavo and editors read them, which is not as PyYAML does.
    values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    found = jsonschema.Draft7Validator(schema).iter_errors(values)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def keys(schema: Json) -> Iterator[tuple[str, Json]]:
    """Every (dotted path, schema) of a plain key."""
    for path, section in walk_sections(schema):
        for name, key in section["properties"].items():
            if not is_section(key):
                yield f"{path}.{name}" if path else name, key


@pytest.mark.parametrize("name", schema_names())
def test_a_committed_schema_is_fresh(name: str) -> None:
    stale = "run `octavo schema --write schemas`"
    assert (SCHEMAS / f"{name}.json").read_text(encoding="utf-8") == schema_text("json", name), (
        stale
    )


def test_no_other_schema_is_committed_and_every_group_has_one() -> None:
    committed = {p.relative_to(SCHEMAS).with_suffix("").as_posix() for p in SCHEMAS.rglob("*.*")}
    assert committed == set(schema_names())
    assert {schema_of(path) for path in SHIPPED} == {"recipe", *GROUPS, *SWEEP_GROUPS}


@pytest.mark.parametrize("name", schema_names())
def test_a_schema_is_one_that_editors_understand(name: str) -> None:
    schema = json_schema(name)
    jsonschema.Draft7Validator.check_schema(schema)
    text = json.dumps(schema)
    assert not [word for word in ('"$ref"', '"$defs"', '"prefixItems"', '"const"') if word in text]


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_a_shipped_file_names_its_schema_and_follows_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    relative = os.path.relpath(SCHEMAS / f"{schema_of(path)}.json", path.parent)
    assert first == f"{HEADER}{Path(relative).as_posix()}"
    assert faults(schema_of(path), text) == []


def test_the_line_for_editors_may_stand_above_a_package_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = f"{HEADER}../octavo.schema.json\n# @package optim\nlr: 0.25\n"
    (tmp_path / "recipes" / "part.yaml").write_text(text)
    composition = compose_run(["recipe=part"])
    assert composition.values["optim"]["lr"] == 0.25
    assert composition.where("optim.lr") == "recipes/part.yaml:3:1"


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("model: {dit: {precison: fp8}}", "'precison' was unexpected"),
        ("modle: {dit: {precision: fp8}}", "'modle' was unexpected"),
        ("model: {dit: {precision: fp9}}", "'fp9' is not valid"),
        ("model: {dit: {lora: {rank: 0}}}", "0 is less than the minimum of 1"),
        ("model: {dit: {lora: {rank: many}}}", "'many' does not match"),
        ("optim: {lr: fast}", "'fast' does not match"),
        ("optim: {lr: 10}", "10 is greater than or equal to the maximum of 10"),
        ("optim: {betas: [0.9]}", "is not valid"),
        ("objective: {shift: sheduler}", "'sheduler' is not valid"),
        ("sample: {prompts: red apple}", "'red apple' does not match"),
        ("sample: {size_px: [64]}", "[64] is too short"),
        ("trainer: {max_steps: 1.5}", "1.5 is not of type 'integer'"),
        ("run: {name: a b}", "'a b' is not valid"),
        ("data: {cache: maybe}", "'maybe' does not match"),
        ("hydra: {job: {name: x}}", "'hydra' was unexpected"),
        ("defaults: [{override /optimizer: adamw}]", "'override /optimizer' does not match"),
        ("model: {dit: {fp8: {layers: [liner]}}}", "'liner' is not valid"),
    ],
)
def test_a_slip_in_a_recipe_is_underlined(text: str, phrase: str) -> None:
    found = faults("recipe", text)
    assert len(found) == 1
    assert phrase in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "defaults: [pocket_lora, _self_, {override /optim: prodigy}, {/recipe: base}]",
        "optim: {lr: '${data.batch_size}', name: '${oc.env:OPTIM}', ema: '${optim}', betas: '???'}",
        "data: {path: '???', batch_size: '???', cache: '${trainer.devices}'}",
        "model: {text_encoder: '${model.dit}', dit: {lora: null, fp8: {layers: ['${x.y}']}}}",
        "sample: {size_px: [64, '${data.max_px}'], prompts: '${validation}'}",
        "run: {name: '${oc.env:USER}-ink'}",
        "objective: {shift: 3.0}",
        "logger: {wandb: {project: x}}",
    ],
)
def test_what_a_recipe_may_hold_is_not_underlined(text: str) -> None:
    assert faults("recipe", text) == []


def test_the_schema_of_a_whole_run_asks_for_what_has_no_default() -> None:
    whole = RunConfig.model_validate(changed({})).model_dump(mode="json")
    validator = jsonschema.Draft7Validator(json_schema("run"))
    assert list(validator.iter_errors(whole)) == []
    del whole["data"]["path"]
    assert [e.message for e in validator.iter_errors(whole)] == ["'path' is a required property"]


def test_the_schema_knows_the_keys_that_the_code_knows() -> None:
    schema = run_schema()
    sections = {path for path, _ in walk_sections(schema) if path}
    assert {*sections, *(path for path, _ in keys(schema))} == set(known_paths(RunConfig))
    assert find(schema, "model.dit.precison") is None
    assert find(schema, "optim.lr.peak") is None


RUN_KEYS = dict(keys(run_schema()))
SWEEP_KEYS = {
    f"{group}={option['properties']['name']['enum'][0]} {name}": key
    for group in SWEEP_GROUPS
    for option in sweep_options(group)
    for name, key in option["properties"].items()
}


@pytest.mark.parametrize("path", [*RUN_KEYS, *SWEEP_KEYS])
def test_a_key_is_told_with_all_that_a_person_needs(path: str) -> None:
    """Meaning, default and examples; a unit wherever a whole number counts something."""
    key = RUN_KEYS.get(path) or SWEEP_KEYS[path]
    assert key["title"] == re.sub(r"=\w+ ", ".", path).replace("/", ".")
    assert key["description"]
    listed = all(
        "enum" in member or member.get("type") in ("boolean", "null") for member in members(key)
    )
    assert listed or key.get("examples"), "an example"
    counts = any(member.get("type") == "integer" for member in members(key))
    assert UNIT in key or not counts or path.endswith("seed"), "a unit"
    validator = jsonschema.Draft7Validator(key)
    for value in [*key.get("examples", ()), *([key["default"]] if "default" in key else ())]:
        assert list(validator.iter_errors(value)) == []


@pytest.mark.parametrize("path", RUN_KEYS)
def test_the_examples_of_a_key_are_allowed_by_the_code(path: str) -> None:
    around = {"logger.wandb.project": "x"} if path.startswith("logger.wandb.") else {}
    for example in RUN_KEYS[path].get("examples", ()):
        RunConfig.model_validate(changed({**around, path: example}))
