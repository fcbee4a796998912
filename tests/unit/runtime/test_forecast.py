"""Predicted peaks: equal to measured ones, the same for long and shortened stacks, and made without a weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from framework.models import get_family
from framework.plan.types import VramPlan
from framework.runtime import rehearsal
from framework.runtime.forecast import (
    TEXT_TOKENS,
    forecast_inference,
    forecast_run,
    longest_caption,
)
from framework.runtime.trace import MeasuredBytes
from framework.schema import RunConfig
from framework.storage import grid
from tests.training.runs import change, run_values, write_pictures

POCKET = Path(__file__).parents[3] / "assets" / "pocket"
CAPTION = "a red square"


@pytest.fixture
def values(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    pictures = write_pictures(tmp_path / "pictures")
    for caption in pictures.glob("*.txt"):
        caption.write_text(CAPTION)
    return change(
        run_values(tiny_checkpoint, pictures, tmp_path),
        sample={"prompts": [CAPTION], "size_px": [32, 32], "num_inference_steps": 1},
        trainer__max_steps=2,
    )


def forecast(values: dict[str, Any], *, device: str = "cpu") -> VramPlan:
    return forecast_run(RunConfig.model_validate(values), device=device)


def measure(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Peaks of tensor bytes in a real run: of the second step, and of sampling after it."""
    from framework.training.fit import fit
    from framework.training.lifecycle import RunLifecycle
    from framework.training.module import DiffusionTrainingModule

    config = RunConfig.model_validate(values)
    forecast(values)  # what `fit` plans is then known, so that no fake tensors are counted
    counter = MeasuredBytes("cpu")
    found: dict[str, int] = {}
    sampling = DiffusionTrainingModule.sampling

    @contextmanager
    def measured(self: Any) -> Iterator[Any]:
        with sampling(self) as modules:
            counter.restart()
            yield modules
            found["sample"] = counter.peak_bytes

    def begin(self: Any, trainer: Any, module: Any, *args: object) -> None:
        # A buffer of 4 MiB that encoding leaves to the thread is larger than this whole model.
        grid._kept.memory = None
        counter.restart()

    def end(self: Any, trainer: Any, module: Any, *args: object) -> None:
        found["train"] = counter.peak_bytes

    monkeypatch.setattr(DiffusionTrainingModule, "sampling", measured)
    monkeypatch.setattr(RunLifecycle, "on_train_batch_start", begin)
    monkeypatch.setattr(RunLifecycle, "on_train_batch_end", end)
    with counter:
        fit(config, config_yaml=yaml.safe_dump(values))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__dit": {"trainable": "full"}, "optim__ema": {"decay": 0.9}},
        {
            "model__dit__precision": "fp8",
            "model__dit__gradient_checkpointing": True,
            "model__dit__offload": "host",
            "model__dit__granularity": "block",
        },
        {"data__cache": False, "trainer__accumulate_grad_batches": 2},
    ],
    ids=["lora", "full", "offloaded", "uncached"],
)
def test_the_predicted_peak_is_the_measured_one(
    values: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = change(values, **changes)
    plan = forecast(values)
    measured = measure(values, monkeypatch)
    for name in ("train", "sample"):
        phase = plan.phase(name)  # type: ignore[arg-type]
        predicted = phase.device_bytes + phase.host_bytes
        assert predicted == pytest.approx(measured[name], rel=0.05), name


def test_the_pocket_models_step(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values = change(values, model__source=str(POCKET), data__max_px=4096, sample__prompts=[])
    for caption in Path(values["data"]["path"]).glob("*.txt"):
        caption.write_text("red apple")
    plan = forecast(values)
    measured = measure(values, monkeypatch)
    assert plan.phase("train").device_bytes == pytest.approx(measured["train"], rel=0.02)


@pytest.fixture(scope="module")
def seven_blocks(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with seven blocks in its DiT."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("seven") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    shutil.rmtree(folder / "transformer")
    config = json.loads((tiny_checkpoint / "transformer" / "config.json").read_text())
    config["num_layers"] = 7
    model: Any = QwenImageTransformer2DModel
    model.from_config(config).to(torch.bfloat16).save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__dit__gradient_checkpointing": True, "model__dit__precision": "fp8"},
        {"model__dit": {"trainable": "full", "gradient_checkpointing": True}},
        {"model__dit": {"trainable": "full"}, "trainer__accumulate_grad_batches": 3},
        {"model__text_encoder": {"trainable": "lora"}, "model__compute_dtype": "fp32"},
    ],
)
def test_a_shortened_stack_takes_what_the_whole_one_takes(
    values: dict[str, Any],
    seven_blocks: Path,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = change(values, model__source=str(seven_blocks), **changes)
    shortened = forecast(values)
    monkeypatch.setattr(rehearsal, "_SHORT", (8, 9))
    monkeypatch.setattr("framework.runtime.forecast._traced_before", {})
    assert forecast(values) == shortened


def test_a_block_that_is_stored_otherwise_is_not_left_out(
    values: dict[str, Any], seven_blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ["transformer_blocks.4.*"]
    dit = {"trainable": "lora", "precision": "fp8", "fp8": {"keep_high_precision": keep}}
    values = change(values, model__source=str(seven_blocks), model__dit=dit)
    mixed = forecast(values)
    monkeypatch.setattr(rehearsal, "_SHORT", (8, 9))
    monkeypatch.setattr("framework.runtime.forecast._traced_before", {})
    assert forecast(values) == mixed


def test_all_kinds_of_settings_can_be_traced(values: dict[str, Any]) -> None:
    lora = {"rank": 2, "dropout": 0.1, "use_dora": True}
    values = change(
        values,
        model__dit={"trainable": "lora", "lora": lora, "precision": "fp8", "offload": "disk"},
        model__vae={"trainable": "lora"},
        model__text_encoder={"trainable": "full"},
        objective={"loss": "huber", "weighting": "cosmap"},
        optim__name="adafactor",
    )
    train = forecast(values).phase("train")
    assert train.traced
    assert train.device.activations is not None
    assert train.device.activations > 0
    assert train.device.fetched > 0


def test_no_weight_is_read(values: dict[str, Any], seven_blocks: Path) -> None:
    """Files with nothing behind their headers are planned like whole ones."""
    values = change(values, model__source=str(seven_blocks))
    before = forecast(values)
    for file in seven_blocks.rglob("*.safetensors"):
        with file.open("r+b") as opened:
            header = 8 + int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            opened.truncate(header)
            opened.truncate(size)  # zeros that take no place
    assert forecast(change(values, trainer__seed=1)).phases == before.phases


def test_fetched_weights_stay_below_the_limit(values: dict[str, Any]) -> None:
    values = change(values, model__dit__offload="host", model__dit__granularity="layer")
    free = forecast(values).phase("train")
    assert free.kept_bytes == 0
    limit = free.device_bytes + 60_000
    kept = forecast(change(values, model__vram_limit=limit / 2**30)).phase("train")
    assert 0 < kept.kept_bytes <= limit - free.device_bytes + free.device.fetched
    assert kept.device_bytes <= limit
    assert kept.device.fetched > free.device.fetched
    everything = forecast(change(values, model__vram_limit=1)).phase("train")
    assert everything.device.fetched == everything.kept_bytes == everything.host.weights


def test_generation_takes_more_for_larger_pictures(tiny_checkpoint: Path) -> None:
    model = RunConfig.model_validate(
        {
            "model": {
                "family": "qwen_image",
                "source": str(tiny_checkpoint),
                "dit": {"trainable": "lora"},
            },
            "data": {"path": "p"},
            "run": {"name": "t"},
        }
    ).model
    small = forecast_inference(model, size_px=(32, 32), device="cuda:0", num_tokens=4)
    large = forecast_inference(model, size_px=(128, 64), device="cuda:0", num_tokens=4)
    assert [phase.name for phase in small.phases] == ["load", "encode", "sample"]
    assert small.traced_with is not None
    assert small.traced_with.sample_size_px == (32, 32)
    assert small.phase("encode") == large.phase("encode")
    activations = [p.phase("sample").device.activations or 0 for p in (small, large)]
    assert activations[1] > 2 * activations[0] > 0


def test_the_longest_caption_decides(values: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.model_validate(values)
    family = get_family("qwen_image")
    short = longest_caption(config, family)
    Path(values["data"]["path"], "0.txt").write_text(" ".join(["square"] * 40))
    assert longest_caption(config, family) > 4 * short > 0
    nowhere = change(values, data__path=str(tmp_path / "nowhere"))
    assert longest_caption(RunConfig.model_validate(nowhere), family) == TEXT_TOKENS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_predicted_peak_is_what_cuda_allocates(values: dict[str, Any], precision: str) -> None:
    from framework.training.fit import fit

    values = change(
        values,
        model__source=str(POCKET),
        model__device="cuda",
        model__dit__precision=precision,
        data__max_px=4096,
        data__batch_size=16,
        sample__prompts=[],
    )
    result = fit(RunConfig.model_validate(values), config_yaml=yaml.safe_dump(values))
    peaks = json.loads((result.run_dir / "run.json").read_text())["peak_memory"]
    train = peaks["train"]
    assert train["predicted_bytes"] == pytest.approx(train["measured_bytes"], rel=0.1)
