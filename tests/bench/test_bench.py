"""The benchmark's arithmetic, table and report. Figures are taken of toys only."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import bench.__main__
import bench.measure
import pytest
import torch
from bench import models, report
from bench.__main__ import main
from bench.floor import Products, products
from bench.measure import PATIENCE, Setup, Spread, Timed, Times, interleaved, peak, saved, spread
from bench.row import Figure, Goal, Result, Row, exact_value, result
from bench.table import TABLE, run
from torch import nn

FAST = Setup(rounds=3, seconds=0)


def test_rho_and_ratios_are_taken_within_rounds():
    """A slow round that slows all variants changes neither rho nor a ratio."""
    times = Times({"base": [1.0, 2.0, 4.0], "ours": [1.1, 2.2, 4.4], "PEFT": [1.4, 2.8, 5.6]})
    assert times.ratio("ours", "base").value == pytest.approx(1.1)
    assert times.rho().value == pytest.approx(0.1 / 0.4)
    assert times.ms("base") == 2000
    assert "ours 1.1, PEFT 1.4 x base 2e+03 ms" in times.summary()


def test_rho_of_nothing_is_not_measurable():
    """If PEFT shows no overhead, there is no rho."""
    times = Times({"base": [1.0, 1.0], "ours": [1.1, 1.1], "PEFT": [0.9, 0.9]})
    assert math.isinf(times.rho().value)
    assert report.number(times.rho().value) == "not measurable"


def test_spread_returns_the_median_and_the_quartiles():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0)


def test_every_variant_runs_once_per_round():
    """Each call is timed `number` times, with what runs before and after it untimed."""
    seen: list[str] = []
    calls = {
        "a": Timed(lambda: seen.append("a"), before=lambda: seen.append("("), after=lambda: seen.append(")"), number=2),
        "b": Timed(lambda: seen.append("b")),
    }
    times = interleaved(calls, FAST, clock=lambda timed: [timed.call() for _ in range(timed.number)] and 1.0)
    assert "".join(seen).replace("b", "") == "(aa)" * 4
    assert seen.count("b") == 4
    assert times.seconds == {"a": [0.5] * 3, "b": [1.0] * 3}


def test_rounds_go_on_until_rho_is_steady(monkeypatch):
    """Rounds end when rho is steady, or when patience ends. The clock of this test counts one second per round."""
    monkeypatch.setattr(bench.measure, "time", SimpleNamespace(perf_counter=iter(range(10**6)).__next__))
    setup, rounds = Setup(rounds=3, seconds=5), {}
    for name, swing in (("steady", 0.0), ("shaky", 0.2)):
        swings = itertools.cycle([1.1, 1.1 + swing])
        seconds = {"base": itertools.repeat(1.0), "ours": swings, "PEFT": itertools.repeat(1.4)}
        calls = {who: Timed(partial(next, ticks)) for who, ticks in seconds.items()}
        rounds[name] = len(interleaved(calls, setup, clock=lambda timed: timed.call(), steady=True).seconds["ours"])
    assert rounds == {"steady": setup.seconds - 2, "shaky": PATIENCE * setup.seconds - 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_computes_what_PEFT_computes(dtype):
    """For one token, a few, and many."""
    model = models.trio(models.Block(["q_proj", "k_proj"], 16, 24, dtype), ["q_proj", "k_proj"])
    reference = products(model)
    assert {type(m) for m in reference.children()} == {Products}
    assert {type(m) for m in model.base.children()} == {nn.Linear}
    for tokens in (1, 9, 100):
        x = torch.randn(1, tokens, 16, dtype=dtype)
        with torch.no_grad():
            models.agree(reference(x), model.theirs(x), dtype)


def test_peak_and_saved_count_bytes():
    """The peak counts what is added to what was there; saved counts every storage once, without parameters."""
    x = torch.randn(64, 64, requires_grad=True)
    assert peak(Timed(lambda: (x.detach() + 1) * 2), FAST) == pytest.approx(
        2 * 64 * 64 * 4, abs=64
    )  # and the numbers 1 and 2
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    assert saved(lambda: linear(x), linear) == 0
    linear.requires_grad_(True)
    assert saved(lambda: (linear(x), linear(x)), linear) == x.nbytes


def test_variants_that_disagree_are_not_timed():
    """A variant that computes something else raises AssertionError."""
    models.agree([torch.ones(3)], [torch.ones(3)], torch.float32)
    with pytest.raises(AssertionError, match="apart"):
        models.agree([torch.ones(3)], [torch.ones(3) * 1.01], torch.float32)


def test_the_variants_agree():
    """Ours and PEFT's have the same A and B, none of which is zero, and the same outputs and gradients."""
    model, x = (
        models.trio(models.Block(["q_proj", "k_proj"], 16, 24, torch.float32), ["q_proj", "k_proj"]),
        torch.randn(4, 16),
    )
    sites = [(*ours, *theirs) for ours, theirs in models.pairs(model.ours, model.theirs)]
    assert len(sites) == 2
    assert all(torch.equal(A, C) and torch.equal(B, D) and B.abs().min() > 0 for A, B, C, D in sites)
    models.agree(model.ours(x), model.theirs(x), torch.float32)
    models.compare_gradients(model, lambda m: sum(y.square().sum() for y in m(x)).backward(), torch.float32)
    assert models.relative_difference(model.ours(x), model.base(x)) > 0.05


def test_every_row_of_the_table_is_complete():
    """Every row has a unique name, a limit, goals of which the aim is not above the must, and a function."""
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert callable(row.measure)
        assert row.goals
        assert row.what
        assert row.limit
        assert all(g.must is None or g.aim is None or g.aim <= g.must for g in row.goals.values())


def invented_row() -> Row:
    """Return a row of invented figures, one for each verdict, which fails at the end."""

    def measure(setup):
        for case, value in (("good", 0.2), ("fair", 0.4), ("bad", 0.6)):
            yield Figure(
                case=case,
                metric="rho",
                value=exact_value(value),
                beside="ours 1 | PEFT 2",
                differ=1e-6,
                why=lambda: "mm 90%",
            )
        raise RuntimeError("broke off")

    return Row(
        name="invented",
        what="nothing",
        limit="none",
        goals={"rho": Goal(0.5, 0.3)},
        measure=measure,
        bound="It is bounded by fancy.",
    )


def test_results_are_judged_reported_and_read_back():
    """Only what missed its goal is profiled and explained, a row that failed is reported, and JSON restores all."""
    row, reported = invented_row(), []
    results = run([row], FAST, reported.append)
    assert [r.verdict for r in results] == ["met", "aim missed", "must MISSED", "failed"]
    assert [r.profile for r in results] == ["", "mm 90%", "mm 90%", ""]
    assert reported == results
    text = report.markdown([row], results, FAST, ["a machine"])
    assert "| invented | fair | rho | 0.5 | 0.3 | 0.4 | aim missed | ours 1 \\| PEFT 2 |" in text
    assert "bounded by fancy" in text
    assert "fair, rho: mm 90%" in text
    assert "good, rho: mm" not in text
    assert "RuntimeError: broke off" in text
    again = report.from_json(report.to_json(results, ["a machine"]))
    assert again[:3] == results[:3]
    assert json.loads(report.to_json(results, []))["about"] == []
    for r in results:
        report.say(r)
    report.show([row], results, ["a machine"])


@pytest.mark.parametrize(
    ("rho", "verdict"),
    [
        (exact_value(-0.3), "not seen"),
        (exact_value(math.inf), "not seen"),
        (exact_value(0.1), "met"),
        (Spread(0.1, 0.06, 0.15), "met"),
        (Spread(0.1, 0.06, 0.17), "not seen"),
        (Spread(2.7, 1.4, 15.9), "not seen"),
    ],
)
def test_a_rho_that_noise_hides_has_no_verdict(rho, verdict):
    """An overhead was not seen if rho is negative or infinite, or smaller than the distance of its quartiles."""
    assert result(invented_row(), Figure(case="", metric="rho", value=rho)).verdict == verdict


def test_only_what_missed_its_goal_is_explained():
    row = invented_row()
    met = result(row, Figure(case="good", metric="rho", value=exact_value(0.1)))
    assert report.paragraphs([row], [met]) == []


def test_rest_takes_the_other_rows_from_an_earlier_run(tmp_path, monkeypatch):
    """The document names both runs, and its rows are in the order of the table."""
    rows = [replace(invented_row(), name=name) for name in ("one", "two", "three")]
    monkeypatch.setattr(bench.__main__, "TABLE", tuple(rows))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    earlier = [
        Result(row=name, case="old", metric="rho", value=7.0, low=7.0, high=7.0) for name in ("one", "two", "three")
    ]
    (tmp_path / "all.json").write_text(report.to_json(earlier, ["a machine"]))
    main(
        [
            "--only",
            "two",
            "--rest",
            str(tmp_path / "all.json"),
            "--write",
            str(tmp_path / "now.md"),
            "--json",
            str(tmp_path / "now.json"),
        ]
    )
    now = report.from_json((tmp_path / "now.json").read_text())
    assert [(r.row, r.case) for r in now] == [
        ("one", "old"),
        *(("two", c) for c in ("good", "fair", "bad", "")),
        ("three", "old"),
    ]
    text = (tmp_path / "now.md").read_text()
    assert "- a machine\n- two: run again later, on" in text
    assert "`three`, nothing: none" in text


def test_worse_compares_with_an_earlier_run():
    """A figure is worse if it grew by a tenth, beyond the quartiles, or if its row fails now. New figures are not."""

    def figure(case, value, width=0.0, error=""):
        return Result(row="r", case=case, metric="rho", value=value, low=value - width, high=value + width, error=error)

    before = [figure("a", 0.5), figure("b", 0.5), figure("c", 0.5, 0.2)]
    assert report.worse([figure("a", 0.6), figure("b", 0.54), figure("c", 0.6, 0.2), figure("d", 9.0)], before) == [
        (figure("a", 0.6), before[0])
    ]
    assert [now.error for now, _ in report.worse([figure("", math.nan, error="broke")], before)] == ["broke"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["--cuda"])
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
