"""FLUX.1 dev and schnell (Black Forest Labs 2024): pooled captions of CLIP, states of T5, a VAE and a DiT.

What is encoded and how the DiT is called are those of diffusers' FluxPipeline; tests compare both. dev was distilled
with guidance and takes the scale as an input; schnell was distilled to few steps and takes none. Neither needs a
negative caption.

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Tokenizer

from framework.errors import SourceError
from framework.models.autoencoder_kl import decode_latents, encode_pixels, reconstruct_pixels
from framework.models.base import (
    Family,
    SampleSettings,
    StepCallback,
    TextConditioning,
    device_of,
    input_dtype,
)
from framework.models.clip_text import CLIP_TOKENS, build_clip, fixed_length_ids, full_mask
from framework.models.latent_packing import PATCH, pack_latents, unpack_latents
from framework.models.published_config import check_kind, read_config, read_tokenizer, untyped
from framework.models.t5_encoder import build_t5_encoder
from framework.schema.specs.flux import FLUX

# The pipeline's default, for schnell too, though its card makes pictures with 256.
T5_TOKENS = 512
VAE_SCALE = 8
LATENT_CHANNELS = 16
TOKEN_CHANNELS = LATENT_CHANNELS * PATCH * PATCH
NAME = FLUX.name


class FluxFamily(Family):
    """How FLUX.1 is built, encoded, called, sampled and saved."""

    spec = FLUX

    def __init__(self) -> None:
        self._tokenizers: tuple[CLIPTokenizer, T5Tokenizer] | None = None

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build "dit", "text_encoder" (CLIP), "text_encoder_2" (T5) or "vae" from `folder/config.json`."""
        values = read_config(folder / "config.json")
        if component == "dit":
            _check_dit(values, folder)
            dit: nn.Module = untyped(FluxTransformer2DModel).from_config(values)
            for part in dit.modules():
                if type(part) is nn.RMSNorm:
                    part.__class__ = _Norm
            return dit
        if component == "vae":
            _check_vae(values, folder)
            vae: nn.Module = untyped(AutoencoderKL).from_config(values)
            return vae
        if component == "text_encoder":
            return build_clip(values, folder, family=NAME)
        if component == "text_encoder_2":
            return build_t5_encoder(values, folder, family=NAME)
        raise ValueError(f"FLUX.1 has no component {component!r}")

    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read both tokenizers and the scheduler's config from the published folders."""
        path = folders["scheduler"] / "scheduler_config.json"
        values = read_config(path)
        check_kind(values.get("_class_name"), "FlowMatchEulerDiscreteScheduler", path, family=NAME)
        self._tokenizers = (
            read_tokenizer(CLIPTokenizer, folders["tokenizer"]),
            read_tokenizer(T5Tokenizer, folders["tokenizer_2"]),
        )
        self._scheduler_config = values

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, T5Tokenizer]:
        """CLIP's and T5's tokenizer; RuntimeError before `load_extras`."""
        if self._tokenizers is None:
            raise RuntimeError("call load_extras before text is encoded")
        return self._tokenizers

    def encode_text(
        self,
        prompts: Sequence[str],
        encoders: Mapping[str, nn.Module],
        *,
        controls: Sequence[Sequence[Image.Image]] = (),
    ) -> TextConditioning:
        """Encode captions: embeds (B, 512, D) are T5's states, pooled (B, P) CLIP's state at the end of the text.

        T5 sees 512 tokens and CLIP 77, cut or padded. Padding isn't hidden from either encoder or from the DiT.
        """
        clip, t5 = encoders["text_encoder"], encoders["text_encoder_2"]
        clip_tokenizer, t5_tokenizer = self.tokenizers
        return _encode(
            fixed_length_ids(clip_tokenizer, prompts, CLIP_TOKENS, device_of(clip)),
            fixed_length_ids(t5_tokenizer, prompts, T5_TOKENS, device_of(t5)),
            encoders,
        )

    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """512, whatever the captions are."""
        return T5_TOKENS

    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode made-up tokens; see `Family.rehearse_text`."""
        lengths = {"text_encoder": CLIP_TOKENS, "text_encoder_2": num_tokens}
        clip_ids, t5_ids = (
            torch.zeros(batch_size, length, dtype=torch.long, device=device_of(encoders[name]))
            for name, length in lengths.items()
        )
        return _encode(clip_ids, t5_ids, encoders)

    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random embeddings and pooled vectors; see `Family.blank_text`."""
        width = int(untyped(dit).config.joint_attention_dim)
        embeds = torch.randn(batch_size, num_tokens, width, device=device)
        width = int(untyped(dit).config.pooled_projection_dim)
        pooled = torch.randn(batch_size, width, device=device)
        return TextConditioning(embeds, full_mask(embeds), padded=False, pooled=pooled)

    def encode_image(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        """Normalised latents (B, C, H/8, W/8) float32 of pixels (B, 3, H, W) in [-1, 1]."""
        return encode_pixels(pixels, vae)

    def decode_image(self, latents: Tensor, vae: nn.Module) -> Tensor:
        """Pixels (B, 3, 8h, 8w) float32 in [-1, 1] of normalised latents (B, C, h, w)."""
        return decode_latents(latents, vae)

    def reconstruct(
        self, pixels: Tensor, vae: nn.Module, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and logvar of pixels; see `Family.reconstruct`."""
        return reconstruct_pixels(pixels, vae, noise)

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        guidance: float | None = None,
    ) -> Tensor:
        """Velocity `noise - x0` (B, C, h, w) float32; h and w must be even.

        guidance: read by dev alone. The DiT rounds time and guidance to the number format that it computes in.
        """
        dtype, device = input_dtype(dit), device_of(dit)
        batch, _, height, width = noisy.shape
        text = text.to(device, dtype)
        scale = torch.full((batch,), 1.0 if guidance is None else guidance, device=device)
        packed = dit(
            hidden_states=pack_latents(noisy).to(device, dtype),
            timestep=time.to(device, torch.float32),
            guidance=scale if untyped(dit).config.guidance_embeds else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeds,
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=device),
            img_ids=_picture_places(height // PATCH, width // PATCH, device),
            return_dict=False,
        )[0]
        return unpack_latents(packed.float(), height, width)

    def initial_latents(
        self, width_px: int, height_px: int, seed: int, *, num_frames: int = 1
    ) -> Tensor:
        """Noise (1, 16, H/8, W/8) float32, the same as the pipeline draws from a CPU generator."""
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, LATENT_CHANNELS, height_px // VAE_SCALE, width_px // VAE_SCALE)
        return torch.randn(shape, generator=generator)

    def sample(
        self,
        positive: TextConditioning,
        negative: TextConditioning | None,
        modules: Mapping[str, nn.Module],
        settings: SampleSettings,
        *,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """One picture per caption by diffusers' FluxPipeline; see `Family.sample`.

        The guidance scale is an input of dev; schnell doesn't read it. A negative caption isn't used.
        """
        from framework.models.flux_sampling import sample_pictures

        return sample_pictures(self, positive, modules, settings, on_step=on_step)


class _Norm(nn.RMSNorm):
    """torch's norm, in float32 where its weight is: under autocast torch has no fused kernel for two number formats."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D) in x's number format."""
        normed: Tensor = super().forward(x.to(self.weight.dtype))
        return normed.to(x.dtype)


def _encode(
    clip_ids: Tensor, t5_ids: Tensor, encoders: Mapping[str, nn.Module]
) -> TextConditioning:
    """Token ids of both encoders, (B, 77) and (B, L), to what the DiT is told."""
    embeds = encoders["text_encoder_2"](t5_ids)
    pooled = encoders["text_encoder"](clip_ids).pooler_output
    pooled = pooled.to(embeds.device, embeds.dtype)
    return TextConditioning(embeds, full_mask(embeds), padded=False, pooled=pooled)


def _picture_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Place (0, row, column) of each of the picture's tokens: (rows * columns, 3) float32."""
    down = torch.arange(rows, device=device, dtype=torch.float32).repeat_interleave(columns)
    across = torch.arange(columns, device=device, dtype=torch.float32).repeat(rows)
    return torch.stack([torch.zeros_like(down), down, across], dim=1)


def _check_dit(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse the DiTs of FLUX.1 Fill, Depth and Canny, which take a picture beside the noise."""
    check_kind(values.get("_class_name"), "FluxTransformer2DModel", folder, family=NAME)
    patch = values.get("patch_size", 1)
    channels = (values.get("in_channels", TOKEN_CHANNELS), values.get("out_channels"))
    if patch != 1 or channels[0] != TOKEN_CHANNELS or channels[1] not in (None, TOKEN_CHANNELS):
        raise SourceError(
            f"a text-to-image DiT of FLUX.1 takes and gives tokens of {TOKEN_CHANNELS} channels",
            where=str(folder / "config.json"),
            found=f"in_channels {channels[0]}, out_channels {channels[1]}, patch_size {patch}",
            hint="take FLUX.1 dev or schnell",
        )


def _check_vae(values: Mapping[str, Any], folder: Path) -> None:
    check_kind(values.get("_class_name"), "AutoencoderKL", folder, family=NAME)
    scale = 2 ** (len(values.get("block_out_channels", (0,))) - 1)
    channels = values.get("latent_channels", 4)
    if scale != VAE_SCALE or channels != LATENT_CHANNELS or values.get("shift_factor") is None:
        raise SourceError(
            f"the VAE must have {LATENT_CHANNELS} channels with a shift and shrink pictures {VAE_SCALE}-fold",
            where=str(folder / "config.json"),
            found=f"{channels} channels, {scale}-fold, shift_factor {values.get('shift_factor')}",
        )
