"""Folders of runs and sweeps as training leaves them, for the tests of what is read from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

COLUMNS = ("step", "val/loss", "train/loss", "step_seconds", "peak_memory_bytes")
CONFIG: dict[str, Any] = {
    "model": {
        "family": "qwen_image",
        "source": "assets/pocket",
        "dit": {"precision": "fp8", "trainable": "lora"},
        "vae": {"precision": "bf16", "source": None},
    },
    "data": {"path": "data/pictures", "max_px": 4096},
    "optim": {"lr": 1e-3},
    "objective": {"loss": "mse", "huber_delta": 0.1},
    "trainer": {"max_steps": 400},
    "sample": {"prompts": ["a cat", "a <dog>"]},
    "validation": {"fraction": 0.1, "sigmas": [0.1, 0.5], "every_n_steps": 200},
    "run": {"name": "pocket", "output_dir": "outputs"},
}


def write_run(
    folder: Path,
    *,
    losses: Mapping[int, float] | None = None,
    config: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    pictures: bool = False,
    step_seconds: float = 0.5,
) -> Path:
    """A run's folder. losses: validation loss by step; the training loss is half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = {0: 1.5, 200: 0.6, 400: 0.5} if losses is None else losses
    rows = [",".join(COLUMNS)]
    for step, loss in losses.items():
        train = "" if step == 0 else str(loss / 2)
        seconds = "" if step == 0 else str(step_seconds)
        rows.append(f"{step},{loss},{train},{seconds},{'' if step == 0 else 2.0**30 + step}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config or CONFIG)))
    told = {"state": "finished", "step": max(losses, default=0), "created": "a", "started": "a"}
    (folder / "run.json").write_text(json.dumps(told | dict(state or {})))
    (folder / "plan.json").write_text(json.dumps({"device": "cuda"}))
    (folder / "lora.safetensors").write_bytes(b"")
    if pictures:
        for index in range(2):
            file = folder / "samples" / "step-000400" / f"{index:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
        Image.new("RGB", (8, 8)).save(folder / "samples.png")
    return folder


def write_sweep(folder: Path, changes: Sequence[Mapping[str, str]]) -> Path:
    """A sweep's folder with points that were never started, called p0, p1 ..."""
    folder.mkdir(parents=True, exist_ok=True)
    points = [
        {
            "index": index,
            "name": f"p{index}",
            "overrides": ["recipe=pocket", *(f"{key}={value}" for key, value in change.items())],
            "changes": dict(change),
        }
        for index, change in enumerate(changes)
    ]
    content = {"version": 1, "command": ["octavo", "train", "-m"], "cwd": "/work", "points": points}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def write_point(
    sweep: Path, name: str, *, state: str = "finished", error: str = "", **run: Any
) -> Path:
    """Say how a point stands, and write its run's folder. summary: of the run's last session."""
    folder = sweep / "points" / name
    summary = run.pop("summary", None)
    write_run(folder / "001", **run)
    (folder / "point.json").write_text(json.dumps({"state": state, "error": error}))
    if summary is not None:
        told = {"state": state, "run_dir": str(folder / "001"), **summary}
        (folder / "summary.json").write_text(json.dumps(told))
    return folder
