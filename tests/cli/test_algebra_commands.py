"""The commands of lorainject.algebra, run as a user runs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lorainject as li
from checkpoints import contents
from lorainject import algebra
from lorainject.cli import main

from models import llama, randomize

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., str]:
    """Return a function that runs `lorainject ...`, asserts its exit status, and returns stdout, or all output."""

    def call(*args: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["lorainject", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == status, err
        return out if status == 0 else out + err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with `base`, the adapters `a` and `b`, and `merged`, which is base + a."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    for i, name in enumerate("ab"):
        randomize(li.inject(model, ["q_proj", "v_proj"], r=4, alpha=8), seed=i)
        li.save(model, tmp_path / name)
        li.eject(model)
    li.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    return tmp_path


def test_verify(cli, folder):
    """The status is 0 for a right merge, 1 for a wrong one, and 2 for a wrong call; --json says why."""
    assert cli("verify", folder / "base", folder / "a", folder / "merged").startswith("correct: 4 of 4")
    wrong = cli("verify", folder / "base", folder / "b", folder / "merged", status=1)
    assert wrong.startswith("WRONG: 0 of 4")
    report = json.loads(
        cli("verify", folder / "base", folder / "a", folder / "merged", "-w", 0.5, "--json", status=1).splitlines()[0]
    )
    assert not report["ok"]
    assert {t["verdict"] for t in report["tensors"]} == {"double"}
    assert "give a base, at least one adapter" in cli("verify", folder / "base", folder / "a", status=2)
    assert "error: " in cli("verify", folder / "base", folder / "a", folder / "nowhere", status=1)


def test_combine_compress_and_compare(cli, folder):
    """What is written is what the functions return."""
    assert "4 sites written" in cli("combine", folder / "a", folder / "b", "-w", 1, "-w", -0.5, "-o", folder / "sum")
    expected = algebra.combine([folder / "a", folder / "b"], [1, -0.5])
    for s, e in zip(li.read(folder / "sum").sites, expected.sites, strict=True):
        assert torch.equal(s.B, e.B)
    shown = cli("compress", folder / "sum", "-r", 2, "-o", folder / "small", "--to", "peft")
    assert "error" in shown
    assert li.read(folder / "small").format == "peft"
    assert max(s.r for s in li.read(folder / "small").sites) == 2
    result = json.loads(cli("compress", folder / "sum", "--error", 0.5, "-o", folder / "half", "--json"))
    assert all(site["error"] <= 0.5 for site in result["sites"])
    assert "degrees" in cli("compare", folder / "a", folder / "b")
    assert len(json.loads(cli("compare", folder / "a", folder / "b", "--json"))["weights"]) == 4
    assert "exactly one of r, error and energy" in cli("compress", folder / "a", "-o", folder / "no", status=1)
    assert "cannot be combined" in cli("combine", folder / "a", "-w", 1, "-w", 2, "-o", folder / "no", status=1)
    assert not (folder / "no").exists()


def test_extract_diff_and_patch(cli, folder):
    """The adapter is found again, and the merged model is rebuilt to the byte."""
    assert "certain" in cli("extract", folder / "base", folder / "merged", "-o", folder / "again")
    assert [s.r for s in li.read(folder / "again").sites] == [4] * 4
    result = json.loads(cli("extract", folder / "base", folder / "merged", "-r", 2, "-o", folder / "two", "--json"))
    assert {site["r"] for site in result["sites"]} == {2}
    assert "neither a number nor auto" in cli(
        "extract", folder / "base", folder / "merged", "-r", "x", "-o", "no", status=2
    )
    assert "low-rank" in cli("diff", folder / "base", folder / "merged", "-o", folder / "diff")
    assert "to the byte" in cli("patch", folder / "base", folder / "diff", "-o", folder / "rebuilt")
    assert contents(folder / "rebuilt") == contents(folder / "merged")
    assert "error: " in cli("patch", folder / "base", folder / "a", "-o", folder / "no", status=1)


def test_check(cli, folder):
    """The status is 1 if an engine would misread something, and the output names it."""
    li.convert(folder / "a", folder / "served", engine="vllm")
    assert "serves this file as it is" in cli("check", folder / "served", "--for", "vllm")
    report = json.loads(cli("check", folder / "a", "--for", "llama.cpp", "--json", status=1).splitlines()[0])
    assert "gguf" in report["rewritten"][0]
    assert "there is no engine" in cli("check", folder / "a", "--for", "nobody", status=1)
