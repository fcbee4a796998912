"""The keys that a configuration may hold, and which of them a wrong key was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

# What other trainers call a key of ours, for people who come from there.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_steps",
    "optimizer": "optim.name",
    "optimizer_type": "optim.name",
    "train_batch_size": "data.batch_size",
    "resolution": "data.max_px",
    "image_dir": "data.path",
    "train_data_dir": "data.path",
    "instance_data_dir": "data.path",
    "pretrained_model_name_or_path": "model.source",
    "mixed_precision": "model.compute_dtype",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_train_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.max_steps",
    "epochs": "trainer.max_steps",
    "lora_rank": "model.dit.lora.rank",
    "lora_alpha": "model.dit.lora.alpha",
    "network_dim": "model.dit.lora.rank",
    "network_alpha": "model.dit.lora.alpha",
    "checkpointing_steps": "checkpoint.every_n_steps",
    "resume_from_checkpoint": "checkpoint.resume",
    "validation_prompt": "sample.prompts",
    "output_path": "run.output_dir",
    "save_dir": "run.output_dir",
    "transformer": "model.dit",
    "unet": "model.dit",
}
_NUM_NEAREST = 3


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation such as `LoraConfig | None`; None where it is a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated):
        found = (section_class(argument) for argument in get_args(annotation))
        return next((section for section in found if section is not None), None)
    return None


def field_annotation(root: type[BaseModel], pieces: Sequence[str | int]) -> Any:
    """Annotation of the key at `pieces`, e.g. ("model", "dit"); None where the schema has no such key."""
    annotation: Any = root
    for piece in pieces:
        section = section_class(annotation)
        if section is None or piece not in section.model_fields:
            return None
        annotation = section.model_fields[str(piece)].annotation
    return annotation


@cache
def known_paths(root: type[BaseModel]) -> tuple[str, ...]:
    """Dotted path of every section and key below `root`, sections before what they hold."""
    paths: list[str] = []
    for name, field in root.model_fields.items():
        paths.append(name)
        section = section_class(field.annotation)
        if section is not None:
            paths += [f"{name}.{below}" for below in known_paths(section)]
    return tuple(paths)


def nearest_paths(root: type[BaseModel], path: str) -> tuple[str, ...]:
    """Valid dotted paths that `path` was probably meant to be, best first, at most three.

    Considered in turn: a slip of the pen in the same section, a path cut short at the front, the same key in another
    section, another trainer's name for it, a slip anywhere.
    """
    paths = known_paths(root)
    parent, _, name = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in paths if p.rpartition(".")[0] == parent}
    found = [siblings[close] for close in difflib.get_close_matches(name, siblings, cutoff=0.6)]
    found += [p for p in paths if p.endswith(f".{path}")]
    found += [p for p in paths if p.rpartition(".")[2] == name]
    found += [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in paths else []
    if not found:
        found = difflib.get_close_matches(path, paths, n=_NUM_NEAREST, cutoff=0.75)
    if not found:
        by_name = {p.rpartition(".")[2]: p for p in reversed(paths)}
        found = [by_name[close] for close in difflib.get_close_matches(name, by_name, cutoff=0.75)]
    return tuple(dict.fromkeys(found))[:_NUM_NEAREST]
