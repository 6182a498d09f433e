"""diff and patch: any tuned checkpoint is rebuilt to the byte, and a merged one costs little."""

from __future__ import annotations

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lorainject as li
from checkpoints import contents, mixtral, tensors
from lorainject import algebra
from lorainject.algebra.low_rank_guess import guess_tile, snap
from lorainject.algebra.residuals import SIGNED, decode, encode

from example_count import examples
from models import TINY, llama, randomize

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning", "ignore:.*not copied.*")


def make(folder, dtype=torch.bfloat16, build=llama, std=0.2):
    """Write a checkpoint `base` and `merged` with an adapter on all linears."""
    torch.manual_seed(0)
    model = build().to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    (folder / "base" / "notes").mkdir()
    (folder / "base" / "notes" / "a.txt").write_text("kept")
    randomize(li.inject(model, ["all-linear"], r=3), std=std)
    li.save(model, folder / "a")
    li.merge_checkpoint(folder / "base", folder / "a", folder / "merged")


def rebuilt(folder, tuned) -> algebra.Difference:
    """Assert that a checkpoint is rebuilt to the byte from its difference; return the difference."""
    result = algebra.diff(folder / "base", tuned, folder / f"{tuned.name} diff")
    assert algebra.patch(folder / "base", folder / f"{tuned.name} diff", folder / f"{tuned.name} again").is_dir()
    assert contents(folder / f"{tuned.name} again") == contents(tuned)
    return result


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("build", [llama, TINY["gpt2"].build, mixtral], ids=["llama", "gpt2", "mixtral"])
def test_a_merged_checkpoint_is_rebuilt_to_the_byte(build, dtype, tmp_path):
    """Shards, index, config and all other files have the bytes that they had."""
    make(tmp_path, dtype, build)
    result = rebuilt(tmp_path, tmp_path / "merged")
    assert {t.how for t in result.tensors} <= {"base", "low-rank", "rest"}
    assert f"{result.coded:,}" in str(result)
    assert json.loads(json.dumps(result.as_dict()))["coded"] == sum(map(len, contents(result.path).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_low_rank_change_costs_a_part_of_a_byte_wise_difference(dtype, tmp_path):
    """With matrices of a usual size, the factors and the rest are a third of the byte-wise difference, or less."""
    make(tmp_path, dtype, lambda: llama(hidden_size=256, intermediate_size=512, num_hidden_layers=1), std=0.05)
    result = rebuilt(tmp_path, tmp_path / "merged")
    base, merged = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    bytewise = 0
    for key in merged:
        a, b = (t[key].view(torch.uint8).numpy() for t in (base, merged))
        planes = (a ^ b).reshape(-1, dtype.itemsize).T
        bytewise += sum(len(zlib.compress(plane.tobytes(), 6)) for plane in planes)
    assert {t.how for t in result.tensors} == {"base", "low-rank"}
    assert sum(t.coded for t in result.tensors) < 0.35 * bytewise


def test_any_checkpoint_is_rebuilt(tmp_path):
    """New, lost, reshaped and recast tensors, integers, empty ones, NaN and other files are restored as well."""
    make(tmp_path)
    tuned = tensors(tmp_path / "merged")
    q, k, up, norm = (next(key for key in tuned if part in key) for part in ("q_proj", "k_proj", "up_proj", "norm"))
    tuned |= {
        "new": torch.arange(10),
        "bytes": torch.randint(0, 255, (5, 3), dtype=torch.uint8),
        "none": torch.zeros(0, 3),
        "flag": torch.tensor([True]),
        "scalar": torch.tensor(3.0),
        q: tuned[q].float(),
        k: tuned[k][:5].clone(),
        up: torch.full_like(tuned[up], torch.nan),
        norm: torch.randn_like(tuned[norm]),
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "c": torch.randn(3, 2, dtype=torch.complex64),
        "deep": torch.randn(2, 3, 4, 5),
    }
    del tuned[next(key for key in tuned if "v_proj" in key)]
    folder = tmp_path / "strange"
    folder.mkdir()
    save_file(tuned, folder / "model.safetensors", {"format": "pt"})
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("changed")
    (folder / "empty").write_bytes(b"")
    result = rebuilt(tmp_path, folder)
    assert {t.how for t in result.tensors} >= {"base", "rest", "alone"}


def test_a_full_fine_tune_is_rebuilt_and_the_report_says_that_low_rank_does_not_pay(tmp_path):
    """Where the change has full rank, only the difference from the base is coded, and the report says so."""
    make(tmp_path)
    tuned = {key: t + torch.randn_like(t) * 1e-3 for key, t in tensors(tmp_path / "base").items()}
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    result = rebuilt(tmp_path, tmp_path / "tuned")
    assert {t.how for t in result.tensors} == {"rest", "base"}  # bfloat16 has no number between 1 and 1.0078
    assert "no low-rank part that pays" in str(result)


def test_another_base_is_refused_with_every_tensor(tmp_path):
    """Tensors of another shape, and of other values, are listed, and nothing is left."""
    make(tmp_path)
    algebra.diff(tmp_path / "base", tmp_path / "merged", tmp_path / "diff")
    torch.manual_seed(1)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "other", max_shard_size="100KB")
    llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(li.FileError, match="has other values") as error:
        algebra.patch(tmp_path / "other", tmp_path / "diff", tmp_path / "out")
    assert len(error.value.problems) == len([key for key in tensors(tmp_path / "base") if "norm" not in key])
    (tmp_path / "other" / "notes" / "a.txt").write_text("other")
    with pytest.raises(li.FileError, match=r"notes/a.txt: is not in the base as it was"):
        algebra.patch(tmp_path / "other", tmp_path / "diff", tmp_path / "out")
    with pytest.raises(li.FileError, match="is not the base of this difference") as error:
        algebra.patch(tmp_path / "wide", tmp_path / "diff", tmp_path / "out")
    assert sum(line.split(":")[0] in tensors(tmp_path / "base") for line in error.value.problems) == 21
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_damaged_difference_is_refused(tmp_path):
    """A flipped bit, a short file, a path that leads out, and other versions are errors; nothing is left."""
    make(tmp_path)
    algebra.diff(tmp_path / "base", tmp_path / "merged", tmp_path / "diff")
    pristine = contents(tmp_path / "diff")
    manifest = json.loads(pristine["manifest.json"])

    def damaged(name, data):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "diff", tmp_path / "bad")
        (tmp_path / "bad" / name).write_bytes(data)
        with pytest.raises(li.FileError):
            algebra.patch(tmp_path / "base", tmp_path / "bad", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    rest = pristine["rest.bin"]
    for i in range(3, len(rest), len(rest) // 20):
        damaged("rest.bin", rest[:i] + bytes([rest[i] ^ 16]) + rest[i + 1 :])
    damaged("rest.bin", rest[:-3])
    damaged("low_rank.safetensors", pristine["low_rank.safetensors"][:-4])
    damaged("manifest.json", b"{}")
    damaged("manifest.json", json.dumps(manifest | {"version": 99}).encode())
    manifest["files"][0]["name"] = "../escaped"
    damaged("manifest.json", json.dumps(manifest).encode())
    with pytest.raises(li.FileError, match=r"has no manifest.json"):
        algebra.patch(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    with pytest.raises(li.FileError, match="not an empty directory"):
        algebra.patch(tmp_path / "base", tmp_path / "diff", tmp_path / "merged")
    with pytest.raises(li.FileError, match="not an empty directory"):
        algebra.diff(tmp_path / "base", tmp_path / "merged", tmp_path / "a")


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 2**16), size=st.sampled_from([1, 2, 4, 8]), n=st.integers(1, 300), is_float=st.booleans(),
       near=st.booleans())  # fmt: skip
def test_residuals_are_lossless(seed, size, n, is_float, near):
    """Any bits are restored from any guess, and nothing is read beyond the code."""
    g = np.random.default_rng(seed)
    raw = [g.integers(0, 256, n * size, dtype=np.uint8).view(SIGNED[size]) for _ in range(2)]
    values, guess = raw[0], raw[0] + g.integers(-2, 3, n).astype(SIGNED[size]) if near else raw[1]
    code = encode(values, guess, is_float)
    position = 0

    def read(count):
        nonlocal position
        position += count
        return code[position - count : position]

    assert np.array_equal(decode(read, guess, is_float), values)
    assert position == len(code)


@settings(max_examples=examples(40))
@given(seed=st.integers(0, 2**16), r=st.integers(1, 40), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_the_guess_does_not_depend_on_the_order_of_the_sum(seed, r, size):
    """With factors on the grid, every order of adding up the ranks gives the same bits."""
    g = torch.Generator().manual_seed(seed)
    P, Q = (snap(torch.randn(shape, generator=g) * size) for shape in ((7, r), (r, 9)))
    w0 = torch.randn(7, 9, generator=g)
    order = torch.randperm(r, generator=g)
    total = torch.zeros(7, 9, dtype=torch.float64)
    for k in order.tolist():
        total = total + P[:, k : k + 1].double() * Q[k].double()
    assert torch.equal(P.double() @ Q.double(), total)
    assert torch.equal(guess_tile(w0, P, Q), (w0.double() + total).float())
