"""The arithmetic of managed layers: products with a frozen FP8 weight that keep no decoded copy of it.

The dequantisation scale belongs to an output channel, so it multiplies the output, in float32, and the incoming
gradient: one pass over an output instead of one over the weight. In bf16 that costs one more rounding of the output and
spares one of the weight; relative L2 error of a 512x512 layer .0024, of the rounded weight .0022 (tests/numerics).

Letters: I inputs, O outputs, B batch, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from framework.storage.fp8 import decode_e4m3

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
"""stride, padding, dilation, groups of a convolution."""

# Codes reach 448, so in float16 (largest 65504) a product with bare codes overflows where one with the weight itself
# wouldn't. 2**-8 of the value is exact for every code, and the scale takes the factor back in float32.
_FP16_FACTOR = 2.0**8


class ManagedProduct(torch.autograd.Function):
    """y = x W^T + b with W = codes * dequant_scale; W is decoded anew for the gradient of x.

    x: (..., I) floating.   codes: (O, I) uint8.   dequant_scale: (O,) or (1,) float32 or None.   bias: (O,) or None.
    Returns (..., O) in x's dtype. Gradients for x and bias only.
    Saves codes and dequant_scale, not copies of them.   Memory: one decoded weight while it runs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, dequant_scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Decode, multiply, let go."""
        weight, scale = _fetch(codes, dequant_scale, x.dtype)
        y = functional.linear(x, weight)
        if scale is not None:
            y.mul_(scale)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(codes, dequant_scale)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """grad_x = (grad_y * scale) codes."""
        codes, dequant_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = grad_y.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            weight, scale = _fetch(codes, dequant_scale, grad_y.dtype)
            if scale is not None:
                grad_y = (grad_y * scale).to(grad_y.dtype)
            grad_x = grad_y.matmul(weight)
        return grad_x, None, None, grad_bias


class ManagedConvolution(torch.autograd.Function):
    """A 2-D or 3-D convolution with W = codes * dequant_scale; W is decoded anew for the gradient of x.

    x: (B, C, ...) floating.   codes: (O, C / groups, ...) uint8.   dequant_scale: (O,) or (1,) float32 or None.
    bias: (O,) or None.   Returns (B, O, ...) in x's dtype. Gradients for x and bias only.
    Saves codes and dequant_scale, not copies of them.   Memory: one decoded weight while it runs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        dequant_scale: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        """Decode, convolve, let go."""
        stride, padding, dilation, groups = geometry
        weight, scale = _fetch(codes, dequant_scale, x.dtype)
        no_output_padding = [0] * len(stride)
        y: Tensor = torch.ops.aten.convolution(
            x, weight, None, stride, padding, dilation, False, no_output_padding, groups
        )
        if scale is not None:
            y.mul_(_per_channel(scale, y.ndim))
        if bias is not None:
            y.add_(_per_channel(bias, y.ndim))
        ctx.save_for_backward(codes, dequant_scale)
        ctx.geometry = geometry
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """The transposed convolution of grad_y * scale."""
        codes, dequant_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = grad_y.transpose(0, 1).flatten(1).sum(1).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.geometry
            weight, scale = _fetch(codes, dequant_scale, grad_y.dtype)
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
        return grad_x, None, None, grad_bias, None


def _fetch(
    codes: Tensor, dequant_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Bring a stored weight to its computation placement: decoded codes, and what the output is multiplied with."""
    weight = decode_e4m3(codes, dtype)
    if dequant_scale is not None and dtype == torch.float16:
        return weight.mul_(1 / _FP16_FACTOR), dequant_scale * _FP16_FACTOR
    if dequant_scale is not None and dtype == torch.float64:
        return weight, dequant_scale.double()
    return weight, dequant_scale


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    """Shape (O,) or (1,) so that it multiplies dimension 1 of an `ndim`-dimensional tensor."""
    return values.reshape(-1, *([1] * (ndim - 2)))
