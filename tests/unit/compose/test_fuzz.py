"""Whatever a person types or saves, composing answers with faults and never raises."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from framework.compose import Composer, compose_run, read_sweep
from framework.errors import Fault

LINES = [
    "recipe=pocket_lora", "recipe=mine", "model.dit.precision=fp8", "optim.lr=1e-4", "~optim.lr",
    "+new.key=[1,2,{a: b}]", "++sample.prompts=['a cat','a dog']", "optim=adamw", "~trainer=single",
    "run.name=${oc.env:HOME}", "sample.seed=${trainer.max_steps}", "validation={fraction: 0.1}",
    "optim.lr=tag(log,interval(1e-5,1e-3))", "optim.lr=range(1,5,2)", "optim=glob(a*)",
    "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sample.prompts.0=x", "--fp8_models", "-m",
    "optim.lr=choice(1,2)", "run.x=shuffle(a,b)", "data.path='a, b'", "model@x=y", "=", "",
]  # fmt: skip
TEXT = """\
# @package _global_
defaults:
  - pocket_lora
  - override /optim: prodigy
  - _self_
model: &model
  dit: {precision: fp8, lora: {rank: 8}}
copy: *model
run:
  name: "lr-${optim.lr}"
sample:
  prompts: [a cat, 'a: dog']
  size_px:
    - 64
    - ${.0}
other:
  <<: *model
  text: |
    several
    lines
"""
PARTS = [
    "${", "}", "[", "]", "{", "}", "'", '"', ":", ": ", ",", "=", "~", "+", "@", "/", ".", "*", "&",
    "!", "!!int", "\t", "\n", "  ", "- ", "---\n", "%", "\\", "\x00", "é", "\ud800", "???", "null",
    "_self_", "defaults", "override ", "<<", "*model", "${optim}", "${.x}", "${oc.env:", "range(",
    "#", "1e999", "-", "0x", "|", ">", "?", "choice(", "hydra", "recipe", "\u2028", "🙂",
]  # fmt: skip


def mutated(text: str, chance: random.Random) -> str:
    for _ in range(chance.randint(1, 4)):
        start = chance.randint(0, len(text))
        end = min(len(text), start + chance.choice([0, 0, 1, 3, 12]))
        part = chance.choice(PARTS) if chance.random() < 0.8 else text[end : end + 10]
        text = text[:start] + part + text[end:]
    return text


def check(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        assert fault.message, fault
        assert fault.where, fault
        assert fault.hint.endswith("."), fault


@pytest.mark.parametrize("seed", range(8))
def test_no_command_line_raises(seed: int) -> None:
    chance = random.Random(seed)
    with Composer() as composer:
        for _ in range(80):
            lines = ["recipe=pocket_lora"] if chance.random() < 0.7 else []
            for line in chance.sample(LINES, chance.randint(1, 5)):
                lines.append(mutated(line, chance) if chance.random() < 0.7 else line)
            check(composer.compose(lines).faults)
            request = read_sweep(lines)
            check(request.faults)
            if not request.faults and all(d.choices for d in request.dimensions):
                request.points()


@pytest.mark.parametrize("seed", range(8))
def test_no_file_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    chance = random.Random(1000 + seed)
    for _ in range(50):
        text = mutated(TEXT, chance)
        raw = text.encode("utf-8", "surrogatepass")
        if chance.random() < 0.1:
            raw = raw[: chance.randint(0, len(raw))] + bytes([chance.randint(0, 255)])
        (tmp_path / "recipes" / "mine.yaml").write_bytes(raw)
        check(compose_run(["recipe=mine", "optim.lr=1"]).faults)


def test_overrides_of_every_kind_of_value_raise_nothing() -> None:
    keys = ["recipe", "model", "model.dit", "optim.lr", "sample.prompts", "sample.prompts.0", "x.y"]
    values = ["", "null", "1", "a", "[]", "[1]", "{}", "{a: 1}", "???", "${optim}", "${x}", "nan",
              "1e999", "true", "{1: {2: 3}}", "{null: 1}", "_self_", ".", "/", "../a"]  # fmt: skip
    with Composer() as composer:
        for key in keys:
            for value in values:
                for line in (f"{key}={value}", f"~{key}={value}", f"+{key}={value}"):
                    check(composer.compose(["recipe=pocket_lora", line]).faults)
