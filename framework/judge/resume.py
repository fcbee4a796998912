"""Judges `checkpoint.resume=PATH` from the files of the run that it names, before torch is loaded.

What decides is what a checkpoint must agree in to be taken over: family, what trains, adapters and optimizer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from framework.judge.layers import resolved_lora_layers
from framework.judge.places import Findings, nearest_entries
from framework.schema.model import ComponentConfig, LoraConfig
from framework.schema.run import RunConfig

_KEY = "checkpoint.resume"
RESUME_READS = (_KEY, "model", "optim.name", "trainer.max_steps")
"""What `check_resume` looks at."""

_WORDS = ("auto", "never")
_CHECKPOINTS = "checkpoints"
_CONFIG_FILE = "config.yaml"
_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})\.ckpt")
_ALLOWED = "auto, never, a run folder or a .ckpt file"


def check_resume(config: RunConfig, findings: Findings) -> None:
    """Note a path that can't be resumed from, and a run whose checkpoint doesn't belong to this configuration."""
    typed = config.checkpoint.resume
    if typed in _WORDS:
        return
    path = Path(typed).expanduser()
    if not path.exists():
        _nothing_there(typed, path, findings)
        return
    checkpoint, run = _checkpoint_and_run(path)
    if checkpoint is None:
        _no_checkpoints(typed, path, findings)
        return
    saved = _read_config(run / _CONFIG_FILE)
    if saved is not None:
        _compare(config, saved, run, findings)
    _check_length(config, checkpoint, findings)


def _checkpoint_and_run(path: Path) -> tuple[Path | None, Path]:
    """The newest checkpoint that a path names, and the folder of its run."""
    if path.is_file():
        parent = path.absolute().parent
        return path, parent.parent if parent.name == _CHECKPOINTS else parent
    for folder in (path / _CHECKPOINTS, path):
        found = sorted(
            (int(match[1]), file)
            for file in folder.glob("*.ckpt")
            if (match := _CHECKPOINT_NAME.fullmatch(file.name))
        )
        if found:
            inside = folder.absolute()
            return found[-1][1], inside.parent if inside.name == _CHECKPOINTS else inside
    return None, path


def _nothing_there(typed: str, path: Path, findings: Findings) -> None:
    words = difflib.get_close_matches(typed.lower(), _WORDS, n=1, cutoff=0.6)
    nearest = (*words, *nearest_entries(typed, (Path.cwd(),)))
    findings.missing(
        _KEY,
        f'"{typed}" is neither auto nor never, and no file or folder of this name exists',
        hint="Give a run folder or a .ckpt file, or leave the key out to go on with a stopped run.",
        value=typed,
        nearest=nearest,
        allowed=_ALLOWED,
    )


def _no_checkpoints(typed: str, path: Path, findings: Findings) -> None:
    """A folder without checkpoints; often it is the one around the numbered runs."""
    runs = sorted(
        (int(entry.name), f"{typed.rstrip('/')}/{entry.name}")
        for entry in path.iterdir()
        if entry.name.isdecimal() and _checkpoint_and_run(entry)[0] is not None
    )
    nearest = tuple(run for _, run in reversed(runs))[:3]
    findings.missing(
        _KEY,
        f'the folder "{typed}" holds no checkpoints'
        + (f", but {len(runs)} run{'s' if len(runs) > 1 else ''} that do" if runs else ""),
        hint=f"Give a run folder with checkpoints/step-*.ckpt in it, or {_KEY}=never to start anew.",
        value=typed,
        nearest=nearest,
        allowed=_ALLOWED,
    )


def _read_config(file: Path) -> Mapping[str, Any] | None:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values if isinstance(values, Mapping) else None


def _compare(config: RunConfig, saved: Mapping[str, Any], run: Path, findings: Findings) -> None:
    """Note where the run at `run` differs in what a checkpoint must agree in."""
    model = _section(saved, "model")
    family = model.get("family", config.model.family)
    if family != config.model.family:
        findings.refuse(
            _KEY,
            f"the run in {run} is of the family {family}, this one of {config.model.family}, and their weights have "
            "nothing in common",
            hint=f"Resume from a run of {config.model.family}, or start anew with {_KEY}=never.",
            code="rule",
            value=config.checkpoint.resume,
        )
        return
    differences: list[str] = []
    ways: list[str] = []
    for name, component in config.model.components.items():
        _compare_component(config, name, component, _section(model, name), differences, ways)
    optimizer = _section(saved, "optim").get("name", config.optim.name)
    if optimizer != config.optim.name:
        differences.append(f"its optimizer is {optimizer}, this run's {config.optim.name}")
        ways.append(f"optim.name={optimizer}")
    if differences:
        lora = run / "lora.safetensors"
        start = (
            f", taking over its LoRA with model.dit.lora.init_from={lora}" if lora.is_file() else ""
        )
        findings.refuse(
            _KEY,
            f"the checkpoint of the run in {run} doesn't belong to this configuration: {'; '.join(differences)}",
            hint=f"Set {' '.join(ways)} as that run did, or start anew with {_KEY}=never{start}.",
            code="rule",
            value=config.checkpoint.resume,
        )
        return
    _warn_of_other_meaning(config, model, run, findings)


def _compare_component(
    config: RunConfig,
    name: str,
    component: ComponentConfig,
    saved: Mapping[str, Any],
    differences: list[str],
    ways: list[str],
) -> None:
    path = f"model.{name}"
    trained = saved.get("trainable", "none")
    if trained != component.trainable:
        differences.append(f"it trained {path}.trainable={trained}, this run {component.trainable}")
        ways.append(f"{path}.trainable={trained}")
        return
    if trained != "lora":
        return
    before, now = _section(saved, "lora"), component.lora or LoraConfig()
    for key in ("rank", "use_dora"):
        was = before.get(key, LoraConfig.model_fields[key].default)
        if was != getattr(now, key):
            shown = str(was).lower()
            differences.append(
                f"{path}.lora.{key} was {shown}, here it is {str(getattr(now, key)).lower()}"
            )
            ways.append(f"{path}.lora.{key}={shown}")
    targets = before.get("target_modules")
    globs = tuple(str(glob) for glob in targets) if isinstance(targets, list) else None
    if globs == now.target_modules:
        return
    other = component.model_copy(update={"lora": LoraConfig(target_modules=globs)})
    was_layers = resolved_lora_layers(config, name, other)
    layers = resolved_lora_layers(config, name, component)
    if was_layers is not None and layers is not None and was_layers != layers:
        example = sorted(was_layers ^ layers)[0]
        differences.append(
            f"its adapter was on other layers ({len(was_layers)} then, {len(layers)} here, different e.g. in {example})"
        )
        ways.append(f"{path}.lora.target_modules={_typed(globs)}")


def _warn_of_other_meaning(
    config: RunConfig, model: Mapping[str, Any], run: Path, findings: Findings
) -> None:
    """What lets a checkpoint load, but makes its weights mean something else."""
    source = model.get("source", config.model.source)
    if source != config.model.source:
        findings.warn(
            _KEY,
            f"the run in {run} trained on the weights of {source}, this one on those of {config.model.source}",
            hint=f"Set model.source={source} to go on with the same weights.",
        )
    for name, component in config.model.components.items():
        before, now = _section(_section(model, name), "lora"), component.lora or LoraConfig()
        for key in ("alpha", "use_rslora"):
            was = before.get(key, LoraConfig.model_fields[key].default)
            if component.trainable == "lora" and was != getattr(now, key):
                path = f"model.{name}.lora.{key}"
                findings.warn(
                    path,
                    f"was {str(was).lower()} in the run in {run} that this one resumes from, so that the adapter "
                    "starts at another strength than it had",
                    hint=f"Set {path}={str(was).lower()} to go on as it was.",
                )


def _check_length(config: RunConfig, checkpoint: Path, findings: Findings) -> None:
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is not None and int(match[1]) >= config.trainer.max_steps:
        findings.refuse(
            "trainer.max_steps",
            f"{config.trainer.max_steps} steps leave nothing to train: "
            f"the checkpoint {checkpoint} is of step {int(match[1])}",
            hint=f"Raise it above {int(match[1])}, or resume from an earlier checkpoint.",
            code="rule",
            value=str(config.trainer.max_steps),
        )


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _typed(globs: tuple[str, ...] | None) -> str:
    return "null" if globs is None else f"[{','.join(globs)}]"
