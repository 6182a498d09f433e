"""Every format: files of the original libraries mean what those compute, and formats exchange records exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

import lorainject as li

from adapter_files import LLAMA_HINTS, LORALIB_HINTS, records
from example_count import examples
from oracle import FIXTURES, dense_deltas, is_same_record, max_error, merged_weights, module_tree


@dataclass(kw_only=True)
class Fixture:
    """A file that another library wrote."""

    path: str
    """The file or directory, below FIXTURES."""
    expected: str = ""
    """The file next to it that holds what the library computes: merged weights, updates, or PEFT's A and B."""
    base: str = ""
    """The file with the base's tensors, if `expected` holds merged weights."""
    hints: li.Hints = field(default_factory=li.Hints)
    """What the reader must be told."""
    transposed: tuple[str, ...] = ()
    """Endings of the weights that the library stores (in, out)."""
    eps: float = 0.0
    """What the library adds to the norm of DoRA."""

    def read(self) -> li.AdapterFile:
        return li.read(FIXTURES / self.path, allow_pickle=True, hints=self.hints)

    def load(self, file: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a file next to the adapter, without the wrapper that LyCORIS leaves in some names."""
        path = FIXTURES / self.path
        tensors = load_file((path if path.is_dir() else path.parent) / file)
        return {key.replace("conv.conv", "conv"): t for key, t in tensors.items()}


def kohya_hints() -> li.Hints:
    base = load_file(FIXTURES / "kohya_lycoris" / "base.safetensors")
    return li.Hints(component="unet", model=module_tree({key: tuple(t.shape) for key, t in base.items()}))


MERGED, DELTA = "expected_merged.safetensors", "expected_delta.safetensors"
FIXTURE_FILES = {
    "torchtune": Fixture(
        path="torchtune", expected="expected_peft_adapter_model.safetensors", hints=li.Hints(alpha=6, heads=(4, 2))
    ),
    "mlx": Fixture(path="mlx_lora", expected=MERGED, base="base.safetensors"),
    "adapterhub, bert": Fixture(path="adapterhub_bert", expected=DELTA),
    "adapterhub, gpt2": Fixture(
        path="adapterhub_gpt2", expected=DELTA, transposed=("c_attn.weight", "c_fc.weight", "c_proj.weight")
    ),
    "kohya": Fixture(
        path="kohya_lycoris/lora.safetensors", expected=MERGED, base="base.safetensors", hints=kohya_hints(), eps=2**-23
    ),
    "diffusers": Fixture(path="diffusers/pytorch_lora_weights.safetensors", expected=DELTA),
    "gguf": Fixture(path="gguf/lora.gguf", expected="expected_delta_hf.safetensors", hints=li.Hints(heads=(4, 2))),
    "onnx": Fixture(path="onnx_adapter/a.onnx_adapter", expected=DELTA),
    "loralib": Fixture(
        path="loralib/lora.pt",
        expected=MERGED,
        base="base.safetensors",
        hints=LORALIB_HINTS,
        transposed=("mf.weight", "emb.weight"),
    ),
    "litgpt": Fixture(path="litgpt", expected=MERGED, base="base.safetensors", hints=li.Hints(heads=(4, 2))),
}


def fixtures(*names: str):
    """Parametrize a test over fixture files and their formats."""
    cases = [pytest.param(name.partition(",")[0], FIXTURE_FILES[name], id=name) for name in names]
    return pytest.mark.parametrize(("format", "fixture"), cases)


@fixtures(*FIXTURE_FILES)
def test_the_format_is_found_by_content(format, fixture):
    """Each file is recognized without being told its format."""
    assert fixture.read().format == format


@fixtures("mlx", "kohya", "loralib")
def test_merged_weights_are_those_of_the_library(format, fixture):
    """The record, merged by the oracle, gives the weights that the library merged."""
    weights = merged_weights(fixture.read(), fixture.load(fixture.base), fixture.transposed, fixture.eps)
    assert max_error(weights, fixture.load(fixture.expected)) < 1e-5


@fixtures("adapterhub, bert", "adapterhub, gpt2", "diffusers", "gguf", "onnx")
def test_updates_are_those_of_the_library(format, fixture):
    """The record has an update for the same weights as the library, and with the same values."""
    deltas = {f"{name.removesuffix('.weight')}.weight": delta for name, delta in dense_deltas(fixture.read()).items()}
    expected = fixture.load(fixture.expected)
    assert deltas.keys() == expected.keys()
    for name, t in expected.items():
        delta = deltas[name].mT if fixture.transposed and name.endswith(fixture.transposed) else deltas[name]
        assert (delta.reshape(t.shape) - t).abs().max() < 1e-5


def test_torchtunes_factors_are_those_that_it_converts_to_peft():
    """A and B come in transformers' names and order of rows, to the bit."""
    fixture = FIXTURE_FILES["torchtune"]
    factors = {
        f"base_model.model.{s.path}.lora_{half}.weight": getattr(s, half) for s in fixture.read().sites for half in "AB"
    }
    expected = fixture.load(fixture.expected)
    assert factors.keys() == expected.keys()
    assert all(torch.equal(t, factors[key]) for key, t in expected.items())


def test_litgpts_fused_weight_is_split_into_query_key_and_value():
    """The sites have transformers' names; put together again, they give the weights that litgpt merged."""
    fixture = FIXTURE_FILES["litgpt"]
    base, expected = fixture.load(fixture.base), fixture.load(fixture.expected)
    deltas = dense_deltas(li.read(FIXTURES / fixture.path, allow_pickle=True))  # model_config.yaml tells the heads
    layer = "model.layers.0."
    qkv = torch.zeros(32, 16, dtype=torch.float64)  # 16 rows of q, 8 of k, which has no adapter, and 8 of v
    qkv[:16] = deltas.pop(f"{layer}self_attn.q_proj.weight")
    qkv[24:] = deltas.pop(f"{layer}self_attn.v_proj.weight")
    updates = {
        "transformer.h.0.attn.qkv.weight": qkv,
        "transformer.h.0.attn.proj.weight": deltas.pop(f"{layer}self_attn.o_proj.weight"),
        "transformer.h.0.mlp.fc_1.weight": deltas.pop(f"{layer}mlp.gate_proj.weight"),
        "transformer.h.0.mlp.fc_2.weight": deltas.pop(f"{layer}mlp.up_proj.weight"),
        "transformer.h.0.mlp.proj.weight": deltas.pop(f"{layer}mlp.down_proj.weight"),
        "lm_head.weight": deltas.pop("lm_head.weight"),
    }
    assert not deltas
    merged = {name: base[name] + delta for name, delta in updates.items()}
    assert max_error(merged, {name: expected[name] for name in merged}) < 1e-5
    assert all(torch.equal(t, base[name]) for name, t in expected.items() if name not in merged)


@fixtures("kohya", "gguf", "onnx", "loralib", "diffusers")
def test_the_name_of_a_file_does_not_matter(format, fixture, tmp_path):
    """A file with another name, or with the ending of another format, is read as before."""
    for name in ("x", "x.safetensors", "x.bin", "x.gguf"):
        (tmp_path / name).write_bytes((FIXTURES / fixture.path).read_bytes())
        assert is_same_record(li.read(tmp_path / name, allow_pickle=True, hints=fixture.hints), fixture.read())


@fixtures(*(name for name in FIXTURE_FILES if name != "loralib"))
def test_a_file_written_again_has_the_same_record(format, fixture, tmp_path):
    """write(read(x)) is x, for each library's own file. (loralib's has convolutions, which are only read.)"""
    file, path = fixture.read(), tmp_path / f"a{li.FORMATS[format].suffix}"
    li.write(file, path, format=format, hints=fixture.hints)
    again = li.read(path, allow_pickle=True, hints=fixture.hints)
    assert again.format == format
    assert is_same_record(again, file)


# --- each format into each other, on adapters that any of them can hold -----------------------------------------------

# AdapterHub names the base's class in its config, and has a LoRA on some weights only.
LLAMA_FORMATS = [name for name in li.FORMATS if name != "adapterhub"]


def write_and_read(file: li.AdapterFile, format: str, folder: Path) -> li.AdapterFile:
    """Write a record, and read it again with hints for what the format does not hold."""
    path = folder / f"{format}{li.FORMATS[format].suffix}"
    done = li.write(file, path, format=format, hints=LLAMA_HINTS)
    assert done.lost == ()
    first = done.file.sites[0]
    needs_alpha = "alpha" in li.FORMATS[format].asks
    hints = replace(LLAMA_HINTS, alpha=first.scale * first.r) if needs_alpha else LLAMA_HINTS
    return li.read(path, allow_pickle=True, hints=hints)


def have_equal_deltas(file: li.AdapterFile, other: li.AdapterFile) -> bool:
    """True if two records add the same to every weight, up to float32's rounding; an update of zeros counts as none."""
    ours, theirs = ({name: d for name, d in dense_deltas(f).items() if d.any()} for f in (file, other))
    if ours.keys() != theirs.keys():
        return False
    return all(torch.allclose(delta, theirs[name], rtol=1e-5, atol=1e-5) for name, delta in ours.items())


@pytest.mark.parametrize("second", LLAMA_FORMATS)
@pytest.mark.parametrize("first", LLAMA_FORMATS)
def test_conversions_keep_every_update(first, second, tmp_path_factory):
    """Through two formats in a row, every weight's update stays what it was."""

    @settings(max_examples=examples(8))
    @given(records())
    def check(file):
        folder = tmp_path_factory.mktemp("pair")
        assert have_equal_deltas(file, write_and_read(write_and_read(file, first, folder), second, folder / "second"))

    check()


@pytest.mark.parametrize("format", LLAMA_FORMATS)
def test_a_second_conversion_changes_nothing(format, tmp_path_factory):
    """What a format holds is written to the bit: the first conversion may fold scales, the second has nothing to do."""

    @settings(max_examples=examples(16))
    @given(records())
    def check(file):
        folder = tmp_path_factory.mktemp("twice")
        once = write_and_read(file, format, folder)
        assert is_same_record(write_and_read(once, format, folder / "again"), once)

    check()


# --- what a format cannot hold ----------------------------------------------------------------------------------------

NO_PLACE = {
    "torchtune": (
        "plain",
        r"torchtune has no place for:(.*\n)*.*conv2: convolutions\n.*emb: embeddings\n(.*\n)*.*head: a whole tensor",
    ),
    "mlx": ("lora_bias", r"mlx has no place for:\n  - lin: bias updates\n"),
    "litgpt": ("dora", r"litgpt has no place for:\n(.*\n)*.*lin: magnitudes"),
    "loralib": ("tokens", r"loralib has no place for:\n  - emb: rows of trained tokens"),
}


@pytest.mark.parametrize(("format", "case"), NO_PLACE.items(), ids=NO_PLACE)
def test_what_has_no_place_in_a_format_is_refused_by_name(format, case, tmp_path):
    """All of it is listed at once, and nothing is written."""
    variant, message = case
    path = tmp_path / f"a{li.FORMATS[format].suffix}"
    with pytest.raises(li.FileError, match=message):
        li.convert(FIXTURES / f"peft_{variant}", path, format=format, hints=LLAMA_HINTS)
    assert not list(tmp_path.iterdir())


def test_a_lossy_conversion_says_what_it_left_out(tmp_path):
    """The last line tells the share of the update's norm that went with the sites that were left out."""
    done = li.convert(FIXTURES / "peft_plain", tmp_path / "a", format="mlx", lossy=True)
    assert [line for line in done.lost if "left out altogether" in line] == [done.lost[-1]]
    assert "head: a whole tensor" in done.lost
    file = li.read(FIXTURES / "peft_plain")
    norms = {s.path: float((s.scale * s.B.double() @ s.A.double()).norm()) ** 2 for s in file.sites}
    share = ((norms["conv1"] + norms["conv2"]) / sum(norms.values())) ** 0.5
    assert f"2 sites, {share:.2g} of the update's norm" in done.lost[-1]
    assert {s.path for s in li.read(tmp_path / "a").sites} == {"lin", "c1", "emb"}


def test_a_directory_holds_one_adapter_only(tmp_path):
    """A second format in the same directory would be read as a mixture of both."""
    li.convert(FIXTURES / "mlx_lora", tmp_path / "a", format="peft")
    with pytest.raises(li.FileError, match=r"holds another adapter, .*\n  - adapter_model\.safetensors"):
        li.convert(tmp_path / "a", tmp_path / "a", format="mlx")
    assert li.read(tmp_path / "a").format == "peft"
    with pytest.raises(li.FileError, match="peft is a directory"):
        li.convert(FIXTURES / "mlx_lora", tmp_path / "b.safetensors", format="peft")


def test_a_stack_of_experts_becomes_linears_or_mlx_lms_stacks(tmp_path):
    """A format without stacks gets one linear per expert and part; mlx-lm's writer stacks these as its switch_mlp."""
    file = li.read(FIXTURES / "peft_params")
    stacks = [replace(s, path="mlp.experts") for s in file.sites if s.path == "experts"]
    with pytest.raises(li.FileError, match=r"  - mlp\.experts\.gate_up_proj: .* rows are gate and up\n=> .*model="):
        li.write(replace(file, sites=tuple(stacks)), tmp_path / "a", format="mlx")
    half = next(s.B.shape[1] // 2 for s in stacks if s.parameter == "gate_up_proj")
    parts = {"gate": (range(half),), "up": (range(half, 2 * half),)}
    sites = [replace(s, parts=parts) if s.parameter == "gate_up_proj" else s for s in stacks]
    stack = replace(file, sites=tuple(sites))
    done = li.write(stack, tmp_path / "a", format="mlx")
    assert "mlp.experts.3.up_proj" in {s.path for s in done.file.sites}
    keys = load_file(tmp_path / "a" / "adapters.safetensors").keys()
    assert {key for key in keys if "up" in key} == {f"mlp.switch_mlp.up_proj.lora_{half}" for half in "ab"}


OTHER_METHODS = {
    "LoHa": "lora_unet_a.hada_w1_a",
    "LoKr": "lora_unet_a.lokr_w1",
    "OFT": "lora_unet_a.oft_blocks",
    "GLoRA": "lora_unet_a.a1.weight",
    "IA3": "lora_unet_a.on_input",
    "a full difference": "lora_unet_a.diff",
    "trained norms": "lora_unet_a.w_norm",
    "VeRA": "base_model.model.a.vera_lambda_b",
}


@pytest.mark.parametrize(("method", "key"), OTHER_METHODS.items())
def test_other_methods_are_refused_by_name(method, key, tmp_path):
    """The error names the method, instead of an unknown key."""
    save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(li.FileError, match=f"{method}.*, which is no pair of low-rank factors"):
        li.read(tmp_path / "x.safetensors")


def test_every_row_of_the_table_of_formats_is_complete():
    """Each names its library, and only features and rules of scaling that exist; a misspelled format is refused."""
    from lorainject.files.format import FEATURES

    for name, form in li.FORMATS.items():
        assert form.name == name
        assert form.library
        assert form.holds <= {*FEATURES, "whole tensors", "tokens"}
        assert form.scales in ("site", "alpha", "one", "none")
    with pytest.raises(li.SpecError, match="there is no format 'peftt'"):
        li.convert("x", "y", format="peftt")
