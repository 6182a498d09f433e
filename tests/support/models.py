"""Small real architectures, built from configs, with an input for each; and how two models are compared, bit by bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tiny:
    """A tiny model of one architecture and what to feed it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    """Layers of every kind that it has, the embedding included."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def ids(vocab: int = 99, rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, head_dim=8)).eval()  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    ).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=False,
                                               feed_forward_proj="gated-gelu", decoder_start_token_id=0)).eval()  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
        )
    ).eval()


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, tie_word_embeddings=False)).eval()  # fmt: skip


TINY = {
    "llama": Tiny(llama, _text, ("q_proj", "v_proj", "down_proj", "embed_tokens")),
    "qwen3": Tiny(qwen3, _text, ("q_proj", "v_proj", "gate_proj", "embed_tokens")),
    "gpt2": Tiny(gpt2, _text, ("c_attn", "c_proj", "wte")),
    "bert": Tiny(bert, _text, ("query", "value", "output.dense", "word_embeddings")),
    "t5": Tiny(t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(length=5)}, ("q", "v", "wi_0", "wo")),
    "vit": Tiny(
        vit,
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))},
        ("q_proj", "v_proj", "fc1"),
    ),
    "whisper": Tiny(
        whisper,
        lambda: {
            "input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1)),
            "decoder_input_ids": ids(length=5),
        },
        ("q_proj", "v_proj", "fc1", "embed_tokens"),
    ),
}


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's main output; floating inputs follow the model's dtype and device."""
    p = next((p for p in model.parameters() if not p.is_meta), torch.empty(0))  # all of it is meta when offloaded
    inputs = {
        k: v.to(p.device, p.dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@torch.no_grad()
def randomize(model: nn.Module, name: str = "default", std: float = 0.1, seed: int = 0) -> None:
    """Give an adapter values as if it were trained: B is zero after inject."""
    g = torch.Generator().manual_seed(seed)
    for path, p in model.named_parameters():
        if re.search(rf"\.lora[^.]*\.{name}\.", f".{path}"):
            p.copy_(torch.randn(p.shape, generator=g) * std)


def state(model: nn.Module) -> dict[str, object]:
    """Everything that eject must give back: types, __dict__ keys, child and parameter names in order, values, flags."""
    return {
        path: (
            type(m), list(m.__dict__), list(m._modules), m.training,
            [(n, None if p is None else (p.requires_grad, p.dtype, p.shape, bits(p))) for n, p in {**m._parameters, **m._buffers}.items()],
        )
        for path, m in model.named_modules()
    }  # fmt: skip


def mapped() -> int:
    """KiB of temporary files that are mapped in this process and in memory."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.endswith("(deleted)")
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def bits(t: Tensor) -> bytes | str:
    """The tensor's bytes: 0.0 and -0.0 differ, NaN equals itself."""
    return "meta" if t.is_meta else t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def weight_at(model: nn.Module, name: str) -> nn.Parameter:
    """The weight that a plan or a report names: of a layer, or a bare parameter."""
    path, _, last = name.rpartition(".")
    return (
        model.get_submodule(path)._parameters.get(last)
        if last in model.get_submodule(path)._parameters
        else model.get_submodule(name).weight
    )
