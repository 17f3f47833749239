"""Read machine code: find a kernel's steady loop, and count a thread's instructions in it.

``nvidia`` and ``amd`` parse a disassembly into instructions, ``Program`` groups them into blocks
and finds the loops, ``Program.steady`` counts one iteration. All counts are per thread. A
predicated instruction counts, because it takes a slot of the scheduler; a called subroutine (a
64-bit division, a trap) counts as its call.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

import networkx as nx

_LABEL = re.compile(r"^\s*([\w.$]+):")
_SASS = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)([^;]*);(?:.* (0x[0-9a-f]{16})$)?"
)
_SASS_UPPER_HALF = re.compile(r" \*/\n\s*/\* (0x[0-9a-f]{16}) \*/")
_SASS_TARGET = re.compile(r"`\((\.L\w+)\)")
_SASS_CONDITION = re.compile(r"\bU?P\d|\bU?R\d|~U?RZ")
_GCN = re.compile(r"^\s+([a-z]+_\w+)(.*)$")
_GCN_TARGET = re.compile(r"\.L\w+")

_TENSOR_CORE = re.compile(r"(?:[HQI]G|[HQIDO]|UTC\w*)MMA\b|v_s?mfmac?_|v_wmma_")
_GROUP_SIZES = re.compile(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)")  # of a group of four warps
_WARP_SIZES = re.compile(r"[HQIDO]MMA\.(?:(8)x?(8)x?(4)|(16)x?(8)x?(\d+))\b")
_WAVE_SIZES = re.compile(r"v_\w*?(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_")
_MULTIPLY_ADD = re.compile(r"[FD]FMA|FFMA2|HFMA2(?!\.MMA)|v_(?:pk_)?(?:fma|fmac|mac|dot)")
_STORE = re.compile(r"STG\b|UTMASTG|ST\b|(?:global|buffer|flat)_store")
_COPY = re.compile(r"UTMALDG|LDGSTS|(?:global|buffer|flat)_load")


class Instruction(NamedTuple):
    """One instruction; its opcode includes the modifiers: "HGMMA.64x128x16.F32.BF16"."""

    opcode: str
    labels: tuple[str, ...] = ()  # in front of it
    target: str | None = None  # the label it may jump to
    leaves: bool = False  # it may end the thread
    falls: bool = True  # the next instruction may follow
    # Only of NVIDIA's code.
    address: str = ""  # "0a30"
    guard: str = ""  # the predicate it depends on: "@!P0"
    operands: tuple[str, ...] = ()
    upper_half: str = ""  # of its encoding, with the control code; from nvdisasm -hex

    def __str__(self) -> str:
        words = self.address, self.guard, self.opcode, ", ".join(self.operands)
        return " ".join(filter(None, words))

    @property
    def tensor_core(self) -> bool:
        return _TENSOR_CORE.match(self.opcode) is not None

    def macs(self, warps: int) -> int | None:
        """Multiply-adds when each of a block's warps executes it, by the shape in its name.

        None if the name has no shape: Blackwell's UTC*MMA, which one thread issues for the block.
        """
        if found := _GROUP_SIZES.match(self.opcode):
            return prod(map(int, found.groups())) * warps // 4
        if found := _WARP_SIZES.match(self.opcode) or _WAVE_SIZES.match(self.opcode):
            return prod(int(size) for size in found.groups() if size) * warps
        return None


class Steady(NamedTuple):
    """A thread's instructions in one iteration of the steady loop, and after it for one tile.

    ``macs`` are the multiply-adds of an iteration that a block of ``warps`` makes on tensor cores,
    None if the code does not tell.
    """

    tensor_core_instructions: int
    loop_instructions: int
    macs: int | None
    epilogue_instructions: int


def nvidia(text: str) -> list[Instruction]:
    """The instructions in the output of ``nvdisasm -c`` or ``nvdisasm -c -hex``."""
    return list(_labelled(_SASS_UPPER_HALF.sub(r" \1", text), _sass))


def amd(text: str) -> list[Instruction]:
    """The instructions in LLVM's assembly for an AMD GPU."""
    return list(_labelled(text, _gcn))


def _labelled(text: str, read: Callable[[str], Instruction | None]) -> Iterator[Instruction]:
    labels: tuple[str, ...] = ()
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels += (label[1],)
        elif instruction := read(line):
            yield instruction._replace(labels=labels)
            labels = ()


def _sass(line: str) -> Instruction | None:
    if not (found := _SASS.search(line)):
        return None
    address, guard, opcode, operands, upper_half = found.groups()
    name = opcode.split(".")[0]
    instruction = Instruction(
        opcode,
        address=address,
        guard=(guard or "").strip(),
        operands=tuple(text.strip() for text in operands.split(",") if text.strip()),
        upper_half=upper_half or "",
    )
    if name in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(f"a computed jump cannot be followed: {line.strip()}")
    if name in ("BRA", "JMP"):
        target = _SASS_TARGET.search(operands)
        if target is None:
            raise ValueError(f"a jump to no label: {line.strip()}")
        condition = guard or _SASS_CONDITION.search(operands[: target.start()])
        return instruction._replace(target=target[1], falls=condition is not None)
    if name == "CALL" and (target := _SASS_TARGET.search(operands)):
        # The compiler also writes a jump out of a loop in this form.
        return instruction._replace(target=target[1])
    if name in ("EXIT", "RET"):
        return instruction._replace(leaves=True, falls=guard is not None)
    return instruction


def _gcn(line: str) -> Instruction | None:
    if not (found := _GCN.match(line.split(";")[0])):
        return None
    opcode, operands = found.groups()
    if opcode.startswith(("s_branch", "s_cbranch")):
        target = _GCN_TARGET.search(operands)
        if target is None:
            raise ValueError(f"a jump to no label: {line.strip()}")
        return Instruction(opcode, target=target[0], falls=opcode != "s_branch")
    if opcode in ("s_endpgm", "s_setpc_b64"):
        return Instruction(opcode, leaves=True, falls=False)
    return Instruction(opcode)


class Loop(NamedTuple):
    """Blocks, named by their first instruction; ``header`` is the one entered from outside."""

    header: int
    blocks: frozenset[int]
    parent: "Loop | None"


Kind = Callable[[Instruction], bool]

# Blocks without instructions: all exits of a kernel lead to one, the others close a search.
_EXIT, _START, _END = -1, -2, -3


class Program:
    """A kernel's blocks of instructions, the paths between them, and its loops.

    ``code`` holds the instructions of each block, named by the number of its first instruction;
    ``graph`` holds the edges between blocks reachable from ``entry``.

    ``entry`` is the label of the start: a disassembly may have subroutines before it.
    """

    def __init__(self, instructions: list[Instruction], entry: str | None = None):
        at = {label: i for i, ins in enumerate(instructions) for label in ins.labels}
        self.code, graph = _blocks(instructions, at)
        self.entry = 0 if entry is None else at[entry]
        # Padding and subroutines are unreachable.
        self.graph = graph.subgraph(nx.descendants(graph, self.entry) | {self.entry})
        self.loops = tuple(_loops(self.graph, None))
        self._forward = nx.DiGraph(self.graph)
        for loop in self.loops:
            self._forward.remove_edges_from([(block, loop.header) for block in loop.blocks])

    def steady(self, warps: int) -> Steady | None:
        """A thread's instructions in the steady loop and after it, for a block of ``warps``.

        The steady loop is the innermost loop with the most tensor-core instructions; without any,
        the one with the most multiply-adds or, failing these, instructions. If an iteration has
        several paths, the counted one makes all products, then stores nothing (in a flattened loop
        a tile's epilogue is one of the paths), then starts the copies, and then has the fewest
        instructions (a barrier is passed at the first try). None without a loop.

        A fully unrolled loop leaves only loops for rare cases, such as NaN. So if a path around all
        loops with products makes more products than any iteration, that path is steady.
        """
        for work in (_is_product, _is_multiply_add, _is_any):
            working = [loop for loop in self.loops if self._count(loop.blocks, work)]
            outer = [loop.parent for loop in working]
            turns = [
                (loop, self._turn(loop, work, stores=False))
                for loop in working
                if loop not in outer
            ]
            if turns:
                loop, turn = max(turns, key=lambda found: self._count(found[1], work))
                if work is _is_product:
                    way = self._around(working)
                    if sum(map(_is_product, way)) > self._count(turn, work):
                        return _unrolled(way, warps)
                return self._steady(loop, turn, work, warps)
        return None

    def _steady(self, loop: Loop, turn: list[int], work: Kind, warps: int) -> Steady:
        length = self._count(turn, _is_any)
        if self._count(loop.blocks - set(turn), _is_store):
            epilogue = self._count(self._turn(loop, work, stores=True), _is_any) - length
        else:
            epilogue = self._count(self._after(loop), _is_any)
        products = [ins for block in turn for ins in self.code[block] if ins.tensor_core]
        return Steady(len(products), length, _macs(products, warps), epilogue)

    def _around(self, loops: list[Loop]) -> list[Instruction]:
        """The instructions on the path through none of these loops that has the most products, then
        the most stores, and then the fewest instructions; empty if all paths go through them.
        """
        inside = {block for loop in loops for block in loop.blocks}
        ways = nx.DiGraph(self._forward.subgraph(set(self.graph) - inside))
        if self.entry not in ways or _EXIT not in nx.descendants(ways, self.entry):
            return []

        def cost(block: int) -> tuple[int, ...]:
            kinds = _is_product, _is_store
            return *(-self._count([block], kind) for kind in kinds), len(self.code[block])

        path = _cheapest(ways, self.entry, _EXIT, cost)
        return [ins for block in path for ins in self.code[block]]

    def _count(self, blocks: Iterable[int], kind: Kind) -> int:
        return sum(kind(ins) for block in blocks for ins in self.code[block])

    def _turn(self, loop: Loop, work: Kind, stores: bool) -> list[int]:
        """The blocks of one iteration, on a path with the fewest or the most stores."""
        ways = nx.DiGraph(self._forward.subgraph(loop.blocks))
        last = self.graph.subgraph(loop.blocks).pred[loop.header]
        ways.add_edges_from((block, _END) for block in last)

        def cost(block: int) -> tuple[int, ...]:
            stored = self._count([block], _is_store)
            return (
                -self._count([block], work),
                -stored if stores else stored,
                -self._count([block], _is_copy),
                len(self.code[block]),
            )

        return _cheapest(ways, loop.header, _END, cost)

    def _after(self, loop: Loop) -> list[int]:
        """The blocks from a loop's end to the next tile or the kernel's end.

        They are on the shortest of the paths with the most stores. A loop around this one that
        stores nothing is not a loop over tiles.
        """
        outer = loop.parent
        while outer and not self._count(outer.blocks - loop.blocks, _is_store):
            outer = outer.parent
        outside = (outer.blocks if outer else set(self.graph)) - loop.blocks
        ways = nx.DiGraph(self._forward.subgraph(outside))
        ends = self.graph.pred[outer.header] if outer else [_EXIT]
        ways.add_edges_from((block, _END) for block in ends if block in outside)
        for block in loop.blocks:
            for after in self.graph.succ[block]:
                if outer and after == outer.header:
                    ways.add_edge(_START, _END)
                elif after in outside:
                    ways.add_edge(_START, after)

        def cost(block: int) -> tuple[int, ...]:
            return -self._count([block], _is_store), len(self.code[block])

        return _cheapest(ways, _START, _END, cost)


def _unrolled(way: list[Instruction], warps: int) -> Steady:
    """The counts of straight code: from its first product to its last, as one iteration."""
    at = [i for i, ins in enumerate(way) if ins.tensor_core]
    macs = _macs([way[i] for i in at], warps)
    return Steady(len(at), at[-1] + 1 - at[0], macs, len(way) - at[-1] - 1)


def _macs(products: list[Instruction], warps: int) -> int | None:
    macs = [ins.macs(warps) for ins in products]
    known = [mac for mac in macs if mac is not None]
    return sum(known) if len(known) == len(macs) else None


def _is_product(instruction: Instruction) -> bool:
    return instruction.tensor_core


def _is_multiply_add(instruction: Instruction) -> bool:
    return _MULTIPLY_ADD.match(instruction.opcode) is not None


def _is_store(instruction: Instruction) -> bool:
    return _STORE.match(instruction.opcode) is not None


def _is_copy(instruction: Instruction) -> bool:
    return _COPY.match(instruction.opcode) is not None


def _is_any(instruction: Instruction) -> bool:
    return True


def _blocks(
    instructions: list[Instruction], at: dict[str, int]
) -> tuple[dict[int, list[Instruction]], nx.DiGraph]:
    """Runs of instructions entered only at the first one, and the edges between them."""
    code: dict[int, list[Instruction]] = {_EXIT: [], _START: [], _END: []}
    graph = nx.DiGraph()
    graph.add_node(_EXIT)
    block: int | None = None
    for i, ins in enumerate(instructions):
        if block is None or ins.labels:
            if block is not None:
                graph.add_edge(block, i)
            graph.add_node(block := i)
            code[block] = []
        code[block].append(ins)
        if ins.target is None and not ins.leaves:
            continue
        graph.add_edge(block, _EXIT if ins.target is None else at[ins.target])
        if ins.falls:
            graph.add_edge(block, i + 1)
        block = None
    return code, graph


def _loops(graph: nx.DiGraph, parent: Loop | None) -> Iterator[Loop]:
    """The loops of a graph in the code's order, each before its inner loops."""
    for blocks in sorted(nx.strongly_connected_components(graph), key=min):
        if len(blocks) == 1 and not graph.has_edge(*blocks, *blocks):
            continue
        entered = [block for block in blocks if not blocks.issuperset(graph.pred[block])]
        loop = Loop(min(entered or blocks), frozenset(blocks), parent)
        yield loop
        within = nx.DiGraph(graph.subgraph(blocks))
        within.remove_edges_from([(block, loop.header) for block in blocks])
        yield from _loops(within, loop)


def _cheapest(
    ways: nx.DiGraph, start: int, end: int, cost: Callable[[int], tuple[int, ...]]
) -> list[int]:
    """The blocks on the cheapest path from start to end, in a graph without loops."""
    best: dict[int, tuple[tuple[int, ...], list[int]]] = {}
    for block in nx.topological_sort(ways):
        before = [best[previous] for previous in ways.pred[block] if previous in best]
        if block == start:
            best[block] = (cost(block), [block])
        elif before:
            total, path = min(before)
            total = tuple(map(sum, zip(total, cost(block), strict=True)))
            best[block] = (total, [*path, block])
    return best[end][1]
