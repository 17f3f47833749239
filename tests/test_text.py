"""Names of files and classes that terminals, charts and pages must not take for something else."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cnn.console import table
from cnn.figures import new_figure, png
from cnn.text import caption, lines, plain
from cnn.visualize.page import page

UNDECODABLE = os.fsdecode(b"caf\xe9")

SHOWN = {
    "T-shirt/top": "T-shirt/top",
    "caf\u00e9 \u732b": "caf\u00e9 \u732b",
    UNDECODABLE: r"caf\xe9",
    "a\nb\tc\r": r"a\nb\tc\r",
    "\x1b[31mred\x07": r"\x1b[31mred\x07",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2028\u200b\xa0": r"\u2028\u200b\xa0",
    "\ud800\U000e0001": r"\ud800\U000e0001",
}


@pytest.mark.parametrize("text", SHOWN, ids=ascii)
def test_text_is_shown_on_one_line(text):
    assert plain(text) == SHOWN[text]
    assert plain(plain(text)) == plain(text)
    assert lines(f"{text.replace(chr(10), '')}\n{text}").count("\n") == 1 + text.count("\n")
    plain(text).encode()


HOSTILE = [
    "$5_bill_^$", "$", r"\$x$", "_{", "<script>alert(1)</script>", "a\nb", "\x1b[2J\x1b[31mred",
    UNDECODABLE, "caf\u00e9", "\u732b\u202e", "  ", "-x", "'\"&amp;%s{0}",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_charts_tables_and_pages_take_any_text(text):
    figure = new_figure("texts", layout="constrained")
    axes = figure.subplots()
    axes.set_title(caption(f"{text} of {text}"))
    axes.set_xticks([0], [caption(text)])
    axes.plot([0], label=caption(text))
    axes.legend()
    assert len(png(figure)) > 1000
    assert len(axes.get_legend().get_texts()) == 1
    assert table([(text, "1"), ("b", "2")], "<>").count("\n") == 1
    html = page(text, text, b"png", f"{text}\n{text}")
    html.encode()
    assert "<script>a" not in html
    assert "\x1b" not in html


CLASSES = ["$5_bill_^$", "<script>", "a\nb", "\x1b[31mred", UNDECODABLE, "\u732b"]


@pytest.fixture(scope="module")
def run(cpu, tmp_path_factory) -> Path:
    """A run on classes of such names, in a folder of such a name."""
    root = tmp_path_factory.mktemp("hostile") / f"$x$ {UNDECODABLE}\n<b>"
    for number, name in enumerate(CLASSES):
        (root / "set" / name).mkdir(parents=True)
        for image in range(12):
            picture = Image.new("RGB", (32, 32), (40 * number, 0, 0))
            picture.save(root / "set" / name / f"$\n{image}{UNDECODABLE}.png")
    argv = ["train", "--model", "lenet5", "--size", 32, "--epochs", 1, "--batch-size", 8]
    argv += ["--data", f"folder:{root}/set", "--output", root / "run"]
    code, out, err = cpu.run(*argv, "--seed", 1)
    assert code == 0, err
    assert out.endswith("\n")
    return root / "run"


def safe(text: str, count: int) -> None:
    """Hold a command's output to its ``count`` lines of printable characters."""
    assert len(text.splitlines()) == count
    assert all(c.isprintable() or c in "\n\t" for c in text)


def test_eval_shows_any_class(cpu, run):
    code, out, err = cpu.run("eval", run / "last.pt")
    assert (code, "Traceback" in err) == (0, False), err
    shown = [plain(name) for name in sorted(CLASSES)]
    assert [line.split("  ")[0] for line in map(str.strip, out.splitlines()[2:8])] == shown
    safe(out, 2 + 6 + 1 + 3 + 2 + 4)
    assert (run / "last-confusion.png").stat().st_size > 1000


def test_predict_names_any_file(cpu, run):
    folder = run.parent / "set" / "\x1b[31mred"
    broken = folder / "broken\n\x1b[0m.png"
    broken.write_text("no image")
    code, out, err = cpu.run("predict", run / "last.pt", folder, "--top", 6)
    broken.unlink()
    assert code == 1
    safe(out, 12)
    safe(err, 1)
    for line in out.splitlines():
        path, *pairs = line.split("\t")
        assert path.startswith(plain(folder))
        assert {*pairs[::2]} == {*map(plain, CLASSES)}
    assert r"broken\n\x1b[0m.png: cannot identify image file" in err


SHOW = {
    "occlusion": ["--square", 8, "--stride", 8],
    "invariance": ["--limit", 2],
    "ablation": ["--limit", 4],
    "architecture": [],
    "maps": ["--only", "a\nb"],
}


@pytest.mark.parametrize("what", SHOW)
def test_show_takes_any_class(cpu, run, what):
    place = run / f"{what} $y$ {UNDECODABLE}\n"
    argv = ["--checkpoint", run / "last.pt", "--output", place]
    code, out, err = cpu.run("show", what, *argv, *SHOW[what])
    assert code == 0, err
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.splitlines()[-2:] == [f"{plain(place)}.png", f"{plain(place)}.html"]
    html = place.with_name(f"{place.name}.html").read_text(encoding="utf-8")
    assert html.count("<script>") == 1  # the page's own
    assert "<b>" not in html


def test_predict_names_files_of_any_bytes(cpu, run, tmp_path):
    draw = random.Random(int(os.environ.get("TRITON_CNN_EXAMPLES", "0")))
    letters = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    letters += ["\u202e".encode(), "\u00e9".encode(), b"$", b"<b>", b"\xed\xa0\x80", b"\xff"] * 8
    found = set()
    for number in range(100):
        name = b"".join(draw.choices(letters, k=draw.randrange(1, 40)))
        place = Path(tmp_path, os.fsdecode(b"%d%s.png" % (number, name)))
        Image.new("RGB", (8, 8)).save(place)
        found.add(plain(place))
    code, out, err = cpu.run("predict", run / "last.pt", tmp_path)
    assert (code, err) == (0, "")
    safe(out, 100)
    assert {line.split("\t")[0] for line in out.splitlines()} == found


def test_errors_are_one_line(cpu, run):
    for argv in (
        ["eval", run / "none\n.pt"],
        ["predict", run / "last.pt", run / "none"],
        ["show", "maps", "--checkpoint", run / "last.pt", "--only", "x\n"],
        ["train", "--data", f"folder:{run}/none"],
        ["train", "--resume", run / "none"],
    ):
        code, out, err = cpu.run(*argv)
        assert code in (1, 2)
        assert out == ""
        safe(err, 1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_that_know_few_characters(run, encoding):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(root)}
    environment |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-m", "cnn", "eval", str(run / "last.pt")]
    done = subprocess.run(argv, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"\u732b" in done.stdout
    assert b"test accuracy" in done.stdout
