"""Which family and checkpoint another trainer's model is here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from framework.migrate.draft import Draft

COMPONENTS = ("dit", "dit_2", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is known.   refuse: why it can't be trained here; "" where it can."""

    family: str = ""
    source: str = ""
    refuse: str = ""


@dataclass(frozen=True)
class ModelFile:
    """One file or pattern that a person named.   repository: "" for a local file."""

    repository: str
    pattern: str
    component: str

    @property
    def text(self) -> str:
        """As it is written in DiffSynth-Studio's flags."""
        return f"{self.repository}:{self.pattern}" if self.repository else self.pattern


@cache
def _tables() -> dict[str, Any]:
    file = Path(__file__).with_name("models.yaml")
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def family_facts(family: str) -> Mapping[str, Any]:
    """What `models.yaml` says of a family."""
    facts: Mapping[str, Any] = _tables()["families"][family]
    return facts


def families() -> tuple[str, ...]:
    """Every family that a recipe can be made for."""
    return tuple(_tables()["families"])


def known_checkpoint(name: str) -> Checkpoint | None:
    """The checkpoint behind a hub id, or behind a folder that ends in one; None for one that isn't known."""
    name = name.strip().rstrip("/")
    for row in _tables()["checkpoints"]:
        found = re.fullmatch(row["id"], name)
        if found is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            found = re.fullmatch(row["id"], "/".join(name.split("/")[-2:]))
        if found is None:
            continue
        source = found.expand(row["source"]) if "source" in row else ""
        return Checkpoint(row.get("family", ""), source, row.get("refuse", ""))
    return None


def component_of(pattern: str) -> str:
    """The component whose weights a file holds, by its name; "" where that isn't told."""
    for row in _tables()["components"]:
        if re.search(row["file"], pattern, re.IGNORECASE):
            return str(row["component"])
    return ""


def layer_names(names: Sequence[str], family: str) -> list[str]:
    """LoRA targets as the layers are called here, each once, in order."""
    table = _tables()["layers"].get(family, {})
    return list(dict.fromkeys(here for name in names for here in table.get(name, [name])))


def unknown_model(draft: Draft, name: str, where: str, found: str) -> None:
    """Refuse a model that no family covers."""
    checkpoint = known_checkpoint(found)
    reason = f": {checkpoint.refuse}" if checkpoint is not None and checkpoint.refuse else ""
    draft.refuse(
        name,
        f"no recipe can be made for the model '{found}'{reason}",
        hint=f"Families that can be trained: {', '.join(families())}. If it is one of them, say so with --family.",
        where=where,
    )


def set_files(draft: Draft, files: Sequence[ModelFile], source: str, *, family: str) -> str:
    """Write `model.family` and the sources for files of one or several repositories; returns the family, "" if none.

    source: what to write behind the keys.   family: as the person gave it, "" to find it.
    The repository of the transformer gives all components where it is a whole checkpoint that is known; where it isn't,
    another known repository does, and the transformer alone comes from there.
    """
    repositories = list(dict.fromkeys(f.repository for f in files if f.repository))
    known = {name: found for name in repositories if (found := known_checkpoint(name))}
    main = next((f.repository for f in files if f.component in ("dit", "dit_2")), "")
    if main in known and known[main].refuse:
        return ""
    usable = {name: found for name, found in known.items() if found.family}
    chosen = usable.get(main) or next(iter(usable.values()), None) or _named_in_paths(files)
    family = family or (chosen.family if chosen else "")
    if not family:
        return ""
    draft.set_("model.family", family, source)
    if chosen is not None:
        draft.set_("model.source", chosen.source, source)
        if chosen.source != main:
            text = f"{chosen.source} on the Hugging Face hub, the published layout of diffusers."
            draft.note("check", source, f"The checkpoint is {text}")
    else:
        default = str(family_facts(family)["default"])
        draft.set_("model.source", main or default, "tokenizers and configuration")
    for file in files:
        other = file.repository and file.repository not in usable and chosen is not None
        if file.component and (other or not file.repository):
            path = f"model.{file.component}.source"
            draft.set_(path, file.repository or file.pattern, source)
            text = (
                "must hold this component alone, as a .safetensors file or in the published layout."
            )
            draft.note("check", file.text, f"{path}: {file.repository or file.pattern} {text}")
    return family


def _named_in_paths(files: Sequence[ModelFile]) -> Checkpoint | None:
    """The known checkpoint whose id is part of a local path, as in models/Qwen/Qwen-Image/transformer/x.safetensors."""
    for file in files:
        parts = [] if file.repository else file.pattern.split("/")
        for owner, name in pairwise(parts):
            found = known_checkpoint(f"{owner}/{name}")
            if found is not None and found.family:
                return found
    return None


def kohya_targets(family: str) -> list[str]:
    """Layers that kohya's trainers give a LoRA, as they are called here; empty for the family's own list."""
    return list(_tables()["targets"].get(family, ()))
