"""FP8's errors as they are measured, against computations that share no code with the measurement."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from framework.models import get_family
from framework.plan.types import ComponentPlan
from framework.runtime import encoding_error
from framework.runtime.adapters import lora_layers
from framework.runtime.encoding_error import (
    SIGMA,
    OutputProbe,
    SourceWeights,
    measure_weights,
    plain_product,
    relative_error,
    seeded_input,
)
from framework.runtime.load import load_component
from framework.storage.managed import convert_layer_
from tests.unit.runtime.test_load import make_plan

CPU = torch.device("cpu")
FAMILY = get_family("qwen_image")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dit_part(source: Path, *, compute: str = "fp32", **dit: Any) -> ComponentPlan:
    settings = {"precision": "fp8", "trainable": "lora", "lora": {"rank": 2}, **dit}
    return make_plan(source, compute=compute, dit=settings).component("dit")


def make_probe(source: Path, *, compute: str = "fp32", **dit: Any) -> OutputProbe:
    part = dit_part(source, compute=compute, **dit)
    module = load_component(part, FAMILY, device=CPU, compute_dtype=DTYPES[compute])
    return OutputProbe(module, SourceWeights(part), FAMILY)


def published_dit(source: Path, dtype: torch.dtype) -> Any:
    return QwenImageTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=dtype)


def output_of(dit: nn.Module) -> Tensor:
    noisy, text = seeded_input(FAMILY, dit)
    with torch.no_grad():
        return FAMILY.predict(noisy, torch.tensor([SIGMA]), text, dit)


def rounded_to_e4m3(weight: Tensor, scaling: str) -> Tensor:
    """Row, tensor or block scales, powers of two, and torch's own cast, in float64 but for the cast's input."""
    wide = weight.double()
    if scaling == "block":
        (rows, columns), size = weight.shape, 128
        scale = torch.empty_like(wide)
        for top in range(0, rows, size):
            for left in range(0, columns, size):
                block = wide[top : top + size, left : left + size]
                scale[top : top + size, left : left + size] = block.abs().max() / 448
    else:
        largest = wide.abs().amax(dim=1, keepdim=True) if scaling == "row" else wide.abs().max()
        scale = largest / 448
    scale = scale.log2().ceil().exp2()
    codes = (wide / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scale


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_the_reference_is_the_published_model_to_the_bit(
    tiny_checkpoint: Path, compute: str
) -> None:
    reference = make_probe(tiny_checkpoint, compute=compute).reference()
    assert torch.equal(reference, output_of(published_dit(tiny_checkpoint, DTYPES[compute])))


@pytest.mark.parametrize("scaling", ["row", "tensor", "block"])
def test_output_and_weight_errors_are_those_of_rounded_weights(
    tiny_checkpoint: Path, scaling: str
) -> None:
    probe = make_probe(tiny_checkpoint, fp8={"scaling": scaling})
    error = relative_error(probe.output(), probe.reference())
    dit = published_dit(tiny_checkpoint, torch.float32)
    exact = output_of(dit)
    assert len(probe.errors) > 20
    for name, found in probe.errors.items():
        layer = dit.get_submodule(name)
        weight = layer.weight.detach().clone()
        rounded = rounded_to_e4m3(weight, scaling)
        expected = torch.linalg.norm(rounded - weight) / torch.linalg.norm(weight.double())
        assert found.weight_error == pytest.approx(float(expected), rel=1e-3)
        assert found.shape == tuple(weight.shape)
        layer.weight.data = rounded.float()
    expected = torch.linalg.norm(output_of(dit) - exact) / torch.linalg.norm(exact)
    assert error == pytest.approx(float(expected), rel=1e-2)
    assert 1e-3 < error < 0.1


def test_layers_that_are_computed_from_their_source_bring_no_error(tiny_checkpoint: Path) -> None:
    probe = make_probe(tiny_checkpoint)
    names = list(probe.source.layers)
    assert torch.equal(probe.output(unencoded=names), probe.reference())
    some = relative_error(probe.output(unencoded=names[:10]), probe.reference())
    assert 0 < some != relative_error(probe.output(), probe.reference())


def test_shares_are_those_of_encoding_layers_one_by_one(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = make_probe(tiny_checkpoint)
    names = list(probe.source.layers)
    alone = {
        name: relative_error(
            probe.output(unencoded=[n for n in names if n != name]), probe.reference()
        )
        ** 2
        for name in names
    }
    few = probe.shares()
    assert sum(few.values()) == pytest.approx(1)
    assert few == make_probe(tiny_checkpoint).shares()
    # An average over 100 directions has a relative standard deviation of 0.14.
    monkeypatch.setattr(encoding_error, "NUM_PROBES", 100)
    many = probe.shares()
    costly = sorted(names, key=lambda name: -alone[name])[:12]
    for name in costly:
        assert many[name] == pytest.approx(alone[name] / sum(alone.values()), rel=0.5), name
        assert 1 / 6 < few[name] / many[name] < 6, name
    # The text half of the last block takes no part in the picture.
    useless = [name for name in names if alone[name] == 0]
    assert useless
    assert all(few[name] == 0 for name in useless)


def test_measuring_leaves_no_trace(tiny_checkpoint: Path) -> None:
    probe = make_probe(tiny_checkpoint)
    dit: Any = probe.dit
    dit.train()
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    flags = {name: p.requires_grad for name, p in dit.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    probe.reference()
    probe.output(unencoded=list(probe.source.layers)[:3])
    probe.shares()
    assert torch.equal(torch.rand(3), expected)
    assert all(part.training for part in dit.modules())
    assert not dit.gradient_checkpointing
    assert not any("forward" in part.__dict__ for part in dit.modules())
    assert not any(layer.disable_adapters for _, layer in lora_layers(dit))
    assert {name: p.requires_grad for name, p in dit.named_parameters()} == flags
    assert all(p.grad is None for p in dit.parameters())
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())


def test_an_adapter_on_the_component_changes_nothing(tiny_checkpoint: Path) -> None:
    plain, adapted = make_probe(tiny_checkpoint, trainable="none"), make_probe(tiny_checkpoint)
    for _, layer in lora_layers(adapted.dit):
        nn.init.normal_(layer.lora_B["default"].weight)
    assert torch.equal(plain.output(), adapted.output())
    assert torch.equal(plain.reference(), adapted.reference())
    assert plain.shares() == adapted.shares()


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_offloaded_weights_are_measured_alike(
    tiny_checkpoint: Path, tmp_path: Path, offload: str, granularity: str
) -> None:
    here = make_probe(tiny_checkpoint, compute="bf16")
    model = {"converted_dir": str(tmp_path)} if offload == "disk" else {}
    settings = {"precision": "fp8", "offload": offload, "granularity": granularity}
    plan = make_plan(tiny_checkpoint, compute="bf16", dit=settings | {"trainable": "lora"}, **model)
    part = plan.component("dit")
    dit = load_component(part, FAMILY, device=CPU, compute_dtype=torch.bfloat16)
    there = OutputProbe(dit, SourceWeights(part), FAMILY)
    assert torch.equal(here.output(), there.output())
    assert torch.equal(here.reference(), there.reference())
    assert here.shares() == there.shares()


def test_a_component_that_is_not_loaded_is_measured_weight_by_weight(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, dit={"trainable": "lora"}, text_encoder={"precision": "fp8"})
    part = plan.component("text_encoder")
    errors = measure_weights(SourceWeights(part), CPU)
    assert [e.layer for e in errors] == [t.layer for t in part.groups[0].tensors]
    assert all(0.01 < e.weight_error < 0.04 for e in errors)


def test_weights_that_are_fp8_in_the_file_have_no_error(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        state = load_file(file)
        cast = {
            k: v.to(torch.float8_e4m3fn) if "attn" in k and v.ndim == 2 else v
            for k, v in state.items()
        }
        save_file(cast, file)
    probe = make_probe(folder)
    assert probe.source.layers
    assert not any("attn.to_q" in name for name in probe.source.layers)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4), (2, 6)),
        (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 5, 5)),
        (lambda: nn.Conv3d(6, 4, 3, padding=1), (2, 6, 3, 5, 5)),
    ],
)
def test_a_managed_layer_computes_with_a_plain_weight(
    make: Callable[[], Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = make()
    x, weight = torch.randn(shape), layer.weight.detach().clone()
    expected = layer(x)
    convert_layer_(layer)
    assert not torch.equal(layer(x), expected)
    assert torch.equal(plain_product(layer, weight, x), expected)


def test_a_managed_embedding_looks_up_a_plain_weight() -> None:
    layer = nn.Embedding(9, 4)
    ids, weight = torch.tensor([[1, 8, 3]]), layer.weight.detach().clone()
    convert_layer_(layer)
    assert torch.equal(plain_product(layer, weight, ids), weight[ids])


def test_relative_errors_of_zero() -> None:
    zeros = torch.zeros(3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(torch.ones(3), zeros) == float("inf")
    assert relative_error(torch.tensor([3.0, 0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_cpu_does(tiny_checkpoint: Path) -> None:
    part = dit_part(tiny_checkpoint)
    device = torch.device("cuda", torch.cuda.current_device())
    dit = load_component(part, FAMILY, device=device, compute_dtype=torch.float32)
    there, here = OutputProbe(dit, SourceWeights(part), FAMILY), make_probe(tiny_checkpoint)
    errors = [relative_error(probe.output(), probe.reference()) for probe in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    for name, found in there.errors.items():
        assert found.weight_error == pytest.approx(here.errors[name].weight_error, rel=1e-4)
