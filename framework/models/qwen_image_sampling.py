"""Make pictures by diffusers' own QwenImagePipeline, whatever form the modules' weights are in.

The pipeline asks its modules for `dtype` and hands them tensors of that dtype. Ours may hold FP8
codes, bf16 norms and float32 adapters at once, so each is shown to the pipeline through a thin
stand-in that takes float32, casts to what the module computes in, and returns float32. Latents
therefore stay float32 between steps; where the modules are float32 too, the result is the
pipeline's to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from PIL import Image
from torch import Tensor, nn

from framework.models.base import (
    SampleSettings,
    StepCallback,
    TextConditioning,
    device_of,
    evaluating,
    input_dtype,
)

if TYPE_CHECKING:
    from framework.models.qwen_image import QwenImageFamily


class _FloatStandIn(nn.Module):
    """What the pipeline sees in place of a module: float32 on the module's device, with its config."""

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


class _Dit(_FloatStandIn):
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

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pass the pipeline's hint on, for modules that keep a cache between steps."""
        with self.inner.cache_context(name):
            yield


class _Vae(_FloatStandIn):
    """Stands in for the autoencoder."""

    @property
    def temperal_downsample(self) -> list[bool]:
        """The pipeline works out the size of latents from its length (the spelling is the model's)."""
        return list(self.inner.temperal_downsample)

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Decode in the module's own dtype."""
        if return_dict:
            raise ValueError("the stand-in returns tuples only")
        decoded = self.inner.decode(latents.to(self.input_dtype), return_dict=False)
        return (decoded[0].float(),)


def sample_pictures(
    family: QwenImageFamily,
    positive: TextConditioning,
    negative: TextConditioning | None,
    modules: Mapping[str, nn.Module],
    settings: SampleSettings,
    *,
    on_step: StepCallback | None = None,
) -> list[Image.Image]:
    """Make one picture per caption, one after another, so that memory doesn't grow with their number.

    Raises ValueError where guidance asks for a negative caption and there is none, or where the
    size isn't a multiple of the family's divisor (the configuration is checked for it long before).
    """
    width, height = settings.size_px
    divisor = family.spec.size_divisor_px
    if width % divisor or height % divisor:
        raise ValueError(f"width and height must be multiples of {divisor}, not {width} x {height}")
    guided = settings.guidance_scale > 1
    if guided and (negative is None or len(negative) not in (1, len(positive))):
        raise ValueError("guidance needs one negative caption, or one for each caption")
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
    steps_in_all = len(positive) * settings.num_inference_steps
    pictures: list[Image.Image] = []
    with evaluating((modules["dit"], modules["vae"])):
        for index in range(len(positive)):
            done = index * settings.num_inference_steps
            prompts = _captions(positive, negative if guided else None, index, dit.device)
            pictures += pipeline(
                **prompts,
                latents=_packed_noise(family, settings, index),
                true_cfg_scale=settings.guidance_scale if guided else 1.0,
                width=width,
                height=height,
                num_inference_steps=settings.num_inference_steps,
                max_sequence_length=1024,
                callback_on_step_end=_step_reporter(on_step, done, steps_in_all),
            ).images
    return pictures


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
        row = negative.row(index if len(negative) > 1 else 0).to(device, torch.float32)
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
