"""Encoded pictures and captions on disk, each named by everything that made it: a stale entry can't be met.

An entry of text is a set of named tensors, since encoders give more than one ("embeds" (L, D), "pooled" (P,), …).

C, h, w: latent channels, height, width.   L, D: text tokens, text width.   P: width of a pooled embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from framework.data.files import write_atomic
from framework.data.images import IMAGE_TRANSFORM_VERSION
from framework.data.media import Bucket, Size
from framework.errors import RunError

Kind = Literal["latents", "control", "text"]

# Part of every key: raise it when the meaning of an entry changes.
CACHE_VERSION = 1
_TEXT_VERSION = 2  # of text entries alone: they became sets of named tensors
EMBEDS = "embeds"
"""The name that every text entry has: the unpadded embedding (L, D) of the caption."""
_VALUE = "value"
_CHECKSUM = "crc32"
_RESERVED = {_VALUE, _CHECKSUM, "mask"}  # a batch has a "text_mask" of its own


def encoder_identity(
    component: str, *, weights: str, storage: str, compute_dtype: str, code_version: int
) -> str:
    """Describe the encoder that makes entries; anything that changes its output must show here.

    component: "vae", "text_encoder".   weights: hash or commit and folder of the weights.
    storage: how they rest, e.g. "bf16" or "fp8 row".   compute_dtype: arithmetic.
    code_version: of the family's encode step.
    """
    return json.dumps([component, weights, storage, compute_dtype, code_version])


def latents_key(content_key: str, *, size: Bucket, encoder: str, fps: float | None = None) -> str:
    """Name the latents of a picture (by its content) scaled and cropped to `size` by `encoder`.

    size: (width, height), and for a clip its number of frames too.   fps: the rate that a clip was read at.
    """
    rate = [] if fps is None else [fps]
    return _digest("latents", content_key, list(size), IMAGE_TRANSFORM_VERSION, encoder, *rate)


def control_key(content_key: str, *, size: Size, encoder: str) -> str:
    """Name the latents of a control picture that is brought to `size` as a whole, without a crop."""
    return _digest("control", content_key, list(size), IMAGE_TRANSFORM_VERSION, encoder)


def text_key(caption: str, *, encoder: str, control_keys: Sequence[str] = ()) -> str:
    """Name the embedding of a caption or prompt by `encoder`.

    control_keys: contents of the control pictures that the encoder reads beside the caption.
    """
    return _digest("text", _TEXT_VERSION, caption, encoder, list(control_keys))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()


class EncodedCache:
    """A folder of encoded pictures and captions that runs and sweeps share.

    One safetensors file per entry, `<folder>/<kind>/<2 hex digits>/<key>.safetensors`, written to a temporary name and
    renamed: a killed process leaves no half entry. A cut or damaged entry counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: Kind, key: str) -> Path:
        """Where an entry lies, whether or not it exists."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def missing(self, kind: Kind, keys: Iterable[str]) -> list[str]:
        """Of these keys, those that have no entry or a cut one; each once, in order. Reads headers only."""
        return [key for key in dict.fromkeys(keys) if not self._is_whole(kind, key)]

    @overload
    def get(self, kind: Literal["text"], key: str) -> dict[str, Tensor] | None: ...

    @overload
    def get(self, kind: Literal["latents", "control"], key: str) -> Tensor | None: ...

    def get(self, kind: Kind, key: str) -> dict[str, Tensor] | Tensor | None:
        """Read an entry, on the CPU in the dtypes it was put; None when there is none.

        An entry whose checksum is wrong is removed, so that the next `missing` names it.
        """
        file = self.path(kind, key)
        try:
            # Read at once: safe_open opens the file twice, and another process may replace it in between.
            entry = load(file.read_bytes())
        except OSError:
            return None
        except (SafetensorError, ValueError, KeyError):
            entry = {}
        checksum = entry.pop(_CHECKSUM, None)
        if _fits(kind, entry) and checksum is not None and _checksum(entry) == checksum:
            return entry if kind == "text" else entry[_VALUE]
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def put(self, kind: Kind, key: str, value: Tensor | Mapping[str, Tensor]) -> None:
        """Keep an entry, any dtype, any device.

        value: latents of a picture (C, h, w) or clip (C, T, h, w), or, for kind "text", named tensors of one caption.
        Raises RunError for values that aren't finite (they would spoil every later run) and when the disk refuses.
        """
        named = {_VALUE: value} if isinstance(value, Tensor) else dict(value)
        assert _fits(kind, named), f"{kind}: {sorted(named)}"
        entry = {name: value.detach().to("cpu").contiguous() for name, value in named.items()}
        if not all(bool(torch.isfinite(value).all()) for value in entry.values()):
            raise RunError(
                f"an encoder gave {kind} that are not finite",
                hint="try model.compute_dtype=bf16 or fp32; fp16 overflows above 65504",
            )
        data = save({**entry, _CHECKSUM: _checksum(entry)})
        try:
            write_atomic(self.path(kind, key), data)
        except OSError as error:
            raise RunError(
                "an encoded sample can't be written to the cache",
                where=str(self.folder),
                found=str(error),
                hint="make room, set data.cache_dir to another disk, or data.cache=false",
            ) from error

    def _is_whole(self, kind: Kind, key: str) -> bool:
        try:
            with safe_open(self.path(kind, key), framework="pt") as entry:
                names = set(entry.keys())
                return _CHECKSUM in names and _fits(kind, names - {_CHECKSUM})
        except (SafetensorError, OSError, ValueError, KeyError):
            return False


def _fits(kind: Kind, names: Iterable[str]) -> bool:
    """Whether tensors of these names can be an entry of that kind."""
    found = set(names)
    if kind == "text":
        return EMBEDS in found and not found & _RESERVED
    return found == {_VALUE}


def _checksum(entry: Mapping[str, Tensor]) -> Tensor:
    """The CRC-32 of names and bytes, as a tensor () int64 that lies beside them in the file."""
    checksum = 0
    for name in sorted(entry):
        if name != _VALUE:
            checksum = zlib.crc32(name.encode(), checksum)
        data = entry[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        checksum = zlib.crc32(data, checksum)
    return torch.tensor(checksum)
