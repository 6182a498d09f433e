"""extract: the LoRA of a merged checkpoint or of a full fine-tune, found again from two checkpoints on disk."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import lorainject as li
from checkpoints import mixtral, same_bits, tensors
from lorainject import algebra
from lorainject.numerics.low_rank import matrix_svd

from models import TINY, llama, randomize
from oracle import dense_deltas

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")
WIDE = {"hidden_size": 96, "intermediate_size": 128}


def make(folder, dtype=torch.float32, build=llama, targets=("all-linear",), std=0.1, **settings) -> li.AdapterFile:
    """Write a checkpoint `base` and `merged` with an adapter; return the adapter."""
    torch.manual_seed(0)
    model = build().to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    randomize(li.inject(model, list(targets), **{"r": 3, "alpha": 6} | settings), std=std)
    li.save(model, folder / "a")
    li.merge_checkpoint(folder / "base", folder / "a", folder / "merged")
    return li.read(folder / "a")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_auto_finds_the_adapter_of_a_merged_checkpoint(name, tmp_path):
    """Rank and update of every site are found again from float32 weights, transposed and stacked ones as well."""
    build = mixtral if name == "mixtral" else TINY[name].build
    adapter = make(tmp_path, build=build)
    found = algebra.extract(tmp_path / "base", tmp_path / "merged")
    li.write(found, tmp_path / "found")
    again = li.read(tmp_path / "found")
    assert {s.name: (s.r, s.kind) for s in again.sites} == {s.name: (3, s.kind) for s in adapter.sites}
    expected = dense_deltas(adapter)
    for key, d in dense_deltas(found).items():
        assert float((d - expected[key]).norm() / expected[key].norm()) < 1e-5
    assert not found.left_out
    assert all(entry.note.startswith("certain") for entry in found.reduced)
    li.merge_checkpoint(tmp_path / "base", tmp_path / "found", tmp_path / "again")
    assert algebra.verify(tmp_path / "base", tmp_path / "a", tmp_path / "again").survival == pytest.approx(1, abs=1e-5)
    model = li.load(build(), tmp_path / "found", check_base=False)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(found.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_auto_looks_through_the_rounding_of_half_precision(dtype, tmp_path):
    """With half-precision weights, the rank is found again and the update is closer than rounding left it."""
    adapter = make(tmp_path, dtype, build=lambda: llama(**WIDE), std=0.2)
    found = algebra.extract(tmp_path / "base", tmp_path / "merged")
    assert [s.r for s in found.sites] == [3] * len(adapter.sites)
    expected = dense_deltas(adapter)
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    for key, d in dense_deltas(found).items():
        error = float((d - expected[key]).norm())
        assert error < 0.5 * float((merged[key].double() - base[key].double() - expected[key]).norm())
    assert all(entry.note.split(":")[0] in ("certain", "likely") for entry in found.reduced)


def test_a_rank_and_an_error_are_kept(tmp_path):
    """r gives the best approximation of the rank; an error gives the lowest rank within it."""
    make(tmp_path, build=lambda: llama(**WIDE))
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    found = algebra.extract(tmp_path / "base", tmp_path / "merged", r=2)
    for s, entry in zip(found.sites, found.reduced, strict=True):
        S = torch.linalg.svdvals(merged[f"{s.path}.weight"].double() - base[f"{s.path}.weight"].double())
        assert s.r == 2
        assert entry.error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    within = algebra.extract(tmp_path / "base", tmp_path / "merged", error=0.5)
    for s, entry in zip(within.sites, within.reduced, strict=True):
        S = torch.linalg.svdvals(merged[f"{s.path}.weight"].double() - base[f"{s.path}.weight"].double())
        assert entry.error <= 0.5
        assert s.r == 1 or float(S[s.r - 1 :].norm() / S.norm()) > 0.5


def test_a_full_fine_tune_is_listed_or_kept_whole(tmp_path):
    """What has full rank, and norms, are listed; as whole tensors they make the tuned model when loaded."""
    make(tmp_path)
    tuned = load_all(tmp_path / "base", tmp_path / "tuned")
    q, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    tuned[q] += torch.randn_like(tuned[q])
    tuned[norm] += 1
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    found = algebra.extract(tmp_path / "base", tmp_path / "tuned")
    assert not found.sites
    assert [line.split(":")[0] for line in found.left_out] == [q, norm]
    assert "left out" in str(found)
    kept = algebra.extract(tmp_path / "base", tmp_path / "tuned", whole=True)
    assert kept.replaced.keys() == {q.removesuffix(".weight"), norm.removesuffix(".weight")}
    assert not kept.left_out
    li.write(kept, tmp_path / "kept")
    model = llama()
    model.load_state_dict(tensors(tmp_path / "base"))
    li.load(model, tmp_path / "kept")
    li.eject(li.merge(model, reversible=False) and model)
    assert torch.equal(model.get_parameter(q), tuned[q])
    lossy = algebra.extract(tmp_path / "base", tmp_path / "tuned", r=4)
    assert [s.name for s in lossy.sites] == [q.removesuffix(".weight")]
    assert 0.1 < lossy.error < 1


def load_all(base, out):
    """Copy a checkpoint and return its tensors, to be saved as one shard."""
    shutil.copytree(base, out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    return tensors(base)


def test_an_unchanged_checkpoint_gives_no_site(tmp_path):
    """Equal weights have no site, whatever the rank."""
    make(tmp_path)
    assert not algebra.extract(tmp_path / "base", tmp_path / "base", r=4).sites


def test_two_models_are_refused_with_every_tensor(tmp_path):
    """Tensors of another shape, and tensors that one of the two lacks, are listed."""
    make(tmp_path)
    llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(li.FileError) as error:
        algebra.extract(tmp_path / "base", tmp_path / "wide")
    assert len(error.value.problems) == len(tensors(tmp_path / "base"))
    assert "has shape" in str(error.value)
    tuned = load_all(tmp_path / "base", tmp_path / "less")
    del tuned["model.layers.1.mlp.up_proj.weight"]
    save_file(tuned, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(li.FileError, match=r"up_proj.weight: is not in the checkpoint \(in the tuned checkpoint\)"):
        algebra.extract(tmp_path / "base", tmp_path / "less")


@pytest.mark.parametrize("wrong", [{"r": 0}, {"r": 1.5}, {"r": "best"}, {"error": -1.0}, {"error": 1.0},
                                   {"r": 4, "error": 0.1}, {"r": 1000}])  # fmt: skip
def test_impossible_ranks_are_refused(wrong, tmp_path):
    """A rank must be possible for some weight."""
    make(tmp_path)
    with pytest.raises(li.SpecError, match=r"no rank can be chosen|higher than the rank of every weight"):
        algebra.extract(tmp_path / "base", tmp_path / "merged", **wrong)


def test_nan_is_listed(tmp_path):
    """A tensor with NaN in the tuned checkpoint is listed, and never decomposed."""
    make(tmp_path)
    tuned = load_all(tmp_path / "merged", tmp_path / "nan")
    tuned["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tuned, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    found = algebra.extract(tmp_path / "base", tmp_path / "nan")
    assert found.left_out == ("model.layers.0.self_attn.q_proj.weight: holds NaN or infinity",)
    assert len(found.sites) == 13


def test_a_model_that_transformers_does_not_know(tmp_path):
    """Without a known config, every matrix called weight counts as a linear."""
    make(tmp_path)
    for name in ("base", "merged"):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "unheard of"}))
    found = algebra.extract(tmp_path / "base", tmp_path / "merged")
    assert [s.r for s in found.sites] == [3] * 14
    li.write(found, tmp_path / "found")
    li.merge_checkpoint(tmp_path / "base", tmp_path / "found", tmp_path / "again")
    a, b = tensors(tmp_path / "again"), tensors(tmp_path / "merged")
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in b)
    assert not same_bits(tensors(tmp_path / "base"), b)


@pytest.mark.parametrize("shape", [(700, 600), (600, 900), (520, 513)])
def test_random_vectors_find_what_the_whole_svd_finds(shape):
    """For a low-rank matrix with noise, the largest singular values and the error agree with the full SVD."""
    g = torch.Generator().manual_seed(0)
    D = torch.randn(shape[0], 12, generator=g) @ torch.randn(12, shape[1], generator=g)
    D += 0.05 * torch.randn(*shape, generator=g)
    svd, S = matrix_svd(D, 12), torch.linalg.svdvals(D.double())
    assert torch.allclose(svd.S.double(), S[:12], rtol=1e-4)
    P, Q = svd.factors(12)
    assert float((D - P @ Q).norm()) == pytest.approx(float(S[12:].norm()), rel=1e-3)
    assert svd.lost(12) ** 0.5 == pytest.approx(float(S[12:].norm()), rel=1e-2)
