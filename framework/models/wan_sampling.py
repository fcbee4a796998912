"""Make clips by diffusers' own WanPipeline; see `framework/models/pipeline_sampling.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch import Tensor, nn

from framework.models.base import Clip, SampleSettings, StepCallback, TextConditioning
from framework.models.pipeline_sampling import (
    FloatStandIn,
    VaeStandIn,
    check_request,
    make_one_by_one,
    negative_row,
)

if TYPE_CHECKING:
    from framework.models.wan2_1 import Wan21Family


class _Dit(FloatStandIn):
    """Stands in for a transformer."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: Any
    ) -> tuple[Tensor]:
        """Call the DiT in its own dtype; the time stays as it is."""
        output = self.inner(
            hidden_states=hidden_states.to(self.input_dtype),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states.to(self.input_dtype),
            **others,
        )
        return (output[0].float(),)

    @contextmanager
    def cache_context(self, name: str, **facts: Any) -> Iterator[None]:
        """Pass the pipeline's hint on, for modules that keep a cache between steps."""
        with self.inner.cache_context(name, **facts):
            yield


def sample_clips(
    family: Wan21Family,
    positive: TextConditioning,
    negative: TextConditioning | None,
    modules: Mapping[str, nn.Module],
    settings: SampleSettings,
    *,
    on_step: StepCallback | None = None,
) -> list[Clip]:
    """Make one clip per caption.

    Raises what `check_request` raises, and ValueError where the number of frames isn't a multiple of 4 plus one.
    """
    from framework.models.wan2_1 import FRAMES_PER_SECOND

    divisor = family.spec.frame_divisor
    if settings.num_frames % divisor != 1:
        raise ValueError(f"the number of frames must be a multiple of {divisor} plus one")
    width, height = settings.size_px
    guided = check_request(family.spec, positive, negative, settings)
    used = {name: modules[name] for name in (*family.spec.denoisers, "vae")}
    pipeline = _pipeline(family, used)

    def make(index: int, report: Any) -> list[Clip]:
        frames = pipeline(
            **_captions(positive, negative if guided else None, index, pipeline.transformer.device),
            latents=family.initial_latents(
                width, height, settings.seed + index, num_frames=settings.num_frames
            ),
            guidance_scale=settings.guidance_scale if guided else 1.0,
            width=width,
            height=height,
            num_frames=settings.num_frames,
            num_inference_steps=settings.num_inference_steps,
            output_type="pil",
            callback_on_step_end=report,
        ).frames[0]
        return [Clip(tuple(frames), FRAMES_PER_SECOND)]

    return make_one_by_one(make, used, len(positive), settings, on_step)


def _pipeline(family: Wan21Family, modules: Mapping[str, nn.Module]) -> Any:
    """The published pipeline without its text encoder, with stand-ins for the rest."""
    untyped_scheduler: Any = UniPCMultistepScheduler
    untyped_pipeline: Any = WanPipeline
    second = modules.get("dit_2")
    pipeline = untyped_pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=VaeStandIn(modules["vae"]),
        scheduler=untyped_scheduler.from_config(dict(family.scheduler_config)),
        transformer=_Dit(modules["dit"]),
        transformer_2=None if second is None else _Dit(second),
        boundary_ratio=family.boundary,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _captions(
    positive: TextConditioning,
    negative: TextConditioning | None,
    index: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """The pipeline's arguments for caption `index`, with zeros up to the full length, in float32."""
    from framework.models.wan2_1 import full_length

    row = positive.row(index).to(device, torch.float32)
    arguments = {"prompt_embeds": full_length(row.embeds)}
    if negative is not None:
        row = negative_row(negative, index).to(device, torch.float32)
        arguments["negative_prompt_embeds"] = full_length(row.embeds)
    return arguments
