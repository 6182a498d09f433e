"""Merging on disk: the same bits as in memory, from any layout of the checkpoint, and nothing half done."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorainject as li
from lorainject.checkpoint import shard_writer

from models import TINY, ids, llama, mapped, randomise, run

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")  # half precision and small deltas


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                                            num_key_value_heads=2, num_local_experts=12)).eval()  # fmt: skip


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, num_local_experts=4, head_dim=8)).eval()  # fmt: skip


MODELS = {name: (tiny.build, tiny.inputs, list(tiny.targets)) for name, tiny in TINY.items()} | {
    "mixtral": (mixtral, lambda: {"input_ids": ids()}, ["all-linear"]),
    "gpt_oss": (gpt_oss, lambda: {"input_ids": ids()}, ["all-linear"]),
    "gpt2 slices": (TINY["gpt2"].build, TINY["gpt2"].inputs, ["c_attn[q,v]", "c_fc"]),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_byte_equal_to_the_way_through_memory(name, dtype, tmp_path):
    """load, merge(reversible=False), eject, save_pretrained write the very same tensors; and the result loads and computes."""
    build, inputs, targets = MODELS[name]
    torch.manual_seed(0)
    base = build().to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = li.inject(
        base, targets, r=4, alpha=6, overrides={"*.0.*": {"alpha": 8}}
    )  # a power of two takes another way through the sum
    randomise(model)
    li.save(model, tmp_path / "adapter")
    y = run(model, inputs()).detach()
    li.merge(model, reversible=False)
    li.eject(model).save_pretrained(tmp_path / "memory", max_shard_size="40KB")
    told = []
    report = li.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", progress=lambda *at: told.append(at)
    )
    assert same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == sorted(
        p.name for p in (tmp_path / "base").iterdir()
    )
    assert told[-1] == (sum(p.stat().st_size for p in (tmp_path / "base").iterdir()),) * 2
    assert report.sites
    assert report.survival > 0.9
    again = type(base).from_pretrained(tmp_path / "disk", dtype=dtype).eval()
    assert torch.allclose(
        run(again, inputs()).float(),
        y.float(),
        atol=(1e-4 if dtype == torch.float32 else 0.03) * float(y.abs().max().clamp(min=1)),
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A Mixtral checkpoint of three shards with per-expert files, other files beside it, and an adapter."""
    return make(tmp_path)


def make(tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = mixtral().to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="120KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "base" / "extra" / "notes.txt").write_text("kept")
    for i, targets in enumerate((["all-linear"], ["q_proj", "down_proj"])):
        randomise(li.inject(model, targets, r=2 + i), seed=i)
        li.save(model, tmp_path / f"adapter{i}")
        li.eject(model)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_kept(made):
    """Headers, order, metadata, index and all other files to the byte; only the adapted tensors' bytes differ."""
    li.merge_checkpoint(made / "base", made / "adapter1", made / "out")
    before, after = contents(made / "base"), contents(made / "out")
    assert list(before) == list(after)
    adapted = 0
    for name, old in before.items():
        if not name.endswith(".safetensors"):
            assert after[name] == old
            continue
        start = 8 + int.from_bytes(old[:8], "little")
        assert after[name][:start] == old[:start]
        for key, entry in json.loads(old[8:start]).items():
            if key != "__metadata__":
                a, b = (
                    raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
                    for raw in (old, after[name])
                )
                assert (a != b) == ("q_proj" in key or ".w2." in key)
                adapted += a != b
    assert adapted == 2 * (1 + 12)


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_memory_for_an_adapter_goes_as_it_is_written(in_place, made, monkeypatch):
    """A and B are maps of a temporary file, which go with the last of the weight's tensors on disk."""
    before, seen, close = mapped(), [], shard_writer.Sum.close

    def seen_to_close(of: shard_writer.Sum, key: str) -> None:
        close(of, key)
        seen.append(len(of.parts))

    monkeypatch.setattr(shard_writer.Sum, "close", seen_to_close)
    if in_place:
        li.merge_in_place(made / "base", made / "adapter0")
    else:
        li.merge_checkpoint(made / "base", made / "adapter0", made / "out")
    assert seen.count(0) == len(load_file(made / "adapter0" / "adapter_model.safetensors")) / 2
    assert mapped() == before


def test_in_place_and_back(made):
    """The bits of merge_checkpoint; then every file to the byte, and nothing else is left."""
    before = contents(made / "base")
    li.merge_checkpoint(made / "base", [made / "adapter0", made / "adapter1"], made / "out", weights=[0.5, -2])
    li.merge_in_place(made / "base", [made / "adapter0", made / "adapter1"], weights=[0.5, -2])
    merged = contents(made / "base")
    assert {k: v for k, v in merged.items() if not k.startswith(".lorainject-merge")} == contents(made / "out")
    kept = sum(len(v) for k, v in merged.items() if k.startswith(".lorainject-merge"))
    assert kept > 0
    with pytest.raises(
        li.StateError, match=r"is merged already, or a merge was interrupted there\n=> lorainject unmerge"
    ):
        li.merge_in_place(made / "base", made / "adapter1")
    assert li.unmerge_in_place(made / "base") == made / "base"
    assert contents(made / "base") == before
    with pytest.raises(li.StateError, match="nothing is merged in place"):
        li.unmerge_in_place(made / "base")


def test_several_adapters_with_weights(tmp_path):
    """round(W0 + sum of w s B A), rounded once; in any order the same."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    w0 = model.model.layers[0].self_attn.q_proj.weight.detach().double().clone()
    d = []
    for i in range(3):
        randomise(li.inject(model, ["q_proj"], r=2 + i, alpha=3), seed=i, std=0.3)
        a = model.model.layers[0].self_attn.q_proj.lora["default"]
        d.append((a.scale * a.B.double() @ a.A.double()).detach())
        li.save(model, tmp_path / f"a{i}.safetensors")
        li.eject(model)
    li.merge_checkpoint(
        tmp_path / "base", [tmp_path / f"a{i}.safetensors" for i in range(3)], tmp_path / "out", weights=[1, 0.25, -1]
    )
    got = tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(got.double(), w0 + d[0] + 0.25 * d[1] - d[2], atol=1e-7)
    for weights in ([1, 1], [1, 1, float("nan")], []):
        with pytest.raises(li.SpecError, match=r"3 adapters and the weights.*\n=> give each adapter one weight"):
            li.merge_checkpoint(
                tmp_path / "base", [tmp_path / f"a{i}.safetensors" for i in range(3)], tmp_path / "no", weights=weights
            )


def assert_refused(made: Path, match: str, error: type[Exception] = li.FileError, **options: object) -> None:
    """Both ways raise this, and leave everything as it was."""
    before = contents(made)
    with pytest.raises(error, match=match):
        li.merge_checkpoint(made / "base", made / "adapter0", made / "out", **options)
    assert contents(made) == before
    assert not (made / "out").exists()
    with pytest.raises(error, match=match):
        li.merge_in_place(made / "base", made / "adapter0", **options)
    assert contents(made) == before


def test_a_truncated_shard(made):
    """Its header speaks of more bytes than there are."""
    shard = sorted((made / "base").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(made, r"has [\d,]+ bytes, its header speaks of [\d,]+\n=> it was cut off")
    shard.write_bytes(shard.read_bytes()[:5])
    assert_refused(made, "is not a whole safetensors file")
    shard.write_bytes((1 << 60).to_bytes(8, "little") + b"{" * 100)
    assert_refused(made, "is not a whole safetensors file")
    shard.write_bytes((16).to_bytes(8, "little") + b'{"a": [[[[[[[[[[' + b"0" * 10)
    assert_refused(made, "has a header that can't be read")
    shard.unlink()
    assert_refused(made, "in the index, but not in the directory")


def test_an_index_that_lies(made):
    """A tensor in another shard than it says, one in none, one that it does not know, and names that lead elsewhere."""
    index = made / "base" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = list(good["weight_map"])
    shards = sorted(set(good["weight_map"].values()))
    for change, match in [
        ({names[0]: next(s for s in shards if s != good["weight_map"][names[0]])}, "but the index says"),
        ({"model.ghost.weight": shards[0]}, "model.ghost.weight: in no shard, but the index says"),
        ({names[0]: "../base/" + shards[0]}, "not a plain file name"),
        ({names[0]: "missing.safetensors"}, "missing.safetensors: in the index, but not in the directory"),
    ]:
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))
        assert_refused(made, match)
    index.write_text(json.dumps(good | {"weight_map": {k: v for k, v in good["weight_map"].items() if k != names[3]}}))
    assert_refused(made, "but the index says nothing of it")
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        assert_refused(made, "holds no weight_map")


def test_other_formats(made):
    """A pickle or a quantised checkpoint: what to do instead."""
    for shard in (made / "base").glob("*.safetensors*"):
        shard.unlink()
    assert_refused(made, "holds no weights")
    (made / "base" / "pytorch_model.bin").write_bytes(b"PK")
    assert_refused(made, r"(?s)has no \.safetensors file.*pytorch_model\.bin.*save it as safetensors once")


def test_quantised_tensors(tmp_path):
    """FP8 weights can't take a delta: by name, with the way out."""
    torch.manual_seed(0)
    model = llama()
    randomise(li.inject(model, ["q_proj"]))
    li.save(model, tmp_path / "adapter0")
    li.eject(model).save_pretrained(tmp_path / "base")
    from safetensors.torch import save_file

    file = tmp_path / "base" / "model.safetensors"
    save_file(
        {k: t.to(torch.float8_e4m3fn) if "q_proj" in k else t for k, t in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    assert_refused(tmp_path, r"(?s)q_proj: is stored as F8_E4M3, quantised.*\(2 times\)")


def test_an_adapter_that_does_not_fit(made, tmp_path):
    """A site that is not in the model, another shape, another base: each named."""
    other = llama(hidden_size=64)
    randomise(li.inject(other, ["q_proj", "mlp.up_proj"]))
    li.save(other, made / "adapter0")
    assert_refused(made, r"(?s)does not fit this model.*q_proj.*up_proj: is not in this model")
    torch.manual_seed(1)
    other = mixtral()
    randomise(li.inject(other, ["q_proj"]))
    li.save(other, made / "adapter0")
    assert_refused(
        made, r"(?s)is not the base that the adapter was made for.*q_proj: another base weight.*check_base=False"
    )
    li.merge_checkpoint(made / "base", made / "adapter0", made / "out", check_base=False)


def test_overflow_and_strict(made):
    """What is not finite is refused; with strict=True, what does not survive, too."""
    file = li.read(made / "adapter0")
    from dataclasses import replace

    huge = replace(file, sites=tuple(replace(s, alpha=s.alpha * 1e41) for s in file.sites))
    before = contents(made)
    for call in (
        lambda: li.merge_checkpoint(made / "base", huge, made / "out"),
        lambda: li.merge_in_place(made / "base", huge),
    ):
        with pytest.raises(
            li.MergeError, match=r"(?s)nothing was merged:.*W0 \+ s B A is not finite in torch.bfloat16"
        ):
            call()
        assert contents(made) == before
    small = replace(file, sites=tuple(replace(s, alpha=s.alpha * 1e-3) for s in file.sites))
    for call in (
        lambda: li.merge_checkpoint(made / "base", small, made / "out", strict=True),
        lambda: li.merge_in_place(made / "base", small, strict=True),
    ):
        with pytest.raises(li.MergeError, match=r"(?s)less than 0\.9 of a delta survives"):
            call()
        assert contents(made) == before
    with pytest.warns(li.SurvivalWarning):
        li.merge_checkpoint(made / "base", small, made / "out")


def test_tied_on_disk(tmp_path):
    """GPT-2's lm_head is its embedding, one tensor on disk: refused, with the way through memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()
    model.save_pretrained(tmp_path / "base")
    randomise(li.inject(model, ["lm_head", "c_attn"]))
    li.save(model, tmp_path / "adapter0")
    assert_refused(tmp_path, r"lm_head: is tied to transformer\.wte\.weight, which the fold would change as well")


def test_symlinks_are_never_written_through(made):
    """A hub cache's snapshot is made of links: copied from, never written to; in place is refused."""
    cache = made / "blobs"
    cache.mkdir()
    for i, file in enumerate(sorted(p for p in (made / "base").iterdir() if p.is_file())):
        shutil.move(file, cache / str(i))
        file.symlink_to(cache / str(i))
    before = contents(cache)
    li.merge_checkpoint(made / "base", made / "adapter0", made / "out")
    assert not any(p.is_symlink() for p in (made / "out").iterdir())
    with pytest.raises(
        li.FileError, match=r"(?s)holds symlinks, as the hub's cache does.*=> merge into a directory of its own"
    ):
        li.merge_in_place(made / "base", made / "adapter0")
    assert contents(cache) == before


def test_where_to(made):
    """An output that is there, is a file, or lies in the checkpoint: refused; an empty directory is taken."""
    for out, match in [
        ("base", "already exists"),
        ("base/config.json", "already exists"),
        ("base/new", "lies in the checkpoint"),
    ]:
        with pytest.raises(li.FileError, match=match):
            li.merge_checkpoint(made / "base", made / "adapter0", made / out)
    (made / "empty").mkdir()
    li.merge_checkpoint(made / "base", made / "adapter0", made / "empty")
    assert (made / "empty" / "config.json").exists()
    with pytest.raises(li.FileError, match="is not a directory"):
        li.merge_checkpoint(made / "nowhere", made / "adapter0", made / "out")


def test_weights_in_other_formats_are_not_copied(made):
    """They would be the unmerged ones; a warning names them."""
    (made / "base" / "consolidated.00.pth").write_bytes(b"x")
    with pytest.warns(UserWarning, match="consolidated.00.pth: not copied"):
        li.merge_checkpoint(made / "base", made / "adapter0", made / "out")
    assert not (made / "out" / "consolidated.00.pth").exists()


def test_a_model_that_transformers_does_not_know(tmp_path):
    """Code of its own is never run: names and shapes on disk are taken as they are."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    randomise(li.inject(model, ["q_proj", "embed_tokens"]))
    li.save(model, tmp_path / "adapter")
    li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "known")
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(
            config
            | {
                "model_type": "mine",
                "architectures": ["Mine"],
                "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Mine"},
            }
        )
    )
    (tmp_path / "base" / "evil.py").write_text("raise SystemExit('ran')")
    li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "unknown")
    assert same(tensors(tmp_path / "known"), tensors(tmp_path / "unknown"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": True}))
    with pytest.raises(li.FileError, match="q_proj: is not in this model"):
        li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "turned")


@pytest.mark.parametrize(("saved", "trained"), [("BertForMaskedLM", "BertModel"), ("BertModel", "BertForMaskedLM")])
def test_an_adapter_from_the_model_inside(saved, trained, tmp_path):
    """`bert.encoder...` on disk and `encoder...` in the file, or the other way round: the same weights."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    getattr(transformers, saved)(config).save_pretrained(tmp_path / "base")
    model = getattr(transformers, trained).from_pretrained(tmp_path / "base")
    randomise(
        li.inject(model, ["encoder.layer.*.attention.self.query"])
        if trained == "BertModel"
        else li.inject(model, ["query"])
    )
    li.save(model, tmp_path / "adapter")
    li.merge(model, reversible=False)
    li.eject(model)
    li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = getattr(transformers, trained).from_pretrained(tmp_path / "out")
    for key, t in again.state_dict().items():
        assert "query" not in key or torch.equal(t, model.state_dict()[key])


def test_an_unmerge_that_finds_something_else(made):
    """A shard that was written to since, or a spoilt journal: refused, nothing changed."""
    li.merge_in_place(made / "base", made / "adapter0")
    merged = contents(made)
    shard = sorted((made / "base").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    spoilt = contents(made)
    with pytest.raises(li.MergeError, match=rf"{shard.name}: was changed since it was merged"):
        li.unmerge_in_place(made / "base")
    assert contents(made) == spoilt
    shard.write_bytes(merged[f"base/{shard.name}"])
    manifest = made / "base" / ".lorainject-merge" / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(li.FileError, match="is not a manifest that this version reads"):
        li.unmerge_in_place(made / "base")
    manifest.write_bytes(merged["base/.lorainject-merge/manifest.json"])
    li.unmerge_in_place(made / "base")


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_a_full_disk(made, in_place, monkeypatch):
    """Whichever write fails: one error, and everything is as it was."""
    before, calls = contents(made), 0

    def failing(function, at):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args)

        return call

    def merge() -> None:
        if in_place:
            li.merge_in_place(made / "base", made / "adapter0")
        else:
            li.merge_checkpoint(made / "base", made / "adapter0", made / "out")

    for function in ("pwrite", "copy_file_range", "fsync", "replace"):
        for at in random.Random(0).sample(range(1, 12), 4):
            calls = 0
            with monkeypatch.context() as patch:
                patch.setattr(os, function, failing(getattr(os, function), at))
                try:
                    merge()
                except li.FileError as e:
                    assert "No space left on device" in str(e)  # noqa: PT017
            if in_place and (made / "base" / ".lorainject-merge").exists():
                li.unmerge_in_place(made / "base")  # it did not come to pass, or its way back was cut off as well
            shutil.rmtree(made / "out", ignore_errors=True)
            assert contents(made) == before


def test_a_place_that_cannot_be_written(made):
    """A read-only file system: an error that names the place."""
    with pytest.raises(
        li.FileError, match=r"/proc/out can't be written: .*\n.*nothing is left of it\n=> check the place"
    ):
        li.merge_checkpoint(made / "base", made / "adapter0", "/proc/out")


@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_a_shard_that_changes_underneath(made, in_place, monkeypatch):
    """Somebody rewrites a shard while it is read: the merge is given up."""
    shard = sorted((made / "base").glob("*.safetensors"))[0]
    before, right = contents(made), shard_writer.get

    def meddling(*args):
        shard.write_bytes(shard.read_bytes())
        return right(*args)

    monkeypatch.setattr(shard_writer, "get", meddling)
    with pytest.raises(li.FileError, match=r"was changed while it was being merged\n=> merge again"):
        if in_place:
            li.merge_in_place(made / "base", made / "adapter0")
        else:
            li.merge_checkpoint(made / "base", made / "adapter0", made / "out")
    assert contents(made) == before


def test_two_at_once(made):
    """The second is told to wait."""
    from lorainject.checkpoint.copying import locked

    (made / ".out.lorainject-unfinished").mkdir()
    with (
        locked(made / ".out.lorainject-unfinished"),
        pytest.raises(li.FileError, match="another process is at work in"),
    ):
        li.merge_checkpoint(made / "base", made / "adapter0", made / "out")
    with locked(made / "base"), pytest.raises(li.FileError, match="another process is at work in"):
        li.merge_in_place(made / "base", made / "adapter0")


def test_another_merge_in_between(made, monkeypatch):
    """Merged in place by another process while this one was planning: refused, and the other's way back is untouched."""
    from lorainject.checkpoint import merge_in_place

    before, plan = contents(made / "base"), merge_in_place.plan_merge

    def planned(*args):
        found = plan(*args)
        monkeypatch.setattr(merge_in_place, "plan_merge", plan)
        li.merge_in_place(made / "base", made / "adapter1")
        return found

    monkeypatch.setattr(merge_in_place, "plan_merge", planned)
    with pytest.raises(li.StateError, match="is merged already"):
        li.merge_in_place(made / "base", made / "adapter0")
    li.unmerge_in_place(made / "base")
    assert contents(made / "base") == before


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_any_point(made, kills):
    """kill -9 at random points of merge_checkpoint, merge_in_place and unmerge_in_place: never a half-made checkpoint (faults.py)."""
    script = Path(__file__).parents[2] / "tools" / "faults.py"
    done = subprocess.run([sys.executable, script, made, str(kills)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


def test_a_config_that_no_model_can_be_built_from(made):
    """The reason, and not a traceback."""
    config = made / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 0}))
    assert_refused(made, r"can't be built from its config\.json: .*\n=> mend it")


def test_a_float64_checkpoint_by_a_scale_that_float32_does_not_hold(tmp_path):
    """5/3 is taken as it is in memory, on disk and on the way back."""
    torch.manual_seed(0)
    base = mixtral().double()
    base.save_pretrained(tmp_path / "base")
    W0 = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = li.inject(base, ["q_proj", "experts"], r=3, alpha=5)
    randomise(model)
    li.save(model, tmp_path / "adapter")
    low = model.model.layers[0].self_attn.q_proj.lora["default"]
    li.merge(model, reversible=False)
    M = model.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(M, W0 + 5 / 3 * (low.B @ low.A), rtol=1e-14, atol=1e-14)
    li.eject(model).save_pretrained(tmp_path / "memory")
    li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "disk")
    assert same(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    before = tensors(tmp_path / "base")
    li.merge_in_place(tmp_path / "base", tmp_path / "adapter")
    assert same(tensors(tmp_path / "base"), tensors(tmp_path / "memory"))
    li.unmerge_in_place(tmp_path / "base")
    assert same(tensors(tmp_path / "base"), before)
