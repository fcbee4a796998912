"""The Triton kernels behind `triton_product`: FP8 codes are decoded in registers, on their way into the product.

Importing this module needs the package `triton`; nothing else in the project imports it. tests/numerics run it in
Triton's interpreter and compile it for cards that needn't be there. Only the language's own built-ins are used, not
its library (`tl.sum`, `tl.zeros`): the library is compiled or interpreted as it was when triton was imported.

Both kernels read the codes as plain bytes and move their bits, so that they need no FP8 unit (compute capability 8.9);
the sum over products is kept in float32. A sum's order depends on the shapes and on BLOCK_K alone, which is the same in
all configurations that are tried for a shape: which of them is the fastest today doesn't change a result.

Letters: N output rows of the weight, K its input columns, M rows of the other factor.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Kernels are a language of their own in Python's clothes: their arguments are pointers and compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _decode(codes, dtype: tl.constexpr):
    """Numbers of e4m3 codes, times 2**-8 for float16; exact for every finite code.

    codes: uint8 of any shape.   dtype: float16, bfloat16 or float32.
    Sign-extended and shifted, the exponent and mantissa lie where the wider format has them; what is left is the
    difference of the exponent biases, 2**8 in float16 and 2**120 in float32, whose own subnormals hold e4m3's.
    """
    signed = codes.to(tl.int8, bitcast=True)
    if dtype == tl.float16:
        bits = (signed.to(tl.int16) << 7) & -0x4080
        return bits.to(tl.float16, bitcast=True)
    wide = (signed.to(tl.int32) << 20) & -0x78100000
    return (wide.to(tl.float32, bitcast=True) * 2.0**120).to(dtype)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _tile(num_rows, num_columns, rows_block: tl.constexpr, columns_block: tl.constexpr):
    """Which tile of the result a program makes: eight tiles of rows at a time, so that factors stay in the cache."""
    tiles_down = (num_rows + rows_block - 1) // rows_block
    tiles_across = (num_columns + columns_block - 1) // columns_block
    program = tl.program_id(0)
    per_band = 8 * tiles_across
    first = program // per_band * 8
    height = min(tiles_down - first, 8)
    return first + program % per_band % height, program % per_band // height


@triton.jit(do_not_specialize=["rows_class"])
def linear_kernel(
    x,
    codes,
    scale,
    bias,
    y,
    M,
    N,
    K,
    chunk,
    rows_class,
    SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Make y = x codes^T * scale + bias, or with `chunk` < K a bare part of the sum over K in each y[program_id(1)].

    x: (M, K).   codes: (N, K) uint8.   scale: (N,) or (1,) float32, or None.   bias: (N,) or None.
    y: (M, N), or (parts, M, N) float32.
    The weight stands on the left of the product (y^T = W x^T): there a tensor core takes it straight from the
    registers it was decoded into, on Hopper too, and a short x costs a narrow tile.
    DOT: number format that is multiplied.   FACTOR: what `_decode` left out.
    """
    tile_n, tile_m = _tile(N, M, BLOCK_N, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end read the last one instead of a mask, and aren't written.
    w_rows = codes + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    start = tl.program_id(1) * chunk
    stop = min(start + chunk, K)
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    for at in range(start, stop, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_rows + k[None, :])
            other = tl.load(x_rows + k[None, :])
        else:
            w = tl.load(w_rows + k[None, :], mask=k[None, :] < stop, other=0)
            other = tl.load(x_rows + k[None, :], mask=k[None, :] < stop, other=0.0)
        total = tl.dot(_decode(w, DOT), tl.trans(other.to(DOT)), total, input_precision="ieee")
    inside = (n[:, None] < N) & (m[None, :] < M)
    at_y = m.to(tl.int64)[None, :] * N + n[:, None]
    if chunk < K:
        at_y += tl.program_id(1).to(tl.int64) * M * N
    if SCALE == 1:
        total *= tl.load(scale) * FACTOR
    elif SCALE == 2:
        total *= (tl.load(scale + n, mask=n < N, other=0.0) * FACTOR)[:, None]
    else:
        total *= FACTOR
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at_y, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def row_kernel(
    x,
    codes,
    scale,
    bias,
    y,
    N,
    K,
    SCALE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`linear_kernel` for rows of x that come one by one: bound by reading the codes, and no tile to fill.

    x: (M, K), a program takes row program_id(1).   Others as there.
    """
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = codes + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    total = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for at in range(0, K, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_rows + k[None, :])
            other = tl.load(x + row * K + k)
        else:
            w = tl.load(w_rows + k[None, :], mask=k[None, :] < K, other=0)
            other = tl.load(x + row * K + k, mask=k < K, other=0.0)
        total += _decode(w, tl.float32) * other.to(tl.float32)[None, :]
    values = tl.reduce(total, 1, _add)
    if SCALE == 1:
        values *= tl.load(scale)
    elif SCALE == 2:
        values *= tl.load(scale + n, mask=n < N, other=0.0)
    if bias is not None:
        values += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + n, values.to(y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["rows_class"])
def grad_input_kernel(
    grad,
    codes,
    scale,
    grad_x,
    M,
    N,
    K,
    chunk,
    rows_class,
    SCALE: tl.constexpr,
    EVEN_N: tl.constexpr,
    DOT: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Make grad_x = grad (codes * scale), or with `chunk` < N a part of the sum over N in each grad_x[program_id(1)].

    grad: (M, N).   codes: (N, K) uint8.   scale: (N,) or (1,) float32.   grad_x: (M, K), or (parts, M, K) float32.
    Row scales stand along the sum, so they are multiplied into the decoded weight, which is rounded once after it.
    BLOCK_N is the length along the sum here, BLOCK_K a width of the result.
    """
    tile_k, tile_m = _tile(K, M, BLOCK_K, BLOCK_M)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # A mask, not the last column again: the compiler must see that columns lie side by side.
    w_columns = codes + k[None, :]
    columns_inside = k[None, :] < K
    grad_rows = grad + tl.minimum(m, M - 1).to(tl.int64)[:, None] * N
    start = tl.program_id(1) * chunk
    stop = min(start + chunk, N)
    total = tl.full((BLOCK_M, BLOCK_K), 0.0, tl.float32)
    for at in range(start, stop, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        if EVEN_N:
            w = tl.load(w_columns + n.to(tl.int64)[:, None] * K, mask=columns_inside, other=0)
            other = tl.load(grad_rows + n[None, :])
        else:
            rows_inside = n[:, None] < stop
            w = tl.load(
                w_columns + n.to(tl.int64)[:, None] * K, mask=rows_inside & columns_inside, other=0
            )
            other = tl.load(grad_rows + n[None, :], mask=n[None, :] < stop, other=0.0)
        if SCALE == 2:
            row_scale = tl.load(scale + n, mask=n < stop, other=0.0)
            weight = (_decode(w, tl.float32) * row_scale[:, None]).to(DOT)
        else:
            weight = _decode(w, DOT)
        total = tl.dot(other.to(DOT), weight, total, input_precision="ieee")
    inside = (m[:, None] < M) & (k[None, :] < K)
    at_x = m.to(tl.int64)[:, None] * K + k[None, :]
    if chunk < N:
        at_x += tl.program_id(1).to(tl.int64) * M * K
    if SCALE == 1:
        total *= tl.load(scale) * FACTOR
    elif SCALE == 0:
        total *= FACTOR
    tl.store(grad_x + at_x, total.to(grad_x.dtype.element_ty), mask=inside)
