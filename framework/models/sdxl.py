"""SDXL (Podell et al. 2023, arXiv:2307.01952): two CLIP text models, a VAE and a UNet that predicts noise or v.

What is encoded and how the UNet is called are those of diffusers' StableDiffusionXLPipeline; tests compare both. The
UNet is the component "dit".

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

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
from framework.models.published_config import (
    check_kind,
    check_values,
    read_config,
    read_tokenizer,
    untyped,
)
from framework.schema.specs.sdxl import SDXL

VAE_SCALE = 8
LATENT_CHANNELS = 4
NUM_TIME_IDS = 6
PREDICTIONS = ("epsilon", "v_prediction")
NAME = SDXL.name


class SdxlFamily(Family):
    """How SDXL is built, encoded, called, sampled and saved."""

    spec = SDXL

    def __init__(self) -> None:
        self._tokenizers: tuple[CLIPTokenizer, CLIPTokenizer] | None = None
        self._zeros_for_empty = True

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """Build "dit" (the UNet), "text_encoder", "text_encoder_2" or "vae" from `folder/config.json`."""
        values = read_config(folder / "config.json")
        if component == "dit":
            _check_unet(values, folder)
            unet: nn.Module = untyped(UNet2DConditionModel).from_config(values)
            return unet
        if component == "vae":
            _check_vae(values, folder)
            vae: nn.Module = untyped(AutoencoderKL).from_config(values)
            return vae
        if component in ("text_encoder", "text_encoder_2"):
            projects = component == "text_encoder_2"
            return build_clip(values, folder, family=NAME, projects=projects)
        raise ValueError(f"SDXL has no component {component!r}")

    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read both tokenizers, the scheduler's config, and what the checkpoint says of empty captions.

        Schedulers that have the same noise schedule are taken too; pictures are made with EulerDiscrete all the same.
        """
        path = folders["scheduler"] / "scheduler_config.json"
        values = read_config(path)
        _check_scheduler(values, path)
        self._tokenizers = (
            read_tokenizer(CLIPTokenizer, folders["tokenizer"]),
            read_tokenizer(CLIPTokenizer, folders["tokenizer_2"]),
        )
        self._scheduler_config = values
        index = folders["scheduler"].parent / "model_index.json"
        # The pipeline's default where the checkpoint doesn't say.
        self._zeros_for_empty = not index.is_file() or bool(
            read_config(index).get("force_zeros_for_empty_prompt", True)
        )

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        """The tokenizers of both text encoders, which pad differently; RuntimeError before `load_extras`."""
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
        """Encode captions: embeds (B, 77, D) of both text encoders side by side, pooled (B, P) of the second.

        Captions are cut or padded to 77 tokens, and nothing is hidden. A blank caption becomes zeros where the
        checkpoint has `force_zeros_for_empty_prompt`, as the pipeline does where no negative prompt is given; that is
        how SDXL was trained, and what caption dropout trains.
        """
        ids = [
            fixed_length_ids(tokenizer, prompts, CLIP_TOKENS, device_of(encoders[name]))
            for tokenizer, name in zip(self.tokenizers, self.spec.text_encoders, strict=True)
        ]
        text = _encode(ids[0], ids[1], encoders)
        blank = [self._zeros_for_empty and not prompt.strip() for prompt in prompts]
        return _with_zeros(text, blank) if any(blank) else text

    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """77, whatever the captions are."""
        return CLIP_TOKENS

    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode made-up tokens; see `Family.rehearse_text`."""
        ids = [
            torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device_of(encoders[name]))
            for name in self.spec.text_encoders
        ]
        return _encode(ids[0], ids[1], encoders)

    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random embeddings and pooled vectors; see `Family.blank_text`."""
        width = int(untyped(dit).config.cross_attention_dim)
        embeds = torch.randn(batch_size, num_tokens, width, device=device)
        pooled = torch.randn(batch_size, _pooled_width(untyped(dit).config), device=device)
        return TextConditioning(embeds, full_mask(embeds), padded=False, pooled=pooled)

    def encode_image(self, pixels: Tensor, vae: nn.Module) -> Tensor:
        """Normalised latents (B, C, H/8, W/8) float32 of pixels (B, 3, H, W) in [-1, 1]."""
        with without_float16(vae):
            return encode_pixels(pixels, vae)

    def decode_image(self, latents: Tensor, vae: nn.Module) -> Tensor:
        """Pixels (B, 3, 8h, 8w) float32 in [-1, 1] of normalised latents (B, C, h, w)."""
        with without_float16(vae):
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
        """The noise, or v, as the scheduler's `prediction_type` says: (B, C, h, w) float32.

        time: (B,) steps of the schedule.   Without `text.geometry` the picture is one that was never scaled or cropped.
        """
        dtype, device = input_dtype(dit), device_of(dit)
        text = text.to(device, dtype)
        predicted = dit(
            noisy.to(device, dtype),
            time.to(device),
            encoder_hidden_states=text.embeds,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": _time_ids(text, noisy)},
            return_dict=False,
        )[0]
        result: Tensor = predicted.float()
        return result

    def image_tokens(self, width_px: int, height_px: int) -> int:
        """Places of the latents, one per 8 x 8 px; the UNet has no tokens, and its schedule doesn't depend on size."""
        return (width_px // VAE_SCALE) * (height_px // VAE_SCALE)

    def initial_latents(
        self, width_px: int, height_px: int, seed: int, *, num_frames: int = 1
    ) -> Tensor:
        """Noise (1, 4, H/8, W/8) float32, the same as the pipeline draws from a CPU generator, before it is scaled."""
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
        """One picture per caption by diffusers' StableDiffusionXLPipeline; see `Family.sample`."""
        from framework.models.sdxl_sampling import sample_pictures

        return sample_pictures(self, positive, negative, modules, settings, on_step=on_step)


@contextmanager
def without_float16(vae: nn.Module) -> Iterator[None]:
    """Let a VAE compute in float32 where it would in float16, in which SDXL's overflows and pictures become black.

    Weights that rest in float16 are float32 meanwhile, but for those in FP8 or elsewhere than on the device, which are
    decoded to whatever is computed in. VAEs that were made for float16 (`force_upcast` false) are left alone.
    """
    place = device_of(vae).type
    half = torch.float16
    is_half = input_dtype(vae) == half
    is_cast = torch.is_autocast_enabled(place) and torch.get_autocast_dtype(place) == half
    if not untyped(vae).config.force_upcast or not (is_half or is_cast):
        yield
        return
    widened = [parameter for parameter in vae.parameters() if parameter.dtype == half]
    try:
        for parameter in widened:
            parameter.data = parameter.data.float()
        with torch.autocast(place, enabled=False):
            yield
    finally:
        for parameter in widened:
            parameter.data = parameter.data.to(half)


def _encode(
    first_ids: Tensor, second_ids: Tensor, encoders: Mapping[str, nn.Module]
) -> TextConditioning:
    """Token ids (B, L) of both encoders to what the UNet is told: states before each encoder's last layer."""
    first = encoders["text_encoder"](first_ids, output_hidden_states=True)
    second = encoders["text_encoder_2"](second_ids, output_hidden_states=True)
    states, more = first.hidden_states[-2], second.hidden_states[-2]
    embeds = torch.cat([states, more.to(states.device, states.dtype)], dim=-1)
    pooled = second.text_embeds.to(embeds.device, embeds.dtype)
    return TextConditioning(embeds, full_mask(embeds), padded=False, pooled=pooled)


def _with_zeros(text: TextConditioning, blank: Sequence[bool]) -> TextConditioning:
    """Captions with zeros instead of what blank ones became."""
    assert text.pooled is not None
    gone = torch.tensor(blank, device=text.embeds.device)
    return TextConditioning(
        text.embeds.masked_fill(gone[:, None, None], 0),
        text.mask,
        text.padded,
        text.pooled.masked_fill(gone[:, None], 0),
    )


def _time_ids(text: TextConditioning, noisy: Tensor) -> Tensor:
    """Original size, crop and target size (B, 6) float32; of latents (B, C, h, w) shown whole where nothing is said."""
    if text.geometry is not None:
        return text.geometry.float()
    height, width = (side * VAE_SCALE for side in noisy.shape[-2:])
    whole = [height, width, 0, 0, height, width]
    ids = torch.tensor([whole], dtype=torch.float32, device=text.embeds.device)
    return ids.expand(noisy.shape[0], NUM_TIME_IDS)


def _pooled_width(config: Mapping[str, Any]) -> int:
    """Width P of the pooled caption: what is left of the added embedding's input beside six sizes."""
    added = int(config["projection_class_embeddings_input_dim"])
    return added - NUM_TIME_IDS * int(config["addition_time_embed_dim"])


def _check_unet(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse UNets of other models, of inpainting, and those that were distilled with guidance."""
    check_kind(values.get("_class_name"), "UNet2DConditionModel", folder, family=NAME)
    expected = {
        "addition_embed_type": "text_time",
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "time_cond_proj_dim": None,
    }
    defaults = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    check_values({**defaults, **values}, expected, folder, what="a text-to-image UNet of SDXL")


def _check_vae(values: Mapping[str, Any], folder: Path) -> None:
    check_kind(values.get("_class_name"), "AutoencoderKL", folder, family=NAME)
    scale = 2 ** (len(values.get("block_out_channels", (0,))) - 1)
    channels = values.get("latent_channels", LATENT_CHANNELS)
    own = [key for key in ("latents_mean", "latents_std") if values.get(key) is not None]
    if scale != VAE_SCALE or channels != LATENT_CHANNELS or own:
        raise SourceError(
            f"the VAE must have {LATENT_CHANNELS} channels, one factor for all, and shrink pictures {VAE_SCALE}-fold",
            where=str(folder / "config.json"),
            found=", ".join([f"{channels} channels", f"{scale}-fold", *own]),
        )


def _check_scheduler(values: Mapping[str, Any], path: Path) -> None:
    found = values.get("_class_name")
    compatible = (EulerDiscreteScheduler.__name__, *EulerDiscreteScheduler._compatibles)
    if found not in compatible:
        check_kind(found, EulerDiscreteScheduler.__name__, path, family=NAME)
    kind = values.get("prediction_type", PREDICTIONS[0])
    if kind not in PREDICTIONS:
        raise SourceError(
            f"prediction_type must be {' or '.join(PREDICTIONS)}", where=str(path), found=repr(kind)
        )
