"""Pictures and captions: reading, buckets, deterministic batches, the content-addressed cache.

read_samples -> check_samples -> hold_out -> TrainingDataset (make_buckets, EncodedSource) -> BatchPlan
-> build_train_loader
"""

from framework.data.batches import (
    BatchPlan,
    ItemRequest,
    MicroStepBatchSampler,
    ordered_batches,
)
from framework.data.buckets import assign_bucket, make_buckets
from framework.data.cache import (
    CACHE_VERSION,
    EncodedCache,
    encoder_identity,
    latents_key,
    text_key,
)
from framework.data.checks import BadSample, CheckedSample, CheckReport, check_samples
from framework.data.dataset import (
    EncodedSource,
    TrainingDataset,
    collate,
    pad_text,
    same_size_groups,
)
from framework.data.images import (
    IMAGE_TRANSFORM_VERSION,
    Size,
    build_pixels,
    content_key,
    decode_image,
    read_image,
    read_image_size,
)
from framework.data.loaders import build_train_loader, build_validation_loader
from framework.data.parquet import ParquetCell
from framework.data.samples import Sample, read_samples
from framework.data.seeds import derive_seed, derive_uniform
from framework.data.split import hold_out

__all__ = [
    "CACHE_VERSION",
    "IMAGE_TRANSFORM_VERSION",
    "BadSample",
    "BatchPlan",
    "CheckReport",
    "CheckedSample",
    "EncodedCache",
    "EncodedSource",
    "ItemRequest",
    "MicroStepBatchSampler",
    "ParquetCell",
    "Sample",
    "Size",
    "TrainingDataset",
    "assign_bucket",
    "build_pixels",
    "build_train_loader",
    "build_validation_loader",
    "check_samples",
    "collate",
    "content_key",
    "decode_image",
    "derive_seed",
    "derive_uniform",
    "encoder_identity",
    "hold_out",
    "latents_key",
    "make_buckets",
    "ordered_batches",
    "pad_text",
    "read_image",
    "read_image_size",
    "read_samples",
    "same_size_groups",
    "text_key",
]
