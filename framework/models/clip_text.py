"""What FLUX.1 and SDXL share in their text encoders: CLIP's text models, and captions padded to a fixed length.

Neither model is given a mask: padding is part of what the text encoders and the denoiser see, so captions are always
as long as the pipelines make them.

Shape letters: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from framework.models.published_config import check_kind

CLIP_TOKENS = 77


def build_clip(
    values: Mapping[str, Any], folder: Path, *, family: str, projects: bool = False
) -> nn.Module:
    """CLIP's text model from its config.   projects: with the pooled state's projection (OpenCLIP bigG)."""
    check_kind(values.get("model_type"), "clip_text_model", folder, family=family)
    config = CLIPTextConfig.from_dict(dict(values))
    return CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)


def fixed_length_ids(
    tokenizer: Any, prompts: Sequence[str], length: int, device: torch.device
) -> Tensor:
    """Token ids (B, length) int64 on `device`: longer captions are cut, shorter ones filled with the padding token."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids.to(device)
    return ids


def full_mask(embeds: Tensor) -> Tensor:
    """A mask (B, L) that hides nothing, for embeddings (B, L, D)."""
    return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
