"""Make pictures by diffusers' own StableDiffusionXLPipeline; see `framework/models/pipeline_sampling.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
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
from framework.models.sdxl import without_float16

if TYPE_CHECKING:
    from framework.models.sdxl import SdxlFamily


class _Unet(FloatStandIn):
    """Stands in for the UNet."""

    @property
    def add_embedding(self) -> nn.Module:
        """The pipeline compares its width with that of the captions."""
        module: nn.Module = self.inner.add_embedding
        return module

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor],
        **others: Any,
    ) -> tuple[Tensor]:
        """Call the UNet in its own dtype; step and sizes stay float32, as in training."""
        output = self.inner(
            sample.to(self.input_dtype),
            timestep,
            encoder_hidden_states=encoder_hidden_states.to(self.input_dtype),
            added_cond_kwargs={
                **added_cond_kwargs,
                "text_embeds": added_cond_kwargs["text_embeds"].to(self.input_dtype),
            },
            **others,
        )
        return (output[0].float(),)


class _Vae(VaeStandIn):
    """Stands in for the autoencoder; never computes in float16."""

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Decode in the module's own dtype, or in float32 where that is float16."""
        with without_float16(self.inner):
            return super().decode(latents, return_dict)


def sample_pictures(
    family: SdxlFamily,
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
    unet, vae = _Unet(modules["dit"]), _Vae(modules["vae"])
    untyped_scheduler: Any = EulerDiscreteScheduler
    untyped_pipeline: Any = StableDiffusionXLPipeline
    pipeline = untyped_pipeline(
        scheduler=untyped_scheduler.from_config(dict(family.scheduler_config)),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        unet=unet,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def make(index: int, report: Any) -> list[Image.Image]:
        pictures: list[Image.Image] = pipeline(
            **_captions(positive, negative if guided else None, index, unet.device),
            latents=family.initial_latents(width, height, settings.seed + index),
            guidance_scale=settings.guidance_scale if guided else 1.0,
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
) -> dict[str, Any]:
    """The pipeline's arguments for caption `index` in float32, and for the sizes it is made for."""
    row = positive.row(index).to(device, torch.float32)
    arguments: dict[str, Any] = {"prompt_embeds": row.embeds, "pooled_prompt_embeds": row.pooled}
    if row.geometry is not None:
        sizes = row.geometry[0].tolist()
        arguments["original_size"] = tuple(sizes[:2])
        arguments["crops_coords_top_left"] = tuple(sizes[2:4])
        arguments["target_size"] = tuple(sizes[4:])
    if negative is not None:
        row = negative_row(negative, index).to(device, torch.float32)
        arguments["negative_prompt_embeds"] = row.embeds
        arguments["negative_pooled_prompt_embeds"] = row.pooled
    return arguments
