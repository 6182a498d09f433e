"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lorainject as li
from lorainject.cli import main

from models import ids, llama, randomise, run


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., str]:
    """stdout of `lorainject ...` (stderr if it shall fail), in this process."""

    def call(*args: object, ok: bool = True) -> str:
        monkeypatch.setattr(sys, "argv", ["lorainject", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code in (0, None)) == ok, err
        return out if ok else err

    return call


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base model's directory and an adapter's beside it."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    li.inject(model, ["q_proj", "v_proj"], r=4, alpha=8)
    randomise(model)
    li.save(model, tmp_path / "adapter")
    return tmp_path


def test_find_a_405b_model(cli, tmp_path):
    """A config is enough, whatever the size: Llama 3.1 405B's shape, every linear."""
    LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                num_key_value_heads=8, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    plan = json.loads(cli("find", tmp_path, "-t", "all-linear", "-r", 16, "--json"))
    assert len(plan["sites"]) == 7 * 126
    assert plan["trainable"] == 16 * 126 * (2 * (16384 + 16384) + 2 * (16384 + 1024) + 3 * (16384 + 53248))
    assert 405e9 < plan["total"] < 406e9
    assert len(json.loads(cli("find", tmp_path, "-t", "q_proj", "--layers", "0-3", "--layers", "7", "--json"))["sites"]) == 5
    text = cli("find", tmp_path, "-t", "q_proj", "-t", "v_proj")
    assert "model.layers.*.self_attn.q_proj" in text
    assert "252 sites" in text


def test_inspect(cli, saved):
    """Every site with its norm, in a table and as JSON; a file that would not load is an exit status."""
    text = cli("inspect", saved / "adapter")
    assert "model.layers.1.self_attn.v_proj" in text
    assert "lorainject file, adapter 'default': 4 sites" in text
    site = json.loads(cli("inspect", saved / "adapter", "--json"))["sites"][0]
    stored = li.read(saved / "adapter").sites[0]
    assert site["path"] == stored.path
    assert site["norm"] == pytest.approx(float((stored.scale * stored.B @ stored.A).norm()), rel=1e-5)
    assert cli("inspect", saved / "base", ok=False).startswith("error: ")


def test_slices_and_stacks(cli, tmp_path):
    """Found and inspected by their names, as a table and as JSON."""
    import test_readers

    model = test_readers.built(test_readers.mixtral)
    model.save_pretrained(tmp_path / "base")
    targets = ("-t", "gate_up_proj[up]", "-t", "down_proj")
    assert "experts.gate_up_proj[up]  experts  8x32x32" in cli("find", tmp_path / "base", *targets)
    sites = json.loads(cli("find", tmp_path / "base", *targets, "--json"))["sites"]
    assert sites[0]["rows"] == [[16, 32, 1]]
    li.inject(model, ["gate_up_proj[up]", "down_proj"], r=4)
    randomise(model)
    shown = cli("inspect", li.save(model, tmp_path / "a.safetensors"))
    assert "layers.0.mlp.experts.gate_up_proj[up]  32   16  4" in shown
    sites = json.loads(cli("inspect", tmp_path / "a.safetensors", "--json"))["sites"]
    wanted = next(delta for name, _, delta in li.deltas(model) if name == "layers.0.mlp.experts.gate_up_proj").norm()
    assert next(s for s in sites if s["path"] == "layers.0.mlp.experts.gate_up_proj[up]")["norm"] == pytest.approx(float(wanted), rel=1e-4)


def test_merge(cli, saved):
    """The merged directory is an ordinary model: same output as the adapted one, tokenizer copied, nothing of ours in it."""
    said = cli("merge", saved / "base", saved / "adapter", "-o", saved / "out")
    assert "into 4 weights (" in said
    assert "of the update survived the storage dtype\nwritten to" in said
    merged = AutoModelForCausalLM.from_pretrained(saved / "out")
    adapted = li.load(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "adapter")
    x = {"input_ids": ids()}
    assert torch.allclose(run(merged, x), run(adapted, x), atol=1e-5)
    assert (saved / "out" / "tokenizer.json").read_text() == "{}"
    assert sorted(p.name for p in saved.iterdir()) == ["adapter", "base", "out"]
    assert "already exists" in cli("merge", saved / "base", saved / "adapter", "-o", saved / "out", ok=False)


def test_merge_in_place_and_unmerge(cli, saved):
    """Into the model itself, with weights, and out again."""
    before = {p.name: p.read_bytes() for p in (saved / "base").iterdir()}
    said = cli("merge", saved / "base", saved / "adapter", saved / "adapter", "--in-place", "-w", "0.5", "-w", "0.25")
    assert "`lorainject unmerge " in said
    assert {p.name for p in (saved / "base").iterdir()} == {*before, ".lorainject-merge"}
    assert (saved / "base" / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert "is merged already" in cli("merge", saved / "base", saved / "adapter", "--in-place", ok=False)
    assert "every file to the byte" in cli("unmerge", saved / "base")
    assert {p.name: p.read_bytes() for p in (saved / "base").iterdir()} == before
    assert "nothing is merged in place" in cli("unmerge", saved / "base", ok=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("find", "nobody/nothing", "-t", "q_proj"), "error: 'nobody/nothing' is neither a directory here nor to be had from the hub"),
        (
            ("find", "{base}", "-t", "q_porj"),
            "error: this can't be injected; nothing was changed:\n  - 'q_porj' matches nothing (did you mean 'q_proj'",
        ),
        (("find", "{base}", "-t", "q_proj", "--layers", "few"), "error: --layers few: neither a number nor a range"),
        (("merge", "{base}", "{base}", "-o", "{base}/out"), "holds no adapter_model.safetensors"),
        (("merge", "{base}", "{base}"), "error: merge needs either --output DIR or --in-place"),
        (("merge", "nobody/nothing", "{base}", "-o", "{base}/out"), "'nobody/nothing' is neither a directory here nor to be had from the hub"),
    ],
)
def test_mistakes(cli, saved, args, message, monkeypatch):
    """One clear error on stderr, no traceback."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = cli(*(a.format(base=saved / "base") for a in args), ok=False)
    assert message in error
    assert "Traceback" not in error


def test_as_a_program():
    """The installed command answers, with every verb in its help."""
    done = subprocess.run([sys.executable, "-m", "lorainject.cli", "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert all(verb in done.stdout for verb in ("demo", "find", "inspect", "merge", "unmerge"))
