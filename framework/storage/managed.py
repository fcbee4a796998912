"""Layers whose frozen weight rests in FP8, in host memory or on disk, and is on the device as numbers only while used.

The usual way, decoding in `forward` and calling `linear`, makes autograd keep the decoded copy of every weight until
the backward pass, so that FP8 costs more memory than bf16 (measured: up to 1.16 of it). Here each product is one
autograd function that fetches and decodes in forward, lets go, and does so again in backward. It saves a handle to the
stored weight, and nothing of its input, because a frozen weight needs no gradient.

Layers are made in place by `convert_layer_`, so that a published model class keeps its structure, names and types.

Letters: N rows of the input (all leading dimensions), I inputs, O outputs, B batch, C channels, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from framework.plan.types import BLOCK_SHAPE, Scaling, scale_shape
from framework.storage.fp8 import encode_e4m3
from framework.storage.prepared import Prepared
from framework.storage.products import ManagedConvolution, ManagedProduct
from framework.storage.weights import OffloadedSource, StoredWeight, WeightSource

_StandIns = dict[tuple[torch.Size, torch.dtype, torch.device], Tensor]

_described: ContextVar[_StandIns | None] = ContextVar("described", default=None)


@contextmanager
def described_weights() -> Iterator[None]:
    """Inside, `weight` of a managed layer has shape, dtype and device of the real one, and zeros for values.

    For code that asks many times and looks at no value: attaching a LoRA by peft would decode each layer 20 times.
    """
    token = _described.set({})
    try:
        yield
    finally:
        _described.reset(token)


class ManagedWeight(nn.Module):
    """What all managed layers share instead of the parameter `weight`.

    A weight that rests on the device is two buffers: codes, (O, ...) uint8, and dequant_scale, float32, (O,), (1,) or
    (row blocks, column blocks), or None for a plain cast. One that rests elsewhere is a source alone, which no
    `module.to`, state dict or collective sees.
    weight_shape: of the weight.   weight_dtype: number format in which `weight` is given to code that asks for it;
    follows `module.to(dtype)`, while codes and scale keep their formats whatever is called on the module.
    """

    codes: Tensor | None
    dequant_scale: Tensor | None
    block_shape: tuple[int, int] | None
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    offloaded: OffloadedSource | None
    _prepared: Prepared | None
    _prepared_for: tuple[tuple[int, int], ...] | None

    @property
    def source(self) -> WeightSource:
        """Where products have the weight from."""
        if self.offloaded is not None:
            return self.offloaded
        assert self.codes is not None
        codes, scale = self.codes, self.dequant_scale
        return StoredWeight(codes, scale, self.block_shape, self._prepare(codes, scale))

    def _prepare(self, codes: Tensor, scale: Tensor | None) -> Prepared | None:
        """What is known of a weight on the CPU; found out when it is first used, and after each change."""
        stored = (codes,) if scale is None else (codes, scale)
        if any(
            t.device.type != "cpu" or isinstance(t, FakeTensor) or t.is_inference() for t in stored
        ):
            return None
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in stored)
        if self._prepared_for != state:
            # Tensors made under inference mode would be of no use in training afterwards.
            with torch.inference_mode(mode=False):
                self._prepared = Prepared.find(codes, scale, self.block_shape)
            self._prepared_for = state
        return self._prepared

    @property
    def weight(self) -> Tensor:
        """The decoded weight, as a new tensor each time, for code that must see it (DoRA's norm, `.weight.dtype`).

        Read-only: writing into it changes nothing, and assigning to it is refused.
        Inside `described_weights` it is a stand-in.
        """
        stand_ins = _described.get()
        if stand_ins is not None:
            resting = self.codes if self.offloaded is None else self.offloaded
            assert resting is not None
            key = (self.weight_shape, self.weight_dtype, resting.device)
            if key not in stand_ins:
                zero = torch.zeros((), dtype=self.weight_dtype, device=resting.device)
                stand_ins[key] = zero.expand(self.weight_shape)
            return stand_ins[key]
        with torch.no_grad():
            weight = self.source.fetch().decoded(self.weight_dtype)
            return weight if self.offloaded is None else weight.clone()

    def store_(self, codes: Tensor, dequant_scale: Tensor | None) -> None:
        """Put codes and scale in place; shapes must be those that the layer was made for."""
        expected = None if self.dequant_scale is None else self.dequant_scale.shape
        found = None if dequant_scale is None else dequant_scale.shape
        if self.offloaded is not None or codes.shape != self.weight_shape or found != expected:
            raise ValueError(f"codes {tuple(codes.shape)} with scale {found} don't fit into {self}")
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, not {codes.dtype}")
        self.codes = codes
        self.dequant_scale = dequant_scale
        self._prepared_for = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: self._buffers.get(name) for name in ("codes", "dequant_scale")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self._prepared_for = None
        # What the call does to a floating-point weight of this layer is seen on an empty one.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """Autocast's dtype where autocast is on, as for any other layer; else that of the input."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype


class ManagedLinear(ManagedWeight, nn.Linear):  # type: ignore[override]
    """`nn.Linear` with an FP8 weight; made by `convert_layer_`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) -> (..., O) in autocast's dtype, or x's."""
        x = x.to(self._compute_dtype(x))
        y: Tensor = ManagedProduct.apply(x, self.source, self.bias)
        return y


class _ManagedConv(ManagedWeight):
    _plain: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the plain layer: peft takes the base's class for an adapter's own, small and trained, convolutions."""
        # Without arguments it is `copy.deepcopy` that asks for an empty object.
        return cls._plain(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, ...) -> (B, O, ...) in autocast's dtype, or x's."""
        x = x.to(self._compute_dtype(x))
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        batched = x if x.ndim == len(self.weight_shape) else x.unsqueeze(0)
        y: Tensor = ManagedConvolution.apply(batched, self.source, self.bias, geometry)
        return y if x.ndim == len(self.weight_shape) else y.squeeze(0)


class ManagedConv2d(_ManagedConv, nn.Conv2d):  # type: ignore[override]
    """`nn.Conv2d` with an FP8 weight; made by `convert_layer_`."""

    _plain = nn.Conv2d


class ManagedConv3d(_ManagedConv, nn.Conv3d):  # type: ignore[override]
    """`nn.Conv3d` with an FP8 weight; made by `convert_layer_`."""

    _plain = nn.Conv3d


class ManagedEmbedding(ManagedWeight, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` with an FP8 table (V, D), of which only the rows that are looked up are decoded."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers of any shape (...) -> (..., D) in `weight_dtype`."""
        flat = ids.reshape(-1)
        stored = self.source.fetch()
        values = stored.values.index_select(0, flat)
        scale = stored.dequant_scale
        if scale is not None and scale.ndim == 2:
            assert stored.block_shape is not None
            height, width = stored.block_shape
            scale = scale.index_select(0, flat // height)
            rows = StoredWeight(values, scale, (1, width))
        else:
            if scale is not None and scale.shape[0] != 1:
                scale = scale.index_select(0, flat)
            rows = StoredWeight(values, scale)
        return rows.decoded(self.weight_dtype).reshape(*ids.shape, self.embedding_dim)


_MANAGED: tuple[tuple[type[nn.Module], type[ManagedWeight]], ...] = (
    (nn.Linear, ManagedLinear),
    (nn.Conv2d, ManagedConv2d),
    (nn.Conv3d, ManagedConv3d),
    (nn.Embedding, ManagedEmbedding),
)


def convert_layer_(
    module: nn.Module,
    *,
    scaling: Scaling = "row",
    block_shape: tuple[int, int] | None = None,
    weight_dtype: torch.dtype | None = None,
) -> ManagedWeight:
    """Turn a linear, convolution or embedding layer into its managed form with an FP8 weight on the device, in place.

    module: its `weight` is encoded, or, on the meta device, replaced by meta buffers for `store_` to fill.
    weight_dtype: number format that the layer's weight has for the outside; None means that of `weight` now.
    A subclass (a convolution that pads its own input, say) keeps its methods: what it reaches by `super().forward` is
    managed.   Returns the same object.
    Raises TypeError for other layers, ValueError for settings that a managed layer lacks.
    """
    managed = _managed_form(module)
    weight: Any = module.weight
    if scaling == "block":
        block_shape = block_shape or BLOCK_SHAPE
    if weight.device.type == "meta":
        codes: Tensor = torch.empty(weight.shape, dtype=torch.uint8, device="meta")
        shape = scale_shape(tuple(weight.shape), scaling, block_shape)
        scale = None if shape is None else torch.empty(shape, dtype=torch.float32, device="meta")
    else:
        codes, scale = encode_e4m3(weight, scaling, block_shape)
    layer = _become_(module, managed, weight_dtype)
    layer.register_buffer("codes", codes)
    layer.register_buffer("dequant_scale", scale)
    layer.block_shape = block_shape if scaling == "block" else None
    return layer


def offload_layer_(
    module: nn.Module, source: OffloadedSource, *, weight_dtype: torch.dtype | None = None
) -> ManagedWeight:
    """Turn a layer into its managed form with a weight that rests elsewhere, in place; its own weight is dropped.

    source: gives the weight.   weight_dtype, what is returned and raised: as for `convert_layer_`.
    """
    layer = _become_(module, _managed_form(module), weight_dtype)
    layer.codes = layer.dequant_scale = layer.block_shape = None
    layer.offloaded = source
    return layer


def _managed_form(module: nn.Module) -> type[ManagedWeight]:
    managed = next((m for plain, m in _MANAGED if isinstance(module, plain)), None)
    if managed is None or isinstance(module, ManagedWeight):
        raise TypeError(f"{type(module).__name__} can't be stored in FP8 or offloaded")
    _refuse_unsupported(module)
    return managed


def _become_(
    module: nn.Module, managed: type[ManagedWeight], weight_dtype: torch.dtype | None
) -> ManagedWeight:
    weight: Any = module.weight
    del module._parameters["weight"]
    module.__class__ = _managed_class(type(module), managed)  # type: ignore[arg-type]
    assert isinstance(module, ManagedWeight)
    module.weight_shape = weight.shape
    module.weight_dtype = weight_dtype or weight.dtype
    module.offloaded = None
    module._prepared = module._prepared_for = None
    return module


def is_managed(module: nn.Module) -> bool:
    """Whether the layer's weight rests in FP8 or elsewhere than on the device."""
    return isinstance(module, ManagedWeight)


@cache
def _managed_class(plain: type[nn.Module], managed: type[ManagedWeight]) -> type[nn.Module]:
    """The managed class itself for torch's own layers, else a class that lets a subclass's methods come first."""
    if plain in managed.__mro__:
        return managed
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"A managed {plain.__name__}."}
    return type(f"Managed{plain.__name__}", (plain, managed), members)


def _refuse_unsupported(module: nn.Module) -> None:
    def refuse(what: str) -> NoReturn:
        raise ValueError(
            f"a {type(module).__name__} with {what} can't be stored in FP8 or offloaded"
        )

    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if module.padding_mode != "zeros":
            refuse(f"padding_mode={module.padding_mode!r}")
        if isinstance(module.padding, str):
            refuse(f"padding={module.padding!r}")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        refuse("max_norm")
