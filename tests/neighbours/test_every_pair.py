"""Every format into every format; where the target's library is installed, the library itself reads the result."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorainject as li

from adapter_files import LLAMA, LLAMA_HINTS, LLAMA_SHAPES, plain_gguf
from oracle import FIXTURES, dense_deltas

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries

Deltas = Mapping[str, Tensor]


NOT_IN_ADAPTERS = ("self_attn.o_proj", "mlp.gate_proj")
"""The layers of LLAMA_SHAPES on which `adapters` has no LoRA."""


def llama_record(formats: Collection[str] = ()) -> li.AdapterFile:
    """Return a record on one layer of a small Llama, with ranks and scales that differ, for files of these formats."""
    g = torch.Generator().manual_seed(0)
    sites = []
    for i, (leaf, (out, in_)) in enumerate(LLAMA_SHAPES.items()):
        A, B = torch.randn(2 + i % 2, in_, generator=g), torch.randn(out, 2 + i % 2, generator=g)
        if "adapterhub" not in formats or leaf not in NOT_IN_ADAPTERS:
            sites.append(li.StoredSite(path=f"model.layers.1.{leaf}", A=A, B=B, alpha=3.0 + i % 3))
    return li.AdapterFile(path=Path("made"), format="lorainject", sites=tuple(sites))


def changes(model: nn.Module, base: nn.Module) -> Deltas:
    """Return what was added to each weight, but for weights that did not change."""
    before = base.state_dict()
    added = {key: (t - before[key]).double() for key, t in model.state_dict().items()}
    return {key: t for key, t in added.items() if t.any()}


def by_peft(path: Path, alpha: float) -> Deltas:
    from peft import PeftModel

    return changes(PeftModel.from_pretrained(copy.deepcopy(LLAMA), str(path)).merge_and_unload(), LLAMA)


def by_diffusers(path: Path, alpha: float) -> Deltas:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.peft import PeftAdapterMixin

    class Tree(diffusers.ModelMixin, diffusers.ConfigMixin, PeftAdapterMixin):
        """The same modules, as a model of diffusers."""

    model = Tree()
    model.model = copy.deepcopy(LLAMA.model)
    model.load_lora_adapter(str(path), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    model.fuse_lora()
    model.unload_lora()
    return changes(model, LLAMA)


def by_onnxruntime(path: Path, alpha: float) -> Deltas:
    onnxruntime = pytest.importorskip("onnxruntime")
    parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    t = {key: torch.from_numpy(value.numpy()).double() for key, value in parameters.items()}
    return {key.replace("lora_A.", ""): (A @ t[key.replace("_A", "_B")]).mT for key, A in t.items() if "lora_A" in key}


def by_loralib(path: Path, alpha: float) -> Deltas:
    loralib = pytest.importorskip("loralib")
    tensors, deltas = torch.load(path, weights_only=True), {}
    for key in [key for key in tensors if key.endswith(".lora_A")]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        layer = loralib.Linear(A.shape[1], B.shape[0], r=len(A), lora_alpha=alpha)
        layer.weight.data.zero_()
        layer.load_state_dict({"lora_A": A, "lora_B": B}, strict=False)
        layer.eval()  # which merges
        deltas[key.replace("lora_A", "weight")] = layer.weight.detach().double()
    return deltas


LIBRARIES: dict[str, Callable[[Path, float], Deltas]] = {
    "lorainject": by_peft,
    "peft": by_peft,
    "diffusers": by_diffusers,
    "gguf": lambda path, alpha: plain_gguf(path),
    "onnx": by_onnxruntime,
    "loralib": by_loralib,
}
"""Who reads a format here. docs/formats.md has the same table; the other formats are read by our reader."""


def read(path: Path, format: str, alpha: float) -> li.AdapterFile:
    """Read a file, with hints for what its format does not hold."""
    hints = replace(LLAMA_HINTS, **({"alpha": alpha} if "alpha" in li.FORMATS[format].asks else {}))
    return li.read(path, format=format, allow_pickle=True, hints=hints)


def write(file: li.AdapterFile, path: Path, format: str) -> tuple[Path, float]:
    """Write a file, and return its path and alpha. AdapterHub's config names the class of the base."""
    hints = replace(LLAMA_HINTS, model=model()) if format == "adapterhub" else LLAMA_HINTS
    done = li.write(file, path.with_suffix(li.FORMATS[format].suffix), format=format, hints=hints)
    first = done.file.sites[0]
    return done.path, first.scale * first.r


@functools.cache
def model() -> nn.Module:
    """Return a model of transformers with the layers of the records."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
                                        num_attention_heads=4, num_key_value_heads=2, head_dim=4))  # fmt: skip


def require_equal(found: Deltas, expected: Deltas) -> None:
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        assert torch.allclose(found[key].double(), delta, rtol=1e-5, atol=1e-5), key


@pytest.mark.parametrize("target", li.FORMATS)
@pytest.mark.parametrize("source", li.FORMATS)
def test_every_pair_of_formats(source, target, tmp_path):
    """What is read from one format and written in another is what the other format's library reads."""
    file = llama_record((source, target))
    path, alpha = write(file, tmp_path / "first", source)
    path, alpha = write(read(path, source, alpha), tmp_path / "second", target)
    found = LIBRARIES[target](path, alpha) if target in LIBRARIES else dense_deltas(read(path, target, alpha))
    require_equal(found, dense_deltas(file))


def test_adapterhub_needs_a_model_and_layers_that_adapters_has(tmp_path):
    """AdapterHub's config names the class of the base, and `adapters` has no LoRA on o_proj and gate_proj."""
    with pytest.raises(li.FileError, match=r"(?s)o_proj.*gate_proj.*hints=Hints\(model=") as e:
        li.write(llama_record(), tmp_path / "a", format="adapterhub")
    assert len(e.value.problems) == 3


BERT_REFUSED = {"gguf": "architecture", "torchtune": "no weight of this name", "litgpt": "no weight of this name"}


@pytest.mark.parametrize("target", [name for name in li.FORMATS if name != "adapterhub"])
def test_adapterhub_into_every_format(target, tmp_path):
    """A BERT's adapter of AdapterHub; formats that have names for Llama's modules alone refuse it."""
    file = li.read(FIXTURES / "adapterhub_bert", allow_pickle=True)
    path = tmp_path / f"a{li.FORMATS[target].suffix}"
    hints = replace(LLAMA_HINTS, model=None, architecture="bert")
    if target in BERT_REFUSED:
        with pytest.raises(li.FileError, match=BERT_REFUSED[target]):
            li.write(file, path, format=target, hints=hints)
        assert not path.exists()
        return
    done = li.write(file, path, format=target, hints=hints)
    assert done.lost == ()
    assert len(done.file.sites) == len(file.sites)
