"""Make pictures by diffusers' own ZImagePipeline; see `framework/models/pipeline_sampling.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from torch import Tensor, nn

from framework.models.base import SampleSettings, StepCallback, TextConditioning
from framework.models.pipeline_sampling import (
    FloatStandIn,
    VaeStandIn,
    check_request,
    make_one_by_one,
    negative_row,
)

if TYPE_CHECKING:
    from framework.models.z_image import ZImageFamily


class _Dit(FloatStandIn):
    """Stands in for the transformer."""

    @property
    def in_channels(self) -> int:
        """Channels of the latents, which the pipeline asks the module for."""
        return int(self.inner.in_channels)

    def forward(
        self, x: Sequence[Tensor], t: Tensor, cap_feats: Sequence[Tensor], **others: Any
    ) -> tuple[list[Tensor]]:
        """Call the DiT in its own dtype; the time stays float32, as in training."""
        output = self.inner(
            [latents.to(self.input_dtype) for latents in x],
            t,
            [states.to(self.input_dtype) for states in cap_feats],
            **others,
        )
        return ([answer.float() for answer in output[0]],)


def sample_pictures(
    family: ZImageFamily,
    positive: TextConditioning,
    negative: TextConditioning | None,
    modules: Mapping[str, nn.Module],
    settings: SampleSettings,
    *,
    on_step: StepCallback | None = None,
) -> list[Image.Image]:
    """Make one picture per caption; raises what `check_request` raises."""
    width, height = settings.size_px
    guided = check_request(family.spec, positive, negative, settings)
    dit, vae = _Dit(modules["dit"]), VaeStandIn(modules["vae"])
    untyped_scheduler: Any = FlowMatchEulerDiscreteScheduler
    untyped_pipeline: Any = ZImagePipeline
    pipeline = untyped_pipeline(
        scheduler=untyped_scheduler.from_config(dict(family.scheduler_config)),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=dit,
    )
    pipeline.set_progress_bar_config(disable=True)

    def make(index: int, report: Any) -> list[Image.Image]:
        pictures: list[Image.Image] = pipeline(
            **_captions(positive, negative if guided else None, index, dit.device),
            latents=family.initial_latents(width, height, settings.seed + index),
            # The pipeline's scale counts from 0, where guidance is off.
            guidance_scale=settings.guidance_scale if guided else 0.0,
            width=width,
            height=height,
            num_inference_steps=settings.num_inference_steps,
            callback_on_step_end=report,
        ).images
        return pictures

    used = {"dit": modules["dit"], "vae": modules["vae"]}
    return make_one_by_one(make, used, len(positive), settings, on_step)


def _captions(
    positive: TextConditioning,
    negative: TextConditioning | None,
    index: int,
    device: torch.device,
) -> dict[str, list[Tensor]]:
    """The pipeline's arguments for caption `index`: lists of (L, D), without padding, in float32."""
    row = positive.row(index).to(device, torch.float32)
    arguments = {"prompt_embeds": list(row.embeds)}
    if negative is not None:
        row = negative_row(negative, index).to(device, torch.float32)
        arguments["negative_prompt_embeds"] = list(row.embeds)
    return arguments
