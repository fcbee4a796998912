"""What a managed layer keeps and refuses, whatever is called on it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from framework.storage.fp8 import encode_e4m3
from framework.storage.managed import (
    ManagedConv2d,
    ManagedConv3d,
    ManagedEmbedding,
    ManagedLinear,
    convert_layer_,
    is_managed,
)


class PaddingConv(nn.Conv3d):
    """Like the VAE's causal convolution: pads its own input, then calls its parent's forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1, 2, 0)))


KINDS = [
    (lambda: nn.Linear(6, 4), ManagedLinear),
    (lambda: nn.Conv2d(6, 4, 3), ManagedConv2d),
    (lambda: nn.Conv3d(6, 4, 3), ManagedConv3d),
    (lambda: nn.Embedding(6, 4), ManagedEmbedding),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("make", "managed"), KINDS)
def test_conversion_keeps_object_and_type(make, managed) -> None:
    layer = make().requires_grad_(False)
    plain = type(layer)
    weight = layer.weight.detach().clone()
    assert convert_layer_(layer) is layer
    assert type(layer) is managed
    assert isinstance(layer, plain)
    assert is_managed(layer)
    assert "weight" not in dict(layer.named_parameters())
    codes, scale = encode_e4m3(weight)
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.dequant_scale, scale)
    torch.testing.assert_close(layer.weight, weight, rtol=2**-4, atol=1e-3)


def test_a_subclass_keeps_its_own_forward() -> None:
    layer = PaddingConv(3, 5, 3).requires_grad_(False)
    reference = copy.deepcopy(layer)
    convert_layer_(layer)
    assert isinstance(layer, PaddingConv)
    assert isinstance(layer, ManagedConv3d)
    reference.weight.data = layer.weight
    x = torch.randn(1, 3, 2, 5, 5)
    torch.testing.assert_close(layer(x), reference(x))
    other = PaddingConv(3, 5, 3)
    convert_layer_(other)
    assert type(other) is type(layer)


@pytest.mark.parametrize("scaling", ["row", "tensor", "none"])
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to(dtype=torch.float64, device="cpu"),
        lambda m: nn.Sequential(m).bfloat16()[0],
    ],
)
def test_no_dtype_change_reaches_codes_or_scale(move, scaling: str) -> None:
    layer = convert_layer_(nn.Linear(6, 4), scaling=scaling)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    moved = move(layer)
    after = dict(moved.named_buffers())
    assert after.keys() == before.keys()
    for name, buffer in after.items():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert moved.weight.dtype == moved.bias.dtype


def test_to_meta_and_back_keeps_formats() -> None:
    layer = convert_layer_(nn.Linear(6, 4))
    layer.to("meta")
    assert layer.codes.device.type == layer.dequant_scale.device.type == "meta"
    layer.to_empty(device="cpu")
    assert layer.codes.dtype == torch.uint8
    assert layer.dequant_scale.dtype == torch.float32


def test_state_dict_round_trip_holds_tensors_only() -> None:
    layer = convert_layer_(nn.Linear(6, 4))
    other = convert_layer_(nn.Linear(6, 4))
    state = layer.state_dict()
    assert set(state) == {"codes", "dequant_scale", "bias"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), other(x))


def test_deepcopy_is_independent() -> None:
    layer = convert_layer_(PaddingConv(3, 5, 3))
    twin = copy.deepcopy(layer)
    twin.codes.zero_()
    assert int(layer.codes.count_nonzero()) > 0


def test_weight_can_not_be_assigned() -> None:
    layer = convert_layer_(nn.Linear(6, 4))
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.zeros(4, 6))


@pytest.mark.parametrize(("scaling", "rows"), [("row", 4), ("tensor", 1), ("none", None)])
def test_meta_conversion_then_store(scaling: str, rows: int | None) -> None:
    with torch.device("meta"):
        layer = nn.Linear(6, 4)
    convert_layer_(layer, scaling=scaling, weight_dtype=torch.bfloat16)
    assert layer.codes.is_meta
    assert (layer.dequant_scale is None) == (rows is None)
    weight = torch.randn(4, 6)
    layer.store_(*encode_e4m3(weight, scaling))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.codes.device.type == "cpu"


def test_store_refuses_what_does_not_fit() -> None:
    layer = convert_layer_(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="don't fit"):
        layer.store_(torch.zeros(4, 5, dtype=torch.uint8), torch.ones(4))
    with pytest.raises(ValueError, match="don't fit"):
        layer.store_(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(1))
    with pytest.raises(ValueError, match="don't fit"):
        layer.store_(torch.zeros(4, 6, dtype=torch.uint8), None)
    with pytest.raises(ValueError, match="must be uint8"):
        layer.store_(torch.zeros(4, 6), torch.ones(4))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), ValueError, "padding_mode"),
        (nn.Conv2d(2, 2, 3, padding="same"), ValueError, "padding='same'"),
        (nn.Embedding(4, 2, max_norm=1.0), ValueError, "max_norm"),
        (nn.LayerNorm(4), TypeError, "LayerNorm can't be stored"),
        (nn.Conv1d(2, 2, 3), TypeError, "Conv1d can't be stored"),
        (nn.ConvTranspose2d(2, 2, 3), TypeError, "ConvTranspose2d can't be stored"),
    ],
)
def test_unsupported_layers_are_refused(
    layer: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_layer_(layer)
    assert "weight" in dict(layer.named_parameters())


def test_a_layer_is_converted_once() -> None:
    layer = convert_layer_(nn.Linear(6, 4))
    with pytest.raises(TypeError, match="can't be stored"):
        convert_layer_(layer)


@pytest.mark.parametrize("plain", [nn.Conv2d, nn.Conv3d])
def test_calling_the_class_of_a_managed_convolution_makes_a_plain_one(plain) -> None:
    """peft builds an adapter's convolutions with the class of their base."""
    layer = convert_layer_(plain(4, 6, 3))
    adapter = type(layer)(4, 2, 3, bias=False)
    assert type(adapter) is plain
    assert adapter.weight.requires_grad
    assert type(copy.deepcopy(layer)) is type(layer)


def _load_(layer: nn.Module, codes: torch.Tensor) -> None:
    state = layer.state_dict()
    layer.load_state_dict({**state, "codes": codes})


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, codes: layer.store_(codes, layer.dequant_scale),
        lambda layer, codes: layer.codes.copy_(codes),
        _load_,
    ],
    ids=["stored", "written", "loaded"],
)
def test_a_weight_is_prepared_anew_after_a_change(change) -> None:
    """What is known of codes is kept from call to call; of old ones it would give wrong numbers, silently."""
    layer = convert_layer_(nn.Linear(128, 64, bias=False).bfloat16().requires_grad_(False))
    layer.codes[0, 0] = 1
    x = torch.eye(128, dtype=torch.bfloat16)
    layer(x)
    assert layer._prepared is not None
    codes = layer.codes.clone()
    codes[0, 0], codes[5, 7] = 0x38, 3
    change(layer, codes)
    expected = codes.view(torch.float8_e4m3fn).float() * layer.dequant_scale[:, None]
    assert torch.equal(layer(x), expected.T.bfloat16())


def test_a_changed_scale_is_seen() -> None:
    layer = convert_layer_(nn.Linear(128, 64, bias=False).bfloat16().requires_grad_(False))
    x = torch.eye(128, dtype=torch.bfloat16)
    before = layer(x)
    assert layer._prepared is not None
    layer.dequant_scale.mul_(2)
    assert torch.equal(layer(x), 2 * before)
