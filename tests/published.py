"""Writes the tiny transformer as other programs publish FP8 checkpoints, for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.storage.fp8 import encode_e4m3

LAYOUTS = ("plain", "comfyui", "comfyui_new", "musubi_channel", "musubi_block", "deepseek")


def publish_fp8(transformer: Path, folder: Path, layout: str, *, prefix: str = "") -> Path:
    """Write `folder` with config.json and one FP8 file.

    transformer: folder of the bf16 original.   layout: of `LAYOUTS`, or "mixed": one after the other.
    prefix: before each key.   All 2-D weights become FP8, also those that a family keeps in high precision.
    """
    folder.mkdir(parents=True)
    shutil.copy(transformer / "config.json", folder)
    written: dict[str, Tensor] = {}
    weights = 0
    for key, value in load_state(transformer).items():
        if value.ndim != 2:
            written[key] = value
            continue
        chosen = LAYOUTS[weights % len(LAYOUTS)] if layout == "mixed" else layout
        weights += 1
        written |= weight_in_fp8(key.removesuffix(".weight"), value, chosen)
    if layout in ("comfyui", "mixed"):
        written["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file({prefix + key: value for key, value in written.items()}, folder / "fp8.safetensors")
    return folder


def load_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's files, by key."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return dict(sorted(state.items()))


def weight_in_fp8(layer: str, weight: Tensor, layout: str) -> dict[str, Tensor]:
    """What stands in a file for `<layer>.weight` in a layout."""
    one = torch.ones(())
    if layout == "plain":
        return {f"{layer}.weight": weight.to(torch.float8_e4m3fn)}
    if layout.startswith("comfyui"):
        codes, scale = encode_e4m3(weight, "tensor")
        found = {f"{layer}.weight": codes}
        if layout == "comfyui":
            found |= {f"{layer}.scale_weight": scale[0], f"{layer}.scale_input": one}
        else:
            note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()))
            found |= {
                f"{layer}.weight_scale": scale[0],
                f"{layer}.input_scale": one,
                f"{layer}.comfy_quant": note.to(torch.uint8),
            }
    elif layout == "musubi_channel":
        codes, scale = encode_e4m3(weight, "row")
        found = {f"{layer}.weight": codes, f"{layer}.scale_weight": scale[:, None]}
    elif layout == "musubi_block":
        codes, scale = encode_e4m3(weight, "block", (1, 8))
        found = {f"{layer}.weight": codes, f"{layer}.scale_weight": scale[:, :, None]}
    else:
        codes, scale = encode_e4m3(weight, "block")
        found = {f"{layer}.weight": codes, f"{layer}.weight_scale_inv": scale}
    found[f"{layer}.weight"] = codes.view(torch.float8_e4m3fn)
    return {key: value.clone() for key, value in found.items()}
