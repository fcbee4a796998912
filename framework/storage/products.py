"""The arithmetic of managed layers: products with a frozen, stored weight that keep no copy of it for backward.

A product is given the weight's source, not the weight: forward fetches, decodes, multiplies and lets go, and backward
does so again. So FP8 and offload are worth as much in training as at rest.

Where the dequantisation scales are powers of two, as our own are, the CPU decodes the whole weight, which is exact, and
everything is as in a layer that holds it. Any other scale belongs to an output channel, so it multiplies the output, in
float32, and the incoming gradient: one pass over an output instead of one over the weight. In bf16 that costs one more
rounding of the output. Which way is taken depends on nothing but device, scales and number format, so that a weight
gives the same bits wherever it rests.

Letters: I inputs, O outputs, B batch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from framework.storage.fp8 import decode_e4m3, folds
from framework.storage.scratch import scratch_like
from framework.storage.triton_product import (
    can_fuse,
    choose_product,
    fused_grad_input,
    fused_linear,
)
from framework.storage.weights import StoredWeight, WeightSource

# Numbers that are scaled at once on the CPU; as float32 they fit its cache. A guess.
_SCALED_AT_ONCE = 256 * 1024

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""stride, padding, dilation, groups of a convolution."""

# Codes reach 448, so in float16 (largest 65504) a product with bare codes overflows where one with the weight itself
# wouldn't. 2**-8 of the value is exact for every code, and the scale takes the factor back in float32.
_FP16_FACTOR = 2.0**8


class ManagedProduct(torch.autograd.Function):
    """y = x W^T + b with a stored W; it is fetched and decoded anew for the gradient of x.

    x: (..., I) floating.   source: of W (O, I).   bias: (O,) or None.
    Returns (..., O) in x's dtype. Gradients for x and bias only.
    Saves nothing but the source.   Memory: one decoded weight while it runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: WeightSource, bias: Tensor | None) -> Tensor:
        """Fetch, decode, multiply, let go."""
        ctx.source = source
        ctx.bias_dtype = None if bias is None else bias.dtype
        fused = _fused(source, x)
        if fused is not None:
            rows = fused_linear(_as_rows(x), fused.values, fused.dequant_scale, bias)
            return rows.view(*x.shape[:-1], rows.shape[1])
        weight, scale = _prepare(source, x.dtype)
        # Without a scale the bias is added before the sum is rounded, as a plain layer does.
        fused_bias = bias.to(x.dtype) if bias is not None and scale is None else None
        y = functional.linear(x, weight, fused_bias)
        if scale is not None:
            _scale(y, scale, out=y)
            if bias is not None:
                y.add_(bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x = (grad_y * scale) codes."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = _as_rows(grad_y).sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            fused = _fused(ctx.source, grad_y)
            if fused is not None:
                rows = fused_grad_input(_as_rows(grad_y), fused.values, fused.dequant_scale)
                return rows.view(*grad_y.shape[:-1], rows.shape[1]), None, grad_bias
            weight, scale = _prepare(ctx.source, grad_y.dtype)
            if scale is not None:
                scratch = scratch_like(grad_y, grad_y.dtype, purpose="gradient")
                grad_y = _scale(
                    grad_y,
                    scale,
                    out=torch.empty(grad_y.shape, dtype=grad_y.dtype, device=grad_y.device)
                    if scratch is None
                    else scratch,
                )
            grad_x = grad_y.matmul(weight)
        return grad_x, None, grad_bias


class ManagedConvolution(torch.autograd.Function):
    """A 2-D or 3-D convolution with a stored W; it is fetched and decoded anew for the gradient of x.

    x: (B, C, ...) floating.   source: of W (O, C / groups, ...).   bias: (O,) or None.
    Returns (B, O, ...) in x's dtype. Gradients for x and bias only.
    Saves nothing but the source.   Memory: one decoded weight while it runs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: WeightSource, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """Fetch, decode, convolve, let go."""
        stride, padding, dilation, groups = geometry
        weight, scale = _prepare(source, x.dtype)
        no_output_padding = [0] * len(stride)
        fused_bias = bias.to(x.dtype) if bias is not None and scale is None else None
        y: Tensor = torch.ops.aten.convolution(
            x, weight, fused_bias, stride, padding, dilation, False, no_output_padding, groups
        )
        if scale is not None:
            y.mul_(_per_channel(scale, y.ndim))
            if bias is not None:
                y.add_(_per_channel(bias, y.ndim))
        ctx.source = source
        ctx.geometry = geometry
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The transposed convolution of grad_y * scale."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.transpose(0, 1).flatten(1).sum(1).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.geometry
            weight, scale = _prepare(ctx.source, grad_y.dtype)
            if scale is not None:
                grad_y = (grad_y * _per_channel(scale, grad_y.ndim)).to(grad_y.dtype)
            # Only the shape of x matters for its gradient: one element stands for all of it.
            x_shape = grad_y.new_empty(1).expand(ctx.x_shape)
            grad_x = torch.ops.aten.convolution_backward(
                grad_y,
                x_shape,
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [True, False, False],
            )[0]
        return grad_x, None, grad_bias, None


def _fused(source: WeightSource, x: Tensor) -> StoredWeight | None:
    """The stored weight, where the product with x is to be made by the fused kernel.

    x: (..., I), or (..., O) for the gradient.
    """
    if not choose_product(x.device, x.numel() // max(1, x.shape[-1])):
        return None
    stored = source.fetch()
    fits = stored.is_encoded and can_fuse(x, stored.values, stored.dequant_scale)
    return stored if fits else None


def _scale(values: Tensor, scale: Tensor, *, out: Tensor) -> Tensor:
    """Write values (..., O) times a float32 scale, (O,) or (1,), to `out` of their shape and dtype; returns it.

    On the CPU a few rows at a time: torch multiplies numbers of two formats through a float32 copy of all of them,
    whose fresh pages cost as much as the product with the weight (1024 x 4096: 19 ms in one piece, 1.5 in many).
    """
    if values.device.type != "cpu" or isinstance(values, FakeTensor) or not values.numel():
        return torch.mul(values, scale, out=out)
    rows = max(1, _SCALED_AT_ONCE // values.shape[-1])
    for part, target in zip(
        _as_rows(values).split(rows), out.view(-1, out.shape[-1]).split(rows), strict=True
    ):
        torch.mul(part, scale, out=target)
    return out


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _prepare(source: WeightSource, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Bring a stored weight to its computation state: numbers in `dtype`, and what the output is multiplied with.

    They hold until the next call. A scale per output, or one for all, multiplies the output unless it is exact in the
    weight; one per block belongs into the weight.
    """
    stored = source.fetch()
    scale = stored.dequant_scale
    if not stored.is_encoded:
        return stored.decoded(dtype), None
    scratch = scratch_like(stored.values, dtype)
    if stored.prepared is not None and scratch is not None and dtype == torch.bfloat16:
        weight = stored.prepared.decode(stored.values, scratch)
        return weight, None if stored.prepared.is_scaled else scale
    if scale is not None and (scale.ndim == 2 or folds(scale, dtype)):
        return stored.decoded(dtype, out=scratch), None
    weight = decode_e4m3(stored.values, dtype, out=scratch)
    if scale is not None and dtype == torch.float16:
        return weight.mul_(1 / _FP16_FACTOR), scale * _FP16_FACTOR
    if scale is not None and dtype == torch.float64:
        return weight, scale.double()
    return weight, scale


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    """Shape (O,) or (1,) so that it multiplies dimension 1 of an `ndim`-dimensional tensor."""
    return values.reshape(-1, *([1] * (ndim - 2)))
