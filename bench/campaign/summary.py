"""The output of a campaign: one line per row as it comes, and a summary."""

from collections.abc import Iterator, Sequence
from typing import Any

from .items import Item

Row = dict[str, Any]

_KINDS = {"check": "checks", "ceiling": "ceilings", "timing": "times"}


def line(row: Row) -> str:
    """One row as text."""
    if not row["ok"]:
        return f"FAILED {row['item']}: {row['reason']}"
    if row["kind"] == "check":
        repeats = "alike" if row["covered"] is not False else "alike, beside less work than meant"
        return (
            f"ok     {row['item']}: error {row['error']:.2e} of {row['bound']:.2e}, {repeats}"
            f"{_chosen(row)}"
        )
    if row["kind"] == "ceiling":
        value = "not measured" if row["value"] is None else f"{row['value']:.5g} {row['unit']}"
        return f"       {row['item']}: {value}"
    if row["ms"] is None:
        return f"       {row['item']}: not measured"
    predicted = (
        f", predicted {row['predicted_ms']:.4f} ({row['limit']})" if row["predicted_ms"] else ""
    )
    return f"       {row['item']}: {row['ms']:.4f} ms{predicted}, {row['tflops']:.0f} TFLOP/s"


def _chosen(row: Row) -> str:
    return f", {row['chosen']}" if row["chosen"] and row["chosen"] not in row["item"] else ""


def summary(rows: Sequence[Row], asked: Sequence[Item]) -> str:
    """Ceilings, the tiles beside cuDNN, failures, and omissions."""
    parts = _ceilings(rows), _tiles(rows), _verdicts(rows)
    lines = [line for part in parts for line in part]
    return "\n".join((*lines, _left_out(rows, asked)))


def _ceilings(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    measured = [row for row in rows if row["kind"] == "ceiling" and row["value"] is not None]
    yield from map(line, measured)


def _tiles(rows: Sequence[Row]) -> Iterator[str]:
    """One line per timed tile: ``model`` is the predicted time over the measured one, and ``cudnn``
    is cuDNN's time over ours.
    """
    measured = [row for row in rows if row["kind"] == "timing" and row["ok"] and row["ms"]]
    if not measured:
        return
    peers = {
        (row["layer"], row["direction"]): row["ms"]
        for row in measured
        if row["contender"] == "cudnn"
    }
    yield f"\n{'layer':12} {'op':6} {'tile':54} {'ms':>8} {'TFLOP/s':>8} {'model':>6} {'cudnn':>6}"
    ours = [row for row in measured if row["contender"] == "ours"]
    order = list(dict.fromkeys((row["layer"], row["direction"]) for row in ours))
    for row in sorted(ours, key=lambda row: order.index((row["layer"], row["direction"]))):
        peer = peers.get((row["layer"], row["direction"]))
        ratio = f"{peer / row['ms']:6.2f}" if peer else f"{'-':>6}"
        yield (
            f"{row['layer']:12} {row['direction']:6} {row['chosen']:54} {row['ms']:8.4f} "
            f"{row['tflops']:8.0f} {row['predicted_ms'] / row['ms']:6.2f} {ratio}"
        )


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    for kind, name in _KINDS.items():
        found = [row for row in rows if row["kind"] == kind]
        bad = [row for row in found if not row["ok"]]
        yield f"{name}: {len(found)} done, {len(bad)} failed"
        if shares := {row["item"]: row["error"] / row["bound"] for row in found if _has_share(row)}:
            worst = max(shares, key=lambda item: shares[item])
            yield f"  the largest error is {shares[worst]:.2f} of its bound: {worst}"
        yield from (f"  {line(row)}" for row in bad)


def _has_share(row: Row) -> bool:
    return row["kind"] == "check" and row["error"] is not None and bool(row["bound"])


def _left_out(rows: Sequence[Row], asked: Sequence[Item]) -> str:
    done = {row["item"] for row in rows}
    left = [item for item in asked if item.name not in done]
    if not left:
        return "nothing was left out"
    counts = ", ".join(
        f"{count} {name}"
        for kind, name in _KINDS.items()
        if (count := sum(type(item).__name__.lower() == kind for item in left))
    )
    return f"left out, as time was over: {counts}; the first is {left[0].name}"
