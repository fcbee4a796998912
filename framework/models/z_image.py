"""Z-Image (Tongyi-MAI, arXiv:2511.22699), base and Turbo: Qwen3-4B, FLUX's VAE and a single-stream DiT.

What is encoded and how the DiT is called are those of diffusers' ZImagePipeline; tests compare both.

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

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
from framework.models.published_config import check_kind, read_config, read_tokenizer, untyped
from framework.schema.specs.z_image import Z_IMAGE

# The pipeline's own default; the chat template counts.
MAX_TEXT_TOKENS = 512
VAE_SCALE = 8
PATCH = 2
LATENT_CHANNELS = 16
FAMILY = Z_IMAGE.name


class ZImageFamily(Family):
    """How Z-Image is built, encoded, called, sampled and saved. Base and Turbo differ in weights and scheduler only."""

    spec = Z_IMAGE

    def __init__(self) -> None:
        self._tokenizer: Qwen2Tokenizer | None = None

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build "dit", "text_encoder" or "vae" from `folder/config.json`.

        The text encoder answers with the input of its last layer, which is what the DiT was trained on. The last
        layer is there, because the files have it, but never runs; the final norm and the head aren't built.
        """
        values = read_config(folder / "config.json")
        if component == "dit":
            _check_dit(values, folder)
            dit: nn.Module = untyped(ZImageTransformer2DModel).from_config(values)
            return dit
        if component == "vae":
            _check_vae(values, folder)
            vae: nn.Module = untyped(AutoencoderKL).from_config(values)
            return vae
        if component == "text_encoder":
            check_kind(values.get("model_type"), "qwen3", folder, family=FAMILY)
            encoder: Any = Qwen3Model(Qwen3Config.from_dict(values))
            encoder.norm = nn.Identity()
            encoder.config.num_hidden_layers -= 1
            built: nn.Module = encoder
            return built
        raise ValueError(f"Z-Image has no component {component!r}")

    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read the tokenizer, which must have a chat template, and the scheduler's config."""
        path = folders["scheduler"] / "scheduler_config.json"
        values = read_config(path)
        check_kind(
            values.get("_class_name"), "FlowMatchEulerDiscreteScheduler", path, family=FAMILY
        )
        tokenizer: Qwen2Tokenizer = read_tokenizer(
            Qwen2Tokenizer, folders["tokenizer"], frame_token="<|im_start|>"
        )
        if tokenizer.chat_template is None:
            raise SourceError(
                "the tokenizer has no chat template, which frames every caption",
                where=str(folders["tokenizer"]),
                hint="fetch the checkpoint's tokenizer folder again",
            )
        self._tokenizer = tokenizer
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
        """Encode captions as one turn of a chat; at most 512 tokens count, the chat's frame among them.

        Returns embeds (B, L, D) in the text encoder's dtype: the input of its last layer, without the final norm. An
        empty caption is the frame alone.
        """
        text_encoder = encoders["text_encoder"]
        tokens = self.tokenizer(
            self._framed(prompts),
            max_length=MAX_TEXT_TOKENS,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(device_of(text_encoder))
        hidden = text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
        ).last_hidden_state
        rows = []
        for states, present in zip(hidden, tokens.attention_mask.bool(), strict=True):
            kept = states[present]
            mask = torch.ones(1, len(kept), dtype=torch.bool, device=kept.device)
            rows.append(TextConditioning(kept[None], mask))
        return TextConditioning.collate(rows)

    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """Length of the longest caption with the chat's frame; at most 512."""
        ids = self.tokenizer(self._framed(prompts)).input_ids
        return min(max((len(row) for row in ids), default=0), MAX_TEXT_TOKENS)

    def _framed(self, prompts: Sequence[str]) -> list[str]:
        """Each caption as the user's turn, with the answer's beginning after it."""
        return [
            str(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=True,
                )
            )
            for prompt in prompts
        ]

    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode made-up tokens; see `Family.rehearse_text`."""
        text_encoder = encoders["text_encoder"]
        device = device_of(text_encoder)
        ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
        hidden = text_encoder(input_ids=ids, use_cache=False).last_hidden_state
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        return TextConditioning(hidden, mask, padded=False)

    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random embeddings of one length; see `Family.blank_text`."""
        width = int(untyped(dit).config.cap_feat_dim)
        embeds = torch.randn(batch_size, num_tokens, width, device=device)
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        return TextConditioning(embeds, mask, padded=False)

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

        The DiT counts its time from noise (0) to picture (1) and answers with `x0 - noise`. It takes pictures and
        captions as lists, each without padding.
        """
        dtype, device = input_dtype(dit), device_of(dit)
        pictures = noisy.to(device, dtype)[:, :, None].unbind(0)
        answers = dit(
            list(pictures),
            1 - time.to(device, torch.float32),
            _without_padding(text.to(device, dtype)),
            return_dict=False,
        )[0]
        return -torch.stack(answers)[:, :, 0].float()

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
        """One picture per caption by diffusers' ZImagePipeline; see `Family.sample`.

        guidance_scale is the pipeline's own number, by which the difference to the negative caption is added to the
        positive answer: 4 here is 5 in families that add it to the negative one. Up to 1 there is no guidance, as
        Turbo wants it.
        """
        from framework.models.z_image_sampling import sample_pictures

        return sample_pictures(self, positive, negative, modules, settings, on_step=on_step)


def _without_padding(text: TextConditioning) -> list[Tensor]:
    """Each caption alone, (L_i, D). Asks the mask, and waits for its device, unless all are known to be full."""
    if text.padded is False:
        return list(text.embeds.unbind(0))
    lengths = text.mask.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(text.embeds, lengths, strict=True)]


def _check_dit(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse variants of the DiT that need inputs which text-to-image doesn't have."""
    check_kind(values.get("_class_name"), "ZImageTransformer2DModel", folder, family=FAMILY)
    where = str(folder / "config.json")
    if values.get("siglip_feat_dim") is not None:
        raise SourceError(
            "a DiT with siglip_feat_dim isn't a text-to-image Z-Image",
            where=where,
            hint="take a text-to-image checkpoint such as Tongyi-MAI/Z-Image",
        )
    patches = (values.get("all_patch_size", [PATCH]), values.get("all_f_patch_size", [1]))
    channels = values.get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS or patches != ([PATCH], [1]):
        raise SourceError(
            f"the DiT must take {LATENT_CHANNELS} latent channels in {PATCH} x {PATCH} patches",
            where=where,
            found=f"in_channels {channels}, all_patch_size {patches[0]}, all_f_patch_size {patches[1]}",
        )


def _check_vae(values: Mapping[str, Any], folder: Path) -> None:
    check_kind(values.get("_class_name"), "AutoencoderKL", folder, family=FAMILY)
    scale = 2 ** (len(values.get("block_out_channels", ())) - 1)
    channels = values.get("latent_channels")
    if scale != VAE_SCALE or channels != LATENT_CHANNELS:
        raise SourceError(
            f"the VAE must have {LATENT_CHANNELS} channels and shrink pictures {VAE_SCALE}-fold",
            where=str(folder / "config.json"),
            found=f"{channels} channels, {scale:g}-fold",
        )
