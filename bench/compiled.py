"""Read the machine code of the planner's choices, without a GPU: one row per layer and direction.

Each row compiles what the operator would launch for aligned channels_last operands. Counts are per
thread: in one iteration of the steady loop, and after that loop for one tile. ``issue_share`` is
the share of the tensor cores' time in which the schedulers issue other instructions.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton import knobs

from kernels import planner
from kernels.conv.engine import Call, Dgrad, Fprop, Plan, PooledConv, Wgrad
from kernels.device import Device
from kernels.geometry import Conv2dGeometry, Direction, Pool2dGeometry
from kernels.lang.epilogue import Epilogue
from kernels.ops.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d_backward
from kernels.ops.tensors import resolve_precision
from kernels.pool import max_pool, pool_gradient
from kernels.problem import Problem, layout_of
from kernels.tile import Tile

from . import assembly, dataflow, measure, selection, suites
from ._private import Compilation, listen, module_of
from .errors import UsageError
from .measure import DTYPES

Row = dict[str, Any]

_SCHEDULERS = 4  # per multiprocessor; each issues one instruction of a warp per cycle
_RATES = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}  # tensor cores' multiply-adds; 16 bits: 1


class Usage(NamedTuple):
    """A thread's registers and spills; ``spill_bytes`` are local memory (AMD: scratch)."""

    registers: int
    spill_bytes: int


class Code(NamedTuple):
    """One compiled kernel.

    ``binary`` names the machine code: the same for the same code. None means that the code does not
    tell, or that the kernel has no loop.
    """

    kernel: str
    binary: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    loop_instructions: int | None
    loop_macs: int | None
    epilogue_instructions: int | None
    hazards: int | None


def read(kernel: Any) -> Code:
    """The facts in the machine code of one of Triton's compiled kernels."""
    meta = kernel.metadata
    hopper = meta.target.backend == "cuda" and meta.target.arch == 90
    code = instructions(kernel, encoded=hopper)
    steady = assembly.Program(code, meta.name).steady(meta.num_warps)
    products = sum(instruction.tensor_core for instruction in code)
    binary = kernel.asm["hsaco" if "hsaco" in kernel.asm else "cubin"]
    return Code(
        kernel=meta.name,
        binary=sha256(binary).hexdigest()[:16],
        warps=meta.num_warps,
        stages=meta.num_stages,
        **usage(kernel)._asdict(),
        shared_bytes=meta.shared,
        # All products, if those of a short reduction are not in a loop.
        tensor_core_instructions=(steady and steady.tensor_core_instructions) or products,
        loop_instructions=steady and steady.loop_instructions,
        loop_macs=steady and steady.macs,
        epilogue_instructions=steady and steady.epilogue_instructions,
        hazards=len(dataflow.find(code, meta.name)) if hopper else None,
    )


def usage(kernel: Any) -> Usage:
    """Registers and spills, which are cheaper to read than the rest."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        names = r"\.vgpr_count: *", r"\.private_segment_fixed_size: *"
        return Usage(*(int(re.findall(rf"{name}(\d+)", text)[0]) for name in names))
    text = _ask("cuobjdump", kernel, "-res-usage")
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", text)[-1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Usage(registers, stack + local)


def accesses(kernel: Any) -> list[str]:
    """The opcodes of an NVIDIA kernel's global loads and stores, sorted."""
    opcodes = [instruction.opcode for instruction in instructions(kernel)]
    return sorted(opcode for opcode in opcodes if opcode.startswith(("LDG", "STG")))


def instructions(kernel: Any, encoded: bool = False) -> list[assembly.Instruction]:
    """A kernel's machine code; ``encoded``: with the encodings, for NVIDIA only."""
    if "amdgcn" in kernel.asm:
        return assembly.amd(kernel.asm["amdgcn"])
    return assembly.nvidia(_ask("nvdisasm", kernel, "-c", *["-hex"] * encoded))


def _ask(tool: str, kernel: Any, *options: str) -> str:
    """The output of one of the tools in Triton's wheel for a kernel."""
    path = getattr(knobs.nvidia, tool).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [path, *options, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launch(
    direction: Direction,
    g: Conv2dGeometry,
    tensors: tuple[Tensor, Tensor, Tensor],
    plan: Plan,
    precision: str,
    *,
    bias: bool = False,
    relu: bool = False,
    residual: bool = False,
) -> None:
    """Launch one direction as its operator does, on x, w and y (or their gradients).

    fprop takes every part of the epilogue, wgrad only the bias, for its gradient.
    """
    x, w, y = tensors
    vector = x.new_zeros(g.K) if bias else None
    calls: dict[Direction, Call] = {
        "fprop": Fprop(
            x,
            w,
            y,
            g,
            precision,
            Epilogue(vector, y if residual else None, "relu" if relu else None),
        ),
        "dgrad": Dgrad(y, w, x, g, precision),
        "wgrad": Wgrad(x, y, w, vector, g, precision),
    }
    plan.engine.launch(calls[direction], plan.tile)


def launch_block(block: suites.Block, dtype: measure.Dtype, gpu: Device) -> tuple[str, Tile]:
    """Launch a fused block's forward pass as in training; returns its engine's name and tile."""
    g, pool = block
    x, w, _ = selection.operands(g, dtype.torch)
    y = selection.empty(pool.y_shape, dtype.torch)
    argmax = selection.empty(pool.y_shape, max_pool.argmax_dtype(pool))
    precision = resolve_precision(dtype.precision, x)
    problem = Problem("fprop", g, x.dtype, precision, gpu, layout_of((x, y), (w,)))
    engine, tile = planner.plan_pooled(problem, pool)
    engine.launch(PooledConv(x, w, x.new_zeros(g.K), y, argmax, g, pool, precision), tile)
    return engine.name, tile


def launch_block_backward(
    block: suites.Block, dtype: measure.Dtype, gpu: Device
) -> tuple[str, Tile]:
    """Launch a fused block's backward pass, without an image's own gradient; returns the engine's
    name and the tile of the first kernel.
    """
    g, pool = block
    x, w, z = selection.operands(g, dtype.torch)
    dy = selection.empty(pool.y_shape, dtype.torch)
    argmax = selection.empty(pool.y_shape, max_pool.argmax_dtype(pool))
    padding = (*g.padding[0], *g.padding[1])
    geometry = g.stride, padding, g.dilation, g.groups, dtype.precision
    window = pool.kernel, pool.stride, pool.padding
    wanted = g.C > 4, True, True
    sizes = x.shape[2:], w.shape, w.stride()
    conv2d_relu_max_pool2d_backward.launch(
        dy, argmax, x, w, *sizes, *geometry, *window, True, wanted
    )
    precision = resolve_precision(dtype.precision, x)
    directions: tuple[Direction, ...] = ("dgrad", "wgrad") if wanted[0] else ("wgrad",)
    plans = [
        planner.plan_pool_gradient(Problem(direction, g, x.dtype, precision, gpu), pool)
        for direction in directions
    ]
    if plans[0] is not None and all(plans):
        return plans[0].engine.name, plans[0].tile
    tiles = pool_gradient.tiles_of(z, pool, True)
    return "pool_gradient", Tile(tiles.rows, tiles.columns)


def launch_pool(op: str, g: Pool2dGeometry, dtype: torch.dtype, gpu: Device) -> tuple[str, Tile]:
    """Launch a pooling, or its backward pass, with its argmax."""
    x, y = selection.empty(g.x_shape, dtype), selection.empty(g.y_shape, dtype)
    argmax = selection.empty(g.y_shape, max_pool.argmax_dtype(g))
    forward = op == "max_pool"
    tile = max_pool.choose_tile("forward" if forward else "backward", g, True, gpu)
    if forward:
        max_pool.max_pool2d(x, g, y, argmax, None, tile)
    else:
        max_pool.max_pool2d_backward(y, argmax, x, g, tile)
    return "max_pool", tile


@contextmanager
def timing() -> Iterator[dict[str, float]]:
    """A context in which everything is compiled anew; yields each kernel's seconds by its hash.

    Line numbers are omitted, so that binaries differ only if the code does.
    """
    seconds: dict[str, float] = {}

    def note(compilation: Compilation) -> None:
        seconds[compilation.hash] = compilation.seconds

    with tempfile.TemporaryDirectory() as folder, knobs.compilation.scope(), knobs.cache.scope():
        knobs.cache.dir = folder
        knobs.compilation.disable_line_info = True
        listen(note)
        yield seconds


class Reader:
    """Makes rows and reads each kernel once; launches add what they compile to ``launched``."""

    def __init__(self, gpu: Device, launched: list[Any], seconds: dict[str, float]):
        self._gpu, self._launched, self._seconds = gpu, launched, seconds
        self._codes: dict[str, Code] = {}

    def row(self, case: suites.Case, **epilogue: bool) -> Row:
        """Compile and read what the operator launches for one case."""
        g, dtype = case.layer.geometry, DTYPES[case.dtype]
        self._launched.clear()
        if isinstance(g, Conv2dGeometry):
            tensors = selection.operands(g, dtype.torch)
            direction = suites.DIRECTIONS[case.op]
            if case.op == "conv_relu":
                epilogue = {**epilogue, "bias": True, "relu": True}
            plan = selection.plan(direction, g, dtype.precision, *tensors)
            launch(direction, g, tensors, plan, dtype.precision, **epilogue)
            engine, tile = plan.engine.name, plan.tile
            kernel = principal(self._launched, g, plan)
        elif isinstance(g, suites.Block) and case.op == "conv_relu_max_pool":
            engine, tile = launch_block(g, dtype, self._gpu)
            kernel = self._launched[-1]  # the first may lay out filters
        elif isinstance(g, suites.Block):
            engine, tile = launch_block_backward(g, dtype, self._gpu)
            kernel = self._launched[0]  # it computes the map's gradient, alone or in its loads
        else:
            engine, tile = launch_pool(case.op, g, dtype.torch, self._gpu)
            (kernel,) = self._launched
        kernels = {kernel.hash: kernel for kernel in self._launched}
        for key in kernels.keys() - self._codes.keys():
            self._codes[key] = read(kernels[key])
        code = self._codes[kernel.hash]
        # The number of the tile's iterations in one of the loop.
        turns = (code.loop_macs or 0) / (tile.rows * tile.columns * tile.depth)
        return {
            "op": case.op,
            "suite": case.layer.suite,
            "layer": case.layer.name,
            "dtype": case.dtype,
            "engine": engine,
            "tile": selection.tile_text(tile),
            "box": tile.box,
            "split_k": tile.split_k,
            **code._asdict(),
            "loop_turns": turns or None,
            "issue_share": issue_share(code, case.dtype, self._gpu),
            "compile_s": round(sum(self._seconds.get(key, 0.0) for key in kernels), 3),
            "binaries": sorted({self._codes[key].binary for key in kernels}),
        }


def principal(launched: Sequence[Any], g: Conv2dGeometry, plan: Plan) -> Any:
    """The engine's kernel; of several for the phases of a stride, the one with the most taps.

    An engine's other kernels, which lay out filters, multiply nothing.
    """
    own = [k for k in launched if module_of(k).rpartition(".")[2] == plan.engine.name]
    kernels = [k for k in own if "tt.dot" in k.asm["ttir"]] or own
    if len(kernels) == 1:
        return kernels[0]
    work = [row.count * row.taps * column.count * column.taps for row, column in g.dgrad()]
    if len(kernels) < len(work):  # phases without taps may have nothing to launch
        work = [products for products in work if products]
    return max(zip(work, kernels, strict=True), key=lambda pair: pair[0])[1]


def issue_share(code: Code, dtype: str, gpu: Device) -> float | None:
    """The schedulers' time for a loop's other instructions over the tensor cores' time for it.

    None without tensor cores, and on AMD, which has a scheduler per kind of instruction.
    """
    if gpu.backend != "cuda" or not code.loop_macs or code.loop_instructions is None:
        return None
    others = code.loop_instructions - code.tensor_core_instructions
    products = code.loop_macs / (gpu.peaks.macs * _RATES[DTYPES[dtype].ceiling])
    return round(others * code.warps / _SCHEDULERS / products, 4)


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench compiled``."""
    selection.add_arguments(parser, *suites.OPS[len(selection.DIRECTIONS) :])
    for part, text in (
        ("bias", "fprop adds a bias, wgrad computes its gradient"),
        ("relu", "fprop ends with a ReLU"),
        ("residual", "fprop adds a residual"),
    ):
        parser.add_argument(f"--{part}", action="store_true", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the report")


def run(args: argparse.Namespace) -> int:
    """Compile the selected cases, print and save the report. Returns the exit code."""
    try:
        cases = selection.cases(args)
        if args.json and not args.json.absolute().parent.is_dir():
            raise UsageError(f"no folder for {args.json}")
        with selection.compiling(args.arch) as (gpu, launched), timing() as seconds:
            rows, failures = _compile(cases, Reader(gpu, launched, seconds), args)
    except UsageError as error:
        _say(str(error))
        return 2
    report = {
        "arch": args.arch,
        "triton": triton.__version__,
        "commit": measure.commit(),
        "command": args.command,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(as_json(report))
    print("\n".join((*table(rows), "", *summary(rows))))
    for failure in failures:
        _say(failure)
    return 1 if failures else 0


def _compile(
    cases: Sequence[suites.Case], reader: Reader, args: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    rows, failures = [], []
    for case in tqdm(cases, unit="row", file=sys.stderr, disable=None):
        try:
            rows.append(reader.row(case, bias=args.bias, relu=args.relu, residual=args.residual))
        except Exception as error:  # the compiler raises many classes
            failures.append(f"{' '.join(case.key)} does not compile: {error!r}")
    return rows, failures


def _say(text: str) -> None:
    print(f"python -m bench compiled: {text}", file=sys.stderr)


def as_json(report: dict[str, Any]) -> str:
    """JSON with one line per row, so that a diff is readable."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in report["rows"])
    head = json.dumps(report | {"rows": []}, indent=1)
    return head.removesuffix("[]\n}") + f"[\n{lines}\n ]\n}}\n"


_COLUMNS = {
    "layer": 20,
    "op": 6,
    "engine": 16,
    "tile": 12,
    "box": 9,
    "split_k": 6,
    "warps": 5,
    "stages": 6,
    "registers": 9,
    "spill_bytes": 6,
    "shared_bytes": 7,
    "tensor_core_instructions": 4,
    "loop_instructions": 5,
    "issue_share": 6,
    "epilogue_instructions": 8,
    "hazards": 7,
    "compile_s": 7,
    "binary": 8,
}


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One line per row; long names are cut in the head."""
    yield " ".join(f"{name[:width]:{width}}" for name, width in _COLUMNS.items()).rstrip()
    for row in rows:
        cells = row | {"box": "x".join(map(str, row["box"] or "-")), "binary": row["binary"][:8]}
        texts = {name: "-" if cells[name] is None else str(cells[name]) for name in _COLUMNS}
        yield " ".join(f"{texts[name]:{width}}" for name, width in _COLUMNS.items()).rstrip()


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The most important numbers."""
    binaries = {binary for row in rows for binary in row["binaries"]}
    yield f"{len(rows)} rows, {len(binaries)} distinct binaries"
    if not rows:
        return
    described = [row for row in rows if row["engine"] == "descriptor_gemm"]
    yield f"on descriptors: {len(described)} rows, {len(described) / len(rows):.0%}"
    for text, chosen in (
        ("with spills", [row for row in rows if row["spill_bytes"]]),
        ("without tensor cores", [row for row in rows if not row["tensor_core_instructions"]]),
    ):
        yield f"{text}: {len(chosen)} rows{_names(chosen)}"
    for text, chosen in (("all rows", rows), ("descriptors", described)):
        shared = [row for row in chosen if row["issue_share"] is not None]
        if shared:
            worst = max(shared, key=lambda row: row["issue_share"])
            median = statistics.median(row["issue_share"] for row in shared)
            yield (
                f"issue_share, {text}: median {median:.2f}, "
                f"worst {worst['issue_share']:.2f} ({worst['op']} {worst['layer']})"
            )


def _names(rows: Sequence[Row]) -> str:
    return "".join(f", {row['op']} {row['layer']}" for row in rows)
