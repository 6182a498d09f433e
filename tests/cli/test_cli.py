"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import lorainject as li
from lorainject.cli import main

from models import ids, llama, randomize, run
from moe_models import mixtral, moe_model
from oracle import FIXTURES


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., str]:
    """Return a function that runs `lorainject ...` in this process and returns stdout; with ok=False, which expects
    exit status 1, stdout and stderr."""

    def call(*args: object, ok: bool = True) -> str:
        monkeypatch.setattr(sys, "argv", ["lorainject", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code in (0, None)) == ok, err
        return out if ok else out + err

    return call


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a directory with a base model, an adapter for it, and nothing else."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    li.inject(model, ["q_proj", "v_proj"], r=4, alpha=8)
    randomize(model)
    li.save(model, tmp_path / "adapter")
    return tmp_path


def test_find_needs_only_a_config(cli, tmp_path):
    """The plan of a model with the shape of Llama 3.1 405B takes only its config; JSON and table list every linear."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    plan = json.loads(cli("find", tmp_path, "-t", "all-linear", "-r", 16, "--json"))
    assert len(plan["sites"]) == 7 * 126
    assert plan["trainable"] == 16 * 126 * (2 * (16384 + 16384) + 2 * (16384 + 1024) + 3 * (16384 + 53248))
    assert 405e9 < plan["total"] < 406e9
    assert (
        len(json.loads(cli("find", tmp_path, "-t", "q_proj", "--layers", "0-3", "--layers", "7", "--json"))["sites"])
        == 5
    )
    text = cli("find", tmp_path, "-t", "q_proj", "-t", "v_proj")
    assert "model.layers.*.self_attn.q_proj" in text
    assert "252 sites" in text


def test_inspect_lists_every_site(cli, saved):
    """inspect prints every site, as JSON with its norm; a directory that is no adapter is an error."""
    text = cli("inspect", saved / "adapter")
    assert "model.layers.1.self_attn.v_proj" in text
    assert "lorainject file, adapter 'default': 4 sites" in text
    site = json.loads(cli("inspect", saved / "adapter", "--json"))["sites"][0]
    stored = li.read(saved / "adapter").sites[0]
    assert site["path"] == stored.path
    assert site["norm"] == pytest.approx(float((stored.scale * stored.B @ stored.A).norm()), rel=1e-5)
    assert cli("inspect", saved / "base", ok=False).startswith("error: ")


def test_slices_and_stacks_are_listed_by_name(cli, tmp_path):
    """find and inspect list slices of stacked experts under their names, as a table and as JSON."""
    model = moe_model(mixtral)
    model.save_pretrained(tmp_path / "base")
    targets = ("-t", "gate_up_proj[up]", "-t", "down_proj")
    assert "experts.gate_up_proj[up]  experts  8x32x32" in cli("find", tmp_path / "base", *targets)
    sites = json.loads(cli("find", tmp_path / "base", *targets, "--json"))["sites"]
    assert sites[0]["rows"] == [[16, 32, 1]]
    li.inject(model, ["gate_up_proj[up]", "down_proj"], r=4)
    randomize(model)
    shown = cli("inspect", li.save(model, tmp_path / "a.safetensors"))
    assert "layers.0.mlp.experts.gate_up_proj[up]  32   16  4" in shown
    sites = json.loads(cli("inspect", tmp_path / "a.safetensors", "--json"))["sites"]
    wanted = next(delta for name, _, delta in li.deltas(model) if name == "layers.0.mlp.experts.gate_up_proj").norm()
    assert next(s for s in sites if s["path"] == "layers.0.mlp.experts.gate_up_proj[up]")["norm"] == pytest.approx(
        float(wanted), rel=1e-4
    )


def test_merge_writes_an_ordinary_model(cli, saved):
    """The merged directory gives the adapted model's output, and holds the tokenizer and no file of lorainject."""
    output = cli("merge", saved / "base", saved / "adapter", "-o", saved / "out")
    assert "into 4 weights (" in output
    assert "of the update survived the rounding to the stored dtype\nwritten to" in output
    merged = AutoModelForCausalLM.from_pretrained(saved / "out")
    adapted = li.load(AutoModelForCausalLM.from_pretrained(saved / "base"), saved / "adapter")
    x = {"input_ids": ids()}
    assert torch.allclose(run(merged, x), run(adapted, x), atol=1e-5)
    assert (saved / "out" / "tokenizer.json").read_text() == "{}"
    assert sorted(p.name for p in saved.iterdir()) == ["adapter", "base", "out"]
    assert "already exists" in cli("merge", saved / "base", saved / "adapter", "-o", saved / "out", ok=False)


def test_unmerge_restores_a_merge_in_place(cli, saved):
    """After a merge in place with two weighted adapters, unmerge restores every byte."""
    before = {p.name: p.read_bytes() for p in (saved / "base").iterdir()}
    output = cli("merge", saved / "base", saved / "adapter", saved / "adapter", "--in-place", "-w", "0.5", "-w", "0.25")
    assert "`lorainject unmerge " in output
    assert {p.name for p in (saved / "base").iterdir()} == {*before, ".lorainject-merge"}
    assert (saved / "base" / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert "is merged already" in cli("merge", saved / "base", saved / "adapter", "--in-place", ok=False)
    assert "every file is as it was, to the byte" in cli("unmerge", saved / "base")
    assert {p.name: p.read_bytes() for p in (saved / "base").iterdir()} == before
    assert "nothing is merged in place" in cli("unmerge", saved / "base", ok=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("find", "nobody/nothing", "-t", "q_proj"),
            "error: 'nobody/nothing' is not a directory, and cannot be loaded from the hub",
        ),
        (
            ("find", "{base}", "-t", "q_porj"),
            "error: cannot inject this LoRA; nothing was changed:\n  - 'q_porj' matches nothing (did you mean 'q_proj'",
        ),
        (
            ("find", "{base}", "-t", "q_proj", "--layers", "few"),
            "error: --layers few: this is neither a number nor a range",
        ),
        (("merge", "{base}", "{base}", "-o", "{base}/out"), "holds no adapter_model.safetensors"),
        (("merge", "{base}", "{base}"), "error: merge needs either --output DIR or --in-place"),
        (
            ("merge", "nobody/nothing", "{base}", "-o", "{base}/out"),
            "'nobody/nothing' is not a directory, and cannot be loaded from the hub",
        ),
    ],
)
def test_a_mistake_is_one_error_without_a_traceback(cli, saved, args, message, monkeypatch):
    """The message is on stderr, names what is wrong, and the exit status is 1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = cli(*(a.format(base=saved / "base") for a in args), ok=False)
    assert message in error
    assert "Traceback" not in error


FIXTURE_OF_FORMAT = {
    "peft_plain": ("peft", ()),
    "mlx_lora": ("mlx", ()),
    "adapterhub_gpt2": ("adapterhub", ("--allow-pickle",)),
    "litgpt": ("litgpt", ("--allow-pickle",)),
    "torchtune": ("torchtune", ("--allow-pickle", "--alpha", 6, "--heads", "4,2")),
    "kohya_lycoris/lora.safetensors": ("kohya", ()),
    "loralib/lora.pt": (
        "loralib",
        ("--allow-pickle", "--alpha", 6, "--group", "m101=101", "--group", "m111=111", "--group", "mf=101"),
    ),
    "diffusers/pytorch_lora_weights.safetensors": ("diffusers", ("--component", "unet")),
    "gguf/lora.gguf": ("gguf", ("--heads", "4,2")),
    "onnx_adapter/a.onnx_adapter": ("onnx", ()),
}


@pytest.mark.parametrize(("fixture", "expected"), FIXTURE_OF_FORMAT.items(), ids=FIXTURE_OF_FORMAT)
def test_inspect_reads_every_format(cli, fixture, expected):
    """inspect tells the format, and r, alpha, sizes and norm of each site, also of a file with a head or DoRA."""
    format, options = expected
    about = json.loads(cli("inspect", FIXTURES / fixture, "--json", *options))
    assert about["format"] == format
    assert bool(about["beside"]) == (format in ("peft", "kohya"))
    assert all(row["norm"] > 0 and row["alpha"] > 0 for row in about["sites"])
    assert about["parameters"] == sum(row["r"] * (row["in"] + row["out"]) for row in about["sites"])


def test_inspect_notes_what_is_unusual(cli, tmp_path):
    """inspect notes zeros, outliers, mixed ranks, ranks above the weight's, rank-stabilized scales and a missing
    fingerprint."""
    from pathlib import Path as P

    pair = (torch.ones(2, 3), torch.ones(4, 2))
    sites = [li.StoredSite(path=f"m.{i}.a", A=pair[0], B=pair[1] * (100 if i == 2 else 1), alpha=2) for i in range(5)]
    sites += [li.StoredSite(path="m.5.a", A=torch.ones(9, 3), B=torch.zeros(4, 9), alpha=2, scaling="rslora")]
    li.write(li.AdapterFile(path=P("x"), format="peft", sites=tuple(sites)), tmp_path / "a.safetensors")
    unusual = json.loads(cli("inspect", tmp_path / "a.safetensors", "--json"))["unusual"]
    for line in (
        "B is zero at 1 sites: m.5.a",
        "the norm is more than 10 times the median: m.2.a",
        "the rank is higher than that of the weight: m.5.a",
        "r differs by site: 2, 9",
        "rank-stabilized: the scale is alpha / sqrt(r)",
        "it has no fingerprint of the base",
    ):
        assert any(u.startswith(line) for u in unusual), (line, unusual)


def test_convert_and_back(cli, saved):
    """Options, or the base, give what a format does not store; the shell alone converts to it and back, exactly."""
    output = cli("convert", saved / "adapter", saved / "a.pt", "--to", "torchtune", "--heads", "4,2")
    assert output.strip() == f"4 sites written to {saved / 'a.pt'} as torchtune; to read it, pass --alpha 8, --heads"
    output = cli(
        "convert",
        saved / "a.pt",
        saved / "back",
        "--to",
        "peft",
        "--allow-pickle",
        "--alpha",
        8,
        "--base",
        saved / "base",
    )
    assert output.strip() == f"4 sites written to {saved / 'back'} as peft"
    for ours, theirs in zip(li.read(saved / "adapter").sites, li.read(saved / "back").sites, strict=True):
        assert torch.equal(ours.B, theirs.B)
        assert ours.scale == theirs.scale


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("a.pt", "--to", "gguff"), "error: there is no format 'gguff'\n=> choose one of lorainject, "),
        (
            ("a.pt", "--to", "torchtune"),
            "the rows of q and k have another order in this format than in transformers: give the heads",
        ),
        (("a.gguf", "--to", "gguf", "--heads", "many"), "error: --heads many: this is not one or two numbers"),
        (("a.gguf", "--to", "gguf", "--group", "x=2"), "error: --group x=2: this is not a name and a row of 0 and 1"),
        (("a.safetensors", "--to", "gguf"), "gguf is a single file\n=> give a path that ends in .gguf"),
    ],
)
def test_a_refused_conversion_writes_nothing(cli, saved, args, message):
    """The error says what is wrong, and no file is written."""
    out, *options = args
    assert message in cli("convert", saved / "adapter", saved / "out" / out, *options, ok=False)
    assert not (saved / "out").exists()


def test_the_help_names_every_command():
    """`lorainject --help` answers in a fresh process and lists the commands."""
    done = subprocess.run(
        [sys.executable, "-m", "lorainject.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert all(verb in done.stdout for verb in ("convert", "find", "inspect", "merge", "unmerge"))


def test_convert_for_an_engine(cli, saved, tmp_path):
    """The output says how to start the engine; one of --to and --for is needed."""
    output = cli("convert", saved / "adapter", tmp_path / "a", "--for", "vllm")
    assert "4 sites written to" in output
    assert "as peft; start vLLM with --enable-lora --max-lora-rank 8" in output
    assert "--to FORMAT or --for ENGINE" in cli("convert", saved / "adapter", tmp_path / "b", ok=False)


@pytest.mark.parametrize(
    ("fixture", "option"),
    [("litgpt", "--allow-pickle"), ("gguf/lora.gguf", "--heads 32,8"), ("loralib/lora.pt", "--alpha 32")],
)
def test_errors_name_options_of_the_shell(cli, fixture, option):
    """What the library calls `allow_pickle=True` or `Hints(heads=(32, 8))` is an option in the message of the
    command."""
    options = ("--allow-pickle",) if fixture.startswith("loralib") else ()
    error = cli("inspect", FIXTURES / fixture, *options, ok=False)
    assert option in error
    assert not re.search(r"Hints|allow_pickle", error)


def test_inspect_shows_what_a_file_holds_besides_a_and_b(cli):
    """A head, which load puts onto the model too, is listed."""
    shown = cli("inspect", FIXTURES / "peft_plain")
    assert "besides A and B: " in shown


def test_report_shows_what_an_adapter_changes(cli, saved):
    """The page is written; the summary goes to stdout, and all numbers with --json; a wrong base is refused."""
    page = saved / "report.html"
    assert "4 weights" in cli("report", saved / "adapter", "--base", saved / "base", "-o", page)
    assert page.read_text().startswith("<!doctype html>")
    result = json.loads(cli("report", saved / "adapter", "--base", saved / "base", "--json"))
    assert all(site["survival"] > 0.99 for site in result["sites"])
    torch.manual_seed(1)
    llama().save_pretrained(saved / "other")
    assert "--any-base" in cli("report", saved / "adapter", "--base", saved / "other", ok=False)
    cli("report", saved / "adapter", "--base", saved / "other", "--any-base")


def test_budget_counts_every_method(cli, saved):
    """The table has all methods; the JSON has their numbers; only a config is needed."""
    (saved / "base" / "model.safetensors").unlink()
    assert "Adapter H" in cli("budget", saved / "base", "-r", 4)
    rows = {row["method"]: row["parameters"] for row in json.loads(cli("budget", saved / "base", "--json"))["rows"]}
    assert rows["LoRA"] == 2 * 8 * (32 + 32 + 32 + 16)
    assert "matches nothing" in cli("budget", saved / "base", "-t", "nothing", ok=False)
