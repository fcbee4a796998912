"""The form in which it is said what other programs call a component's tensors, and how its file is told.

Published names are those of diffusers and transformers, as the component's folder in the published layout has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

Rename = tuple[str, str]
"""A regular expression, and what replaces each place where it matches."""

DIFFUSION_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI and older trainers put before the keys of a denoiser."""


@dataclass(frozen=True)
class Split:
    """A tensor whose rows belong to several layers.

    pattern: regular expression over the key as renamed; each of `names` replaces it in turn.
    shares: rows of each part, as proportions.
    """

    pattern: str
    names: tuple[str, ...]
    shares: tuple[int, ...]


@dataclass(frozen=True)
class NativeNames:
    """One way to name the tensors of a component, and how to get from there to published names.

    kinds: what the component's config.json may call it, the value of `ComponentSpec.kind`.
    folder: of the one component of that kind that it is for, in the published layout; "" for all of them.
    marker: regular expression that some key matches if the file has these names.
    renames: applied one after the other to every key.   numbered: makes further ones, applied before, of all keys.
    splits: at most one applies to a key.
    swapped, transposed, flattened: regular expressions over published names of tensors whose halves along dimension 0
    are in the other order, whose two dimensions are, or that are 1 x 1 convolutions of what is a linear layer here.
    aliases: (key, key): the first is the second by another name, and left out where both are there.
    dropped: regular expression over keys of no use.
    markers: key of a tensor without content -> what config.json must say where it is there.
    """

    kinds: frozenset[str]
    marker: str
    renames: tuple[Rename, ...] = ()
    numbered: Callable[[Collection[str]], tuple[Rename, ...]] | None = None
    splits: tuple[Split, ...] = ()
    swapped: str = ""
    transposed: str = ""
    flattened: str = ""
    folder: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    dropped: str = ""
    markers: tuple[tuple[str, tuple[str, object]], ...] = ()


@dataclass(frozen=True)
class Content:
    """How a file's keys tell what it holds.

    words: what it is, for messages.   kinds: as of `NativeNames`; none for what no component takes.
    keys: regular expressions, each of which some key matches from its beginning or behind a dot.
    without: one that no key matches.
    """

    words: str
    kinds: frozenset[str]
    keys: tuple[str, ...]
    without: str = ""
    hint: str = ""

    def is_in(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys holds it."""
        text = "\n".join(keys)
        found = all(re.search(rf"(?m)(?:^|\.){pattern}$", text) for pattern in self.keys)
        return found and not (self.without and re.search(rf"(?m)(?:^|\.){self.without}$", text))


@dataclass(frozen=True)
class FamilyNames:
    """What one file of this folder adds."""

    names: tuple[NativeNames, ...] = ()
    contents: tuple[Content, ...] = ()
    prefixes: dict[str, tuple[str, ...]] = field(default_factory=dict)
