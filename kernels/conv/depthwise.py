"""Engine 4: depthwise convolution, where each channel has filters of its own.

There is nothing to multiply matrices with: the aim is to move each pixel once. A row of a tile is a
*patch*, a few neighboring outputs along p and q. A pixel is loaded once for a patch,
by 16 bytes of channels where they lie side by side, and goes from registers to each output that
meets it. Along an axis all convolutions are alike: the i-th output of a patch meets its j-th pixel
at tap ``every * j - apart * i``. Under dilation neighbours are as far apart as it takes for this;
in dgrad, whose taps are flipped, ``every`` is the stride. Sizes and strides are in elements.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import cost_model, device, replay
from ..device import loop
from ..geometry import Conv2dGeometry, Direction, Pair, Taps
from ..lang.epilogue import Epilogue, finish, results
from ..lang.integers import (
    Strides,
    cdiv,
    decode_ints,
    decode_strides,
    encode_ints,
    operands,
    pixel,
    power_of_2,
    program,
    within,
)
from ..lang.numerics import downcast, upcast
from ..lang.split_sum import gradients
from ..problem import Problem
from ..tile import INTERPRETER_ELEMENTS, Tile
from .engine import Dgrad, Engine, Fprop, Wgrad


class _AxisMap(NamedTuple):
    """Place p meets tap r in row (p * stride + origin) / every + r * step of x, and is row
    p * y_step + y_first of y. A patch's outputs are ``spacing`` apart; the first patch starts
    ``shift`` outputs before the first.
    """

    spacing: int
    shift: int
    stride: int
    origin: int
    step: int
    y_step: int
    y_first: int


class _Line(NamedTuple):
    """What of a patch lies along one axis: its outputs, and the taps of a turn or of a program."""

    outputs: int
    taps: int
    apart: int
    every: int


class _Lines(NamedTuple):
    rows: _Line
    columns: _Line


class _Block(NamedTuple):
    """What of a tile a kernel is compiled for."""

    rows: int
    columns: int
    unit: int  # channels that lie side by side in 16 bytes
    fold: int  # filters of a channel that dgrad sums


@triton.constexpr_function
def pixels_of(line):
    """How many pixels in a line the outputs of a patch reach."""
    outputs, taps, apart, every = line
    return (apart * (outputs - 1) + taps - 1) // every + 1


@triton.constexpr_function
def tap_at(lines, output, h, w):
    """The tap at which a patch's output meets the patch's pixel (h, w); -1 for none."""
    rows, columns = lines
    _, R, row_apart, row_every = rows
    outputs, S, column_apart, column_every = columns
    r = row_every * h - row_apart * (output // outputs)
    s = column_every * w - column_apart * (output % outputs)
    return r * S + s if 0 <= r < R and 0 <= s < S else -1


@triton.constexpr_function
def is_met(lines, outputs, h, w):
    """Whether any of a patch's outputs meets the patch's pixel (h, w)."""
    return any(tap_at(lines, i, h, w) >= 0 for i in range(outputs))


@triton.jit
def aligned_strides(strides, UNIT: tl.constexpr):
    """The Strides that were encoded; the compiler sees those that are multiples of UNIT."""
    n, c, h, w = decode_strides(strides)
    return Strides(n // UNIT * UNIT, c, h // UNIT * UNIT, w // UNIT * UNIT)


@triton.jit
def load_taps(w_ptr, first, steps, filters, mask, LINES: tl.constexpr, ACC: tl.constexpr):
    """The taps [1, COLUMNS] of one turn, those of a row side by side."""
    R: tl.constexpr = LINES.rows.taps
    S: tl.constexpr = LINES.columns.taps
    r_step, s_step, tap_size = steps
    taps = ()
    for i in tl.static_range(R * S):
        tap = first + (i // S * r_step + i % S * s_step)
        taps += (upcast(tl.load(w_ptr + (tap * tap_size + filters), mask=mask, other=0.0), ACC),)
    return taps


@triton.jit
def add_products(
    sums,
    taps,
    x_ptr,  # [1, COLUMNS]
    x_strides,
    corner,  # h, w of the patch's first pixel, [ROWS, 1]
    steps,  # between its pixels, along h and w
    sizes,  # H, W
    mask,
    LINES: tl.constexpr,
):
    """sums[output] + x[pixel] * taps[tap] over all that meet; each pixel is loaded once."""
    ACC: tl.constexpr = sums[0].dtype
    OUTPUTS: tl.constexpr = LINES.rows.outputs * LINES.columns.outputs
    h0, w0 = corner
    h_step, w_step = steps
    H, W = sizes
    for i in tl.static_range(pixels_of(LINES.rows)):
        h = h0 + i * h_step
        row_mask = mask & within(h, H)
        for j in tl.static_range(pixels_of(LINES.columns)):
            if is_met(LINES, OUTPUTS, i, j):
                w = w0 + j * w_step
                offsets = h * x_strides.h + w * x_strides.w
                x = tl.load(x_ptr + offsets, mask=row_mask & within(w, W), other=0.0)
                x = upcast(x, ACC)
                for output in tl.static_range(OUTPUTS):
                    if tap_at(LINES, output, i, j) >= 0:
                        added = sums[output] + x * taps[tap_at(LINES, output, i, j)]
                        sums = sums[:output] + (added,) + sums[output + 1 :]
    return sums


@triton.jit
def depthwise_kernel(
    x_ptr,  # [N, channels, H, W]
    w_ptr,  # [taps, filters]
    result,  # a Result; y[N, K, P, Q]
    x_strides,  # n, c, h, w, encoded
    sizes,  # N, H, W, P, Q, strips of a column, of a row, patches of a strip; encoded
    reduction,  # K, REPEAT, R, S; the first tap, and the steps between rows and columns
    down,  # the _AxisMap of p
    across,  # of q
    ACTIVATION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a _Block
    LINES: tl.constexpr,  # the _Lines of a turn
):
    """y[n,k,p,q] = act(sum over m,r,s of x[n,c,h,w] * w[r,s,f] + bias[k] + residual[n,k,p,q]).

    m runs to FOLD, c = k // REPEAT * FOLD + m and f = k * FOLD + m: fprop repeats each channel of
    x for several filters, dgrad folds the filters of a channel together. ``down`` says where p and
    r meet in x, ``across`` where q and s do; x is zero outside. One program writes ``rows`` strips
    of patches, one below the other, by a tile of channels, accumulated in float32 (float64 for
    float64).
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    UNIT: tl.constexpr = TILE.unit
    FOLD: tl.constexpr = TILE.fold
    ROW_OUTPUTS: tl.constexpr = LINES.rows.outputs
    COLUMN_OUTPUTS: tl.constexpr = LINES.columns.outputs
    bias_ptr, residual_ptr, residual_strides, y_ptr, y_strides = result
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q, column_strips, row_strips, patches_per_strip = decode_ints(sizes)
    K, REPEAT, R, S, first, r_step, s_step = reduction
    K = K // UNIT * UNIT
    spacing_p, shift_p, stride_h, origin_h, step_h, step_p, first_p = down
    spacing_q, shift_q, stride_w, origin_w, step_w, step_q, first_q = across
    x_strides = aligned_strides(x_strides, UNIT)
    if residual_ptr is not None:
        residual_strides = aligned_strides(residual_strides, UNIT)
    y_strides = aligned_strides(y_strides, UNIT)

    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    k_mask = k < K
    strip = pid // column_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    n, strip, q0 = pixel(strip, column_strips, row_strips)
    mask = (n < N) & k_mask
    q0 = q0 // spacing_q * (spacing_q * COLUMN_OUTPUTS) + q0 % spacing_q - shift_q
    w0 = (q0 * stride_w + origin_w) // LINES.columns.every
    x_ptr += n * x_strides.n
    pixel_steps = step_h, step_w
    rows = R // LINES.rows.taps
    columns = S // LINES.columns.taps
    tap_steps = r_step, s_step, K * FOLD

    start = tl.zeros((ROWS, COLUMNS), ACC)
    if bias_ptr is not None:
        start += upcast(tl.load(bias_ptr + k, mask=k_mask, other=0.0), ACC)
    for turn in loop(patches_per_strip):
        p0 = strip * patches_per_strip + turn
        p0 = p0 // spacing_p * (spacing_p * ROW_OUTPUTS) + p0 % spacing_p - shift_p
        h0 = (p0 * stride_h + origin_h) // LINES.rows.every
        sums = ()
        for _ in tl.static_range(ROW_OUTPUTS * COLUMN_OUTPUTS):
            sums += (start,)
        for part in loop(FOLD * rows * columns):
            m = part // (rows * columns) if FOLD > 1 else 0
            r = part // columns % rows * LINES.rows.taps
            s = part % columns * LINES.columns.taps
            tap = first + r * r_step + s * s_step
            taps = load_taps(w_ptr, tap, tap_steps, k * FOLD + m, k_mask, LINES, ACC)
            x_columns = x_ptr + (k // REPEAT * FOLD + m) * x_strides.c
            corner = h0 + r * step_h, w0 + s * step_w
            sums = add_products(
                sums, taps, x_columns, x_strides, corner, pixel_steps, (H, W), mask, LINES
            )
        for i in tl.static_range(ROW_OUTPUTS * COLUMN_OUTPUTS):
            p = p0 + i // COLUMN_OUTPUTS * spacing_p
            q = q0 + i % COLUMN_OUTPUTS * spacing_q
            y_mask = mask & within(p, P) & within(q, Q)
            p = p * step_p + first_p
            q = q * step_q + first_q
            residual_at = 0
            if residual_ptr is not None:
                residual_at = n * residual_strides.n + p * residual_strides.h
                residual_at = k * residual_strides.c + (residual_at + q * residual_strides.w)
            y = finish(
                sums[i], None, k, k_mask, residual_ptr, residual_at, y_mask, ACTIVATION, DTYPE
            )
            y_at = k * y_strides.c + (n * y_strides.n + p * y_strides.h + q * y_strides.w)
            tl.store(y_ptr + y_at, y, mask=y_mask)


@triton.jit
def sum_rows(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums [1, COLUMNS] of rows, laid side by side: so the interpreter adds them in pairs."""
    flat = tl.reshape(tl.trans(tile), (COLUMNS * ROWS,))
    return tl.sum(tl.reshape(flat, (COLUMNS, ROWS)), axis=1)[None, :]


@triton.jit(do_not_specialize=["split_k"])
def depthwise_wgrad_kernel(
    x_ptr,  # [N, channels, H, W]
    dy_ptr,  # [N, K, P, Q]
    parts,  # GradientParts; dw[split_k, K, 1, R, S], db[split_k, K]
    x_strides,  # n, c, h, w, encoded
    dy_strides,  # n, k, p, q, encoded
    sizes,  # N, H, W, P, Q, strips of a column, of a row, patches of a strip; encoded
    reduction,  # K, REPEAT, R, S and what depthwise_kernel takes besides
    down,  # the _AxisMap of p
    across,  # of q
    split_k,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a _Block
    LINES: tl.constexpr,  # the _Lines of a program
):
    """dw[k,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,k // REPEAT,h,w]; db[k] = sum of dy[n,k,p,q].

    One program writes a tile of channels by the taps of LINES, summed over one part of the strips;
    each of its rows adds up its own products, in float32 (float64 for float64), and the rows are
    summed once. The programs of the first taps sum dy as well.
    """
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    UNIT: tl.constexpr = TILE.unit
    R_TAPS: tl.constexpr = LINES.rows.taps
    S_TAPS: tl.constexpr = LINES.columns.taps
    OUTPUTS: tl.constexpr = LINES.columns.outputs
    dw_ptr, db_ptr, dw_strides = parts
    TAPS: tl.constexpr = R_TAPS * S_TAPS if dw_ptr is not None else 0
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, H, W, P, Q, column_strips, row_strips, patches_per_strip = decode_ints(sizes)
    K, REPEAT, R, S, _, _, _ = reduction
    K = K // UNIT * UNIT
    _, _, stride_h, origin_h, step_h, _, _ = down
    spacing, _, stride_w, origin_w, step_w, _, _ = across
    x_strides = aligned_strides(x_strides, UNIT)
    dy_strides = aligned_strides(dy_strides, UNIT)

    pid = program(INT64_INDEX)
    column_tiles = tl.cdiv(K, COLUMNS)
    parts = R // R_TAPS * (S // S_TAPS)
    if dw_ptr is None:
        parts = 1
    k = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    k_mask = k < K
    part = pid // column_tiles % parts
    r0 = part // (S // S_TAPS) * R_TAPS
    s0 = part % (S // S_TAPS) * S_TAPS
    split = pid // (column_tiles * parts)
    blocks = tl.cdiv(tl.cdiv((pid * 0 + N) * column_strips * row_strips, ROWS), split_k)
    x_ptr += k // REPEAT * x_strides.c
    dy_ptr += k * dy_strides.c

    db = tl.zeros((ROWS, COLUMNS), ACC)
    dw = ()
    for _ in tl.static_range(TAPS):
        dw += (db,)
    for block in loop(blocks):
        strip = (split * blocks + block) * ROWS + tl.arange(0, ROWS)[:, None]
        n, strip, q0 = pixel(strip, column_strips, row_strips)
        q0 = q0 // spacing * (spacing * OUTPUTS) + q0 % spacing
        w0 = q0 * stride_w + origin_w + s0 * step_w
        for turn in loop(patches_per_strip):
            p = strip * patches_per_strip + turn
            h0 = p * stride_h + origin_h + r0 * step_h
            mask = (n < N) & (p < P) & k_mask
            dys = ()
            for i in tl.static_range(OUTPUTS):
                q = q0 + i * spacing
                offsets = n * dy_strides.n + p * dy_strides.h + q * dy_strides.w
                dy = tl.load(dy_ptr + offsets, mask=mask & (q < Q), other=0.0)
                dys += (upcast(dy, ACC),)
                db += dys[i]
            if dw_ptr is not None:
                for i in tl.static_range(pixels_of(LINES.rows)):
                    h = h0 + i * step_h
                    for j in tl.static_range(pixels_of(LINES.columns)):
                        if is_met(LINES, OUTPUTS, i, j):
                            w = w0 + j * step_w
                            offsets = n * x_strides.n + h * x_strides.h + w * x_strides.w
                            x_mask = mask & within(h, H) & within(w, W)
                            x = upcast(tl.load(x_ptr + offsets, mask=x_mask, other=0.0), ACC)
                            for output in tl.static_range(OUTPUTS):
                                if tap_at(LINES, output, i, j) >= 0:
                                    valid = q0 + output * spacing < Q
                                    added = dw[tap_at(LINES, output, i, j)] + x * dys[output]
                                    # Else the zero of a output outside y would meet an infinity.
                                    added = tl.where(valid, added, dw[tap_at(LINES, output, i, j)])
                                    dw = (
                                        dw[: tap_at(LINES, output, i, j)]
                                        + (added,)
                                        + dw[tap_at(LINES, output, i, j) + 1 :]
                                    )

    if db_ptr is not None:
        if part == 0:
            total = downcast(sum_rows(db, ROWS, COLUMNS), db_ptr.dtype.element_ty)
            tl.store(db_ptr + split * K + k, total, mask=k_mask)
    if dw_ptr is not None:
        dw_split, dw_k, _, dw_r, dw_s = dw_strides
        dw_ptr += split * dw_split + k * dw_k
        for tap in tl.static_range(TAPS):
            total = downcast(sum_rows(dw[tap], ROWS, COLUMNS), dw_ptr.dtype.element_ty)
            offset = (r0 + tap // S_TAPS) * dw_r + (s0 + tap % S_TAPS) * dw_s
            tl.store(dw_ptr + offset, total, mask=k_mask)


class _Axis(NamedTuple):
    """One axis of a launch: of a convolution of x into y, or of dy into (a phase of) dx."""

    size: int  # of what is read
    outputs: int  # of what is written
    taps: int
    first_tap: int
    tap_step: int
    apart: int
    every: int
    index_map: _AxisMap


def _forward_axis(g: Conv2dGeometry, axis: int) -> _Axis:
    size, outputs = ((g.H, g.P), (g.W, g.Q))[axis]
    stride, dilation, (before, _) = g.stride[axis], g.dilation[axis], g.padding[axis]
    shared = gcd(stride, dilation)
    index_map = _AxisMap(dilation // shared, 0, stride, -before, dilation, 1, 0)
    return _Axis(size, outputs, g.kernel[axis], 0, 1, stride // shared, 1, index_map)


def _gathered_axis(g: Conv2dGeometry, axis: int) -> _Axis:
    """All phases of dx together: output h meets p at the flipped tap stride * p - h - origin.

    Patches start where origin + h is a multiple of the stride, the first of them before dx.
    """
    size, outputs = ((g.P, g.H), (g.Q, g.W))[axis]
    taps, stride, (before, _) = g.kernel[axis], g.stride[axis], g.padding[axis]
    origin = before - (taps - 1)
    index_map = _AxisMap(1, origin % stride, 1, origin, 1, 1, 0)
    return _Axis(size, outputs, taps, taps - 1, -1, 1, stride, index_map)


def _phase_axis(taps: Taps, size: int) -> _Axis:
    """One phase of dx: a convolution of stride 1 with taps of its own, flipped."""
    last = taps.taps - 1
    origin = taps.origin - last * taps.step
    index_map = _AxisMap(taps.step, 0, 1, origin, taps.step, taps.stride, taps.first)
    first_tap = taps.tap + last * taps.tap_step
    return _Axis(size, taps.count, taps.taps, first_tap, -taps.tap_step, 1, 1, index_map)


_HELD = 96  # registers of a thread that hold taps
_MOST = 25  # taps of a turn: each takes its time to compile


def _turn_taps(R: int, S: int, tile: Tile, itemsize: int) -> Pair:
    """How many of R x S taps one turn takes: all, a row or one, as registers allow."""
    elements = min(8, cdiv(tile.rows * tile.columns, 32 * tile.warps)) * cdiv(itemsize, 4)
    most = min(_MOST, _HELD // elements)
    if R * S <= most:
        return max(1, R), max(1, S)
    return 1, S if S <= most else 1


def _axes(
    direction: Direction, g: Conv2dGeometry, tile: Tile, itemsize: int
) -> list[tuple[_Axis, _Axis]]:
    """The launches of a direction, by height and width; dgrad's phases together if they can."""
    if direction != "dgrad":
        return [(_forward_axis(g, 0), _forward_axis(g, 1))]
    whole = g.K == g.C and _turn_taps(*g.kernel, tile, itemsize) == g.kernel
    even = all(outputs % stride == 0 for outputs, stride in zip(tile.patch, g.stride, strict=True))
    if whole and even and g.dilation == (1, 1):
        return [(_gathered_axis(g, 0), _gathered_axis(g, 1))]
    return [(_phase_axis(row, g.P), _phase_axis(column, g.Q)) for row, column in g.dgrad()]


class _Launch(NamedTuple):
    """What distinguishes one launch from another, besides its tensors."""

    strips: int
    lines: _Lines
    arguments: dict[str, Any]  # of the kernels


_TURNS = 8  # patches of a strip, at most: they share rows of pixels through L1


def _launches(
    direction: Direction, g: Conv2dGeometry, tile: Tile, itemsize: int, multiprocessors: int
) -> tuple[_Launch, ...]:
    K, repeat = (g.C, 1) if direction == "dgrad" else (g.K, g.K // g.C)
    launches = []
    for row, column in _axes(direction, g, tile, itemsize):
        R, S = _turn_taps(row.taps, column.taps, tile, itemsize)
        patches = _patches(row, tile.patch[0])
        row_strips = _patches(column, tile.patch[1])
        programs = cdiv(g.N * patches * row_strips, tile.rows) * cdiv(K, tile.columns)
        patches_per_strip = max(1, min(patches, _TURNS, programs // (8 * multiprocessors)))
        column_strips = cdiv(patches, patches_per_strip)
        sizes = (g.N, row.size, column.size, row.outputs, column.outputs)
        first_tap = row.first_tap * g.S + column.first_tap
        tap_steps = row.tap_step * g.S, column.tap_step
        height, width = tile.patch
        lines = _Lines(
            rows=_Line(height, R, row.apart, row.every),
            columns=_Line(width, S, column.apart, column.every),
        )
        arguments = {
            "sizes": encode_ints((*sizes, column_strips, row_strips, patches_per_strip)),
            "reduction": (K, repeat, row.taps, column.taps, first_tap, *tap_steps),
            "down": tuple(row.index_map),
            "across": tuple(column.index_map),
            "LINES": lines,
        }
        launches.append(_Launch(g.N * column_strips * row_strips, lines, arguments))
    return tuple(launches)


def _patches(axis: _Axis, outputs: int) -> int:
    """How many patches cover an axis; if its outputs lie apart, others lie between."""
    spacing = axis.index_map.spacing
    return cdiv(axis.outputs + axis.index_map.shift, outputs * spacing) * spacing


def _unit(channels: int, *tensors: Tensor | None) -> int:
    """How many channels side by side make 16 bytes, aligned in all tensors; else 1."""
    unit = 1
    for t in tensors:
        if t is not None:
            (N, _, H, _), (n, c, h, w) = t.shape, t.stride()
            unit = max(1, 16 // t.element_size())
            # The stride of an axis of one element may be anything.
            if c != 1 or (n * (N > 1) | h * (H > 1) | w | channels) % unit:
                return 1
    return unit


def _convolve(
    direction: Direction,
    x: Tensor,
    w: Tensor,
    epilogue: Epilogue,
    y: Tensor,
    g: Conv2dGeometry,
    tile: Tile,
) -> None:
    residual = epilogue.residual
    N, K, P, Q = y.shape
    # Else the taps of neighbouring channels lie as far apart as a filter is large.
    taps = replay.derive(w, lambda w: w.reshape(g.K, g.R * g.S).t().contiguous())
    wide = device.int64_index(N * P * Q, x, w, residual, y)
    fold = g.K // g.C if direction == "dgrad" else 1
    block = _Block(tile.rows, tile.columns, _unit(K, x, residual, y), fold)
    multiprocessors = device.describe(x.device).multiprocessors
    for launch in _launches(direction, g, tile, x.element_size(), multiprocessors):
        device.launch(
            depthwise_kernel,
            (cdiv(launch.strips, tile.rows) * cdiv(K, tile.columns),),
            device=x.device,
            **operands(x=x),
            w_ptr=taps,
            **results(epilogue, y),
            **launch.arguments,
            INT64_INDEX=wide,
            TILE=block,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def fprop(call: Fprop, tile: Tile) -> None:
    """y[N,K,P,Q] = activation(conv(x, w) + bias + residual).

    The precision takes no part, here and below: products are formed outside the tensor cores.
    """
    _convolve("fprop", call.x, call.w, call.epilogue, call.y, call.g, tile)


def dgrad(call: Dgrad, tile: Tile) -> None:
    """dx[N,C,H,W], the gradient of x, plus bias[C] (for a transposed convolution)."""
    _convolve("dgrad", call.dy, call.w, Epilogue(call.bias), call.dx, call.g, tile)


def wgrad(call: Wgrad, tile: Tile) -> None:
    """dw[K,1,R,S] and db[K], the gradients of weight and bias; None is not computed.

    The strips are summed in ``tile.split_k`` parts, which a second pass adds in a fixed order.
    """
    x, dy, g = call.x, call.dy, call.g
    _, K, P, Q = dy.shape
    multiprocessors = device.describe(x.device).multiprocessors
    (launch,) = _launches("wgrad", g, tile, x.element_size(), multiprocessors)
    tap_parts = 1 if call.dw is None else _tap_parts(g, launch)
    with gradients(call.dw, call.db, tile.split_k) as parts:
        device.launch(
            depthwise_wgrad_kernel,
            (cdiv(K, tile.columns) * tap_parts * tile.split_k,),
            device=x.device,
            **operands(x=x, dy=dy),
            parts=tuple(parts),
            **launch.arguments,
            split_k=tile.split_k,
            INT64_INDEX=device.int64_index(g.N * P * Q, x, dy, parts.dw),
            TILE=_Block(tile.rows, tile.columns, _unit(K, x, dy), fold=1),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **device.all_registers(x.device),
        )


def _tap_parts(g: Conv2dGeometry, launch: _Launch) -> int:
    """Among how many programs wgrad divides the taps."""
    return g.R // launch.lines.rows.taps * (g.S // launch.lines.columns.taps)


def tiles(problem: Problem) -> Iterator[Tile]:
    """A tile that suits the convolution; fprop's and dgrad's order of summation is always one.

    Each group has one channel, of several: a single channel makes a matrix product.
    """
    if problem.g.groups == problem.g.C > 1:
        yield _tile(problem)


def _tile(problem: Problem) -> Tile:
    direction, g, dtype, _, device, layout, _ = problem
    channels = g.C if direction == "dgrad" else g.K
    if device.backend == "interpreter":
        # A program costs far more than an element: few, large tiles.
        columns = min(power_of_2(channels), 1024)
        pixels = g.N * (g.H * g.W if direction == "dgrad" else g.P * g.Q)
        return Tile(min(power_of_2(pixels), INTERPRETER_ELEMENTS // columns), columns)
    tile = _gpu_tile(direction, g, dtype.itemsize, channels, layout != "scattered")
    if direction != "wgrad":
        return tile
    (launch,) = _launches("wgrad", g, tile, dtype.itemsize, device.multiprocessors)
    programs = max(1, cdiv(g.K, tile.columns) * _tap_parts(g, launch))
    # Four programs for each multiprocessor.
    most = cdiv(launch.strips, tile.rows)
    return replace(tile, split_k=max(1, min(most, 4 * device.multiprocessors // programs)))


def _gpu_tile(
    direction: Direction, g: Conv2dGeometry, itemsize: int, channels: int, channels_last: bool
) -> Tile:
    """Each thread has one patch of 16 bytes of channels, or of one channel where they are apart.

    The patch is as large as registers allow. Where channels are apart it is tall, so that threads
    side by side store side by side, as long as that is what takes the time.
    """
    vector = max(1, 16 // itemsize) if channels_last else 1
    if g.K != g.C or channels % vector:
        vector = 1
    # Of 128 and 64 bytes of channels, those that pad the channels less.
    columns = min((8 * vector, 4 * vector), key=lambda size: cdiv(channels, size) * size)
    columns = columns if channels_last else 1
    tile = Tile(128 * vector // columns, columns)
    strided = max(g.stride) > 1
    if _turn_taps(*g.kernel, tile, itemsize) != g.kernel:
        patch = (1, 2 if g.S > 7 else 4 if strided or direction == "wgrad" else 6)
    elif direction == "wgrad":
        patch = (1, 2 if strided and channels_last else 4)
    elif direction == "dgrad" and strided:
        patch = (2, 4) if channels_last else (4, 2)
    elif channels_last:
        patch = (2, 2 if strided else 4)
    else:
        patch = (4 if g.R * g.S > 9 else 8, 1)
    return replace(tile, patch=patch)


ENGINE = Engine(
    "depthwise",
    tiles=tiles,
    launchers={Fprop: fprop, Dgrad: dgrad, Wgrad: wgrad},
    predict=cost_model.predict_direct,
)
