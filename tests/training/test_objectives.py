"""Whole runs with other objectives than plain flow matching: distillation, limited noise levels, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from framework.errors import DataError
from tests.training.runs import change, fit_values, read_losses, run_values, write_pictures


def train_losses(values: dict[str, Any]) -> list[float]:
    rows = read_losses(fit_values(values).run_dir)
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


def with_seeds(folder: Path, *, seeds: tuple[str, ...] = ("3", "4", "5", "6")) -> Path:
    pictures = write_pictures(folder, count=len(seeds))
    rows = [f"{index}.png,a square,{seed}" for index, seed in enumerate(seeds)]
    (pictures / "metadata.csv").write_text("\n".join(["image,prompt,seed", *rows]) + "\n")
    return pictures


def test_a_student_comes_nearer_to_its_teacher(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The loss is a distance of pictures, so it falls though the student never sees a noise level between."""
    values = run_values(tiny_checkpoint, with_seeds(tmp_path / "pictures"), tmp_path)
    values = change(
        values,
        objective={"name": "direct_distill", "distill_steps": 2},
        trainer__max_steps=12,
        optim__lr=0.03,
        model__dit__gradient_checkpointing=True,
    )
    losses = train_losses(values)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_distillation_needs_the_seed_of_every_picture(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pictures = with_seeds(tmp_path / "pictures", seeds=("3", "", "x", "4"))
    values = run_values(tiny_checkpoint, pictures, tmp_path)
    with pytest.raises(DataError, match="2 of 4 pictures have no seed"):
        fit_values(change(values, objective={"name": "direct_distill"}))
    assert not (tmp_path / "outputs").exists()


def masked(folder: Path, *, lightness: int) -> Path:
    pictures = write_pictures(folder)
    for picture in sorted(pictures.glob("*.png")):
        Image.new("L", (32, 32), lightness).save(picture.with_suffix(".mask.png"))
    return pictures


def test_where_a_mask_is_black_nothing_is_learned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def losses(name: str, pictures: Path) -> list[float]:
        values: dict[str, Any] = run_values(tiny_checkpoint, pictures, tmp_path / name)
        return train_losses(change(values, trainer__max_steps=2))

    plain = losses("plain", write_pictures(tmp_path / "plain_pictures"))
    assert losses("white", masked(tmp_path / "white_pictures", lightness=255)) == plain
    assert losses("black", masked(tmp_path / "black_pictures", lightness=0)) == [0.0, 0.0]


def test_noise_levels_can_be_limited(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from framework.diffusion import flow_matching
    from framework.training import objective

    seen: list[float] = []
    values = run_values(tiny_checkpoint, write_pictures(tmp_path / "pictures"), tmp_path)
    values = change(values, objective={"sigma_min": 0.6, "sigma_max": 0.8})
    with pytest.MonkeyPatch.context() as patch:

        def note(x0: Any, noise: Any, sigma: Any) -> Any:
            seen.extend(sigma.tolist())
            return flow_matching.interpolate(x0, noise, sigma)

        patch.setattr(objective, "interpolate", note)
        fit_values(values)
    assert len(seen) == 8
    assert min(seen) >= 0.6 - 1e-6
    assert max(seen) <= 0.8 + 1e-6
