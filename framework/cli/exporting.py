"""What `octavo export` does: writes a LoRA in the form of another program, or merges it into its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from framework.cli.configuration import judged_config
from framework.cli.report import error_console, output_console
from framework.errors import ConfigError, Fault, PlanError, SourceError
from framework.schema.families import FAMILIES
from framework.schema.lora_keys import FAMILY_NAMES, FORMAT_NAMES, FormatName, family_names
from framework.schema.model import ModelConfig

if TYPE_CHECKING:
    from framework.runtime.lora_files import LoraContent

_CONFIG_FILE = "config.yaml"
_MODEL_FOLDER = "model"


def export_forms(run: Path, formats: Sequence[str], out: Path | None) -> None:
    """Write one file, or folder of peft's, for each format.   run: a run's folder or a LoRA file."""
    _write_forms(run, [name for name in FORMAT_NAMES if name in formats], out)


def export_merged(
    run: Path,
    overrides: Sequence[str],
    *,
    precision: Literal["bf16", "fp8"],
    out: Path,
    config_dir: Path | None,
) -> None:
    """Write a whole checkpoint with the LoRA in its weights to `out`, which must not exist yet."""
    with _model_of(run, overrides, config_dir) as model:
        _merge(run, model, out, precision)


def _write_forms(run: Path, forms: Sequence[FormatName], out: Path | None) -> None:
    """Write one file, or folder of peft's, for each form; none is written over."""
    from framework.runtime.lora_files import BLOCKS_KEY, read_lora
    from framework.runtime.lora_writing import RESULT_NAMES, planned_paths, write_lora

    content = read_lora(run, families=_families(run))
    folder = out or (run if run.is_dir() else run.parent)
    names = None
    if content.family is not None:
        blocks = content.metadata.get(BLOCKS_KEY, "")
        count = int(blocks) if blocks.isdigit() else None
        names = family_names(content.family, layers_per_block=count)
    targets = {}
    for form in forms:
        plain = Path(RESULT_NAMES[form])
        if run.is_file():
            plain = Path(f"{run.stem}_{form}{plain.suffix}")
        targets[form] = folder / plain
        for path in planned_paths(targets[form], form, list(content.adapters)):
            if path.exists():
                raise PlanError(
                    f"{path} exists, and nothing is written over",
                    hint="name another folder with --out, or move the file away",
                )
    for form, path in targets.items():
        metadata = {key: value for key, value in content.metadata.items() if key in _kept()}
        written = write_lora(path, content.adapters, form=form, names=names, metadata=metadata)
        for file in written:
            output_console().print(str(file), soft_wrap=True)


def _kept() -> tuple[str, ...]:
    """Header fields that say where a LoRA is from, whatever its form."""
    from framework.runtime.lora_files import BLOCKS_KEY, CONFIG_KEY

    own = ("octavo.dataset_hash", CONFIG_KEY, BLOCKS_KEY)
    return ("base_model", "base_commit", "steps", "trained_with", "modelspec.title", *own)


def _families(run: Path) -> tuple[str, ...]:
    """The run's own family, where its folder says it; else every one that is known."""
    family = str((_saved_config(run).get("model") or {}).get("family"))
    return (family,) if family in FAMILY_NAMES else tuple(FAMILY_NAMES)


def _saved_config(run: Path) -> dict[str, Any]:
    """The configuration in a run's folder; empty where there is none."""
    path = run / _CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SourceError(
            "the run's configuration can't be read", where=str(path), found=str(error)
        ) from error
    return values if isinstance(values, dict) else {}


@contextmanager
def _model_of(
    run: Path, overrides: Sequence[str], config_dir: Path | None
) -> Iterator[ModelConfig]:
    """The model that a LoRA is merged into: the one given, or the one that run or file say."""
    if overrides:
        with judged_config(overrides, use="generate", config_dir=config_dir) as config:
            yield config.model
        return
    values = _saved_config(run) or _config_in_header(run)
    hint = "Name the model: octavo export RUN recipe=NAME model.source=FOLDER --merge --out FOLDER"
    if not values.get("model"):
        message = "neither folder nor file says which checkpoint the LoRA is for"
        raise ConfigError([Fault("RUN", message, f"command line: {run}", hint=hint)])
    try:
        model = ModelConfig.model_validate(values["model"])
    except ValidationError as error:
        message = (
            f"the configuration that comes with the LoRA can't be used: {error.errors()[0]['msg']}"
        )
        raise ConfigError([Fault("RUN", message, f"command line: {run}", hint=hint)]) from error
    yield model


def _config_in_header(run: Path) -> dict[str, Any]:
    from framework.runtime.lora_files import CONFIG_KEY, read_lora

    text = read_lora(run).metadata.get(CONFIG_KEY, "{}")
    values = json.loads(text)
    return values if isinstance(values, dict) else {}


def _merge(run: Path, model: ModelConfig, out: Path, precision: Literal["bf16", "fp8"]) -> None:
    from framework.runtime.merge import plan_merge, write_merged

    content = _adapters_for(run, model)
    trained = {
        name: run / _MODEL_FOLDER / spec.subfolder
        for name, spec in FAMILIES[model.family].components.items()
        if (run / _MODEL_FOLDER / spec.subfolder).is_dir()
    }
    plan = plan_merge(model, content.adapters, precision=precision, trained=trained)
    console = error_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("Merging", total=plan.total_bytes)
        write_merged(plan, out, on_progress=lambda count: progress.advance(task, count))
    output_console().print(str(out), soft_wrap=True)


def _adapters_for(run: Path, model: ModelConfig) -> LoraContent:
    from framework.runtime.lora_files import read_lora

    return read_lora(
        run, families=(model.family,) if model.family in FAMILY_NAMES else tuple(FAMILY_NAMES)
    )
