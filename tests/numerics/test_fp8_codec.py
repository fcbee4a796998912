"""The FP8 codec: bit-exact where it is exact, stated bounds against float64 elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from framework.storage.fp8 import (
    E4M3_MAX,
    _look_up,
    decode_e4m3,
    dequantise,
    encode_e4m3,
    folds,
    has_nan_codes,
)
from framework.storage.prepared import Prepared

ALL_CODES = torch.arange(256, dtype=torch.uint8)
FINITE_CODES = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flush(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both processor modes; the default one afterwards."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor can't flush denormals")
    yield request.param
    torch.set_flush_denormal(False)


def value_of(code: int) -> float:
    """What an e4m3 code means by its definition (arXiv:2209.05433, table 1)."""
    sign, exponent, mantissa = (-1) ** (code >> 7), (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def least_power(largest: float) -> float:
    """Smallest power of two by which a magnitude is at most 448, by search."""
    exponent = -117
    while largest / 2.0**exponent > E4M3_MAX:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_bit_equal_to_torchs_cast(dtype: torch.dtype, flush: bool) -> None:
    decoded = decode_e4m3(FINITE_CODES, dtype)
    cast = FINITE_CODES.view(torch.float8_e4m3fn).to(dtype)
    integer = INTEGERS[dtype.itemsize]
    assert torch.equal(decoded.view(integer), cast.view(integer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_for_devices_without_fp8_gives_the_same_bits(dtype: torch.dtype) -> None:
    codes = FINITE_CODES.reshape(2, -1)
    integer = INTEGERS[dtype.itemsize]
    expected = decode_e4m3(codes, dtype)
    assert torch.equal(_look_up(codes, dtype).view(integer), expected.view(integer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_gives_the_defined_values(dtype: torch.dtype, flush: bool) -> None:
    defined = torch.tensor([value_of(int(code)) for code in FINITE_CODES], dtype=torch.float64)
    assert decode_e4m3(FINITE_CODES, dtype).double().tolist() == defined.tolist()


def test_the_two_nan_codes_are_never_written_and_are_recognised() -> None:
    weight = torch.cat([torch.randn(64, 64), torch.full((1, 64), 3e38), torch.zeros(1, 64)])
    for scaling in ("row", "tensor"):
        codes, _ = encode_e4m3(weight, scaling)
        assert not has_nan_codes(codes)
    assert not has_nan_codes(FINITE_CODES)
    assert has_nan_codes(torch.tensor([0x7F], dtype=torch.uint8))
    assert has_nan_codes(torch.tensor([0xFF], dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_encode_of_decoded_codes_gives_the_codes_back(dtype: torch.dtype) -> None:
    codes, scale = encode_e4m3(decode_e4m3(FINITE_CODES, dtype).reshape(2, -1), "none")
    assert scale is None
    assert torch.equal(codes.flatten(), FINITE_CODES)


@pytest.mark.parametrize("scaling", ["row", "tensor", "block"])
@pytest.mark.parametrize("std", [1e-4, 0.02, 30.0])
def test_error_bound_of_each_weight(scaling: str, std: float) -> None:
    torch.manual_seed(0)
    weight = (std * torch.randn(96, 160)).double()
    weight[3] *= 1000
    codes, scale = encode_e4m3(weight, scaling)
    assert scale is not None
    code_of_one = torch.full_like(codes, 0x38)
    step = dequantise(code_of_one, scale, torch.float64)
    error = (decode_e4m3(codes, torch.float64) * step - weight).abs()
    # 2**-4: half a step of 3 mantissa bits; 2**-10: half a step of subnormal codes; the rest is float32 rounding.
    bound = torch.maximum(weight.abs() * 2.0**-4, step * 2.0**-10) * (1 + 1e-5)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("std", [0.02, 0.013, 1e-3, 1.4e-3])
def test_relative_error_of_a_normal_weight_matrix(std: float) -> None:
    """At most .027 for both scales, .033 for a plain cast of weights that aren't small."""
    torch.manual_seed(0)
    weight = std * torch.randn(512, 512, dtype=torch.float64)
    errors = {}
    for scaling in ("row", "tensor", "none"):
        codes, scale = encode_e4m3(weight, scaling)
        errors[scaling] = float(
            (dequantise(codes, scale, torch.float64) - weight).norm() / weight.norm()
        )
    assert 0.025 < errors["row"] < 0.027
    assert 0.025 < errors["tensor"] < 0.027
    assert errors["none"] > (0.03 if std > 0.01 else 0.4)


def test_plain_cast_loses_small_weights_and_row_scales_do_not() -> None:
    torch.manual_seed(0)
    weight = 1e-4 * torch.randn(64, 256)
    plain, _ = encode_e4m3(weight, "none")
    assert int(plain.bitwise_and(0x7F).count_nonzero()) == 0
    codes, scale = encode_e4m3(weight, "row")
    assert float((dequantise(codes, scale, torch.float32) - weight).norm() / weight.norm()) < 0.028


@pytest.mark.parametrize("shape", [(6, 10), (6, 4, 3, 3), (6, 4, 2, 3, 3), (6,)])
def test_scale_shapes_and_direction(shape: tuple[int, ...]) -> None:
    """The scale belongs to dimension 0 and multiplies codes; it is never its inverse."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, 6).reshape(-1, *[1] * (len(shape) - 1))
    codes, row = encode_e4m3(weight, "row")
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8
    assert row is not None
    assert row.shape == (6,)
    assert row.dtype == torch.float32
    largest = weight.reshape(6, -1).abs().amax(1)
    assert row.tolist() == [least_power(float(x)) for x in largest]
    _, one = encode_e4m3(weight, "tensor")
    assert one is not None
    assert one.tolist() == [least_power(float(largest.max()))]


@pytest.mark.parametrize("scaling", ["row", "tensor", "none"])
def test_rows_of_zeros_are_exact(scaling: str) -> None:
    weight = torch.zeros(3, 8)
    weight[1] = torch.arange(8.0)
    codes, scale = encode_e4m3(weight, scaling)
    decoded = dequantise(codes, scale, torch.float32)
    assert torch.equal(decoded[0], weight[0])
    if scaling == "row":
        assert scale is not None
        assert scale.tolist()[::2] == [1.0, 1.0]


def test_extreme_weights_stay_finite() -> None:
    weight = torch.stack(
        [torch.full((8,), 1e-44), torch.full((8,), 3.4e38), torch.full((8,), 1.2e-38)]
    )
    codes, scale = encode_e4m3(weight, "row")
    assert scale is not None
    assert bool(torch.isfinite(scale).all() and (scale > 0).all())
    decoded = decode_e4m3(codes, torch.float64) * scale.double()[:, None]
    assert bool(torch.isfinite(decoded).all())
    torch.testing.assert_close(decoded[1], weight[1].double(), rtol=2**-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scaling", ["row", "tensor", "none", "block"])
def test_weights_that_are_not_finite_are_refused(bad: float, scaling: str) -> None:
    weight = torch.zeros(4, 4)
    weight[2, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        encode_e4m3(weight, scaling)


def test_plain_cast_refuses_what_it_can_not_hold() -> None:
    with pytest.raises(ValueError, match="above 448"):
        encode_e4m3(torch.tensor([[449.0, 1.0]]), "none")


def test_only_float_tensors_with_rows_are_encoded() -> None:
    with pytest.raises(ValueError, match="can't store"):
        encode_e4m3(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="can't store"):
        encode_e4m3(torch.tensor(1.0))


SCALES = {
    "none": None,
    "one": torch.tensor([2.0**-9]),
    "rows": 2.0 ** torch.arange(-120.0, 8.0).clamp(min=-117),
    "blocks": 2.0 ** torch.arange(-20.0, -4.0).reshape(4, 4),
    "one of another program": torch.tensor([0.013]),
    "rows of another program": torch.linspace(0.001, 0.1, 128),
    "rows, one out of range": torch.cat([torch.full((127,), 2.0**-9), torch.tensor([2.0**8])]),
}


def mixed_codes() -> torch.Tensor:
    """(128, 2048): all finite codes, each often in different rows, among so many others that few have no exponent."""
    codes = torch.full((128, 2048), 0x38, dtype=torch.uint8)
    codes.view(-1)[torch.arange(len(FINITE_CODES)) * 1031] = FINITE_CODES
    return codes


@pytest.mark.parametrize("name", SCALES)
def test_decoding_what_is_prepared_gives_the_same_bits(name: str, flush: bool) -> None:
    """Against torch's cast and a product in float64; without the scale where it isn't exact in bf16."""
    codes, scale = mixed_codes(), SCALES[name]
    block = (32, 512) if name == "blocks" else None
    found = Prepared.find(codes, scale, block)
    assert found is not None
    assert sorted(codes.view(-1)[found.places].tolist()) == sorted(
        code for code in codes.view(-1).tolist() if code & 0x78 == 0
    )
    assert found.is_scaled == (name in ("none", "one", "rows", "blocks"))
    exact = codes.view(torch.float8_e4m3fn).double()
    if scale is not None and found.is_scaled:
        assert folds(scale, torch.bfloat16)
        wide = scale.double()
        wide = wide.repeat_interleave(32, 0).repeat_interleave(512, 1) if block else wide[:, None]
        exact = exact * wide
        for dtype in (torch.bfloat16, torch.float32):
            decoded = dequantise(codes, scale, dtype, block)
            assert torch.equal(
                decoded.view(INTEGERS[dtype.itemsize]),
                exact.to(dtype).view(INTEGERS[dtype.itemsize]),
            )
    out = torch.full(codes.shape, 7.0, dtype=torch.bfloat16)
    assert found.decode(codes, out) is out
    assert torch.equal(out.view(torch.int16), exact.bfloat16().view(torch.int16))


def test_what_the_other_ways_decode_better_is_not_prepared() -> None:
    """Many codes without an exponent would take more memory than the codes; blocks need scales that can be added."""
    assert Prepared.find(torch.zeros(64, 64, dtype=torch.uint8), None) is None
    codes = torch.full((64, 64), 0x38, dtype=torch.uint8)
    assert Prepared.find(codes, torch.full((2, 2), 0.3), (32, 32)) is None
    assert Prepared.find(codes, torch.ones(2, 2), (40, 40)) is None
    assert Prepared.find(codes[:, :32], None) is None


def test_own_scales_fold_and_others_do_not() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 16) * torch.logspace(-30, 4, 8)[:, None]
    for scaling in ("row", "tensor", "block"):
        _, scale = encode_e4m3(weight, scaling, (4, 8) if scaling == "block" else None)
        assert scale is not None
        assert folds(scale, torch.bfloat16)
        assert folds(scale, torch.float32)
        assert not folds(scale, torch.float16)
        assert not folds(scale * 1.5, torch.bfloat16)
    for value in (0.0, -1.0, 2.0**8, 2.0**-118, float("inf"), float("nan")):
        assert not folds(torch.tensor([1.0, value]), torch.bfloat16)


@pytest.mark.parametrize("scaling", ["row", "tensor", "none", "block"])
def test_working_in_chunks_changes_nothing(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(37, 11) * torch.logspace(-2, 2, 37)[:, None]).to(torch.bfloat16)
    block = (4, 3) if scaling == "block" else None
    whole, whole_scale = encode_e4m3(weight, scaling, block)
    decoded = decode_e4m3(whole, torch.bfloat16)
    weight_again = dequantise(whole, whole_scale, torch.float32, block)
    monkeypatch.setattr("framework.storage.grid._CHUNK_ELEMENTS", 25)
    parts, parts_scale = encode_e4m3(weight, scaling, block)
    assert torch.equal(whole, parts)
    if whole_scale is None:
        assert parts_scale is None
    else:
        assert parts_scale is not None
        assert torch.equal(whole_scale, parts_scale)
    assert torch.equal(decode_e4m3(whole, torch.bfloat16), decoded)
    assert torch.equal(dequantise(whole, whole_scale, torch.float32, block), weight_again)
    with_nan = whole.clone()
    with_nan[-1, -1] = 0x7F
    assert has_nan_codes(with_nan)
    assert not has_nan_codes(whole)


@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (5, 2, 3, 3), (1, 1), (9,)])
@pytest.mark.parametrize("block", [(2, 4), (1, 3), (128, 128), (3, 1)])
def test_each_block_has_the_scale_of_its_largest_weight(
    shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    """Against a loop over the blocks: shape and direction of the scale, codes, and the way back."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    codes, scale = encode_e4m3(weight, "block", block)
    matrix = weight.reshape(shape[0], -1)
    expected = torch.empty_like(matrix)
    assert codes.shape == weight.shape
    assert scale is not None
    assert scale.shape == (-(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1]))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            one = least_power(float(matrix[part].abs().amax()))
            assert scale[row, column] == one
            fp8 = (matrix[part] / one).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            expected[part] = fp8.float() * one
    assert torch.equal(dequantise(codes, scale, torch.float32, block), expected.view(shape))


def test_small_blocks_hold_outlying_columns_better_than_rows() -> None:
    """The reason for blocks: one large column no longer sets the scale of its whole row."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(256, 1024)
    weight[:, ::128] *= 30_000
    small = torch.ones(1024, dtype=torch.bool)
    small[::128] = False
    errors = {}
    for name, block in (("row", None), ("block", (1, 16))):
        codes, scale = encode_e4m3(weight, "row" if block is None else "block", block)
        off = (dequantise(codes, scale, torch.float32, block) - weight)[:, small]
        errors[name] = float(off.norm() / weight[:, small].norm())
    assert errors["block"] < 0.9 * errors["row"]


def test_a_block_or_scale_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no weight"):
        encode_e4m3(torch.ones(4, 4), "block", (0, 4))
    codes, scale = encode_e4m3(torch.ones(4, 4), "block", (2, 2))
    with pytest.raises(ValueError, match="doesn't belong"):
        dequantise(codes, scale, torch.float32, (4, 4))
    with pytest.raises(ValueError, match="doesn't belong"):
        dequantise(codes, torch.ones(3), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_into_a_given_tensor_allocates_no_second_one(
    dtype: torch.dtype, flush: bool
) -> None:
    codes = FINITE_CODES.repeat(3, 2)
    expected = decode_e4m3(codes, dtype)
    out = torch.full(codes.shape, 7.0, dtype=dtype)
    assert decode_e4m3(codes, dtype, out=out) is out
    assert torch.equal(out, expected)
    scale = torch.rand(3) + 0.5
    weight = dequantise(codes, scale, dtype)
    assert dequantise(codes, scale, dtype, out=out) is out
    assert torch.equal(out, weight)
    with pytest.raises(ValueError, match="don't fit"):
        decode_e4m3(codes, dtype, out=out[:2])
    with pytest.raises(ValueError, match="don't fit"):
        decode_e4m3(codes, torch.bfloat16 if dtype != torch.bfloat16 else torch.float32, out=out)


def test_decoding_keeps_the_strides_of_codes() -> None:
    torch.manual_seed(0)
    codes, _ = encode_e4m3(torch.randn(4, 3, 5, 5))
    last = codes.to(memory_format=torch.channels_last)
    decoded = decode_e4m3(last, torch.bfloat16)
    assert decoded.stride() == last.stride()
    assert torch.equal(decoded, decode_e4m3(codes, torch.bfloat16))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_tensors_pass_with_few_operations(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is traced on tensors that have sizes only: one chunk stands for all, and no value is asked for."""
    monkeypatch.setattr("framework.storage.grid._CHUNK_ELEMENTS", 64)
    with FakeTensorMode():
        codes = torch.empty(512, 64, dtype=torch.uint8, device=device)
        for scale, block in (
            (None, None),
            (torch.empty(512, device=device), None),
            (torch.empty(1, device=device), None),
            (torch.empty(4, 1, device=device), None),
            (torch.empty(512, 2, device=device), (1, 32)),
        ):
            result = dequantise(codes, scale, dtype, block)
            assert (result.shape, result.dtype, result.device.type) == (
                codes.shape,
                dtype,
                device,
            )
            assert dequantise(codes, scale, dtype, block, out=result) is result


def test_decoding_in_inference_mode() -> None:
    with torch.inference_mode():
        out = torch.empty(254, dtype=torch.bfloat16)
        decode_e4m3(FINITE_CODES, torch.bfloat16, out=out)
    assert torch.equal(out.clone(), decode_e4m3(FINITE_CODES, torch.bfloat16))


def test_empty_weights() -> None:
    for shape in ((0, 4), (4, 0)):
        codes, scale = encode_e4m3(torch.empty(shape), "row")
        assert codes.shape == shape
        assert scale is not None
        assert scale.shape == (shape[0],)
