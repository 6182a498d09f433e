"""Every format: what the original libraries wrote means here what they compute; there and back again; and each into each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorainject as li

from adapter_files import LLAMA_HINTS, LORALIB_HINTS, records
from example_count import examples
from oracle import FIXTURES, dense_deltas, is_same_record, max_error, merged_weights, module_tree


@dataclass
class Fixture:
    """A file of another library: where it is, what its reader must be told, and what must come out."""

    path: str
    wanted: str
    base: str = ""
    hints: li.Hints = field(default_factory=li.Hints)
    transposed: tuple[str, ...] = ()
    eps: float = 0.0
    format: str = ""


def kohya() -> li.Hints:
    base = load_file(FIXTURES / "kohya_lycoris" / "base.safetensors")
    return li.Hints(component="unet", model=module_tree({key: tuple(t.shape) for key, t in base.items()}))


FOUND = {
    "torchtune": Fixture("torchtune", "expected_peft_adapter_model.safetensors", hints=li.Hints(alpha=6, heads=(4, 2))),
    "mlx": Fixture("mlx_lora", "expected_merged.safetensors", "base.safetensors"),
    "adapterhub, bert": Fixture("adapterhub_bert", "expected_delta.safetensors", format="adapterhub"),
    "adapterhub, gpt2": Fixture("adapterhub_gpt2", "expected_delta.safetensors", transposed=("c_attn", "c_fc", "c_proj"), format="adapterhub"),
    "kohya": Fixture("kohya_lycoris/lora.safetensors", "expected_merged.safetensors", "base.safetensors", kohya(), eps=2**-23),
    "diffusers": Fixture("diffusers/pytorch_lora_weights.safetensors", "expected_delta.safetensors"),
    "gguf": Fixture("gguf/lora.gguf", "expected_delta_hf.safetensors", hints=li.Hints(heads=(4, 2))),
    "onnx": Fixture("onnx_adapter/a.onnx_adapter", "expected_delta.safetensors"),
    "loralib": Fixture("loralib/lora.pt", "expected_merged.safetensors", "base.safetensors", LORALIB_HINTS, ("mf.weight", "emb.weight")),
}  # fmt: skip


def opened(fixture: Fixture) -> li.AdapterFile:
    return li.read(FIXTURES / fixture.path, allow_pickle=True, hints=fixture.hints)


def folder(fixture: Fixture) -> Path:
    at = FIXTURES / fixture.path
    return at if at.is_dir() else at.parent


def known(name: str, fixture: Fixture) -> str:
    return fixture.format or name.partition(",")[0]


@pytest.mark.parametrize(("name", "fixture"), FOUND.items(), ids=FOUND)
def test_what_the_library_computes(name, fixture):
    """The format is told by content, and its tensors mean what the library that wrote them makes of them."""
    file, wanted = opened(fixture), load_file(folder(fixture) / fixture.wanted)
    assert file.format == known(name, fixture)
    if fixture.base:
        base = {key.replace("conv.conv", "conv"): t for key, t in load_file(folder(fixture) / fixture.base).items()}
        wanted = {key.replace("conv.conv", "conv"): t for key, t in wanted.items()}
        assert max_error(merged_weights(file, base, fixture.transposed, fixture.eps), wanted) < 1e-5
    elif name == "torchtune":
        assert all(
            torch.equal(wanted[f"base_model.model.{s.path}.lora_{h}.weight"], getattr(s, h))
            for s in file.sites
            for h in "AB"
        )
        assert len(wanted) == 2 * len(file.sites)
    else:
        found = {f"{key.removesuffix('.weight')}.weight": d for key, d in dense_deltas(file).items()}
        assert found.keys() == wanted.keys()
        for key, t in wanted.items():
            turned = any(key.endswith(f"{leaf}.weight") for leaf in fixture.transposed)
            assert ((found[key].mT if turned else found[key]).reshape(t.shape) - t).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["kohya", "gguf", "onnx", "loralib", "diffusers"])
def test_a_name_says_nothing(name, tmp_path):
    """A file by another name, or with the ending of another format, is what it was."""
    fixture = FOUND[name]
    for ending in ("x", "x.safetensors", "x.bin", "x.gguf"):
        (tmp_path / ending).write_bytes((FIXTURES / fixture.path).read_bytes())
        assert is_same_record(li.read(tmp_path / ending, allow_pickle=True, hints=fixture.hints), opened(fixture))


def test_litgpt_in_transformers_names():
    """q and v come apart, the rest is renamed; the fused rows of the merged weight are the judge."""
    at = FIXTURES / "litgpt"
    base, wanted = load_file(at / "base.safetensors"), load_file(at / "expected_merged.safetensors")
    found = dense_deltas(li.read(at, allow_pickle=True))
    layer = "model.layers.0."
    qkv = torch.zeros(32, 16, dtype=torch.float64)
    qkv[:16], qkv[24:] = found.pop(layer + "self_attn.q_proj.weight"), found.pop(layer + "self_attn.v_proj.weight")
    theirs = {"attn.qkv": qkv, "attn.proj": found.pop(layer + "self_attn.o_proj.weight")}
    theirs |= {
        f"mlp.{a}": found.pop(f"{layer}mlp.{b}_proj.weight")
        for a, b in (("fc_1", "gate"), ("fc_2", "up"), ("proj", "down"))
    }
    now = {f"transformer.h.0.{key}.weight": d + base[f"transformer.h.0.{key}.weight"] for key, d in theirs.items()}
    now["lm_head.weight"] = found.pop("lm_head.weight") + base["lm_head.weight"]
    assert not found
    assert max_error(now, {key: t for key, t in wanted.items() if key in now}) < 1e-5
    assert all(torch.equal(t, base[key]) for key, t in wanted.items() if key not in now)


ROUND = {name: fixture for name, fixture in FOUND.items() if name != "loralib"} | {
    "litgpt": Fixture("litgpt", "", hints=li.Hints(heads=(4, 2)))
}


@pytest.mark.parametrize(("name", "fixture"), ROUND.items(), ids=ROUND)
def test_there_and_back(name, fixture, tmp_path):
    """write(read(x)) is x, for each library's own file."""
    file = opened(fixture)
    suffix = li.FORMATS[file.format].suffix
    li.write(file, tmp_path / f"a{suffix}", format=file.format, hints=fixture.hints)
    again = li.read(tmp_path / f"a{suffix}", allow_pickle=True, hints=fixture.hints)
    assert again.format == file.format
    assert is_same_record(again, file)


# --- each format into each other, on adapters that any of them can hold -------------------------------------------------


def through(file: li.AdapterFile, format: str, folder: Path) -> li.AdapterFile:
    """Written and read again, with what the format does not hold told anew."""
    place = folder / f"{format}{li.FORMATS[format].suffix}"
    done = li.write(file, place, format=format, hints=LLAMA_HINTS)
    assert done.lost == ()
    s = done.file.sites[0]
    told = replace(LLAMA_HINTS, alpha=s.scale * s.r) if "alpha" in li.FORMATS[format].asks else LLAMA_HINTS
    return li.read(place, allow_pickle=True, hints=told)


def same(file: li.AdapterFile, other: li.AdapterFile) -> bool:
    mine, theirs = ({key: d for key, d in dense_deltas(f).items() if d.any()} for f in (file, other))
    return mine.keys() == theirs.keys() and all(
        torch.allclose(d, theirs[key], rtol=1e-5, atol=1e-5) for key, d in mine.items()
    )


# AdapterHub names the base's class in its config, and gives only some weights a LoRA.
HOLDS_LLAMA = [name for name in li.FORMATS if name != "adapterhub"]


@pytest.mark.parametrize("second", HOLDS_LLAMA)
@pytest.mark.parametrize("first", HOLDS_LLAMA)
def test_every_pair(first, second, tmp_path_factory):
    """Through two formats in a row, and what is added to each weight is what it was."""

    @settings(max_examples=examples(8))
    @given(records())
    def check(file):
        folder = tmp_path_factory.mktemp("pair")
        assert same(file, through(through(file, first, folder), second, folder / "second"))

    check()


@pytest.mark.parametrize("format", HOLDS_LLAMA)
def test_a_second_time_changes_nothing(format, tmp_path_factory):
    """What a format holds is written by it to the bit: the first conversion may fold scales, the next finds nothing to do."""

    @settings(max_examples=examples(16))
    @given(records())
    def check(file):
        folder = tmp_path_factory.mktemp("twice")
        once = through(file, format, folder)
        assert is_same_record(through(once, format, folder / "again"), once)

    check()


@pytest.mark.parametrize(
    ("factor", "dtype"), [(2.0, torch.bfloat16), (0.125, torch.bfloat16), (3.0, torch.float32), (1 / 3, torch.float32)]
)
def test_folding_is_exact_in_every_dtype(factor, dtype):
    """A scale goes into bfloat16 factors where that loses nothing, and else makes them float32."""
    from lorainject.files.transforms import with_scale_folded

    s = li.StoredSite(path="a", A=torch.randn(2, 3).bfloat16(), B=torch.randn(64, 2).bfloat16(), alpha=2 * factor)
    one = with_scale_folded(s, 1.0)
    assert one.scale == 1
    assert one.B.dtype == dtype
    assert torch.allclose(one.B.double(), s.B.double() * factor, rtol=1e-7, atol=0)


# --- what a format can't hold -------------------------------------------------------------------------------------------

CANT = {
    "torchtune": ("plain", r"torchtune has no place for:(.*\n)*.*conv2: convolutions\n.*emb: embeddings\n(.*\n)*.*head: a whole tensor"),
    "mlx": ("lora_bias", r"mlx has no place for:\n  - lin: bias updates\n"), "litgpt": ("dora", r"litgpt has no place for:\n(.*\n)*.*lin: magnitudes"),
    "loralib": ("tokens", r"loralib has no place for:\n  - emb: rows of trained tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("format", "case"), CANT.items(), ids=CANT)
def test_what_has_no_place_is_refused_by_name(format, case, tmp_path):
    """All of it at once, and nothing is written."""
    variant, message = case
    with pytest.raises(li.FileError, match=message):
        li.convert(
            FIXTURES / f"peft_{variant}", tmp_path / f"a{li.FORMATS[format].suffix}", format=format, hints=LLAMA_HINTS
        )
    assert not list(tmp_path.iterdir())


def test_lossy_only_when_asked_for(tmp_path):
    """Then it says what was left out, and how much of the update that was."""
    done = li.convert(FIXTURES / "peft_plain", tmp_path / "a", format="mlx", lossy=True)
    assert [line for line in done.lost if "left out altogether" in line] == [done.lost[-1]]
    assert "head: a whole tensor" in done.lost
    file = li.read(FIXTURES / "peft_plain")
    norms = {s.path: float((s.scale * s.B.double() @ s.A.double()).norm()) ** 2 for s in file.sites}
    share = ((norms["conv1"] + norms["conv2"]) / sum(norms.values())) ** 0.5
    assert f"2 sites, {share:.2g} of the update's norm" in done.lost[-1]
    assert {s.path for s in li.read(tmp_path / "a").sites} == {"lin", "c1", "emb"}


def test_no_two_adapters_in_one_directory(tmp_path):
    """A second format beside the first would be read as a mixture of both."""
    li.convert(FIXTURES / "mlx_lora", tmp_path / "a", format="peft")
    with pytest.raises(li.FileError, match=r"holds another adapter, .*\n  - adapter_model\.safetensors"):
        li.convert(tmp_path / "a", tmp_path / "a", format="mlx")
    assert li.read(tmp_path / "a").format == "peft"
    with pytest.raises(li.FileError, match="peft is a directory"):
        li.convert(FIXTURES / "mlx_lora", tmp_path / "b.safetensors", format="peft")


def test_stacks_become_experts_and_back(tmp_path):
    """A stack is written as the experts' own linears where a format has none, and mlx-lm's switch_mlp is a stack again."""
    file = li.read(FIXTURES / "peft_params")
    stack = replace(file, sites=tuple(replace(s, path="mlp.experts") for s in file.sites if s.path == "experts"))
    done = li.write(stack, tmp_path / "a", format="mlx")
    assert "mlp.experts.3.up_proj" in {s.path for s in done.file.sites}
    assert {key for key in load_file(tmp_path / "a" / "adapters.safetensors") if "up" in key} == {
        f"mlp.switch_mlp.up_proj.lora_{h}" for h in "ab"
    }


def bare(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


NOT_LOW_RANK = {
    "LoHa": "lora_unet_a.hada_w1_a", "LoKr": "lora_unet_a.lokr_w1", "OFT": "lora_unet_a.oft_blocks", "GLoRA": "lora_unet_a.a1.weight",
    "IA3": "lora_unet_a.on_input", "a full difference": "lora_unet_a.diff", "trained norms": "lora_unet_a.w_norm", "VeRA": "base_model.model.a.vera_lambda_b",
}  # fmt: skip


@pytest.mark.parametrize(("what", "key"), NOT_LOW_RANK.items())
def test_other_methods_are_refused_by_name(what, key, tmp_path):
    """What is no pair of low-rank factors says so, instead of an unknown key."""
    with pytest.raises(li.FileError, match=f"{what}.*, which is no pair of low-rank factors"):
        li.read(bare({key: torch.ones(2, 2)}, tmp_path))


def test_every_format_is_described():
    """Its library and version; and only features that there are."""
    from lorainject.files.format import FEATURES

    for name, form in li.FORMATS.items():
        assert form.name == name
        assert form.library
        assert form.holds <= {*FEATURES, "whole tensors", "tokens"}
        assert form.scales in ("site", "alpha", "one", "none")
    with pytest.raises(li.SpecError, match="there is no format 'peftt'"):
        li.convert("x", "y", format="peftt")
