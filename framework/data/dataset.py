"""The training set as PyTorch sees it: samples in buckets, read as pixels or from the cache.

C latent channels, F frames, H W picture height and width, T h w latent frames, height and width, L text tokens,
D text width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from framework.data.batches import ItemRequest
from framework.data.buckets import bucket_of
from framework.data.cache import EncodedCache, Kind, control_key, latents_key, text_key
from framework.data.checks import CheckedSample
from framework.data.clips import build_clip_pixels, clip_key
from framework.data.images import (
    build_mask,
    build_pixels,
    content_key,
    decode_image,
    picture_geometry,
)
from framework.data.media import PICTURES, Bucket, Media, Size, num_frames_of, size_px_of
from framework.data.places import Place, is_clip, read_place_bytes
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


@dataclass(frozen=True)
class TextRequest:
    """A caption that must be encoded.

    control_keys: contents of the control pictures that the encoder reads beside it; () for other families.
    index: a sample with these control pictures, for `TrainingDataset.control_images`.
    """

    caption: str
    control_keys: tuple[str, ...]
    index: int


class TrainingDataset(Dataset[dict[str, Any]]):
    """Samples of checked pictures or clips, each brought to its bucket.

    buckets: sizes from `make_buckets`.   encoded: what is read from the cache instead of encoded in each step.
    caption_dropout: probability of an empty caption; drawn from (seed, micro-step, position), so the same after a
    resume and for any number of workers.   media: what the family trains on.
    """

    def __init__(
        self,
        samples: Sequence[CheckedSample],
        *,
        buckets: Sequence[Size],
        encoded: EncodedSource | None = None,
        caption_dropout: float = 0.0,
        seed: int = 0,
        media: Media = PICTURES,
    ) -> None:
        self.samples = tuple(samples)
        self.media = media
        self.bucket_of: tuple[Bucket, ...] = tuple(
            bucket_of(sample, buckets=buckets, media=media) for sample in self.samples
        )
        self.caption_dropout = caption_dropout
        self._encoded = encoded
        self._seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, request: ItemRequest) -> dict[str, Any]:
        """One sample.

        Returns "pixels" (3, H, W) or, for clips, (3, F, H, W) float32 in [-1, 1], or "latents" (C, h, w) or
        (C, T, h, w); "caption" str or "text", the named tensors of its entry; "geometry" (6,) int64, see
        `picture_geometry`; "index", "micro_step", "position" int; "key", the picture's content key.
        With a teacher's seed: "noise_seed" int. With a mask: "mask" (1, H, W) float32 in [0, 1].
        With control pictures: "controls", their latents (C, h, w)
        where latents are cached, else pictures (RGB); "control_images", the pictures, where latents are cached but
        captions aren't.
        Raises DataError when a cache entry has gone or a picture has changed since it was checked.
        """
        index, micro_step, position = request
        checked = self.samples[index]
        geometry = picture_geometry(checked.size, size_px_of(self.bucket_of[index]))
        item: dict[str, Any] = {
            "index": index,
            "micro_step": micro_step,
            "position": position,
            "key": checked.content_key,
            "geometry": torch.tensor(geometry),
        }
        if self._latents_encoder is None:
            item["pixels"] = self.pixels(index)
        else:
            item["latents"] = self._read_tensor("latents", self.latents_key(index), index)
        if checked.sample.mask is not None:
            item["mask"] = self.mask(index)
        if checked.sample.noise_seed is not None:
            item["noise_seed"] = checked.sample.noise_seed
        if self._wants_controls:
            item |= self._control_items(index)
        caption = "" if self._drops(micro_step, position) else self.caption(index)
        if self._text_encoder is None:
            item["caption"] = caption
        else:
            item["text"] = self._read_text(TextRequest(caption, self._control_keys(index), index))
        return item

    def caption(self, index: int) -> str:
        """The caption of a sample, before dropout."""
        return self.samples[index].sample.caption

    def pixels(self, index: int) -> Tensor:
        """Read and decode a picture or clip in its bucket's size: (3, H, W) or (3, F, H, W) float32 in [-1, 1]."""
        checked, bucket = self.samples[index], self.bucket_of[index]
        place, size = checked.sample.picture, size_px_of(bucket)
        as_clip = self.media.kind == "video" and is_clip(place)
        data = self._read_unchanged(index, place, checked.content_key, as_clip=as_clip)
        if as_clip:
            return build_clip_pixels(
                place, data, size=size, num_frames=num_frames_of(bucket), fps=self.media.fps
            )
        pixels = build_pixels(decode_image(data, name=checked.sample.name), size)
        return pixels[:, None] if self.media.kind == "video" else pixels

    def mask(self, index: int) -> Tensor:
        """Read a sample's mask in its bucket's size: (1, H, W) float32, 1 where the loss counts. It must have one."""
        checked = self.samples[index]
        place = checked.sample.mask
        assert place is not None
        data = self._read_unchanged(index, place, checked.mask_key)
        size = size_px_of(self.bucket_of[index])
        mask = decode_image(data, name=str(place))
        return build_mask(mask, size, picture_size=checked.size)

    def control_images(self, index: int) -> list[Image.Image]:
        """Read a sample's control pictures: RGB as a viewer shows them, in their own sizes; [] without any."""
        if not self._wants_controls:
            return []
        checked = self.samples[index]
        return [
            decode_image(self._read_unchanged(index, place, key), name=str(place))
            for place, key in zip(checked.sample.controls, checked.control_keys, strict=True)
        ]

    # ---- what must still be encoded --------------------------------------------------------------

    def missing_latents(self) -> list[int]:
        """Samples whose latents must still be encoded; one for each picture, in order of buckets.

        Empty where no latents are wanted.
        """
        if self._encoded is None or self._latents_encoder is None:
            return []
        first_with_key: dict[str, int] = {}
        for index in self._by_bucket():
            first_with_key.setdefault(self.latents_key(index), index)
        missing = self._encoded.cache.missing("latents", first_with_key)
        return [first_with_key[key] for key in missing]

    def missing_controls(self) -> list[int]:
        """Samples whose control pictures' latents must still be encoded, in order of buckets.

        Each is named only if it has a picture that none before it has. Empty where no latents are wanted.
        """
        if self._encoded is None or self._latents_encoder is None or not self._wants_controls:
            return []
        first_with_key: dict[str, int] = {}
        for index in self._by_bucket():
            for key in self.control_latents_keys(index):
                first_with_key.setdefault(key, index)
        missing = self._encoded.cache.missing("control", first_with_key)
        return list(dict.fromkeys(first_with_key[key] for key in missing))

    def missing_captions(self) -> list[TextRequest]:
        """Captions that must still be encoded, each once, with "" where caption dropout needs it.

        A caption that is encoded with control pictures is one of its own for each set of them.
        Empty where no embeddings are wanted.
        """
        if self._encoded is None or self._text_encoder is None:
            return []
        requests = [self._request(index, self.caption(index)) for index in range(len(self))]
        if self.caption_dropout > 0:
            requests += [self._request(index, "") for index in range(len(self))]
        by_key: dict[str, TextRequest] = {}
        for request in requests:
            by_key.setdefault(self.text_key(request), request)
        return [by_key[key] for key in self._encoded.cache.missing("text", by_key)]

    def put_latents(self, index: int, latents: Tensor) -> None:
        """Keep the latents (C, h, w) or (C, T, h, w) of a sample for this and every later run."""
        assert self._encoded is not None
        self._encoded.cache.put("latents", self.latents_key(index), latents)

    def put_controls(self, index: int, latents: Sequence[Tensor]) -> None:
        """Keep the latents (C, h, w) of each control picture of a sample, in their order."""
        assert self._encoded is not None
        for key, value in zip(self.control_latents_keys(index), latents, strict=True):
            self._encoded.cache.put("control", key, value)

    def put_text(self, request: TextRequest, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the encoder made of a caption: "embeds" (L, D) unpadded, others of one shape for all captions."""
        assert self._encoded is not None
        self._encoded.cache.put("text", self.text_key(request), tensors)

    def latents_key(self, index: int) -> str:
        """The name of a sample's latents in the cache."""
        assert self._latents_encoder is not None
        checked, bucket = self.samples[index], self.bucket_of[index]
        # A still picture is the same at any rate.
        size = bucket if self.media.kind == "video" else size_px_of(bucket)
        fps = self.media.fps if num_frames_of(bucket) > 1 else None
        return latents_key(checked.content_key, size=size, encoder=self._latents_encoder, fps=fps)

    def control_latents_keys(self, index: int) -> list[str]:
        """The names of the latents of a sample's control pictures in the cache."""
        assert self._latents_encoder is not None
        checked = self.samples[index]
        sizes = self.media.control_sizes(checked.control_sizes)
        return [
            control_key(key, size=size, encoder=self._latents_encoder)
            for key, size in zip(checked.control_keys, sizes, strict=True)
        ]

    def text_key(self, request: TextRequest) -> str:
        """The name of a caption's entry in the cache."""
        assert self._text_encoder is not None
        return text_key(
            request.caption, encoder=self._text_encoder, control_keys=request.control_keys
        )

    # ---- parts -----------------------------------------------------------------------------------

    @property
    def _latents_encoder(self) -> str | None:
        return self._encoded.latents_encoder if self._encoded is not None else None

    @property
    def _text_encoder(self) -> str | None:
        return self._encoded.text_encoder if self._encoded is not None else None

    @property
    def _wants_controls(self) -> bool:
        return self.media.num_controls > 0

    def _by_bucket(self) -> list[int]:
        return sorted(range(len(self)), key=lambda index: self.bucket_of[index])

    def _control_keys(self, index: int) -> tuple[str, ...]:
        return self.samples[index].control_keys if self._wants_controls else ()

    def _request(self, index: int, caption: str) -> TextRequest:
        return TextRequest(caption, self._control_keys(index), index)

    def _control_items(self, index: int) -> dict[str, Any]:
        if self._latents_encoder is None:
            return {"controls": self.control_images(index)}
        keys = self.control_latents_keys(index)
        items: dict[str, Any] = {
            "controls": [self._read_tensor("control", key, index) for key in keys]
        }
        if self._text_encoder is None:
            items["control_images"] = self.control_images(index)
        return items

    def _drops(self, micro_step: int, position: int) -> bool:
        if self.caption_dropout == 0:
            return False
        draw = derive_uniform(self._seed, _CAPTION_DROPOUT, micro_step, position)
        return draw < self.caption_dropout

    def _read_unchanged(
        self, index: int, place: Place, key: str, *, as_clip: bool = False
    ) -> bytes:
        sample = self.samples[index].sample
        name = sample.name if place == sample.picture else str(place)
        data = read_place_bytes(place, name=name)
        if (clip_key(place, data) if as_clip else content_key(data)) != key:
            # Latents would be kept under the name of what the picture was before.
            raise DataError(
                "the picture has changed since it was checked",
                where=name,
                hint="start the command again",
            )
        return data

    def _read_tensor(self, kind: Literal["latents", "control"], key: str, index: int) -> Tensor:
        assert self._encoded is not None
        value = self._encoded.cache.get(kind, key)
        if value is None:
            raise self._gone(kind, key, index)
        return value

    def _read_text(self, request: TextRequest) -> dict[str, Tensor]:
        assert self._encoded is not None
        key = self.text_key(request)
        value = self._encoded.cache.get("text", key)
        if value is None:
            raise self._gone("text", key, request.index)
        return value

    def _gone(self, kind: Kind, key: str, index: int) -> DataError:
        assert self._encoded is not None
        what = "control pictures" if kind == "control" else kind
        return DataError(
            f"the cached {what} of {self.samples[index].sample.name} are gone or damaged",
            where=str(self._encoded.cache.path(kind, key)),
            hint="run the same command again: it encodes what is missing and goes on",
        )


def same_size_groups(
    dataset: TrainingDataset, indices: Sequence[int], *, group_size: int
) -> list[list[int]]:
    """Cut samples into groups of at most `group_size` that share a bucket, e.g. to encode them together."""
    members: dict[Bucket, list[int]] = defaultdict(list)
    for index in indices:
        members[dataset.bucket_of[index]].append(index)
    return [
        group[first : first + group_size]
        for group in members.values()
        for first in range(0, len(group), group_size)
    ]
