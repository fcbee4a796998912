"""Wan 2.1 text-to-video (Wan Team 2025, arXiv:2503.20314): UMT5-XXL, a causal video VAE and a cross-attention DiT.

What is encoded and how the DiT is called are those of diffusers' WanPipeline; tests compare both.

Shape letters: B batch, C latent channels, F frames, T latent frames (F = 4 (T - 1) + 1), H W picture px, h w latent
size, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn
from transformers import T5Tokenizer

from framework.errors import SourceError
from framework.models.base import (
    Clip,
    Family,
    SampleSettings,
    StepCallback,
    TextConditioning,
    device_of,
    input_dtype,
)
from framework.models.published_config import (
    check_kind,
    check_values,
    read_config,
    read_tokenizer,
    untyped,
)
from framework.models.umt5_encoder import build_umt5_encoder
from framework.schema.family import FamilySpec
from framework.schema.specs.wan2_1 import WAN2_1

# The DiT has no mask: it was trained on captions that zero vectors fill up to this length.
MAX_TEXT_TOKENS = 512
VAE_SCALE = 8
VAE_FRAMES = 4
LATENT_CHANNELS = 16
TIME_SCALE = 1000.0
FRAMES_PER_SECOND = 16.0

_DIT = {
    "patch_size": [1, 2, 2],
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
_VAE = {
    "z_dim": LATENT_CHANNELS,
    "is_residual": False,
    "patch_size": None,
    "scale_factor_spatial": VAE_SCALE,
    "scale_factor_temporal": VAE_FRAMES,
}


class Wan21Family(Family):
    """How Wan 2.1 text-to-video is built, encoded, called, sampled and saved."""

    spec: FamilySpec = WAN2_1

    def __init__(self) -> None:
        self._tokenizer: T5Tokenizer | None = None

    @property
    def boundary(self) -> float | None:
        """Noise level at which a second expert takes over; None where one denoiser does all."""
        return None

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build a denoiser, "text_encoder" (UMT5's stack of blocks) or "vae" from `folder/config.json`."""
        values = read_config(folder / "config.json")
        family = self.spec.name
        if component in self.spec.denoisers:
            check_kind(values.get("_class_name"), "WanTransformer3DModel", folder, family=family)
            check_values({**_DIT, **values}, _DIT, folder, what="a Wan text-to-video DiT")
            return _build_dit(values)
        if component == "vae":
            check_kind(values.get("_class_name"), "AutoencoderKLWan", folder, family=family)
            check_values({**_VAE, **values}, _VAE, folder, what="the VAE of Wan 2.1 and 2.2 A14B")
            vae: nn.Module = untyped(AutoencoderKLWan).from_config(values)
            return vae
        if component == "text_encoder":
            return build_umt5_encoder(values, folder, family=family)
        raise ValueError(f"{family} has no component {component!r}")

    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read the tokenizer and the scheduler's config from the published folders."""
        path = folders["scheduler"] / "scheduler_config.json"
        values = read_config(path)
        check_kind(
            values.get("_class_name"), "UniPCMultistepScheduler", path, family=self.spec.name
        )
        self._tokenizer = read_tokenizer(T5Tokenizer, folders["tokenizer"])
        self._scheduler_config = values
        self._check_experts(folders["scheduler"].parent / "model_index.json")

    def _check_experts(self, index: Path) -> None:
        """Refuse a checkpoint with two experts, of which this family would take the first alone.

        index: model_index.json, which isn't fetched from the hub for a family that doesn't need it.
        """
        if index.is_file() and read_config(index).get("boundary_ratio") is not None:
            raise SourceError(
                f"{self.spec.name} has one denoiser, this checkpoint has two",
                where=str(index),
                found="boundary_ratio",
                hint="write model.family=wan2_2",
            )

    @property
    def tokenizer(self) -> T5Tokenizer:
        """The checkpoint's tokenizer; RuntimeError before `load_extras`."""
        if self._tokenizer is None:
            raise RuntimeError("call load_extras before text is encoded")
        return self._tokenizer

    def encode_text(
        self,
        prompts: Sequence[str],
        encoders: Mapping[str, nn.Module],
        *,
        controls: Sequence[Sequence[Image.Image]] = (),
    ) -> TextConditioning:
        """Encode captions, cleaned as the pipeline cleans them; at most 512 tokens count, the end token among them.

        Returns embeds (B, L, D) in the text encoder's dtype, only as long as the longest caption: the zeros up to 512
        that the DiT needs are added when it is called. An empty caption is the end token alone.
        """
        text_encoder = encoders["text_encoder"]
        tokens = self.tokenizer(
            _cleaned(prompts),
            max_length=MAX_TEXT_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(device_of(text_encoder))
        hidden = text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).last_hidden_state
        mask = tokens.attention_mask.bool()
        return TextConditioning(hidden * mask[..., None], mask)

    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """Length of the longest caption with its end token; at most 512."""
        ids = self.tokenizer(_cleaned(prompts)).input_ids
        return min(max((len(row) for row in ids), default=0), MAX_TEXT_TOKENS)

    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode made-up tokens; see `Family.rehearse_text`."""
        text_encoder = encoders["text_encoder"]
        shape, device = (batch_size, num_tokens), device_of(text_encoder)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        ids = torch.zeros(shape, dtype=torch.long, device=device)
        hidden = text_encoder(input_ids=ids).last_hidden_state
        return TextConditioning(hidden * mask[..., None], mask, padded=batch_size > 1)

    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random embeddings of one length; see `Family.blank_text`."""
        width = int(untyped(dit).config.text_dim)
        embeds = torch.randn(batch_size, num_tokens, width, device=device)
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        return TextConditioning(embeds, mask, padded=batch_size > 1)

    def encode_image(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        """Normalised latents (B, C, T, H/8, W/8) float32 of clips (B, 3, F, H, W) in [-1, 1].

        Raises ValueError where F isn't a multiple of 4 plus one; the VAE would drop what is too much.
        """
        mean, std = _latent_statistics(vae)
        frames = _whole_groups(pixels).to(device_of(vae), input_dtype(vae))
        latents: Tensor = untyped(vae).encode(frames).latent_dist.mode()
        return (latents.float() - mean) / std

    def decode_image(self, latents: Tensor, vae: nn.Module) -> Tensor:
        """Clips (B, 3, F, 8h, 8w) float32 in [-1, 1] of normalised latents (B, C, T, h, w)."""
        mean, std = _latent_statistics(vae)
        raw = latents.to(device_of(vae), torch.float32) * std + mean
        pixels: Tensor = untyped(vae).decode(raw.to(input_dtype(vae)), return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    def reconstruct(
        self, pixels: Tensor, vae: nn.Module, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and logvar of clips; see `Family.reconstruct`.

        The decoder is called directly because `vae.decode` clamps.
        """
        frames = _whole_groups(pixels).to(device_of(vae), input_dtype(vae))
        posterior = untyped(vae).encode(frames).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return _decode_unclamped(latents.to(frames.dtype), vae).float(), mean, logvar

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        guidance: float | None = None,
    ) -> Tensor:
        """Velocity `noise - x0` (B, C, T, h, w) float32; h and w must be even.

        The DiT is told 1000 times the noise level, and captions with zeros up to 512.
        """
        dtype, device = input_dtype(dit), device_of(dit)
        answer: Tensor = dit(
            hidden_states=noisy.to(device, dtype),
            timestep=TIME_SCALE * time.to(device, torch.float32),
            encoder_hidden_states=full_length(text.embeds.to(device, dtype)),
            return_dict=False,
        )[0]
        return answer.float()

    def initial_latents(
        self, width_px: int, height_px: int, seed: int, *, num_frames: int = 1
    ) -> Tensor:
        """Noise (1, 16, T, H/8, W/8) float32, the same as the pipeline draws from a CPU generator."""
        generator = torch.Generator("cpu").manual_seed(seed)
        num_latent_frames = (num_frames - 1) // VAE_FRAMES + 1
        size = (height_px // VAE_SCALE, width_px // VAE_SCALE)
        return torch.randn((1, LATENT_CHANNELS, num_latent_frames, *size), generator=generator)

    def sample(
        self,
        positive: TextConditioning,
        negative: TextConditioning | None,
        modules: Mapping[str, nn.Module],
        settings: SampleSettings,
        *,
        on_step: StepCallback | None = None,
    ) -> list[Clip]:
        """One clip of 16 frames per second per caption by diffusers' WanPipeline; see `Family.sample`."""
        from framework.models.wan_sampling import sample_clips

        return sample_clips(self, positive, negative, modules, settings, on_step=on_step)


class _MixedRmsNorm(nn.RMSNorm):
    """The same norm with its weight in the input's dtype: under autocast torch has no fused kernel for two dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        assert self.weight is not None
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _build_dit(values: Mapping[str, Any]) -> nn.Module:
    dit: nn.Module = untyped(WanTransformer3DModel).from_config(values)
    for part in dit.modules():
        if type(part) is nn.RMSNorm:
            part.__class__ = _MixedRmsNorm
    return dit


def full_length(embeds: Tensor) -> Tensor:
    """Captions (B, L, D) with zeros up to the length that the DiT was trained on: (B, 512, D)."""
    return nn.functional.pad(embeds, (0, 0, 0, MAX_TEXT_TOKENS - embeds.shape[1]))


def _cleaned(prompts: Sequence[str]) -> list[str]:
    """Captions without HTML entities and needless white space; broken characters are mended where ftfy is installed."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return [str(untyped(prompt_clean)(prompt)) for prompt in prompts]


def _whole_groups(pixels: Tensor) -> Tensor:
    num_frames = pixels.shape[2]
    if num_frames % VAE_FRAMES != 1:
        raise ValueError(
            f"the number of frames must be a multiple of {VAE_FRAMES} plus one, not {num_frames}"
        )
    return pixels


def _decode_unclamped(latents: Tensor, vae: nn.Module) -> Tensor:
    """What `vae.decode` returns before its clamp: frame by latent frame, with the decoder's memory of those before."""
    inner = untyped(vae)
    hidden = inner.post_quant_conv(latents)
    # One place for each convolution over time; more do no harm.
    memory: list[Any] = [None for _ in inner.decoder.modules()]
    parts = [
        inner.decoder(
            hidden[:, :, index : index + 1],
            feat_cache=memory,
            feat_idx=[0],
            first_chunk=index == 0,
        )
        for index in range(hidden.shape[2])
    ]
    return torch.cat(parts, dim=2)


def _latent_statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Published mean and standard deviation of the latents, each (1, C, 1, 1, 1) float32."""
    config, device = untyped(vae).config, device_of(vae)
    mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=device)
    std = torch.tensor(config.latents_std, dtype=torch.float32, device=device)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
