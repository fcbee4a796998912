"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324): Qwen2.5-VL's language model, a VAE and a 2-stream DiT.

What is encoded and how the DiT is called are those of diffusers' QwenImagePipeline; tests compare
both.

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel, Qwen2Tokenizer

from framework.errors import SourceError
from framework.models.base import (
    Family,
    SampleSettings,
    StepCallback,
    TextConditioning,
    device_of,
    input_dtype,
)
from framework.models.latent_packing import PATCH as PATCH
from framework.models.latent_packing import pack_latents as pack_latents
from framework.models.latent_packing import unpack_latents as unpack_latents
from framework.models.published_config import check_kind, read_config, read_tokenizer, untyped
from framework.schema.families import QWEN_IMAGE

# The pipeline's own constants: the prompt's frame, and how many of its tokens are dropped again.
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_DROPPED_TOKENS = 34
MAX_TEXT_TOKENS = 1024
VAE_SCALE = 8
LATENT_CHANNELS = 16
FAMILY = QWEN_IMAGE.name


class QwenImageFamily(Family):
    """How Qwen-Image is built, encoded, called, sampled and saved."""

    spec = QWEN_IMAGE

    def __init__(self) -> None:
        self._tokenizer: Qwen2Tokenizer | None = None

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build "dit", "text_encoder" (the language model alone) or "vae" from `folder/config.json`.

        The vision tower and the output head of the published text encoder are never built: they
        take no part in encoding text. Both generations of its config are read: nested `text_config`
        or flat.
        """
        values = read_config(folder / "config.json")
        if component == "dit":
            _check_dit(values, folder)
            dit: nn.Module = untyped(QwenImageTransformer2DModel).from_config(values)
            return dit
        if component == "vae":
            _check_vae(values, folder)
            vae: nn.Module = untyped(AutoencoderKLQwenImage).from_config(values)
            return vae
        if component == "text_encoder":
            check_kind(values.get("model_type"), "qwen2_5_vl", folder, family=FAMILY)
            config: Any = Qwen2_5_VLConfig.from_dict(values).text_config
            return Qwen2_5_VLTextModel(config)
        raise ValueError(f"Qwen-Image has no component {component!r}")

    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read the tokenizer and the scheduler's config from the published folders."""
        path = folders["scheduler"] / "scheduler_config.json"
        values = read_config(path)
        check_kind(
            values.get("_class_name"), "FlowMatchEulerDiscreteScheduler", path, family=FAMILY
        )
        self._tokenizer = read_tokenizer(
            Qwen2Tokenizer, folders["tokenizer"], frame_token="<|im_start|>"
        )
        self._scheduler_config = values

    @property
    def tokenizer(self) -> Qwen2Tokenizer:
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
        """Encode captions inside the pipeline's prompt template; at most 1024 tokens count.

        Returns embeds (B, L, D) in the text encoder's dtype. The last hidden state is taken after
        the final norm, and the template's first 34 tokens are dropped. An empty caption is the
        template alone.
        """
        text_encoder = encoders["text_encoder"]
        texts = [PROMPT_TEMPLATE.format(prompt) for prompt in prompts]
        limit = MAX_TEXT_TOKENS + NUM_DROPPED_TOKENS
        tokens = self.tokenizer(
            texts, max_length=limit, padding=True, truncation=True, return_tensors="pt"
        ).to(device_of(text_encoder))
        hidden = text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
        ).last_hidden_state
        rows = []
        for states, present in zip(hidden, tokens.attention_mask.bool(), strict=True):
            kept = states[present][NUM_DROPPED_TOKENS:]
            mask = torch.ones(1, len(kept), dtype=torch.bool, device=kept.device)
            rows.append(TextConditioning(kept[None], mask))
        return TextConditioning.collate(rows)

    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """Length of the longest caption without the template's 34 tokens; at most 1024."""
        texts = [PROMPT_TEMPLATE.format(prompt) for prompt in prompts]
        longest = max((len(ids) for ids in self.tokenizer(texts).input_ids), default=0)
        return min(longest - NUM_DROPPED_TOKENS, MAX_TEXT_TOKENS)

    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode made-up tokens; see `Family.rehearse_text`. Captions of one length need no mask."""
        text_encoder = encoders["text_encoder"]
        device = device_of(text_encoder)
        length = num_tokens + NUM_DROPPED_TOKENS
        ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        hidden = text_encoder(input_ids=ids, use_cache=False).last_hidden_state
        rows = [
            TextConditioning(
                states[None, NUM_DROPPED_TOKENS:],
                torch.ones(1, num_tokens, dtype=torch.bool, device=device),
            )
            for states in hidden
        ]
        collated = TextConditioning.collate(rows)
        return TextConditioning(collated.embeds, collated.mask, padded=batch_size > 1)

    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random embeddings of one length; see `Family.blank_text`."""
        width = int(untyped(dit).config.joint_attention_dim)
        embeds = torch.randn(batch_size, num_tokens, width, device=device)
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        return TextConditioning(embeds, mask, padded=batch_size > 1)

    def encode_image(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        """Normalised latents (B, C, H/8, W/8) float32 of pixels (B, 3, H, W) in [-1, 1]."""
        mean, std = _latent_statistics(vae)
        frames = pixels[:, :, None].to(device_of(vae), input_dtype(vae))
        latents: Tensor = untyped(vae).encode(frames).latent_dist.mode()[:, :, 0]
        return (latents.float() - mean) / std

    def decode_image(self, latents: Tensor, vae: nn.Module) -> Tensor:
        """Pixels (B, 3, 8h, 8w) float32 in [-1, 1] of normalised latents (B, C, h, w)."""
        mean, std = _latent_statistics(vae)
        frames = latents.to(device_of(vae), torch.float32) * std + mean
        pixels: Tensor = untyped(vae).decode(
            frames[:, :, None].to(input_dtype(vae)), return_dict=False
        )[0]
        return pixels[:, :, 0].float().clamp(-1, 1)

    def reconstruct(
        self, pixels: Tensor, vae: nn.Module, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and logvar of pixels; see `Family.reconstruct`.

        Decoder and post-quant convolution are called directly because `vae.decode` clamps.
        """
        frames = pixels[:, :, None].to(device_of(vae), input_dtype(vae))
        posterior = untyped(vae).encode(frames).latent_dist
        mean, logvar = posterior.mean[:, :, 0].float(), posterior.logvar[:, :, 0].float()
        latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(mean)
        decoded = untyped(vae).decoder(
            untyped(vae).post_quant_conv(latents[:, :, None].to(frames.dtype))
        )
        return decoded[:, :, 0].float(), mean, logvar

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

        The DiT is fed the noise level itself as its time (the scheduler's timestep / 1000). A mask without
        padding is left out, as the pipeline does, because attention without a mask has faster
        kernels.
        """
        dtype, device = input_dtype(dit), device_of(dit)
        height, width = noisy.shape[-2:]
        text = text.to(device, dtype)
        packed = dit(
            hidden_states=pack_latents(noisy).to(device, dtype),
            timestep=time.to(device, torch.float32),
            encoder_hidden_states=text.embeds,
            encoder_hidden_states_mask=text.mask if text.is_padded else None,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * noisy.shape[0],
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
        """One picture per caption by diffusers' QwenImagePipeline; see `Family.sample`."""
        from framework.models.qwen_image_sampling import sample_pictures

        return sample_pictures(self, positive, negative, modules, settings, on_step=on_step)


def _latent_statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Published mean and standard deviation of the latents, each (1, C, 1, 1) float32."""
    device = device_of(vae)
    f32 = torch.float32
    config = untyped(vae).config
    mean = torch.tensor(config.latents_mean, dtype=f32, device=device).view(1, -1, 1, 1)
    std = torch.tensor(config.latents_std, dtype=f32, device=device).view(1, -1, 1, 1)
    return mean, std


def _check_dit(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse variants of the DiT that need inputs which text-to-image doesn't have."""
    check_kind(values.get("_class_name"), "QwenImageTransformer2DModel", folder, family=FAMILY)
    for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
        if values.get(key):
            raise SourceError(
                f"a DiT with {key} isn't a text-to-image Qwen-Image",
                where=str(folder / "config.json"),
                hint="take a text-to-image checkpoint such as Qwen/Qwen-Image",
            )
    channels = values.get("in_channels", LATENT_CHANNELS * PATCH * PATCH)
    if channels != LATENT_CHANNELS * PATCH * PATCH or values.get("patch_size", PATCH) != PATCH:
        raise SourceError(
            f"the DiT must take {LATENT_CHANNELS} latent channels in {PATCH} x {PATCH} patches",
            where=str(folder / "config.json"),
            found=f"in_channels {channels}, patch_size {values.get('patch_size', PATCH)}",
        )


def _check_vae(values: Mapping[str, Any], folder: Path) -> None:
    check_kind(values.get("_class_name"), "AutoencoderKLQwenImage", folder, family=FAMILY)
    scale = 2 ** len(values.get("temperal_downsample", (0, 0, 0)))
    channels = values.get("z_dim", LATENT_CHANNELS)
    if scale != VAE_SCALE or channels != LATENT_CHANNELS:
        raise SourceError(
            f"the VAE must have {LATENT_CHANNELS} channels and shrink pictures {VAE_SCALE}-fold",
            where=str(folder / "config.json"),
            found=f"{channels} channels, {scale}-fold",
        )
