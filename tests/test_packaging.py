"""What is installed, what an import does, and that imports between modules only go down."""

import ast
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cnn

ROOT = Path(__file__).parents[1]
FOLDERS = ("lang", "pool", "conv", "conv_pool", "ops")
PACKAGES = (
    *("kernels", *(f"kernels.{name}" for name in FOLDERS)),
    *(
        "cnn",
        *(f"cnn.{name}" for name in ("cli", "data", "graphs", "models", "training", "visualize")),
    ),
)

# Lowest first. A module may import those of lower rows, never its neighbours. A folder is one name:
# its own modules may import each other.
ROWS = """
kernels
kernels.geometry kernels._private
kernels.device
kernels.tile kernels.problem kernels.replay
kernels.cost_model
kernels.lang
kernels.pool
kernels.conv
kernels.conv_pool
kernels.planner kernels.tuning_cache
kernels.autotune
kernels.ops
cnn.arguments cnn.autocast cnn.errors cnn.text cnn.files
cnn.console cnn.figures
cnn.composed
cnn.functional
cnn.layers
cnn.graphs
cnn.compile_backend
cnn.summaries cnn.exporting
cnn.conversion
cnn.models
cnn
cnn.data
cnn.training
cnn.visualize
cnn.cli
cnn.__main__
"""
ROW = {name: row for row, line in enumerate(ROWS.split("\n")) for name in line.split()}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for package in PACKAGES
    for path in (ROOT / package.replace(".", "/")).glob("*.py")
}


def imported(name: str) -> set[str]:
    """All modules that the module ``name`` imports, wherever in its source."""
    path = SOURCES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            inner = {f"{source}.{alias.name}" for alias in node.names} & SOURCES.keys()
            # The names of ``from . import device`` are modules; those of other imports are not.
            found.update(inner or {source})
    return found


def place(name: str) -> str:
    """The name in a row: a module's own, or its folder's."""
    return name if name in ROW else name.rpartition(".")[0]


def test_the_rows_name_every_module():
    assert ROW.keys() == {place(name) for name in SOURCES}
    assert ROW.keys() <= SOURCES.keys()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_only_go_down(name):
    outside = {place(other) for other in imported(name) & SOURCES.keys()} - {place(name)}
    assert {other for other in outside if ROW[other] >= ROW[place(name)]} == set()


def test_imports_make_no_circle():
    TopologicalSorter({name: imported(name) & SOURCES.keys() for name in SOURCES}).prepare()


def test_the_geometry_knows_only_the_standard_library():
    roots = {module.split(".")[0] for module in imported("kernels.geometry")}
    assert roots <= sys.stdlib_module_names


def test_sources_import_neither_tests_nor_benchmarks():
    roots = {module.split(".")[0] for name in SOURCES for module in imported(name)}
    assert not roots & {"tests", "bench"}
    assert {"torch", "triton", "kernels"} <= roots


def test_import_touches_no_gpu_compiles_nothing_and_loads_little(tmp_path):
    """With every way to a GPU walled up; without the interpreter, which would need none."""
    script = """
import torch, triton
def wall(*args, **kwargs):
    raise AssertionError("importing cnn asked for a GPU")
for name in ("_lazy_init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, wall)
torch.cuda.get_device_properties = torch.cuda.get_device_capability = wall
import sys
before = set(sys.modules)
import cnn, cnn.functional
from kernels.device import INTERPRET, launches
assert not INTERPRET
assert launches() == {}
assert triton.runtime.driver._active is None
own = ("cnn", "kernels", "triton", *sys.stdlib_module_names)
others = {n for n in sys.modules.keys() - before if n.partition(".")[0] not in own}
# What counts FLOPs; the rest, a tenth of a second and more each, when it is asked for.
assert others <= {"torch.utils.flop_counter", "torch.utils.module_tracker"}, others
assert "cnn.visualize" not in sys.modules
assert callable(cnn.visualize.deconvnet)
assert "matplotlib" not in sys.modules
assert "cnn.compile_backend" not in sys.modules
assert str(cnn.compile_report()) == ""
try:
    cnn.nothing
except AttributeError as error:
    assert str(error) == "module 'cnn' has no attribute 'nothing'"
else:
    raise AssertionError
"""
    environment = {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, env=environment, check=True
    )
    assert not (tmp_path / "cache").exists()


def test_a_wheel_holds_the_two_packages_alone(tmp_path):
    for folder in ("kernels", "cnn", "tests", "bench"):
        ignored = shutil.ignore_patterns("__pycache__")
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    wheel = zipfile.ZipFile(tmp_path / done.stdout.split()[-1])
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in SOURCES.values()}
    assert names == sources | {"kernels/py.typed", "cnn/py.typed"}
    (declared,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    entry_points = wheel.read(declared).decode().split("\n\n")
    assert any(
        name.startswith(f"triton_cnn-{cnn.__version__}.dist-info/") for name in wheel.namelist()
    )
    backend = "[torch_dynamo_backends]\ntriton_cnn = cnn.compile_backend:triton_cnn"
    assert backend in map(str.strip, entry_points)
