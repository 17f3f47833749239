"""Engine 2: the convolution's matrix product through tiled tensor descriptors (TMA).

A descriptor over NHWC memory loads a box of pixels from any offset and gives zero outside, which
is the padding: no addresses, no masks. Each tap of the filter is one shifted load of the same box.
A stride cuts x into phases, each a descriptor of its own and a stride-1 problem with its own
taps; dgrad writes dx one phase at a time by the same rule.

The product is formed as channels x pixels, the transpose of what is stored: Triton feeds tensor
cores from shared memory on the left only what was loaded as a matrix, on the right anything, so
the box stands right, and left the filters, whose unit axes fold away. With both in shared memory
the loop needs a third fewer registers and instructions than with pixels on the left.

Operands need channels side by side, pixels in memory order and rows that start on 16 bytes
(``layout_of`` says "aligned"). Sizes and strides are in elements.
"""

from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import device
from ..device import Device, loop
from ..geometry import Conv2dGeometry, Taps
from ..lang.descriptors import filters, image_pairs, images
from ..lang.epilogue import Epilogue
from ..lang.integers import cdiv, decode_ints, encode_ints, program
from ..lang.numerics import dot, downcast, upcast
from ..lang.split_sum import gradients
from ..tile import Box, BoxBlock, Tile, blocks_per_multiprocessor, box_of
from . import implicit_gemm
from .descriptor_tiles import descriptor_tiles, read_phases
from .engine import Dgrad, Engine, Fprop, Wgrad


@triton.jit
def next_tap(c, r, s, C, S, DEPTH: tl.constexpr):
    """(c, r, s) of the turn after this one: channels run fastest. Counting is cheaper in a loop
    than dividing its turn.
    """
    c += DEPTH
    end = c >= C
    c = tl.where(end, 0, c)
    s = tl.where(end, s + 1, s)
    end = s == S
    return c, tl.where(end, r + 1, r), tl.where(end, 0, s)


@triton.jit
def add_products(
    acc,  # [columns, rows]
    x_desc,
    w_desc,
    box,  # n, p, q of its first pixel
    first,  # channel of x; channel of w along the depth; along the columns
    C,
    phase_taps,  # PhaseTaps
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS_FIRST: tl.constexpr = False,
):
    """acc + the products of one phase's taps with a box of pixels, which come in the order of
    x_desc's axes: by images, rows and columns, or with ROWS_FIRST by rows, images and columns.
    """
    COLUMNS: tl.constexpr = acc.shape[0]
    ROWS: tl.constexpr = acc.shape[1]
    k_tiles, S, origin_h, origin_w, step_h, step_w, tap_h, tap_w, tap_step_h, tap_step_w = (
        decode_ints(phase_taps)
    )
    n, p, q = box
    x_first, w_first, column = first
    c, r, s = 0, 0, 0
    for _ in loop(k_tiles):
        h = origin_h + r * step_h
        w = origin_w + s * step_w
        if len(x_desc.block_shape) == 5:
            # The pair of pixels, then which of the two: of rows by an axis, of columns by channels.
            half = (w & 1) * (x_desc.shape[4] // 2) + x_first + c
            if ROWS_FIRST:
                x = x_desc.load([p + (h >> 1), h & 1, n, q + (w >> 1), half])
            else:
                x = x_desc.load([n, p + (h >> 1), h & 1, q + (w >> 1), half])
        elif ROWS_FIRST:
            x = x_desc.load([p + h, n, q + w, x_first + c])
        else:
            x = x_desc.load([n, p + h, q + w, x_first + c])
        x = x.reshape(ROWS, DEPTH).T
        tap_r = tap_h + r * tap_step_h
        tap_s = tap_w + s * tap_step_w
        if TRANSPOSED:
            filters = w_desc.load([tap_r, tap_s, w_first + c, column]).reshape(DEPTH, COLUMNS).T
        else:
            filters = w_desc.load([tap_r, tap_s, column, w_first + c]).reshape(COLUMNS, DEPTH)
        acc = dot(filters, x, acc, PRECISION)
        c, r, s = next_tap(c, r, s, C, S, DEPTH)
    return acc


@triton.jit
def store_half(half, box, k, residual_desc, y_desc, ACTIVATION: tl.constexpr):
    """Finish half[columns, pixels] of an accumulator and store it as a box of y."""
    COLUMNS: tl.constexpr = half.shape[0]
    PIXELS: tl.constexpr = half.shape[1]
    n, p, q = box
    if residual_desc is not None:
        residual = residual_desc.load([n, p, q, k]).reshape(PIXELS, COLUMNS).T
        half += upcast(residual, half.dtype)
    if ACTIVATION is not None:
        half = ACTIVATION(half)
    y_desc.store([n, p, q, k], downcast(half, y_desc.dtype).T.reshape(y_desc.block_shape))


@triton.jit(do_not_specialize=["tiles"])
def product_kernel(
    x_desc,  # [N, H, W, C] of one phase, or [N, H/2, 2, W/2, 2C] of four
    x1_desc,  # the other phases that have taps, or None
    x2_desc,
    x3_desc,
    w_desc,  # [R, S, K, C]
    affine,  # bias and scale (in float32) [channels of y]; either may be None
    residual_desc,  # like y, or None
    y_desc,  # [N, P, Q, channels]
    tiles,
    sizes,  # boxes along p and q, column tiles of a group, groups, columns and depth of a group
    phase_taps,  # PhaseTaps of each phase
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # whether w's channels are the columns
    TILE: tl.constexpr,  # a BoxBlock
):
    """y = activation(scale * products of x's boxes with w's taps + bias + residual).

    One program writes every num_programs-th of the ``tiles``, each a box of pixels by COLUMNS
    channels of one group, accumulated in float32 and stored in two halves. Neighbouring programs
    have the same box and other columns: what they read of x is in L2 once, and all of w stays.
    """
    BOX_N: tl.constexpr = TILE.n
    BOX_P: tl.constexpr = TILE.p
    BOX_Q: tl.constexpr = TILE.q
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    bias_ptr, scale_ptr = affine
    x_descs = (x_desc, x1_desc, x2_desc, x3_desc)
    boxes_p, boxes_q, column_tiles, groups, K, C = decode_ints(sizes)

    for tile in loop(tl.program_id(0), tiles, tl.num_programs(0)):
        group = tile // column_tiles % groups
        column = tile % column_tiles * COLUMNS
        k = group * K + column
        at = tile // (column_tiles * groups)
        n = at // (boxes_q * boxes_p) * BOX_N
        p = at // boxes_q % boxes_p * BOX_P
        q = at % boxes_q * BOX_Q

        channels = k + tl.arange(0, COLUMNS)
        mask = channels < groups * K
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        bias = tl.zeros((COLUMNS, 1), tl.float32)
        if bias_ptr is not None:
            bias = upcast(tl.load(bias_ptr + channels, mask=mask, other=0.0), tl.float32)[:, None]
            if scale_ptr is None:
                acc += bias
        if TRANSPOSED:
            first = (group * C, group * C, column)
        else:
            first = (group * C, 0, k)
        for i in tl.static_range(len(phase_taps)):
            x = x_descs[i]
            box = (n, p, q)
            acc = add_products(
                acc, x, w_desc, box, first, C, phase_taps[i], TRANSPOSED, PRECISION, DEPTH
            )
        if scale_ptr is not None:
            acc = acc * tl.load(scale_ptr + channels, mask=mask, other=0.0)[:, None] + bias
        low, high = tl.split(acc.reshape(COLUMNS, 2, ROWS // 2).permute(0, 2, 1))
        store_half(low, (n, p, q), k, residual_desc, y_desc, ACTIVATION)
        # The second half of the box begins half way along its first axis of several pixels.
        n += BOX_N // 2
        if BOX_N == 1:
            p += BOX_P // 2
        if BOX_N * BOX_P == 1:
            q += BOX_Q // 2
        store_half(high, (n, p, q), k, residual_desc, y_desc, ACTIVATION)


class PhaseTaps(NamedTuple):
    """How one phase's taps meet the pixels. For output p, its r-th row of taps reads the phase's
    row p + origin + r * step and is the filter's row tap + r * tap_step; likewise q and s.
    """

    k_tiles: int  # taps times blocks of channels
    S: int
    origin_h: int
    origin_w: int
    step_h: int
    step_w: int
    tap_h: int
    tap_w: int
    tap_step_h: int
    tap_step_w: int


def _phase_taps(row: Taps, column: Taps, blocks: int, sign: int) -> PhaseTaps:
    """dgrad reads dy at origin - step (sign -1) from a pixel, fprop a pixel at the negative."""
    return PhaseTaps(
        k_tiles=row.taps * column.taps * blocks,
        S=column.taps,
        origin_h=-sign * row.origin,
        origin_w=-sign * column.origin,
        step_h=sign * row.step,
        step_w=sign * column.step,
        tap_h=row.tap,
        tap_w=column.tap,
        tap_step_h=row.tap_step,
        tap_step_w=column.tap_step,
    )


def half_box(box: Box) -> Box:
    """The first half of a box, cut along its first axis of several pixels."""
    n, p, q = box
    if n > 1:
        return n // 2, p, q
    return (1, p // 2, q) if p > 1 else (1, 1, q // 2)


def takes_pairs(g: Conv2dGeometry, depth: int) -> bool:
    """Whether one descriptor of five dimensions serves all phases of a convolution's stride.

    A block of channels must not run into those of the pair's second pixel.
    """
    even = g.stride == (2, 2) and g.H % 2 == 0 and g.W % 2 == 0
    return even and g.R * g.S > 1 and (g.C // g.groups) % depth == 0


Descriptors = dict[str, TensorDescriptor | None]


def x_descs(*xs: TensorDescriptor) -> Descriptors:
    """The arguments, by name, of kernels that take up to four descriptors of x."""
    return dict(zip_longest(("x_desc", "x1_desc", "x2_desc", "x3_desc"), xs))


def reads(
    g: Conv2dGeometry, x: Tensor, box: Box, depth: int, *, flat: bool = False
) -> tuple[Descriptors, list[PhaseTaps]]:
    """How fprop's boxes read x: a descriptor and the taps for each phase, or one of
    both for all. ``flat``: the pixels count as images of one.
    """
    blocks = cdiv(g.C // g.groups, depth)
    if takes_pairs(g, depth) and x.stride(3) == g.C:
        (top, _), (left, _) = g.padding
        phase_taps = PhaseTaps(g.R * g.S * blocks, g.S, -top, -left, *g.dilation, 0, 0, 1, 1)
        return x_descs(image_pairs(x, box, depth)), [phase_taps]
    phases = read_phases(g)
    xs = [images(x, (*box, depth), phase, flat=flat) for phase in phases]
    return x_descs(*xs), [_phase_taps(*phase, blocks, 1) for phase in phases]


def _multiply(
    xs: Descriptors,
    phase_taps: list[PhaseTaps],
    w: TensorDescriptor,
    epilogue: Epilogue,
    residual: TensorDescriptor | None,
    y: TensorDescriptor,
    g: Conv2dGeometry,
    tile: Tile,
    precision: str,
    transposed: bool = False,
) -> None:
    """One launch of ``product_kernel``, which writes y[N, P, Q, channels]."""
    groups = g.groups
    channels, depth = g.K // groups, g.C // groups
    if transposed:
        channels, depth = depth, channels
    # Groups share descriptors: blocks must not run from one into the next.
    assert groups == 1 or channels % tile.columns == depth % tile.depth == 0, (groups, tile)
    column_tiles = cdiv(channels, tile.columns)
    sizes = zip(y.shape, box_of(tile), strict=False)
    boxes_n, boxes_p, boxes_q = (cdiv(size, length) for size, length in sizes)
    tiles = boxes_n * boxes_p * boxes_q * column_tiles * groups
    here = device.describe(w.base.device)
    room = here.multiprocessors * blocks_per_multiprocessor(tile, w.base.element_size(), here)
    device.launch(
        product_kernel,
        (min(tiles, room),),
        device=w.base.device,
        **xs,
        w_desc=w,
        affine=(epilogue.bias, epilogue.scale),
        residual_desc=residual,
        y_desc=y,
        tiles=tiles,
        sizes=encode_ints((boxes_p, boxes_q, column_tiles, groups, channels, depth)),
        phase_taps=tuple([encode_ints(taps) for taps in phase_taps]),
        ACTIVATION=epilogue.function,
        PRECISION=precision,
        TRANSPOSED=transposed,
        TILE=BoxBlock.of(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def fprop(call: Fprop, tile: Tile) -> None:
    """y[N,K,P,Q] = activation(scale[K] * conv(x, w) + bias + residual)."""
    g, residual = call.g, call.epilogue.residual
    box, flat = box_of(tile), g.pointwise
    half = (*half_box(box), tile.columns)
    xs, phase_taps = reads(g, call.x, box, tile.depth, flat=flat)
    added = None if residual is None else images(residual, half, flat=flat)
    stored = images(call.y, half, flat=flat)
    w_desc = filters(call.w, (tile.columns, tile.depth))
    _multiply(xs, phase_taps, w_desc, call.epilogue, added, stored, g, tile, call.precision)


def dgrad(call: Dgrad, tile: Tile) -> None:
    """dx[N,C,H,W], the gradient of x, plus bias[C]; one launch for each phase of the stride."""
    g, epilogue = call.g, Epilogue(call.bias)
    box, flat, blocks = box_of(tile), g.pointwise, cdiv(g.K // g.groups, tile.depth)
    half = (*half_box(box), tile.columns)
    dys = x_descs(images(call.dy, (*box, tile.depth), flat=flat))
    w_desc = filters(call.w, (tile.depth, tile.columns))
    for phase in g.dgrad():
        stored, phase_taps = (
            images(call.dx, half, phase, flat=flat),
            [_phase_taps(*phase, blocks, -1)],
        )
        _multiply(dys, phase_taps, w_desc, epilogue, None, stored, g, tile, call.precision, True)


@triton.jit
def wgrad_kernel(
    x_desc,  # of one phase, [H, W, N, C], or [N, H, W, C] where the box is pixels of a row
    dy_desc,  # [P, Q, N, K], or [N, P, Q, K]
    dw_ptr,  # [split_k, groups * K, C, R, S]
    dw_strides,  # split, k, c, r, s
    sizes,  # P, Q, boxes along p and q, k_tiles, column and row tiles, taps, groups, K, C
    phase_taps,  # PhaseTaps
    PRECISION: tl.constexpr,
    INT64_INDEX: tl.constexpr,
    TILE: tl.constexpr,  # a BoxBlock
):
    """dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w], over one part of the boxes.

    One program writes rows k x columns c of one tap, summed in float32. The box's long axis comes
    last in its order: it is then loaded as a matrix, which may stand on the left from shared
    memory. A box with several long axes goes through registers to the left, and Triton 3.6 lets
    the next turn overwrite them while products still read: ``planner`` takes none.
    """
    BOX_N: tl.constexpr = TILE.n
    BOX_P: tl.constexpr = TILE.p
    BOX_Q: tl.constexpr = TILE.q
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    P, Q, boxes_p, boxes_q, k_tiles, column_tiles, row_tiles, taps, groups, K, C = decode_ints(
        sizes
    )
    _, S, origin_h, origin_w, step_h, step_w, tap_h, tap_w, tap_step_h, tap_step_w = decode_ints(
        phase_taps
    )

    pid = program(INT64_INDEX)
    c = (pid % column_tiles * COLUMNS).to(tl.int32)
    k = (pid // column_tiles % row_tiles * ROWS).to(tl.int32)
    tap = (pid // (column_tiles * row_tiles) % taps).to(tl.int32)
    group = (pid // (column_tiles * row_tiles * taps) % groups).to(tl.int32)
    split = pid // (column_tiles * row_tiles * taps * groups)
    r = tap // S
    s = tap % S
    h = origin_h + r * step_h
    w = origin_w + s * step_w

    first = (split * k_tiles).to(tl.int32)
    q = first % boxes_q * BOX_Q
    p = first // boxes_q % boxes_p * BOX_P
    n = first // (boxes_q * boxes_p) * BOX_N
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in loop(k_tiles):
        if BOX_N * BOX_P == 1:
            dy = dy_desc.load([n, p, q, group * K + k])
            x = x_desc.load([n, p + h, q + w, group * C + c])
        else:
            dy = dy_desc.load([p, q, n, group * K + k])
            x = x_desc.load([p + h, q + w, n, group * C + c])
        acc = dot(dy.reshape(DEPTH, ROWS).T, x.reshape(DEPTH, COLUMNS), acc, PRECISION)
        q += BOX_Q
        end = q >= Q
        q = tl.where(end, 0, q)
        p = tl.where(end, p + BOX_P, p)
        end = p >= P
        p = tl.where(end, 0, p)
        n = tl.where(end, n + BOX_N, n)

    rows = k + tl.arange(0, ROWS)
    columns = c + tl.arange(0, COLUMNS)
    mask = (rows < K)[:, None] & (columns < C)[None, :]
    tap_r = tap_h + r * tap_step_h
    tap_s = tap_w + s * tap_step_w
    if INT64_INDEX:
        rows = rows.to(tl.int64)
    dw_split, dw_k, dw_c, dw_r, dw_s = dw_strides
    dw_ptr += split * dw_split + tap_r * dw_r + tap_s * dw_s
    offsets = ((group * K + rows) * dw_k)[:, None] + (columns * dw_c)[None, :]
    tl.store(dw_ptr + offsets, downcast(acc, dw_ptr.dtype.element_ty), mask=mask)


def _channel_sum_tile(g: Conv2dGeometry, here: Device) -> Tile:
    """Engine 1's tile for db alone: enough parts of the pixels to fill the device twice.

    Never a single part, which would write db itself, by another binary.
    """
    programs = cdiv(g.K // g.groups, 64) * g.groups
    k_tiles = cdiv(g.N * g.P * g.Q, 64)
    split_k = max(2, min(k_tiles // 8, 2 * here.multiprocessors // programs))
    return Tile(64, 64, 64, split_k=split_k)


def wgrad(call: Wgrad, tile: Tile) -> None:
    """dw[K,C/groups,R,S] and db[K], the gradients of weight and bias; None is not computed.

    One launch for each phase of the stride. The boxes are summed in ``tile.split_k`` parts, which
    a second pass adds in a fixed order.
    """
    x, dy, dw, g = call.x, call.dy, call.dw, call.g
    if call.db is not None:
        sums = _channel_sum_tile(g, device.describe(dy.device))
        implicit_gemm.wgrad(replace(call, dw=None), sums)
    if dw is None:
        return
    n, p, q = box_of(tile)
    K, C, flat = g.K // g.groups, g.C // g.groups, g.pointwise
    N, P, Q = (g.N * g.P * g.Q, 1, 1) if flat else (g.N, g.P, g.Q)
    boxes_n, boxes_p, boxes_q = cdiv(N, n), cdiv(P, p), cdiv(Q, q)
    k_tiles = cdiv(boxes_n * boxes_p * boxes_q, tile.split_k)
    column_tiles, row_tiles = cdiv(C, tile.columns), cdiv(K, tile.rows)
    images_last = n * p > 1
    box = (p, q, n) if images_last else (n, p, q)
    dy_desc = images(dy, (*box, tile.rows), flat=flat, images_last=images_last)
    with gradients(dw, None, tile.split_k) as parts:
        for phase in read_phases(g):
            row, column = phase
            taps = row.taps * column.taps
            block = (*box, tile.columns)
            x_desc = images(x, block, phase, flat=flat, images_last=images_last)
            sizes = (P, Q, boxes_p, boxes_q, k_tiles, column_tiles, row_tiles, taps, g.groups, K, C)
            device.launch(
                wgrad_kernel,
                (column_tiles * row_tiles * taps * g.groups * tile.split_k,),
                device=x.device,
                x_desc=x_desc,
                dy_desc=dy_desc,
                dw_ptr=parts.dw,
                dw_strides=parts.dw_strides,
                sizes=encode_ints(sizes),
                phase_taps=encode_ints(_phase_taps(row, column, 1, 1)),
                PRECISION=call.precision,
                INT64_INDEX=device.int64_index(0, parts.dw),
                TILE=BoxBlock.of(tile),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


ENGINE = Engine(
    "descriptor_gemm",
    tiles=descriptor_tiles,
    launchers={Fprop: fprop, Dgrad: dgrad, Wgrad: wgrad},
    fuses={"fprop": frozenset({"scale"})},
    is_final=lambda problem: not problem.any_size,  # wgrad's boxes do not fit some maps
)
