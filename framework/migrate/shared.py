"""What the converters of several trainers have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from framework.migrate.draft import MUST_BE_GIVEN, Draft
from framework.migrate.given import Given
from framework.schema.renamed import value_called_elsewhere
from framework.schema.run import OptimConfig

_OPTIMIZERS: tuple[str, ...] = OptimConfig.model_fields["name"].annotation.__args__  # type: ignore[union-attr]


def set_devices(draft: Draft, processes: int | None, source: str) -> int:
    """Write the number of processes; returns it, 1 where it isn't known.

    processes: None where only a file on the person's machine knows it.
    """
    if processes is None:
        text = "accelerate's own configuration says how many; 1 is assumed, trainer.devices takes more."
        draft.note("check", "(processes)", text)
        return 1
    if processes > 1:
        draft.set_("trainer.devices", processes, source)
    return max(1, processes)


def set_run(given: Given, folder: str, *, name: str | None) -> str:
    """Write `run.name` and `run.output_dir`; returns the name.

    folder: their setting for the output folder.   name: their setting for its name; None: the folder's last part.
    """
    path = PurePosixPath(given.text(folder, "outputs").replace("\\", "/"))
    if name is not None and given.has(name):
        text, parent, source = given.text(name), str(path), given.source(name)
    else:
        text, parent, source = path.name, str(path.parent), given.source(folder)
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or "migrated"
    given.draft.set_("run.name", cleaned, source)
    if given.has(folder):
        given.draft.set_("run.output_dir", parent, given.source(folder))
    return cleaned


def set_steps(draft: Draft, steps: int, source: str) -> None:
    """Write the length of the run."""
    draft.set_("trainer.max_steps", max(1, steps), source)


def set_optimizer(given: Given, name: str) -> str:
    """Write `optim.name`; returns it, "adamw" where there is no such optimizer here."""
    draft, asked = given.draft, given.text(name)
    if not asked:
        return "adamw"
    known = asked.lower() if asked.lower() in _OPTIMIZERS else None
    known = known or value_called_elsewhere("optim.name", asked)
    if known is None:
        listed = ", ".join(_OPTIMIZERS)
        draft.note(
            "lost",
            given.shown(name),
            f"'{asked}' isn't among the optimizers ({listed}); adamw is used.",
        )
        return "adamw"
    draft.set_("optim.name", known, given.source(name))
    return known


def set_schedule(given: Given, name: str, warmup: str, steps: int) -> None:
    """Write `optim.schedule` and `optim.warmup_steps`.

    warmup: their setting; a share below 1 or with % is of `steps`, the run's length (0 where it isn't known).
    """
    draft, asked = given.draft, given.text(name)
    schedule = {"constant_with_warmup": "constant", "": ""}.get(asked.lower(), asked.lower())
    if schedule in ("constant", "cosine", "linear"):
        draft.set_("optim.schedule", schedule, given.source(name))
    elif schedule:
        text = f"'{asked}' isn't offered (constant, cosine, linear are); the rate stays constant."
        draft.note("lost", given.shown(name), text)
    text = given.text(warmup)
    share = text.endswith("%")
    value = given.as_number(warmup, text.rstrip("%") or 0) or 0.0
    value = value / 100 if share else value
    if not value:
        return
    if not share and value >= 1:
        draft.set_("optim.warmup_steps", int(value), given.source(warmup))
    elif steps:
        warm = int(value * steps)
        draft.set_("optim.warmup_steps", warm, f"{given.source(warmup)} of {steps} steps")
    else:
        text = f"optim.warmup_steps must be set: {value:.0%} of trainer.max_steps."
        draft.note("check", given.shown(warmup), text)


def set_checkpoints(draft: Draft, every: int | None, source: str, keep: int | None) -> None:
    """Write how often a checkpoint is kept.   every: optimizer steps, None where it isn't known."""
    if every:
        draft.set_("checkpoint.every_n_steps", max(1, every), source)
        text = "A checkpoint holds all that a run goes on from, not only weights, so it is large."
        draft.note("changed", source.partition(" ")[0], text)
    if keep:
        draft.set_("checkpoint.keep_last", max(1, keep), "")


def prompts_of_file(file: str) -> list[str]:
    """Texts of a prompt file, one per line, without the options after `--`; empty where it can't be read."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    if not file.endswith(".txt"):
        return []
    texts = [line.partition(" --")[0].strip() for line in lines if not line.startswith("#")]
    return [text for text in texts if text]


def set_prompts(
    draft: Draft, prompts: Sequence[str], every: int | None, family: str, *, source: str
) -> None:
    """Write prompts and how often pictures are made; editing models need control pictures, so they get none."""
    if not prompts:
        return
    if family == "qwen_image_edit":
        text = "Not written: each prompt needs a control picture, in sample.control_images."
        draft.note("check", source, text)
        return
    draft.set_("sample.prompts", list(prompts), source)
    if every:
        draft.set_("sample.every_n_steps", every, source)


def set_sources(draft: Draft, sources: Sequence[tuple[str, int]], source: str) -> None:
    """Write the data: one folder as `data.path`, several as `data.sources`.   sources: (folder or file, repeats)."""
    if not sources:
        draft.set_("data.path", MUST_BE_GIVEN, "the pictures")
        draft.note(
            "check", source, "data.path must be given: a folder of pictures, or a metadata file."
        )
    elif len(sources) == 1:
        draft.set_("data.path", sources[0][0], source)
        steps = draft.value("trainer.max_steps")
        if sources[0][1] > 1 and (steps is None or sources[0][1] <= steps):
            draft.set_("data.repeats", sources[0][1], source)
    else:
        listed = [{"path": path, "repeats": repeats} for path, repeats in sources]
        draft.set_("data.path", None, "several sources instead")
        draft.set_("data.sources", listed, source)
