"""Settings that only trade memory or time must not change what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from framework.training.checkpoint_io import list_checkpoints, read_checkpoint
from tests.training.runs import change, fit_values, read_losses, write_pictures


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(list_checkpoints(run_dir / "checkpoints")[-1])["state_dict"]


@pytest.fixture
def exact(values: dict[str, Any]) -> dict[str, Any]:
    """One step of plain gradient descent in float32, whose result shows the gradient itself."""
    return change(
        values,
        model__compute_dtype="fp32",
        optim={"name": "sgd", "lr": 1.0},
        trainer__max_steps=1,
        trainer__gradient_clip_val=None,
    )


def test_accumulation_equals_the_larger_batch(exact: dict[str, Any], tmp_path: Path) -> None:
    # With as many pictures as the batch holds, one step sees each of them once, however it is cut.
    pictures = write_pictures(tmp_path / "one colour", count=4)
    for file in pictures.glob("*.png"):
        file.write_bytes((pictures / "0.png").read_bytes())
    for file in pictures.glob("*.txt"):
        file.write_text("a cat")
    exact = change(exact, data__path=str(pictures))
    large = fit_values(change(exact, data__batch_size=4))
    small = fit_values(change(exact, data__batch_size=1, trainer__accumulate_grad_batches=4))
    expected, found = weights(large.run_dir), weights(small.run_dir)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
    one, other = read_losses(large.run_dir)[0], read_losses(small.run_dir)[0]
    assert float(other["train/loss"]) == pytest.approx(float(one["train/loss"]), rel=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(exact: dict[str, Any], trainable: str) -> None:
    exact = change(exact, model__dit={"trainable": trainable})
    plain = fit_values(exact)
    checkpointed = fit_values(change(exact, model__dit__gradient_checkpointing=True))
    assert (
        read_losses(plain.run_dir)[0]["train/loss"]
        == (read_losses(checkpointed.run_dir)[0]["train/loss"])
    )
    expected, found = weights(plain.run_dir), weights(checkpointed.run_dir)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_gradient_checkpointing_is_really_on(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.utils.checkpoint

    calls = []
    original = torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        if not any(isinstance(argument, FakeTensor) for argument in arguments):
            calls.append(arguments)  # a plan is traced on fake ones
        return original(*arguments, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    fit_values(change(values, model__dit__gradient_checkpointing=True, trainer__max_steps=1))
    assert len(calls) == 2  # one for each block


def test_workers_and_logging_change_nothing(values: dict[str, Any]) -> None:
    plain = fit_values(change(values, run__name="plain"))
    other = fit_values(
        change(values, run__name="other", data__num_workers=2, logger__tensorboard=True)
    )
    expected, found = weights(plain.run_dir), weights(other.run_dir)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_samples_and_validation_change_nothing(values: dict[str, Any]) -> None:
    values = change(values, validation={"fraction": 0.2, "every_n_steps": 100})
    plain = fit_values(change(values, run__name="plain"))
    other = fit_values(
        change(
            values,
            run__name="other",
            validation__every_n_steps=1,
            sample={
                "prompts": ["a cat"],
                "num_inference_steps": 1,
                "size_px": [32, 32],
                "every_n_steps": 1,
            },
        )
    )
    expected, found = weights(plain.run_dir), weights(other.run_dir)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_another_seed_changes_the_run(values: dict[str, Any]) -> None:
    one = fit_values(change(values, run__name="one"))
    other = fit_values(change(values, run__name="other", trainer__seed=8))
    assert read_losses(one.run_dir) != read_losses(other.run_dir)
