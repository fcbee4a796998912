"""Two processes on one machine, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from framework.training.checkpoint_io import list_checkpoints, read_checkpoint
from tests.training.runs import change, fit_values, read_losses

ROOT = Path(__file__).resolve().parents[2]


def train(values: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(change(values, run__output_dir=str(folder))))
    script = ROOT / "tests" / "training" / "train_values.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), str(file)], check=True, env=environment, timeout=250
    )
    return folder / "tiny" / "001"


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values = change(
        values,
        model__compute_dtype="fp32",
        model__dit={"trainable": "lora", "precision": "fp8", "lora": {"rank": 2}},
        optim__name="sgd",
        optim__lr=0.5,
        trainer__accumulate_grad_batches=2,
        validation={"fraction": 0.4, "every_n_steps": 2},
        sample={"prompts": ["a cat"], "num_inference_steps": 1, "size_px": [32, 32]},
    )
    one = fit_values(change(values, data__batch_size=4)).run_dir
    # Where the base rests changes nothing, in each of several processes neither.
    values = change(values, model__dit__offload="host", model__dit__granularity="block")
    two = train(
        change(values, trainer__devices=2, trainer__strategy="ddp", data__batch_size=2),
        tmp_path / "two",
    )
    assert [path.name for path in two.parent.iterdir()] == ["001"]
    names = [path.name for path in list_checkpoints(two / "checkpoints")]
    assert names == ["step-00000002.ckpt", "step-00000004.ckpt"]
    rows_one, rows_two = read_losses(one), read_losses(two)
    assert [row["step"] for row in rows_two] == ["0", "1", "2", "3", "4"]
    for row_one, row_two in zip(rows_one, rows_two, strict=True):
        for name in ("train/loss", "val/loss", "train/grad_norm"):
            if row_one[name]:
                assert float(row_two[name]) == pytest.approx(float(row_one[name]), rel=1e-4)
    state_one, state_two = (
        read_checkpoint(list_checkpoints(run / "checkpoints")[-1])["state_dict"]
        for run in (one, two)
    )
    for name, weight in state_one.items():
        torch.testing.assert_close(state_two[name], weight, rtol=1e-3, atol=1e-6)
