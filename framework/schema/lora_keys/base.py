"""How layers are called in the LoRA files of other programs: the form in which each family's names are written down.

Our own names are those of the modules, which are diffusers' and transformers'. "Native" are those of the model's first
code, which ComfyUI and kohya's programs keep; there one layer may hold several of ours as slices of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

FormatName = Literal["peft", "diffusers", "kohya", "comfyui"]
FORMAT_NAMES: tuple[FormatName, ...] = ("peft", "diffusers", "kohya", "comfyui")


@dataclass(frozen=True)
class Rule:
    """One kind of layer under both of its names; `#` stands for a number, the same ones in the same order in both.

    ours, native: e.g. "transformer_blocks.#.attn.to_k" and "double_blocks.#.img_attn.qkv".
    slices: sizes of all row slices of the native layer, relative to each other; index: which of them ours is.
    swapped: whether the two halves of its rows lie the other way round there.
    kohya: False where kohya's form has no such layer, or one that readers lose.
    """

    ours: str
    native: str
    index: int = 0
    slices: tuple[int, ...] = (1,)
    swapped: bool = False
    kohya: bool = True


@dataclass(frozen=True)
class Naming:
    """How one format writes a component's layers.

    prefix: before the name.   native: whether the native names are used.
    flat: whether dots become underscores, with `lora_down`, `lora_up` and `alpha` instead of `lora_A` and `lora_B`.
    """

    prefix: str
    native: bool = False
    flat: bool = False


@dataclass(frozen=True)
class ComponentNames:
    """The names of one component's layers in every format.

    classes: of the modules that have these names.   diffusers: how diffusers' files write it.
    kohya, comfyui: None where that format has no LoRA for it; `lacking` says why.
    known: whether diffusers' own loader reads it (it ignores what it doesn't know).
    rules: every kind of layer that has a name elsewhere.   also: further prefixes that files have, dotted or flat.
    """

    classes: tuple[str, ...]
    diffusers: str
    rules: tuple[Rule, ...]
    kohya: Naming | None = None
    comfyui: Naming | None = None
    lacking: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilyNames:
    """All of a family.

    one_alpha: whether readers get layers wrong whose alpha isn't that of the rest of a kohya file.
    architecture: what `modelspec.architecture` calls it.   base_version: kohya's `ss_base_model_version`.
    network_module: the module of kohya's programs that reads the file.
    """

    components: Mapping[str, ComponentNames]
    architecture: str
    base_version: str
    network_module: str
    one_alpha: bool = False


@dataclass(frozen=True)
class NativePart:
    """A layer of ours under its native name: which slice it is."""

    name: str
    rule: Rule


def same(names: Iterable[str], *, kohya: bool = True) -> tuple[Rule, ...]:
    """Rules for layers that are called the same everywhere."""
    return tuple(Rule(name, name, kohya=kohya) for name in names)


def sliced(ours: Iterable[str], native: str, slices: tuple[int, ...]) -> tuple[Rule, ...]:
    """Rules for layers that are the row slices of one native layer, in its order."""
    return tuple(Rule(name, native, index, slices) for index, name in enumerate(ours))


def native_part(layer: str, rules: tuple[Rule, ...]) -> NativePart | None:
    """Where a layer of ours lies natively; None for one that no rule names."""
    for rule in rules:
        found = _pattern(rule.ours, False).fullmatch(layer)
        if found:
            return NativePart(_filled(rule.native, found.groups()), rule)
    return None


def our_layers(
    name: str, rules: tuple[Rule, ...], *, native: bool, flat: bool
) -> tuple[tuple[str, Rule], ...]:
    """Our layers that a name of a file stands for, in the order of its row slices; empty where no rule knows it."""
    found = []
    for rule in rules:
        written = rule.native if native else rule.ours
        match = _pattern(written, flat).fullmatch(name)
        if match:
            found.append((_filled(rule.ours, match.groups()), rule))
    return tuple(sorted(found, key=lambda pair: pair[1].index))


@cache
def _pattern(written: str, flat: bool) -> re.Pattern[str]:
    text = written.replace(".", "_") if flat else written
    return re.compile(re.escape(text).replace(r"\#", r"(\d+)").replace("#", r"(\d+)"))


def _filled(written: str, numbers: tuple[str, ...]) -> str:
    parts = written.split("#")
    return "".join(part + number for part, number in zip(parts, (*numbers, ""), strict=True))
