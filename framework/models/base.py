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
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from framework.schema.families import FamilySpec

StepCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class TextConditioning:
    """What a denoiser is told beside noise: encoded captions, right padded with zeros, and what some families add.

    embeds: (B, L, D), any float dtype.   mask: (B, L) bool, True where a token stands.
    padded: whether any caption is shorter than L; None where only the mask knows.
    pooled: (B, P), one vector per caption, for families that take one.
    controls: latents (B, C, h, w) of the control pictures, in their order.
    geometry: (B, 6) int64, original height and width, top and left of the crop, target height and width, in px;
    None where the picture is shown whole in its own size.
    """

    embeds: Tensor
    mask: Tensor
    padded: bool | None = None
    pooled: Tensor | None = None
    controls: tuple[Tensor, ...] = ()
    geometry: Tensor | None = None

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
        """Move all tensors to `device` and cast embeddings, pooled vectors and controls to `dtype`."""
        return TextConditioning(
            self.embeds.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.padded,
            None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
            tuple(control.to(device=device, dtype=dtype) for control in self.controls),
            None if self.geometry is None else self.geometry.to(device=device),
        )

    def row(self, index: int) -> TextConditioning:
        """Return caption `index` alone and without padding: embeds (1, L_index, D)."""
        length = int(self.mask[index].sum())
        one = slice(index, index + 1)
        return TextConditioning(
            self.embeds[one, :length],
            self.mask[one, :length],
            pooled=None if self.pooled is None else self.pooled[one],
            controls=tuple(control[one] for control in self.controls),
            geometry=None if self.geometry is None else self.geometry[one],
        )

    def tensors(self) -> dict[str, Tensor]:
        """What belongs to the caption of a single row, by the names under which it is cached.

        "embeds" (L, D), and "pooled" (P,) where there is one. `from_tensors` makes a row of them again.
        """
        found = {"embeds": self.embeds[0]}
        if self.pooled is not None:
            found["pooled"] = self.pooled[0]
        return found

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> TextConditioning:
        """One row of the tensors that `tensors` gave."""
        embeds = tensors["embeds"][None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        pooled = tensors.get("pooled")
        return TextConditioning(embeds, mask, pooled=None if pooled is None else pooled[None])

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
        controls = zip(*(row.controls for row in rows), strict=True)
        return TextConditioning(
            torch.cat(embeds),
            torch.cat(masks),
            pooled=_joined([row.pooled for row in rows]),
            controls=tuple(torch.cat(same) for same in controls),
            geometry=_joined([row.geometry for row in rows]),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if len(present) not in (0, len(parts)):
        raise ValueError("either every row has it or none")
    return torch.cat(present) if present else None


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are made.

    size_px: width and height.   guidance_scale: 1 turns classifier-free guidance off (arXiv:2207.12598); models that
    were distilled with guidance (FLUX.1 dev) take it as an input instead.
    seed: of the first prompt's noise; prompt i uses seed + i.   num_frames: of a clip; 1 for pictures.
    control_images: files of control pictures, one per prompt, for families that edit pictures.
    """

    size_px: tuple[int, int]
    num_inference_steps: int = 30
    guidance_scale: float = 4.0
    seed: int = 0
    num_frames: int = 1
    control_images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A short film.   frames: at least one, all of one size.   fps: frames per second."""

    frames: tuple[Image.Image, ...]
    fps: float


Sample = Image.Image | Clip
"""What sampling makes: a picture, or a clip by families whose spec says so."""


class Family(ABC):
    """One model family: builds its components and knows how to encode, call and decode them."""

    spec: FamilySpec
    control_size: ClassVar[Callable[[tuple[int, int]], tuple[int, int]] | None] = None
    """The size (width, height) that a control picture of a given size is brought to; a function of its module."""

    _scheduler_config: Mapping[str, Any] | None = None

    @abstractmethod
    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build a component from `folder/config.json`; its weights are whatever torch initialises.

        Call it under `accelerate.init_empty_weights()` to allocate no weights.
        Raises SourceError where the config is missing, broken or of a model that the family can't
        run.
        """

    @abstractmethod
    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read tokenizers and the scheduler's config; `encode_text` and `sample` need them.

        folders: of each of `spec.extras`, by its name.
        Raises SourceError where they are missing or of another kind.
        """

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The published scheduler config; RuntimeError before `load_extras`, which sets it."""
        if self._scheduler_config is None:
            raise RuntimeError("call load_extras before the scheduler is asked for")
        return self._scheduler_config

    @abstractmethod
    def encode_text(
        self,
        prompts: Sequence[str],
        encoders: Mapping[str, nn.Module],
        *,
        controls: Sequence[Sequence[Image.Image]] = (),
    ) -> TextConditioning:
        """Encode captions as the published pipeline does; differentiable in the text encoders.

        encoders: all of `spec.text_encoders`.   controls: the control pictures of each prompt, RGB, of any size, for
        families that show them to the text encoder; their latents aren't part of the result (see `encode_control`).
        """

    @abstractmethod
    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """Length L of the longest of these captions once encoded; needs `load_extras`."""

    @abstractmethod
    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode captions of a given length L as `encode_text` does, without a tokenizer and without their content.

        For counting memory on fake tensors, where nothing may depend on values. Returns (B, L, D).
        """

    @abstractmethod
    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random captions (float32) of a given length as this DiT takes them, and blank controls where it needs some.

        For measuring and for counting memory without text encoders. Draws from torch's global generator.
        """

    def encode_control(self, picture: Image.Image, vae: nn.Module) -> Tensor:
        """Normalised latents (1, C, h, w) float32 of a control picture, brought to the size in which it is given.

        Families with `spec.num_controls` above 0 have it.
        """
        raise TypeError(f"{self.spec.name} takes no control pictures")

    @abstractmethod
    def encode_image(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        """Turn pixels (B, 3, H, W) in [-1, 1] into normalised latents (B, C, h, w) float32.

        Families of clips: pixels (B, 3, F, H, W) into (B, C, T, h, w).
        Deterministic: the mode of the VAE's posterior, in training and inference alike.
        """

    @abstractmethod
    def decode_image(self, latents: Tensor, vae: nn.Module) -> Tensor:
        """Turn normalised latents into pixels float32 in [-1, 1]; shapes as of `encode_image`."""

    @abstractmethod
    def reconstruct(
        self, pixels: Tensor, vae: nn.Module, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode pixels (B, 3, H, W), or (B, 3, F, H, W) of clips, differentiably, to train the VAE.

        noise: in the latents' shape, standard normal to draw from the posterior with; None takes its mode.
        Returns reconstruction in the pixels' shape, mean and logvar of the posterior in the latents' shape, all
        float32. The reconstruction isn't clamped, because a clamp has no gradient where it is
        needed most.
        """

    @abstractmethod
    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        guidance: float | None = None,
    ) -> Tensor:
        """What the family's objective learns, in the latents' shape and float32.

        noisy: (B, C, h, w), or (B, C, T, h, w) of clips.   text: B captions.
        time: (B,). With flow matching the noise level sigma in [0, 1], and the result is the velocity `noise - x0`.
        With DDPM a step of the schedule, 0 to 999, and the result is what the scheduler's `prediction_type` names.
        guidance: given to models that were distilled with it; None gives 1. Others pay it no heed.
        """

    def sigma_range(self, component: str) -> tuple[float, float]:
        """Lowest and highest noise level at which a denoiser is asked; all of them, unless a family has two experts."""
        return (0.0, 1.0)

    def image_tokens(self, width_px: int, height_px: int) -> int:
        """Length of the picture's token sequence, which resolution-dependent shifts depend on.

        One token for each square of `spec.size_divisor_px`, unless a family says otherwise.
        """
        divisor = self.spec.size_divisor_px
        return (width_px // divisor) * (height_px // divisor)

    @abstractmethod
    def initial_latents(
        self, width_px: int, height_px: int, seed: int, *, num_frames: int = 1
    ) -> Tensor:
        """Draw the noise a picture starts from: (1, C, h, w) float32 on the CPU; (1, C, T, h, w) for a clip.

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
    ) -> Sequence[Sample]:
        """Make one picture, or clip, per caption with the published sampler.

        negative: one caption for all pictures or one each; needed where guidance_scale > 1.
        modules: the denoisers and the "vae".   on_step: called with (steps done, steps in all) after each step.
        Runs without gradients; the modules' train/eval modes are as before when it returns.
        Modules with float32 weights compute in float32 unless the caller enters `torch.autocast`.
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
