"""Every model family trains, is stored in FP8, rests wherever it is told to, and makes pictures with what it learnt.

Whole runs of the tiny checkpoints through the same entry as `octavo train`: encode, train, save, and generate with the
result. docs/families.md is made from what is found here; see tests/families/page.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framework.inference.generate import generate
from framework.models import SampleSettings
from framework.schema import ModelConfig
from framework.schema.families import FAMILIES
from framework.training import fit
from tests.families import tiny_runs
from tests.training.runs import change, fit_values, read_losses

# diffusers' schedulers hand torch's tensors to numpy.array in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")

NUM_STEPS = {"lora": 12, "full": 6}
# Set-ups of conf/vram that move weights, and what they are equal to: the same number formats, all on the device.
SETUPS = {"component_offload": "bf16", "fp8": "fp8", "dynamic": "fp8", "disk": "fp8"}
VALIDATION = {"fraction": 0.17, "every_n_steps": 100}  # one of six


class Bench:
    """One family's tiny checkpoint and samples, and the runs that were made of them."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.folder = folder
        self.checkpoint = tiny_runs.build_checkpoint(family, folder / "checkpoint")
        samples = tiny_runs.write_samples(family, folder / "samples")
        self.controls = sorted(samples.glob("*.control.png"))[:1]
        values = tiny_runs.run_values(family, self.checkpoint, samples, folder)
        self.values = {**values, "validation": VALIDATION}
        self._results: dict[str, Any] = {}

    @cached_property
    def plain(self) -> np.ndarray[Any, Any]:
        """What the checkpoint makes as it is."""
        return self.make()

    def run(self, name: str, **changes: Any) -> Any:
        """The result of a run; made once for each name."""
        if name not in self._results:
            values = change(self.values, run__name=name, **changes)
            with pytest.MonkeyPatch.context() as patch:
                if name != "fp8":
                    # What a run will hold in memory is counted by a rehearsal, which takes as long as the run.
                    patch.setattr(fit, "traced_run", lambda plan, config, *, family: plan)
                self._results[name] = fit_values(values)
        return self._results[name]

    def bf16(self) -> Any:
        """A LoRA on the base as it is, with all on the device: the set-up `none`."""
        return self.run("bf16", **self.setup(tiny_runs.vram_setup("none")))

    def lora(self) -> Any:
        """A LoRA on the FP8 base, with all on the device."""
        stored = {"precision": "fp8", "offload": "none"}
        resident = {"vram_limit": None, "dit": stored, "text_encoder": stored, "vae": {}}
        return self.run("fp8", **self.setup(resident), trainer__max_steps=NUM_STEPS["lora"])

    def setup(self, values: dict[str, Any]) -> dict[str, Any]:
        """Changes that store and place components so; both experts and both encoders alike."""
        model = {**self.values["model"], **values, "dit": {**self.values["model"]["dit"], **values["dit"]}}  # fmt: skip
        for second, first in (("text_encoder_2", "text_encoder"), ("dit_2", "dit")):
            if second in FAMILIES[self.family].components:
                model[second] = values[first]
        return {"model": model}

    def losses(self, result: Any, *, count: int = 2) -> list[str]:
        """The training losses of the first steps, with all digits."""
        rows = [row["train/loss"] for row in read_losses(result.run_dir) if row["train/loss"]]
        assert len(rows) >= count
        return rows[:count]

    def judged(self, result: Any) -> tuple[float, float]:
        """Loss of held-out samples, with the same noise each time, before and after training."""
        rows = [row["val/loss"] for row in read_losses(result.run_dir) if row["val/loss"]]
        return float(rows[0]), float(rows[-1])

    def make(
        self, *, lora: Path | None = None, dit: dict[str, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """A picture, or the frames of a clip, made by `octavo generate`: (F, H, W, 3) uint8."""
        spec = FAMILIES[self.family]
        frames = tiny_runs.NUM_FRAMES if spec.media == "video" else 1
        controls = tuple(str(path) for path in self.controls)
        settings = SampleSettings(
            (64, 64), 2, 2.0, seed=3, num_frames=frames, control_images=controls
        )
        (made,) = generate(
            ModelConfig.model_validate(change(self.values["model"], dit=dit or {})),
            prompts=["a red apple"],
            settings=settings,
            lora=lora,
        )
        pictures = [made] if isinstance(made, Image.Image) else list(made.frames)
        return np.stack([np.asarray(picture) for picture in pictures])


@pytest.fixture(scope="module", params=FAMILIES)
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.shrink_controls(patch)
        yield Bench(request.param, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


def test_a_lora_on_the_fp8_base_is_learnt_saved_and_used(bench: Bench) -> None:
    result = bench.lora()
    before, after = bench.judged(result)
    assert after < before
    adapted = bench.make(lora=result.lora_path)
    assert adapted.shape == bench.plain.shape
    assert adapted.std() > 1
    assert not np.array_equal(adapted, bench.plain)


# Trained norms are float32, what they are given is bf16: torch says that it then has no fused kernel.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_full_training_is_learnt_saved_and_used(bench: Bench) -> None:
    result = bench.run(
        "full",
        model__dit={"trainable": "full"},
        optim__lr=3e-3,
        trainer__max_steps=NUM_STEPS["full"],
    )
    before, after = bench.judged(result)
    assert after < before
    trained = bench.make(dit={"source": str(result.model_path)})
    assert not np.array_equal(trained, bench.plain)


def test_fp8_storage_changes_losses_little(bench: Bench) -> None:
    fp8 = [float(loss) for loss in bench.losses(bench.lora())]
    bf16 = [float(loss) for loss in bench.losses(bench.bf16())]
    assert fp8 == pytest.approx(bf16, rel=0.02)
    assert fp8 != bf16


def test_every_set_up_is_tried() -> None:
    files = (tiny_runs.ROOT / "conf" / "vram").glob("*.yaml")
    assert {path.stem for path in files} == {"none", *SETUPS}


@pytest.mark.parametrize("setup", SETUPS)
def test_where_weights_rest_changes_no_loss(bench: Bench, setup: str) -> None:
    """Also of the encoders, which each set-up runs for itself.

    Without a limit nothing stays on the device: the tiny models would fit below any.
    """
    values = tiny_runs.vram_setup(setup)
    expected = bench.lora() if SETUPS[setup] == "fp8" else bench.bf16()
    found = bench.run(
        f"setup-{setup}",
        **bench.setup({**values, "vram_limit": None}),
        data__cache_dir=str(bench.folder / f"cache-{setup}"),
    )
    assert bench.losses(found) == bench.losses(expected)
