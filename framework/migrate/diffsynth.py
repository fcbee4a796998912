"""DiffSynth-Studio's training commands as recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.migrate.command_line import Command, num_processes, read_commands
from framework.migrate.diffsynth_model import json_list, set_model, set_storage, set_trained
from framework.migrate.draft import MUST_BE_GIVEN, Draft
from framework.migrate.flags import read_table
from framework.migrate.given import Given
from framework.migrate.length import count_rows, first_value, steps_per_epoch
from framework.migrate.models import family_facts
from framework.migrate.shared import set_devices, set_optimizer, set_run, set_steps

_DISTILL_INPUTS = ("seed", "rand_device", "num_inference_steps", "cfg_scale")


def migrate_command(command: Command, *, stage: Command | None, family: str, where: str) -> Draft:
    """Make a recipe of one command.

    stage: the command that encoded the data before it (`--task sft:data_process`), None where there was none.
    family: given by the person, "" to find it from the model.   where: for faults.
    """
    table = read_table("diffsynth")
    draft = Draft()
    given = Given(_with_stage(command, stage), table, draft, where)
    _refuse_methods(given, command)
    family = set_model(given, family)
    if family:
        set_trained(given, family)
        set_storage(given)
        _set_objective(given, family)
        processes = set_devices(draft, *num_processes(command.launch))
        _set_data(given, family)
        _set_length(given, processes)
        set_run(given, "output_path", name=None)
        _set_logs(given)
        draft.set_("trainer.gradient_clip_val", None, "gradients aren't clipped there")
        _launcher(draft, command.launch)
    for word in command.stray:
        draft.note("lost", word, "belongs to no flag.")
    given.settle_rest()
    return draft


def _with_stage(command: Command, stage: Command | None) -> Mapping[str, Any]:
    """The flags of a training stage together with the data and models of the stage that encoded for it."""
    if stage is None:
        return command.flags
    flags = dict(command.flags)
    for name in ("dataset_base_path", "dataset_metadata_path", "data_file_keys", "extra_inputs"):
        flags[name] = stage.flags.get(name)
    for name in ("model_id_with_origin_paths", "model_paths"):
        parts = [str(f[name]) for f in (command.flags, stage.flags) if f.get(name)]
        if parts and name == "model_paths":
            flags[name] = json.dumps([item for part in parts for item in json_list(part)])
        elif parts:
            flags[name] = ",".join(dict.fromkeys(",".join(parts).split(",")))
    return flags


def _refuse_methods(given: Given, command: Command) -> None:
    task = given.text("task", "sft").partition(":")[0]
    if "dmd2" in command.script or any(name.startswith("dmd2_") for name in given.values):
        method = "DMD2"
    elif task not in ("sft", "direct_distill"):
        method = f"--task {task}"
    else:
        return
    given.draft.refuse(
        method,
        "this training method isn't offered, so that no recipe can be made",
        hint="Offered are supervised fine-tuning and direct distillation (objective.name=direct_distill).",
        where=given.where,
    )


def _set_objective(given: Given, family: str) -> None:
    draft = given.draft
    task, _, stage = given.text("task", "sft").partition(":")
    if task == "direct_distill":
        draft.set_("objective.name", "direct_distill", given.source("task"))
        _set_distill_steps(given)
    elif family == "sdxl":
        draft.set_("objective.name", "ddpm", "SDXL predicts noise")
    else:
        shift = float(family_facts(family)["shift"])
        draft.set_("objective.name", "flow_matching", given.source("task"))
        draft.set_(
            "objective.timestep_sampling", "uniform", "noise levels are drawn uniformly there"
        )
        draft.set_("objective.shift", shift, "and then shifted by this factor")
        text = "A weight that is highest in the middle of the noise levels multiplies the loss there; here it has none."
        draft.note("changed", "(loss)", text)
        _set_boundaries(given, shift)
    if stage:
        draft.set_("data.cache", True, given.source("task"))
        text = "Both stages are one run: data.cache encodes once, then the encoders go; no cache of theirs is read."
        draft.note("changed", "--task", text)


def _set_distill_steps(given: Given) -> None:
    """The student's steps, which stand in the column num_inference_steps of every row there."""
    draft, metadata = given.draft, given.text("dataset_metadata_path")
    found = first_value(Path(metadata), "num_inference_steps") if metadata else None
    if found is not None and found.isdigit():
        source = f"num_inference_steps of the first row of {metadata}"
        draft.set_("objective.distill_steps", int(found), source)
    else:
        text = "objective.distill_steps (4) must be the column num_inference_steps of the metadata file."
        draft.note("check", "--extra_inputs num_inference_steps", text)
    text = "Pictures must be made from noise as Octavo draws it for a seed; those of another program began elsewhere."
    draft.note("check", "--extra_inputs seed", text)


def _set_boundaries(given: Given, shift: float) -> None:
    """Limits counted from the noisy end of the schedule's index, as noise levels after the shift."""
    low, high = given.number("min_timestep_boundary"), given.number("max_timestep_boundary")
    for name, share, path in (
        ("max_timestep_boundary", high, "objective.sigma_min"),
        ("min_timestep_boundary", low, "objective.sigma_max"),
    ):
        if share is None:
            continue
        rest = 1 - min(max(share, 0.0), 1.0)
        sigma = round(shift * rest / (1 + (shift - 1) * rest), 4)
        given.draft.set_(path, sigma, f"{given.source(name)}, counted from the noisy end")
        row = given.table.row(name)
        given.draft.note("changed", given.shown(name), row.note if row else "")


def _set_data(given: Given, family: str) -> None:
    draft = given.draft
    base, metadata = given.text("dataset_base_path"), given.text("dataset_metadata_path")
    if metadata:
        draft.set_("data.path", metadata, given.source("dataset_metadata_path"))
        if Path(metadata).parent != Path(base or "."):
            draft.set_("data.base_dir", base, given.source("dataset_base_path"))
    elif given.text("task", "sft").endswith(":train") or not base:
        draft.set_(
            "data.path",
            MUST_BE_GIVEN,
            "the pictures that were encoded; a cache of theirs isn't read",
        )
        draft.note(
            "check",
            "--dataset_base_path",
            "data.path must be given: the pictures and captions themselves.",
        )
    else:
        draft.set_("data.path", base, given.source("dataset_base_path"))
        draft.note(
            "check",
            "--dataset_base_path",
            "Without a metadata file there it is a folder of cache files, which isn't read.",
        )
    draft.set_("data.batch_size", 1, "always 1 there")
    _set_size(given)
    is_video = family_facts(family)["media"] == "video"
    if is_video and not given.has("num_frames"):
        draft.set_("data.num_frames", 81, "--num_frames not given")
    for name in given.words("extra_inputs"):
        known = name == "edit_image" and draft.value("model.family") == "qwen_image_edit"
        if known or (draft.value("objective.name") == "direct_distill" and name in _DISTILL_INPUTS):
            continue
        draft.note(
            "lost",
            "--extra_inputs",
            f"'{name}' isn't an input here; the model would train without it.",
        )


def _set_size(given: Given) -> None:
    draft = given.draft
    height, width = given.whole("height"), given.whole("width")
    max_pixels = given.whole("max_pixels", 1024 * 1024)
    if height and width:
        draft.set_(
            "data.max_px", height * width, f"{given.source('height', 'width')}: {width} x {height}"
        )
        if height == width:
            draft.set_(
                "data.max_aspect_ratio", 1.0, "every picture is cropped to that square there"
            )
        row = given.table.row("height")
        draft.note("changed", "--height, --width", row.note if row else "")
        return
    if height or width:
        draft.note("changed", "--height, --width", "One of the two alone has no effect there.")
    draft.set_("data.max_px", max_pixels, given.source("max_pixels"))
    text = "Pictures go into buckets of at most data.max_aspect_ratio (2); there they keep any shape, one to a batch."
    draft.note("changed", "--max_pixels", text)


def _set_length(given: Given, processes: int) -> None:
    draft = given.draft
    repeat, epochs = given.whole("dataset_repeat", 1) or 1, given.whole("num_epochs", 1) or 1
    accumulation = given.whole("gradient_accumulation_steps", 1) or 1
    if accumulation > 1:
        source = given.source("gradient_accumulation_steps")
        draft.set_("trainer.accumulate_grad_batches", accumulation, source)
    metadata = given.text("dataset_metadata_path")
    rows = count_rows(Path(metadata)) if metadata else None
    per_epoch = None
    if rows:
        items = rows * repeat
        per_epoch = steps_per_epoch(
            items, batch_size=1, processes=processes, accumulation=accumulation
        )
        parts = f"ceil({rows} rows x {repeat} / {processes}) / {accumulation}"
        set_steps(draft, epochs * per_epoch, f"--num_epochs {epochs} x ceil({parts})")
    else:
        text = (
            f"trainer.max_steps must be set: {epochs} x ceil(ceil(rows x {repeat} / {processes}) / {accumulation}); "
            f"the rows of {metadata or 'the data set'} can't be counted from here."
        )
        draft.note("check", "--num_epochs", text)
    steps = draft.value("trainer.max_steps")
    if repeat > 1 and (steps is None or repeat <= steps):
        draft.set_("data.repeats", repeat, given.source("dataset_repeat"))
    if given.has("save_steps"):
        every = max(1, (given.whole("save_steps") or 1) // accumulation)
        draft.set_("checkpoint.every_n_steps", every, given.source("save_steps"))
    elif per_epoch:
        draft.set_(
            "checkpoint.every_n_steps", per_epoch, "--save_steps not given: after each epoch"
        )
    draft.set_("optim.lr", given.number("learning_rate", 1e-4), given.source("learning_rate"))
    row = given.table.row("learning_rate")
    draft.note("changed", "--learning_rate", row.note if row else "")
    draft.set_(
        "optim.weight_decay", given.number("weight_decay", 0.01), given.source("weight_decay")
    )
    set_optimizer(given, "customized_optimizer")


def _set_logs(given: Given) -> None:
    if given.is_on("align_to_opensource_format"):
        given.draft.set_("export.formats", ["kohya"], "--align_to_opensource_format")
    project = given.text("wandb_project", "DiffSynth-Studio")
    if given.is_on("enable_wandb_log"):
        given.draft.set_(
            "logger.wandb.project", project, given.source("enable_wandb_log", "wandb_project")
        )


def _launcher(draft: Draft, launch: Mapping[str, Any]) -> None:
    """What an accelerate configuration asks for, by its name: offloading of frozen weights under DeepSpeed."""
    name = Path(str(launch.get("config_file", ""))).name
    if not name:
        return
    if "offload" in name or name == "accelerate_config_14B.yaml":
        for component in ("dit", "dit_2"):
            trains = draft.value(f"model.{component}.trainable")
            if trains == "lora" and draft.value(f"model.{component}.offload") is None:
                draft.set_(f"model.{component}.offload", "host", f"--config_file {name}")
                draft.set_(f"model.{component}.granularity", "block", f"--config_file {name}")
            elif trains == "full":
                text = "The optimizer's state isn't moved to the host; optim.name=paged_adamw_8bit makes it a quarter."
                draft.note("lost", f"--config_file {name}", text)
    elif "zero" in name or "accelerate_config" in name:
        text = "DeepSpeed ZeRO has no counterpart: each process holds the model; FP8 and offload make it smaller."
        draft.note("lost", f"--config_file {name}", text)


def migrate_script(text: str, *, where: str, family: str) -> list[Draft]:
    """Make a recipe of each training command of a script; the two stages of split training make one.

    text: a command line, or the text of a shell script.   where: for faults, e.g. the file's name.
    """
    drafts: list[Draft] = []
    stage: Command | None = None
    for command in read_commands(text, read_table("diffsynth")):
        place = f"{where}:{command.line}" if where else ""
        task = str(command.flags.get("task", "sft"))
        if task.endswith(":data_process"):
            if stage is not None:
                drafts.append(_encoding_alone(stage, family, where))
            stage = command
            continue
        if not task.endswith(":train"):
            drafts.append(migrate_command(command, stage=None, family=family, where=place))
            continue
        draft = migrate_command(command, stage=stage, family=family, where=place)
        if stage is not None:
            cache, read = stage.flags.get("output_path"), command.flags.get("dataset_base_path")
            if cache != read:
                text_ = f"The first stage writes to {cache}, the second reads {read}; the first one's data is used."
                draft.note("check", "--dataset_base_path", text_)
        drafts.append(draft)
        stage = None
    if stage is not None:
        drafts.append(_encoding_alone(stage, family, where))
    return drafts


def migrate_arguments(text: str, *, where: str, family: str) -> list[Draft]:
    """Make the recipe of `training_args.json`, which a run there leaves: every flag, given or not."""
    try:
        content = json.loads(text)
    except ValueError as error:
        content, reason = None, f"not readable as JSON: {error}"
    else:
        reason = "not an object with the flags of a run"
    if not isinstance(content, dict):
        draft = Draft()
        hint = "Give the training_args.json of a run, or its shell script."
        draft.refuse(where, reason, hint=hint, where=where)
        return [draft]
    flags = {name: value for name, value in content.items() if value not in (None, False)}
    for switch, name in (
        ("enable_swanlab_log", "swanlab_project"),
        ("enable_wandb_log", "wandb_project"),
    ):
        if switch not in flags:
            flags.pop(name, None)
    return [migrate_command(Command(1, "", {}, flags), stage=None, family=family, where=where)]


def _encoding_alone(stage: Command, family: str, where: str) -> Draft:
    place = f"{where}:{stage.line}" if where else ""
    draft = migrate_command(stage, stage=None, family=family, where=place)
    text = "This stage only encodes; the recipe encodes and then trains. Give the command of the second stage with it."
    draft.note("check", "--task", text)
    return draft
