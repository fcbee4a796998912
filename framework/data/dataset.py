"""The training set as PyTorch sees it: samples in buckets, read as pixels or from the cache, and batches of them.

B batch, C latent channels, H W picture height and width, h w latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from framework.data.batches import ItemRequest
from framework.data.buckets import assign_bucket
from framework.data.cache import EncodedCache, Kind, latents_key, text_key
from framework.data.checks import CheckedSample
from framework.data.images import Size, build_pixels, content_key, decode_image
from framework.data.samples import read_picture_bytes
from framework.data.seeds import derive_uniform
from framework.errors import DataError

_CAPTION_DROPOUT = 3  # what a derived seed is for; 1 and 2 are in batches.py


@dataclass(frozen=True)
class EncodedSource:
    """Where encoded samples are kept, and by which encoders.

    latents_encoder, text_encoder: identities (`encoder_identity`); None means that pixels, or captions, are given.
    """

    cache: EncodedCache
    latents_encoder: str | None = None
    text_encoder: str | None = None


class TrainingDataset(Dataset[dict[str, Any]]):
    """Samples of checked pictures, each brought to its bucket.

    buckets: from `make_buckets`.   encoded: what is read from the cache instead of encoded in each step.
    caption_dropout: probability of an empty caption; drawn from (seed, micro-step, position), so the same after a
    resume and for any number of workers.
    """

    def __init__(
        self,
        samples: Sequence[CheckedSample],
        *,
        buckets: Sequence[Size],
        encoded: EncodedSource | None = None,
        caption_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.samples = tuple(samples)
        self.bucket_of = tuple(assign_bucket(sample.size, buckets) for sample in self.samples)
        self.caption_dropout = caption_dropout
        self._encoded = encoded
        self._seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, request: ItemRequest) -> dict[str, Any]:
        """One sample.

        Returns "pixels" (3, H, W) float32 in [-1, 1] or "latents" (C, h, w); "caption" str or "text" (L, D); "index",
        "micro_step", "position" int; "key", the picture's content key.
        Raises DataError when a cache entry has gone or a picture has changed since it was checked.
        """
        index, micro_step, position = request
        item: dict[str, Any] = {
            "index": index,
            "micro_step": micro_step,
            "position": position,
            "key": self.samples[index].content_key,
        }
        if self._latents_encoder is None:
            item["pixels"] = self.pixels(index)
        else:
            item["latents"] = self._read_entry("latents", self.latents_key(index), index)
        caption = "" if self._drops(micro_step, position) else self.caption(index)
        if self._text_encoder is None:
            item["caption"] = caption
        else:
            item["text"] = self._read_entry("text", self.text_key(caption), index)
        return item

    def caption(self, index: int) -> str:
        """The caption of a sample, before dropout."""
        return self.samples[index].sample.caption

    def pixels(self, index: int) -> Tensor:
        """Read and decode a picture in its bucket's size: (3, H, W) float32 in [-1, 1]."""
        checked = self.samples[index]
        data = read_picture_bytes(checked.sample)
        if content_key(data) != checked.content_key:
            # Latents would be kept under the name of what the picture was before.
            raise DataError(
                "the picture has changed since it was checked",
                where=checked.sample.name,
                hint="start the command again",
            )
        return build_pixels(decode_image(data, name=checked.sample.name), self.bucket_of[index])

    def missing_latents(self) -> list[int]:
        """Samples whose latents must still be encoded; one for each picture, in order of buckets.

        Empty where no latents are wanted.
        """
        if self._encoded is None or self._latents_encoder is None:
            return []
        first_with_key: dict[str, int] = {}
        for index in sorted(range(len(self)), key=lambda index: self.bucket_of[index]):
            first_with_key.setdefault(self.latents_key(index), index)
        missing = self._encoded.cache.missing("latents", first_with_key)
        return [first_with_key[key] for key in missing]

    def missing_captions(self) -> list[str]:
        """Captions that must still be encoded, each once, with "" where caption dropout needs it.

        Empty where no embeddings are wanted.
        """
        if self._encoded is None or self._text_encoder is None:
            return []
        captions = dict.fromkeys(self.caption(index) for index in range(len(self)))
        if self.caption_dropout > 0:
            captions[""] = None
        by_key = {self.text_key(caption): caption for caption in captions}
        return [by_key[key] for key in self._encoded.cache.missing("text", by_key)]

    def put_latents(self, index: int, latents: Tensor) -> None:
        """Keep the latents (C, h, w) of a sample for this and every later run."""
        assert self._encoded is not None
        self._encoded.cache.put("latents", self.latents_key(index), latents)

    def put_text(self, caption: str, embeds: Tensor) -> None:
        """Keep the unpadded embedding (L, D) of a caption for this and every later run."""
        assert self._encoded is not None
        self._encoded.cache.put("text", self.text_key(caption), embeds)

    def latents_key(self, index: int) -> str:
        """The name of a sample's latents in the cache."""
        assert self._latents_encoder is not None
        key, size = self.samples[index].content_key, self.bucket_of[index]
        return latents_key(key, size=size, encoder=self._latents_encoder)

    def text_key(self, caption: str) -> str:
        """The name of a caption's embedding in the cache."""
        assert self._text_encoder is not None
        return text_key(caption, encoder=self._text_encoder)

    @property
    def _latents_encoder(self) -> str | None:
        return self._encoded.latents_encoder if self._encoded is not None else None

    @property
    def _text_encoder(self) -> str | None:
        return self._encoded.text_encoder if self._encoded is not None else None

    def _drops(self, micro_step: int, position: int) -> bool:
        if self.caption_dropout == 0:
            return False
        draw = derive_uniform(self._seed, _CAPTION_DROPOUT, micro_step, position)
        return draw < self.caption_dropout

    def _read_entry(self, kind: Kind, key: str, index: int) -> Tensor:
        assert self._encoded is not None
        value = self._encoded.cache.get(kind, key)
        if value is None:
            raise DataError(
                f"the cached {kind} of {self.samples[index].sample.name} are gone or damaged",
                where=str(self._encoded.cache.path(kind, key)),
                hint="run the same command again: it encodes what is missing and goes on",
            )
        return value


def same_size_groups(
    dataset: TrainingDataset, indices: Sequence[int], *, group_size: int
) -> list[list[int]]:
    """Cut samples into groups of at most `group_size` that share a bucket, e.g. to encode them together."""
    members: dict[Size, list[int]] = defaultdict(list)
    for index in indices:
        members[dataset.bucket_of[index]].append(index)
    return [
        group[first : first + group_size]
        for group in members.values()
        for first in range(0, len(group), group_size)
    ]


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of samples that share a bucket.

    Returns "pixels" (B, 3, H, W) or "latents" (B, C, h, w); "captions" list or "text_embeds" (B, L, D), zero where
    "text_mask" (B, L) bool is False; "indices", "positions" (B,) int64; "keys" list; "micro_step" int.
    """
    batch: dict[str, Any] = {
        "indices": torch.tensor([item["index"] for item in items]),
        "positions": torch.tensor([item["position"] for item in items]),
        "keys": [item["key"] for item in items],
        "micro_step": items[0]["micro_step"],
    }
    picture = "latents" if "latents" in items[0] else "pixels"
    batch[picture] = torch.stack([item[picture] for item in items])
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    else:
        batch["text_embeds"], batch["text_mask"] = pad_text([item["text"] for item in items])
    return batch


def pad_text(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad embeddings (L_i, D) on the right to (B, L, D) with zeros; the mask (B, L) bool is True on real tokens."""
    longest = max(text.shape[0] for text in texts)
    embeds = texts[0].new_zeros(len(texts), longest, texts[0].shape[1])
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        embeds[row, : text.shape[0]] = text
        mask[row, : text.shape[0]] = True
    return embeds, mask
