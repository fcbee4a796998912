"""From the headers of a file in any known naming to published names, shapes and scales."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from math import prod

from framework.inventory import Order, StoredTensor
from framework.plan.native_names.form import NativeNames, Split
from framework.plan.native_names.tables import NAMES, prefixes_of
from framework.plan.published import (
    PublishedTensors,
    published_scaling,
    read_published,
    without_prefix,
)
from framework.plan.types import StoredScale
from framework.schema.family import ComponentSpec


def read_component(stored: Mapping[str, StoredTensor], spec: ComponentSpec) -> PublishedTensors:
    """Sort a component's tensors out of its files, under the keys that the published folder has. Reads no file.

    stored: of a folder or of a single file, which may hold more than this component.
    A tensor that other programs join is returned as its parts, each a range of the file's bytes, with its share of the
    scales beside it. Tensors that the family ignores, and keys of no use, are left out.
    """
    inside = without_prefix(stored, prefixes_of(spec))
    names = naming_of(inside, spec)
    if names is None:
        return read_published(inside, ignored_keys=spec.ignored_keys)
    plain = read_published(_useful(inside, names), ignored_keys=spec.ignored_keys)
    found = _Translated(names, spec, plain)
    renames = (*(names.numbered(plain.tensors) if names.numbered else ()), *names.renames)
    for key, tensor in plain.tensors.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        found.add(name, tensor, plain.scales.get(key))
    return found.result


def naming_of(keys: Mapping[str, StoredTensor], spec: ComponentSpec) -> NativeNames | None:
    """The naming that these keys are in; None where they are published names, or nothing known."""
    for names in NAMES:
        is_meant = spec.kind[1] in names.kinds and names.folder in ("", spec.subfolder)
        if is_meant and any(re.search(names.marker, key) for key in keys):
            return names
    return None


def _useful(inside: Mapping[str, StoredTensor], names: NativeNames) -> dict[str, StoredTensor]:
    """Without what is of no use, and each tensor that goes by two names once, by the one that is read."""
    found = {
        key: tensor
        for key, tensor in inside.items()
        if not (names.dropped and re.search(names.dropped, key))
    }
    for alias, key in names.aliases:
        if alias in found:
            found.setdefault(key, found.pop(alias))
    return found


class _Translated:
    """Gathers translated tensors."""

    def __init__(self, names: NativeNames, spec: ComponentSpec, plain: PublishedTensors) -> None:
        self._names = names
        self._ignored = spec.ignored_keys
        self.result = PublishedTensors({}, {}, list(plain.problems))

    def add(self, name: str, tensor: StoredTensor, scale: StoredScale | None) -> None:
        """Add one tensor of the file, or the parts that it is split into."""
        split = next((s for s in self._names.splits if re.search(s.pattern, name)), None)
        if split is None:
            self._put(name, self._reordered(name, tensor), tensor, scale)
            return
        if not tensor.shape or tensor.shape[0] % sum(split.shares):
            self.result.problems.append(
                f"{tensor.key} of shape {list(tensor.shape)} can't be split into {len(split.shares)} parts"
            )
            return
        for part, first, rows in _parts(split, tensor.shape[0]):
            cut = tensor.cut((rows, *tensor.shape[1:]), first_row=first)
            self._put(re.sub(split.pattern, part, name), cut, tensor, scale)

    def _reordered(self, name: str, tensor: StoredTensor) -> StoredTensor:
        names, shape = self._names, tensor.shape
        if names.swapped and re.search(names.swapped, name):
            return tensor.cut(shape, order="halves_swapped")
        if names.transposed and re.search(names.transposed, name) and len(shape) == 2:
            return tensor.cut(shape[::-1], order="transposed")
        if names.flattened and re.search(names.flattened, name) and len(shape) > 2:
            return tensor.cut(shape[:2])
        return tensor

    def _put(
        self, name: str, tensor: StoredTensor, whole: StoredTensor, scale: StoredScale | None
    ) -> None:
        result = self.result
        if any(fnmatchcase(name, glob) for glob in self._ignored):
            return
        if name in result.tensors:
            result.problems.append(f"{result.tensors[name].key} and {tensor.key} are both {name}")
            return
        result.tensors[name] = tensor
        if scale is None:
            return
        share = _share_of(scale, tensor, whole)
        if share is None:
            result.problems.append(
                f"{scale.key} of shape {list(scale.shape)} can't be divided among the parts of {whole.key}"
            )
        else:
            result.scales[name] = share


def _parts(split: Split, rows: int) -> Iterator[tuple[str, int, int]]:
    """Name, first row and number of rows of each part."""
    unit = rows // sum(split.shares)
    first = 0
    for name, share in zip(split.names, split.shares, strict=True):
        yield name, first, share * unit
        first += share * unit


def _share_of(scale: StoredScale, part: StoredTensor, whole: StoredTensor) -> StoredScale | None:
    """The part of a scale that belongs to part of its weight; None where that is no part of it."""
    if part is whole or prod(scale.shape) == 1:
        return scale
    order: Order = part.order
    fitting = published_scaling(whole.shape, scale.shape)
    if order == "transposed" or fitting is None or part.excerpt is None:
        return None
    block_shape = fitting[1]
    high = 1 if block_shape is None else block_shape[0]
    first, rows = part.excerpt.first_row, part.shape[0]
    if first % high or (rows // 2 if order == "halves_swapped" else rows) % high:
        return None
    shape = (rows // high, *scale.shape[1:])
    if published_scaling(part.shape, shape) != fitting:
        return None
    return scale.cut(shape, first_row=first // high, order=order)
