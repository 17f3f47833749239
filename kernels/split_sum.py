"""The second pass of a reduction that was split: its parts are added in a fixed order."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device, replay
from .device import loop
from .indexing import cdiv, narrow, power_of_2, program


# The elements are a layer's weights: their number, unlike that of the parts, knows no batch.
@triton.jit(do_not_specialize=["splits"])
def split_sum_kernel(parts_ptr, out_ptr, numel, splits, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., first to last; one program sums BLOCK elements."""
    i = program(WIDE) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    total = tl.load(parts_ptr + i, mask=mask, other=0.0)
    for _ in loop(splits - 1):
        parts_ptr += numel
        total += tl.load(parts_ptr + i, mask=mask, other=0.0)
    tl.store(out_ptr + i, narrow(total, out_ptr.dtype.element_ty), mask=mask)


class ChannelWalk(NamedTuple):
    """How a kernel that may sum a map's channels walks it, in tiles of pixels x channels."""

    programs: int
    turns: int  # of each program
    parts: int  # that the sum comes in
    rows: int
    columns: int
    warps: int


def channel_walk(t: Tensor, pixels: int, elements: int, summed: bool) -> ChannelWalk:
    """Tiles of ``elements`` that lie along the axis of t[N, K, P, Q] that is contiguous.

    For a sum there are as many programs as the device holds, as each leaves a part of it to be
    added in a second pass; otherwise one for each tile.
    """
    K = t.shape[1]
    if device.INTERPRET:
        rows, columns = 4096, min(64, power_of_2(K))
    elif t.stride(1) == 1:
        columns = min(64, power_of_2(K))
        rows = elements // columns
    else:
        rows, columns = elements // 2, 1
    tiles, column_tiles = cdiv(pixels, rows), cdiv(K, columns)
    parts = max(1, tiles)
    if summed:
        programs = 2 * device.describe(t.device).multiprocessors
        # Never a single part, which would write the sum itself, by another binary.
        parts = max(2, min(tiles, programs // max(1, column_tiles)))
    return ChannelWalk(parts * column_tiles, cdiv(tiles, parts), parts, rows, columns, 8)


def parts_like(out: Tensor, splits: int) -> Tensor:
    """Where a split reduction writes: out itself for one part, else a workspace[splits, numel]."""
    if splits == 1:
        return out
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return replay.new(out, (splits, out.numel()), (out.numel(), 1), dtype)


def split_sum(parts: Tensor, out: Tensor) -> None:
    """Add parts[splits, numel] into out, whose storage is dense in any order of strides."""
    if parts is out:
        return
    splits, numel = parts.shape
    block = min(1 << 16, power_of_2(numel)) if device.INTERPRET else 1024
    device.launch(
        split_sum_kernel,
        (cdiv(numel, block),),
        *(parts, out, numel, splits, device.wide(0, parts), block),
        device=out.device,
    )
