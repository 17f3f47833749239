"""``torch.compile(model, backend="triton_cnn")``: fusion in the graphs of any model.

Dynamo guards the graphs and knows their source lines. ``graphs.fusion`` replaces their convolutions
and poolings by this library's operators; Inductor compiles the rest.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from torch.fx import GraphModule

from kernels._private import compile_id, dynamos_counters, inductor, reset_with_dynamo

from .graphs.effects import forget_reshaped
from .graphs.fusion import rewrite
from .graphs.lowering import ON_CPU

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """The outcome for one call of a convolution or pooling."""

    graph: str
    layer: str  # its name in the model
    line: str  # of its source
    function: str
    became: str  # the operator and what it fuses, or "left to Inductor"
    why: str  # it was left to Inductor, or not fused further

    def __str__(self) -> str:
        place = " ".join(filter(None, (self.layer, self.line and f"({self.line})")))
        reason = f"; {self.why}" if self.why else ""
        return f"{self.graph}: {place} {self.function} -> {self.became}{reason}"


@dataclass
class CompileReport:
    """A row for each convolution and pooling compiled since ``torch._dynamo.reset()``.

    Graphs have the numbers of the frame and its compilation from Dynamo's logs. If Dynamo's graph
    was split, as by DDP's buckets, each part also has its own number.
    """

    rows: list[Row] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        """The number of calls per outcome."""
        return Counter(row.became for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))


_rows: list[Row] = []
_graphs: Counter[str] = Counter()


def compile_report() -> CompileReport:
    """The outcome for each convolution and pooling that ``backend="triton_cnn"`` has compiled.

    Example:
        >>> for row in cnn.compile_report().rows:
        ...     print(row.layer, "->", row.became, row.why)
    """
    return CompileReport(list(_rows))


def _reset() -> None:
    _rows.clear()
    _graphs.clear()


def fuse(gm: GraphModule) -> GraphModule:
    """Rewrite a graph from Dynamo and those nested in it, such as a checkpoint's, and record the
    outcome for each convolution and pooling.
    """
    frame = compile_id()
    _graphs[frame] += 1
    name = f"[{frame}]" if _graphs[frame] == 1 else f"[{frame}, graph {_graphs[frame]}]"
    forget_reshaped(gm)
    rows = []
    for inner, module in gm.named_modules():
        if isinstance(module, GraphModule):
            graph = " ".join(filter(None, (name, inner)))
            for o in rewrite(module.graph):
                became = o.became or "left to Inductor"
                rows.append(Row(graph, o.layer, o.line, o.function, became, o.why))
            module.graph.lint()
            module.recompile()
    _rows.extend(rows)
    for row in rows:
        dynamos_counters("triton_cnn")[row.became] += 1
        log.debug("%s", row)
    if any(row.why == ON_CPU for row in rows):
        _warn_once()
    return gm


@cache
def _warn_once() -> None:
    log.warning("a graph is left to Inductor, as %s", ON_CPU)


def triton_cnn(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Inductor's compilation of the rewritten graph, with Inductor's modes and options."""
    from .graphs.layout import ChannelsLast

    return inductor(mode, options, ChannelsLast)(fuse(gm), example_inputs)


reset_with_dynamo(triton_cnn, _reset)
