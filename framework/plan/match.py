"""Which module name a stored tensor has, what kind of layer owns it, and which layers a pattern means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from framework.errors import Fault
from framework.plan.types import TensorKind
from framework.schema.families import ComponentSpec


def module_name(key: str, spec: ComponentSpec) -> str | None:
    """Name in the module of a tensor called `key` in the file; None for one that the family never loads."""
    if any(fnmatchcase(key, glob) for glob in spec.ignored_keys):
        return None
    for pattern, replacement in spec.renames:
        name, count = re.subn(pattern, replacement, key, count=1)
        if count:
            return name
    return key


def tensor_kind(name: str, shape: tuple[int, ...], spec: ComponentSpec) -> TensorKind:
    """Kind of layer that a tensor is the weight of, as far as name and shape tell; "other" for all else."""
    layer, _, leaf = name.rpartition(".")
    if leaf != "weight" or not layer:
        return "other"
    if len(shape) == 2:
        return "embedding" if matches_any(layer, spec.embedding_globs) else "linear"
    return "conv" if len(shape) in (4, 5) else "other"


def matches(layer: str, glob: str) -> bool:
    """Whether a pattern means this layer: as a whole name, or as its ending (`attn.to_q`); `*` crosses dots.

    One that begins with `^` means whole names only: `^proj_out` isn't `blocks.0.proj_out`.
    """
    if glob.startswith("^"):
        return fnmatchcase(layer, glob[1:])
    return fnmatchcase(layer, glob) or fnmatchcase(layer, f"*.{glob}")


def matches_any(layer: str, globs: Iterable[str]) -> bool:
    """Whether one of the patterns means this layer."""
    return any(matches(layer, glob) for glob in globs)


def select_layers(
    globs: Sequence[str],
    layers: Mapping[str, object],
    *,
    path: str,
    what: str,
    component: str,
) -> tuple[set[str], list[Fault]]:
    """Resolve patterns to layers; each pattern that means none of them is a fault.

    path: of the list in the configuration.   what: kind of the layers, for the message ("linear layers").
    """
    chosen: set[str] = set()
    faults = []
    for index, glob in enumerate(globs):
        found = {layer for layer in layers if matches(layer, glob)}
        chosen |= found
        if not found:
            faults.append(
                Fault(
                    path=f"{path}[{index}]",
                    message=f'"{glob}" matches 0 of {len(layers)} {what} in {component}',
                    nearest=nearest_layers(glob, layers),
                    hint=f"Correct it, or list all with `octavo plan recipe=... --layers {component}`.",
                    code="layer-name",
                    value=glob,
                    allowed=f"names of {what} in {component}, endings of them, or globs",
                )
            )
    return chosen, faults


def nearest_layers(glob: str, layers: Iterable[str]) -> tuple[str, ...]:
    """Layer names, or endings of them, that are closest to a pattern that matches nothing; at most three."""
    endings: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        for start in range(len(parts)):
            if not parts[start].isdigit():
                endings.setdefault(".".join(parts[start:]))
    near = get_close_matches(glob, endings, n=12, cutoff=0.5)
    # Of `attn.to_q` and `0.attn.to_q` in every block, only the shortest says something new.
    kept: list[str] = []
    for name in near:
        if not any(name.endswith(f".{other}") or other.endswith(f".{name}") for other in kept):
            kept.append(name)
    return tuple(kept[:3])
