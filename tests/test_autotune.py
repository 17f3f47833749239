"""Tuning: who may compete, who wins, what is remembered, and that processes share one file.

Most tests have fake plans: tiles that differ in their rows, ATen in the place of a kernel, and a
timer that looks the time up.
"""

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import GROUPED, PLAIN, STRIDED, operands, sliced
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import autotune, planner, tuning_cache
from kernels.autotune import Tuner
from kernels.conv import few_channels, implicit_gemm
from kernels.conv.engine import Dgrad, Fprop, Plan, Wgrad
from kernels.device import Device, describe
from kernels.geometry import Conv2dGeometry
from kernels.lang.epilogue import Epilogue
from kernels.ops.conv2d import conv2d, conv2d_dgrad, conv2d_wgrad
from kernels.problem import Problem
from kernels.tile import Tile

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def plans(*rows: int, engine=implicit_gemm.ENGINE, **fields) -> list[Plan]:
    """A fake plan for each number of rows, in this order of preference."""
    some = planner.plan(Problem("fprop", PLAIN, torch.float32, "ieee", describe(CPU)))
    tiles = [Tile(size, 16, 16, packed=True, **fields) for size in rows]
    return [some._replace(engine=engine, tile=tile) for tile in tiles]


class Fake:
    """A tuner over fake plans; ``ms`` maps their rows to times, ``wrong`` names those that err."""

    def __init__(
        self,
        folder: Path,
        ms: Mapping[int, float],
        wrong: Iterable[int] = (),
        candidates: list[Plan] | None = None,
        error: float = 1.0,
    ):
        self.ms, self.wrong, self.error = ms, set(wrong), error
        self.runs: list[int] = []
        self.timed: list[int] = []
        found = plans(*ms) if candidates is None else candidates
        self.tuner = Tuner(folder, self.measure, lambda problem: found)

    def measure(self, call, where: torch.device) -> float:
        call()
        self.timed.append(self.runs[-1])
        return self.ms[self.runs[-1]]

    def run(self, plan, *tensors):
        self.runs.append(plan.tile.rows)
        results = self.reference(*tensors)
        if plan.tile.rows in self.wrong:
            results[0].view(-1)[-1] += self.error
        return results

    def reference(self, *tensors):
        g, direction = self.g, self.direction
        pads = (*g.padding[0], *g.padding[1])
        rest = (g.stride, pads, g.dilation, g.groups, None)
        if direction == "fprop":
            return (conv2d.reference(*tensors, *rest, False).contiguous(),)
        if direction == "dgrad":
            return (conv2d_dgrad.reference(*tensors, (g.H, g.W), *rest, False),)
        strides = torch.empty(g.w_shape).stride()
        return conv2d_wgrad.reference(*tensors, g.w_shape, strides, *rest, True)

    def choose(
        self,
        direction="fprop",
        g=PLAIN,
        dtype=torch.float32,
        precision="ieee",
        layout="scattered",
        variant="",
        tensors=None,
    ) -> int:
        """The rows of the chosen plan."""
        self.g, self.direction = g, direction
        if tensors is None:
            o = operands(g, dtype, CPU)
            tensors = {
                "fprop": (o.x, o.w, o.bias, o.residual),
                "dgrad": (o.dy, o.w, None),
                "wgrad": (o.x, o.dy),
            }[direction]
        problem = Problem(direction, g, dtype, precision, describe(CPU), layout)
        plan = self.tuner.choose(problem, tensors, self.run, self.reference, variant)
        return plan.tile.rows


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


# Who wins.


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_the_quickest_wins_and_is_remembered_in_memory(tmp_path, direction):
    fake = Fake(tmp_path, {16: 3.0, 32: 1.0, 64: 2.0})
    assert fake.choose(direction) == 32
    assert fake.timed == [16, 32, 64]
    runs = len(fake.runs)
    assert fake.choose(direction) == 32
    assert len(fake.runs) == runs


def test_of_equals_the_planners_preference_wins(tmp_path):
    assert Fake(tmp_path, {64: 1.0, 16: 1.0, 32: 1.0}).choose() == 64


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("error", [0.3, torch.nan, torch.inf])
def test_a_quick_wrong_plan_loses_untimed(tmp_path, direction, error):
    fake = Fake(tmp_path, {16: 3.0, 32: 0.1, 64: 2.0}, wrong=[32], error=error)
    with pytest.warns(RuntimeWarning, match=r"rejected.*'rows': 32"):
        assert fake.choose(direction) == 64
    assert fake.timed == [16, 64]


def test_a_single_plan_is_checked_though_there_is_nothing_to_time(tmp_path):
    fake = Fake(tmp_path, {16: 1.0})
    assert fake.choose() == 16
    assert (fake.runs, fake.timed) == ([16], [])


def test_it_is_an_error_if_all_are_wrong(tmp_path):
    fake = Fake(tmp_path, {16: 1.0, 32: 2.0}, wrong=[16, 32])
    with pytest.raises(RuntimeError, match=r"no plan is right.*N=2, C=8, H=6, W=7"):
        fake.choose()
    assert files(tmp_path) == []


def test_a_plan_that_does_not_fit_the_device_loses(tmp_path):
    from triton.runtime.errors import OutOfResources

    fake = Fake(tmp_path, {16: 1.0, 32: 2.0})
    run = fake.run

    def refuse(plan, *tensors):
        if plan.tile.rows == 16:
            raise OutOfResources(300 << 10, 227 << 10, "shared memory")
        return run(plan, *tensors)

    fake.run = refuse
    with pytest.warns(RuntimeWarning, match="shared memory"):
        assert fake.choose() == 32


def test_without_memory_the_planner_decides(tmp_path):
    fake = Fake(tmp_path, {16: 1.0, 32: 2.0})

    def exhaust(*tensors):
        raise torch.OutOfMemoryError("no")

    fake.reference = exhaust
    untuned = planner.plan(problem_of(PLAIN, torch.float32))
    with pytest.warns(RuntimeWarning, match="no memory to tune"):
        assert fake.choose() == untuned.tile.rows
    assert fake.choose() == untuned.tile.rows  # and without a second warning
    assert files(tmp_path) == []


def test_at_most_few_compete(tmp_path):
    many = {16 * (1 << i): 20.0 - i for i in range(12)}
    fake = Fake(tmp_path, many)
    assert fake.choose() == list(many)[autotune.FEW - 1]
    assert fake.timed == list(many)[: autotune.FEW]


# The order of summation.


@pytest.mark.parametrize(("direction", "quickest"), [("fprop", 32), ("dgrad", 32), ("wgrad", 512)])
def test_only_plans_that_add_as_the_first_does_compete(tmp_path, direction, quickest):
    """Of wgrad only the engine is kept; it sums over the batch."""
    candidates = [
        *plans(16),
        *[plan._replace(tile=replace(plan.tile, depth=32)) for plan in plans(64)],
        *[plan._replace(tile=replace(plan.tile, packed=False)) for plan in plans(128)],
        *plans(256, engine=few_channels),
        *plans(512, split_k=2),
        *plans(32),
    ]
    ms = {16: 6.0, 32: 5.0, 64: 4.0, 128: 3.0, 256: 1.0, 512: 2.0}
    fake = Fake(tmp_path, ms, candidates=candidates)
    assert fake.choose(direction) == quickest
    assert 256 not in fake.timed


@pytest.mark.parametrize("layout", ["aligned", "channels_last", "scattered"])
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_all_that_compete_at_any_batch_add_in_the_same_order(direction, layout):
    gpu = Device("cuda", 90, multiprocessors=132, shared_memory=227 << 10)
    layer = Conv2dGeometry(1, 64, 56, 56, 128, 3, 3, (1, 1), ((1, 1), (1, 1)))
    competing = [
        plan
        for N in (1, 2, 5, 64, 1000)
        for plan in autotune._competitors(
            direction,
            planner.candidates(
                Problem(direction, replace(layer, N=N), torch.bfloat16, "ieee", gpu, layout)
            ),
        )
    ]
    assert len({plan.tile for plan in competing}) > 1
    assert len({(p.engine, p.tile.depth, p.tile.packed, p.tile.split_k) for p in competing}) == 1


def test_a_remembered_plan_that_adds_in_another_order_does_not_count(tmp_path):
    deep = plans(32)[0]
    deep = deep._replace(tile=replace(deep.tile, depth=32))
    store = tuning_cache.Store(tmp_path, tuning_cache.versions_of(CPU, describe(CPU)))
    store.put(autotune.class_of(problem_of(PLAIN, torch.float32)), autotune._record(deep))
    fake = Fake(tmp_path, {16: 1.0, 32: 1.0}, candidates=[*plans(16), deep])
    assert fake.choose() == 16
    assert fake.runs == [16]


# What counts as right.


def expected(problem, tensors):
    fake = Fake(Path(), {})
    fake.g, fake.direction = problem.g, problem.direction
    return autotune.expected_results(problem, tensors, fake.reference)


def problem_of(g, dtype, precision="ieee", direction="fprop") -> Problem:
    return Problem(direction, g, dtype, precision, describe(CPU))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float16, "ieee"),
        (torch.bfloat16, "ieee"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float64, "ieee"),
    ],
    ids=str,
)
def test_a_product_that_is_left_out_is_found_and_rounding_is_not(dtype, precision):
    g = replace(PLAIN, C=64, K=16)
    problem = problem_of(g, dtype, precision)
    o = operands(g, dtype, CPU)
    x, w, bias, residual = autotune.random_operands(problem, (*o.inputs[:2], None, None))
    right = expected(problem, (x, w, bias, residual))
    sum_error = autotune._sum_error(problem)

    tf32 = precision == "tf32"
    rounded = [(t.view(torch.int32) >> 13 << 13).view(torch.float32) if tf32 else t for t in (x, w)]
    y = torch.conv2d(*(t.double() for t in rounded), padding=1).to(dtype)
    assert autotune.worst_error((y,), right, sum_error) <= 1

    without = w.clone()
    without[3, 5, 1, 1] = 0
    y = torch.conv2d(x.double(), without.double(), padding=1).to(dtype)
    assert autotune.worst_error((y,), right, sum_error) > 2


def test_a_deep_sum_whose_low_bits_are_cut_off_is_right():
    """As tensor cores add: sixteen exact products, then towards zero to float32."""
    depth, width = 1 << 14, 64
    g = replace(PLAIN, C=depth, K=width, R=1, S=1)
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(2, depth, width, generator=generator).bfloat16().double().prod(0)
    total = torch.zeros(width, dtype=torch.float64)
    for part in products.split(16):
        exact = total + part.sum(0)
        total = exact.float().double()
        above = total.abs() > exact.abs()
        total = torch.where(above, total.float().nextafter(torch.tensor(0.0)).double(), total)
    right = [[autotune.Expected(products.sum(0), products.abs().sum(0))]]
    error = autotune.worst_error(
        (total.float(),), right, autotune._sum_error(problem_of(g, torch.bfloat16))
    )
    assert 0.1 < error < 0.9  # in the worst of 64 elements, nearer to the bound than rounding comes


def test_values_beyond_the_dtype_are_infinite_on_both_sides():
    right = [[autotune.Expected(torch.tensor([1e6, -1e6]), torch.tensor([1e6, 1e6]))]]
    inf = torch.inf
    assert autotune.worst_error((torch.tensor([inf, -inf]).half(),), right, 1e-7) == 0
    assert autotune.worst_error((torch.tensor([inf, inf]).half(),), right, 1e-7) == inf


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_the_reference_is_the_same_in_parts(monkeypatch, direction):
    g = replace(STRIDED, N=5)
    problem = problem_of(g, torch.float32, direction=direction)
    o = operands(g, torch.float32, CPU)
    tensors = {"fprop": o.inputs, "dgrad": (o.dy, o.w, None), "wgrad": (o.x, o.dy)}[direction]
    whole = expected(problem, tensors)
    monkeypatch.setattr(autotune, "_PART", 2 * (g.C * g.H * g.W + g.K * g.P * g.Q))
    parts = expected(problem, tensors)
    assert [len(result) for result in whole] == [1] * len(whole)
    assert [len(result) for result in parts] == [1 if direction == "wgrad" else 3] * len(whole)
    for (one,), several in zip(whole, parts, strict=True):
        for a, b in zip(one, zip(*several, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(b), a, rtol=1e-13, atol=1e-13)


def test_operands_are_drawn_anew_and_lie_as_the_callers_do():
    x = sliced(torch.zeros(2, 3, 4, 5)).fill_(torch.nan)
    w = torch.zeros(1 + 6 * 3 * 2 * 2)[1:].view(6, 3, 2, 2)
    bias = torch.zeros(1).expand(6)
    state = torch.get_rng_state()
    problem = problem_of(PLAIN, torch.float32)
    drawn = autotune.random_operands(problem, (x, w, bias, None))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[3] is None
    for ours, theirs in zip(drawn[:3], (x, w, bias), strict=True):
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype
        assert ours.data_ptr() % 16 == theirs.data_ptr() % 16
        assert ours.isfinite().all()
        assert ours.data_ptr() != theirs.data_ptr()
    assert x.isnan().all()


def test_nan_in_the_callers_operands_does_not_matter(tmp_path):
    o = operands(PLAIN, torch.float32, CPU)
    nan = tuple(torch.full_like(t, torch.nan) for t in o.inputs)
    fake = Fake(tmp_path, {16: 2.0, 32: 1.0, 64: 0.5}, wrong=[64])
    with pytest.warns(RuntimeWarning, match="rejected"):
        assert fake.choose(tensors=nan) == 32


# What is remembered.


def test_a_second_tuner_finds_the_winner_on_disk(tmp_path):
    assert Fake(tmp_path, {16: 2.0, 32: 1.0}).choose() == 32
    again = Fake(tmp_path, {16: 0.0, 32: 1.0})
    assert again.choose() == 32
    assert again.runs == []
    (path,) = files(tmp_path)
    content = json.loads(path.read_text())
    assert content["versions"]["torch"] == torch.__version__
    ((winner,),) = content["winners"].values()
    assert (winner["engine"], winner["rows"]) == ("implicit_gemm", 32)


CHANGES = {
    "direction": {"direction": "dgrad"},
    "dtype": {"dtype": torch.float64},
    "precision": {"precision": "tf32"},
    "layout": {"layout": "aligned"},
    "variant": {"variant": "relu"},
    "channels": {"g": replace(PLAIN, C=9)},
    "taps": {"g": replace(PLAIN, R=1)},
    "padding": {"g": replace(PLAIN, padding=((1, 2), (1, 1)))},
    "groups": {"g": replace(PLAIN, groups=2)},
    "batch": {"g": replace(PLAIN, N=3)},
    "height": {"g": replace(PLAIN, H=7)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_makes_another_class(tmp_path, change):
    assert Fake(tmp_path, {16: 1.0, 32: 2.0}).choose() == 16
    other = Fake(tmp_path, {16: 2.0, 32: 1.0})
    assert other.choose(**change) == 32
    assert other.timed
    assert other.choose() == 16  # from the same file


@pytest.mark.parametrize("change", [{"torch": "1"}, {"triton": "1"}, {"sources": "1"}], ids=str)
def test_other_versions_have_files_of_their_own(tmp_path, monkeypatch, change):
    assert Fake(tmp_path, {16: 1.0, 32: 2.0}).choose() == 16
    versions = tuning_cache.versions_of(CPU, describe(CPU)) | change
    monkeypatch.setattr(autotune, "versions_of", lambda *_: versions)
    assert Fake(tmp_path, {16: 2.0, 32: 1.0}).choose() == 32
    assert len(files(tmp_path)) == 2


def test_the_fingerprint_is_of_the_sources(monkeypatch, tmp_path):
    assert tuning_cache.versions_of(CPU, describe(CPU))["sources"] == tuning_cache.fingerprint()
    monkeypatch.setattr(tuning_cache, "__file__", str(tmp_path / "tuning_cache.py"))
    source = tmp_path / "a.py"
    source.write_text("one")
    first = tuning_cache.fingerprint.__wrapped__()
    assert tuning_cache.fingerprint.__wrapped__() == first
    source = source.rename(tmp_path / "b.py")
    renamed = tuning_cache.fingerprint.__wrapped__()
    source.write_text("two")
    assert len({first, renamed, tuning_cache.fingerprint.__wrapped__()}) == 3


def test_sizes_of_a_class():
    assert [autotune._round_up(n, 1) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    tops = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 56, 112, 224)
    assert [autotune._round_up(n, 3) for n in tops] == list(tops)
    assert [autotune._round_up(n, 3) for n in (9, 13, 27, 55, 225)] == [10, 14, 28, 56, 256]

    def name(**sizes):
        return autotune.class_of(problem_of(replace(PLAIN, **sizes), torch.float32))

    assert name(N=33, H=110, W=97) == name(N=64, H=97, W=112)
    assert name(N=32, H=110, W=97) != name(N=33, H=110, W=97)


def test_a_winner_that_is_no_candidate_is_measured_again_and_both_are_kept(tmp_path):
    assert Fake(tmp_path, {16: 2.0, 32: 1.0}).choose() == 32
    other = Fake(tmp_path, {16: 1.0, 64: 2.0})
    assert other.choose() == 16
    assert other.timed == [16, 64]
    for first, winner in ((16, 16), (32, 32)):
        again = Fake(tmp_path, {first: 0.0, 8: 1.0})
        assert again.choose() == winner
        assert again.timed == []


def test_splits_follow_the_exact_size(tmp_path):
    def split(split_k):
        return Fake(tmp_path, {16: 2.0, 32: 1.0}, candidates=plans(16, 32, split_k=split_k))

    assert split(4).choose("wgrad") == 32
    fewer = split(3)
    assert fewer.choose("wgrad") == 32
    assert fewer.timed == []
    both = plans(32, split_k=2) + plans(32, split_k=4)
    problem = problem_of(PLAIN, torch.float32, direction="wgrad")
    (path,) = files(tmp_path)
    store = tuning_cache.Store(tmp_path, tuning_cache.versions_of(CPU, describe(CPU)))
    assert store.path == path
    (name,) = json.loads(path.read_text())["winners"]
    assert name == autotune.class_of(problem)
    assert autotune._recall(store.get(name), both) is both[1]


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CNN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_cache.cache_folder() == tmp_path / ".cache" / "triton-cnn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuning_cache.cache_folder() == tmp_path / "x" / "triton-cnn"
    monkeypatch.setenv("TRITON_CNN_CACHE", str(tmp_path / "own"))
    assert tuning_cache.cache_folder() == tmp_path / "own"
    fake = Fake(tmp_path, {16: 1.0, 32: 2.0})
    fake.tuner = Tuner(None, fake.measure, lambda problem: plans(16, 32))
    fake.choose()
    assert len(files(tmp_path / "own")) == 1


# Files that are damaged, cannot be written, or are shared.


@contextmanager
def counted_warnings():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[]",
    "versions": lambda text: text.replace(torch.__version__, "0"),
    "winners": lambda text: json.dumps(json.loads(text) | {"winners": [1]}),
    "records": lambda text: json.dumps(json.loads(text) | {"winners": {"a": 1}}),
    "record": lambda text: json.dumps(json.loads(text) | {"winners": {"a": [1]}}),
    "field": lambda text: json.dumps(json.loads(text) | {"winners": {"a": [{"rows": {}}]}}),
    "list in a list": lambda text: json.dumps(
        json.loads(text) | {"winners": {"a": [{"box": [[1]]}]}}
    ),
    "deep": lambda text: "[" * 100_000,
    "deep and valid": lambda text: text[:-2] + ', "more": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "long number": lambda text: text[:-2] + ', "more": ' + "9" * 5_000 + "}",
    "large": lambda text: text + " " * tuning_cache._LARGEST,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_set_aside_with_one_warning(tmp_path, damage):
    Fake(tmp_path, {16: 2.0, 32: 1.0}).choose()
    (path,) = files(tmp_path)
    text = damage(path.read_text())
    path.write_text(text)
    fake = Fake(tmp_path, {16: 1.0, 32: 2.0})
    with counted_warnings() as found:
        assert fake.choose() == 16
        assert fake.choose("dgrad") == 16
        assert Fake(tmp_path, {16: 2.0, 32: 1.0}).choose() == 16
    assert [str(w.message).count("is damaged") for w in found] == [1]
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_text() == text
    assert aside.name in str(found[0].message)
    assert len(json.loads(path.read_text())["winners"]) == 2


def test_bytes_that_are_no_text_are_damage_too(tmp_path):
    Fake(tmp_path, {16: 2.0, 32: 1.0}).choose()
    (path,) = files(tmp_path)
    path.write_bytes(b"\xff\xfe\xfd")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert Fake(tmp_path, {16: 1.0, 32: 2.0}).choose() == 16


def test_damage_while_running_loses_nothing_that_this_process_knows(tmp_path):
    fake = Fake(tmp_path, {16: 2.0, 32: 1.0})
    fake.choose()
    (path,) = files(tmp_path)
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="is damaged"):
        fake.choose("dgrad")
    assert len(json.loads(path.read_text())["winners"]) == 2


def test_a_file_that_was_lost_and_begun_anew_is_completed(tmp_path):
    versions = tuning_cache.versions_of(CPU, describe(CPU))
    old, new = tuning_cache.Store(tmp_path, versions), tuning_cache.Store(tmp_path, versions)
    old.put("a", {"rows": 1})
    old.path.unlink()
    assert old.get("a") == [{"rows": 1}]
    new.put("a", {"rows": 2})
    old.put("b", {"rows": 3})
    assert new.get("a") == [{"rows": 2}, {"rows": 1}]
    assert new.get("b") == [{"rows": 3}]


def test_an_unwritable_folder_costs_one_warning(tmp_path):
    (tmp_path / "file").touch()  # root may write anywhere, but not below a file
    fake = Fake(tmp_path / "file" / "cache", {16: 2.0, 32: 1.0})
    with counted_warnings() as found:
        assert fake.choose() == 32
        assert fake.choose("dgrad") == 32
        assert fake.choose("wgrad", g=replace(PLAIN, N=1)) == 32
        assert fake.choose("wgrad", g=replace(PLAIN, N=1, H=5)) == 32
    assert ["in this process only" in str(w.message) for w in found] == [True]
    runs = len(fake.runs)
    assert fake.choose() == 32
    assert len(fake.runs) == runs


def plant(kind: str, path: Path, victim: Path) -> None:
    """At ``path`` what another user of a shared folder may have put there."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(victim)
        case "link to nothing":
            path.symlink_to(victim.with_name("nothing"))
        case "link to itself":
            path.symlink_to(path)
        case "link to a device":
            path.symlink_to("/dev/zero")


@pytest.mark.parametrize("suffix", [".json", ".lock"])
@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "link", "link to nothing", "link to itself", "link to a device"]
)
def test_what_is_no_regular_file_costs_one_warning(tmp_path, kind, suffix):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "shared"
    Fake(folder, {16: 2.0, 32: 1.0}).choose()
    (path,) = files(folder)
    path.unlink()
    plant(kind, path.with_suffix(suffix), victim)
    fake = Fake(folder, {16: 1.0, 32: 2.0})
    with counted_warnings() as found:
        assert fake.choose() == 16
        assert fake.choose("dgrad") == 16
    assert ["in this process only" in str(w.message) for w in found] == [True]
    assert "\n" not in str(found[0].message)
    assert victim.read_text() == "precious"
    assert not victim.with_name("nothing").exists()


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing", "pipe"])
def test_what_a_killed_writer_left_is_written_anew(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "shared"
    store = tuning_cache.Store(folder, tuning_cache.versions_of(CPU, describe(CPU)))
    folder.mkdir()
    left = store.path.with_suffix(".new")
    left.write_text("{")
    plant(kind, left, victim)
    store.put("a", {"rows": 1})
    assert json.loads(store.path.read_text())["winners"] == {"a": [{"rows": 1}]}
    assert not store.path.is_symlink()
    assert not left.exists()
    assert victim.read_text() == "precious"


def test_a_child_that_was_forked_meanwhile_holds_no_lock(tmp_path):
    """Its copy of the open file would keep it locked for as long as it lives."""
    store = tuning_cache.Store(tmp_path, tuning_cache.versions_of(CPU, describe(CPU)))
    with store._lock():
        opened = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
        (number,) = (int(fd.name) for fd in opened if fd.readlink().suffix == ".lock")
        copy = os.dup(number)
    try:
        with store._lock(patience=0.5):
            pass
    finally:
        os.close(copy)


def test_a_lock_that_is_never_released_costs_one_warning(tmp_path):
    store = tuning_cache.Store(tmp_path, tuning_cache.versions_of(CPU, describe(CPU)))
    patient = store._lock
    store._lock = lambda: patient(patience=0.05)
    other = tuning_cache.Store(tmp_path, tuning_cache.versions_of(CPU, describe(CPU)))
    with other._lock(), counted_warnings() as found:
        store.put("a", {"rows": 1})
        store.put("b", {"rows": 2})
    assert ["locked for long" in str(w.message) for w in found] == [True]
    assert store.get("b") == [{"rows": 2}]


def test_eight_processes_at_once_lose_no_entry(tmp_path):
    """They start from what this process has put there, and find it."""
    versions = tuning_cache.versions_of(CPU, describe(CPU))
    tuning_cache.Store(tmp_path, versions).put("first", {"rows": 0})
    script = f"""
import os, pathlib
from kernels import tuning_cache
go_in, go_out = os.pipe()
for i in range(8):
    if os.fork() == 0:
        os.close(go_out)
        os.read(go_in, 1)
        store = tuning_cache.Store(pathlib.Path({str(tmp_path)!r}), {versions!r})
        assert store.get("first") == [{{"rows": 0}}]
        for j in range(20):
            store.put(f"process {{i}} entry {{j}}", {{"rows": i}})
            store.put("shared", {{"rows": i}})
        os._exit(0)
os.close(go_out)
assert all(os.wait()[1] == 0 for _ in range(8))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (path,) = files(tmp_path)
    content = json.loads(path.read_text())["winners"]
    assert content.pop("first") == [{"rows": 0}]
    shared = content.pop("shared")
    assert sorted(record["rows"] for record in shared) == list(range(8))
    assert content == {f"process {i} entry {j}": [{"rows": i}] for i in range(8) for j in range(20)}
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".lock"}


# When it is on.


def test_it_is_off_by_default_and_on_within_the_context():
    assert not autotune.is_enabled()
    with autotune.enabled():
        assert autotune.is_enabled()
        with autotune.enabled(False):
            assert not autotune.is_enabled()
        assert autotune.is_enabled()
    assert not autotune.is_enabled()


def test_it_holds_in_other_threads_as_autograd_has_some():
    seen = []
    with autotune.enabled():
        thread = threading.Thread(target=lambda: seen.append(autotune.is_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_contexts_of_threads_may_end_in_any_order():
    first, second = autotune.enabled(True), autotune.enabled(False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not autotune.is_enabled()
    third = autotune.enabled(True)
    third.__enter__()
    second.__exit__(None, None, None)
    assert autotune.is_enabled()
    third.__exit__(None, None, None)
    assert not autotune.is_enabled()


def test_the_environment_turns_it_on():
    script = "from kernels import autotune; print(autotune.is_enabled())"
    environment = os.environ | {"TRITON_CNN_AUTOTUNE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr


def test_threads_measure_a_class_once(tmp_path):
    fake = Fake(tmp_path, {16: 2.0, 32: 1.0})
    chosen = []
    threads = [threading.Thread(target=lambda: chosen.append(fake.choose())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [32] * 4
    assert fake.timed == [16, 32]


def test_neither_fake_nor_meta_nor_empty_tensors_are_measured(tmp_path):
    fake = Fake(tmp_path, {16: 2.0, 32: 1.0})
    rows = planner.plan(problem_of(PLAIN, torch.float32)).tile.rows
    with FakeTensorMode():
        fakes = (torch.empty(PLAIN.x_shape), torch.empty(PLAIN.w_shape), None, None)
    assert fake.choose(tensors=fakes) == rows
    assert fake.choose(tensors=[t if t is None else t.to("meta") for t in fakes]) == rows
    fake.choose(g=replace(PLAIN, N=0))
    assert fake.runs == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_while_a_graph_is_captured(tmp_path, monkeypatch):
    """On a GPU that is not there: only what a capture would forbid is missing."""
    device = replace(describe(CPU), backend="cuda", arch=90, multiprocessors=132)
    problem = Problem("fprop", PLAIN, torch.float32, "ieee", device)
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(autotune, "versions_of", lambda *_: {"device": "GPU"})

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    tensors = [torch.empty(PLAIN.x_shape).as_subclass(OnGPU), None]
    tuner = Tuner(tmp_path, candidates=lambda problem: plans(16, 32))

    def run(*_):
        raise AssertionError("it ran")

    assert tuner.choose(problem, tensors, run, run) == planner.plan(problem)
    tuning_cache.Store(tmp_path, {"device": "GPU"}).put(
        autotune.class_of(problem), autotune._record(plans(32)[0])
    )
    assert tuner.choose(problem, tensors, run, run).tile.rows == 32  # a known class


# End to end.


@pytest.mark.parametrize(
    ("g", "dtype"),
    [(STRIDED, torch.bfloat16), (GROUPED, torch.float32)],
    ids=["strided", "grouped"],
)
def test_the_first_engine_passes_and_is_timed(tmp_path, device, g, dtype):
    """All three directions of the kernels themselves, with the timer that a user gets."""
    o = operands(g, dtype, device, "channels_last")
    pads = (*g.padding[0], *g.padding[1])
    rest = (g.stride, pads, g.dilation, g.groups, None)
    strides = o.w.stride()

    def fprop(plan, x, w, bias, residual):
        y = torch.empty_like(o.dy)
        call = Fprop(x, w, y, g, epilogue=Epilogue(bias, residual, relu=True))
        plan.engine.launch(call, plan.tile)
        return (y,)

    def dgrad(plan, dy, w, bias):
        dx = torch.empty_like(o.x)
        plan.engine.launch(Dgrad(dy, w, dx, g, bias=bias), plan.tile)
        return (dx,)

    def wgrad(plan, x, dy):
        dw, db = torch.empty_like(o.w), torch.empty_like(o.bias)
        plan.engine.launch(Wgrad(x, dy, dw, db, g), plan.tile)
        return dw, db

    calls = {
        "fprop": (o.inputs, fprop, lambda *t: (conv2d.reference(*t, *rest, True),)),
        "dgrad": (
            (o.dy, o.w, None),
            dgrad,
            lambda *t: (conv2d_dgrad.reference(*t, (g.H, g.W), *rest, True),),
        ),
        "wgrad": (
            (o.x, o.dy),
            wgrad,
            lambda *t: conv2d_wgrad.reference(*t, g.w_shape, strides, *rest, True),
        ),
    }
    timed = []

    def measure(call, where):
        timed.append(autotune.measure(call, where))
        return timed[-1]

    def candidates(problem):
        found = planner.candidates(problem)
        tile = found[0].tile
        return [*found, found[0]._replace(tile=replace(tile, rows=tile.rows // 2))]

    tuner = Tuner(tmp_path, measure, candidates)
    for direction, (tensors, run, reference) in calls.items():
        problem = Problem(direction, g, dtype, "ieee", describe(device), "channels_last")
        plan = tuner.choose(problem, tensors, run, reference)
        assert plan.engine is implicit_gemm.ENGINE
        with pytest.raises(RuntimeError, match="no plan is right"):
            tuner.choose(
                problem, tensors, lambda *a, run=run: [t * 1.01 for t in run(*a)], reference, "off"
            )
    assert len(timed) >= 6
    assert min(timed) > 0
    assert len(json.loads(files(tmp_path)[0].read_text())["winners"]) == 3
