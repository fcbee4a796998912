"""A stopped run that goes on is bit for bit the run that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file

from framework.errors import RunError
from framework.training.checkpoint_io import list_checkpoints, read_checkpoint
from framework.training.checkpointing import CheckpointCallback
from framework.training.run_folder import read_state
from tests.training.runs import change, fit_values, read_losses

ROOT = Path(__file__).resolve().parents[2]
DETAILS = {
    "model__dit__lora": {"rank": 2, "dropout": 0.3},
    "model__dit__precision": "fp8",
    "data__caption_dropout": 0.4,
    "trainer__accumulate_grad_batches": 2,
    # Rows that average over a checkpoint's step, so that the sums must survive too.
    "trainer__log_every_n_steps": 3,
    "trainer__max_steps": 6,
    "optim__ema": {"decay": 0.9},
    "optim__schedule": "cosine",
    "validation": {"fraction": 0.2, "every_n_steps": 2},
}


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process end right after the hooks of optimizer step `step`."""
    original = CheckpointCallback.on_train_batch_end

    def hook(self: Any, trainer: pl.Trainer, module: Any, *rest: Any) -> None:
        original(self, trainer, module, *rest)
        if trainer.global_step == step:
            raise Stopped(f"after step {step}")

    monkeypatch.setattr(CheckpointCallback, "on_train_batch_end", hook)


def final_state(run_dir: Path) -> dict[str, Any]:
    return read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors in nested containers included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def assert_same_run(one: Path, other: Path) -> None:
    assert read_losses(one) == read_losses(other)
    first, second = final_state(one), final_state(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "ema", "global_step"):
        assert same(first[key], second[key]), key
    # Not the files' bytes: safetensors writes the header's entries in any order.
    lora = "lora.safetensors"
    assert same(load_file(one / lora), load_file(other / lora))


@pytest.mark.parametrize("step", [3, 4, 5])
def test_resume_is_bit_identical(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    values = change(values, **DETAILS)
    whole = fit_values(change(values, run__output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Stopped, match="after step"):
            fit_values(values)
    resumed = fit_values(values)
    assert resumed.run_dir.name == "001"
    assert_same_run(whole.run_dir, resumed.run_dir)
    assert resumed.last_train_loss == whole.last_train_loss


def test_full_weights_resume_too(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = change(values, model__dit={"trainable": "full"}, trainer__max_steps=4)
    values = change(values, model__text_encoder={"trainable": "full"})
    whole = fit_values(change(values, run__output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped, match="after step"):
            fit_values(values)
    resumed = fit_values(values)
    assert read_losses(whole.run_dir) == read_losses(resumed.run_dir)
    assert same(
        final_state(whole.run_dir)["state_dict"], final_state(resumed.run_dir)["state_dict"]
    )


def test_a_run_killed_while_it_saved_its_results_saves_them(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped, match="after step"):
            fit_values(values)
    resumed = fit_values(values)
    assert resumed.lora_path is not None
    assert resumed.lora_path.is_file()
    assert resumed.steps == 4
    assert json.loads((resumed.run_dir / "run.json").read_text())["state"] == "finished"


def test_samples_of_before_stay(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"prompts": ["a cat"], "num_inference_steps": 1, "size_px": [32, 32]}
    values = change(values, sample=sample)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped, match="after step"):
            fit_values(values)
    before = Path(values["run"]["output_dir"]) / "tiny/001/samples/step-000000/00.png"
    written = before.stat().st_mtime_ns
    resumed = fit_values(values)
    assert before.stat().st_mtime_ns == written
    assert len(list(resumed.run_dir.glob("samples/*/*.png"))) == 2


def test_a_request_to_end_is_met_after_the_step_and_not_amid_its_micro_steps(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = change(values, trainer__accumulate_grad_batches=3, checkpoint__every_n_steps=100)
    whole = fit_values(change(values, run__name="whole"))
    original = CheckpointCallback.on_train_batch_end

    def hook(self: Any, trainer: pl.Trainer, module: Any, *rest: Any) -> None:
        if rest[-1] == 3:  # the first of the second step's three micro-steps
            trainer._signal_connector.received_sigterm = True
        original(self, trainer, module, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_train_batch_end", hook)
        with pytest.raises(RunError, match=r"asked to end.*stopped after step 2"):
            fit_values(values)
    stopped = read_state(whole.run_dir.parent.parent / values["run"]["name"] / "001")
    resumed = fit_values(values)
    assert resumed.run_dir.name == "001"
    # The time of a run is that of all its starts.
    assert 0 < stopped["seconds"] < read_state(resumed.run_dir)["seconds"]
    assert read_losses(whole.run_dir) == read_losses(resumed.run_dir)


def test_keep_last(values: dict[str, Any]) -> None:
    checkpoint = {"every_n_steps": 1, "keep_last": 3}
    result = fit_values(change(values, checkpoint=checkpoint, trainer__max_steps=5))
    names = [path.name for path in list_checkpoints(result.run_dir / "checkpoints")]
    assert names == [f"step-{step:08d}.ckpt" for step in (3, 4, 5)]


def test_another_run_can_be_gone_on_with_at_another_rate(values: dict[str, Any]) -> None:
    first = fit_values(values)
    second = fit_values(
        change(
            values,
            checkpoint={"resume": str(first.run_dir)},
            trainer__max_steps=6,
            optim__lr=5e-3,
        )
    )
    assert second.run_dir.name == "002"
    rows = read_losses(second.run_dir)
    assert [row["step"] for row in rows] == ["5", "6"]
    assert [float(row["lr"]) for row in rows] == [5e-3, 5e-3]


def test_a_checkpoint_of_another_adapter_is_refused(values: dict[str, Any]) -> None:
    first = fit_values(values)
    values = change(values, checkpoint={"resume": str(first.run_dir)}, trainer__max_steps=6)
    with pytest.raises(RunError, match=r"has shape \(4, 48\) in it and \(2, 48\) here"):
        fit_values(change(values, model__dit__lora__rank=2))
    with pytest.raises(RunError, match="weights train here but aren't in it"):
        fit_values(change(values, model__dit={"trainable": "full"}))
    with pytest.raises(RunError, match="its optimizer is adamw, this run's sgd"):
        fit_values(change(values, optim__name="sgd"))


def test_a_checkpoint_beyond_the_last_step_is_refused(values: dict[str, Any]) -> None:
    first = fit_values(values)
    with pytest.raises(RunError, match=r"step 4 already.*\n.*trainer.max_steps"):
        fit_values(change(values, checkpoint={"resume": str(first.run_dir)}))


def command(values: dict[str, Any], folder: Path) -> list[str]:
    """A command that trains as `values` say."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    return [sys.executable, str(ROOT / "tests" / "training" / "train_values.py"), str(file)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_process_goes_on(values: dict[str, Any], tmp_path: Path, num_workers: int) -> None:
    values = change(values, **DETAILS, data__num_workers=num_workers)
    values = change(values, trainer__max_steps=8)
    whole = fit_values(change(values, run__output_dir=str(tmp_path / "whole")))

    killed_dir = tmp_path / "killed"
    killed = change(values, run__output_dir=str(killed_dir))
    process = subprocess.Popen(
        [*command(killed, killed_dir), "--seconds-per-step", "0.4"], env=environment()
    )
    checkpoints = killed_dir / "tiny/001/checkpoints"
    deadline = time.monotonic() + 150
    while len(list_checkpoints(checkpoints)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # somewhere in the midst of the next step
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert len(list_checkpoints(checkpoints)) == 2
    assert json.loads((killed_dir / "tiny/001/run.json").read_text())["state"] == "running"

    subprocess.run(command(killed, killed_dir), check=True, env=environment(), timeout=200)
    assert_same_run(whole.run_dir, killed_dir / "tiny/001")
    assert not (killed_dir / "tiny/002").exists()


@pytest.mark.slow
def test_a_process_that_is_asked_to_end_writes_a_checkpoint(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values = change(values, trainer__max_steps=200, checkpoint__every_n_steps=200)
    process = subprocess.Popen(
        [*command(values, tmp_path), "--seconds-per-step", "0.2"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path(values["run"]["output_dir"]) / "tiny/001/metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        metrics.is_file() and len(metrics.read_text().splitlines()) > 2
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "asked to end" in errors
    (checkpoint,) = list_checkpoints(metrics.parent / "checkpoints")
    assert 1 <= read_checkpoint(checkpoint)["global_step"] < 200
