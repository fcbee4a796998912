"""Hydra itself composes the same values from the same files, and many compositions are the same as single ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from framework.compose import Composer, compose_run, conf_dir, recipe_names, shipped_recipes_dir

OVERRIDES = [
    [],
    ["optim.lr=0.25", "trainer.max_steps=7"],
    ["optim=prodigy", "trainer=ddp", "logger=wandb"],
    ["++model.dit.precision=fp8", "++sample={seed: 3, size_px: [64, 64]}"],
    ["++model.dit.lora=null", "++model.dit.lora.rank=8"],
    ["~optim.lr", "~logger"],
    ["++sample.prompts.0=first", "++run.name=run-${optim.name}"],
    ["++data.path='a, b'", "++validation={sigmas: [0.1, 0.2]}"],
]
IDS = [" ".join(overrides)[:40] or "none" for overrides in OVERRIDES]


@pytest.fixture(scope="module")
def hydra_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files as one configuration folder, as Hydra wants them."""
    folder = tmp_path_factory.mktemp("hydra") / "conf"
    shutil.copytree(conf_dir(), folder, ignore=shutil.ignore_patterns("hydra"))
    (folder / "recipe").mkdir()
    for file in shipped_recipes_dir().glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        (folder / "recipe" / file.name).write_text(f"# @package _global_\n{text}")
    return folder


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("overrides", OVERRIDES, ids=IDS)
def test_hydra_itself_composes_the_same(
    hydra_folder: Path, recipe: str, overrides: list[str]
) -> None:
    line = [f"recipe={recipe}", *overrides]
    with initialize_config_dir(config_dir=str(hydra_folder), version_base="1.3"):
        expected = OmegaConf.to_container(compose("config", line), resolve=True)
    composition = compose_run(line)
    assert composition.faults == ()
    assert composition.values == expected


def test_a_composer_gives_what_single_compositions_give() -> None:
    lines = [[f"recipe={r}", *overrides] for r in recipe_names() for overrides in OVERRIDES]
    lines += [["recipe=nope", "optim.lr=1"], ["recipe=pocket_lora", "optim=adamm", "a[0]=1"]]
    with Composer() as composer:
        for line in [*lines, *lines[::5]]:
            shared, single = composer.compose(line), compose_run(line)
            assert shared.values == single.values
            assert shared.faults == single.faults
            assert shared.left_out == single.left_out
            paths = ["optim.lr", "optim", "model.dit.lora", "sample.prompts[0]", "run.name", "x"]
            assert [shared.where(p) for p in paths] == [single.where(p) for p in paths]


def test_compositions_share_no_values() -> None:
    with Composer() as composer:
        first = composer.compose(["recipe=pocket_lora", "sample.prompts.0=changed"])
        first.values["sample"]["prompts"].append("more")
        second = composer.compose(["recipe=pocket_lora"])
    assert second.values["sample"]["prompts"][0] == "red apple"
    assert "more" not in second.values["sample"]["prompts"]
    assert "pocket_lora.yaml" in second.where("sample.prompts[0]")
