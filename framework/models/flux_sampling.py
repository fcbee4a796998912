"""Make pictures by diffusers' own FluxPipeline; see `framework/models/pipeline_sampling.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import Tensor, nn

from framework.models.base import SampleSettings, StepCallback, TextConditioning
from framework.models.latent_packing import pack_latents
from framework.models.pipeline_sampling import (
    FloatStandIn,
    VaeStandIn,
    check_request,
    make_one_by_one,
)

if TYPE_CHECKING:
    from framework.models.flux import FluxFamily


class _Dit(FloatStandIn):
    """Stands in for the transformer."""

    def forward(
        self,
        hidden_states: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        **others: Any,
    ) -> tuple[Tensor]:
        """Call the DiT in its own dtype; time and guidance stay float32, as in training."""
        output = self.inner(
            hidden_states=hidden_states.to(self.input_dtype),
            pooled_projections=pooled_projections.to(self.input_dtype),
            encoder_hidden_states=encoder_hidden_states.to(self.input_dtype),
            **others,
        )
        return (output[0].float(),)


def sample_pictures(
    family: FluxFamily,
    positive: TextConditioning,
    modules: Mapping[str, nn.Module],
    settings: SampleSettings,
    *,
    on_step: StepCallback | None = None,
) -> list[Image.Image]:
    """Make one picture per caption; raises what `check_request` raises."""
    width, height = settings.size_px
    check_request(family.spec, positive, None, settings)
    dit, vae = _Dit(modules["dit"]), VaeStandIn(modules["vae"])
    untyped_scheduler: Any = FlowMatchEulerDiscreteScheduler
    untyped_pipeline: Any = FluxPipeline
    pipeline = untyped_pipeline(
        scheduler=untyped_scheduler.from_config(dict(family.scheduler_config)),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=dit,
    )
    pipeline.set_progress_bar_config(disable=True)

    def make(index: int, report: Any) -> list[Image.Image]:
        row = positive.row(index).to(dit.device, torch.float32)
        noise = family.initial_latents(width, height, settings.seed + index)
        pictures: list[Image.Image] = pipeline(
            prompt_embeds=row.embeds,
            pooled_prompt_embeds=row.pooled,
            latents=pack_latents(noise),
            guidance_scale=settings.guidance_scale,
            width=width,
            height=height,
            num_inference_steps=settings.num_inference_steps,
            callback_on_step_end=report,
        ).images
        return pictures

    used = {"dit": modules["dit"], "vae": modules["vae"]}
    return make_one_by_one(make, used, len(positive), settings, on_step)
