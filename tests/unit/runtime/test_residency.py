"""Phases: what is loaded, what stays, what is dropped, and that the totals are those of the plan."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from framework.models import get_family
from framework.plan.build import build_run_plan
from framework.plan.types import VramPlan
from framework.plan.units import component_units
from framework.runtime.load import adapter_parameters, resting_bytes
from framework.runtime.residency import Residency
from framework.schema import RunConfig


def make_plan(source: Path, **dit: object) -> VramPlan:
    model = {
        "family": "qwen_image",
        "source": str(source),
        "dit": {"precision": "bf16", **dit},
        "text_encoder": {"precision": "fp8"},
        "vae": {"precision": "fp8", "fp8": {"layers": ["conv"]}},
    }
    config = RunConfig.model_validate(
        {
            "model": model,
            "data": {"path": "p"},
            "run": {"name": "t"},
            "sample": {"prompts": ["a"]},
            "optim": {"name": "adamw", "ema": {}},
        }
    )
    return build_run_plan(config, device="cpu")


def make_residency(plan: VramPlan, **options: object) -> Residency:
    return Residency(
        plan, get_family("qwen_image"), torch.device("cpu"), torch.bfloat16, 0, **options
    )


@pytest.mark.parametrize("dit", [{"trainable": "lora", "precision": "fp8"}, {"trainable": "full"}])
def test_each_phase_holds_what_the_plan_says(tiny_checkpoint: Path, dit: dict[str, str]) -> None:
    plan = make_plan(tiny_checkpoint, **dit)
    residency = make_residency(plan)
    for phase in ("encode", "train", "sample", "train"):
        residency.enter(phase)
        planned = plan.phase(phase)
        assert set(residency.modules) == set(planned.components)
        held = 0
        for name, module in residency.modules.items():
            part = plan.component(name)
            held += resting_bytes(module) + sum(
                4 * p.numel() for p in adapter_parameters(module).values()
            )
            trained = [p for p in module.parameters() if p.requires_grad]
            count = sum(p.numel() for p in trained)
            assert count == part.trained_numel
            gradient = 4 * count if phase == "train" else 0
            held += gradient + 8 * count + 4 * count
        assert held == planned.device_bytes


def test_optimizer_state_is_what_the_plan_counts(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, trainable="lora")
    residency = make_residency(plan)
    residency.enter("train")
    parameters = [p for p in residency.modules["dit"].parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    allocated = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    )
    assert allocated == plan.component("dit").optimizer_bytes
    assert sum(p.grad.numel() * 4 for p in parameters) == plan.component("dit").gradient_bytes


def test_what_trains_stays_and_what_is_frozen_goes(tiny_checkpoint: Path) -> None:
    residency = make_residency(make_plan(tiny_checkpoint, trainable="lora"))
    residency.enter("encode")
    assert residency.phase == "encode"
    text, vae = (weakref.ref(residency.modules[name]) for name in ("text_encoder", "vae"))
    residency.enter("train")
    gc.collect()
    assert text() is None
    assert vae() is None
    dit = residency.modules["dit"]
    residency.enter("sample")
    assert residency.modules["dit"] is dit
    residency.enter("encode")
    assert residency.modules["dit"] is dit
    assert set(residency.modules) == {"dit", "text_encoder", "vae"}


def test_entering_a_phase_twice_loads_nothing(tiny_checkpoint: Path) -> None:
    read: list[tuple[str, int]] = []
    residency = make_residency(
        make_plan(tiny_checkpoint, trainable="lora"),
        watch=lambda part: nullcontext(lambda count: read.append((part.name, count))),
    )
    residency.enter("encode")
    assert {name for name, _ in read} == {"text_encoder", "vae"}
    count = len(read)
    residency.enter("encode")
    assert len(read) == count


def test_a_phase_that_the_plan_does_not_have(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, trainable="lora")
    plan = plan.model_copy(update={"phases": plan.phases[:2]})
    with pytest.raises(KeyError, match="sample"):
        make_residency(plan).enter("sample")


def test_release_lets_go_of_what_trains_too(tiny_checkpoint: Path) -> None:
    residency = make_residency(make_plan(tiny_checkpoint, trainable="lora"))
    residency.enter("train")
    dit = weakref.ref(residency.modules["dit"])
    residency.release()
    assert dit() is None
    assert residency.modules == {}


def offloading_plan(source: Path, offload: str, granularity: str, **model: object) -> VramPlan:
    part = {"offload": offload, "granularity": granularity}
    config = RunConfig.model_validate(
        {
            "model": {
                "family": "qwen_image",
                "source": str(source),
                "dit": {"trainable": "lora", **part},
                "text_encoder": part,
                "vae": part,
                **model,
            },
            "data": {"path": "p"},
            "run": {"name": "t"},
            "sample": {"prompts": ["a"]},
        }
    )
    return build_run_plan(config, device="cpu")


@pytest.mark.parametrize("granularity", ["model", "block", "layer"])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_offloaded_components_hold_only_small_tensors_on_the_device(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offload: str,
    granularity: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # converted weights go to the current folder
    plan = offloading_plan(tiny_checkpoint, offload, granularity)
    residency = make_residency(plan)
    for phase in ("encode", "train", "sample", "train"):
        residency.enter(phase)
        held = sum(resting_bytes(module) for module in residency.modules.values())
        assert held == plan.phase(phase).device.weights
        assert residency.fetcher.held_bytes == 0
    residency.release()


def test_what_is_needed_again_isnt_read_again(tiny_checkpoint: Path) -> None:
    read: list[str] = []
    plan = offloading_plan(tiny_checkpoint, "host", "block")
    residency = make_residency(
        plan, watch=lambda part: nullcontext(lambda count: read.append(part.name))
    )
    for phase in ("encode", "train", "sample", "train", "sample"):
        residency.enter(phase)
        if phase == "encode":
            text = weakref.ref(residency.modules["text_encoder"])
    # Sampling needs the VAE again, so it waits in host memory.
    assert read.count("vae") == len(tensors(plan, "vae"))
    assert read.count("dit") == len(tensors(plan, "dit"))
    # Captions are encoded once, so the text encoder is gone.
    gc.collect()
    assert text() is None
    residency.release()


def tensors(plan: VramPlan, name: str) -> list[str]:
    return [tensor.name for group in plan.component(name).groups for tensor in group.tensors]


def test_there_is_room_below_the_limit(tiny_checkpoint: Path) -> None:
    least = offloading_plan(tiny_checkpoint, "host", "layer")
    assert least.phase("train").kept_bytes == 0
    roomy = offloading_plan(tiny_checkpoint, "host", "layer", vram_limit=1.0)
    residency = make_residency(roomy)
    residency.enter("train")
    assert residency.fetcher.keep_bytes == roomy.phase("train").kept_bytes
    units = component_units(roomy.component("dit"))
    assert residency.fetcher.keep_bytes == sum(unit.num_bytes for unit in units)
    residency.release()
