"""merge_checkpoint: the bits of a merge in memory, from any layout on disk, or an error that leaves nothing behind.

What merge_in_place refuses for the same reasons is tested here too (`assert_refused`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorainject as li
from checkpoints import MOE_SIZES, contents, mixtral, same_bits, tensors

from models import TINY, ids, llama, randomize, run

pytestmark = pytest.mark.filterwarnings("ignore::lorainject.SurvivalWarning")  # half precision and small deltas


def gpt_oss() -> nn.Module:
    """Return a gpt-oss, whose experts are stored in stacks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**MOE_SIZES, num_local_experts=4, head_dim=8)).eval()


MODELS = {name: (tiny.build, tiny.inputs, list(tiny.targets)) for name, tiny in TINY.items()} | {
    "mixtral": (mixtral, lambda: {"input_ids": ids()}, ["all-linear"]),
    "gpt_oss": (gpt_oss, lambda: {"input_ids": ids()}, ["all-linear"]),
    "gpt2 slices": (TINY["gpt2"].build, TINY["gpt2"].inputs, ["c_attn[q,v]", "c_fc"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_tensors_have_the_bits_of_a_merge_in_memory(name, dtype, tmp_path):
    """The tensors are those that load, merge(reversible=False), eject and save_pretrained write; they load again."""
    build, inputs, targets = MODELS[name]
    torch.manual_seed(0)
    base = build().to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    # A scale that is a power of two takes another code path through the sum.
    model = li.inject(base, targets, r=4, alpha=6, overrides={"*.0.*": {"alpha": 8}})
    randomize(model)
    li.save(model, tmp_path / "adapter")
    y = run(model, inputs()).detach()
    li.merge(model, reversible=False)
    li.eject(model).save_pretrained(tmp_path / "memory", max_shard_size="40KB")
    calls = []
    report = li.merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "disk", progress=lambda *sizes: calls.append(sizes)
    )
    assert same_bits(tensors(tmp_path / "disk"), tensors(tmp_path / "memory"))
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == sorted(
        [*(p.name for p in (tmp_path / "base").iterdir()), "lorainject_merge.json"]
    )
    assert calls[-1] == (sum(p.stat().st_size for p in (tmp_path / "base").iterdir()),) * 2
    assert report.sites
    assert report.survival > 0.9
    again = type(base).from_pretrained(tmp_path / "disk", dtype=dtype).eval()
    assert torch.allclose(
        run(again, inputs()).float(),
        y.float(),
        atol=(1e-4 if dtype == torch.float32 else 0.03) * float(y.abs().max().clamp(min=1)),
    )


def test_only_the_bytes_of_adapted_tensors_change(folder):
    """Headers, order, metadata, index and all other files are kept to the byte."""
    li.merge_checkpoint(folder / "base", folder / "adapter1", folder / "out")
    before, after = contents(folder / "base"), contents(folder / "out")
    del after["lorainject_merge.json"]
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


def test_weighted_sum_of_several_adapters(tmp_path):
    """The result is round(W0 + the sum of w s B A), rounded once; one finite weight is needed per adapter."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    w0 = model.model.layers[0].self_attn.q_proj.weight.detach().double().clone()
    d = []
    for i in range(3):
        randomize(li.inject(model, ["q_proj"], r=2 + i, alpha=3), seed=i, std=0.3)
        a = model.model.layers[0].self_attn.q_proj.lora["default"]
        d.append((a.scale * a.B.double() @ a.A.double()).detach())
        li.save(model, tmp_path / f"a{i}.safetensors")
        li.eject(model)
    li.merge_checkpoint(
        tmp_path / "base", [tmp_path / f"a{i}.safetensors" for i in range(3)], tmp_path / "out", weights=[1, 0.25, -1]
    )
    merged = tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(merged.double(), w0 + d[0] + 0.25 * d[1] - d[2], atol=1e-7)
    for weights in ([1, 1], [1, 1, float("nan")], []):
        with pytest.raises(
            li.SpecError, match=r"3 adapters cannot be merged with the weights.*\n=> give .* one finite weight for each"
        ):
            li.merge_checkpoint(
                tmp_path / "base", [tmp_path / f"a{i}.safetensors" for i in range(3)], tmp_path / "no", weights=weights
            )


def assert_refused(folder: Path, match: str, error: type[Exception] = li.FileError, **options: object) -> None:
    """Assert that both ways to merge raise this error and leave everything as it was."""
    before = contents(folder)
    with pytest.raises(error, match=match):
        li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out", **options)
    assert contents(folder) == before
    assert not (folder / "out").exists()
    with pytest.raises(error, match=match):
        li.merge_in_place(folder / "base", folder / "adapter0", **options)
    assert contents(folder) == before


def test_damaged_shards_are_refused(folder):
    """A shard that is cut off, has an impossible header, or is not there, is refused."""
    shard = sorted((folder / "base").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(folder, r"(?s)its header describes [\d,]+ bytes.*it has [\d,]+ bytes.*\n=> the file is damaged")
    shard.write_bytes(shard.read_bytes()[:5])
    assert_refused(folder, "is not a whole safetensors file")
    shard.write_bytes((1 << 60).to_bytes(8, "little") + b"{" * 100)
    assert_refused(folder, "is not a whole safetensors file")
    shard.write_bytes((16).to_bytes(8, "little") + b'{"a": [[[[[[[[[[' + b"0" * 10)
    assert_refused(folder, "is not a whole safetensors file")
    shard.unlink()
    assert_refused(folder, "is in the index, but not in the directory")


def test_index_that_does_not_fit_is_refused(folder):
    """An index that names the wrong shard for a tensor, no shard, or a path, is refused."""
    index = folder / "base" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = list(good["weight_map"])
    shards = sorted(set(good["weight_map"].values()))
    for change, match in [
        ({names[0]: next(s for s in shards if s != good["weight_map"][names[0]])}, "but the index says"),
        ({"model.ghost.weight": shards[0]}, "model.ghost.weight: is in no shard, but the index says"),
        ({names[0]: "../base/" + shards[0]}, "is not a plain file name"),
        ({names[0]: "missing.safetensors"}, "missing.safetensors: is in the index, but not in the directory"),
    ]:
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))
        assert_refused(folder, match)
    index.write_text(json.dumps(good | {"weight_map": {k: v for k, v in good["weight_map"].items() if k != names[3]}}))
    assert_refused(folder, "but the index says nothing of it")
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        assert_refused(folder, "has no weight_map")


def test_checkpoints_in_other_formats_are_refused(folder):
    """A checkpoint without safetensors files is refused; the error names its files, and says what to do."""
    for shard in (folder / "base").glob("*.safetensors*"):
        shard.unlink()
    assert_refused(folder, "holds no weights")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"PK")
    assert_refused(folder, r"(?s)has no \.safetensors file.*pytorch_model\.bin.*save the model as safetensors once")


def test_quantized_tensors_are_refused(tmp_path):
    """float8 weights are refused by name: the delta belongs into the checkpoint before quantization."""
    torch.manual_seed(0)
    model = llama()
    randomize(li.inject(model, ["q_proj"]))
    li.save(model, tmp_path / "adapter0")
    li.eject(model).save_pretrained(tmp_path / "base")
    from safetensors.torch import save_file

    file = tmp_path / "base" / "model.safetensors"
    save_file(
        {k: t.to(torch.float8_e4m3fn) if "q_proj" in k else t for k, t in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    assert_refused(tmp_path, r"q_proj: is quantized, stored as weight F8_E4M3 \(2 times\)\n=> merge into")


def test_adapter_that_does_not_fit_is_refused(folder, tmp_path):
    """A site that is not in the model, another shape and another base are each named."""
    other = llama(hidden_size=64)
    randomize(li.inject(other, ["q_proj", "mlp.up_proj"]))
    li.save(other, folder / "adapter0")
    assert_refused(folder, r"(?s)does not fit this model.*q_proj.*up_proj: is not in this model")
    torch.manual_seed(1)
    other = mixtral()
    randomize(li.inject(other, ["q_proj"]))
    li.save(other, folder / "adapter0")
    assert_refused(
        folder,
        r"(?s)is not the base that the adapter was made for.*q_proj: differs from the base weight.*check_base=False",
    )
    li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out", check_base=False)


def test_overflow_and_lost_deltas_are_refused(folder):
    """A sum that is not finite is refused; with strict=True, a delta that does not survive the rounding is, too."""
    file = li.read(folder / "adapter0")

    huge = replace(file, sites=tuple(replace(s, alpha=s.alpha * 1e41) for s in file.sites))
    before = contents(folder)
    for call in (
        lambda: li.merge_checkpoint(folder / "base", huge, folder / "out"),
        lambda: li.merge_in_place(folder / "base", huge),
    ):
        with pytest.raises(
            li.MergeError, match=r"(?s)nothing was merged.*:.*W0 \+ s B A is not finite in torch.bfloat16"
        ):
            call()
        assert contents(folder) == before
    small = replace(file, sites=tuple(replace(s, alpha=s.alpha * 1e-3) for s in file.sites))
    for call in (
        lambda: li.merge_checkpoint(folder / "base", small, folder / "out", strict=True),
        lambda: li.merge_in_place(folder / "base", small, strict=True),
    ):
        with pytest.raises(li.MergeError, match=r"(?s)less than 0\.9 of a delta survives"):
            call()
        assert contents(folder) == before
    with pytest.warns(li.SurvivalWarning):
        li.merge_checkpoint(folder / "base", small, folder / "out")


def test_tied_weights_are_refused(tmp_path):
    """GPT-2's lm_head is its embedding, one tensor on disk: refused, and the error says how to do it in memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()
    model.save_pretrained(tmp_path / "base")
    randomize(li.inject(model, ["lm_head", "c_attn"]))
    li.save(model, tmp_path / "adapter0")
    assert_refused(tmp_path, r"lm_head: is tied to transformer\.wte\.weight, which would change too")


def test_output_directory(folder):
    """An output that exists, is a file, or lies in the checkpoint is refused; an empty directory is used."""
    for out, match in [
        ("base", "already exists"),
        ("base/config.json", "already exists"),
        ("base/new", "lies in the checkpoint"),
    ]:
        with pytest.raises(li.FileError, match=match):
            li.merge_checkpoint(folder / "base", folder / "adapter0", folder / out)
    (folder / "empty").mkdir()
    li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "empty")
    assert (folder / "empty" / "config.json").exists()
    with pytest.raises(li.FileError, match="is not a directory"):
        li.merge_checkpoint(folder / "nowhere", folder / "adapter0", folder / "out")


def test_weights_in_other_formats_are_not_copied(folder):
    """Weights in other formats would stay unmerged, so they are not copied, and a warning names them."""
    (folder / "base" / "consolidated.00.pth").write_bytes(b"x")
    with pytest.warns(UserWarning, match="consolidated.00.pth: not copied"):
        li.merge_checkpoint(folder / "base", folder / "adapter0", folder / "out")
    assert not (folder / "out" / "consolidated.00.pth").exists()


def test_model_that_transformers_does_not_have(tmp_path):
    """A checkpoint's own code is never run; names and shapes on disk are then taken as they are."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    randomize(li.inject(model, ["q_proj", "embed_tokens"]))
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
    assert same_bits(tensors(tmp_path / "known"), tensors(tmp_path / "unknown"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": True}))
    with pytest.raises(li.FileError, match="q_proj: is not in this model"):
        li.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "turned")


@pytest.mark.parametrize(("saved", "trained"), [("BertForMaskedLM", "BertModel"), ("BertModel", "BertForMaskedLM")])
def test_adapter_of_the_model_inside_or_around(saved, trained, tmp_path):
    """An adapter of BertModel fits BertForMaskedLM's checkpoint, and the other way round."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    getattr(transformers, saved)(config).save_pretrained(tmp_path / "base")
    model = getattr(transformers, trained).from_pretrained(tmp_path / "base")
    randomize(
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


def test_output_that_cannot_be_written(folder):
    """The error names the directory that cannot be written."""
    with pytest.raises(
        li.FileError, match=r"/proc/out cannot be written: .*\n.*nothing is left of it\n=> check the directory"
    ):
        li.merge_checkpoint(folder / "base", folder / "adapter0", "/proc/out")


def test_config_that_no_model_can_be_built_from(folder):
    """The error says why the model cannot be built."""
    config = folder / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 0}))
    assert_refused(folder, r"cannot be built from its config\.json: .*\n=> correct config\.json")
