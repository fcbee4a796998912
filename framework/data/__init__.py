"""Pictures and captions: reading, buckets, deterministic batches, the content-addressed cache.

read_samples -> check_samples -> hold_out -> TrainingDataset (make_buckets, EncodedSource) -> BatchPlan
-> build_train_loader

What needs torch is loaded when it is first asked for: looking at a data set doesn't.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from framework.data.batches import (
    BatchPlan,
    ItemRequest,
    MicroStepBatchSampler,
    ordered_batches,
)
from framework.data.buckets import assign_bucket, bucket_of, make_buckets
from framework.data.checks import BadSample, CheckedSample, CheckReport, check_samples
from framework.data.images import (
    IMAGE_TRANSFORM_VERSION,
    build_pixels,
    content_key,
    decode_image,
    read_image,
    read_image_size,
)
from framework.data.media import Bucket, Media, Size, num_frames_of, size_px_of
from framework.data.parquet import ParquetCell
from framework.data.sample import Sample
from framework.data.samples import read_samples, resolve_repeats
from framework.data.seeds import derive_seed, derive_uniform
from framework.data.split import hold_out

if TYPE_CHECKING:
    from framework.data.cache import (
        CACHE_VERSION,
        EncodedCache,
        control_key,
        encoder_identity,
        latents_key,
        text_key,
    )
    from framework.data.collating import collate, pad_text
    from framework.data.dataset import (
        EncodedSource,
        TextRequest,
        TrainingDataset,
        same_size_groups,
    )
    from framework.data.loaders import build_train_loader, build_validation_loader

_WITH_TORCH = {
    "cache": (
        "CACHE_VERSION", "EncodedCache", "control_key", "encoder_identity", "latents_key", "text_key",
    ),
    "collating": ("collate", "pad_text"),
    "dataset": ("EncodedSource", "TextRequest", "TrainingDataset", "same_size_groups"),
    "loaders": ("build_train_loader", "build_validation_loader"),
}  # fmt: skip
_HOME = {name: module for module, names in _WITH_TORCH.items() for name in names}

__all__ = [
    "CACHE_VERSION",
    "IMAGE_TRANSFORM_VERSION",
    "BadSample",
    "BatchPlan",
    "Bucket",
    "CheckReport",
    "CheckedSample",
    "EncodedCache",
    "EncodedSource",
    "ItemRequest",
    "Media",
    "MicroStepBatchSampler",
    "ParquetCell",
    "Sample",
    "Size",
    "TextRequest",
    "TrainingDataset",
    "assign_bucket",
    "bucket_of",
    "build_pixels",
    "build_train_loader",
    "build_validation_loader",
    "check_samples",
    "collate",
    "content_key",
    "control_key",
    "decode_image",
    "derive_seed",
    "derive_uniform",
    "encoder_identity",
    "hold_out",
    "latents_key",
    "make_buckets",
    "num_frames_of",
    "ordered_batches",
    "pad_text",
    "read_image",
    "read_image_size",
    "read_samples",
    "resolve_repeats",
    "same_size_groups",
    "size_px_of",
    "text_key",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
