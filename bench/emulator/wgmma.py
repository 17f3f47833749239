"""Products of warpgroups: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".

"Shared Memory Matrix Layout" and "Matrix Descriptor" say which bytes a descriptor names. In eager
mode a product is made when it is issued, in lazy mode by the wait for it: until then nothing is
read from shared memory, and the accumulators' registers hold NaNs.
"""

from dataclasses import dataclass

import numpy as np

from .batch import Lanes
from .ordering import Ordering
from .shared import SharedMemory
from .tensorcore import LAYOUTS, WIDTH, decode, fragments
from .tma import SPANS, swizzled

u32, f32, i64 = np.uint32, np.float32, np.int64
IN_FLIGHT = u32(0xFFFFFFFF)
"""What accumulators hold until a wait, in lazy mode: a NaN."""
FIELD = 0x3FFF
"""Bits of a matrix descriptor that hold an address or an offset, in units of 16 bytes."""
SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}
"""The swizzling mode of a tensor map for that of a matrix descriptor."""


@dataclass
class Operand:
    """A matrix for each warpgroup, in shared memory."""

    chunks: np.ndarray  # [warpgroups, chunks]
    shape: tuple  # [extent, K], or if transposed [K, extent]
    trans: bool
    kind: str


@dataclass
class Accumulators:
    registers: tuple  # their numbers
    old: list  # their values
    keep: np.ndarray  # whether these are added, for each warpgroup
    after: "Product | None"  # the product in flight that accumulates in the same registers

    @property
    def columns(self) -> int:
        return 2 * len(self.registers)


@dataclass
class Product:
    """A product that some warpgroups have not waited for yet."""

    L: Lanes
    groups: np.ndarray  # of the whole batch
    number: np.ndarray  # of groups of products committed before, for each warpgroup
    waiting: np.ndarray
    left: np.ndarray | Operand
    right: Operand
    accumulators: Accumulators
    instruction: int
    matrix: np.ndarray | None = None  # the result


class GroupProducts(SharedMemory):
    def init_products(self) -> None:
        self._products: list[Product] = []
        self._product_count = np.zeros(-(-self.lanes // 128), i64)  # committed by each warpgroup
        self._descriptors: dict = {}
        self._last_product: tuple = [], None

    def wgmma(self, L, shape, types, acc, a, b, use, trans_a, trans_b, registers, i):
        if not L.whole_groups:
            self.stop("wgmma that not all threads of a warpgroup execute", i, L)
        _, atype, btype = types
        N, K = map(int, shape.split("n")[1].split("k"))
        if K * WIDTH[atype] != 256:
            self.stop(f"shape {shape} of {atype}", i)
        groups = L.idx[::128] // 128
        number = self._product_count[groups]
        if isinstance(a, list):
            left = self._from_registers(a, atype)
        else:
            left = self._operand(L, a, number, 64, trans_a, atype, i)
        right = self._operand(L, b, number, N, trans_b, btype, i)
        if self.counters is not None:
            self.counters.product(self, len(groups), 64 * N * K, i)
        keep = self._uniform(L, np.broadcast_to(use, (L.n,)), "scale-d", i)
        old = Accumulators(registers, acc, keep, self._before(groups, registers, i))
        waiting = np.ones(len(groups), bool)
        p = Product(L, groups, number, waiting, left, right, old, i)
        self._products.append(p)
        if self.lazy:
            return [np.full(L.n, IN_FLIGHT)] * len(acc)
        return self._multiply(p)

    def _before(self, groups, registers, i) -> Product | None:
        """The last product in flight with these accumulators."""
        for p in reversed(self._products):
            known = p.accumulators.registers
            if p.matrix is None and set(known) & set(registers):
                if known == registers and np.array_equal(p.groups, groups):
                    return p
                if np.isin(p.groups, groups).any():
                    self.stop("wgmma with accumulators in flight in another shape", i)
        return None

    def _uniform(self, L, value: np.ndarray, what: str, i) -> np.ndarray:
        """A value of each warpgroup."""
        rows = value.reshape(-1, 128)
        if (rows != rows[:, :1]).any():
            self.stop(f"{what} differs within a warpgroup", i, L)
        return rows[:, 0]

    def _from_registers(self, registers, kind):
        """A[64, K]: as A of mma.m16n8k for each of the four warps."""
        width = WIDTH[kind]
        (order, M, K), _ = LAYOUTS[f"m16n8k{256 // width}", width]
        return fragments(registers, order, width, kind).reshape(-1, 4 * M, K)

    def _operand(self, L, descriptors, number, extent, trans, kind, i) -> Operand:
        """What descriptors name. The read of it begins."""
        first = L.sbase[::128] + self.shared_base  # where each CTA's shared memory begins
        same = self._uniform(L, descriptors, "a matrix descriptor", i)
        named = [self._chunks(d, extent, WIDTH[kind] // 8, trans, i) for d in same.tolist()]
        starts = (first // 16).tolist()
        chunks = np.stack([at + start for (at, _), start in zip(named, starts, strict=True)])
        who = chunks.shape[1], L.idx[::128] // 128, number
        self.begin_read(chunks.reshape(-1), i, Ordering.multiplying, *who)
        return Operand(chunks, named[0][1], trans, kind)

    def _multiply(self, p: Product) -> list:
        """Makes a product. Returns its accumulators."""
        c = p.accumulators
        left = p.left if isinstance(p.left, np.ndarray) else self._values(p.left)
        product = np.matmul(left, self._values(p.right).transpose(0, 2, 1))
        if c.keep.any():
            product = np.where(c.keep[:, None, None], self._before_product(c), f32(0)) + product
        groups, pairs = len(p.groups), c.columns // 8
        spread = product.reshape(groups, 4, 2, 8, pairs, 4, 2)
        out = np.ascontiguousarray(spread.transpose(4, 2, 6, 0, 1, 3, 5)).view(u32)
        p.matrix, c.after = product, None
        result = list(out.reshape(len(c.registers), -1))
        self._last_product = result, product
        return result

    def _values(self, o: Operand) -> np.ndarray:
        """Numbers [warpgroups, extent, K] of an operand, as shared memory has them now."""
        raw = self.smem[16][o.chunks].view(f"u{WIDTH[o.kind] // 8}")
        values = decode(raw.reshape(-1, *o.shape), o.kind)
        return values.transpose(0, 2, 1) if o.trans else values

    def _before_product(self, c: Accumulators) -> np.ndarray:
        """The old values [warpgroups, 64, N]."""
        if c.after is not None:
            assert c.after.matrix is not None  # products are made in the order of their issue
            return c.after.matrix
        known, product = self._last_product
        if list(map(id, known)) == list(map(id, c.old)):
            return product
        old = np.stack(c.old).view(f32).reshape(c.columns // 8, 2, 2, -1, 4, 8, 4)
        return old.transpose(3, 4, 1, 5, 0, 6, 2).reshape(-1, 64, c.columns)

    def _chunks(self, d: int, extent: int, size: int, trans: bool, i):
        """Chunks of a CTA's shared memory that a descriptor names, and the matrix's shape."""
        found = self._descriptors.get((d, extent, size, trans))
        if found is not None:
            return found
        start, leading, stride = ((d >> bit & FIELD) * 16 for bit in (0, 16, 32))
        if d >> 49 & 7:
            self.stop("a matrix descriptor with a base offset", i)
        span = SPANS[SWIZZLES[d >> 62]]
        plain = span == 16  # without a swizzle
        if trans:
            if size != 2:
                self.stop("a transposed operand of other than 16 bits", i)
            k, c = np.arange(16)[:, None], np.arange(extent // 8)[None, :]
            if plain:
                linear = k % 8 * 16 + k // 8 * leading + c * stride
            else:
                n = span // 16
                linear = c % n * 16 + c // n * leading + k % 8 * span + k // 8 * stride
            shape = 16, extent
        else:
            r, half = np.arange(extent)[:, None], np.arange(2)[None, :]
            linear = r % 8 * span + r // 8 * stride + half * (leading if plain else 16)
            shape = extent, 32 // size
        address = swizzled(start + linear, span)
        if (address < self.shared_base).any() or (address + 16 > self.shared_end).any():
            what = f"start {start}, leading {leading}, stride {stride}, swizzle {span}"
            self.stop(f"a matrix descriptor reaches outside shared memory: {what}", i)
        found = (address - self.shared_base).reshape(-1) // 16, shape
        self._descriptors[d, extent, size, trans] = found
        return found

    def wgmma_commit(self, L, i):
        self._product_count[np.unique(L.idx // 128)] += 1

    def wgmma_wait(self, L, n, i):
        """At most the last ``n`` groups of products are still under way."""
        if self.order is not None:
            done = self._product_count[L.warps // 4] - n
            self.order.waited(L.warps, self.order.products + self.order.own[L.warps] // 4, done)
        here = np.zeros(len(self._product_count), bool)
        here[L.idx // 128] = True
        for p in self._products:
            done = here[p.groups] & (p.number < self._product_count[p.groups] - n)
            p.waiting &= ~done
            if self.lazy and p.matrix is None and done.any():
                registers = p.accumulators.registers
                for number, value in zip(registers, self._multiply(p), strict=True):
                    old = self.R[number]
                    self.R[number] = value if p.L.full else self.replaced(old, p.L.idx, value)
        self._products = [p for p in self._products if p.waiting.any()]

    def finish_products(self) -> None:
        if self._products:
            what = "a CTA ended while wgmma was in flight"
            self.report("wgmma not waited for", self._products[0].instruction, detail=what)
