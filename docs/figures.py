"""Draws the figures of the documentation: ``python docs/figures.py``.

Each is drawn from what the library itself says: its geometry, its planner, its results. Those of
``FIGURES`` take a moment; ``train`` trains a network for two more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from sklearn.datasets import load_digits
from torch import Tensor
from triton.backends.compiler import GPUTarget

import cnn.__main__
import cnn.functional as F
from cnn import data
from kernels import cost_model, device, planner
from kernels.conv import descriptor_tiles, paired_columns
from kernels.geometry import Conv2dGeometry, Pool2dGeometry, full_padding, receptive_field
from kernels.problem import Problem
from kernels.tile import Tile, blocks_per_multiprocessor

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#6b46c1", "#718096"
PALE = {BLUE: "#d6e6f5", ORANGE: "#fbe0c8", GREEN: "#d3ecdd", PURPLE: "#e4dbf7", GREY: "#edf0f3"}
STYLE = {
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "font.sans-serif": ("DejaVu Sans", "Arial"),
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "triton-cnn",
}


def new(width: float, height: float, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure in inches with axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, [*axes[0]]


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw and write a file that depends on nothing but the figure."""
    with matplotlib.rc_context(STYLE):
        draw().savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def plain(axes: Axes, title: str, bounds: tuple[float, float, float, float]) -> None:
    """A drawing without scales; bounds are left, right, bottom and top, in cells."""
    axes.set_title(title, fontsize=10)
    axes.set(xlim=bounds[:2], ylim=bounds[2:], aspect="equal")
    axes.axis("off")


def cells(
    axes: Axes,
    texts: Sequence[Sequence[object]],
    colours: Sequence[Sequence[str]] | str,
    corner: tuple[float, float] = (0, 0),
    size: int = 9,
) -> None:
    """A table of square cells, whose first row is the upper one; ``corner`` is (column, row)."""
    rows, columns = len(texts), len(texts[0])
    left, top = corner
    if isinstance(colours, str):
        colours = [[colours] * columns] * rows
    image = [[matplotlib.colors.to_rgb(colour) for colour in row] for row in colours]
    place = left, left + columns, top + rows, top
    axes.imshow(image, extent=place, interpolation="none")
    rim = {"color": "white", "linewidth": 1.2, "zorder": 0.5}
    axes.hlines([top + i for i in range(rows + 1)], left, left + columns, **rim)
    axes.vlines([left + j for j in range(columns + 1)], top, top + rows, **rim)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text != "":
                at = left + j + 0.5, top + i + 0.53
                axes.text(*at, str(text), ha="center", va="center", fontsize=size)


def outline(
    axes: Axes,
    corner: tuple[float, float],
    size: tuple[float, float],
    colour: str,
    *,
    dashed: bool = False,
    width: float = 2.2,
) -> None:
    options = {"fill": False, "edgecolor": colour, "linewidth": width, "zorder": 3}
    box = Rectangle(corner, *size, linestyle="--" if dashed else "-", **options)
    axes.add_patch(box)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=GREY))
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(middle[0], middle[1] - 0.25, text, ha="center", va="bottom", color=GREY)


def picture(axes: Axes, values: Tensor, title: str, *, signed: bool = False) -> None:
    """A map; ``signed`` values are blue below zero and red above."""
    reach = values.abs().max().item()
    options = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach} if signed else {"cmap": "gray"}
    axes.imshow(values.detach().numpy(), interpolation="none", **options)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])


def digit(index: int = 3) -> Tensor:
    """One of scikit-learn's handwritten digits, [1, 1, 32, 32] from 0 to 1."""
    image = torch.tensor(load_digits().images[index] / 16, dtype=torch.float32)
    return torch.nn.functional.interpolate(image[None, None], (32, 32), mode="bilinear")


X = ((1, 2, 0, 1, 0), (0, 1, 3, 1, 1), (2, 1, 0, 0, 2), (1, 0, 1, 2, 1), (0, 2, 1, 0, 1))
FILTER = ((0, 1, 0), (1, -2, 1), (0, 1, 0))
EDGES = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))  # dark to the left, light to the right


def plane(values: Any) -> Tensor:
    """[1, 1, rows, columns] of numbers."""
    return torch.tensor(values, dtype=torch.float32)[None, None]


def integers(t: Tensor) -> list[list[int]]:
    return [[int(value) for value in row] for row in t[0, 0]]


def convolution() -> Figure:
    """One place of a convolution, number by number."""
    figure, (axes,) = new(7.2, 2.9, 1)
    y = integers(F.conv2d(plane(X), plane(FILTER)))
    cells(axes, X, PALE[BLUE])
    cells(axes, FILTER, PALE[ORANGE], (7, 1))
    cells(axes, y, PALE[GREEN], (12, 1))
    outline(axes, (1, 0), (3, 3), ORANGE)
    outline(axes, (13, 1), (1, 1), GREEN)
    for x, text, letter in (
        (2.5, "x, 5x5", BLUE),
        (8.5, "w, 3x3", ORANGE),
        (13.5, "y, 3x3", GREEN),
    ):
        axes.text(x, -0.35, text, ha="center", color=letter, fontweight="bold")
    axes.text(6, 2.5, "*", ha="center", va="center", fontsize=16)
    axes.text(11, 2.5, "=", ha="center", va="center", fontsize=16)
    taps = [(X[r][1 + s], FILTER[r][s]) for r in range(3) for s in range(3)]
    terms = " + ".join(f"{x}·{w}" if w >= 0 else f"{x}·({w})" for x, w in taps)
    axes.text(7.5, 5.75, f"y[0, 1] = {terms} = {y[0][1]}", ha="center", va="center")
    plain(axes, "", (-0.2, 15.2, 6.3, -0.9))
    return figure


def padding() -> Figure:
    """Windows of valid, same and full padding."""
    figure, panels = new(7.2, 2.9, 3)
    for axes, (name, rim) in zip(panels, (("valid", 0), ("same", 1), ("full", 2)), strict=True):
        g = Conv2dGeometry(1, 1, 5, 5, 1, 3, 3, padding=((rim, rim), (rim, rim)))
        assert name != "full" or full_padding(3, 1) == g.padding[0]
        side = 5 + 2 * rim
        inside = range(rim, rim + 5)
        colours = [
            [PALE[BLUE] if i in inside and j in inside else PALE[GREY] for j in range(side)]
            for i in range(side)
        ]
        texts = [
            ["" if i in inside and j in inside else 0 for j in range(side)] for i in range(side)
        ]
        cells(axes, texts, colours, (-rim, -rim))
        outline(axes, (-rim, -rim), (3, 3), ORANGE)
        last = -rim + g.Q - 1, -rim + g.P - 1
        outline(axes, last, (3, 3), ORANGE, dashed=True)
        plain(axes, f'padding="{name}": 5x5 → {g.P}x{g.Q}', (-2.2, 7.2, 7.2, -2.2))
    return figure


def stride() -> Figure:
    """The places of windows of stride 1, 2 and 3."""
    figure, panels = new(7.2, 2.8, 3)
    for axes, step in zip(panels, (1, 2, 3), strict=True):
        g = Conv2dGeometry(1, 1, 9, 9, 1, 3, 3, stride=(step, step))
        cells(axes, [[""] * 9] * 9, PALE[BLUE])
        for p in range(g.P):
            for q in range(g.Q):
                centre = q * step + 1.5, p * step + 1.5
                axes.plot(*centre, marker="o", markersize=4, color=GREEN)
        outline(axes, (0, 0), (3, 3), ORANGE)
        outline(axes, (step, 0), (3, 3), ORANGE, dashed=True)
        plain(axes, f"stride {step}: 9x9 → {g.P}x{g.Q}", (-0.2, 9.2, 9.2, -0.2))
    return figure


def scene() -> Tensor:
    """A red disc, a blue square and a green bar on grey, [1, 3, 48, 48] from 0 to 1."""
    i, j = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    image = torch.full((3, 48, 48), 0.55)
    image[:, (i - 15) ** 2 + (j - 15) ** 2 < 100] = torch.tensor([0.85, 0.2, 0.15])[:, None]
    image[:, (i > 26) & (i < 42) & (j > 5) & (j < 21)] = torch.tensor([0.15, 0.3, 0.8])[:, None]
    image[:, (abs(i + j - 64) < 5) & (j > 24)] = torch.tensor([0.2, 0.65, 0.3])[:, None]
    return image[None]


def colour_filters() -> Tensor:
    """Four filters [4, 3, 3, 3]: upright edges, level edges, red against blue, and green."""
    edges = torch.tensor(EDGES, dtype=torch.float32) / 8
    spot = torch.full((3, 3), 1 / 9)
    none = torch.zeros(3, 3)
    return torch.stack(
        [
            torch.stack([edges, edges, edges]),
            torch.stack([edges.T, edges.T, edges.T]),
            torch.stack([spot, none, -spot]),
            torch.stack([-spot / 2, spot, -spot / 2]),
        ]
    )


def channels() -> Figure:
    """One colour image, four filters, four maps."""
    figure, panels = new(7.6, 1.9, 5)
    image = scene()
    panels[0].imshow(image[0].permute(1, 2, 0).numpy(), interpolation="none")
    panels[0].set_title("x: 3 channels", fontsize=9)
    panels[0].set(xticks=[], yticks=[])
    maps = F.conv2d(image, colour_filters(), padding="same")[0]
    names = "upright edges", "level edges", "red, not blue", "green"
    for k, (axes, name) in enumerate(zip(panels[1:], names, strict=True)):
        picture(axes, maps[k], f"y[{k}]: {name}", signed=True)
        axes.title.set_fontsize(9)
    return figure


def lenet_windows() -> list[Conv2dGeometry | Pool2dGeometry]:
    """The convolutions and poolings of LeNet-5, for one image of 32x32."""
    first = Conv2dGeometry(1, 1, 32, 32, 6, 5, 5)
    pool = Pool2dGeometry(*first.y_shape, (2, 2), (2, 2))
    second = Conv2dGeometry(*pool.y_shape, 16, 5, 5)
    return [first, pool, second, Pool2dGeometry(*second.y_shape, (2, 2), (2, 2))]


def field() -> Figure:
    """What an output sees: through three layers of 3x3, and in LeNet-5."""
    figure, (left, right) = new(7.2, 3.1, 2, width_ratios=(1.25, 1))
    colours = BLUE, PURPLE, ORANGE, GREEN
    for depth in range(4):
        seen = [Conv2dGeometry(1, 1, 9, 9, 1, 3, 3)] * depth
        size = receptive_field(seen).size[1]
        row = 2 * depth + 1
        for j in range(9):
            colour = PALE[colours[3 - depth]] if abs(j - 4) <= size // 2 else PALE[GREY]
            left.add_patch(Rectangle((j, row), 1, 1, facecolor=colour, edgecolor="white"))
        if depth:
            for side in (-1, 1):
                line = (4.5 + side * (size - 2) / 2, 4.5 + side * size / 2), (row - 1, row)
                left.plot(*line, color=GREY, linewidth=1)
        text = f"{size} of the input" if depth == 3 else ("one output" if depth == 0 else size)
        left.text(9.3, row + 0.5, text, va="center")
    plain(left, "three layers of 3x3, stride 1", (-0.3, 13.5, 8.4, 0.3))
    picture(right, digit()[0, 0], "LeNet-5: what one output sees")
    layers = lenet_windows()
    names = "conv 5x5", "pool 2x2", "conv 5x5", "pool 2x2"
    for depth, (name, colour) in enumerate(zip(names, colours, strict=True), 1):
        size = receptive_field(layers[:depth]).size[0]
        # They all begin where the first output's window does.
        outline(right, (7.5, 7.5), (size, size), colour)
        right.plot([], [], color=colour, label=f"{name}: {size}x{size}")
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def relu() -> Figure:
    """A map before and after the ReLU."""
    figure, (curve, before, after) = new(7.2, 2.5, 3)
    x = torch.linspace(-2, 2, 101)
    curve.plot(x, x.relu(), color=ORANGE, linewidth=2)
    curve.set_title("relu(x) = max(x, 0)", fontsize=10)
    curve.set(xlabel="x", aspect="equal", xticks=(-2, 0, 2), yticks=(0, 1, 2))
    curve.grid(alpha=0.3)
    image, w = digit(), plane(EDGES)
    picture(before, F.conv2d(image, w)[0, 0], "a map of upright edges", signed=True)
    relu = F.conv2d(image, w, activation="relu")
    picture(after, relu[0, 0], "after the ReLU", signed=True)
    return figure


MAP = ((3, 1, 0, 2), (1, 4, 2, 2), (0, 2, 5, 1), (1, 0, 3, 6))


def max_pool() -> Figure:
    """Max-pooling 2x2, and the byte that is kept of each window."""
    figure, (axes,) = new(7.2, 2.4, 1)
    y, places = F.max_pool2d(plane(MAP), 2, return_indices=True)
    won = {int(i) for i in places.flatten()}
    window = (GREEN, ORANGE), (PURPLE, BLUE)
    shades = [[PALE[window[i // 2][j // 2]] for j in range(4)] for i in range(4)]
    cells(axes, MAP, shades)
    for i in won:
        corner = i % 4 + 0.08, i // 4 + 0.08
        outline(axes, corner, (0.84, 0.84), window[i // 8][i % 4 // 2])
    small = [[PALE[colour] for colour in row] for row in window]
    cells(axes, integers(y), small, (6.5, 1))
    offsets = [[int(i) // 4 % 2 * 2 + int(i) % 2 for i in row] for row in places[0, 0]]
    cells(axes, offsets, small, (11, 1))
    arrow(axes, (4.3, 2), (6.2, 2), "max")
    for x, text in ((2, "map, 4x4"), (7.5, "largest, 2x2"), (12, "tap that won")):
        axes.text(x, -0.4, text, ha="center")
    plain(axes, "", (-0.2, 14, 4.2, -1))
    return figure


def block() -> Figure:
    """Convolution, ReLU and max-pooling as one block."""
    figure, panels = new(7.6, 2.4, 4)
    image, w = digit(), plane(EDGES)
    y = F.conv2d_relu_max_pool2d(image, w, padding="same", pool_kernel_size=2)
    maps = (
        (image, "x: read once", False),
        (F.conv2d(image, w, padding="same"), "convolution", True),
        (F.conv2d(image, w, padding="same", activation="relu"), "ReLU", True),
        (y, "y: stored", True),
    )
    for axes, (values, name, signed) in zip(panels, maps, strict=True):
        size = "x".join(map(str, values.shape[2:]))
        picture(axes, values[0, 0], f"{name}\n{size}", signed=signed)
    for axes in panels[1:3]:
        axes.set_xlabel("never stored", color=GREY)
        for spine in axes.spines.values():
            spine.set(linestyle="--", linewidth=1.5)
    return figure


def implicit_gemm() -> Figure:
    """The matrix that is never stored: which pixel stands in each row and column."""
    g = Conv2dGeometry(1, 1, 4, 4, 4, 3, 3, padding=((1, 1), (1, 1)))
    figure, (axes,) = new(8, 4.9, 1)
    shades = matplotlib.colormaps["viridis"]

    def shade(pixel: int) -> str:
        return matplotlib.colors.to_hex([0.35 + 0.65 * c for c in shades(pixel / 15)[:3]])

    pixels = [[4 * h + w for w in range(4)] for h in range(4)]
    cells(axes, pixels, [[shade(pixel) for pixel in row] for row in pixels], (0, 6))
    outline(axes, (-1, 5), (6, 6), GREY, dashed=True, width=1)
    stride_h, top, step_h, stride_w, left, step_w = g.index_map
    texts, colours = [], []
    for p in range(g.P):
        for q in range(g.Q):
            met = [
                (p * stride_h + top + r * step_h, q * stride_w + left + s * step_w)
                for r in range(g.R)
                for s in range(g.S)
            ]
            inside = [0 <= h < g.H and 0 <= w < g.W for h, w in met]
            row = [4 * h + w if ok else "" for (h, w), ok in zip(met, inside, strict=True)]
            texts.append(row)
            colours.append([PALE[GREY] if pixel == "" else shade(pixel) for pixel in row])
    cells(axes, texts, colours, (7.5, 0), 7)
    cells(axes, [[""] * 4] * 9, PALE[ORANGE], (18.5, 0))
    cells(axes, [[""] * 4] * 16, PALE[GREEN], (24.5, 0))
    outline(axes, (7.5, 8), (9, 8), PURPLE)
    outline(axes, (18.5, 0), (2, 9), PURPLE)
    outline(axes, (24.5, 8), (2, 8), PURPLE)
    outline(axes, (10.5, 8), (3, 8), PURPLE, dashed=True, width=1.5)
    outline(axes, (18.5, 3), (2, 3), PURPLE, dashed=True, width=1.5)
    axes.text(17.5, 4.5, "x", ha="center", va="center", fontsize=13)
    axes.text(23.5, 4.5, "=", ha="center", va="center", fontsize=13)
    for x, y, text in (
        (2, 4.4, "x, 4x4, padding 1"),
        (12, -0.5, "pixels that meet taps: never stored"),
        (20.5, -0.5, "taps x filters"),
        (26.5, -0.5, "pixels x filters"),
    ):
        axes.text(x, y, text, ha="center")
    axes.text(
        17.7,
        11.1,
        "solid: one program's tile\ndashed: one turn\nof its loop",
        color=PURPLE,
        va="top",
    )
    plain(axes, "", (-1.3, 29, 16.4, -1.3))
    return figure


def descriptor_box() -> Figure:
    """Boxes that a descriptor loads: shifted by a tap, and of one phase under a stride of two."""
    figure, (left, right) = new(7.6, 3.7, 2)
    g = Conv2dGeometry(1, 1, 8, 8, 1, 3, 3, padding=((1, 1), (1, 1)))
    _, top, step_h, _, start, step_w = g.index_map
    cells(left, [[""] * 10] * 10, PALE[GREY], (-1, -1))
    cells(left, [[""] * 8] * 8, PALE[BLUE])
    for (r, s), colour in (((0, 0), ORANGE), ((2, 2), GREEN)):
        corner = start + s * step_w, 4 + top + r * step_h
        outline(left, corner, (8, 4), colour)
        left.text(corner[0] + 0.3, corner[1] + 0.62, f"tap ({r}, {s})", color=colour, fontsize=8)
    left.text(3.5, 1.5, "x, 8x8", color=BLUE)
    left.text(3.5, -0.35, "reads as zero", color=GREY, fontsize=8)
    plain(left, "stride 1: a box of 4x8 places, two taps", (-1.3, 9.3, 9.3, -1.3))

    g = Conv2dGeometry(1, 1, 8, 8, 1, 3, 3, stride=(2, 2), padding=((1, 1), (1, 1)))
    tints = (BLUE, ORANGE), (GREEN, PURPLE)
    shades = [[PALE[tints[h % 2][w % 2]] for w in range(8)] for h in range(8)]
    cells(right, [[""] * 10] * 10, PALE[GREY], (-1, -1))
    cells(right, [[""] * 8] * 8, shades)
    for (r, s), marker in (((0, 0), "o"), ((1, 2), "x")):
        rows = [p * g.stride[0] + g.index_map.origin_h + r for p in range(g.P)]
        columns = [q * g.stride[1] + g.index_map.origin_w + s for q in range(g.Q)]
        points = [(w + 0.5, h + 0.5) for h in rows for w in columns]
        colour = tints[rows[0] % 2][columns[0] % 2]
        options = {"linestyle": "", "marker": marker, "color": colour, "markersize": 6}
        right.plot(*zip(*points, strict=True), **options, label=f"tap ({r}, {s})")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, frameon=False)
    plain(right, "stride 2: four phases, each a view of its own", (-1.3, 9.3, 9.3, -1.3))
    return figure


def boxes() -> Figure:
    """How the planner's boxes of 128 pixels cover a map of 28x28."""
    family = descriptor_tiles._BOXES[128][:4]
    figure, panels = new(7.6, 2.5, len(family))
    for axes, (n, p, q) in zip(panels, family, strict=True):
        rows, columns = -(-28 // p), -(-28 // q)
        axes.add_patch(Rectangle((0, 0), columns * q, rows * p, facecolor=PALE[ORANGE]))
        axes.add_patch(Rectangle((0, 0), 28, 28, facecolor=PALE[BLUE]))
        axes.hlines([i * p for i in range(rows + 1)], 0, columns * q, color=BLUE, linewidth=0.8)
        axes.vlines([j * q for j in range(columns + 1)], 0, rows * p, color=BLUE, linewidth=0.8)
        waste = 1 - 28 * 28 / (rows * p * columns * q)
        plain(axes, f"{n} x {p} x {q}\nwaste {waste:.0%}", (-0.5, 32.5, 32.5, -0.5))
    return figure


def phases() -> Figure:
    """dgrad of stride 2: which taps serve which pixels."""
    g = Conv2dGeometry(1, 1, 7, 7, 1, 3, 3, stride=(2, 2), padding=((1, 1), (1, 1)))
    figure, (axes,) = new(7.4, 2.7, 1)
    tints = {(0, 0): BLUE, (0, 1): ORANGE, (1, 0): GREEN, (1, 1): PURPLE}
    shades = [[PALE[tints[h % 2, w % 2]] for w in range(7)] for h in range(7)]
    cells(axes, [[""] * 7] * 7, shades)
    axes.text(3.5, -0.4, "dx, 7x7", ha="center")
    for i, (row, column) in enumerate(g.dgrad()):
        colour = tints[row.first, column.first]
        rows = [row.tap + row.tap_step * j for j in range(row.taps)]
        columns = [column.tap + column.tap_step * j for j in range(column.taps)]
        corner = 9 + i % 2 * 8, i // 2 * 4.2
        taps = [[r in rows and s in columns for s in range(3)] for r in range(3)]
        cells(
            axes,
            [[f"{r},{s}" if taps[r][s] else "" for s in range(3)] for r in range(3)],
            [[PALE[colour] if tap else PALE[GREY] for tap in line] for line in taps],
            corner,
            7,
        )
        pixels, used = f"{row.count}x{column.count} pixels", len(rows) * len(columns)
        text = f"{pixels}\n{used} tap{'s' * (used > 1)} of 9"
        axes.text(corner[0] + 3.4, corner[1] + 1.5, text, va="center", color=colour)
    plain(axes, "", (-0.3, 25, 7.4, -1))
    return figure


WINDOW = ((0.5, 2.0, -1.0), (2.0, 1.5, 0.25), (-0.5, 0.0, 1.0))


def fused_pool() -> Figure:
    """A box of the map with its windows, and how one maximum keeps value and tap."""
    figure, (left, right) = new(8, 3.9, 2, width_ratios=(1, 1.35))
    cells(left, [[""] * 16] * 16, PALE[BLUE])
    left.add_patch(Rectangle((15, 0), 1, 16, facecolor=PALE[GREY]))
    left.add_patch(Rectangle((0, 15), 16, 1, facecolor=PALE[GREY]))
    for i in range(7):
        for j in range(7):
            left.plot(2 * j + 1.5, 2 * i + 1.5, marker="o", markersize=3, color=GREEN)
    outline(left, (0, 0), (3, 3), ORANGE)
    outline(left, (2, 0), (3, 3), PURPLE, dashed=True)
    left.text(8, 16.9, "grey: in no whole window here", ha="center", va="center", color=GREY)
    plain(
        left, "16x16 pixels of the map hold 7x7\nwindows of 3x3 every 2", (-0.3, 16.3, 17.6, -0.3)
    )

    values = torch.tensor(WINDOW, dtype=torch.bfloat16)
    identity = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    numbers = [1, 1], [0, 0, 0, 0], [1, 1], 1, None, [3, 3], [2, 2], [0, 0], True
    y, offset = torch.ops.triton_cnn.conv2d_relu_max_pool2d(
        values[None, None], identity, None, *numbers
    )
    bits = values.relu().view(torch.int16).int() << 16
    tags = torch.arange(8, -1, -1).view(3, 3)
    keys = bits + tags
    best = int(keys.argmax())
    assert (int(offset), float(y)) == (best, float(values.flatten()[best]))
    cells(right, [[f"{v:g}" for v in row] for row in values.tolist()], PALE[BLUE], (0, 1.2))
    right.text(1.5, 0.8, "a window", ha="center")
    arrow(right, (3.3, 2.7), (4.4, 2.7))
    for i in range(3):
        for j in range(3):
            at, key = (4.7 + 2.75 * j, 1.2 + i), int(keys[i, j])
            won = 3 * i + j == best
            colour = PALE[ORANGE] if won else PALE[GREEN]
            right.add_patch(Rectangle(at, 2.7, 0.94, facecolor=colour))
            text = f"{key >> 16:04x} {key & 0xFFFF:04x}"
            weight = "bold" if won else "normal"
            right.text(
                at[0] + 1.35, at[1] + 0.5, text, ha="center", va="center", family="monospace",
                fontsize=8, fontweight=weight,
            )  # fmt: skip
    right.text(8.8, 0.8, "keys: bits of relu(value), then 8 - tap", ha="center")
    largest = int(keys.max())
    right.text(
        6.5, 5.6, f"largest key {largest >> 16:04x} {largest & 0xFFFF:04x}", ha="center",
        color=ORANGE, fontweight="bold",
    )  # fmt: skip
    right.text(6.5, 6.5, f"y = {float(y):g}, and one byte: tap {int(offset)}", ha="center")
    plain(right, "one integer keeps value and place", (-0.2, 13.2, 7, 0))
    return figure


def hopper() -> device.Device:
    """A typical device of sm_90, without one."""
    with device.launch_nothing(GPUTarget("cuda", 90, 32)):
        return device.describe(torch.device("cuda"))


LAYER = Conv2dGeometry(256, 256, 14, 14, 256, 3, 3, padding=((1, 1), (1, 1)))  # of ResNet-50


def name_of(tile: Tile) -> str:
    box = "x".join(map(str, tile.box or ()))
    return f"{tile.rows}x{tile.columns}x{tile.depth}, box {box}"


def planner_model() -> Figure:
    """What the planner predicts of each tile of the family."""
    figure, (axes,) = new(7.6, 4.4, 1)
    here = hopper()
    problem = Problem("fprop", LAYER, torch.bfloat16, "ieee", here, "aligned")
    plans, rate = planner.candidates(problem), cost_model.rate(torch.bfloat16, "ieee", here)
    shown = [plan for plan in plans if plan.tile.box and plan.tile.box[0] < plan.tile.rows][:10]
    everywhere = here.multiprocessors * here.peaks.clock * 1e6
    parts: dict[str, list[float]] = {"tensor cores": [], "L2": [], "memory": []}
    for _, tile, *_ in shown:
        (work,) = cost_model.launches("fprop", LAYER, tile)
        turn = cost_model.turn_cycles("fprop", tile, 2, rate, here)
        together = here.multiprocessors * blocks_per_multiprocessor(tile, 2, here)
        in_waves = -(-work.programs // together) * together
        for name, programs in (("tensor cores", in_waves), ("L2", work.programs)):
            parts[name].append(1e3 * programs * work.k_tiles * turn[name] / everywhere)
        parts["memory"].append(1e3 * LAYER.bytes(2) / (here.peaks.memory * 1e6))
    for i, (name, colour) in enumerate(zip(parts, (BLUE, GREEN, PURPLE), strict=True)):
        at = [j + 0.25 * (i - 1) for j in range(len(shown))]
        axes.barh(at, parts[name], 0.22, color=colour, label=name)
    times = [1e3 * plan.ms for plan in shown]
    axes.plot(times, range(len(shown)), "D", color=ORANGE, label="predicted time")
    axes.axvline(
        1e3 * cost_model.roofline(problem),
        color=GREY,
        linestyle="--",
        linewidth=1,
        label="roofline",
    )
    for j, time in enumerate(times):
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{time:.0f}", (time, j), **beside, fontsize=8)
    axes.set(yticks=range(len(shown)), yticklabels=[name_of(plan.tile) for plan in shown])
    axes.set(xlabel="µs, on a typical Hopper", xlim=(0, max(times) * 1.1))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1))
    return figure


def wgrad_splits() -> Figure:
    """Predicted time of wgrad by the number of parts of its reduction."""
    figure, (axes,) = new(6.4, 2.7, 1)
    problem = Problem("wgrad", LAYER, torch.bfloat16, "ieee", hopper(), "aligned")
    best = planner.plan(problem)
    split_k = [*range(1, 33)]
    times = [1e3 * cost_model.predict(problem, replace(best.tile, split_k=n)).ms for n in split_k]
    axes.plot(split_k, times, color=BLUE, marker=".")
    axes.plot(best.tile.split_k, 1e3 * best.ms, "D", color=ORANGE, label="the planner's choice")
    axes.set(xlabel="parts of the sum over pixels", ylabel="predicted µs", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def pairs() -> Figure:
    """The run of a first layer that two neighbouring outputs share."""
    g = Conv2dGeometry(1, 3, 224, 224, 64, 7, 7, (2, 2), ((3, 3), (3, 3)))
    run = paired_columns._run(g, 0, True, 2)
    figure, (axes,) = new(8, 1.5, 1)
    tints = "#f6c9c4", "#cfe8d2", "#cbdcf4"
    used = range(run.lead, run.lead + run.columns * g.C)
    texts = [["rgb"[(j - run.lead) % 3] if j in used else "" for j in range(run.segment)]]
    shades = [[tints[(j - run.lead) % 3] if j in used else PALE[GREY] for j in range(run.segment)]]
    cells(axes, texts, shades, (0, 1.6), 8)
    for half, colour in ((0, ORANGE), (1, PURPLE)):
        first = run.lead + half * g.stride[1] * g.C
        row = 0.2 if half == 0 else 3.1
        box = Rectangle((first, row), g.S * g.C, 0.9, facecolor=PALE[colour], edgecolor=colour)
        axes.add_patch(box)
        name = "filter, for the left output" if half == 0 else "the same, for its neighbour"
        axes.text(first + g.S * g.C / 2, row + 0.5, name, ha="center", va="center", color=colour)
    title = f"a row of x: {run.columns} pixels of {g.C} channels, padded to {run.segment} elements"
    plain(axes, title, (-0.3, run.segment + 0.3, 4.2, 0))
    return figure


FIGURES = {
    "convolution": convolution,
    "padding": padding,
    "stride": stride,
    "channels": channels,
    "field": field,
    "relu": relu,
    "max_pool": max_pool,
    "block": block,
    "implicit_gemm": implicit_gemm,
    "descriptor_box": descriptor_box,
    "boxes": boxes,
    "phases": phases,
    "fused_pool": fused_pool,
    "planner_model": planner_model,
    "wgrad_splits": wgrad_splits,
    "pairs": pairs,
}


def answers(network: torch.nn.Module) -> Figure:
    """What a trained network says of five digits that it never saw."""
    sets = data.load("digits", None, 0)
    prepare = data.Normalize(sets.description, torch.device("cpu"))
    some = [sets.test[i] for i in (0, 70, 140, 210, 280)]
    figure = Figure(figsize=(7.6, 3), layout="constrained")
    panels = figure.subplots(2, 5, height_ratios=(1, 0.8))
    for (image, _), (above, below) in zip(some, zip(*panels, strict=True), strict=True):
        picture(above, image[0], "")
        with torch.no_grad():
            chances = network(prepare(image[None]))[0].softmax(0)
        colours = [ORANGE if k == int(chances.argmax()) else GREY for k in range(10)]
        below.bar(range(10), chances.numpy(), color=colours)
        below.set(xticks=range(10), yticks=(0, 1), ylim=(0, 1.05))
        below.tick_params(labelsize=7)
    return figure


def train(folder: Path) -> None:
    """Train LeNet-5 on the digits and keep its curves and answers in the folder."""
    words = "train --model lenet5 --data digits --epochs 5 --batch-size 32 --lr 0.005 --output"
    with TemporaryDirectory() as run:
        cnn.__main__.main([*words.split(), run, "--overwrite"])
        (folder / "training.png").write_bytes(Path(run, "curves.png").read_bytes())
        network, *_ = cnn.load(run)
    save(lambda: answers(network), folder / "answers.svg")


def main(names: Iterable[str] = FIGURES) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        save(FIGURES[name], FOLDER / f"{name}.svg")
    train(FOLDER)


if __name__ == "__main__":
    main()
