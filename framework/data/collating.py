"""From samples to a batch.

B batch, C latent channels, F frames, H W picture height and width, T h w latent frames, height and width,
L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from framework.data.cache import EMBEDS


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of samples that share a bucket.

    Returns "pixels" (B, 3, H, W) or (B, 3, F, H, W), or "latents" (B, C, h, w) or (B, C, T, h, w);
    "captions" list, or "text_embeds" (B, L, D), zero where "text_mask" (B, L) bool is False, and "text_<name>" (B, …)
    for every other tensor of the captions' entries; "geometry" (B, 6) int64; "indices", "positions" (B,) int64;
    "keys" list; "micro_step" int.
    "noise_seeds" list of int, where every sample has one.
    "mask" (B, 1, H, W) float32 where any of the samples has one; the others' are ones.
    "controls", with control pictures: a list with one tensor (B, C, h, w) per place where their latents are cached,
    else one list of B pictures per place; "control_images", such lists of pictures, where captions are encoded in
    the step though latents are cached.
    """
    batch: dict[str, Any] = {
        "indices": torch.tensor([item["index"] for item in items]),
        "positions": torch.tensor([item["position"] for item in items]),
        "keys": [item["key"] for item in items],
        "micro_step": items[0]["micro_step"],
        "geometry": torch.stack([item["geometry"] for item in items]),
    }
    picture = "latents" if "latents" in items[0] else "pixels"
    batch[picture] = torch.stack([item[picture] for item in items])
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    else:
        batch |= _collate_text([item["text"] for item in items])
    if any("mask" in item for item in items):
        batch["mask"] = _collate_masks([item.get("mask") for item in items])
    if all("noise_seed" in item for item in items):
        batch["noise_seeds"] = [item["noise_seed"] for item in items]
    for name in ("controls", "control_images"):
        if name in items[0]:
            places = list(zip(*(item[name] for item in items), strict=True))
            batch[name] = [
                torch.stack(place) if isinstance(place[0], Tensor) else list(place)
                for place in places
            ]
    return batch


def pad_text(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad embeddings (L_i, D) on the right to (B, L, D) with zeros; the mask (B, L) bool is True on real tokens."""
    longest = max(text.shape[0] for text in texts)
    embeds = texts[0].new_zeros(len(texts), longest, texts[0].shape[1])
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        embeds[row, : text.shape[0]] = text
        mask[row, : text.shape[0]] = True
    return embeds, mask


def _collate_text(texts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    embeds, mask = pad_text([text[EMBEDS] for text in texts])
    others = {
        f"text_{name}": torch.stack([text[name] for text in texts])
        for name in texts[0]
        if name != EMBEDS
    }
    return {"text_embeds": embeds, "text_mask": mask, **others}


def _collate_masks(masks: Sequence[Tensor | None]) -> Tensor:
    everywhere = torch.ones_like(next(mask for mask in masks if mask is not None))
    return torch.stack([everywhere if mask is None else mask for mask in masks])
