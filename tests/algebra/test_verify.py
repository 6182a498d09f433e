"""verify: merges by PEFT and by all our ways are correct, and every kind of broken merge is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorainject as li
from checkpoints import mixtral
from lorainject import algebra
from lorainject.algebra.pairs import opened
from lorainject.checkpoint.byte_runs import Runs
from lorainject.checkpoint.shards import read_shards

from models import TINY, llama, randomize

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")  # half precision and small deltas
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def change(folder: Path, out: Path, edit) -> Path:
    """Copy a checkpoint of one shard with edited tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def make(folder: Path, dtype=torch.float32, build=llama, targets=("all-linear",), std=0.1, **settings) -> None:
    """Write a checkpoint `base`, an adapter `a` and another one `b`, and `merged` with base + a."""
    torch.manual_seed(0)
    model = build().to(dtype)
    model.save_pretrained(folder / "base")
    for i, name in enumerate("ab"):
        randomize(li.inject(model, list(targets), **{"r": 4, "alpha": 8} | settings), seed=i, std=std)
        li.save(model, folder / name)
        li.eject(model)
    li.merge_checkpoint(folder / "base", folder / "a", folder / "merged")


def verdicts(result: algebra.Verification) -> dict[str, str]:
    """Return the verdicts that are not right, by tensor."""
    return {t.key: t.verdict for t in result.tensors if t.verdict not in ("exact", "rounded")}


@DTYPES
@pytest.mark.parametrize("name", [*TINY, pytest.param("mixtral", marks=pytest.mark.long)])
def test_our_three_ways_are_correct(name, dtype, tmp_path):
    """merge + save_pretrained, merge_checkpoint and merge_in_place, on every architecture, in other shards too."""
    build = mixtral if name == "mixtral" else TINY[name].build
    targets = ["all-linear"] if name == "mixtral" else TINY[name].targets
    if name in TINY and dtype not in TINY[name].dtypes:
        pytest.skip("not in this dtype")
    make(tmp_path, dtype, build, targets)
    results = [algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "merged")]
    model = type(build()).from_pretrained(tmp_path / "base", dtype=dtype)
    li.eject(li.merge(li.load(model, tmp_path / "a"), reversible=False) and model)
    model.save_pretrained(tmp_path / "memory", max_shard_size="40KB")
    results.append(algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "memory"))
    shutil.copytree(tmp_path / "base", tmp_path / "place")
    li.merge_in_place(tmp_path / "place", tmp_path / "a")
    results.append(algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "place"))
    for result in results:
        assert result.ok, str(result)
        assert result.survival > 0.9
        assert str(result).startswith("correct")
    assert not algebra.verify(tmp_path / "base", tmp_path / "b", tmp_path / "merged").ok


@DTYPES
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_merges_by_peft_are_correct(dtype, scale, tmp_path):
    """PEFT rounds the delta before it is added; that is one more rounding step, and no error."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = llama().to(dtype)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True))
    randomize_peft(wrapped, scale)
    wrapped.save_pretrained(tmp_path / "a")
    wrapped.merge_and_unload(safe_merge=True).save_pretrained(tmp_path / "merged", max_shard_size="40KB")
    result = algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    assert result.ok, str(result)
    assert max(t.steps for t in result.tensors) <= 1


def randomize_peft(model, std: float) -> None:
    """Give PEFT's A and B random values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * std)


LAYER = "model.layers.0."
Q, GATE, UP = (f"{LAYER}{leaf}.weight" for leaf in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"))


@DTYPES
@pytest.mark.parametrize("std", [0.02, 0.2])
def test_broken_merges_are_named(dtype, std, tmp_path):
    """A site left out, gate and up swapped, something else in a tensor, an edit elsewhere: each is named alone."""
    make(tmp_path, dtype, std=std)
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    alphas = {"left out": {Q: base[Q]}, "noise": {Q: merged[Q] + torch.randn_like(merged[Q])},
              "nan": {Q: torch.full_like(merged[Q], torch.nan)},
              "swapped": {GATE: (base[GATE].double() + merged[UP].double() - base[UP].double()).to(dtype),
                          UP: (base[UP].double() + merged[GATE].double() - base[GATE].double()).to(dtype)},
              "norm": {"model.norm.weight": merged["model.norm.weight"] + 1}}  # fmt: skip
    expected = {"left out": {Q: "missing"}, "noise": {Q: "changed"}, "nan": {Q: "changed"},
                "swapped": {GATE: "swapped", UP: "swapped"}, "norm": {}}  # fmt: skip
    for case, edit in alphas.items():
        folder = change(tmp_path / "merged", tmp_path / case, lambda tensors, edit=edit: tensors.update(edit))
        result = algebra.verify(tmp_path / "base", tmp_path / "a", folder)
        assert not result.ok
        assert verdicts(result) == expected[case], case
        assert len(result.problems) == (case == "norm")
    assert UP in next(t.note for t in result_of(tmp_path, "swapped").tensors if t.key == GATE)
    assert "model.norm.weight: 32 of 32 elements differ" in result_of(tmp_path, "norm").problems[0]


def result_of(folder, name):
    """Verify one of the broken checkpoints."""
    return algebra.verify(folder / "base", folder / "a", folder / name)


@DTYPES
@pytest.mark.parametrize("std", [0.01, 0.2])
@pytest.mark.parametrize("weight", [0.5, -1.0, 1.3, 3.0])
def test_a_wrong_scale_is_measured(dtype, std, weight, tmp_path):
    """A forgotten alpha, or a wrong weight, is found by regression, also where rounding swallows much of the update."""
    make(tmp_path, dtype, std=std)
    li.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "wrong", weights=[weight])
    result = result_of(tmp_path, "wrong")
    assert set(verdicts(result).values()) == {"scaled"}
    assert len(verdicts(result)) == len(result.tensors)
    for t in result.tensors:
        assert t.multiples["a"] == pytest.approx(weight, rel=0.08 if dtype == torch.bfloat16 and std < 0.1 else 1e-2)
    assert "merged with" in str(result)
    assert algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "wrong", weights=[weight]).ok


@DTYPES
def test_a_double_merge_and_an_unmerged_base_are_named(dtype, tmp_path):
    """Merged twice is "double" everywhere, and the base itself is "missing" everywhere."""
    make(tmp_path, dtype)
    li.merge_checkpoint(tmp_path / "merged", tmp_path / "a", tmp_path / "twice", check_base=False)
    assert set(verdicts(result_of(tmp_path, "twice")).values()) == {"double"}
    result = result_of(tmp_path, "base")
    assert set(verdicts(result).values()) == {"missing"}
    assert len(verdicts(result)) == len(result.tensors)
    assert result.survival == 0


def large_weights() -> torch.nn.Module:
    """Return a Llama whose query weights are all of a size near 1, where bfloat16 is coarse."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            w = layer.self_attn.q_proj.weight
            w.copy_((torch.rand_like(w) / 2 + 0.5) * torch.randn_like(w).sign())
    return model


def test_an_update_that_rounding_swallows_is_still_told_from_a_missing_one(tmp_path):
    """Where no element of the update is as large as a rounding step, a site that was left out is missing."""
    make(tmp_path, torch.bfloat16, large_weights, ["q_proj"], std=0.015)
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert 0 < int((base[Q] != merged[Q]).sum()) < base[Q].numel() // 4
    folder = change(tmp_path / "merged", tmp_path / "left out", lambda tensors: tensors.update({Q: base[Q]}))
    assert algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "merged").ok
    result = algebra.verify(tmp_path / "base", tmp_path / "a", folder)
    assert verdicts(result) == {Q: "missing"}
    assert next(t.steps for t in result.tensors if t.key == Q) <= 1


def test_each_of_several_adapters_is_measured(tmp_path):
    """With two adapters, the one that is missing or has another weight is named."""
    make(tmp_path)
    li.merge_checkpoint(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], tmp_path / "both", weights=[1, -0.5])
    ask = {"weights": [1, -0.5]}
    adapters = [tmp_path / "a", tmp_path / "b"]
    assert algebra.verify(tmp_path / "base", adapters, tmp_path / "both", **ask).ok
    result = algebra.verify(tmp_path / "base", adapters, tmp_path / "both")
    for t in result.tensors:
        assert t.multiples == pytest.approx({"a": 1, "b": -0.5}, abs=1e-3)
    result = algebra.verify(tmp_path / "base", adapters, tmp_path / "merged")
    assert all(t.multiples == pytest.approx({"a": 1, "b": 0}, abs=1e-3) for t in result.tensors)
    assert "of a" in str(result)


def test_another_base_is_noticed(tmp_path):
    """A merge into another base is wrong in every tensor; the wrong base as argument is refused by the fingerprint."""
    make(tmp_path)
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path / "other")
    li.merge_checkpoint(tmp_path / "other", tmp_path / "a", tmp_path / "wrong", check_base=False)
    result = result_of(tmp_path, "wrong")
    assert set(verdicts(result).values()) == {"changed"}
    assert any(line.startswith("lm_head.weight") or "embed" in line for line in result.problems)
    with pytest.raises(li.FileError, match="not the base that the adapter was made for"):
        algebra.verify(tmp_path / "other", tmp_path / "a", tmp_path / "wrong")


def test_other_dtype_shards_and_tensors(tmp_path):
    """Another dtype is judged by its own rounding, and is accepted on request; lost and added tensors are listed."""
    make(tmp_path)
    half = change(tmp_path / "merged", tmp_path / "half",
                  lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))  # fmt: skip
    result = result_of(tmp_path, "half")
    assert not verdicts(result)
    assert not result.ok
    assert set(result.recast) == {line.split(":")[0] for line in result.problems}
    assert algebra.verify(tmp_path / "base", tmp_path / "a", half, accept_dtype=True).ok

    def lose(tensors):
        tensors["extra"] = tensors.pop(Q)
        tensors[UP] = tensors[UP][:-1].clone()

    result = algebra.verify(tmp_path / "base", tmp_path / "a", change(tmp_path / "merged", tmp_path / "lost", lose))
    assert verdicts(result) == {Q: "absent", UP: "changed"}
    assert result.problems == ("extra: is not in the base",)


def test_slices_of_a_fused_weight(tmp_path):
    """What changes in rows that no adapter changes is noticed."""
    make(tmp_path, build=TINY["gpt2"].build, targets=["c_attn[q,v]"])
    key = next(k for k in load_file(tmp_path / "base" / "model.safetensors") if k.endswith("h.0.attn.c_attn.weight"))
    assert algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "merged").ok

    def edit(tensors, column):
        tensors[key][0, column] += 1

    width = load_file(tmp_path / "base" / "model.safetensors")[key].shape[1]
    folder = change(tmp_path / "merged", tmp_path / "k", lambda tensors: edit(tensors, width // 2))
    result = algebra.verify(tmp_path / "base", tmp_path / "a", folder)
    assert verdicts(result) == {key: "changed"}
    assert "1 of 3,072 elements are off" in str(result)


def test_the_rest_of_a_tensor_must_be_the_bases(tmp_path):
    """Where an update covers some runs of a tensor only, differences outside of the runs are counted."""
    base, other = torch.zeros(4, 6), torch.zeros(4, 6)
    other[1, 2:4] = 1
    other[3, 5] = 1
    for name, t in (("base", base), ("other", other)):
        (tmp_path / name).mkdir()
        save_file({"w": t}, tmp_path / name / "model.safetensors")
    runs = Runs(np.array([2, 8, 14]), 2)
    with opened(read_shards(tmp_path / "base"), read_shards(tmp_path / "other")) as pair:
        assert pair.difference("w") == "3 of 24 elements differ from the base's"
        assert pair.difference("w", [runs]) == "1 of 24 elements differ from the base's"


def test_report_is_json_and_progress_reaches_the_end(tmp_path):
    """The report has only values that JSON can hold, and the last call of progress is for all bytes."""
    make(tmp_path)
    calls = []
    result = algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "merged", progress=lambda *x: calls.append(x))
    assert json.loads(json.dumps(result.as_dict()))["ok"] is True
    assert calls[-1][0] == calls[-1][1] > 0
    with pytest.raises(li.SpecError, match="cannot be merged with the weights"):
        algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "merged", weights=[1, 2])
    with pytest.raises(li.FileError, match=r"holds no weights|not a directory"):
        algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "nothing")
