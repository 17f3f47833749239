"""The second pass of a reduction that was split: its parts are added in a fixed order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, replay
from ..device import loop
from .integers import cdiv, power_of_2, program
from .numerics import downcast


# The elements are a layer's weights: their number, unlike that of the parts, knows no batch.
@triton.jit(do_not_specialize=["split_k"])
def split_sum_kernel(
    parts_ptr,  # [split_k, numel]
    out_ptr,  # [numel]
    numel,
    split_k,
    INT64_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[i] = parts[0, i] + parts[1, i] + ...; one program sums BLOCK elements.

    Every LANES-th part is added first to last, then these sums: so many loads wait at once.
    """
    i = (program(INT64_INDEX) * BLOCK + tl.arange(0, BLOCK))[None, :]
    lane = (program(INT64_INDEX) * 0 + tl.arange(0, LANES))[:, None]
    total = tl.zeros((LANES, BLOCK), parts_ptr.dtype.element_ty)
    for first in loop(0, split_k, LANES):
        part = first + lane
        mask = (part < split_k) & (i < numel)
        total += tl.load(parts_ptr + part * numel + i, mask=mask, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out_ptr + i, downcast(total, out_ptr.dtype.element_ty), mask=i < numel)


class ChannelTiles(NamedTuple):
    """The tiles, pixels x channels, of a kernel that may sum a map's channels."""

    programs: int
    per_program: int
    parts: int  # that the sum comes in
    rows: int
    columns: int
    warps: int


def channel_tiles(t: Tensor, pixels: int, elements: int, summed: bool) -> ChannelTiles:
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
    return ChannelTiles(parts * column_tiles, cdiv(tiles, parts), parts, rows, columns, 8)


def parts_like(out: Tensor | None, split_k: int) -> Tensor | None:
    """Where a split reduction writes: out itself for one part, else a workspace[split_k, numel].

    None, a result that is not wanted, has no parts.
    """
    if split_k == 1 or out is None:
        return out
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return replay.new(out, (split_k, out.numel()), (out.numel(), 1), dtype)


class GradientParts(NamedTuple):
    """Where a kernel writes the parts of a split gradient. It takes them as a plain tuple."""

    dw: Tensor | None  # [split_k, K, C, R, S]
    db: Tensor | None  # [split_k, K]
    dw_strides: tuple[int, ...]  # split, k, c, r, s


@contextmanager
def gradients(dw: Tensor | None, db: Tensor | None, split_k: int) -> Iterator[GradientParts]:
    """Room for ``split_k`` parts of dw and db, which are added up in the end."""
    dw_parts, db_parts = parts_like(dw, split_k), parts_like(db, split_k)
    strides = (0, 0, 0, 0, 0) if dw is None else (dw.numel(), *dw.stride())
    yield GradientParts(dw_parts, db_parts, strides)
    split_sum(dw_parts, dw)
    split_sum(db_parts, db)


def split_sum(parts: Tensor | None, out: Tensor | None) -> None:
    """Add parts[split_k, numel] into out, whose storage is dense in any order of strides.

    None, or the parts themselves, is left as it is.
    """
    if parts is out or parts is None or out is None:
        return
    split_k, numel = parts.shape
    # Few elements take many lanes, so that there are programs enough.
    lanes = 16 if numel < 1 << 16 else 4
    block = min(1 << 16, power_of_2(numel)) if device.INTERPRET else 1024 // lanes
    device.launch(
        split_sum_kernel,
        (cdiv(numel, block),),
        device=out.device,
        parts_ptr=parts,
        out_ptr=out,
        numel=numel,
        split_k=split_k,
        INT64_INDEX=device.int64_index(0, parts),
        BLOCK=block,
        LANES=lanes,
    )
