"""Managed layers: outputs and gradients against the same layer with the decoded weight, and against bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from framework.storage.managed import ManagedWeight, convert_layer_

SCALINGS = ["row", "tensor", "none"]
LAYERS = {
    "linear": (lambda: nn.Linear(24, 40), (3, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (7, 24)),
    "linear on a vector": (lambda: nn.Linear(24, 40), (24,)),
    "linear on an empty batch": (lambda: nn.Linear(24, 40), (0, 5, 24)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 9, 7)),
    "conv2d strided": (
        lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=4),
        (2, 8, 13, 11),
    ),
    "conv2d unbatched": (lambda: nn.Conv2d(8, 12, 3), (8, 9, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(8, 12, 1, bias=False), (2, 8, 5, 5)),
    "conv2d on an empty batch": (lambda: nn.Conv2d(8, 12, 3), (0, 8, 9, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=(1, 1, 0), stride=(1, 2, 1)), (2, 4, 5, 6, 7)),
}


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def pair(make, scaling: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A managed layer and a plain one that holds its decoded weight."""
    torch.manual_seed(0)
    plain = make().to(dtype).requires_grad_(False)
    managed = copy.deepcopy(plain)
    convert_layer_(managed, scaling=scaling)
    plain.weight.data = managed.weight.clone()
    return managed, plain


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input for a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_float64_output_and_gradient_are_those_of_the_decoded_weight(
    kind: str, scaling: str
) -> None:
    make, shape = LAYERS[kind]
    managed, plain = pair(make, scaling, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    for got, wanted in zip(run(managed, x), run(plain, x), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["linear", "conv2d strided", "conv3d"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_rounding_of_the_compute_dtype_only(
    kind: str, scaling: str, dtype: torch.dtype, bound: float
) -> None:
    """Against float64 with the same codes: what is left is the rounding of the format that computes."""
    make, shape = LAYERS[kind]
    managed, _ = pair(make, scaling, dtype)
    exact, _ = pair(make, scaling, dtype)
    exact.double()
    x = torch.randn(shape).to(dtype)
    for got, wanted in zip(run(managed, x), run(exact, x.double()), strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) < bound


def test_own_scales_cost_no_rounding() -> None:
    """In bf16 on the CPU, with a bias: the very bits of a plain layer that holds the decoded weight, forth and back."""
    torch.manual_seed(0)
    for make, shape in (LAYERS["linear"], LAYERS["conv2d"], LAYERS["conv3d"]):
        for scaling in ("row", "tensor", "block", "none"):
            managed, plain = pair(make, scaling, torch.bfloat16)
            x = torch.randn(shape).to(torch.bfloat16)
            for got, wanted in zip(run(managed, x), run(plain, x), strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaling", ["row", "tensor", "block", "none"])
def test_every_way_to_decode_gives_the_same_bits(
    scaling: str, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared, not prepared as an offloaded weight, and scaled afterwards as on an accelerator, there without a bias.

    Multiplying by a power of two commutes with rounding.
    """
    torch.manual_seed(0)
    layer = nn.Linear(256, 512, bias=bias).to(dtype).requires_grad_(False)
    nn.init.normal_(layer.weight, std=20 if scaling == "none" else 0.02)
    convert_layer_(layer, scaling=scaling)
    x = torch.randn(32, 256).to(dtype)
    prepared = run(layer, x)
    assert layer._prepared is not None
    monkeypatch.setattr(ManagedWeight, "_prepare", lambda *_: None)
    ways = [run(layer, x)]
    if not bias and scaling != "block":
        monkeypatch.setattr("framework.storage.products.folds", lambda *_: False)
        ways.append(run(layer, x))
    for found in ways:
        for got, wanted in zip(found, prepared, strict=True):
            assert torch.equal(got, wanted)


def test_rounding_of_products_with_own_and_other_scales() -> None:
    """In bf16: .0017 with a whole weight, .0024 with a scaled output, .0022 with a weight rounded after scaling."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False).to(torch.bfloat16)
    convert_layer_(layer)
    x = torch.randn(64, 512).to(torch.bfloat16)
    assert relative(layer(x), copy.deepcopy(layer).double()(x.double())) < 0.0018
    layer.dequant_scale.mul_(torch.rand(512) + 0.5)
    wanted = copy.deepcopy(layer).double()(x.double())
    assert relative(layer(x), wanted) == pytest.approx(0.0024, abs=2e-4)
    assert relative(functional.linear(x, layer.weight), wanted) == pytest.approx(0.0022, abs=2e-4)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_error_against_the_weight_before_encoding(scaling: str) -> None:
    """Bounds from the project's measurements on N(0, .02): output and gradient below .04, plain cast below .05."""
    torch.manual_seed(0)
    plain = nn.Linear(512, 512, bias=False).double().requires_grad_(False)
    nn.init.normal_(plain.weight, std=0.02)
    managed = copy.deepcopy(plain)
    convert_layer_(managed, scaling=scaling)
    x = torch.randn(64, 512, dtype=torch.float64)
    bound = 0.05 if scaling == "none" else 0.04
    for got, wanted in zip(run(managed, x), run(plain, x), strict=True):
        assert relative(got, wanted) < bound


def test_autocast_decides_the_dtype_like_for_a_plain_layer() -> None:
    managed, plain = pair(lambda: nn.Linear(24, 40), "row", torch.float32)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got_grad = run(managed, x)
        wanted, wanted_grad = run(plain, x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert got_grad.dtype == wanted_grad.dtype == torch.float32
    assert relative(got, wanted) < 0.01
    assert relative(got_grad, wanted_grad) < 0.01


@pytest.mark.parametrize("kind", ["conv2d", "conv3d"])
def test_autocast_for_convolutions(kind: str) -> None:
    make, shape = LAYERS[kind]
    managed, plain = pair(make, "row", torch.float32)
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = managed(x), plain(x)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert relative(got, wanted) < 0.01


def test_bias_that_trains_gets_its_gradient() -> None:
    for kind in ("linear", "conv2d", "conv3d"):
        make, shape = LAYERS[kind]
        managed, plain = pair(make, "row", torch.float64)
        x = torch.randn(shape, dtype=torch.float64)
        for layer in (managed, plain):
            layer.bias.requires_grad_()
            run(layer, x)
        torch.testing.assert_close(managed.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_embedding_decodes_the_rows_that_are_looked_up(
    scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(50, 12, padding_idx=0).to(torch.bfloat16).requires_grad_(False)
    managed = copy.deepcopy(plain)
    convert_layer_(managed, scaling=scaling)
    table = managed.weight
    ids = torch.tensor([[3, 0, 49], [3, 7, 1]])
    decoded: list[int] = []
    from framework.storage import weights as module

    original = module.dequantise
    monkeypatch.setattr(
        module,
        "dequantise",
        lambda codes, *rest, **options: (
            decoded.append(codes.numel()),
            original(codes, *rest, **options),
        )[1],
    )
    assert torch.equal(managed(ids), functional.embedding(ids, table))
    assert decoded == [ids.numel() * 12]
    assert managed(ids).dtype == torch.bfloat16
    assert managed(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 12)
    assert managed(torch.tensor(4)).shape == (12,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    managed, _ = pair(lambda: nn.Linear(24, 24), "row", torch.float32)
    x = torch.randn(5, 24)
    plain_run = run(managed, x)
    again = run(lambda x: checkpoint(managed, x, use_reentrant=use_reentrant), x)
    assert torch.equal(plain_run[0], again[0])
    assert torch.equal(plain_run[1], again[1])


def test_no_grad_and_inference_mode() -> None:
    for kind in ("linear", "conv2d", "conv3d"):
        make, shape = LAYERS[kind]
        managed, _ = pair(make, "row", torch.float32)
        x = torch.randn(shape)
        wanted = managed(x.clone().requires_grad_()).detach()
        with torch.no_grad():
            assert torch.equal(managed(x), wanted)
        with torch.inference_mode():
            assert torch.equal(managed(x), wanted)


def test_second_derivatives_are_refused_instead_of_wrong() -> None:
    managed, _ = pair(lambda: nn.Linear(4, 4), "row", torch.float32)
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(managed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_float16_does_not_overflow_where_the_weight_itself_would_not() -> None:
    """Codes reach 448, so their product with 4096 inputs passes 65504 although the layer's output is small."""
    torch.manual_seed(0)
    plain = nn.Linear(4096, 8, bias=False).requires_grad_(False)
    nn.init.constant_(plain.weight, 0.01)
    managed = copy.deepcopy(plain)
    convert_layer_(managed)
    x = torch.ones(2, 4096)
    got, got_grad = run(managed.half(), x.half())
    assert bool(torch.isfinite(got).all() and torch.isfinite(got_grad).all())
    torch.testing.assert_close(got.float(), torch.full((2, 8), 40.96), rtol=2**-4, atol=0)
