"""Shell commands that a comparison offers: the same run again, and pictures with what it trained."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.sweep.results_files import relative
from framework.sweep.results_rows import PointResult

_READ_BY_GENERATE = ("recipe=", "model.", "model=", "model/", "sample.")


def train_command(row: PointResult, sweep: Mapping[str, Any]) -> str:
    """`octavo train` for one point; a single run's config.yaml is used as a recipe."""
    if row.overrides is not None:
        return shlex.join(["octavo", "train", *_config_dir(sweep), *row.overrides])
    return _with_recipe(row, "octavo train")


def generate_command(row: PointResult, sweep: Mapping[str, Any]) -> str:
    """`octavo generate` with the point's adapter or trained components; "" where it has none yet."""
    run = row.run
    if run.folder is None or (run.lora is None and run.trained_model is None):
        return ""
    base = Path(str(sweep.get("cwd") or Path.cwd()))
    trained = []
    if run.trained_model is not None:
        for name in ("dit", "dit_2", "text_encoder", "text_encoder_2", "vae"):
            if run.setting(f"model.{name}.trainable") == "full":
                trained.append(f"model.{name}.source={shown_from(run.trained_model, base)}")
    lora = [] if run.lora is None else ["--lora", shown_from(run.lora, base)]
    prompt = ["--prompt", run.prompts[0] if run.prompts else "a picture of ..."]
    if row.overrides is None:
        return _with_recipe(row, shlex.join(["octavo", "generate", *trained, *lora, *prompt]))
    read = [
        line
        for line in row.overrides
        if line.lstrip("+~").startswith(_READ_BY_GENERATE)
        and not line.lstrip("+~").startswith("sample.prompts")
    ]
    return shlex.join(["octavo", "generate", *_config_dir(sweep), *read, *trained, *lora, *prompt])


def _with_recipe(row: PointResult, command: str) -> str:
    """Prefix a command with the copy that makes a recipe of a run's resolved configuration."""
    assert row.run.folder is not None
    name = row.name.replace("/", "-")
    source = shlex.quote(shown_from(row.run.folder / "config.yaml", Path.cwd()))
    head, _, rest = command.partition(" ")
    verb, _, options = rest.partition(" ")
    whole = " ".join(part for part in (head, verb, f"recipe={shlex.quote(name)}", options) if part)
    return f"mkdir -p recipes && cp {source} recipes/{shlex.quote(name)}.yaml && {whole}"


def _config_dir(sweep: Mapping[str, Any]) -> list[str]:
    folder = sweep.get("config_dir")
    return ["--config-dir", str(folder)] if folder else []


def shown_from(path: Path, base: Path) -> str:
    """A path as seen from `base` where it lies below it, else whole."""
    whole = path.absolute()
    return relative(whole, base) if whole.is_relative_to(base.absolute()) else str(whole)
