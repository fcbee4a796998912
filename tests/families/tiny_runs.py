"""Small runs of every model family: pictures, clips or pairs to train on, a tiny checkpoint, and a configuration.

A family's checkpoint is built by `build_checkpoint` of tests/families/<family>.py, which is found by its name.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from framework.schema.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
SIDE_PX = 64
NUM_FRAMES = 5
CAPTIONS = ("a red apple", "a penguin", "an umbrella", "a sailboat", "a house", "a sunflower")
# Drawings in two styles, one above the other: where they lie in the picture, in px.
_SHEET = ROOT / "docs" / "images" / "pocket_lora.png"
_LEFT, _TOP, _STEP, _SIDE = 118, 58, 204, 184
# Instead of 1024 x 1024 and 384 x 384, which take seconds on a CPU.
_CONTROL_PX, _SMALL_PX = 64 * 64, 56 * 56


def build_checkpoint(family: str, folder: Path) -> Path:
    """Write the family's tiny checkpoint."""
    name = "tests.checkpoints" if family == "qwen_image" else f"tests.families.{family}"
    built: Path = import_module(name).build_checkpoint(folder)
    return built


def shrink_controls(patch: pytest.MonkeyPatch) -> None:
    """Let control pictures be small."""
    from framework.models import qwen_image_edit

    patch.setattr(qwen_image_edit, "CONTROL_PX", _CONTROL_PX)
    patch.setattr(qwen_image_edit, "SMALL_PX", _SMALL_PX)


def write_samples(family: str, folder: Path) -> Path:
    """Write six drawings with captions in the form that the family trains on: pictures, clips, or pairs."""
    folder.mkdir(parents=True)
    spec = FAMILIES[family]
    for index, caption in enumerate(CAPTIONS):
        (folder / f"{index}.txt").write_text(caption)
        picture = drawing(index)
        if spec.media == "video":
            frames = [_moved(picture, 3 * frame) for frame in range(NUM_FRAMES)]
            frames[0].save(
                folder / f"{index}.webp",
                save_all=True,
                append_images=frames[1:],
                duration=100,
                lossless=True,
            )
            continue
        picture.save(folder / f"{index}.png")
        if spec.num_controls:
            drawing(index, row=1).save(folder / f"{index}.control.png")
    return folder


def drawing(index: int, *, row: int = 0) -> Image.Image:
    """One of six drawings.   row: 0 for the coloured one, 1 for the line drawing of the same thing."""
    left, top = _LEFT + index * _STEP, _TOP + row * _STEP
    with Image.open(_SHEET) as sheet:
        tile = sheet.convert("RGB").crop((left, top, left + _SIDE, top + _SIDE))
    return tile.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def _moved(picture: Image.Image, px: int) -> Image.Image:
    """The picture further to the left."""
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, px, 0, 1, 0))


def run_values(family: str, checkpoint: Path, samples: Path, folder: Path) -> dict[str, Any]:
    """A run of two steps that trains a LoRA on the denoiser in bf16, without samples and validation.

    folder: for the cache, the converted weights and the results.
    """
    spec = FAMILIES[family]
    data: dict[str, Any] = {
        "path": str(samples),
        "batch_size": 2,
        "max_px": SIDE_PX**2,
        "cache_dir": str(folder / "cache"),
    }
    if spec.media == "video":
        data |= {"num_frames": NUM_FRAMES, "fps": 10.0}
    return {
        "model": {
            "family": family,
            "source": str(checkpoint),
            "device": "cpu",
            "converted_dir": str(folder / "converted"),
            # A large alpha and rate, so that a few steps show.
            "dit": {"trainable": "lora", "lora": {"rank": 4, "alpha": 64.0}},
        },
        "data": data,
        "objective": {"name": spec.objective},
        "optim": {"lr": 2e-3},
        "trainer": {"max_steps": 2, "log_every_n_steps": 1, "seed": 7},
        "checkpoint": {"every_n_steps": 100},
        "logger": {"tensorboard": False},
        "run": {"name": "tiny", "output_dir": str(folder / "outputs")},
    }


def vram_setup(name: str) -> dict[str, Any]:
    """A set-up of conf/vram as values of the model section."""
    text = (ROOT / "conf" / "vram" / f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values
