"""The fused products against float64: in Triton's interpreter on any machine, compiled for cards, and on a card."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from framework.storage import products, triton_product
from framework.storage.fp8 import dequantise, encode_e4m3
from framework.storage.managed import convert_layer_
from framework.storage.triton_product import (
    Tiling,
    can_fuse,
    choose_product,
    fused_grad_input,
    fused_linear,
    is_available,
    use_fused,
)

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

DTYPES = [torch.bfloat16, torch.float16]
SCALINGS = ["row", "tensor", "none"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
FINITE = [code for code in range(256) if code & 0x7F != 0x7F]

SHORT_ROW = Tiling(1, 4, 16, 1, 1)

# (M, N, K): one row; edges in every direction; sums longer than a block, and made in parts; more rows than a block.
SHAPES = [
    (1, 24, 40),
    (1, 9, 1030),
    (2, 24, 40),
    (5, 33, 17),
    (16, 64, 256),
    (17, 48, 130),
    (3, 20, 1100),
    (3, 1100, 20),
    (70, 72, 96),
    (200, 40, 72),
]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The kernels as Triton's interpreter runs them: a second copy of their module, made while interpreting is on."""
    spec = importlib.util.find_spec(triton_product._KERNELS)
    assert spec is not None
    assert spec.origin is not None
    own = importlib.util.spec_from_file_location("interpreted_kernels", spec.origin)
    assert own is not None
    assert own.loader is not None
    module = importlib.util.module_from_spec(own)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        own.loader.exec_module(module)
    return module


@pytest.fixture
def interpreted(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products run in the interpreter, each kernel in the first of its tilings."""

    def runner(kernel: str, rows_class: int) -> Callable[[Any, dict[str, Any]], None]:
        tilings = triton_product._tilings(rows_class)[1]
        # The interpreter sums a row element by element, in Python: a short one.
        tiling = SHORT_ROW if kernel == "row_kernel" else tilings[0]
        return functools.partial(launch, getattr(kernels, kernel), kernel, tiling)

    monkeypatch.setattr(triton_product, "_runner", runner)
    yield
    # What the interpreter does to the language must not outlive it, or nothing compiles any more.
    assert triton.language.load.__module__ == "triton.language.core"


def launch(
    function: Any, kernel: str, tiling: Tiling, grid: Any, arguments: dict[str, Any]
) -> None:
    function[grid](**arguments, **triton_product._meta(kernel, tiling))


def make(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, scaling: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x, codes, scale, bias, grad: weights about 0.02, or about 1 without a scale, where small ones would become 0."""
    generator = torch.Generator().manual_seed(rows * 7 + outputs * 5 + inputs * 3)
    draw = functools.partial(torch.randn, generator=generator)
    weight = draw(outputs, inputs) * (1.0 if scaling == "none" else 0.02)
    # Rows of different size, so that a scale on the wrong row, or the wrong way round, shows.
    weight *= torch.logspace(-1, 1, outputs)[:, None]
    codes, scale = encode_e4m3(weight, scaling)  # type: ignore[arg-type]
    x, grad = draw(rows, inputs).to(dtype), draw(rows, outputs).to(dtype)
    return x, codes, scale, draw(outputs), grad


def assert_close(
    got: Tensor, factors: tuple[Tensor, Tensor], bias: Tensor | None, *, weight_rounding: bool
) -> None:
    """Within the rounding of the result, that of a float32 sum, and, where told, one rounding of each weight."""
    left, right = (factor.double() for factor in factors)
    truth = left @ right + (0 if bias is None else bias.double())
    # The interpreter cuts off where bfloat16 ends; cards round to the nearest.
    cut_off = got.device.type == "cpu" and got.dtype == torch.bfloat16
    unit = torch.finfo(got.dtype).eps / (1 if cut_off else 2)
    size = left.abs() @ right.abs() + (0 if bias is None else bias.double().abs())
    bound = unit * 1.01 * truth.abs() + 2e-6 * size + torch.finfo(got.dtype).smallest_normal
    if weight_rounding:
        bound += 1.01 * unit * size
    assert bool(((got.double() - truth).abs() <= bound).all())


def check(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, scaling: str, device: str
) -> None:
    """Both products of one shape."""
    made = make(rows, outputs, inputs, dtype, scaling)
    x, codes, scale, bias, grad = (None if t is None else t.to(device) for t in made)
    assert x is not None
    assert codes is not None
    assert grad is not None
    weight = dequantise(codes, scale, torch.float64)
    y = fused_linear(x, codes, scale, bias)
    assert (y.shape, y.dtype) == ((rows, outputs), dtype)
    assert_close(y, (x, weight.T), bias, weight_rounding=False)
    assert_close(fused_linear(x, codes, scale), (x, weight.T), None, weight_rounding=False)
    grad_x = fused_grad_input(grad, codes, scale)
    assert (grad_x.shape, grad_x.dtype) == ((rows, inputs), dtype)
    assert_close(grad_x, (grad, weight), None, weight_rounding=scaling == "row")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_agree_with_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, scaling: str
) -> None:
    check(*shape, dtype, scaling, "cpu")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_every_code_is_decoded_exactly(dtype: torch.dtype, rows: int) -> None:
    codes = torch.tensor(FINITE, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).to(dtype)
    one_hot = torch.eye(rows, 16, dtype=dtype)
    # Each code once in column 0 and, for gradients, once in row 0.
    column = torch.zeros(len(FINITE), 16, dtype=torch.uint8)
    column[:, 0] = codes
    assert torch.equal(fused_linear(one_hot, column, None)[0], wanted)
    row = torch.zeros(16, len(FINITE), dtype=torch.uint8)
    row[0] = codes
    assert torch.equal(fused_grad_input(one_hot, row, None)[0], wanted)


@pytest.mark.usefixtures("interpreted")
def test_a_sum_in_parts_is_the_sum() -> None:
    rows, outputs, inputs = 3, 20, 1100
    tilings = triton_product._tilings(rows)[1]
    parts, chunk = triton_product._share_out(rows, outputs, inputs, tilings[0])
    assert parts > 1
    assert (parts - 1) * chunk < inputs <= parts * chunk
    check(rows, outputs, inputs, torch.bfloat16, "row", "cpu")


@pytest.mark.parametrize("scaling", ["row", "none"])
def test_the_fastest_tiling_is_looked_for_once(
    kernels: ModuleType, scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own search, in the interpreter with a stopwatch that only runs the kernel."""
    timed: list[str] = []

    def stopwatch(call: Callable[[], None], quantiles: Any) -> list[float]:
        call()
        timed.append("a tiling")
        return [float(len(timed))] * 3

    monkeypatch.setattr(triton, "autotune", functools.partial(triton.autotune, do_bench=stopwatch))
    monkeypatch.setattr(
        triton_product,
        "import_module",
        lambda name: (
            {"triton": triton}.get(name)
            or (kernels if name == triton_product._KERNELS else triton.language)
        ),
    )
    monkeypatch.setattr(triton_product, "_ROW_TILINGS", (SHORT_ROW, Tiling(1, 8, 16, 1, 1)))
    triton_product._runner.cache_clear()
    try:
        for shape in ((1, 24, 40), (5, 33, 17), (70, 40, 72)):
            check(*shape, torch.bfloat16, scaling, "cpu")
            assert timed
            timed.clear()
            check(*shape, torch.bfloat16, scaling, "cpu")
            assert not timed
    finally:
        triton_product._runner.cache_clear()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scaling", [*SCALINGS, "block"])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (0, 24)], ids=str)
def test_a_managed_layer_that_is_fused_is_the_layer(
    shape: tuple[int, ...], scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    convert_layer_(layer, scaling=scaling, block_shape=(16, 16) if scaling == "block" else None)
    x = torch.randn(shape, dtype=torch.bfloat16)
    results = []
    calls: list[str] = []
    for name in ("fused_linear", "fused_grad_input"):
        plain = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, f=plain, n=name: (calls.append(n), f(*a))[1])
    for fused in (False, True):
        monkeypatch.setattr(products, "choose_product", lambda device, rows, fused=fused: fused)
        given = x.clone().requires_grad_()
        layer.bias.grad = None
        y = layer(given)
        y.float().square().sum().backward()
        results.append((y.detach(), given.grad, layer.bias.grad))
    wanted = [] if scaling == "block" or 0 in shape else ["fused_linear", "fused_grad_input"]
    assert calls == wanted
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03)


def test_tilings_of_a_class_sum_in_the_same_order() -> None:
    for _, tilings in (*triton_product._TILINGS, (1, triton_product._ROW_TILINGS)):
        assert len({tiling.sum_block for tiling in tilings}) == 1
        assert (
            triton_product._PART_MULTIPLE % tilings[0].sum_block == 0 or tilings[0].rows_block == 1
        )


def test_tensors_that_do_not_suit_are_told_and_refused() -> None:
    x, codes, scale, bias, grad = make(2, 8, 16, torch.bfloat16, "row")
    assert can_fuse(x, codes, scale)
    assert not can_fuse(x.float(), codes, scale)
    assert not can_fuse(x[:0], codes, scale)
    assert not can_fuse(x, codes.view(8, 4, 4), scale)
    assert not can_fuse(x, codes, torch.ones(1, 1))
    for wrong in (
        (x.float(), codes, scale, bias),
        (x[:, :8], codes, scale, bias),
        (x, codes, scale, bias[:4]),
        (x, codes, torch.ones(3), bias),
        (x, codes.view(torch.float8_e4m3fn), scale, bias),
    ):
        with pytest.raises(ValueError, match="no fused product of"):
            fused_linear(*wrong)
    with pytest.raises(ValueError, match="no fused product of"):
        fused_grad_input(grad[:, :4], codes, scale)


def test_the_plain_path_is_the_default_until_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert not is_available(torch.device("cpu"))
    assert not choose_product(torch.device("cpu"), 1024)
    assert not choose_product(cuda, 1024)
    monkeypatch.setattr(triton_product, "_FASTER", {(9, 0): (range(1, 2), range(512, 4096))})
    monkeypatch.setattr(triton_product, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(triton_product, "is_available", lambda device: device.type == "cuda")
    assert [choose_product(cuda, rows) for rows in (1, 2, 512, 4096)] == [True, False, True, False]
    assert not choose_product(torch.device("cpu"), 512)
    with use_fused(True):
        assert choose_product(cuda, 2)
        assert not choose_product(torch.device("cpu"), 512)
        with use_fused(False):
            assert not choose_product(cuda, 512)
        assert choose_product(cuda, 2)
    assert not choose_product(cuda, 2)
    monkeypatch.setattr(triton_product, "_capability", lambda index: (8, 0))
    assert not choose_product(cuda, 512)


def test_fake_tensors_give_shapes_without_a_kernel() -> None:
    with FakeTensorMode():
        x = torch.empty(5, 16, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(8, 16, dtype=torch.uint8, device="cuda")
        y = fused_linear(x, codes, None)
        grad_x = fused_grad_input(y, codes, None)
    assert (tuple(y.shape), y.dtype, y.device.type) == ((5, 8), torch.bfloat16, "cuda")
    assert (tuple(grad_x.shape), grad_x.dtype) == ((5, 16), torch.bfloat16)


class AbsentCard:
    """As much of a driver as Triton's compiler asks about the card that it compiles for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        """Name the card's kind."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Give each kind a number of its own, since compiled kernels are kept by it."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Products compile their kernels, with the arguments that they would launch them with, and leave them here."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    made: dict[str, Any] = {}

    def runner(kernel: str, rows_class: int) -> Callable[[Any, dict[str, Any]], None]:
        from framework.storage import triton_kernels

        rows = triton_product._ROW_TILINGS[0]
        tiling = rows if kernel == "row_kernel" else Tiling(64, 64, 64, 4, 3)

        def run(grid: Any, arguments: dict[str, Any]) -> None:
            made[kernel] = getattr(triton_kernels, kernel).warmup(
                grid=grid, **arguments, **options(kernel, tiling)
            )

        return run

    monkeypatch.setattr(triton_product, "_runner", runner)
    return made


def options(kernel: str, tiling: Tiling) -> dict[str, Any]:
    """What one tiling adds to a launch."""
    return {
        **triton_product._meta(kernel, tiling),
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "enable_fp_fusion": True,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a driver: the tests below run")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_for_cards_and_need_no_fp8_unit(
    capability: int, compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentCard(capability))
    bfloat16 = {"DOT": triton.language.bfloat16, "FACTOR": 1.0}
    monkeypatch.setattr(triton_product, "_formats", lambda x: bfloat16)
    for rows in (1, 300):
        x, codes, scale, bias, grad = make(rows, 512, 1024, torch.bfloat16, "row")
        fused_linear(x, codes, scale, bias)
    fused_grad_input(grad, codes, scale)
    assert set(compiled) == {"row_kernel", "linear_kernel", "grad_input_kernel"}
    for kernel, made in compiled.items():
        ptx = made.asm["ptx"]
        assert made.asm["cubin"]
        assert "e4m3" not in ptx
        # Codes come 16 at a time, in products by copies that run beside the arithmetic.
        assert "ld.global.b8" not in ptx
        if kernel != "row_kernel":
            assert "cp.async.cg.shared.global" in ptx
            assert ("wgmma" if capability == 90 else "mma.sync") in ptx


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3072, 3072), (300, 3072, 1536)], ids=str)
def test_products_agree_with_float64_on_a_card(
    shape: tuple[int, int, int], dtype: torch.dtype, scaling: str
) -> None:
    check(*shape, dtype, scaling, "cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rows", [1, 9, 50, 300])
def test_every_tiling_gives_the_same_bits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run that is resumed after another search for the fastest tiling would go another way."""
    from framework.storage import triton_kernels

    x, codes, scale, bias, grad = (
        None if t is None else t.cuda() for t in make(rows, 768, 1536, torch.bfloat16, "row")
    )
    assert x is not None
    assert codes is not None
    assert grad is not None
    results = []
    classes = triton_product._ROW_TILINGS if rows == 1 else triton_product._tilings(rows)[1]
    for number in range(len(classes)):

        def runner(kernel: str, rows_class: int, number: int = number) -> Callable[..., None]:
            tilings = triton_product._tilings(rows_class)[1]
            tiling = (triton_product._ROW_TILINGS if kernel == "row_kernel" else tilings)[number]

            def run(grid: Any, arguments: dict[str, Any]) -> None:
                getattr(triton_kernels, kernel)[grid](**arguments, **options(kernel, tiling))

            return run

        monkeypatch.setattr(triton_product, "_runner", runner)
        results.append((fused_linear(x, codes, scale, bias), fused_grad_input(grad, codes, scale)))
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])
