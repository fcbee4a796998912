"""Planned tensors as they come out of their files, in the form in which they rest."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from framework.errors import PlanError
from framework.inventory import StoredTensor, read_file_header
from framework.plan.published import published_scaling
from framework.plan.types import (
    ComponentPlan,
    Scaling,
    StorageDtype,
    StoredScale,
    TensorGroup,
    TensorPlan,
    scale_shape,
)
from framework.runtime.streaming import PART_BYTES, TORCH_DTYPES, Part, read_parts, read_tensor
from framework.storage.fp8 import dequantise, encode_e4m3, has_nan_codes
from framework.storage.weights import StoredWeight

RESTING_DTYPES: dict[StorageDtype, torch.dtype] = {
    "fp8_e4m3": torch.uint8,  # codes are held as bytes
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class TensorSource:
    """A planned tensor and where it lies now.

    stored: on this machine; a part of a tensor where the plan has an excerpt.
    scale: the published scale of FP8 values, if the file has one.
    is_own: the file was written by `use_converted`, which looked for NaN.
    """

    group: TensorGroup
    tensor: TensorPlan
    stored: StoredTensor
    scale: StoredTensor | None
    is_own: bool = False


def match_files(plan: ComponentPlan, folder: Path) -> list[TensorSource]:
    """Pair planned tensors with the files as they are now; they must not have changed since the plan was made.

    folder: of the component, on this machine.   Raises PlanError where something changed, SourceError for bad files.
    """
    headers = _headers(plan, folder)
    own = None if plan.converted_dir is None else Path(plan.converted_dir).expanduser().absolute()
    return [
        TensorSource(
            group,
            tensor,
            _find(headers, tensor.source_key, tensor, plan.name),
            None
            if tensor.published_scale is None
            else _find(headers, tensor.published_scale.key, tensor.published_scale, plan.name),
            is_own=own is not None and Path(tensor.file).parent == own,
        )
        for group in plan.groups
        for tensor in group.tensors
    ]


def read_resting(
    sources: Iterable[TensorSource],
    device: torch.device,
    on_progress: Callable[[int], None] | None = None,
) -> Generator[tuple[TensorSource, StoredWeight], None, None]:
    """Yield each tensor in the form in which it rests, in the order in which they lie in the files.

    It lies on `device`, with memory of its own; but a tensor that moves may lie elsewhere or share the buffer of the
    next one: put it where it rests before asking for that.
    on_progress: called with the bytes read since the last call.
    Memory, beside what is yielded: a few MB where the host keeps or encodes what it reads, else the largest tensor.
    Raises PlanError for values that can't be stored as planned, SourceError for files that can't be read.
    """
    ordered = sorted(sources, key=lambda source: (source.stored.file, source.stored.start))
    by_key = {_place(source.stored): source for source in ordered}
    parts = [part for source in ordered for part in _parts(source, device)]
    encoded: _Encoded | None = None
    for part, values in read_parts(parts):
        source = by_key[_place(part.tensor)]
        if part.rows is None:
            yield source, _resting(source, values, device)
        else:
            encoded = encoded or _Encoded(source)
            encoded.add(part.rows, values)
            if sum(part.rows) == source.stored.shape[0]:
                yield source, encoded.weight
                encoded = None
        if on_progress is not None:
            on_progress(part.num_bytes)


def _place(stored: StoredTensor) -> tuple[str, str, int]:
    """What tells a stored tensor, or a part of one, from all others."""
    return stored.file, stored.key, stored.start


def _parts(source: TensorSource, device: torch.device) -> Iterator[Part]:
    """How a tensor is read: some rows at a time where each can be encoded by itself, else whole."""
    stored, group = source.stored, source.group
    by_rows = group.scaling in ("row", "block", "none") and stored.dtype != "F8_E4M3"
    by_rows = by_rows and stored.order == "as_stored"
    if not by_rows or device.type != "cpu" or stored.num_bytes <= PART_BYTES:
        yield Part(stored, keeps=_rests_as_read(source, device))
        return
    high = group.block_shape[0] if group.block_shape is not None else 1
    row_of_blocks = high * stored.num_bytes // stored.shape[0]
    step = high * max(1, PART_BYTES // row_of_blocks)
    for first in range(0, stored.shape[0], step):
        yield Part(stored, (first, min(step, stored.shape[0] - first)))


class _Encoded:
    """A weight that is encoded while its rows come in."""

    def __init__(self, source: TensorSource) -> None:
        group, shape = source.group, source.tensor.shape
        scales = scale_shape(shape, group.scaling, group.block_shape)
        self._source = source
        self.weight = StoredWeight(
            torch.empty(shape, dtype=torch.uint8, device="cpu"),
            None if scales is None else torch.empty(scales, dtype=torch.float32, device="cpu"),
            group.block_shape,
        )

    def add(self, rows: tuple[int, int], values: Tensor) -> None:
        """Encode some rows.   rows: the first, a multiple of the block's, and their number."""
        scale = _encode_(self._source, values, self.weight.values.narrow(0, *rows))
        if scale is not None:
            assert self.weight.dequant_scale is not None
            block_shape = self._source.group.block_shape
            high = 1 if block_shape is None else block_shape[0]
            self.weight.dequant_scale.narrow(0, rows[0] // high, scale.shape[0]).copy_(scale)


def _rests_as_read(source: TensorSource, device: torch.device) -> bool:
    """Whether the bytes of the file are those that rest, in host memory: then no buffer stands between them."""
    resting = RESTING_DTYPES[source.group.states.onload.storage_dtype]
    in_file = TORCH_DTYPES[source.stored.dtype]
    if in_file == torch.float8_e4m3fn:
        in_file = torch.uint8
    return device.type == "cpu" and resting == in_file and not source.group.moves


def _resting(source: TensorSource, values: Tensor, device: torch.device) -> StoredWeight:
    """A tensor of a file in the form in which it rests; encoded on the device, where that is faster."""
    group = source.group
    kept = _rests_as_read(source, device)
    if group.scaling is not None:
        if source.stored.dtype != "F8_E4M3":
            return _encode(source, values, device)
        codes = _codes(source, values)
        return StoredWeight(
            codes if kept or group.moves else codes.to(device, copy=True),
            _published_scale(source, device),
            group.block_shape,
        )
    dtype = RESTING_DTYPES[group.states.onload.storage_dtype]
    if source.scale is not None:
        weight = values.to("cpu" if device.type == "mps" else device)
        return StoredWeight(_dequantised(source, weight, dtype).to(device))
    if group.moves:
        return StoredWeight(values.to(dtype))
    return StoredWeight(values if kept else values.to(device=device, dtype=dtype, copy=True))


def _encode(source: TensorSource, values: Tensor, device: torch.device) -> StoredWeight:
    # Apple's GPU knows no FP8: the host encodes for it.
    values = values.to("cpu" if device.type == "mps" else device)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    scale = _encode_(source, values, codes)
    return StoredWeight(
        codes.to(device), None if scale is None else scale.to(device), source.group.block_shape
    )


def _encode_(source: TensorSource, values: Tensor, codes: Tensor) -> Tensor | None:
    """Write the codes of a weight, or of some rows of it; returns their scale."""
    group, tensor = source.group, source.tensor
    assert group.scaling is not None
    try:
        return encode_e4m3(values, group.scaling, group.block_shape, out=codes)[1]
    except ValueError as error:
        hint = "set fp8.scaling=row" if group.scaling == "none" else "the checkpoint is damaged"
        raise PlanError(f"{tensor.source_key}: {error}", where=tensor.file, hint=hint) from error


def _codes(source: TensorSource, values: Tensor) -> Tensor:
    """FP8 values of a file as codes, sharing their memory; kept as they are, for encoding again would add error."""
    codes = values.view(torch.uint8)
    if not source.is_own and has_nan_codes(codes):
        raise PlanError(f"{source.tensor.source_key} holds NaN", where=source.stored.file)
    return codes


def _published_scale(source: TensorSource, device: torch.device) -> Tensor | None:
    """The file's scale in the shape that the codec gives to its own."""
    if source.scale is None:
        return None
    scale = read_tensor(source.scale).float()
    if not bool(torch.isfinite(scale).all()):
        raise PlanError(f"{source.scale.key} isn't finite", where=source.scale.file)
    scaling, block_shape = _scaling(source)
    shape = scale_shape(source.tensor.shape, scaling, block_shape)
    assert shape is not None
    return scale.reshape(shape).to(device)


def _dequantised(source: TensorSource, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight that is FP8 in the file and rests in another number format: its scale is multiplied in."""
    block_shape = _scaling(source)[1]
    scale = _published_scale(source, values.device)
    return dequantise(_codes(source, values), scale, dtype, block_shape)


def _scaling(source: TensorSource) -> tuple[Scaling, tuple[int, int] | None]:
    """How the file's scale belongs to the values."""
    if source.group.scaling is not None:
        return source.group.scaling, source.group.block_shape
    assert source.scale is not None
    fitting = published_scaling(source.tensor.shape, source.scale.shape)
    assert fitting is not None  # a plan with any other scale isn't made
    return fitting


def _find(
    headers: dict[str, dict[str, StoredTensor]],
    key: str,
    planned: TensorPlan | StoredScale,
    component: str,
) -> StoredTensor:
    """The planned tensor, or the part of one, in the files as they are now."""
    excerpt = planned.excerpt
    shape = planned.shape if excerpt is None else excerpt.stored_shape
    stored = headers[planned.file].get(key)
    if stored is None or (stored.shape, stored.dtype) != (shape, planned.source_dtype):
        found = f"{stored.dtype} {list(stored.shape)}" if stored else "no such tensor"
        raise PlanError(
            f"the files of {component} changed since the plan was made: {key}",
            where=planned.file,
            found=found,
            hint="run the command again",
        )
    return stored.cut_like(planned.shape, excerpt)


def _headers(plan: ComponentPlan, folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """File as the plan names it -> its tensors by key; a bare name is that of a file fetched to the folder since."""
    tensors = [tensor for group in plan.groups for tensor in group.tensors]
    scales = [tensor.published_scale for tensor in tensors]
    files = {tensor.file for tensor in tensors} | {scale.file for scale in scales if scale}
    return {file: read_file_header(folder / file) for file in sorted(files)}
