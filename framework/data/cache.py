"""Encoded pictures and captions on disk, each named by everything that made it: a stale entry can't be met.

C, h, w: latent channels, height, width.   L, D: text tokens, text width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from framework.data.files import write_atomic
from framework.data.images import IMAGE_TRANSFORM_VERSION, Size
from framework.errors import RunError

Kind = Literal["latents", "text"]

# Part of every key: raise it when the meaning of an entry changes.
CACHE_VERSION = 1
_VALUE = "value"
_CHECKSUM = "crc32"


def encoder_identity(
    component: str, *, weights: str, storage: str, compute_dtype: str, code_version: int
) -> str:
    """Describe the encoder that makes entries; anything that changes its output must show here.

    component: "vae", "text_encoder".   weights: hash or commit and folder of the weights.
    storage: how they rest, e.g. "bf16" or "fp8 row".   compute_dtype: arithmetic.
    code_version: of the family's encode step.
    """
    return json.dumps([component, weights, storage, compute_dtype, code_version])


def latents_key(content_key: str, *, size: Size, encoder: str) -> str:
    """Name the latents of a picture (by its content) scaled and cropped to `size` by `encoder`."""
    return _digest("latents", content_key, list(size), IMAGE_TRANSFORM_VERSION, encoder)


def text_key(caption: str, *, encoder: str) -> str:
    """Name the embedding of a caption or prompt by `encoder`."""
    return _digest("text", caption, encoder)


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

    def get(self, kind: Kind, key: str) -> Tensor | None:
        """Read an entry, on the CPU in the dtype it was put; None when there is none.

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
        if entry.keys() == {_VALUE, _CHECKSUM} and _checksum(entry[_VALUE]) == entry[_CHECKSUM]:
            return entry[_VALUE]
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def put(self, kind: Kind, key: str, value: Tensor) -> None:
        """Keep an entry: latents (C, h, w) or an unpadded text embedding (L, D), any float dtype, any device.

        Raises RunError for values that aren't finite (they would spoil every later run) and when the disk refuses.
        """
        value = value.detach().to("cpu").contiguous()
        if not bool(torch.isfinite(value).all()):
            raise RunError(
                f"an encoder gave {kind} that are not finite",
                hint="try model.compute_dtype=bf16 or fp32; fp16 overflows above 65504",
            )
        data = save({_VALUE: value, _CHECKSUM: _checksum(value)})
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
                return set(entry.keys()) == {_VALUE, _CHECKSUM}
        except (SafetensorError, OSError, ValueError, KeyError):
            return False


def _checksum(value: Tensor) -> Tensor:
    """The CRC-32 of the bytes, as a tensor () int64 that lies beside them in the file."""
    return torch.tensor(zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().tobytes()))
