"""Small real architectures, built from configs, with an input for each; and bit-by-bit comparison of models."""

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
    """How to build a tiny model of one architecture, and what to feed it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    """Layers of every kind that the model has, the embedding included."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def ids(vocab: int = 99, rows: int = 2, length: int = 7) -> Tensor:
    """Return token ids, shape (rows, length), the same ones each time."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    """Return Gaussian noise, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


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

    config = Qwen3Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return BertModel(config).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return ViTModel(config).eval()


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        tie_word_embeddings=False,
    )
    return WhisperForConditionalGeneration(config).eval()


def _text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def _two_texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(length=5)}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 16, 16)}


def _sound() -> dict[str, Tensor]:
    return {"input_features": noise(2, 8, 32), "decoder_input_ids": ids(length=5)}


TINY = {
    "llama": Tiny(llama, _text, ("q_proj", "v_proj", "down_proj", "embed_tokens")),
    "qwen3": Tiny(qwen3, _text, ("q_proj", "v_proj", "gate_proj", "embed_tokens")),
    "gpt2": Tiny(gpt2, _text, ("c_attn", "c_proj", "wte")),
    "bert": Tiny(bert, _text, ("query", "value", "output.dense", "word_embeddings")),
    "t5": Tiny(t5, _two_texts, ("q", "v", "wi_0", "wo")),
    "vit": Tiny(vit, _image, ("q_proj", "v_proj", "fc1")),
    "whisper": Tiny(whisper, _sound, ("q_proj", "v_proj", "fc1", "embed_tokens")),
}


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the model's main output. Floating inputs are cast to the dtype of the model."""
    on_device = (p for p in model.parameters() if not p.is_meta)
    p = next(on_device, torch.empty(0))  # a model that is offloaded as a whole has only meta tensors
    inputs = {
        name: value.to(p.device, p.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@torch.no_grad()
def randomize(model: nn.Module, name: str = "default", std: float = 0.1, seed: int = 0) -> None:
    """Give an adapter random values, as if it were trained: B is zero after inject."""
    g = torch.Generator().manual_seed(seed)
    for path, p in model.named_parameters():
        if re.search(rf"\.lora[^.]*\.{name}\.", f".{path}"):
            p.copy_(torch.randn(p.shape, generator=g) * std)


def state(model: nn.Module) -> dict[str, object]:
    """Return everything that eject must give back, by module path.

    That is: types, keys of `__dict__`, names of children and parameters in their order, flags, and the bits of values.
    """

    def describe(t: Tensor | None) -> object:
        return None if t is None else (t.requires_grad, t.dtype, t.shape, bits(t))

    return {
        path: (
            type(m),
            list(m.__dict__),
            list(m._modules),
            m.training,
            [(name, describe(t)) for name, t in {**m._parameters, **m._buffers}.items()],
        )
        for path, m in model.named_modules()
    }


def mapped() -> int:
    """Return the KiB of deleted files that are mapped by this process and in memory."""
    is_deleted, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_deleted = line.endswith("(deleted)")
        elif is_deleted and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def bits(t: Tensor) -> bytes | str:
    """Return the tensor's bytes: 0.0 and -0.0 differ, and NaN equals itself."""
    return "meta" if t.is_meta else t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def weight_at(model: nn.Module, name: str) -> nn.Parameter:
    """Return the weight that a plan or a report names: the path of a layer, or of a parameter."""
    path, _, last = name.rpartition(".")
    parameters = model.get_submodule(path)._parameters
    return parameters[last] if last in parameters else model.get_submodule(name).weight
