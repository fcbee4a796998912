"""Small runs on the tiny checkpoint, for the training tests."""

from __future__ import annotations

import csv
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from framework.schema import RunConfig

CAPTIONS = (
    "a red square",
    "a green square",
    "a blue square",
    "a grey square",
    "",
    "a cat",
    "a dog",
)
# Columns that measure the machine, not the training.
MEASURED = ("step_seconds", "peak_memory_bytes")


def write_pictures(folder: Path, *, count: int = 6, size_px: tuple[int, int] = (32, 32)) -> Path:
    """Flat pictures of different colours with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        colour = (40 * index % 256, 90 * index % 256, 200 - 20 * index)
        Image.new("RGB", size_px, colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(CAPTIONS[index % len(CAPTIONS)])
    return folder


def run_values(checkpoint: Path, pictures: Path, folder: Path) -> dict[str, Any]:
    """A run of four steps that trains a LoRA on the DiT in bf16, without samples and validation."""
    return {
        "model": {
            "family": "qwen_image",
            "source": str(checkpoint),
            "device": "cpu",
            "dit": {"trainable": "lora", "precision": "bf16", "lora": {"rank": 4}},
        },
        "data": {
            "path": str(pictures),
            "batch_size": 2,
            "max_px": 32 * 32,
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"lr": 1e-2},
        "trainer": {"max_steps": 4, "log_every_n_steps": 1, "seed": 7},
        "checkpoint": {"every_n_steps": 2},
        "logger": {"tensorboard": False},
        "run": {"name": "tiny", "output_dir": str(folder / "outputs")},
    }


def change(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Copy with other values: `model__dit__precision="fp8"` stands for model.dit.precision."""
    changed = deepcopy(values)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = changed
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return changed


def fit_values(values: dict[str, Any]) -> Any:
    """Train in this process."""
    from framework.training.fit import fit

    config = RunConfig.model_validate(values)
    return fit(config, config_yaml=yaml.safe_dump(values, sort_keys=False))


def read_losses(run_dir: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what the machine's speed decides."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
