"""Qwen-Image-Edit and its later editions 2509 and 2511: Qwen-Image that is shown pictures to change.

A control picture enters twice: through the text encoder's vision tower, and as latents whose tokens stand behind the
noisy ones in the transformer's sequence. The first edition (QwenImageEditPipeline) takes one and shows it to the
encoder in full size; the later ones (QwenImageEditPlusPipeline) take several and show small copies. All else that is
published is alike, so `model_index.json` decides. 2511 gives control tokens the time 0 (`zero_cond_t`), which the
transformer does by itself.

Two things differ from diffusers' pipelines. The encoder is told which tokens are pictures (`mm_token_type_ids`):
otherwise transformers 5 numbers all tokens in one line, other than the weights were trained with. And a batch may hold
several captions, each with controls of its own.

Shape letters: B batch, C latent channels, H W picture px, h w latent size, L text tokens, D text
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLImageProcessorPil

from framework.errors import DataError, SourceError
from framework.models.base import SampleSettings, StepCallback, TextConditioning, device_of
from framework.models.published_config import check_kind, read_config, untyped
from framework.models.qwen_image import (
    LATENT_CHANNELS,
    PATCH,
    VAE_SCALE,
    QwenImageFamily,
    pack_latents,
)
from framework.schema.specs.qwen_image_edit import QWEN_IMAGE_EDIT

# The pipelines' own constants: the prompt's frame, and how many of its tokens are dropped again.
PROMPT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new "
    "image that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_DROPPED_TOKENS = 64
IMAGE_TOKEN = "<|image_pad|>"
PLUS_PIPELINE = "QwenImageEditPlusPipeline"
PIPELINES = ("QwenImageEditPipeline", PLUS_PIPELINE)
CONTROL_PX = 1024 * 1024
"""Area that control pictures are brought to for the VAE; the first edition's text encoder sees them so, too."""
SMALL_PX = 384 * 384
"""Area in which later editions show control pictures to the text encoder."""
_SIDE_DIVISOR_PX = 32


def control_size(size_px: tuple[int, int]) -> tuple[int, int]:
    """Width and height in px, multiples of 32, that a control picture of this size has for the VAE."""
    return fitted_size(size_px, CONTROL_PX)


class QwenImageEditFamily(QwenImageFamily):
    """How Qwen-Image-Edit is built, encoded, called, sampled and saved."""

    spec = QWEN_IMAGE_EDIT
    control_size = staticmethod(control_size)  # type: ignore[assignment]  # taken for a method

    def __init__(self) -> None:
        super().__init__()
        self._image_processor: Any = None
        self._takes_several = False

    def build_module(self, component: str, folder: Path) -> nn.Module:
        """As Qwen-Image's, but for the text encoder: language model and vision tower, without the output head."""
        if component != "text_encoder":
            return super().build_module(component, folder)
        path = folder / "config.json"
        values = read_config(path)
        check_kind(values.get("model_type"), "qwen2_5_vl", path, family=self.spec.name)
        return Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(values))

    def load_extras(self, folders: Mapping[str, Path]) -> None:
        """Read tokenizer, scheduler and picture processor, and which edition the checkpoint is."""
        super().load_extras(folders)
        folder = folders["processor"]
        try:
            processor = untyped(Qwen2VLImageProcessorPil)
            self._image_processor = processor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SourceError(
                "the picture processor can't be read",
                where=str(folder),
                found=str(error),
                hint="fetch the checkpoint's processor folder again",
            ) from error
        self._takes_several = _read_pipeline(folder.parent / "model_index.json") == PLUS_PIPELINE

    @property
    def image_processor(self) -> Any:
        """Cuts pictures into the vision tower's patches; RuntimeError before `load_extras`."""
        if self._image_processor is None:
            raise RuntimeError("call load_extras before pictures are encoded")
        return self._image_processor

    def encode_text(
        self,
        prompts: Sequence[str],
        encoders: Mapping[str, nn.Module],
        *,
        controls: Sequence[Sequence[Image.Image]] = (),
    ) -> TextConditioning:
        """Encode captions and their control pictures inside the pipeline's prompt template; nothing is cut off.

        Returns embeds (B, L, D) in the text encoder's dtype, the pictures' tokens among them. The last hidden state is
        taken after the final norm, and the template's first 64 tokens are dropped.
        Raises DataError for more pictures than the edition takes, ValueError for a caption without any.
        """
        encoder = untyped(encoders["text_encoder"])
        if len(controls) != len(prompts) or not all(controls):
            raise ValueError("every caption needs control pictures")
        device = device_of(encoder)
        shown = [self._shown(picture) for own in controls for picture in own]
        patches = self.image_processor(images=shown, return_tensors="pt")
        grids = patches.image_grid_thw
        counts = iter((grids.prod(1) // self.image_processor.merge_size**2).tolist())
        texts = [
            self._framed(prompt, [next(counts) for _ in own])
            for prompt, own in zip(prompts, controls, strict=True)
        ]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        hidden = encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=patches.pixel_values.to(device),
            image_grid_thw=grids.to(device),
            mm_token_type_ids=(tokens.input_ids == encoder.config.image_token_id).int(),
            use_cache=False,
        ).last_hidden_state
        rows = []
        for states, present in zip(hidden, tokens.attention_mask.bool(), strict=True):
            kept = states[present][NUM_DROPPED_TOKENS:]
            mask = torch.ones(1, len(kept), dtype=torch.bool, device=kept.device)
            rows.append(TextConditioning(kept[None], mask))
        return TextConditioning.collate(rows)

    def count_text_tokens(self, prompts: Sequence[str]) -> int:
        """Length of the longest caption with one square control picture, without the template's 64 tokens."""
        side = math.isqrt(self._shown_px)
        patches = self.image_processor.get_number_of_image_patches(side, side)
        count = patches // self.image_processor.merge_size**2
        texts = [self._framed(prompt, [count]) for prompt in prompts]
        longest = max((len(ids) for ids in self.tokenizer(texts).input_ids), default=0)
        return int(longest) - NUM_DROPPED_TOKENS

    def rehearse_text(
        self, num_tokens: int, encoders: Mapping[str, nn.Module], *, batch_size: int = 1
    ) -> TextConditioning:
        """Encode made-up tokens by the language model alone; see `Family.rehearse_text`.

        The vision tower can't run on tensors without values. Without gradients it holds less than the language model
        that runs after it: at most 4 patches a token, in layers a fifth as wide.
        """
        encoder = untyped(encoders["text_encoder"])
        device = device_of(encoder)
        length = num_tokens + NUM_DROPPED_TOKENS
        ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        hidden = encoder.language_model(input_ids=ids, use_cache=False).last_hidden_state
        mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        embeds = hidden[:, NUM_DROPPED_TOKENS:].clone()
        return TextConditioning(embeds, mask, padded=batch_size > 1)

    def blank_text(
        self, num_tokens: int, dit: nn.Module, *, batch_size: int = 1, device: torch.device
    ) -> TextConditioning:
        """Random embeddings, and one square control picture of noise for each."""
        text = super().blank_text(num_tokens, dit, batch_size=batch_size, device=device)
        width, height = (side // VAE_SCALE for side in control_size((1, 1)))
        control = torch.randn(batch_size, LATENT_CHANNELS, height, width, device=device)
        return replace(text, controls=(control,))

    def encode_control(self, picture: Image.Image, vae: nn.Module) -> Tensor:
        """Normalised latents (1, C, h, w) float32 of a control picture, scaled to about 1024 x 1024 px."""
        scaled = _scaled(picture, control_size(picture.size))
        pixels = torch.from_numpy(np.asarray(scaled, dtype=np.float32)).permute(2, 0, 1)
        return self.encode_image(2 * (pixels[None] / 255) - 1, vae)

    def predict(
        self,
        noisy: Tensor,
        time: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        guidance: float | None = None,
    ) -> Tensor:
        """Velocity `noise - x0` (B, C, h, w) float32 of the noisy picture alone; see `QwenImageFamily.predict`."""
        plain = replace(text, controls=())
        return super().predict(
            noisy, time, plain, DitWithControls(dit, text.controls), guidance=guidance
        )

    def sample(
        self,
        positive: TextConditioning,
        negative: TextConditioning | None,
        modules: Mapping[str, nn.Module],
        settings: SampleSettings,
        *,
        on_step: StepCallback | None = None,
    ) -> list[Image.Image]:
        """One picture per caption and its `controls`, which the negative caption shares; see `Family.sample`.

        The edit pipelines step as QwenImagePipeline does, which is given a transformer that adds the control tokens.
        """
        made: list[Image.Image] = []
        count = len(positive)
        for index in range(count):
            row = positive.row(index)
            away = negative
            if negative is not None and len(negative) == count:
                away = negative.row(index)
            dit = DitWithControls(modules["dit"], row.controls)
            made += super().sample(
                row,
                away,
                {**modules, "dit": dit},
                replace(settings, seed=settings.seed + index),
                on_step=_within(on_step, index, count),
            )
        return made

    @property
    def _shown_px(self) -> int:
        return SMALL_PX if self._takes_several else CONTROL_PX

    def _shown(self, picture: Image.Image) -> Image.Image:
        """A control picture as the processor is given it."""
        return _scaled(picture, fitted_size(picture.size, self._shown_px))

    def _framed(self, prompt: str, counts: Sequence[int]) -> str:
        """The caption in its template.   counts: tokens of each control picture."""
        if not self._takes_several and len(counts) > 1:
            raise DataError(
                f"the first edition of Qwen-Image-Edit takes one control picture, not {len(counts)}",
                hint="take Qwen/Qwen-Image-Edit-2509 or 2511, or leave out the other pictures",
            )
        if IMAGE_TOKEN in prompt:
            raise DataError(
                f"{IMAGE_TOKEN} stands for a control picture and can't be part of a caption",
                found=prompt,
                hint="take it out of the caption",
            )
        pictures = ""
        for number, count in enumerate(counts, start=1):
            pictures += f"Picture {number}: " if self._takes_several else ""
            pictures += f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>"
        return PROMPT_TEMPLATE.format(pictures + prompt)


class DitWithControls(nn.Module):
    """A DiT that takes the noisy picture's tokens and predicts for them, with control tokens beside them.

    controls: latents (B, C, h, w) of each control picture, h and w even; one row serves every B.
    """

    def __init__(self, inner: nn.Module, controls: Sequence[Tensor]) -> None:
        super().__init__()
        if not controls:
            raise ValueError("Qwen-Image-Edit needs the latents of control pictures")
        self.inner: Any = inner
        self._tokens = torch.cat([pack_latents(control) for control in controls], dim=1)
        self._shapes = [(1, c.shape[-2] // PATCH, c.shape[-1] // PATCH) for c in controls]

    @property
    def config(self) -> Any:
        """The published config of the DiT."""
        return self.inner.config

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pass the pipeline's hint on."""
        with self.inner.cache_context(name):
            yield

    def forward(
        self,
        hidden_states: Tensor,
        img_shapes: Sequence[Sequence[tuple[int, int, int]]],
        **others: Any,
    ) -> tuple[Tensor]:
        """Call the DiT with the picture's tokens (B, T, 4C) first; returns what it predicts for those."""
        batch, length, _ = hidden_states.shape
        controls = self._tokens.to(hidden_states).expand(batch, -1, -1)
        others["return_dict"] = False
        predicted = self.inner(
            hidden_states=torch.cat([hidden_states, controls], dim=1),
            img_shapes=[[*shapes, *self._shapes] for shapes in img_shapes],
            **others,
        )[0]
        return (predicted[:, :length],)


def fitted_size(size_px: tuple[int, int], area_px: int) -> tuple[int, int]:
    """Width and height in the picture's proportions with about this area, both multiples of 32."""
    ratio = size_px[0] / size_px[1]
    width = math.sqrt(area_px * ratio)
    sides = (round(side / _SIDE_DIVISOR_PX) * _SIDE_DIVISOR_PX for side in (width, width / ratio))
    # The pipelines would give a side of 0 to a picture some thousand times as wide as high.
    wide, high = (max(_SIDE_DIVISOR_PX, side) for side in sides)
    return wide, high


def _scaled(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    return picture.convert("RGB").resize(size_px, Image.Resampling.LANCZOS)


def _read_pipeline(path: Path) -> str:
    """The pipeline class of a checkpoint, which tells the editions apart."""
    found = read_config(path).get("_class_name")
    if found not in PIPELINES:
        raise SourceError(
            f"this is no {' or '.join(PIPELINES)}",
            where=str(path),
            found=repr(found),
            hint="give model.source a checkpoint of the family qwen_image_edit",
        )
    return str(found)


def _within(on_step: StepCallback | None, index: int, count: int) -> StepCallback | None:
    """Report the steps of picture `index` as part of all `count` pictures' steps."""
    if on_step is None:
        return None
    return lambda done, in_all: on_step(index * in_all + done, count * in_all)
