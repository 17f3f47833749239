"""Draw charts and write the README's table, only from the measurements in bench/results.

Each file gives FILE-roofline.png with every row as a point, and FILE-SUITE-DTYPE.png with a bar per
layer and peer. The table goes between two markers in the README.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BENCH = Path(__file__).parent
BEGIN, END = "<!-- bench report: begin -->", "<!-- bench report: end -->"
PEER_NAMES = {
    "cudnn": "cuDNN",
    "cudnn_nchw": "cuDNN, NCHW",
    "inductor": "Inductor",
    "flaggems": "FlagGems",
}
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
MARKERS = "os^Dv<>Pp"
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench report``."""
    results, readme = BENCH / "results", BENCH.parent / "README.md"
    parser.add_argument(
        "--results",
        type=Path,
        default=results,
        metavar="FOLDER",
        help="folder of the measurements and charts (default: bench/results)",
    )
    parser.add_argument(
        "--readme", type=Path, default=readme, metavar="FILE", help="file for the table"
    )
    parser.add_argument("--stdout", action="store_true", help="print the table; leave the README")


def run(args: argparse.Namespace) -> int:
    """Read, draw, write. Returns the exit code: 1 if there is nothing to read."""
    try:
        measured = _measured(args.results)
        if not measured:
            return _fail(f"no measurements in {args.results}", 1)
        for path, results in measured.items():
            for chart in draw(results, path):
                print(f"python -m bench report: {chart}", file=sys.stderr)
        text = "\n\n".join(map(table, measured.values()))
        if args.stdout:
            print(text)
        else:
            _insert(text, args.readme)
    except (ImportError, OSError, ValueError) as error:
        return _fail(str(error), 2)
    return 0


def _fail(text: str, code: int) -> int:
    print(f"python -m bench report: {text}", file=sys.stderr)
    return code


def _measured(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every checked file of ``bench kernels`` in a folder; other commands' files are ignored."""
    import jsonschema

    schema = json.loads((BENCH / "kernels.schema.json").read_text())
    found = {}
    for path in sorted(folder.glob("*.json")):
        results = load(path)
        if "ceilings" not in results:
            continue
        try:
            jsonschema.validate(results, schema)
        except jsonschema.ValidationError as error:
            raise ValueError(f"{path}: {error.json_path}: {error.message}") from None
        if results["gpu"] == "cpu":
            raise ValueError(f"{path} was made by --device cpu: it measures nothing")
        if results["rows"]:
            found[path] = results
    return found


def load(path: Path) -> dict[str, Any]:
    """The results in ``path``. Raises ValueError if it is not JSON with rows."""
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise ValueError(f"{path} holds no results")
    return results


# Rows: their names, their means, their lines.


def row_key(row: Row) -> tuple[str, str, str, str]:
    """The key of a row: suite, layer, op, dtype."""
    return row["suite"], row["layer"], row["op"], row["dtype"]


def peers_of(rows: Iterable[Row]) -> list[str]:
    """The peers in the rows, in a fixed order."""
    there = set().union(*(row["ratio"] for row in rows))
    return [peer for peer in PEER_NAMES if peer in there]


def geometric_mean(rows: Iterable[Row], peer: str) -> float | None:
    """Mean of the ratios to a peer, weighted by how often the network has a layer."""
    known = [(row["count"], row["ratio"][peer]) for row in rows if row["ratio"].get(peer)]
    if not known:
        return None
    return math.exp(sum(n * math.log(r) for n, r in known) / sum(n for n, _ in known))


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by their values of ``names``, in order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def line(row: Row) -> str:
    """A row as one line."""
    name = f"{row['suite']:22} {row['layer']:14} {row['op']:17} {row['dtype']:6}"
    ratios = "  ".join(f"{peer} {_number(ratio, '.2f')}" for peer, ratio in row["ratio"].items())
    errors = "".join(f"  [{who}: {what}]" for who, what in row.get("errors", {}).items())
    if row["ms"] is None:
        return f"{name} failed{errors}"
    return (
        f"{name} {row['ms']:9.4f} ms {row['tflops']:7.1f} TFLOP/s {row['gbs']:7.0f} GB/s "
        f"{row['roofline_share']:5.0%} of the roof  error {_number(row['error'], '.1e')}  "
        f"{ratios}{errors}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def summary(rows: Sequence[Row]) -> str:
    """Weighted geometric means by operator and dtype, per suite and overall; the worst rows."""
    peers = peers_of(rows)
    lines = ["", "geometric means of a peer's time over ours, weighted by the layers' count"]
    lines.append(" " * 49 + "".join(f"{peer:>12}" for peer in peers))
    for (op, dtype), same in grouped(rows, "op", "dtype").items():
        suites = grouped(same, "suite")
        means = {suite: part for (suite,), part in suites.items()}
        if len(means) > 1:
            means["all"] = same
        for suite, part in means.items():
            values = (_number(geometric_mean(part, peer), ".3f") for peer in peers)
            lines.append(f"{suite:22} {op:17} {dtype:8}" + "".join(f"{v:>12}" for v in values))

    def worst(row: Row) -> float:
        return min((r for r in row["ratio"].values() if r is not None), default=math.inf)

    lines += ["", "worst rows, each against its fastest peer"]
    lines += map(line, sorted(rows, key=worst)[:5])
    off = [abs(row["predicted_ms"] / row["ms"] - 1) for row in rows if _is_predicted(row)]
    if off:
        lines += ["", f"the planner's predictions are off by {statistics.median(off):.0%} (median)"]
    if failed := sum(row["ms"] is None for row in rows):
        lines += ["", f"{failed} rows failed"]
    return "\n".join(lines)


def _is_predicted(row: Row) -> bool:
    return row["ms"] is not None and row["predicted_ms"] is not None


# The README's table.


def table(results: dict[str, Any]) -> str:
    """One file's means as Markdown: one line per suite, dtype and operator."""
    rows = results["rows"]
    peers = peers_of(rows)
    heads = [
        "suite",
        "dtype",
        "operator",
        "TFLOP/s",
        "GB/s",
        "of the roof",
        *(PEER_NAMES[peer] for peer in peers),
    ]
    lines = [
        f"{results['gpu']}, driver {results['driver']}, PyTorch {results['torch']}, "
        f"Triton {results['triton']}, commit `{_short(results['commit'])}`. The last "
        f"{'column is' if len(peers) == 1 else 'columns are'} a peer's time over ours: above 1 "
        "ours is faster.",
        "",
        f"| {' | '.join(heads)} |",
        f"| {' | '.join('---' if n < 3 else '---:' for n in range(len(heads)))} |",
    ]
    # Sorting is stable.
    suites = list(grouped(rows, "suite"))
    rows = sorted(rows, key=lambda row: (suites.index((row["suite"],)), row["dtype"]))
    for (suite, dtype, op), part in grouped(rows, "suite", "dtype", "op").items():
        timed = [row for row in part if row["ms"]]
        total = sum(row["count"] * row["ms"] for row in timed)
        rates = (
            sum(row["count"] * row["ms"] * row[name] for row in timed) / total if timed else 0
            for name in ("tflops", "gbs", "roofline_share")
        )
        forms = (".0f", ".0f", ".0%")
        cells = [_number(rate or None, form) for rate, form in zip(rates, forms, strict=True)]
        cells += [_number(geometric_mean(part, peer), ".2f") for peer in peers]
        lines.append(f"| {' | '.join([suite, dtype, op, *cells])} |")
    return "\n".join(lines)


def _short(commit: str) -> str:
    head, dash, dirty = commit.partition("-")
    return head[:12] + dash + dirty


def _insert(text: str, readme: Path) -> None:
    old = readme.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme} has no lines {BEGIN} and {END} to put the table between")
    readme.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


# Charts.


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Write the charts of one file beside it. Returns their paths."""
    charts = [_save(_roofline(results), path.with_name(f"{path.stem}-roofline.png"))]
    for (suite, dtype), rows in grouped(results["rows"], "suite", "dtype").items():
        name = f"{path.stem}-{suite}-{dtype}.png"
        charts.append(
            _save(_ratios(rows, f"{suite}, {dtype}, {results['gpu']}"), path.with_name(name))
        )
    return charts


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same bytes from the same rows
    return path


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _roofline(results: dict[str, Any]) -> Any:
    """TFLOP/s over FLOP per byte. A row without products is at the left edge, by its GB/s."""
    rows = [row for row in results["rows"] if row["ms"] is not None]
    ceilings = results["ceilings"]
    intensities = [1e3 * row["tflops"] / row["gbs"] for row in rows]
    left = min([1.0, *(value for value in intensities if value)]) / 2
    right = 2 * max([1e3, *intensities])
    figure = _figure(10, 6)
    axes = figure.add_subplot(xscale="log", yscale="log")
    for name, peak in ceilings.items():
        if name == "copy_gbs":
            continue
        ridge = 1e3 * peak / ceilings["copy_gbs"]
        axes.plot([left, ridge, right], [left * peak / ridge, peak, peak], color="#666666", lw=1)
        axes.annotate(
            f"{name.removesuffix('_tflops')} {peak:.0f}", (right, peak), ha="right", va="bottom"
        )
    styles = {op: mark for (op,), mark in zip(grouped(rows, "op"), MARKERS, strict=False)}
    colours = {dtype: c for (dtype,), c in zip(grouped(rows, "dtype"), COLOURS, strict=False)}
    for (op, dtype), part in grouped(rows, "op", "dtype").items():
        x = [1e3 * row["tflops"] / row["gbs"] or left for row in part]
        y = [row["tflops"] or left * row["gbs"] / 1e3 for row in part]
        style = {"color": colours[dtype], "marker": styles[op]}
        axes.scatter(x, y, 24, alpha=0.7, label=f"{op}, {dtype}", **style)
    axes.set(xlabel="FLOP per byte (minimum of bytes)", ylabel="TFLOP/s", xlim=(left / 1.5, right))
    axes.set_title(f"{results['gpu']}: {ceilings['copy_gbs']:.0f} GB/s and TFLOP/s as measured")
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _ratios(rows: list[Row], title: str) -> Any:
    """One panel per operator: bars up from 1 if ours is faster, down if it is slower."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    panels = grouped(rows, "op")
    peers = peers_of(rows)
    widest = max(map(len, panels.values()))
    figure = _figure(max(6, 3 + 0.4 * widest), 0.8 + 2.6 * len(panels))
    all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, ((op,), part) in zip(all_axes, panels.items(), strict=True):
        width = 0.8 / max(1, len(peers))
        for number, peer in enumerate(peers):
            known = [
                (at, row["ratio"][peer]) for at, row in enumerate(part) if row["ratio"].get(peer)
            ]
            places = [at + (number - (len(peers) - 1) / 2) * width for at, _ in known]
            heights = [ratio - 1 for _, ratio in known]
            axes.bar(
                places, heights, width, bottom=1, color=COLOURS[number], label=PEER_NAMES[peer]
            )
        axes.axhline(1, color="black", lw=0.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", alpha=0.4)
        axes.set_xticks(range(len(part)), [row["layer"] for row in part], rotation=60, ha="right")
        axes.set(ylabel="peer's time / ours", title=op, xlim=(-0.6, widest - 0.4))
    figure.suptitle(title)
    if peers:
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
