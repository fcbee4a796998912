"""Layers whose frozen weight rests as FP8 codes and is decoded only while it is used.

The usual way, decoding in `forward` and calling `linear`, makes autograd keep the decoded copy of every weight until
the backward pass, so that FP8 costs more memory than bf16 (measured: up to 1.16 of it). Here each product is one
autograd function that decodes in forward, lets go, and decodes again in backward. It saves codes and scale, which exist
anyway, and nothing of its input, because a frozen weight needs no gradient.

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

from framework.storage.fp8 import Scaling, dequantise, encode_e4m3
from framework.storage.products import ManagedConvolution, ManagedProduct

_only_described: ContextVar[bool] = ContextVar("only_described", default=False)


@contextmanager
def described_weights() -> Iterator[None]:
    """Inside, `weight` of a managed layer has shape, dtype and device of the real one, and zeros for values.

    For code that asks many times and looks at no value: attaching a LoRA by peft would decode each layer 20 times.
    """
    token = _only_described.set(True)
    try:
        yield
    finally:
        _only_described.reset(token)


class ManagedWeight(nn.Module):
    """What all managed layers share: two buffers instead of the parameter `weight`.

    codes: (O, ...) uint8.   dequant_scale: (O,) or (1,) float32, or None (no buffer) for a plain cast.
    weight_dtype: number format in which `weight` is given to code that asks for it; follows `module.to(dtype)`,
    while codes and scale keep their formats whatever is called on the module.
    """

    codes: Tensor
    dequant_scale: Tensor | None
    weight_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The decoded weight, as a new tensor each time, for code that must see it (DoRA's norm, `.weight.dtype`).

        Read-only: writing into it changes nothing, and assigning to it is refused.
        Inside `described_weights` it is a stand-in.
        """
        if _only_described.get():
            stand_in = torch.zeros((), dtype=self.weight_dtype, device=self.codes.device)
            return stand_in.expand(self.codes.shape)
        with torch.no_grad():
            return dequantise(self.codes, self.dequant_scale, self.weight_dtype)

    def store_(self, codes: Tensor, dequant_scale: Tensor | None) -> None:
        """Put codes and scale in place; shapes must be those that the layer was made for."""
        expected = None if self.dequant_scale is None else self.dequant_scale.shape
        found = None if dequant_scale is None else dequant_scale.shape
        if codes.shape != self.codes.shape or found != expected:
            raise ValueError(f"codes {tuple(codes.shape)} with scale {found} don't fit into {self}")
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8, not {codes.dtype}")
        self.codes = codes
        self.dequant_scale = dequant_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: self._buffers[name] for name in ("codes", "dequant_scale")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
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
        y: Tensor = ManagedProduct.apply(x, self.codes, self.dequant_scale, self.bias)
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
        batched = x if x.ndim == self.codes.ndim else x.unsqueeze(0)
        y: Tensor = ManagedConvolution.apply(
            batched, self.codes, self.dequant_scale, self.bias, geometry
        )
        return y if x.ndim == self.codes.ndim else y.squeeze(0)


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
        rows = self.codes.index_select(0, flat)
        scale = self.dequant_scale
        if scale is not None and scale.shape[0] != 1:
            scale = scale.index_select(0, flat)
        values = dequantise(rows, scale, self.weight_dtype)
        return values.reshape(*ids.shape, self.embedding_dim)


_MANAGED: tuple[tuple[type[nn.Module], type[ManagedWeight]], ...] = (
    (nn.Linear, ManagedLinear),
    (nn.Conv2d, ManagedConv2d),
    (nn.Conv3d, ManagedConv3d),
    (nn.Embedding, ManagedEmbedding),
)


def convert_layer_(
    module: nn.Module, *, scaling: Scaling = "row", weight_dtype: torch.dtype | None = None
) -> ManagedWeight:
    """Turn a linear, convolution or embedding layer into its managed form, in place.

    module: its `weight` is encoded, or, on the meta device, replaced by meta buffers for `store_` to fill.
    weight_dtype: number format that the layer's weight has for the outside; None means that of `weight` now.
    A subclass
    (a convolution that pads its own input, say) keeps its methods: what it reaches by `super().forward` is managed.
    Returns the same object.   Raises TypeError for other layers, ValueError for settings that a managed layer lacks.
    """
    managed = next((m for plain, m in _MANAGED if isinstance(module, plain)), None)
    if managed is None or isinstance(module, ManagedWeight):
        raise TypeError(f"{type(module).__name__} can't be stored in FP8")
    _refuse_unsupported(module)
    weight: Any = module.weight
    if weight.device.type == "meta":
        codes: Tensor = torch.empty(weight.shape, dtype=torch.uint8, device="meta")
        rows = {"row": weight.shape[0], "tensor": 1, "none": 0}[scaling]
        scale = torch.empty(rows, dtype=torch.float32, device="meta") if rows else None
    else:
        codes, scale = encode_e4m3(weight, scaling)
    del module._parameters["weight"]
    module.__class__ = _managed_class(type(module), managed)  # type: ignore[arg-type]
    module.register_buffer("codes", codes)
    module.register_buffer("dequant_scale", scale)
    module.weight_dtype = weight_dtype or weight.dtype  # type: ignore[assignment]
    return module  # type: ignore[return-value]


def is_managed(module: nn.Module) -> bool:
    """Whether the layer's weight rests as FP8 codes."""
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
        raise ValueError(f"a {type(module).__name__} with {what} can't be stored in FP8")

    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if module.padding_mode != "zeros":
            refuse(f"padding_mode={module.padding_mode!r}")
        if isinstance(module.padding, str):
            refuse(f"padding={module.padding!r}")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        refuse("max_norm")
