"""What lies in a component's safetensors files: names, shapes, dtypes, offsets. Reads no weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from framework.errors import SourceError

# A larger header is surely not one; the format itself allows no more.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = (
    'convert them once: python -c "import torch; from safetensors.torch import save_file; '
    "d = torch.load('{name}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
    "save_file({{k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'dtype')}}, '{stem}.safetensors')\""
)
_VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|model)"
    r"(?:\.(?P<a>[\w-]+?)(?:-\d{5}-of-\d{5})?|-\d{5}-of-\d{5}\.(?P<b>[\w-]+))\.safetensors"
)
_NULL = ("null",)
_INDEX_VARIANT = re.compile(
    r"[\w-]+(?:\.(?P<a>[\w-]+))?\.safetensors\.index(?:\.(?P<b>[\w-]+))?\.json"
)

ELEMENT_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits per element of the safetensors dtypes."""

Order = Literal["as_stored", "halves_swapped", "transposed"]


@dataclass(frozen=True)
class Excerpt:
    """How a tensor is taken from one in a file, where other programs join, reshape or reorder what is apart here.

    stored_shape: of the whole tensor in the file.   first_row: along dimension 0.
    order: of what begins there: as it is; with its two halves along dimension 0 in the other order; or transposed.
    """

    stored_shape: tuple[int, ...]
    first_row: int = 0
    order: Order = "as_stored"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, or rows of one.

    file: path of the file; its bare name where it has not been fetched.
    shape: as it is used, also where `excerpt` says that the file has another.
    dtype: safetensors name, e.g. "BF16", "F8_E4M3".
    start, end: byte offsets in the file.   excerpt: None for a whole tensor as it is.
    """

    key: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int
    excerpt: Excerpt | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    @property
    def order(self) -> Order:
        """In which order its bytes lie in the file."""
        return "as_stored" if self.excerpt is None else self.excerpt.order

    def cut(
        self, shape: tuple[int, ...], *, first_row: int = 0, order: Order = "as_stored"
    ) -> StoredTensor:
        """Part of a whole tensor: a range of its bytes, so that only that is read.

        shape: of the part; its elements are those of whole rows that begin at `first_row`.
        """
        row_bytes = self.num_bytes // self.shape[0] if first_row else 0
        start = self.start + first_row * row_bytes
        end = start + prod(shape) * ELEMENT_BITS[self.dtype] // 8
        assert end <= self.end, (self, shape, first_row)
        excerpt = Excerpt(self.shape, first_row, order)
        return replace(self, shape=shape, start=start, end=end, excerpt=excerpt)

    def cut_like(self, shape: tuple[int, ...], excerpt: Excerpt | None) -> StoredTensor:
        """The part of a whole tensor that was cut before; itself where nothing was."""
        if excerpt is None:
            return self
        return self.cut(shape, first_row=excerpt.first_row, order=excerpt.order)


def read_inventory(folder: Path, *, variant: str | None = None) -> dict[str, StoredTensor]:
    """Read the headers of all safetensors files of a component, sharded or not.

    variant: "fp16" for `model.fp16.safetensors`; None for the files without such a part in their names.
    Returns key -> StoredTensor in the order of the files.
    Raises SourceError: no safetensors file (or only pickles), none of that variant, a shard named by the index is
    missing, a file is cut short, a header is damaged, the index and the shards disagree.
    """
    index = find_index(folder, variant=variant)
    if index is None:
        return _read_single(folder, variant)
    weight_map = read_index(index)
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(set(weight_map.values()))} weight files are missing: {', '.join(missing[:5])}",
            where=str(folder),
            hint="fetch the checkpoint again; an interrupted download goes on where it stopped",
        )
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors.update(read_file_header(folder / name))
    check_index(weight_map, tensors, where=str(index))
    return tensors


def find_index(folder: Path, *, variant: str | None = None) -> Path | None:
    """Path of the component's `*.safetensors.index.json`, or of that of a variant; None if there is none."""
    names = [path.name for path in folder.glob("*.safetensors.index*.json")]
    found = choose_index(names, variant)
    return None if found is None else folder / found


def choose_index(names: Sequence[str], variant: str | None) -> str | None:
    """Of file names, that of the index of a variant, as `x.safetensors.index.fp16.json` or the other way round."""
    found = [
        name
        for name in sorted(names)
        if (match := _INDEX_VARIANT.fullmatch(name)) and (match["a"] or match["b"]) == variant
    ]
    return min(found, key=len) if found else None


def file_variant(name: str) -> str | None:
    """Variant in the name of a weight file: "fp16" of `model.fp16.safetensors` and its shards; None if there is none.

    Only names that diffusers and transformers give have one; `wan_2.1_vae.safetensors` has none.
    """
    match = _VARIANT.fullmatch(name)
    return None if match is None else match["a"] or match["b"]


def list_variants(names: Sequence[str]) -> list[str]:
    """Variants that these weight files and indexes are of, sorted."""
    indexes = (_INDEX_VARIANT.fullmatch(name) for name in names)
    found = {file_variant(name) for name in names} | {m["a"] or m["b"] for m in indexes if m}
    return sorted(variant for variant in found if variant)


def read_index(index: Path) -> dict[str, str]:
    """Read key -> file name from an index file."""
    try:
        return parse_index(index.read_text(encoding="utf-8"), where=str(index))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            "the index of weight files can't be read", where=str(index), found=str(error)
        ) from error


def parse_index(text: str, *, where: str) -> dict[str, str]:
    """Parse an index; file names with a folder in them are refused."""
    try:
        weight_map = json.loads(text)["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            "the index of weight files isn't valid",
            where=where,
            found=str(error),
            hint="fetch the checkpoint again",
        ) from error
    strange = sorted(str(n) for n in names if not isinstance(n, str) or Path(n).name != n)
    if strange:
        raise SourceError(
            f"the index names files outside its folder: {', '.join(strange[:3])}", where=where
        )
    return dict(weight_map)


def check_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor], *, where: str
) -> None:
    """Raise SourceError where the index promises a tensor that its file doesn't hold."""
    lost = [
        k
        for k, name in weight_map.items()
        if k not in tensors or Path(tensors[k].file).name != name
    ]
    if lost:
        raise SourceError(
            f"{len(lost)} tensors are not in the file that the index names for them: {', '.join(lost[:3])}",
            where=where,
            found=f"{len(tensors)} tensors in {len(set(weight_map.values()))} files",
            hint="fetch the checkpoint again",
        )


def read_file_header(path: Path) -> dict[str, StoredTensor]:
    """Read one file's header and compare its offsets with the file's size.

    Layout: 8 bytes length N (little-endian), N bytes JSON, then the data; offsets in the JSON count from there.
    Raises SourceError for a pickle, for what isn't safetensors, and for a file that is damaged or cut short.
    """
    if path.suffix in _PICKLE_SUFFIXES:
        raise pickle_error(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise SourceError(
                    "the weight file is a Git LFS pointer, not the weights",
                    where=str(path),
                    hint="run `git lfs pull` in the checkpoint's folder",
                )
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise _damaged(path, "no safetensors header")
            if 8 + length > size:
                raise _truncated(path, f"{size} bytes, header alone needs {8 + length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(
            "the weight file can't be read", where=str(path), found=str(error)
        ) from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    tensors = parse_header(header, file=str(path), data_start=8 + length, where=str(path))
    for tensor in tensors.values():
        if tensor.end > size:
            raise _truncated(path, f"{size} bytes, but {tensor.key} ends at {tensor.end}")
    return tensors


def parse_header(header: Any, *, file: str, data_start: int, where: str) -> dict[str, StoredTensor]:
    """Turn a header's JSON into tensors; shape, dtype and length of each must agree."""
    if not isinstance(header, dict):
        raise _damaged(Path(where), "the header isn't an object")
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(Path(where), f"entry of {key}: {error}") from error
        if dtype not in ELEMENT_BITS:
            raise SourceError(
                f"{key} has the unknown dtype {dtype}", where=where, hint="convert the file to bf16"
            )
        if min((start, *shape)) < 0 or 8 * (end - start) != prod(shape) * ELEMENT_BITS[dtype]:
            raise _damaged(Path(where), f"{key}: {dtype} {list(shape)} in {end - start} bytes")
        tensors[key] = StoredTensor(key, file, shape, dtype, data_start + start, data_start + end)
    return tensors


def pickle_error(path: Path) -> SourceError:
    """What is said of a pickled checkpoint."""
    return SourceError(
        "pickled weights can run code and are never read",
        where=str(path),
        hint=_CONVERT.format(name=path.name, stem=path.stem),
    )


def _read_single(folder: Path, variant: str | None) -> dict[str, StoredTensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p for p in folder.glob("*") if p.suffix in _PICKLE_SUFFIXES)
        if not pickles:
            raise SourceError(
                "no safetensors file in the folder",
                where=str(folder),
                hint="fetch the checkpoint again",
            )
        raise SourceError(
            "no safetensors file in the folder",
            where=str(folder),
            found=f"only pickled weights ({', '.join(p.name for p in pickles[:3])}), which can run code and are "
            "never read",
            hint=_CONVERT.format(name=pickles[0].name, stem=pickles[0].stem),
        )
    return read_file_header(folder / choose_single([f.name for f in files], variant, str(folder)))


def choose_single(names: Sequence[str], variant: str | None, where: str) -> str:
    """The one weight file of a variant among file names.   Raises SourceError where none or several could be meant."""
    fitting = [name for name in names if file_variant(name) == variant]
    if len(fitting) > 1:
        # `model.safetensors` beside files of other names: the one whose name has no further part.
        fitting = [name for name in fitting if name.count(".") == (1 if variant is None else 2)]
    if len(fitting) == 1:
        return fitting[0]
    variants = list_variants(names)
    if not fitting and (variants or variant):
        wanted = "no weights without a variant" if variant is None else f'no variant "{variant}"'
        raise SourceError(
            f"the folder holds {wanted}",
            where=where,
            found=f"variants: {', '.join(variants)}" if variants else "plain files alone",
            hint=" or ".join(
                f"set model.variant={name}" for name in (*variants[:1], *_NULL[variant is None :])
            ),
        )
    raise SourceError(
        f"{len(names)} safetensors files and no index that says which belong together",
        where=where,
        found=", ".join(names[:5]),
        hint="keep one file, add the `*.safetensors.index.json` that was published with them, or name the file itself "
        "in `source`",
    )


def _truncated(path: Path, found: str) -> SourceError:
    return SourceError(
        "the weight file is cut short",
        where=str(path),
        found=found,
        hint="delete this file and fetch the checkpoint again",
    )


def _damaged(path: Path, found: str) -> SourceError:
    return SourceError(
        "the weight file's header is damaged, or it isn't a safetensors file",
        where=str(path),
        found=found,
        hint="delete this file and fetch the checkpoint again",
    )
