"""`model.fit` in a generation: chosen before anything is loaded, and the pictures stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.errors import PlanError
from framework.inference.generate import generate
from framework.models import SampleSettings
from framework.runtime.fitting import fit_inference
from framework.runtime.forecast import forecast_inference
from tests.unit.inference.test_generate import model_of

SETTINGS = SampleSettings(size_px=(32, 32), num_inference_steps=2, guidance_scale=1.0, seed=3)


def test_weights_move_to_the_disk_where_memory_is_short(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where converted weights are kept
    # What is written is kept, so that only the place can be chosen and the pictures are the same.
    kept = {"precision": "bf16"}
    model = model_of(tiny_checkpoint, dit=kept, text_encoder=kept, vae=kept)
    plain = forecast_inference(model, size_px=(32, 32), guided=False, device="cpu")
    peak = max(phase.device_bytes + phase.host_bytes for phase in plain.phases)
    tight = model_of(
        tiny_checkpoint, dit=kept, text_encoder=kept, vae=kept, fit=f"{(peak - 1) / 2**20:.6f}MiB"
    )
    found = fit_inference(tight, size_px=(32, 32), guided=False, device="cpu")
    assert found.model is not None
    assert {part.offload for part in found.model.components.values()} == {"none", "disk"}
    (first,) = generate(model, prompts=["a red apple"], settings=SETTINGS)
    (second,) = generate(tight, prompts=["a red apple"], settings=SETTINGS)
    assert first.tobytes() == second.tobytes()


def test_where_nothing_fits_nothing_is_loaded(tiny_checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="nothing fits"):
        generate(model_of(tiny_checkpoint, fit="0.01MiB"), prompts=["a"], settings=SETTINGS)
