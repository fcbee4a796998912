"""Whole runs in this process: what trains, what is written."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from framework.errors import ConfigError, RunError
from framework.training.checkpoint_io import read_checkpoint
from tests.training.runs import change, fit_values, read_losses

FULL = {"trainable": "full"}


def final_checkpoint(run_dir: Path) -> dict[str, Any]:
    return read_checkpoint(max((run_dir / "checkpoints").glob("*.ckpt")))


def test_full_dit_and_text_encoder_with_samples_and_validation(values: dict[str, Any]) -> None:
    result = fit_values(
        change(
            values,
            model__dit=FULL,
            model__text_encoder=FULL,
            optim__ema={"decay": 0.9},
            trainer__max_steps=12,
            validation={"fraction": 0.2, "every_n_steps": 6},
            sample={"prompts": ["a cat"], "num_inference_steps": 2, "size_px": [32, 32]},
            logger__tensorboard=True,
        )
    )
    assert result.steps == 12
    rows = read_losses(result.run_dir)
    assert [row["step"] for row in rows] == [str(step) for step in range(13)]
    judged = {row["step"]: float(row["val/loss"]) for row in rows if row["val/loss"]}
    assert list(judged) == ["0", "6", "12"]
    assert judged["12"] < judged["0"]
    assert result.val_loss == judged["12"]
    by_sigma = [float(v) for k, v in rows[0].items() if k.startswith("val/loss_sigma_")]
    assert sum(by_sigma) / 5 == pytest.approx(judged["0"])
    files = {path.name for path in result.run_dir.iterdir()}
    assert {"config.yaml", "run.json", "plan.json", "plan.txt", "metrics.csv"} <= files
    assert {"samples.png", "samples", "tensorboard", "checkpoints", "model"} <= files
    state = json.loads((result.run_dir / "run.json").read_text())
    assert (state["state"], state["step"]) == ("finished", 12)
    assert result.lora_path is None
    assert {p.name for p in result.model_path.iterdir()} == {"transformer", "text_encoder"}


def test_samples_before_after_and_in_between(values: dict[str, Any]) -> None:
    sample = {"prompts": ["a cat", ""], "num_inference_steps": 1, "size_px": [32, 32]}
    result = fit_values(change(values, sample=sample, sample__every_n_steps=2))
    pictures = sorted(p.relative_to(result.run_dir) for p in result.run_dir.glob("samples/*/*.png"))
    assert [str(p) for p in pictures] == [
        f"samples/step-{step:06d}/{index:02d}.png" for step in (0, 2, 4) for index in (0, 1)
    ]
    assert result.sheet_path == result.run_dir / "samples.png"


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_lora_trains_and_nothing_else(values: dict[str, Any], precision: str) -> None:
    values = change(values, model__dit__precision=precision, trainer__max_steps=10)
    values = change(values, validation={"fraction": 0.2, "every_n_steps": 100})
    result = fit_values(values)
    state = final_checkpoint(result.run_dir)["state_dict"]
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    moved = [name for name, tensor in state.items() if ".lora_B." in name and tensor.any()]
    assert moved
    judged = [float(row["val/loss"]) for row in read_losses(result.run_dir) if row["val/loss"]]
    assert judged[-1] < judged[0]
    lora = load_file(result.lora_path)
    assert all(key.startswith("transformer.") for key in lora)
    with safe_open(result.lora_path, framework="pt") as file:
        facts = file.metadata()
    assert (facts["base_model"], facts["steps"]) == (values["model"]["source"], "10")


def test_loras_on_dit_and_text_encoder(values: dict[str, Any]) -> None:
    adapter = {"trainable": "lora", "precision": "fp8", "lora": {"rank": 2, "dropout": 0.1}}
    result = fit_values(change(values, model__text_encoder=adapter, model__dit__precision="fp8"))
    lora = load_file(result.lora_path)
    assert {key.partition(".")[0] for key in lora} == {"transformer", "text_encoder"}
    assert any(key.startswith("text_encoder.") and ".lora_B." in key for key in lora)


def test_a_text_encoder_lora_alone_learns_through_a_frozen_fp8_dit(values: dict[str, Any]) -> None:
    values = change(
        values,
        model__dit={"precision": "fp8", "gradient_checkpointing": True},
        model__text_encoder={"trainable": "lora", "lora": {"rank": 2}},
    )
    state = final_checkpoint(fit_values(values).run_dir)["state_dict"]
    assert all(name.startswith("components.text_encoder.") for name in state)
    assert any(tensor.any() for name, tensor in state.items() if ".lora_B." in name)


def test_the_vae_alone(values: dict[str, Any]) -> None:
    result = fit_values(
        change(
            values,
            model__dit={},
            model__vae=FULL,
            optim__lr=1e-3,
            trainer__max_steps=8,
            validation={"fraction": 0.2},
            sample={"prompts": ["a cat"], "num_inference_steps": 1, "size_px": [32, 32]},
        )
    )
    rows = read_losses(result.run_dir)
    judged = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert judged[-1] < judged[0]
    assert "val/vae_l1" in rows[0]
    assert {p.name for p in result.model_path.iterdir()} == {"vae"}


def test_vae_and_dit_together_log_both_losses(values: dict[str, Any]) -> None:
    rows = read_losses(fit_values(change(values, model__vae=FULL, optim__lr=1e-3)).run_dir)
    for row in rows:
        total = float(row["train/flow_loss"]) + float(row["train/vae_loss"])
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-5)


def test_without_the_cache_encoders_stay_loaded(values: dict[str, Any]) -> None:
    sample = {"prompts": ["a cat"], "num_inference_steps": 1, "size_px": [32, 32]}
    result = fit_values(change(values, data__cache=False, sample=sample))
    assert result.sheet_path is not None
    assert not list(Path(values["data"]["cache_dir"]).glob("latents/**/*.safetensors"))


def test_the_second_run_encodes_nothing(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_values(values)
    from framework.models.qwen_image import QwenImageFamily

    def refuse(*arguments: object) -> None:
        raise AssertionError("encoded although it is cached")

    monkeypatch.setattr(QwenImageFamily, "encode_text", refuse)
    monkeypatch.setattr(QwenImageFamily, "encode_image", refuse)
    second = fit_values(values)
    assert second.run_dir.name == "002"


def test_a_loss_that_is_not_finite_stops_the_run(values: dict[str, Any]) -> None:
    values = change(values, model__dit=FULL, optim__lr=9.0, trainer__gradient_clip_val=None)
    values = change(values, optim__name="sgd", trainer__max_steps=200)
    with pytest.raises(RunError, match=r"not finite at step \d+\n.*\n.*lower optim.lr"):
        fit_values(values)


def test_gradients_are_let_go_while_pictures_are_made(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from framework.models.qwen_image import QwenImageFamily

    original = QwenImageFamily.sample
    held = []

    def sample(
        self: Any, positive: Any, negative: Any, modules: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        held.extend(p for p in modules["dit"].parameters() if p.grad is not None)
        return original(self, positive, negative, modules, *rest, **kwargs)

    monkeypatch.setattr(QwenImageFamily, "sample", sample)
    settings = {"prompts": ["a cat"], "num_inference_steps": 1, "size_px": [32, 32]}
    result = fit_values(change(values, sample=settings, sample__every_n_steps=1))
    assert len(list(result.run_dir.glob("samples/*/00.png"))) == 5
    assert held == []


def test_a_run_that_ends_leaves_no_component_behind_and_moves_none_to_the_host(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from framework.training import lifecycle

    original = lifecycle.save_results
    components = []

    def save_results(module: Any, *rest: Any, **kwargs: Any) -> Any:
        components.append(weakref.ref(module.components["dit"]))
        return original(module, *rest, **kwargs)

    def refuse(module: nn.Module) -> None:
        raise AssertionError("moved to the host")

    monkeypatch.setattr(lifecycle, "save_results", save_results)
    monkeypatch.setattr(nn.Module, "cpu", refuse)
    fit_values(values)
    assert [reference() for reference in components] == [None]


def test_an_interrupted_run_says_how_it_goes_on(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import signal

    from framework.training.module import DiffusionTrainingModule

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(DiffusionTrainingModule, "training_step", interrupt)
    try:
        with pytest.raises(SystemExit, match="1"), caplog.at_level("WARNING", "octavo"):
            fit_values(values)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "the same command goes on" in caplog.text


def test_a_full_device_is_reported_with_ways_out(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch as pl

    def fit(*arguments: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    with pytest.raises(RunError, match=r"memory is full\n.*CUDA out of memory\n.*gradient_check"):
        fit_values(values)


def test_slurm_does_not_resume_behind_our_back(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    from framework.training import fit

    assert len(fit._plugins()) == 1
    monkeypatch.chdir(tmp_path)
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    _, environment = fit._plugins()
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    # What another run's Lightning left behind.
    Path("hpc_ckpt_1.ckpt").write_bytes(b"not a checkpoint")
    assert fit_values(change(values, trainer__max_steps=1)).steps == 1


def test_more_processes_than_devices_can_share_are_refused(values: dict[str, Any]) -> None:
    from framework.schema import RunConfig
    from framework.training import fit

    config = RunConfig.model_validate(change(values, trainer__devices=2))
    monkey = config.model_copy(
        update={"model": config.model.model_copy(update={"device": "cuda:1"})}
    )
    import torch as torch_module

    with pytest.raises(ConfigError, match="2 processes can't share cuda:1"):
        fit._check_processes(monkey, torch_module.device("cuda", 1))
