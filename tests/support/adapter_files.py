"""Adapter files for tests of formats: loralib's fixture with its hints, and random records that any format can hold."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import nn

import lorainject as li
from lorainject.files.transforms import halves_from_pairs

from oracle import module_tree


class LoralibBase(nn.Module):
    """The base model of loralib's fixture."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.lin, self.m101, self.m111, self.mf = nn.Linear(5, 4), nn.Linear(5, 12), nn.Linear(5, 12), Conv1D(12, 5)
        self.conv, self.emb, self.head = nn.Conv2d(3, 4, 3), nn.Embedding(7, 4), nn.Linear(4, 2)


LORALIB_HINTS = li.Hints(
    alpha=6, groups={"m101": [True, False, True], "m111": [True] * 3, "mf": [True, False, True]}, model=LoralibBase()
)

# The weights of one layer of a small Llama, (out_features, in_features) each.
LLAMA_SHAPES = {
    "self_attn.q_proj": (16, 8),
    "self_attn.k_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
    "self_attn.o_proj": (8, 16),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
LLAMA = module_tree({f"model.layers.{i}.{leaf}.weight": LLAMA_SHAPES[leaf] for i in range(3) for leaf in LLAMA_SHAPES})
LLAMA_HINTS = li.Hints(heads=(4, 2), architecture="llama", component="unet", model=LLAMA)


def plain_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Return the updates that llama.cpp reads, which has the rows of q and k in rotary pairs."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    if any(t.dtype == torch.uint8 for t in tensors.values()):
        tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    updates = {}
    for key, A in tensors.items():
        if key.endswith(".lora_a"):
            _, layer, leaf, *_ = key.split(".")
            B = tensors[key.replace(".lora_a", ".lora_b")].double()
            B = B[halves_from_pairs(len(B), {"attn_q": 4, "attn_k": 2}[leaf])] if leaf in ("attn_q", "attn_k") else B
            updates[f"model.layers.{layer}.{names[leaf]}.weight"] = alpha / B.shape[1] * (B @ A.double())
    return updates


@st.composite
def records(draw: st.DrawFn) -> li.AdapterFile:
    """Draw a record of some linears of the small Llama; in half of the records, each has its own rank and scale."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    names = st.tuples(st.integers(0, 2), st.sampled_from(sorted(LLAMA_SHAPES)))
    chosen = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    even = draw(st.booleans())
    r, alpha, scaling = 2, 6.0, "standard"
    sites = []
    for layer, leaf in chosen:
        out_features, in_features = LLAMA_SHAPES[leaf]
        if not even:
            r = draw(st.integers(1, 4))
            alpha = draw(st.sampled_from([1.0, 3.0, 16.0]))
            scaling = draw(st.sampled_from(["standard", "rslora"]))
        A = torch.randn(r, in_features, generator=g).to(dtype)
        B = torch.randn(out_features, r, generator=g).to(dtype)
        sites.append(li.StoredSite(path=f"model.layers.{layer}.{leaf}", A=A, B=B, alpha=alpha, scaling=scaling))
    return li.AdapterFile(path=Path("drawn"), format="lorainject", sites=tuple(sites))
