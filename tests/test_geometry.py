"""The geometry by itself: plain integers against brute force and against published figures."""

import itertools
from collections import Counter

import pytest
import torch
from cases import CONV_CASES, case_id, examples
from hypothesis import given
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format

from kernels.geometry import (
    Conv2dGeometry,
    Pool2dGeometry,
    ReceptiveField,
    channels_last_strides,
    contiguous_strides,
    conv_output_size,
    conv_transpose_output_size,
    dense_strides,
    dgrad_taps,
    full_padding,
    is_channels_last,
    largest_offset,
    pool_output_size,
    read_pixels,
    receptive_field,
    same_padding,
)


@st.composite
def axes(draw):
    """(size, kernel, stride, (before, after), dilation) of an axis with at least one place."""
    size, kernel, stride, dilation = (draw(st.integers(1, most)) for most in (12, 5, 6, 6))
    padding = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    short = dilation * (kernel - 1) + 1 - size - sum(padding)
    return size + max(0, short), kernel, stride, padding, dilation


def places(size, kernel, stride, padding, dilation):
    """First pixels of all placements that lie inside the padded axis, one by one."""
    last = size + padding[1] - dilation * (kernel - 1) - 1
    return [h for h in range(-padding[0], last + 1) if (h + padding[0]) % stride == 0]


def meetings(size, kernel, stride, padding, dilation):
    """Each (pixel, tap, place) of the forward definition that lies inside the input."""
    return Counter(
        (h + r * dilation, r, p)
        for p, h in enumerate(places(size, kernel, stride, padding, dilation))
        for r in range(kernel)
        if 0 <= h + r * dilation < size
    )


@examples(100)
@given(axes())
def test_output_size_counts_placements(axis):
    assert conv_output_size(*axis) == len(places(*axis))


@examples(100)
@given(axes())
def test_transpose_inverts_the_output_size(axis):
    size, kernel, stride, padding, dilation = axis
    p = conv_output_size(*axis)
    least = conv_transpose_output_size(p, kernel, stride, padding, dilation, 0)
    sizes = [
        conv_transpose_output_size(p, kernel, stride, padding, dilation, o) for o in range(stride)
    ]
    assert size in sizes
    assert all(conv_output_size(s, kernel, stride, padding, dilation) == p for s in sizes if s > 0)
    assert least == (p - 1) * stride + dilation * (kernel - 1) + 1 - sum(padding)


@examples(100)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5))
def test_same_keeps_the_size_and_full_reaches_each_touching_placement(size, kernel, dilation):
    before, after = same_padding(kernel, dilation)
    assert conv_output_size(size, kernel, 1, (before, after), dilation) == size
    assert after - before in (0, 1)
    reach = dilation * (kernel - 1)
    touching = [h for h in range(-4 * reach - 1, size) if -reach <= h]
    assert conv_output_size(size, kernel, 1, full_padding(kernel, dilation), dilation) == len(
        touching
    )


@examples(100)
@given(axes())
def test_dgrad_visits_each_meeting_once_and_nothing_that_misses(axis):
    size, kernel, stride, (before, _), dilation = axis
    count = conv_output_size(*axis)
    visited, pixels = Counter(), Counter()
    for t in dgrad_taps(size, kernel, stride, before, dilation):
        for i in range(t.count):
            pixels[t.first + t.stride * i] += 1
            for j in range(t.taps):
                place = t.origin + i - t.step * j
                if 0 <= place < count:
                    visited[t.first + t.stride * i, t.tap + t.tap_step * j, place] += 1
    assert pixels == Counter(range(size))
    assert visited == meetings(*axis)


@examples(100)
@given(axes())
def test_dgrad_skips_taps_that_can_never_contribute(axis):
    size, kernel, stride, (before, _), dilation = axis
    for t in dgrad_taps(size, kernel, stride, before, dilation):
        visited = {t.tap + t.tap_step * j for j in range(t.taps)}
        useful = {r for r in range(kernel) if (t.first + before - r * dilation) % stride == 0}
        assert visited == useful


def test_dgrad_is_the_product_of_its_axes():
    g = Conv2dGeometry(1, 1, 9, 8, 1, 3, 2, (2, 3), ((1, 0), (2, 1)), (1, 2))
    assert g.dgrad() == tuple(
        itertools.product(dgrad_taps(9, 3, 2, 1, 1), dgrad_taps(8, 2, 3, 2, 2))
    )


@pytest.mark.parametrize("g", CONV_CASES, ids=case_id)
def test_flops_count_each_tap_of_each_output(g):
    c = g.C // g.groups
    products = sum(
        1 for _ in itertools.product(*(range(size) for size in (g.N, g.K, g.P, g.Q, c, g.R, g.S)))
    )
    assert g.flops == 2 * products
    fprop, wgrad = g.gemm("fprop"), g.gemm("wgrad")
    assert products == g.groups * fprop.rows * fprop.columns * fprop.depth
    assert products == g.groups * wgrad.rows * wgrad.columns * wgrad.depth
    assert g.bytes(2) == 2 * (g.N * g.C * g.H * g.W + g.K * c * g.R * g.S + g.N * g.K * g.P * g.Q)
    read = {
        (h, w)
        for p, q, r, s in itertools.product(*(range(size) for size in (g.P, g.Q, g.R, g.S)))
        if 0 <= (h := p * g.stride[0] - g.padding[0][0] + r * g.dilation[0]) < g.H
        and 0 <= (w := q * g.stride[1] - g.padding[1][0] + s * g.dilation[1]) < g.W
    }
    assert read_pixels(g) == len(read)
    assert g.bytes(2, "wgrad") == g.bytes(2) - 2 * g.N * g.C * (g.H * g.W - len(read))


@pytest.mark.parametrize(
    ("g", "y_shape", "gflops", "megabytes"),
    [
        pytest.param(
            Conv2dGeometry(1, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3))),
            (1, 64, 112, 112),
            0.236027904,
            1.925504,
            id="ResNet-50 conv1",
        ),
        pytest.param(
            Conv2dGeometry(1, 64, 224, 224, 64, 3, 3, padding=((1, 1), (1, 1))),
            (1, 64, 224, 224),
            3.699376128,
            12.918784,
            id="VGG-16 conv1_2",
        ),
        pytest.param(
            Conv2dGeometry(1, 96, 27, 27, 256, 5, 5, padding=((2, 2), (2, 2)), groups=2),
            (1, 256, 27, 27),
            0.4478976,
            1.127616,
            id="AlexNet conv2",
        ),
        pytest.param(
            Conv2dGeometry(1, 512, 14, 14, 512, 3, 3, padding=((1, 1), (1, 1)), groups=512),
            (1, 512, 14, 14),
            0.001806336,
            0.410624,
            id="MobileNet depthwise",
        ),
    ],
)
def test_published_layers(g, y_shape, gflops, megabytes):
    assert g.y_shape == y_shape
    assert g.flops / 1e9 == gflops
    assert g.bytes(2) / 1e6 == megabytes


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("fprop", (50, 4, 27)), ("wgrad", (4, 27, 50)), ("dgrad", (242, 3, 9))],
)
def test_matrix_products(direction, expected):
    """dgrad's depth is the mean over the phases: 4 filters of (2 + 1)^2 / 4 taps."""
    g = Conv2dGeometry(2, 3, 11, 11, 4, 3, 3, stride=(2, 2))
    assert g.gemm(direction) == expected


def test_dgrad_multiplies_what_fprop_does_where_nothing_is_padded():
    g = Conv2dGeometry(1, 1, 12, 12, 1, 4, 4, stride=(4, 4))
    products = sum(row.count * row.taps * col.count * col.taps for row, col in g.dgrad())
    assert 2 * products == g.flops


def windows(size, kernel, stride, padding, dilation, ceil_mode):
    """First pixels of all pooling windows, by walking along the axis."""
    starts, start = [], -padding
    while True:
        end = start + dilation * (kernel - 1)
        inside = end < size + padding
        if not inside and not (ceil_mode and start < size and end < size + padding + stride - 1):
            return starts
        starts.append(start)
        start += stride


@st.composite
def pool_axes(draw):
    kernel = draw(st.integers(1, 5))
    stride, dilation = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    padding = draw(st.integers(0, kernel // 2))
    short = dilation * (kernel - 1) + 1 - 2 * padding
    size = max(draw(st.integers(1, 12)), short)
    return size, kernel, stride, padding, dilation, draw(st.booleans())


@examples(100)
@given(pool_axes())
def test_pool_output_size_counts_windows(axis):
    assert pool_output_size(*axis) == len(windows(*axis))


@examples(100)
@given(pool_axes())
def test_covering_is_the_most_windows_that_span_a_pixel(axis):
    size, kernel, stride, padding, dilation, ceil_mode = axis
    g = Pool2dGeometry(
        *(1, 1, size, size),
        *((kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation), ceil_mode),
    )
    span = dilation * (kernel - 1) + 1
    endless = Counter(
        h for start in range(0, 40 * stride, stride) for h in range(start, start + span)
    )
    assert g.covering == (max(endless.values()),) * 2
    covered = Counter(start + dilation * r for start in windows(*axis) for r in range(kernel))
    assert max(covered.values()) <= g.covering[0]


def test_pool_geometry():
    g = Pool2dGeometry(2, 64, 112, 112, (3, 3), (2, 2), (1, 1))
    assert g.x_shape == (2, 64, 112, 112)
    assert g.y_shape == (2, 64, 56, 56)
    assert g.taps == 9
    assert g.covering == (2, 2)
    assert g.bytes(2, offset_size=1) == 2 * 64 * (112 * 112 * 2 + 56 * 56 * 3)
    assert Pool2dGeometry(1, 1, 6, 5, (3, 2), (2, 3), ceil_mode=True).y_shape == (1, 1, 3, 2)


def conv(kernel, stride=1, padding=0, dilation=1):
    return Conv2dGeometry(
        *(1, 1, 1, 1, 1, kernel, kernel),
        stride=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dilation=(dilation, dilation),
    )


def pool(kernel, stride, padding=0):
    return Pool2dGeometry(1, 1, 1, 1, (kernel, kernel), (stride, stride), (padding, padding))


VGG16 = [
    layer
    for convolutions in (2, 2, 3, 3, 3)
    for layer in [conv(3, padding=1)] * convolutions + [pool(2, 2)]
]
ALEXNET = [
    *(conv(11, 4, 2), pool(3, 2), conv(5, padding=2), pool(3, 2)),
    *(conv(3, padding=1), conv(3, padding=1), conv(3, padding=1), pool(3, 2)),
]


@pytest.mark.parametrize(
    ("layers", "size", "stride", "offset"),
    [
        pytest.param([], 1, 1, 0, id="none"),
        pytest.param([conv(3), conv(3)], 5, 1, 0, id="two 3x3 see 5x5"),
        pytest.param([conv(3, dilation=2), conv(3, dilation=4)], 13, 1, 0, id="dilated"),
        pytest.param([conv(5), pool(2, 2), conv(5), pool(2, 2)], 16, 4, 0, id="LeNet-5 S4"),
        pytest.param([conv(7, 2, 3), pool(3, 2, 1)], 11, 4, -5, id="ResNet stem"),
        pytest.param(VGG16[:-1], 196, 16, -90, id="VGG-16 conv5_3"),
        pytest.param(VGG16, 212, 32, -90, id="VGG-16 pool5"),
        pytest.param(ALEXNET[:-1], 163, 16, -66, id="AlexNet conv5"),
        pytest.param(ALEXNET, 195, 32, -66, id="AlexNet pool5"),
    ],
)
def test_receptive_field(layers, size, stride, offset):
    field = receptive_field(layers)
    assert field.size == (size, size)
    assert field.stride == (stride, stride)
    assert field.offset == (offset, offset)


def test_receptive_field_keeps_axes_apart():
    tall = Conv2dGeometry(1, 1, 9, 9, 1, 5, 1, (3, 1), ((2, 1), (0, 0)), (2, 1))
    assert receptive_field([tall, tall]) == ((33, 1), (9, 1), (-8, 0))


def test_receptive_fields_of_branches_that_meet():
    """The second begins further left and ends further down."""
    one, other = ReceptiveField((5, 9), (4, 2), (-1, -3)), ReceptiveField((8, 3), (4, 2), (0, -5))
    assert one | other == other | one == ReceptiveField((9, 11), (4, 2), (-1, -5))
    with pytest.raises(ValueError, match="branches"):
        one | ReceptiveField((5, 9), (2, 2), (-1, -3))


def strides_in(shape, order):
    """Dense strides where the axes rise from first to last of ``order``."""
    strides, step = [0] * 4, 1
    for axis in order:
        strides[axis], step = step, step * max(1, shape[axis])
    return tuple(strides)


def layouts():
    """Shapes with strides: all dense orders of small shapes, and a grid of arbitrary strides."""
    for shape in itertools.product((0, 1, 2, 3), repeat=4):
        for order in itertools.permutations(range(4)):
            yield shape, strides_in(shape, order)
    for shape in itertools.product((1, 2), repeat=4):
        yield from ((shape, strides) for strides in itertools.product((0, 1, 2, 4), repeat=4))


def test_channels_last_is_what_torch_takes_for_it():
    """Torch's rule is asked twice: in Python, and by the layout its max-pool gives its result."""
    memory = torch.zeros(200)
    for shape, strides in set(layouts()):
        t = memory.as_strided(shape, strides)
        ours = is_channels_last(shape, strides)
        assert ours == (suggest_memory_format(t) == torch.channels_last), (shape, strides)
        if 0 not in shape:
            rule = channels_last_strides if ours else contiguous_strides
            assert rule(shape) == torch.max_pool2d(t, 1).stride(), (shape, strides)


@examples(100)
@given(
    st.tuples(*[st.integers(1, 4)] * 4),
    st.tuples(*[st.integers(0, 40)] * 4),
    st.permutations(range(4)),
    st.booleans(),
)
def test_a_new_tensor_takes_dense_strides_as_they_are(shape, strides, order, dense):
    if dense:
        strides = strides_in(shape, order)
    t = torch.zeros(500).as_strided(shape, strides)
    if torch.empty_like(t).stride() == strides:
        assert dense_strides(shape, strides) == strides
    else:
        rule = channels_last_strides if is_channels_last(shape, strides) else contiguous_strides
        assert dense_strides(shape, strides) == rule(shape)


def test_strides_and_offsets():
    shape = (2, 3, 5, 7)
    assert contiguous_strides(shape) == torch.empty(shape).stride()
    last = torch.empty(shape).to(memory_format=torch.channels_last)
    assert channels_last_strides(shape) == last.stride()
    assert largest_offset(shape, last.stride()) == last.numel() - 1
    assert largest_offset(shape, (1000, 0, 10, 1)) == 1000 + 40 + 6
