"""Registers that an instruction touches while an earlier one may still use them: ``find``.

A forward analysis of what may be in flight at each point of a kernel, over all paths to it:
asynchronous products whose group no wait has ended, and loads, stores and the like whose scoreboard
has not been waited for. An operation in flight on only one path counts. A guard is assumed true or
false, whichever gives a hazard, but a wait happens whatever its instruction's guard.

Instructions of fixed latency are excluded: the compiler counts their cycles, so no wait can be
missing. For shared memory there is only a rule of thumb: a wait for some copy stands between the
last copy that began and a product. The emulator checks which copy it waits for.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import networkx as nx

from . import sass
from .assembly import Instruction, Program
from .sass import Control, Effects, Product

_OPEN = -1  # age of a group that no product has closed
_OLDEST = 64


class Hazard(NamedTuple):
    """``second`` touches a register while ``first`` may still use it."""

    kind: str
    register: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.register} of {self.first!r} by {self.second!r}"


class Awaited(NamedTuple):
    """Pending work of a unit's instructions: writing their results, or reading their operands.

    Any one of ``boards`` signals its end; if there is none, nothing does.
    """

    writes: bool
    unit: str
    boards: frozenset[int]


class Flight(NamedTuple):
    """The registers of an asynchronous product: its accumulator or its operand."""

    accumulates: bool
    registers: tuple[str, ...]


class State:
    """What may be in flight at a point of the program, over all paths to it.

    ``awaited``: for each register the instructions that have yet to write or to read it.
    ``flights``: for each product the fewest groups that have been closed since its own on any path,
    and its instruction. ``copies``: copies to shared memory that began since the last wait for one.
    ``unfenced``: registers written since the last fence for products (wgmma).
    """

    def __init__(self) -> None:
        self.awaited: dict[Awaited, dict[str, frozenset[str]]] = {}
        self.flights: dict[Flight, tuple[int, str]] = {}
        self.copies: dict[str, frozenset[str]] = {}
        self.unfenced: dict[str, str] = {}

    def copy(self) -> "State":
        """A copy that can be changed."""
        state = State()
        state.awaited = {what: dict(registers) for what, registers in self.awaited.items()}
        state.flights = dict(self.flights)
        state.copies = dict(self.copies)
        state.unfenced = dict(self.unfenced)
        return state

    def add(self, other: "State") -> bool:
        """Merge another path's state; returns whether this adds anything."""
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
        for teller, found in other.copies.items():
            had = self.copies.get(teller, frozenset())
            if not found <= had:
                self.copies[teller] = had | found
                more = True
        for register in other.unfenced.keys() - self.unfenced.keys():
            self.unfenced[register] = other.unfenced[register]
            more = True
        return more

    def step(self, instruction: Instruction) -> list[Hazard]:
        """Execute an instruction, which updates the state. Returns its hazards."""
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
            found += self._unready(effects.product, text)
            self._launch(effects.product, text, certain=not instruction.guard)
        if effects.copies:
            self.copies[effects.copies] = frozenset((text,))
        if effects.waits_for_copies:
            self.copies.pop(effects.waits_for_copies, None)
        if effects.fences:
            self.unfenced.clear()
        self.unfenced.update((register, text) for register in effects.writes if register[0] == "R")
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
            # A unit reads its operands in order, and so before a later result is written.
            if not what.writes and effects.unit and what.unit == sass.queue(effects.unit):
                continue
            # A result does not overtake an earlier one of its unit if these come in order.
            if what.writes and what.unit == effects.unit and effects.in_order:
                touched = reads
            else:
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
                # Products with one accumulator follow one another without a wait.
                follows = flight.accumulates and flight.registers == product.accumulator
                touched = touched.union(() if follows else product.accumulator)
            if flight.accumulates:
                touched = touched.union(effects.reads, product.operand if product else ())
            name = "accumulator" if flight.accumulates else "operand"
            for register in sorted(touched.intersection(flight.registers))[:1]:
                yield Hazard(f"{name} of a product in flight", register, first, text)

    def _unready(self, product: Product, text: str) -> Iterator[Hazard]:
        for copies in self.copies.values():
            yield Hazard("product of a copy that may not have arrived", "", min(copies), text)
        for register in (*product.operand, *product.accumulator):
            if register in self.unfenced:
                yield Hazard("product without a fence", register, self.unfenced[register], text)
                break

    def _launch(self, product: Product, text: str, certain: bool) -> None:
        """Begin a product; if it is not certain, it does not age other groups."""
        if product.closes and certain:
            self.flights = {
                flight: (min(age + 1, _OLDEST), first)
                for flight, (age, first) in self.flights.items()
            }
        age = 0 if product.closes else _OPEN
        self.flights[Flight(True, product.accumulator)] = age, text
        if product.operand:
            self.flights[Flight(False, product.operand)] = age, text

    def _begin(self, effects: Effects, control: Control, text: str) -> None:
        """Begin an instruction on a unit; its scoreboards also cover the unit's earlier ones."""
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
            (effects.orders and {effects.orders}, Awaited(True, effects.unit, write | read)),
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
    """The hazards on any path through a kernel that begins at the label ``entry``."""
    program = Program(instructions, entry)
    flow = _flow(program)
    states = {program.entry: _before(program)}
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


def _before(program: Program) -> State:
    """The state at the start, with all copies begun: a product needs a wait for one before it."""
    state = State()
    for block in program.graph:
        for instruction in program.code[block]:
            if teller := sass.effects(instruction).copies:
                state.copies[teller] = frozenset((str(instruction),))
    return state


def _flow(program: Program) -> nx.DiGraph:
    """The paths between blocks, with subroutines that return to their callers."""
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
