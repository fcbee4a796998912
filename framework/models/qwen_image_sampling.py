"""Make pictures by diffusers' own QwenImagePipeline; see `framework/models/pipeline_sampling.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
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
    from framework.models.qwen_image import QwenImageFamily


class _Dit(FloatStandIn):
    """Stands in for the transformer."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        **others: Any,
    ) -> tuple[Tensor]:
        """Call the DiT in its own dtype; the time stays float32, as in training."""
        output = self.inner(
            hidden_states=hidden_states.to(self.input_dtype),
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states.to(self.input_dtype),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            **others,
        )
        return (output[0].float(),)


class _Vae(VaeStandIn):
    """Stands in for the autoencoder."""

    @property
    def temperal_downsample(self) -> list[bool]:
        """The pipeline works out the size of latents from its length (the spelling is the model's)."""
        return list(self.inner.temperal_downsample)


def sample_pictures(
    family: QwenImageFamily,
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
    dit, vae = _Dit(modules["dit"]), _Vae(modules["vae"])
    untyped_scheduler: Any = FlowMatchEulerDiscreteScheduler
    untyped_pipeline: Any = QwenImagePipeline
    pipeline = untyped_pipeline(
        scheduler=untyped_scheduler.from_config(_scheduler_config(family, settings)),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=dit,
    )
    pipeline.set_progress_bar_config(disable=True)

    def make(index: int, report: Any) -> list[Image.Image]:
        pictures: list[Image.Image] = pipeline(
            **_captions(positive, negative if guided else None, index, dit.device),
            latents=_packed_noise(family, settings, index),
            true_cfg_scale=settings.guidance_scale if guided else 1.0,
            width=width,
            height=height,
            num_inference_steps=settings.num_inference_steps,
            max_sequence_length=1024,
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
) -> dict[str, Tensor]:
    """The pipeline's arguments for caption `index`, without padding, in float32."""
    row = positive.row(index).to(device, torch.float32)
    arguments = {"prompt_embeds": row.embeds, "prompt_embeds_mask": row.mask.long()}
    if negative is not None:
        row = negative_row(negative, index).to(device, torch.float32)
        arguments["negative_prompt_embeds"] = row.embeds
        arguments["negative_prompt_embeds_mask"] = row.mask.long()
    return arguments


def _scheduler_config(family: QwenImageFamily, settings: SampleSettings) -> dict[str, Any]:
    """The published config; a single step is left unstretched.

    `shift_terminal` moves the last noise level while the first stays at 1; where both are the same
    level the scheduler divides by zero and the picture is NaN.
    """
    config = dict(family.scheduler_config)
    if settings.num_inference_steps == 1:
        config["shift_terminal"] = None
    return config


def _packed_noise(family: QwenImageFamily, settings: SampleSettings, index: int) -> Tensor:
    """Starting noise of picture `index` as the DiT's tokens."""
    from framework.models.qwen_image import pack_latents

    width, height = settings.size_px
    return pack_latents(family.initial_latents(width, height, settings.seed + index))
