"""The plan as a person and as a program see it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from framework.errors import ConfigError
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.table import format_bytes, format_count, layers_table, plan_json, render_plan
from framework.plan.types import VramPlan
from framework.schema import RunConfig


@pytest.fixture
def config(tiny_checkpoint: Path) -> RunConfig:
    dit = {"trainable": "lora", "precision": "fp8", "lora": {"rank": 4}}
    return RunConfig.model_validate(
        {
            "model": {"family": "qwen_image", "source": str(tiny_checkpoint), "dit": dit},
            "data": {"path": "p"},
            "run": {"name": "t"},
            "sample": {"prompts": ["a"]},
            "optim": {"ema": {}},
        }
    )


@pytest.fixture
def plan(config: RunConfig) -> VramPlan:
    return build_run_plan(config, device="cpu")


def shown(renderable: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(renderable)
    return out.getvalue()


def test_tables_say_everything_within_100_columns(plan: VramPlan) -> None:
    text = shown(render_plan(plan))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    dit = plan.component("dit")
    for part in (
        "text_encoder", "fp8 85 %, bf16 15 %", "LoRA r=4, 16 layers", "What trains",
        format_bytes(dit.resting_bytes), format_bytes(dit.optimizer_bytes), format_bytes(dit.ema_bytes),
        "cpu", "host", "encode", "train", "sample", "peak", "activations come on top",
        format_bytes(plan.phase("train").device_bytes),
    ):  # fmt: skip
        assert part in text


def test_a_large_model_fits_the_columns_too(plan: VramPlan) -> None:
    parts = []
    for part in plan.components:
        groups = [
            g.model_copy(
                update={
                    "tensors": tuple(
                        t.model_copy(update={"shape": (3072, 300_000)}) for t in g.tensors
                    )
                }
            )
            for g in part.groups
        ]
        parts.append(part.model_copy(update={"groups": tuple(groups)}))
    text = shown(render_plan(plan.model_copy(update={"components": tuple(parts)})))
    assert "…" not in text
    assert "GiB" in text


def test_nothing_trains_in_inference(config: RunConfig) -> None:
    text = shown(render_plan(build_inference_plan(config.model, device="cuda:0")))
    assert "inference" in text
    assert "What trains" not in text
    assert "cuda:0" in text


def test_json_has_sums_and_stable_keys(plan: VramPlan) -> None:
    summary = json.loads(plan_json(plan))
    assert set(summary) == {
        "purpose",
        "family",
        "compute_dtype",
        "device",
        "vram_limit_bytes",
        "traced_with",
        "components",
        "phases",
        "peak",
    }
    assert set(summary["components"]["dit"]) == {
        "source", "folder", "commit", "trainable", "parameters", "resting_bytes", "trained_parameters",
        "adapter_bytes", "gradient_bytes", "optimizer_bytes", "ema_bytes", "gradient_checkpointing",
        "offload", "granularity", "groups", "lora",
    }  # fmt: skip
    assert set(summary["components"]["dit"]["groups"]["fp8"]) == {
        "tensors", "parameters", "resting_bytes", "scaling", "trains", "states",
    }  # fmt: skip
    dit = plan.component("dit")
    assert summary["components"]["dit"]["resting_bytes"] == dit.resting_bytes
    assert len(summary["components"]["dit"]["lora"]["layers"]) == 16
    assert summary["peak"]["device_bytes"] == max(p.device_bytes for p in plan.phases)
    assert plan_json(plan) == plan_json(plan.model_copy())
    train = summary["phases"]["train"]
    assert set(train) == {
        "components",
        "device_bytes",
        "host_bytes",
        "kept_bytes",
        "device",
        "host",
    }
    assert set(train["device"]) == set(train["host"]) == {
        "weights", "adapters", "gradients", "optimizer", "average", "fetched", "staging", "activations",
    }  # fmt: skip
    assert train["device"]["activations"] is None
    assert "source_key" not in plan_json(plan)


def test_layers_of_a_component(plan: VramPlan) -> None:
    text = shown(layers_table(plan, "dit"))
    assert "transformer_blocks.0.attn.to_q" in text
    assert "48x48" in text
    assert "fp8 (row scales)" in text
    assert "rank 4" in text
    assert "norm_q" not in text
    with pytest.raises(ConfigError, match='no component "unet"'):
        layers_table(plan, "unet")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.5 KiB"),
        (150 * 2**20, "150 MiB"),
        (38 * 2**30, "38.0 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (6144, "6144"),
        (12_345, "12.3 k"),
        (2_600_000, "2.6 M"),
        (20_430_000_000, "20.4 B"),
    ],
)
def test_counts(count: int, text: str) -> None:
    assert format_count(count) == text
