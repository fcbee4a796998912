"""What a model family must be able to do, so that training and inference never name a model.

Nothing here knows of precision, placement or adapters: modules come ready from `framework.runtime`.

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text
width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from framework.schema.families import FamilySpec

StepCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class TextConditioning:
    """Encoded captions, right padded with zeros.

    embeds: (B, L, D), any float dtype.   mask: (B, L) bool, True where a token stands.
    padded: whether any caption is shorter than L; None where only the mask knows.
    """

    embeds: Tensor
    mask: Tensor
    padded: bool | None = None

    def __post_init__(self) -> None:
        if self.embeds.shape[:2] != self.mask.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {tuple(self.embeds.shape[:2])}, "
                f"not {self.mask.dtype} of {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def is_padded(self) -> bool:
        """Whether any caption is shorter than L; asks the mask, and waits for its device, only where nobody said."""
        return not bool(self.mask.all()) if self.padded is None else self.padded

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextConditioning:
        """Move both tensors to `device` and cast the embeddings (never the mask) to `dtype`."""
        return TextConditioning(
            self.embeds.to(device=device, dtype=dtype), self.mask.to(device=device), self.padded
        )

    def row(self, index: int) -> TextConditioning:
        """Return caption `index` alone and without padding: embeds (1, L_index, D)."""
        length = int(self.mask[index].sum())
        return TextConditioning(
            self.embeds[index : index + 1, :length], self.mask[index : index + 1, :length]
        )

    @staticmethod
    def collate(rows: Sequence[TextConditioning]) -> TextConditioning:
        """Stack captions of different length, padding each with zeros to the longest of them."""
        if not rows:
            raise ValueError("no captions to collate")
        length = max(row.embeds.shape[1] for row in rows)
        pads = [length - row.embeds.shape[1] for row in rows]
        embeds = [
            nn.functional.pad(r.embeds, (0, 0, 0, p)) for r, p in zip(rows, pads, strict=True)
        ]
        masks = [nn.functional.pad(r.mask, (0, p)) for r, p in zip(rows, pads, strict=True)]
        return TextConditioning(torch.cat(embeds), torch.cat(masks))


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are made.

    size_px: width and height.   guidance_scale: 1 turns classifier-free guidance off
    (arXiv:2207.12598).
    seed: of the first prompt's noise; prompt i uses seed + i.
    """

    size_px: tuple[int, int]
    num_inference_steps: int = 30
    guidance_scale: float = 4.0
    seed: int = 0


class Family(ABC):
    """One model family: builds its components and knows how to encode, call and decode them."""

    spec: FamilySpec

    @abstractmethod
    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build a component from `folder/config.json`; its weights are whatever torch initialises.

        Call it under `accelerate.init_empty_weights()` to allocate no weights.
        Raises SourceError where the config is missing, broken or of a model that the family can't
        run.
        """

    @abstractmethod
    def load_extras(self, tokenizer_folder: Path, scheduler_folder: Path) -> None:
        """Read the tokenizer and the scheduler's config; `encode_text` and `sample` need them.

        Raises SourceError where they are missing or of another kind.
        """

    @property
    @abstractmethod
    def scheduler_config(self) -> Mapping[str, Any]:
        """The published scheduler config; RuntimeError before `load_extras`."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], text_encoder: nn.Module) -> TextConditioning:
        """Encode captions as the published pipeline does; differentiable in the text encoder."""

    @abstractmethod
    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """Length L of the longest of these captions once encoded; needs `load_extras`."""

    @abstractmethod
    def rehearse_text(
        self, num_tokens: int, text_encoder: nn.Module, *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode captions of a given length L as `encode_text` does, without a tokenizer and without their content.

        For counting memory on fake tensors, where nothing may depend on values. Returns (B, L, D).
        """

    @abstractmethod
    def encode_image(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        """Turn pixels (B, 3, H, W) in [-1, 1] into normalised latents (B, C, h, w) float32.

        Deterministic: the mode of the VAE's posterior, in training and inference alike.
        """

    @abstractmethod
    def decode_image(self, latents: Tensor, vae: nn.Module) -> Tensor:
        """Turn normalised latents (B, C, h, w) into pixels (B, 3, H, W) float32 in [-1, 1]."""

    @abstractmethod
    def reconstruct(
        self, pixels: Tensor, vae: nn.Module, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode pixels (B, 3, H, W), differentiably, to train the VAE.

        noise: (B, C, h, w) standard normal to draw from the posterior with; None takes its mode.
        Returns reconstruction (B, 3, H, W), mean and logvar (B, C, h, w) of the posterior, all
        float32. The reconstruction isn't clamped, because a clamp has no gradient where it is
        needed most.
        """

    @abstractmethod
    def predict(
        self, noisy: Tensor, sigma: Tensor, text: TextConditioning, dit: nn.Module
    ) -> Tensor:
        """Predict the velocity `noise - x0` (B, C, h, w) float32 of latents at noise level sigma.

        noisy: (B, C, h, w).   sigma: (B,) in [0, 1].   text: B captions.
        """

    @abstractmethod
    def text_width(self, dit: nn.Module) -> int:
        """Width D of the text embeddings that a DiT takes."""

    @abstractmethod
    def image_tokens(self, width_px: int, height_px: int) -> int:
        """Length of the picture's token sequence, which resolution-dependent shifts depend on."""

    @abstractmethod
    def initial_latents(self, width_px: int, height_px: int, seed: int) -> Tensor:
        """Draw the noise a picture starts from: (1, C, h, w) float32 on the CPU.

        Drawn on the CPU so that one seed means one picture on every device.
        """

    @abstractmethod
    def sample(
        self,
        positive: TextConditioning,
        negative: TextConditioning | None,
        modules: Mapping[str, nn.Module],
        settings: SampleSettings,
        *,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """Make one picture per caption with the published sampler.

        negative: one caption for all pictures or one each; needed where guidance_scale > 1.
        modules: "dit" and "vae".   on_step: called with (steps done, steps in all) after each step.
        Runs without gradients; the modules' train/eval modes are as before when it returns.
        Modules with float32 weights compute in float32 unless the caller enters `torch.autocast`.
        """

    @abstractmethod
    def save_full_component(
        self,
        component: str,
        module: nn.Module,
        folder: Path,
        *,
        source_folder: Path,
        storage_dtype: torch.dtype | None = None,
    ) -> None:
        """Write a fully trained component in the published layout, so that other tools load it.

        source_folder: the checkpoint folder it came from; its configs and unused tensors are
        copied.
        storage_dtype: None keeps each tensor's published dtype.
        """


def input_dtype(module: nn.Module) -> torch.dtype:
    """The float dtype that a module computes in: that of its first weight that is no adapter's.

    Neither FP8 codes (uint8) nor float32 adapters nor dequantisation scales (buffers) count, so a
    module in mixed formats answers with what its norms and biases rest in.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            return parameter.dtype
    raise ValueError(f"{type(module).__name__} has no floating-point weight")


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter; modules are never split over devices here."""
    return next(module.parameters()).device


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into eval mode for a while; afterwards every sub-module is in its former mode.

    Sub-modules are remembered one by one: while an adapter trains, its frozen base may be in eval
    mode.
    """
    training = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in training:
            part.training = False
        yield
    finally:
        for part, was_training in training:
            part.training = was_training
