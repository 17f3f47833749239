"""Which pixels meet which taps: convolutions and pooling windows as plain integers.

Nothing here knows tensors or GPUs. Letters are the field's: ``x[N, C, H, W]``, ``w[K, C/groups,
R, S]``, ``y[N, K, P, Q]``. Sizes and strides are in elements, pairs are ``(height, width)``. The
functions use plain arithmetic and comparisons only, so that they also take symbolic sizes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd, prod
from typing import Literal, NamedTuple, Protocol

Pair = tuple[int, int]
Direction = Literal["fprop", "dgrad", "wgrad"]


def conv_output_size(size: int, kernel: int, stride: int, padding: Pair, dilation: int) -> int:
    """Number of outputs of a convolution along one axis; ``padding`` is (before, after)."""
    before, after = padding
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def conv_output_sizes(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Pair:
    """(P, Q) of a convolution of (H, W) = ``size``; ``padding`` is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return (
        conv_output_size(size[0], kernel[0], stride[0], (top, bottom), dilation[0]),
        conv_output_size(size[1], kernel[1], stride[1], (left, right), dilation[1]),
    )


def conv_transpose_output_size(
    size: int, kernel: int, stride: int, padding: Pair, dilation: int, output_padding: int
) -> int:
    """Size along one axis of the input whose convolution has ``size`` outputs."""
    before, after = padding
    return (size - 1) * stride - before - after + dilation * (kernel - 1) + output_padding + 1


def conv_transpose_padding(
    padding: Pair, output_padding: Pair, stride: Pair
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the convolution that a transposed one is the gradient of.

    Dilation admits output padding that no window of this convolution reaches: the last windows then
    end before the image, as negative padding has it.
    """
    (top, left), (below, beside) = padding, output_padding
    bottom, right = top - max(0, below - stride[0] + 1), left - max(0, beside - stride[1] + 1)
    return top, bottom, left, right


def pool_output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Number of windows along one axis; with ``ceil_mode`` each starts inside the padded input."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    outputs = (room + stride - 1) // stride + 1
    return outputs - 1 if (outputs - 1) * stride >= size + padding else outputs


def same_padding(kernel: int, dilation: int) -> Pair:
    """Padding that keeps a stride-1 output as large as its input; an odd pixel goes after."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def full_padding(kernel: int, dilation: int) -> Pair:
    """Padding with which each placement that touches the input counts."""
    return dilation * (kernel - 1), dilation * (kernel - 1)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Strides of a dense N, C, H, W tensor that is stored as N, H, W, C."""
    _, c, h, w = shape
    return h * w * c, 1, w * c, c


def contiguous_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Strides of a dense N, C, H, W tensor that is stored in this order."""
    _, c, h, w = shape
    return c * h * w, h * w, w, 1


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether torch takes these strides for channels_last.

    Its rule, ``suggest_memory_format``: strides that rise in the order C, W, H, N, where a shape
    that could be either (one channel, or one pixel) is not channels_last.
    """
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or strides[axis] < least:
            return False
        if axis == 0 and least == strides[1]:
            return False
        least = strides[axis]
        if shape[axis] > 1:
            least = least * shape[axis]
    return True


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides for a new tensor like this one: its own if it is dense, else its memory format's."""
    expected = 1
    for axis in sorted(range(len(shape)), key=lambda axis: strides[axis]):
        if shape[axis] > 1:
            if strides[axis] != expected:
                break
            expected = expected * shape[axis]
    else:
        return tuple(strides)
    return output_strides(shape, is_channels_last(shape, strides))


def output_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, int, int, int]:
    """Strides of a new result in one of torch's two memory formats."""
    return channels_last_strides(shape) if channels_last else contiguous_strides(shape)


def largest_offset(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Distance from a tensor's first element to its last, in elements; views count in full."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Taps(NamedTuple):
    """One axis of one phase of dgrad: a stride-1 convolution with a subset of the taps.

    It writes the pixels ``h = first + stride * i`` for ``i < count``, with the taps
    ``r = tap + tap_step * j`` for ``j < taps``, reading ``dy`` at ``p = i + origin - step * j``.
    """

    first: int
    stride: int
    count: int
    tap: int
    tap_step: int
    taps: int
    origin: int
    step: int


def dgrad_taps(size: int, kernel: int, stride: int, before: int, dilation: int) -> tuple[Taps, ...]:
    """The phases of one axis, each with exactly the taps that can contribute to it.

    Tap ``r`` of output ``p`` reads pixel ``h = p * stride - before + r * dilation``; so a pixel
    meets tap ``r`` only if ``stride`` divides ``h + before - r * dilation``, which recurs every
    ``stride / gcd(stride, dilation)`` taps.
    """
    tap_step = stride // gcd(stride, dilation)
    phases = []
    for first in range(min(stride, size)):
        distance = first + before
        first_taps = range(min(tap_step, kernel))
        tap = next((r for r in first_taps if (distance - r * dilation) % stride == 0), kernel)
        taps = max(0, -((tap - kernel) // tap_step))
        phases.append(
            Taps(
                first=first,
                stride=stride,
                count=(size - first + stride - 1) // stride,
                tap=tap if taps else 0,
                tap_step=tap_step,
                taps=taps,
                origin=(distance - tap * dilation) // stride if taps else 0,
                step=tap_step * dilation // stride,
            )
        )
    return tuple(phases)


class IndexMap(NamedTuple):
    """Where output (p, q) and tap (r, s) meet: row ``p * stride_h + origin_h + r * step_h`` of x,
    likewise its column.
    """

    stride_h: int
    origin_h: int
    step_h: int
    stride_w: int
    origin_w: int
    step_w: int


class Gemm(NamedTuple):
    """Sizes of a matrix product: rows x depth times depth x columns, once for each group."""

    rows: int
    columns: int
    depth: int


@dataclass(frozen=True, slots=True)
class Conv2dGeometry:
    """A 2-D convolution ``y[n,k,p,q] = sum x[n,c,h,w] * w[k,c,r,s]``, as integers.

    ``h = p * stride[0] - padding[0][0] + r * dilation[0]``, likewise for the width; a pixel
    outside the input counts as zero. ``padding`` is ((top, bottom), (left, right)).
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        w_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> "Conv2dGeometry":
        """From the shapes of x and w; ``padding`` is (top, bottom, left, right)."""
        top, bottom, left, right = padding
        (N, C, H, W), (K, _, R, S) = x_shape, w_shape
        pairs = (stride[0], stride[1]), ((top, bottom), (left, right)), (dilation[0], dilation[1])
        return cls(N, C, H, W, K, R, S, *pairs, groups)

    @property
    def P(self) -> int:
        return conv_output_size(self.H, self.R, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        return conv_output_size(self.W, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def kernel(self) -> Pair:
        return self.R, self.S

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, self.R, self.S

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.P, self.Q

    @property
    def pointwise(self) -> bool:
        """Whether each output reads its own pixel only: a plain product over all pixels."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == ((0, 0), (0, 0))

    @property
    def index_map(self) -> IndexMap:
        (top, _), (left, _) = self.padding
        (stride_h, stride_w), (step_h, step_w) = self.stride, self.dilation
        return IndexMap(stride_h, -top, step_h, stride_w, -left, step_w)

    @property
    def flops(self) -> int:
        """Multiplications and additions, those with padding included: the field's convention."""
        return 2 * prod(self.y_shape) * prod(self.w_shape[1:])

    def bytes(self, itemsize: int, direction: Direction = "dgrad") -> int:
        """Least traffic: each of w, y and x moved once; of x only pixels that a tap reads, though
        dgrad writes all.
        """
        pixels = self.H * self.W if direction == "dgrad" else read_pixels(self)
        x = self.N * self.C * pixels
        return itemsize * (x + prod(self.w_shape) + prod(self.y_shape))

    def gemm(self, direction: Direction) -> Gemm:
        """The matrix product of one group; dgrad's depth is its mean over the phases."""
        c, k, taps = self.C // self.groups, self.K // self.groups, self.R * self.S
        pixels = self.N * self.P * self.Q
        if direction == "fprop":
            return Gemm(pixels, k, c * taps)
        if direction == "wgrad":
            return Gemm(k, c * taps, pixels)
        phases = [h.taps * w.taps for h, w in self.dgrad()]
        return Gemm(self.N * self.H * self.W, c, k * sum(phases) // max(1, len(phases)))

    def dgrad(self) -> tuple[tuple[Taps, Taps], ...]:
        """dx as stride[0] * stride[1] independent stride-1 convolutions, one for each phase.

        No zeros are inserted, and no tap is visited that cannot contribute. A phase may have no
        tap at all: its pixels get zero.
        """
        rows, columns = (
            dgrad_taps(size, kernel, stride, padding[0], dilation)
            for size, kernel, stride, padding, dilation in zip(
                (self.H, self.W), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return tuple((row, column) for row in rows for column in columns)


@dataclass(frozen=True, slots=True)
class Pool2dGeometry:
    """Windows of a 2-D pooling over ``x[N, C, H, W]``; padded pixels never win."""

    N: int
    C: int
    H: int
    W: int
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    @property
    def P(self) -> int:
        return pool_output_size(
            self.H,
            self.kernel[0],
            self.stride[0],
            self.padding[0],
            self.dilation[0],
            self.ceil_mode,
        )

    @property
    def Q(self) -> int:
        return pool_output_size(
            self.W,
            self.kernel[1],
            self.stride[1],
            self.padding[1],
            self.dilation[1],
            self.ceil_mode,
        )

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.P, self.Q

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def covering(self) -> Pair:
        """How many windows at most cover a pixel, along each axis."""
        rows, columns = (
            (dilation * (kernel - 1)) // stride + 1
            for kernel, stride, dilation in zip(
                self.kernel, self.stride, self.dilation, strict=True
            )
        )
        return rows, columns

    def bytes(self, itemsize: int, offset_size: int = 0) -> int:
        """Least traffic of one direction, with ``offset_size`` bytes kept for each output."""
        return itemsize * prod(self.x_shape) + (itemsize + offset_size) * prod(self.y_shape)


class Window(Protocol):
    """What a layer must tell to be part of a receptive field."""

    @property
    def kernel(self) -> Pair: ...
    @property
    def stride(self) -> Pair: ...
    @property
    def padding(self) -> tuple[Pair, Pair] | Pair: ...
    @property
    def dilation(self) -> Pair: ...


class ReceptiveField(NamedTuple):
    """Output (p, q) sees ``size`` input pixels from ``offset + stride * (p, q)`` on.

    ``offset`` is negative if the first window starts in the padding.
    """

    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    offset: Pair = (0, 0)

    def through(self, layer: Window) -> "ReceptiveField":
        """That of a layer whose input has this one.

        It is wider by the layer's own reach times the stride of all layers before it (Araujo,
        Norris, Sim: "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019,
        section 2).
        """
        size, stride, offset = list(self.size), list(self.stride), list(self.offset)
        for axis in (0, 1):
            before = layer.padding[axis]
            offset[axis] -= stride[axis] * (before[0] if isinstance(before, tuple) else before)
            size[axis] += stride[axis] * layer.dilation[axis] * (layer.kernel[axis] - 1)
            stride[axis] *= layer.stride[axis]
        return ReceptiveField((size[0], size[1]), (stride[0], stride[1]), (offset[0], offset[1]))

    def __or__(self, other: "ReceptiveField") -> "ReceptiveField":
        """The least that holds both, where branches of one stride meet."""
        if self.stride != other.stride:
            raise ValueError(f"branches of strides {self.stride} and {other.stride} do not meet")
        axes = [
            (min(a, b), max(a + m, b + n))
            for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True)
        ]
        (top, bottom), (left, right) = axes
        return ReceptiveField((bottom - top, right - left), self.stride, (top, left))


def receptive_field(layers: Iterable[Window]) -> ReceptiveField:
    """What one output of a chain of convolutions and poolings sees of the input, in pixels."""
    return reduce(ReceptiveField.through, layers, ReceptiveField())


def read_pixels(g: Conv2dGeometry | Pool2dGeometry) -> int:
    """How many pixels of an image some tap reads."""
    axes = zip((g.H, g.W), (g.P, g.Q), g.kernel, g.stride, g.padding, g.dilation, strict=True)
    read = []
    for size, outputs, taps, stride, padding, dilation in axes:
        before = padding if isinstance(padding, int) else padding[0]
        at = {p * stride + tap * dilation - before for p in range(outputs) for tap in range(taps)}
        read.append(len(at & set(range(size))))
    return prod(read)


class Placement(NamedTuple):
    """Result (p, q) is in row ``p * step_p + first_p`` of y, likewise in its column."""

    step_p: int = 1
    first_p: int = 0
    step_q: int = 1
    first_q: int = 0


def dgrad_index_map(row: Taps, column: Taps) -> tuple[IndexMap, Placement]:
    """How one phase of dx, at its ``Placement``, is a convolution of dy."""
    index_map = IndexMap(1, row.origin, -row.step, 1, column.origin, -column.step)
    return index_map, Placement(row.stride, row.first, column.stride, column.first)
