"""Every accepted way to store and place a component gives the losses and gradients of the plain one.

Where weights rest and how many are fetched at once changes no bit: each combination is compared with the same precision
on the device. FP8 itself is compared with bf16 by a bound.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from framework.models import TextConditioning, get_family
from framework.plan.build import build_plan
from framework.plan.types import VramPlan
from framework.plan.units import component_units
from framework.runtime.load import load_component
from framework.schema import ModelConfig
from framework.schema.validate import examine_values
from framework.storage.fetching import Fetcher

FAMILY = get_family("qwen_image")
CPU = torch.device("cpu")
OFFLOADS = [("host", g) for g in ("model", "block", "layer")] + [
    ("disk", g) for g in ("model", "block", "layer")
]


def plan_of(checkpoint: Path, component: str, folder: Path, **settings: Any) -> VramPlan:
    model = ModelConfig.model_validate(
        {
            "family": "qwen_image",
            "source": str(checkpoint),
            "converted_dir": str(folder) if settings.get("offload") == "disk" else None,
            component: settings,
        }
    )
    return build_plan(
        model,
        purpose="train",
        phases=("train",),
        resident={"train": (component,)},
        device="cpu",
    )


def load(
    checkpoint: Path, component: str, folder: Path, *, keep_bytes: int = 0, **settings: Any
) -> tuple[nn.Module, Fetcher]:
    plan = plan_of(checkpoint, component, folder, **settings)
    fetcher = Fetcher(CPU)
    fetcher.keep(keep_bytes)
    module = load_component(
        plan.component(component),
        FAMILY,
        device=CPU,
        compute_dtype=torch.bfloat16,
        fetcher=fetcher,
    )
    if settings.get("gradient_checkpointing"):
        module.enable_gradient_checkpointing()
        module.train()
    unsettle_(module)
    return module, fetcher


def unsettle_(module: nn.Module) -> None:
    """B of a LoRA begins with zeros, which would hide errors in the gradient of A and of what lies before it."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(module.named_parameters()):
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1, generator=generator)


def step(component: str, module: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients of what trains and of the input; two steps, of which the second is told."""
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = None
        loss, given = RUNS[component](module)
        loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    if given.grad is not None:
        gradients["input"] = given.grad
    return loss.detach(), gradients


def run_dit(dit: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 16, 4, 4, generator=generator).requires_grad_()
    text = TextConditioning(
        torch.randn(2, 3, 16, generator=generator), torch.ones(2, 3, dtype=torch.bool)
    )
    with torch.autocast("cpu", torch.bfloat16):
        velocity = FAMILY.predict(noisy, torch.tensor([0.3, 0.8]), text, dit)
    return velocity.square().mean(), noisy


def run_text_encoder(module: nn.Module) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[5, 8, 60, 7], [9, 11, 3, 40]])
    with torch.autocast("cpu", torch.bfloat16):
        states = module(input_ids=ids, use_cache=False).last_hidden_state
    given = torch.zeros((), requires_grad=True)
    return states.float().square().mean() + given, given


def run_vae(module: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, 16, 16, generator=generator).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, mean, _ = FAMILY.reconstruct(pixels, module)
    return (reconstruction - 0.5).square().mean() + mean.square().mean(), pixels


RUNS = {"dit": run_dit, "text_encoder": run_text_encoder, "vae": run_vae}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    first, second = (
        torch.cat([v.double().flatten() for _, v in sorted(x.items())]) for x in (a, b)
    )
    return float((first - second).norm() / second.norm())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trainable", ["none", "lora"])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_where_the_dit_rests_changes_nothing(
    tiny_checkpoint: Path, converted: Path, precision: str, trainable: str, checkpointing: bool
) -> None:
    settings: dict[str, Any] = {
        "precision": precision,
        "trainable": trainable,
        "gradient_checkpointing": checkpointing,
    }
    module, _ = load(tiny_checkpoint, "dit", converted, **settings)
    loss, gradients = step("dit", module)
    assert len(gradients) == (1 if trainable == "none" else 31)
    for offload, granularity in OFFLOADS:
        moved, fetcher = load(
            tiny_checkpoint,
            "dit",
            converted,
            offload=offload,
            granularity=granularity,
            **settings,
        )
        found_loss, found = step("dit", moved)
        assert fetcher.fetched_bytes > 0
        told = f"{offload}, {granularity}"
        assert torch.equal(found_loss, loss), told
        assert found.keys() == gradients.keys(), told
        assert all(torch.equal(found[n], g) for n, g in gradients.items()), told
        fetcher.close()


@pytest.mark.parametrize("trainable", ["none", "lora"])
@pytest.mark.parametrize("scaling", ["row", "tensor", "block"])
def test_fp8_is_near_bf16_for_every_scaling(
    tiny_checkpoint: Path, converted: Path, scaling: str, trainable: str
) -> None:
    plain, _ = load(tiny_checkpoint, "dit", converted, trainable=trainable)
    loss, gradients = step("dit", plain)
    settings: dict[str, Any] = {"precision": "fp8", "fp8": {"scaling": scaling}}
    for offload in ("none", "host", "disk"):
        module, fetcher = load(
            tiny_checkpoint, "dit", converted, trainable=trainable, offload=offload, **settings
        )
        found_loss, found = step("dit", module)
        assert float(found_loss) == pytest.approx(float(loss), rel=0.02)
        assert 0 < distance(found, gradients) < 0.06
        fetcher.close()


@pytest.mark.parametrize("trainable", ["none", "lora"])
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize(
    ("component", "layers"),
    [("text_encoder", ["linear", "embedding"]), ("vae", ["linear", "conv"])],
)
def test_where_the_other_components_rest_changes_nothing(
    tiny_checkpoint: Path,
    converted: Path,
    component: str,
    layers: list[str],
    precision: str,
    trainable: str,
) -> None:
    settings: dict[str, Any] = {
        "precision": precision,
        "trainable": trainable,
        "fp8": {"layers": layers},
    }
    module, _ = load(tiny_checkpoint, component, converted, **settings)
    loss, gradients = step(component, module)
    for offload, granularity in OFFLOADS:
        moved, fetcher = load(
            tiny_checkpoint,
            component,
            converted,
            offload=offload,
            granularity=granularity,
            **settings,
        )
        found_loss, found = step(component, moved)
        assert torch.equal(found_loss, loss), (offload, granularity)
        assert all(torch.equal(found[n], g) for n, g in gradients.items()), (offload, granularity)
        fetcher.close()


@pytest.mark.parametrize(
    ("precision", "offload"), list(product(["fp8", "bf16"], ["none", "host", "disk"]))
)
def test_full_training_rests_on_the_device_in_bf16(
    tiny_checkpoint: Path, precision: str, offload: str
) -> None:
    """The combinations that can't work are refused with the reason, the one that can is accepted."""
    values = {
        "model": {
            "family": "qwen_image",
            "source": str(tiny_checkpoint),
            "dit": {"trainable": "full", "precision": precision, "offload": offload},
        },
        "data": {"path": "pictures"},
        "run": {"name": "test"},
    }
    found = {fault.path for fault in examine_values(values, lambda path: "test").faults}
    expected = set()
    if precision == "fp8":
        expected.add("model.dit.precision")
    if offload != "none":
        expected.add("model.dit.offload")
    assert found == expected


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_room_only_changes_how_much_is_copied(
    tiny_checkpoint: Path, converted: Path, offload: str, granularity: str
) -> None:
    settings: dict[str, Any] = {
        "precision": "fp8",
        "trainable": "lora",
        "offload": offload,
        "granularity": granularity,
    }
    plan = plan_of(tiny_checkpoint, "dit", converted, **settings).component("dit")
    total = sum(unit.num_bytes for unit in component_units(plan))
    copied, results = [], []
    for keep in (0, total // 2, total):
        module, fetcher = load(tiny_checkpoint, "dit", converted, keep_bytes=keep, **settings)
        results.append(step("dit", module))
        copied.append(fetcher.fetched_bytes)
        kept_at_most = keep + 2 * max(unit.num_bytes for unit in component_units(plan))
        assert fetcher.held_bytes <= kept_at_most
        fetcher.close()
        assert fetcher.held_bytes == 0
    assert copied[0] > copied[1] > copied[2] == total
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(gradients[n], g) for n, g in results[0][1].items())


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate(
            {"family": "qwen_image", "source": "x", "dit": {"offload": "cpu"}}
        )
