"""Recognises FP8 weights as other programs publish them: which tensor is whose scale, and what is of no use here.

In all of these layouts weight = codes * scale. They differ in what lies beside `<layer>.weight` of F8_E4M3:

- nothing: a plain cast.
- `<layer>.scale_weight`, one number; `<layer>.scale_input`; a marker `scaled_fp8`: ComfyUI at first
  (comfy/ops.py `scaled_fp8_ops`; comfy/utils.py `convert_old_quants` turns it into the next one).
- `<layer>.weight_scale`, one number; `<layer>.input_scale`; `<layer>.comfy_quant`, JSON as bytes: ComfyUI since
  (QUANTIZATION.md, comfy/quant_ops.py).
- `<layer>.scale_weight` of shape (1,), (O, 1) or (O, blocks, 1): musubi-tuner
  (src/musubi_tuner/modules/fp8_optimization_utils.py).
- `<layer>.weight_scale` of shape (O, 1): llm-compressor.
- `<layer>.weight_scale_inv`, no inverse for all its name, one for each 128 x 128 block: DeepSeek-V3 (arXiv:2412.19437).

Letters: O output rows (dimension 0), I everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, prod

from framework.inventory import StoredTensor
from framework.plan.types import BLOCK_SHAPE, Scaling, StoredScale

SCALE_NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")
"""What a weight's scale is called, beside `weight`."""

# Of no use where nothing is computed in FP8: scales of inputs, and notes for the program that wrote them.
_DROPPED_NAMES = ("scale_input", "input_scale", "activation_scale", "comfy_quant")
_MARKER = "scaled_fp8"
# Names that only formats with two levels of scales have, or ones that change the input as well.
_FOREIGN_NAMES = ("weight_scale_2", "scale_weight_tensor", "weight_scalar", "pre_quant_scale")
_SCALE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_PACKED = {"U8": "4-bit or 8-bit numbers in bytes", "I8": "8-bit integers", "F4": "4-bit numbers"}


@dataclass(frozen=True)
class PublishedTensors:
    """A component's tensors with the scales sorted out.

    tensors: key -> tensor, in the order given.   scales: key of a weight -> its scale.
    problems: what can't be understood, one sentence each.
    """

    tensors: dict[str, StoredTensor]
    scales: dict[str, StoredScale] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_published(
    stored: Mapping[str, StoredTensor], *, ignored_keys: Sequence[str] = ()
) -> PublishedTensors:
    """Sort the tensors of a component's files into weights and what lies beside them. Reads no file.

    ignored_keys: globs over keys that the family never loads; they are left out.
    A name counts as a scale only beside a `weight`, so that a module's own parameter of such a name stays.
    """
    plain = {
        key: tensor
        for key, tensor in stored.items()
        if not any(fnmatchcase(key, glob) for glob in ignored_keys)
    }
    found = PublishedTensors({})
    strange: dict[str, list[str]] = {}
    is_marked = any(tensor.dtype.startswith("F8") for tensor in plain.values())
    for key, tensor in plain.items():
        layer, _, leaf = key.rpartition(".")
        weight = plain.get(f"{layer}.weight" if layer else "weight")
        if leaf == _MARKER and is_marked:
            continue
        if weight is None or leaf not in (*SCALE_NAMES, *_DROPPED_NAMES, *_FOREIGN_NAMES):
            found.tensors[key] = tensor
        elif (problem := _problem(leaf, tensor, weight)) is not None:
            strange.setdefault(problem, []).append(key)
        elif leaf in SCALE_NAMES:
            weight_key = f"{layer}.weight" if layer else "weight"
            if weight_key in found.scales:
                strange.setdefault("there is another scale beside it", []).append(key)
            found.scales[weight_key] = StoredScale(
                key=tensor.key, file=tensor.file, shape=tensor.shape, source_dtype=tensor.dtype
            )
    for problem, keys in strange.items():
        more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
        found.problems.append(f"{', '.join(keys[:2])}{more}: {problem}")
    return found


def published_scaling(
    shape: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[Scaling, tuple[int, int] | None] | None:
    """How a scale of a published shape belongs to a weight: scaling and block shape; None where it fits in no way.

    shape: of the weight, output dimension first.   scale: of the scale as it lies in the file.
    """
    rows, columns = shape[0], prod(shape[1:])
    if prod(scale) == 1:
        return "tensor", None
    if prod(scale) == scale[0] == rows:
        return "row", None
    if len(scale) == 3 and scale[2] == 1:
        scale = scale[:2]
    if len(scale) != 2 or not all(scale):
        return None
    high, wide = BLOCK_SHAPE
    if scale == (ceil(rows / high), ceil(columns / wide)):
        return "block", BLOCK_SHAPE
    # Blocks of another size are known only where they divide the weight.
    if rows % scale[0] or columns % scale[1]:
        return None
    return "block", (rows // scale[0], columns // scale[1])


def without_prefix(
    stored: Mapping[str, StoredTensor], prefixes: Sequence[str]
) -> dict[str, StoredTensor]:
    """Tensors of one component, without the prefix of its keys, where a file holds a whole checkpoint.

    prefixes: that it may have; the first that is there counts. Where none is, all tensors are returned as they are.
    """
    for prefix in prefixes:
        inside = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        if inside:
            return inside
    return dict(stored)


def _problem(leaf: str, tensor: StoredTensor, weight: StoredTensor) -> str | None:
    """Why a tensor beside a weight can't be used; None if it can, or needn't be."""
    if leaf in _DROPPED_NAMES:
        return None
    if weight.dtype in _PACKED:
        return f"the weight is stored as {_PACKED[weight.dtype]}, of which nothing is read here"
    if weight.dtype != "F8_E4M3":
        return f"a scale beside a weight of {weight.dtype}; only F8_E4M3 weights have one"
    if leaf in _FOREIGN_NAMES:
        return "two levels of scales, or scaled inputs, can't be read"
    if tensor.dtype not in _SCALE_DTYPES:
        return f"a scale of {tensor.dtype} can't be read, only float ones"
    if published_scaling(weight.shape, tensor.shape) is None:
        return f"a scale {list(tensor.shape)} belongs to no rows or blocks of a weight {list(weight.shape)}"
    return None
