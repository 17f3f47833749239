"""Check the machine code of every binary that layers may launch on Hopper, without a GPU.

A hazard is a register that an instruction touches while an earlier one may still be using it, on
some way through the kernel: an asynchronous product (wgmma) that has not been waited for, or a load
whose scoreboard has not. Exit code 1 if there is any.

Every kernel is compiled as for ``python -m bench compiled``: the planner's whole family of tiles
for each layer, in each layout and direction, without and with its whole epilogue, and with offsets
of 64 bits. What was found of a binary is kept in build/hazards and not looked for again.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import triton
from tqdm import tqdm

from . import assembly, binaries, compiled, measure, sass, selection, suites
from .assembly import Instruction, Program
from .sass import Control, Effects, Product

_OPEN = -1  # the age of a group that no product has closed
_OLDEST = 64
_CACHE = Path("build") / "hazards"


class Hazard(NamedTuple):
    """``second`` touches a register while ``first`` may be using it."""

    kind: str
    register: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.register} of {self.first!r} by {self.second!r}"


class Awaited(NamedTuple):
    """What instructions of a unit have to do yet: write their results, or read their operands.

    Any one of ``boards`` tells when; as long as there is none, nothing tells.
    """

    writes: bool
    unit: str
    boards: frozenset[int]


class Flight(NamedTuple):
    """Registers of an asynchronous product: its accumulator or its operand."""

    accumulates: bool
    registers: tuple[str, ...]


class State:
    """What may be under way at a point of the program, over all ways that lead there.

    ``awaited``: for each register the instructions that are to write or to read it. ``flights``:
    how many groups of products have been closed since a product's own, on the way where these are
    fewest, and the product.
    """

    def __init__(self) -> None:
        self.awaited: dict[Awaited, dict[str, frozenset[str]]] = {}
        self.flights: dict[Flight, tuple[int, str]] = {}

    def copy(self) -> "State":
        """Another one, which can be changed."""
        state = State()
        state.awaited = {what: dict(registers) for what, registers in self.awaited.items()}
        state.flights = dict(self.flights)
        return state

    def add(self, other: "State") -> bool:
        """Take in what may be under way on another way; whether that is more."""
        more = False
        for what, registers in other.awaited.items():
            mine = self.awaited.setdefault(what, {})
            for register, found in registers.items():
                had = mine.get(register, frozenset())
                if not found <= had:
                    mine[register] = had | found
                    more = True
        for flight, (age, product) in other.flights.items():
            if flight not in self.flights or age < self.flights[flight][0]:
                self.flights[flight] = age, product
                more = True
        return more

    def step(self, instruction: Instruction) -> list[Hazard]:
        """Execute an instruction: the state is then the one after it. Returns its hazards."""
        effects, control = sass.effects(instruction), sass.control(instruction.upper_half)
        text = str(instruction)
        self._wait(effects.waits | control.waits)
        found = [*self._unwaited(effects, text), *self._in_flight(effects, text)]
        if effects.waits_for_groups is not None:
            self.flights = {
                flight: (age, product)
                for flight, (age, product) in self.flights.items()
                if age < effects.waits_for_groups
            }
        if effects.product:
            self._launch(effects.product, text)
        if effects.unit:
            self._begin(effects, control, text)
        return found

    def _wait(self, boards: frozenset[int]) -> None:
        if boards:
            for what in [what for what in self.awaited if what.boards & boards]:
                del self.awaited[what]

    def _unwaited(self, effects: Effects, text: str) -> Iterator[Hazard]:
        reads, writes = effects.reads, effects.writes
        if product := effects.product:
            reads = reads.union(product.operand, product.accumulator)
            writes = writes.union(product.accumulator)
        for what, registers in self.awaited.items():
            # A unit takes its operands in order, and so before a later one's result.
            if not what.writes and what.unit == sass.queue(effects.unit):
                continue
            touched = reads | writes if what.writes else writes
            for register in touched & registers.keys():
                if what.writes:
                    kind = "read before it is written" if register in reads else "written twice"
                else:
                    kind = "written before it is read"
                yield from (Hazard(kind, register, first, text) for first in registers[register])

    def _in_flight(self, effects: Effects, text: str) -> Iterator[Hazard]:
        product = effects.product
        for flight, (_, first) in self.flights.items():
            touched = effects.writes
            if product:
                # Products of one accumulator follow one another without a wait.
                follows = flight.accumulates and flight.registers == product.accumulator
                touched = touched.union(() if follows else product.accumulator)
            if flight.accumulates:
                touched = touched.union(effects.reads, product.operand if product else ())
            name = "accumulator" if flight.accumulates else "operand"
            for register in sorted(touched.intersection(flight.registers))[:1]:
                yield Hazard(f"{name} of a product in flight", register, first, text)

    def _launch(self, product: Product, text: str) -> None:
        self.flights[Flight(True, product.accumulator)] = _OPEN, text
        if product.operand:
            self.flights[Flight(False, product.operand)] = _OPEN, text
        if product.closes:
            self.flights = {
                flight: (min(age + 1, _OLDEST), first)
                for flight, (age, first) in self.flights.items()
            }

    def _begin(self, effects: Effects, control: Control, text: str) -> None:
        """A unit begins with an instruction, whose scoreboards tell of the unit's earlier ones."""
        assert effects.unit is not None
        queue = sass.queue(effects.unit)
        write, read = (
            frozenset(() if board is None else (board,)) for board in (control.write, control.read)
        )
        if effects.in_order and write:
            self._tell(Awaited(True, effects.unit, frozenset()), write)
        for what in [what for what in self.awaited if not what.writes and what.unit == queue]:
            self._tell(what, what.boards | write | read)
        for registers, what in (
            (effects.writes, Awaited(True, effects.unit, write)),
            (effects.late, Awaited(False, queue, write | read)),
        ):
            if registers:
                self._await(what, dict.fromkeys(registers, frozenset((text,))))

    def _tell(self, what: Awaited, boards: frozenset[int]) -> None:
        if boards != what.boards and (registers := self.awaited.pop(what, None)):
            self._await(what._replace(boards=boards), registers)

    def _await(self, what: Awaited, registers: Mapping[str, frozenset[str]]) -> None:
        mine = self.awaited.setdefault(what, {})
        for register, found in registers.items():
            mine[register] = mine.get(register, frozenset()) | found


def find(instructions: list[Instruction], entry: str) -> list[Hazard]:
    """The hazards on any way through a kernel that begins at the label ``entry``."""
    program = Program(instructions, entry)
    flow = _flow(program)
    states = {program.entry: State()}
    work = [program.entry]
    while work:
        block = work.pop()
        state = states[block].copy()
        for instruction in program.code[block]:
            state.step(instruction)
        for after in flow.succ[block]:
            if after not in states:
                states[after] = state.copy()
                work.append(after)
            elif states[after].add(state) and after not in work:
                work.append(after)
    found = {}
    for block, state in sorted(states.items()):
        for instruction in program.code[block]:
            for hazard in state.step(instruction):
                found.setdefault((hazard.kind, hazard.first, hazard.second), hazard)
    return list(found.values())


def _flow(program: Program) -> nx.DiGraph:
    """The ways between blocks, with subroutines that return to those that called them."""
    flow = nx.DiGraph(program.graph)
    for block, code in program.code.items():
        if block not in flow or not code or not code[-1].opcode.startswith("CALL"):
            continue
        after = block + len(code)
        for called in set(program.graph.succ[block]) - {after}:
            inside = nx.descendants(program.graph, called) | {called}
            flow.remove_edge(block, after)
            flow.add_edges_from((end, after) for end in inside if _returns(program.code[end]))
    return flow


def _returns(code: list[Instruction]) -> bool:
    return bool(code) and code[-1].opcode.startswith("RET")


class Verdict(NamedTuple):
    """What was found of one binary.

    ``operands``: how many of its products take an operand from registers.
    """

    binary: str
    kernel: str
    products: int
    operands: int
    hazards: tuple[str, ...]


def check(kernel: Any) -> Verdict:
    """The verdict on one of Triton's compiled kernels."""
    instructions = compiled.instructions(kernel, encoded=True)
    products = [p for p in (sass.effects(ins).product for ins in instructions) if p]
    return Verdict(
        binary=sha256(kernel.asm["cubin"]).hexdigest()[:16],
        kernel=f"{kernel.src.fn.fn.__module__.rpartition('.')[2]}.{kernel.metadata.name}",
        products=len(products),
        operands=sum(bool(product.operand) for product in products),
        hazards=tuple(map(str, find(instructions, kernel.metadata.name))),
    )


class Verdicts:
    """Verdicts by what a kernel is compiled from, kept in a file; what has one is not compiled."""

    def __init__(self, path: Path):
        self._path = path
        self._kept: dict[str, Verdict] = {}
        if path.is_file():
            rows = json.loads(path.read_text())
            self._kept = {key: Verdict(*rest, tuple(found)) for key, *rest, found in rows}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        lines = (json.dumps([key, *verdict]) for key, verdict in self._kept.items())
        part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        part.replace(self._path)

    def of(self, geometry: suites.Geometry, dtype: measure.Dtype, launched: list[Any], every: bool):
        """Those on all that the operators launch for a layer; compiles what has none yet."""
        needed: dict[str, int | None] = {}  # by key: the place in ``launched`` of what is compiled
        functions = set()

        def note(*, key: str, fn: Any, **_: Any) -> bool:
            source = f"{fn.module}.{fn.name} {fn.jit_function.cache_key} {key}"
            name = sha256(source.encode()).hexdigest()[:32]
            functions.add(fn.jit_function)
            if name not in needed:
                needed[name] = None if name in self._kept else len(launched)
            return name in self._kept

        runtime = triton.knobs.runtime
        previous, runtime.jit_cache_hook = runtime.jit_cache_hook, note
        launched.clear()
        try:
            binaries.launch(geometry, dtype, every)
        finally:
            runtime.jit_cache_hook = previous
        for key, place in needed.items():
            if place is not None:
                self._kept[key] = check(launched[place])
        launched.clear()
        for function in functions:  # thousands of kernels would fill the memory
            function.device_caches.clear()
        return [self._kept[key] for key in needed]


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m bench hazards``."""
    selection.add_layers(parser)
    parser.add_argument(
        "--every", action="store_true", help="every epilogue, and every tile with 64 bits, too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the table is kept")


def run(args: argparse.Namespace) -> int:
    """Check what was asked for, print and keep the table. Returns the exit code."""
    failures: list[str] = []
    try:
        if args.arch != "sm_90":
            raise selection.Refusal(f"hazards are known of sm_90, not of {args.arch}")
        layers = selection.layers(args)
        with selection.compiling(args.arch) as (_, launched), compiled.timing():
            found = dict(_check(layers, args, launched, failures))
    except selection.Refusal as error:
        _say(str(error))
        return 2
    rows = [_row(*key, verdicts) for key, verdicts in found.items()]
    print("\n".join(table(rows)))
    verdicts = {verdict.binary: verdict for some in found.values() for verdict in some}
    faulty = [verdict for verdict in verdicts.values() if verdict.hazards]
    for verdict in faulty:
        _say(f"{verdict.binary} ({verdict.kernel}): {verdict.hazards[0]}")
    for failure in failures:
        _say(failure)
    if args.json:
        report = {"arch": args.arch, "triton": triton.__version__, "commit": measure.commit()}
        report |= {"command": args.command, "rows": rows}
        args.json.write_text(compiled.as_json(report))
    return 1 if faulty or failures else 0


def _check(
    layers: Iterable[suites.Layer],
    args: argparse.Namespace,
    launched: list[Any],
    failures: list[str],
) -> Iterator[tuple[tuple[str, str], set[Verdict]]]:
    """For each suite and dtype the verdicts on all its binaries."""
    for dtype in args.dtype:
        verdicts = Verdicts(_CACHE / f"{triton.__version__}-{dtype}.json")
        for suite in args.suite:
            found: set[Verdict] = set()
            chosen = [layer for layer in layers if layer.suite == suite]
            for layer in tqdm(chosen, f"{suite} {dtype}", file=sys.stderr, disable=None):
                try:
                    geometry, kind = layer.geometry, measure.DTYPES[dtype]
                    found.update(verdicts.of(geometry, kind, launched, args.every))
                except Exception as error:  # the compiler's own are of many classes
                    failures.append(f"{suite} {layer.name} {dtype} is not checked: {error!r}")
                verdicts.save()
            yield (suite, dtype), found


def _row(suite: str, dtype: str, verdicts: set[Verdict]) -> dict[str, Any]:
    by_binary = {verdict.binary: verdict for verdict in verdicts}.values()
    faulty = [verdict for verdict in by_binary if verdict.hazards]
    return {
        "suite": suite,
        "dtype": dtype,
        "binaries": len(by_binary),
        "with_products": sum(verdict.products > 0 for verdict in by_binary),
        "with_register_operands": sum(verdict.operands > 0 for verdict in by_binary),
        "with_hazards": len(faulty),
        "hazards": sum(len(verdict.hazards) for verdict in faulty),
        "kernels_with_hazards": sorted({verdict.kernel for verdict in faulty}),
    }


_HEAD = ("suite", "dtype", "binaries", "with_products", "with_register_operands", "with_hazards")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each suite and dtype."""
    widths = [
        max(len(str(row[name])) for row in [dict(zip(_HEAD, _HEAD)), *rows]) for name in _HEAD
    ]
    for row in [dict(zip(_HEAD, _HEAD)), *rows]:
        yield "  ".join(f"{row[name]!s:{w}}" for name, w in zip(_HEAD, widths)).rstrip()


def _say(text: str) -> None:
    print(f"python -m bench hazards: {text}", file=sys.stderr)
