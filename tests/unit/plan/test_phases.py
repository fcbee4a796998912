"""What each phase holds, by what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.plan.build import build_run_plan
from framework.plan.phases import (
    TracedPhase,
    fetched_bytes,
    kept_bytes,
    peak_phases,
    stays_on_host,
    with_traced,
)
from framework.plan.types import ComponentPlan, MemoryParts, TracedWith, VramPlan
from framework.plan.units import component_units
from framework.schema import RunConfig

USED = TracedWith(batch_size=2, size_px=(32, 32), sample_size_px=(32, 32), text_tokens=5)


def make_plan(source: Path, *, device: str = "cpu", **dit: Any) -> VramPlan:
    values = {
        "model": {
            "family": "qwen_image",
            "source": str(source),
            "vram_limit": dit.pop("vram_limit", None),
            "dit": {"trainable": "lora", **dit},
        },
        "data": {"path": "p"},
        "sample": {"prompts": ["a"]},
        "optim": {"ema": {}},
        "run": {"name": "t"},
    }
    return build_run_plan(RunConfig.model_validate(values), device=device)


def unit_bytes(part: ComponentPlan) -> list[int]:
    return sorted(unit.num_bytes for unit in component_units(part))


def test_parts_of_a_run(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint)
    dit, vae = plan.component("dit"), plan.component("vae")
    train, save = plan.phase("train"), plan.phase("save")
    assert [phase.name for phase in plan.phases] == ["load", "encode", "train", "sample", "save"]
    assert train.device == MemoryParts(
        weights=dit.resting_bytes,
        adapters=dit.adapter_bytes,
        gradients=dit.gradient_bytes,
        optimizer=dit.optimizer_bytes,
        average=dit.ema_bytes,
    )
    assert train.device_bytes == sum(v for v in train.device.by_name().values() if v)
    assert not train.traced
    assert plan.phase("sample").device.gradients == 0
    assert plan.phase("sample").device.weights == dit.resting_bytes + vae.resting_bytes
    # The average is put in the place of the weights that train, which are kept meanwhile.
    assert save.device.staging == dit.ema_bytes
    assert save.device.gradients == dit.gradient_bytes
    load = plan.phase("load")
    assert load.device.weights == plan.phase("sample").device.weights
    largest = max(t.numel for part in (dit, vae) for g in part.groups for t in g.tensors)
    assert load.host.staging == 2 * largest
    assert load.device.staging == 0


def test_a_gpu_encodes_and_saves_by_way_of_the_host(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, device="cuda:0")
    assert plan.phase("load").device.staging == plan.phase("load").host.staging > 0
    assert plan.phase("save").host.staging == plan.component("dit").adapter_bytes


@pytest.mark.parametrize(
    ("device", "offload", "granularity", "in_flight"),
    [
        ("cpu", "host", "layer", 1),
        ("cuda:0", "host", "layer", 2),
        ("cuda:0", "host", "block", 2),
        ("cpu", "disk", "block", 2),
        ("cuda:0", "host", "model", 1),
    ],
)
def test_what_is_in_flight(
    tiny_checkpoint: Path, device: str, offload: str, granularity: str, in_flight: int
) -> None:
    plan = make_plan(tiny_checkpoint, device=device, offload=offload, granularity=granularity)
    dit = plan.component("dit")
    train = plan.phase("train")
    sizes = unit_bytes(dit)
    assert train.device.fetched == sum(sizes[-in_flight:])
    assert train.host.weights == (sum(sizes) if offload == "host" else 0)
    assert train.kept_bytes == 0
    assert stays_on_host(plan, "dit")
    assert not stays_on_host(plan, "text_encoder")


def test_what_is_kept_where_there_is_room(tiny_checkpoint: Path) -> None:
    dit = make_plan(tiny_checkpoint, offload="host", granularity="layer").component("dit")
    sizes = unit_bytes(dit)
    total, largest = sum(sizes), sizes[-1]
    assert kept_bytes([dit], device="cpu", room_bytes=total) == total
    assert kept_bytes([dit], device="cpu", room_bytes=total - 1) == total - 1 - largest
    assert kept_bytes([dit], device="cpu", room_bytes=largest // 2) == 0
    assert fetched_bytes([dit], device="cpu", room_bytes=total) == total
    assert fetched_bytes([dit], device="cpu", room_bytes=total - 1) == total - 1
    assert fetched_bytes([dit], device="cpu", room_bytes=0) == largest


def test_traced_parts_decide_what_is_kept(tiny_checkpoint: Path) -> None:
    limit = 700_000
    plan = make_plan(tiny_checkpoint, offload="host", granularity="layer", vram_limit=limit / 2**30)
    before = plan.phase("train")
    activations = limit - before.device.model_copy(update={"fetched": 0}).total_bytes - 50_000
    device = before.device.model_copy(update={"fetched": 0, "activations": activations})
    traced = with_traced(plan, {"train": TracedPhase(device, before.host)}, USED)
    train = traced.phase("train")
    assert traced.traced_with == USED
    assert train.traced
    assert train.device.activations == activations
    assert 0 < train.kept_bytes < before.kept_bytes
    assert train.device_bytes == limit
    assert traced.phase("encode") == plan.phase("encode")


def test_the_phase_that_takes_most(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint)
    on_device, on_host = peak_phases(plan)
    assert on_device.device_bytes == max(phase.device_bytes for phase in plan.phases)
    assert on_host.name == "load"
