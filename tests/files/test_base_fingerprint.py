"""A file knows the base that its adapter was made for: the bare base from the base with another adapter merged into it,
and either from its neighbors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.files.io import safetensors_file
from lorainject.numerics.fingerprint import OLD_SAMPLES, SAMPLES, sample_positions

from models import randomize

OLD_FILE = Path(__file__).parents[1] / "fixtures" / "records" / "version_1.safetensors"
REFUSED = "was made for another base model; nothing was loaded"


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a base model whose widths are powers of two."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Embedding(32, 64)).to(dtype)


def merged_for_good(model: nn.Module, std: float) -> nn.Module:
    """Return the model with another adapter in its weights, and nothing that tells so."""
    randomize(li.inject(model, ["0", "1", "2"], r=2, name="other"), "other", seed=5, std=std)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", li.SurvivalWarning)
        li.merge(model, reversible=False)
    return li.eject(model)


def save_on(model: nn.Module, path: Path) -> Path:
    """Save an adapter that is made on this model."""
    randomize(li.inject(model, ["0", "1", "2"], r=2))
    return li.save(model, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.02, 0.1, 1.0])
def test_an_adapter_of_a_merged_base_is_refused_on_the_bare_base(std, dtype, tmp_path):
    """It is refused, and so is the adapter of the bare base on the merged one; each loads onto its own base."""
    on_merged = save_on(merged_for_good(net(dtype), std), tmp_path / "merged.safetensors")
    on_bare = save_on(net(dtype), tmp_path / "bare.safetensors")
    with pytest.raises(li.FileError, match=REFUSED):
        li.load(net(dtype), on_merged)
    with pytest.raises(li.FileError, match=REFUSED):
        li.load(merged_for_good(net(dtype), std), on_bare)
    li.load(net(dtype), on_bare)
    li.load(merged_for_good(net(dtype), std), on_merged)


def test_a_merged_base_in_another_dtype_is_refused(tmp_path):
    """The rounding to bfloat16 does not hide a merge of a few per cent."""
    on_merged = save_on(merged_for_good(net(), 0.06), tmp_path / "merged.safetensors")
    with pytest.raises(li.FileError, match=REFUSED):
        li.load(net(torch.bfloat16), on_merged)
    li.load(merged_for_good(net(), 0.06).to(torch.bfloat16), on_merged)


@pytest.mark.parametrize("reversible", [True, False])
def test_an_adapter_that_is_saved_while_another_is_merged_keeps_its_base(reversible, tmp_path):
    """Both adapters were made on W0, so their files load onto W0, and not onto the merged weights."""
    model = net()
    for seed, name in enumerate(("first", "second")):
        randomize(li.inject(model, ["0", "1", "2"], r=2, name=name), name, seed=seed)
    li.activate(model, "first")
    li.merge(model, "first", reversible=reversible)
    for name in ("first", "second"):
        path = li.save(model, tmp_path / f"{name}.safetensors", name)
        li.load(net(), path)
        with pytest.raises(li.FileError, match=REFUSED):
            li.load(merged_for_good(net(), 0.1), path)


def test_a_model_that_is_cast_while_merged_saves_the_dtype_of_its_base(tmp_path):
    """The fingerprint is that of W0 as it was, and the file loads onto W0 and onto W0 in half precision."""
    model = net()
    randomize(li.inject(model, ["0", "1", "2"], r=2))
    li.merge(model)
    path = li.save(model.to(torch.bfloat16), tmp_path / "a.safetensors")
    for base in (net(), net(torch.bfloat16)):
        assert len(list(li.parameters(li.load(base, path)))) == 6
    other = net()
    with torch.no_grad():
        other.get_submodule("0").weight *= 1.1
    with pytest.raises(li.FileError, match=r"- 0: differs from the base weight"):
        li.load(other, path)


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_a_change_outside_column_0_is_noticed(name, tmp_path):
    """A base that differs everywhere but in its first column is another base."""
    path = save_on(net(), tmp_path / "a.safetensors")
    other = net()
    with torch.no_grad():
        other.get_submodule(name).weight[:, 1:] *= 1.0001
    with pytest.raises(li.FileError, match=rf"- {name}: differs from the base weight"):
        li.load(other, path)


def old_base() -> nn.Module:
    """Return the base of the file that version 1 of the record was written to."""
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Embedding(12, 4))
    for p in model.parameters():
        p.data.copy_((torch.arange(p.numel()) / 64 - 0.3).view(p.shape))
    return model


def test_an_old_file_is_checked_by_its_own_positions():
    """A file with 8 samples per weight loads onto its base, in float32 and half precision, and onto no other."""
    assert {len(sample) for sample in li.read(OLD_FILE).base.sample.values()} == {OLD_SAMPLES}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        li.load(old_base().to(dtype), OLD_FILE)
    for position in sample_positions(128, OLD_SAMPLES):
        other = old_base()
        other[0].weight.data.view(-1)[position] += 1e-3
        with pytest.raises(li.FileError, match=r"- 0: differs from the base weight"):
            li.load(other, OLD_FILE)


def test_an_old_file_that_is_written_again_keeps_its_fingerprint(tmp_path):
    li.write(li.read(OLD_FILE), tmp_path / "a.safetensors", format="lorainject")
    assert (tmp_path / "a.safetensors").read_bytes() == OLD_FILE.read_bytes()


def test_the_version_of_the_record_tells_the_positions(tmp_path):
    """A new file says version 4, so that an old version of the library refuses it by name."""
    path = save_on(net(), tmp_path / "a.safetensors")
    record = json.loads(safetensors_file.read(path)[1]["lorainject"])
    assert record["version"] == 4
    assert {len(sample) for sample in li.read(path).base.sample.values()} == {SAMPLES}
