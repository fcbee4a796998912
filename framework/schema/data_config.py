"""The section `data`: the pictures or clips that are trained on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from framework.schema.base import Section, unit


class DataSource(Section):
    """One of several sets of pictures that are trained on together."""

    path: str = Field(
        min_length=1,
        description="As `data.path`.",
        examples=["data/pictures", "data/pictures/metadata.csv"],
    )
    base_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder that relative paths in a metadata file start at; unset means the file's own.",
        examples=["data/pictures"],
    )
    repeats: int = Field(
        1,
        ge=1,
        description="How often each picture of this source stands in one epoch (times `data.repeats`).",
        json_schema_extra=unit("times", examples=[10]),
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="Share of an epoch that comes from this source, relative to the weights of the others; unset (for all) means by number of pictures.",
        json_schema_extra=unit("share, relative to the others", examples=[1.0, 3.0]),
    )


class DataConfig(Section):
    """The pictures and captions to train on."""

    path: str | None = Field(
        min_length=1,
        description="A folder of pictures or clips with captions, a metadata file (.csv, .json, .jsonl, .parquet), WebDataset shards (.tar), or hub://owner/name; left out where `sources` is given.",
        examples=["data/pictures", "data/pictures/metadata.csv"],
    )
    sources: tuple[DataSource, ...] = Field(
        (),
        description="Several sets of pictures instead of `path`, each with repeats or a sampling weight of its own.",
        examples=[[{"path": "data/cats", "weight": 1.0}, {"path": "data/dogs", "weight": 3.0}]],
    )
    base_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder that relative paths in the metadata file of `path` start at; unset means the file's own.",
        examples=["data/pictures"],
    )
    batch_size: int = Field(
        1,
        ge=1,
        description="Pictures per device and micro-step; all of one batch share a size.",
        json_schema_extra=unit("pictures", examples=[1, 8]),
    )
    max_px: int = Field(
        1024 * 1024,
        ge=256,
        description="Pixel budget of a picture (width x height); aspect-ratio buckets keep below it.",
        json_schema_extra=unit("pixels", examples=[65536, 1048576]),
    )
    max_aspect_ratio: float = Field(
        2.0,
        ge=1,
        description="Longest allowed side ratio of a bucket; wider pictures are cropped to it.",
        json_schema_extra=unit("longer side / shorter side", examples=[1.0, 2.0]),
    )
    repeats: int = Field(
        1,
        ge=1,
        description="How often each picture stands in one epoch.",
        json_schema_extra=unit("times", examples=[10]),
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability of training a picture with an empty caption.",
        json_schema_extra=unit("probability", examples=[0.1]),
    )
    num_workers: int = Field(
        0,
        ge=0,
        description="Processes that read pictures.",
        json_schema_extra=unit("processes", examples=[4]),
    )
    num_frames: int = Field(
        81,
        ge=1,
        description="Most frames of a training clip, for families that make clips; others don't read it.",
        json_schema_extra=unit("frames", examples=[17, 81]),
    )
    fps: float = Field(
        16.0,
        gt=0,
        description="Rate at which frames are taken from clips; families of pictures don't read it.",
        json_schema_extra=unit("frames per second", examples=[16.0]),
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error",
        description="A picture that can't be read stops the run before it starts, or is skipped and counted.",
    )
    cache: bool = Field(
        True,
        description="Encode pictures and captions once and keep the result, where the encoders are frozen.",
    )
    cache_dir: str = Field(
        ".octavo/cache",
        min_length=1,
        description="Where encoded pictures and captions are kept; runs share it.",
        examples=[".octavo/cache", "/scratch/octavo-cache"],
    )

    @model_validator(mode="before")
    @classmethod
    def _sources_stand_for_path(cls, values: Any) -> Any:
        """Where sources are given, no path needs to be."""
        if isinstance(values, dict) and values.get("sources") and "path" not in values:
            return {**values, "path": None}
        return values

    @property
    def all_sources(self) -> tuple[DataSource, ...]:
        """The sources, of which `path` alone is one."""
        if self.path is None:
            return self.sources
        return (DataSource(path=self.path, base_dir=self.base_dir), *self.sources)
