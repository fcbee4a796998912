"""Make samples by diffusers' own pipelines, whatever form the modules' weights are in.

A pipeline asks its modules for `dtype` and hands them tensors of that dtype. Ours may hold FP8 codes, bf16 norms and
float32 adapters at once, so each is shown to the pipeline through a thin stand-in that takes float32, casts to what
the module computes in, and returns float32. Latents therefore stay float32 between steps; where the modules are
float32 too, the result is the pipeline's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from framework.models.base import (
    SampleSettings,
    StepCallback,
    TextConditioning,
    device_of,
    evaluating,
    input_dtype,
)
from framework.schema.families import FamilySpec

Made = TypeVar("Made")


class FloatStandIn(nn.Module):
    """What a pipeline sees in place of a module: float32 on the module's device, with its config."""

    dtype = torch.float32

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        self.device = device_of(inner)
        self.input_dtype = input_dtype(inner)

    @property
    def config(self) -> Any:
        """The published config of the module."""
        return self.inner.config

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pass the pipeline's hint on, for modules that keep a cache between steps."""
        with self.inner.cache_context(name):
            yield


class VaeStandIn(FloatStandIn):
    """Stands in for an autoencoder."""

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Decode in the module's own dtype."""
        if return_dict:
            raise ValueError("the stand-in returns tuples only")
        decoded = self.inner.decode(latents.to(input_dtype(self.inner)), return_dict=False)
        return (decoded[0].float(),)


def check_request(
    spec: FamilySpec,
    positive: TextConditioning,
    negative: TextConditioning | None,
    settings: SampleSettings,
) -> bool:
    """Whether the request needs classifier-free guidance.

    Raises ValueError where guidance asks for a negative caption and there is none, or where the size isn't a multiple
    of the family's divisor (the configuration is checked for both long before).
    """
    width, height = settings.size_px
    divisor = spec.size_divisor_px
    if width % divisor or height % divisor:
        raise ValueError(f"width and height must be multiples of {divisor}, not {width} x {height}")
    guided = spec.guides(settings.guidance_scale)
    if guided and (negative is None or len(negative) not in (1, len(positive))):
        raise ValueError("guidance needs one negative caption, or one for each caption")
    return guided


def make_one_by_one(
    make: Callable[[int, Any], Sequence[Made]],
    modules: Mapping[str, nn.Module],
    count: int,
    settings: SampleSettings,
    on_step: StepCallback | None,
) -> list[Made]:
    """Make one sample per caption, one after another, so that memory doesn't grow with their number.

    make: gets the caption's index and the pipeline's `callback_on_step_end`; returns what the pipeline made.
    modules: in eval mode meanwhile.   count: of captions.
    """
    steps = settings.num_inference_steps
    made: list[Made] = []
    with evaluating(modules.values()):
        for index in range(count):
            made += make(index, _step_reporter(on_step, index * steps, count * steps))
    return made


def negative_row(negative: TextConditioning, index: int) -> TextConditioning:
    """The negative caption of sample `index`, where there may be one for all."""
    return negative.row(index if len(negative) > 1 else 0)


def _step_reporter(on_step: StepCallback | None, done: int, in_all: int) -> Any:
    """Turn the pipeline's callback into (steps done, steps in all); None where nobody listens."""
    if on_step is None:
        return None

    def report(
        _pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]
    ) -> dict[str, Any]:
        on_step(done + step + 1, in_all)
        return {}

    return report
