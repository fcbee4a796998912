"""Settings of kohya's sd-scripts and musubi-tuner, from TOML files or command lines, as recipes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from framework.migrate.command_line import num_processes, read_commands
from framework.migrate.draft import Draft
from framework.migrate.flags import read_table
from framework.migrate.given import Given
from framework.migrate.kohya_data import set_data
from framework.migrate.kohya_model import set_model, set_storage, set_trained
from framework.migrate.kohya_objective import set_objective
from framework.migrate.shared import (
    prompts_of_file,
    set_checkpoints,
    set_devices,
    set_optimizer,
    set_prompts,
    set_run,
    set_schedule,
    set_steps,
)

Kohya = Literal["kohya", "musubi"]
# Scripts of both trainers; those that only fill a cache are left out.
_SCRIPT = r"(?<!cache_)(train|train_network)[^/]*\.py$"
_MAX_STEPS = 1600


@dataclass(frozen=True)
class Request:
    """What a person gave of one run.

    script: name of the training script; "" where only a TOML file is given.
    settings: of the training.   dataset: the data set file's content; empty where there is none.
    """

    settings: Mapping[str, Any]
    dataset: Mapping[str, Any] = field(default_factory=dict)
    script: str = ""
    launch: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def migrate_toml(
    trainer: Kohya, text: str, *, dataset: str, where: str, family: str
) -> list[Draft]:
    """Make the recipe of a training TOML file.

    dataset: text of the data set's TOML file, "" where there is none.   where: for faults.
    """
    draft = Draft()
    settings = flattened(_toml(draft, text, where))
    content = _toml(draft, dataset, "--dataset") if dataset else {}
    if not draft.faults and not content and "datasets" in settings:
        draft.refuse(
            where,
            "this is a data set file, not the file of a training",
            hint="Give the training's file or command first, and this one with --dataset.",
        )
    if draft.faults:
        return [draft]
    return [migrate_request(trainer, Request(settings, content, where=where), family=family)]


def migrate_commands(
    trainer: Kohya, text: str, *, dataset: str, where: str, family: str
) -> list[Draft]:
    """Make a recipe of each training command of a command line or a shell script."""
    draft = Draft()
    content = _toml(draft, dataset, "--dataset") if dataset else {}
    if draft.faults:
        return [draft]
    table = read_table(trainer)
    drafts = []
    for command in read_commands(text, table, script=_SCRIPT):
        place = f"{where}:{command.line}" if where else ""
        request = Request(command.flags, content, command.script, command.launch, place)
        drafts.append(migrate_request(trainer, request, family=family))
        for word in command.stray:
            drafts[-1].note("lost", word, "belongs to no flag.")
    return drafts


def flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a training file in one namespace; names of its sections mean nothing, as in their reader."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flattened(value)
        else:
            flat[key] = value
    return flat


def _toml(draft: Draft, text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        draft.refuse(where, f"not readable as TOML: {error}", hint="Correct the file.", where=where)
        return {}


def migrate_request(trainer: Kohya, request: Request, *, family: str) -> Draft:
    """Make a recipe of one run."""
    table, draft = read_table(trainer), Draft()
    given = Given(request.settings, table, draft, request.where)
    family = set_model(given, trainer, request.script, family)
    if family:
        components = set_trained(given, trainer, family)
        set_storage(given, components, family)
        set_objective(given, trainer, family)
        dataset = request.dataset or _named_dataset(given)
        processes = set_devices(draft, *num_processes(request.launch))
        accumulation = given.whole("gradient_accumulation_steps", 1) or 1
        if accumulation > 1:
            source = given.source("gradient_accumulation_steps")
            draft.set_("trainer.accumulate_grad_batches", accumulation, source)
        per_epoch = set_data(given, dataset, family, processes=processes, accumulation=accumulation)
        steps = _set_length(given, per_epoch)
        _set_optim(given, steps)
        _set_output(given, per_epoch)
        _set_samples(given, per_epoch, family)
        _set_logs(given)
    given.settle_rest()
    return draft


def _named_dataset(given: Given) -> dict[str, Any]:
    """The content of the file that `dataset_config` names, where it can be read from here."""
    file = given.text("dataset_config")
    if not file:
        return {}
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        given.draft.note(
            "check", "dataset_config", f"{file} can't be read here; give it as --dataset."
        )
        return {}


def _set_length(given: Given, per_epoch: int | None) -> int:
    draft, epochs = given.draft, given.whole("max_train_epochs")
    steps = given.whole("max_train_steps", _MAX_STEPS) or _MAX_STEPS
    if epochs and per_epoch:
        source = f"{given.source('max_train_epochs')} x {per_epoch} steps"
        set_steps(draft, epochs * per_epoch, source)
        row = given.table.row("max_train_epochs")
        draft.note("changed", "max_train_epochs", row.note if row else "")
    elif epochs:
        text = (
            f"trainer.max_steps must be set: {epochs} x ceil(batches / processes / accumulation); "
            "the pictures can't be counted from here."
        )
        draft.note("check", "max_train_epochs", text)
        return 0
    else:
        set_steps(draft, steps, given.source("max_train_steps"))
    return int(draft.value("trainer.max_steps"))


def _set_optim(given: Given, steps: int) -> None:
    draft = given.draft
    name = "unet_lr" if given.has("unet_lr") else "learning_rate"
    draft.set_("optim.lr", given.number(name, 2e-6), given.source(name))
    given.taken |= {"learning_rate", "unet_lr"}
    rates = given.words("text_encoder_lr")
    if any(rate != str(given.values.get(name)) for rate in rates):
        draft.note("lost", "text_encoder_lr", "All that trains shares one rate.")
    if given.is_on("use_8bit_adam"):
        draft.set_("optim.name", "adamw_8bit", "use_8bit_adam")
    elif given.is_on("use_lion_optimizer"):
        draft.set_("optim.name", "lion_8bit", "use_lion_optimizer")
    set_optimizer(given, "optimizer_type")
    _set_optimizer_args(given)
    if given.has("max_grad_norm"):
        norm = given.number("max_grad_norm")
        draft.set_("trainer.gradient_clip_val", norm or None, given.source("max_grad_norm"))
    set_schedule(given, "lr_scheduler", "lr_warmup_steps", steps)


def _set_optimizer_args(given: Given) -> None:
    value = given.take("optimizer_args") or []
    for entry in value if isinstance(value, list) else str(value).split():
        key, _, text = str(entry).partition("=")
        numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?|\.\d+", text)]
        if key == "weight_decay" and numbers:
            given.draft.set_("optim.weight_decay", numbers[0], f"optimizer_args {entry}")
        elif key == "betas" and len(numbers) == 2:
            given.draft.set_("optim.betas", numbers, f"optimizer_args {entry}")
        else:
            given.draft.note("lost", f"optimizer_args {entry}", "It can't be set.")


def _set_output(given: Given, per_epoch: int | None) -> None:
    set_run(given, "output_dir", name="output_name")
    every = given.whole("save_every_n_steps")
    source = given.source("save_every_n_steps")
    epochs = given.whole("save_every_n_epochs")
    if every is None and epochs:
        every = epochs * per_epoch if per_epoch else None
        source = given.source("save_every_n_epochs")
        if every is None:
            text = "checkpoint.every_n_steps must be set: the steps of an epoch can't be counted from here."
            given.draft.note("check", "save_every_n_epochs", text)
    keep = given.whole("save_last_n_epochs")
    if (last := given.whole("save_last_n_steps")) and every:
        keep = max(1, -(-last // every))
    set_checkpoints(given.draft, every, source, keep)
    given.draft.set_("export.formats", ["kohya"], "the names that LoRA files have there")


def _set_samples(given: Given, per_epoch: int | None, family: str) -> None:
    file = given.text("sample_prompts")
    steps, epochs = given.whole("sample_every_n_steps"), given.whole("sample_every_n_epochs")
    if not file:
        return
    prompts = prompts_of_file(file)
    if not prompts:
        given.draft.note(
            "check",
            "sample_prompts",
            f"{file} can't be read here; list its texts in sample.prompts.",
        )
        return
    every = steps or (epochs * per_epoch if epochs and per_epoch else 0)
    set_prompts(given.draft, prompts, every, family, source=f"sample_prompts {file}")


def _set_logs(given: Given) -> None:
    log, project = given.text("log_with"), given.text("log_tracker_name")
    if log in ("wandb", "all"):
        name = project or str(given.draft.value("run.name"))
        given.draft.set_("logger.wandb.project", name, given.source("log_with", "log_tracker_name"))
