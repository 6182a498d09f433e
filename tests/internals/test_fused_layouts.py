"""Every layout is asked of the model itself: each row of the fused weight is moved, alone, and what follows says whose row it is.

The direction of the move is such that one token only feels it. Then, with an output projection that passes everything on:
a row of q moves this token's output, in all channels of the head; of k, all tokens that see this one, in all channels; of v, all
tokens, in one channel; of a gate, this token in one channel. For gate and up: the output is linear in up, and not in gate. So the
model names each row, without our knowing how it computes, and a table with two parts swapped could not agree with it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorainject.targets.fused_layouts import TABLE, Layout, class_name, fused_parts

transformers = pytest.importorskip("transformers")
TOKENS, WIDTH, MOVED = (
    5,
    16,
    1,
)  # the middle token sees an earlier one and is seen by a later one, where attention is causal
OUTPUTS = ("c_proj", "dense", "out_proj", "o_proj", "proj", "projection", "to_out", "Wo")


@dataclass(frozen=True)
class Case:
    """One class with a small config, and how to call it."""

    owner: str
    """package.Class, as in the table."""
    leaf: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_class: str = ""
    """Default: the class's own package's <Model>Config."""
    make: Callable[..., nn.Module] = lambda cls, config: cls(config)
    call: Callable[[nn.Module, Tensor], Any] = lambda owner, x: call(owner, x)
    prepare: Callable[[Any], None] = lambda owner: None
    shared: int = 1
    """Query heads that share a key-value head: so many channels a row of v moves."""
    dtype: torch.dtype = torch.float64
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.owner}.{self.leaf}{self.note and '-' + self.note}"


class Plain(nn.Module):
    """A gated norm, without the norm."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x if gate is None else x * torch.tanh(gate)


def rotation(owner: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    dim = getattr(owner, "qk_rope_head_dim", None) or getattr(owner, "rotary_ndims", None) or owner.head_dim
    angles = torch.linspace(0.1, 1, TOKENS * dim).view(*shape, -1).double()
    return angles.cos(), angles.sin()


def call(owner: nn.Module, x: Tensor, **more: Any) -> Any:
    """The owner's forward on x (tokens, width), with what else its signature asks for."""
    names = inspect.signature(owner.forward).parameters
    packed = "cu_seqlens" in names  # vision towers of the Qwen-VL kind: no batch
    known = {
        "attention_mask": None,
        "layer_past": None,
        "past_key_values": None,
        "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
        "position_ids": torch.arange(TOKENS)[None],
        "residual": torch.zeros(1, TOKENS, x.shape[1], dtype=x.dtype),
    }
    given = {name: value for name, value in known.items() if name in names} | more
    if "position_embeddings" in names and "position_embeddings" not in more:
        given["position_embeddings"] = rotation(owner, (TOKENS,) if packed else (1, TOKENS))
    return owner(x if packed else x[None], **given)


def square(owner: nn.Module, x: Tensor) -> Tensor:
    """On an image of 2 x 2: the first four tokens."""
    return owner(x[:4].view(1, 2, 2, -1))[0].reshape(4, -1)


def experts(owner: nn.Module, x: Tensor) -> Tensor:
    index = torch.arange(TOKENS)[:, None] % 2
    return owner(x, index, torch.ones(TOKENS, 1, dtype=x.dtype))


SMALL = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 20,
    "intermediate_size": 6,
}
GQA = SMALL | {"num_key_value_heads": 2}
GPT2 = {"n_embd": WIDTH, "n_head": 2, "n_layer": 2}
MLA = SMALL | {
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
VISION = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 6}
QWEN_VL = {"embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "depth": 1}
DELTA = SMALL | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 2,
    "head_dim": 4,
    "num_key_value_heads": 2,
}
MOE = SMALL | {
    "num_local_experts": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "n_routed_experts": 2,
    "moe_intermediate_size": 6,
}
MAMBA = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "expand": 1,
    "mamba_expand": 1,
    "state_size": 2,
    "mamba_d_state": 2,
    "num_hidden_layers": 2,
    "time_step_rank": 2,
    "mamba_dt_rank": 2,
}


def indexed(cls: type, config: Any) -> nn.Module:
    return cls(config, layer_idx=0)


def cross(cls: type, config: Any) -> nn.Module:
    return cls(config, is_cross_attention=True, layer_idx=0)


def crossing(owner: nn.Module, x: Tensor) -> Any:
    return call(owner, torch.ones_like(x), encoder_hidden_states=x[None])


def falcon(owner: nn.Module, x: Tensor) -> Any:
    return call(owner, x, alibi=None, attention_mask=torch.zeros(1, 1, TOKENS, TOKENS).double())


def windowed(cls: type, config: Any) -> nn.Module:
    return cls(config, window_size=0)


def conv_off(owner: Any) -> None:
    """Each token through the convolution alone, and no norm after it."""
    owner.conv1d.weight.data.zero_()
    owner.conv1d.weight.data[..., -1] = 1
    owner.norm = Plain()


def straight(owner: Any) -> None:
    """JetMoe's output projection lies in its experts."""
    owner.experts.output_linear.weight.copy_(torch.eye(WIDTH).expand(2, -1, -1))


def sees_all(owner: Any) -> None:
    """An indexer that leaves no token out."""
    owner.indexer = None
    owner.__dict__["indexer"] = lambda *args, **kwargs: torch.arange(TOKENS).expand(1, TOKENS, TOKENS)


def passes(owner: Any) -> None:
    """MiniMax's attention without the norms that mix channels."""
    owner.norm = Plain()


CASES = (
    Case("gpt2.GPT2Attention", "c_attn", GPT2, make=indexed),
    Case("gpt2.GPT2Attention", "c_attn", GPT2, make=cross, call=crossing, note="cross"),
    Case("decision_transformer.DecisionTransformerGPT2Attention", "c_attn", SMALL | {"n_head": 2}, make=indexed),
    Case("imagegpt.ImageGPTAttention", "c_attn", GPT2, make=indexed),
    Case("imagegpt.ImageGPTAttention", "c_attn", GPT2, make=cross, call=crossing, note="cross"),
    Case("openai.Attention", "c_attn", GPT2, "OpenAIGPTConfig", make=lambda cls, c: cls(WIDTH, TOKENS, c, scale=True)),
    Case(
        "gpt_bigcode.GPTBigCodeAttention",
        "c_attn",
        GPT2 | {"multi_query": True},
        make=indexed,
        shared=2,
        note="multi-query",
    ),
    Case("gpt_bigcode.GPTBigCodeAttention", "c_attn", GPT2 | {"multi_query": False}, make=indexed, note="multi-head"),
    Case(
        "bark.BarkSelfAttention",
        "att_proj",
        {"hidden_size": WIDTH, "num_heads": 2, "block_size": TOKENS},
        "BarkSemanticConfig",
    ),
    Case("gpt_neox.GPTNeoXAttention", "query_key_value", SMALL | {"rotary_pct": 1.0}, make=indexed),
    Case("gpt_neox_japanese.GPTNeoXJapaneseAttention", "query_key_value", SMALL, make=indexed),
    Case(
        "bloom.BloomAttention",
        "query_key_value",
        SMALL | {"n_head": 4},
        make=indexed,
        call=lambda o, x: call(
            o, x, alibi=torch.zeros(4, 1, TOKENS).double(), attention_mask=torch.zeros(1, 1, TOKENS, TOKENS).double()
        ),
    ),
    Case("persimmon.PersimmonAttention", "query_key_value", SMALL, make=indexed),
    Case(
        "falcon.FalconAttention",
        "query_key_value",
        GQA | {"num_kv_heads": 2, "new_decoder_architecture": True},
        make=indexed,
        call=falcon,
        shared=2,
        note="40B",
    ),
    Case(
        "falcon.FalconAttention",
        "query_key_value",
        SMALL | {"num_attention_heads": 2, "multi_query": True, "new_decoder_architecture": False},
        make=indexed,
        call=falcon,
        shared=2,
        note="7B",
    ),
    Case(
        "falcon.FalconAttention",
        "query_key_value",
        SMALL | {"multi_query": False, "new_decoder_architecture": False},
        make=indexed,
        call=falcon,
        note="RW",
    ),
    Case(
        "codegen.CodeGenAttention",
        "qkv_proj",
        {"n_embd": WIDTH, "n_head": 8, "rotary_dim": 2, "n_positions": TOKENS},
        make=indexed,
    ),
    Case("phi3.Phi3Attention", "qkv_proj", GQA | {"pad_token_id": 0}, make=indexed, shared=2),
    Case("phi4_multimodal.Phi4MultimodalAttention", "qkv_proj", GQA | {"pad_token_id": 0}, make=indexed, shared=2),
    Case(
        "minimax.MiniMaxLightningAttention",
        "qkv_proj",
        SMALL | {"head_dim": 4, "block_size": 8},
        make=indexed,
        prepare=passes,
    ),
    Case(
        "mpt.MptAttention",
        "Wqkv",
        {"d_model": WIDTH, "n_heads": 2},
        call=lambda o, x: call(o, x, position_bias=torch.zeros(2, TOKENS, TOKENS).double()),
    ),
    Case("modernbert.ModernBertAttention", "Wqkv", SMALL | {"pad_token_id": 0}, make=indexed),
    Case(
        "dbrx.DbrxAttention",
        "Wqkv",
        {"d_model": WIDTH, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e9, "rope_theta": 1e4}},
        make=indexed,
        shared=2,
    ),
    Case(
        "deberta.DisentangledSelfAttention",
        "in_proj",
        SMALL | {"pos_att_type": None, "relative_attention": False, "talking_head": False},
        call=lambda o, x: o(x[None], torch.ones(1, 1, TOKENS, TOKENS)),
    ),
    Case("esm.EsmFoldSelfAttention", "proj", {}, make=lambda cls, c: cls(WIDTH, 4, 4)),
    Case(
        "layoutlmv2.LayoutLMv2SelfAttention",
        "qkv_linear",
        SMALL | {"fast_qkv": True, "has_relative_attention_bias": False, "has_spatial_attention_bias": False},
        call=lambda o, x: o(x[None], torch.zeros(1, 1, TOKENS, TOKENS)),
        dtype=torch.float32,
    ),
    Case(
        "torch.nn.modules.activation.MultiheadAttention",
        "in_proj_weight",
        make=lambda cls, c: cls(WIDTH, 2),
        call=lambda o, x: o(x, x, x),
    ),
    Case("blip.BlipAttention", "qkv", VISION, "BlipVisionConfig"),
    Case("blip_2.Blip2Attention", "qkv", VISION, "Blip2VisionConfig"),
    Case("qwen2_vl.VisionAttention", "qkv", QWEN_VL, "Qwen2VLVisionConfig"),
    Case("qwen2_5_vl.Qwen2_5_VLVisionAttention", "qkv", QWEN_VL, "Qwen2_5_VLVisionConfig"),
    Case("qwen3_vl.Qwen3VLVisionAttention", "qkv", QWEN_VL, "Qwen3VLVisionConfig"),
    Case("glm4v.Glm4vVisionAttention", "qkv", QWEN_VL, "Glm4vVisionConfig"),
    Case(
        "sam.SamVisionAttention", "qkv", VISION | {"use_rel_pos": False}, "SamVisionConfig", make=windowed, call=square
    ),
    Case(
        "sam.SamVisionSdpaAttention",
        "qkv",
        VISION | {"use_rel_pos": False},
        "SamVisionConfig",
        make=windowed,
        call=square,
    ),
    Case(
        "got_ocr2.GotOcr2VisionAttention",
        "qkv",
        VISION | {"use_rel_pos": False},
        "GotOcr2VisionConfig",
        make=windowed,
        call=square,
    ),
    Case(
        "seggpt.SegGptAttention",
        "qkv",
        VISION | {"use_relative_position_embeddings": False, "image_size": [32, 32], "patch_size": 16},
        call=square,
    ),
    Case(
        "sam2.Sam2MultiScaleAttention",
        "qkv",
        {"num_attention_heads": 2},
        "Sam2HieraDetConfig",
        make=lambda cls, c: cls(c, WIDTH, WIDTH, 2),
        call=square,
    ),
    Case("vitdet.VitDetAttention", "qkv", VISION | {"use_relative_position_embeddings": False}, call=square),
    Case("timesformer.TimesformerSelfAttention", "qkv", SMALL),
    Case("mgp_str.MgpstrAttention", "qkv", SMALL),
    Case("hiera.HieraMaskUnitAttention", "qkv", {}, make=lambda cls, c: cls(WIDTH, WIDTH, 2)),
    Case(
        "florence2.Florence2VisionWindowAttention",
        "qkv",
        {"embed_dim": (WIDTH,), "num_heads": (2,), "num_groups": (2,), "window_size": 2},
        "Florence2VisionConfig",
        make=lambda cls, c: cls(c, 0),
        call=lambda o, x: o(x[:4].view(1, 2, 2, -1)).reshape(4, -1),
    ),
    # Its channels attend to each other, over the tokens: the roles of token and channel change places, in the rows of q and of v alike.
    Case(
        "florence2.Florence2VisionChannelAttention",
        "qkv",
        {"embed_dim": (WIDTH,), "num_heads": (2,), "num_groups": (2,)},
        "Florence2VisionConfig",
        make=lambda cls, c: cls(c, 0),
        call=lambda o, x: o(x[None])[0].T,
    ),
    Case("pp_ocrv5_server_rec.PPOCRV5ServerRecAttention", "qkv", {"hidden_size": WIDTH, "num_attention_heads": 2}),
    Case(
        "exaone4_5.Exaone4_5_VisionAttention",
        "qkv",
        QWEN_VL | {"num_heads": 4, "num_key_value_heads": 2},
        "Exaone4_5_VisionConfig",
        shared=2,
    ),
    Case("qwen3_5.Qwen3_5GatedDeltaNet", "in_proj_qkv", DELTA, "Qwen3_5TextConfig", make=indexed, prepare=conv_off),
    Case("qwen3_next.Qwen3NextGatedDeltaNet", "in_proj_qkvz", DELTA, make=indexed, prepare=conv_off),
    Case("qwen3_next.Qwen3NextAttention", "q_proj", DELTA, make=indexed),
    Case("qwen3_5.Qwen3_5Attention", "q_proj", DELTA, "Qwen3_5TextConfig", make=indexed),
    Case(
        "axk2.AXK2Attention",
        "q_gate_proj",
        MLA,
        make=indexed,
        prepare=sees_all,
        call=lambda o, x: call(o, x, attention_mask=torch.zeros(1, 1, TOKENS, TOKENS).double()),
    ),
    Case(
        "jetmoe.JetMoeAttention",
        "kv_proj",
        SMALL | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
        make=indexed,
        prepare=straight,
    ),
    Case(
        "granite_speech.GraniteSpeechConformerAttention",
        "to_kv",
        {"hidden_dim": WIDTH, "num_heads": 2, "dim_head": 4, "context_size": TOKENS, "max_pos_emb": 9},
        "GraniteSpeechEncoderConfig",
        call=lambda o, x: o(x[None], torch.zeros(TOKENS, TOKENS, dtype=torch.long)),
    ),
    Case(
        "evolla.EvollaSequenceCompressorAttention",
        "to_kv",
        {},
        make=lambda cls, c: cls(WIDTH, 4, 2),
        call=lambda o, x: o(x[None, :3], x[None, 3:], torch.ones(1, TOKENS)),
    ),
    Case(
        "deepseek_v2.DeepseekV2Attention",
        "kv_b_proj",
        MLA,
        make=indexed,
        call=lambda o, x: call(
            o,
            x,
            position_embeddings=torch.polar(
                torch.ones(1, TOKENS, 1).double(), torch.linspace(0, 1, TOKENS).double().view(1, -1, 1)
            ),
        ),
    ),
    Case("deepseek_v3.DeepseekV3Attention", "kv_b_proj", MLA, make=indexed),
    Case("minicpm3.MiniCPM3Attention", "kv_b_proj", MLA, make=indexed),
    Case("longcat_flash.LongcatFlashMLA", "kv_b_proj", MLA, make=indexed),
    Case("phi3.Phi3MLP", "gate_up_proj", SMALL | {"pad_token_id": 0}),
    Case("glm.GlmMLP", "gate_up_proj", SMALL | {"pad_token_id": 0}),
    Case("dia.DiaMLP", "gate_up_proj", SMALL, "DiaEncoderConfig"),
    Case("esmfold2.EsmFold2SwiGLU", "gate_up_proj", {}, make=lambda cls, c: cls(WIDTH, 6)),
    Case(
        "zamba2.Zamba2MLP",
        "gate_up_proj",
        {"hidden_size": WIDTH, "intermediate_size": 6, "adapter_rank": 2},
        make=lambda cls, c: cls(c, 1, 0),
        call=lambda o, x: o(x, next(iter(o.layer_dic))),
    ),
    Case("phi4_multimodal.Phi4MultimodalAudioMLP", "gate_up_proj", SMALL, "Phi4MultimodalAudioConfig"),
    Case("mixtral.MixtralExperts", "gate_up_proj", MOE, call=experts),
    Case("qwen3_moe.Qwen3MoeExperts", "gate_up_proj", MOE, call=experts),
    Case("deepseek_v3.DeepseekV3Experts", "gate_up_proj", MOE, call=experts),
    Case("granitemoe.GraniteMoeExperts", "gate_up_proj", MOE, call=experts),
    Case("minimax_m3_vl.MiniMaxM3VLExperts", "gate_up_proj", MOE, "MiniMaxM3VLTextConfig", call=experts),
    Case("openai_privacy_filter.OpenAIPrivacyFilterExperts", "gate_up_proj", MOE, call=experts),
    Case("aria.AriaExperts", "gate_up_proj", MOE | {"moe_num_experts": 2}, "AriaTextConfig", call=experts),
    Case("llama4.Llama4TextExperts", "gate_up_proj", MOE, "Llama4TextConfig", call=lambda o, x: o(x[:4])),
    Case("gpt_oss.GptOssExperts", "gate_up_proj", MOE, call=experts),
    Case("granitemoeshared.GraniteMoeSharedMLP", "input_linear", SMALL | {"shared_intermediate_size": 6}),
    Case(
        "granitemoehybrid.GraniteMoeHybridMLP",
        "input_linear",
        SMALL | {"shared_intermediate_size": 6, "mamba_n_heads": 4},
    ),
    Case(
        "jetmoe.JetMoeMoE",
        "input_linear",
        SMALL | {"num_local_experts": 2, "num_experts_per_tok": 2},
        call=lambda o, x: o(x[None]),
    ),
    Case("modernbert.ModernBertMLP", "Wi", SMALL | {"pad_token_id": 0}),
    Case("moonshine.MoonshineDecoderMLP", "fc1", SMALL, make=lambda cls, c: cls(c, "silu")),
    Case("moshi.MoshiGatingMLP", "fc1", {"hidden_size": WIDTH, "ffn_dim": 12}, call=lambda o, x: o(x[None])),
    Case("clvp.ClvpGatedLinearUnit", "proj", SMALL, "ClvpEncoderConfig"),
    Case(
        "cohere2_vision.Cohere2VisionMultiModalProjector",
        "linear_1",
        {
            "text_config": {"model_type": "cohere2", "hidden_size": 6},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": WIDTH},
            "downsample_factor": 1,
            "alignment_intermediate_size": 12,
        },
        call=lambda o, x: o(x[None, :4]),
    ),
    Case("mamba.MambaMixer", "in_proj", MAMBA, make=indexed),
    Case(
        "falcon_mamba.FalconMambaMixer", "in_proj", MAMBA, make=lambda cls, c: cls(c, 0, initialize_mixer_weights=False)
    ),
    Case("jamba.JambaMambaMixer", "in_proj", MAMBA, make=indexed),
    Case(
        "zamba.ZambaMambaMixer",
        "in_proj",
        {k: v for k, v in MAMBA.items() if k != "num_hidden_layers"} | {"n_mamba_heads": 2},
        make=indexed,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_model_itself_agrees_row_by_row(case: Case) -> None:
    owner = build(case)
    observed = observe(owner, case)
    table = fused_parts(None, owner, case.leaf, len(observed))
    assert table is not None
    assert labels(table, len(observed)) == observed
    for a, b in combinations(table, 2):  # and it would not have agreed with these
        assert labels(table | {a: table[b], b: table[a]}, len(observed)) != observed


def build(case: Case) -> nn.Module:
    """In double precision, with random weights, and an output projection that changes nothing."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cls = find_class(case.owner)
    owner = case.make(cls, config_of(cls, case)).to(case.dtype).eval()
    for name, p in sorted(owner.named_parameters()):
        p.requires_grad_(False)
        p.copy_(torch.randn(p.shape) * (0.5 if p.ndim > 1 else 0.1) + ("norm" in name and p.ndim == 1))
    for name in OUTPUTS:
        layer = getattr(owner, name, None)
        for part in layer.modules() if name != case.leaf and isinstance(layer, nn.Module) else ():
            if getattr(part, "weight", None) is not None:
                nn.init.eye_(part.weight)
    case.prepare(owner)
    return owner


def observe(owner: nn.Module, case: Case) -> list[str]:
    """What each row of the fused weight turns out to be."""
    held = getattr(owner, case.leaf)
    weight = held.weight if isinstance(held, nn.Module) else held
    seen: list[Tensor] = []
    hook = held.register_forward_pre_hook(lambda m, args: seen.append(args[0])) if isinstance(held, nn.Module) else None
    x = torch.randn(TOKENS, WIDTH, dtype=case.dtype)
    with torch.no_grad():
        base = output(case, owner, x)
        if hook is not None:
            hook.remove()
        feels = seen[0].reshape(-1, seen[0].shape[-1]) if seen and weight.ndim == 2 else x
        direction = torch.linalg.pinv(feels)[:, MOVED]  # orthogonal to what all other tokens bring
        return [_name(case, _moved(case, owner, x, base, row, direction)) for row in row_views(owner, case, weight)]


def row_views(owner: nn.Module, case: Case, weight: Tensor) -> list[Tensor]:
    """Row after row of W (out, in) as a view into the weight as it is stored, of all experts at once."""
    transposed = type(getattr(owner, case.leaf)).__name__ == "Conv1D" or "transposed" in stored(case)
    matrix = weight.transpose(-1, -2) if transposed else weight
    return [matrix[..., r, :] for r in range(matrix.shape[-2])]


def stored(case: Case) -> str:
    return "transposed" if case.owner.split(".")[0] in ("aria", "llama4", "openai_privacy_filter", "gpt_oss") else ""


def _moved(
    case: Case, owner: nn.Module, x: Tensor, base: Tensor, row: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much the output moves, and by how much more than twice this when the row moves twice as far."""
    kept = row.clone()
    row += direction
    once = output(case, owner, x) - base
    row += direction
    twice = output(case, owner, x) - base
    row.copy_(kept)
    return once, twice - 2 * once


def output(case: Case, owner: nn.Module, x: Tensor) -> Tensor:
    y = case.call(owner, x)
    y = y[0] if isinstance(y, tuple | list) else y
    return y.reshape(-1, y.shape[-1]).clone()


def _name(case: Case, moved: tuple[Tensor, Tensor]) -> str:
    once, bend = moved
    felt = once.abs() > (1e-6 if case.dtype == torch.float64 else 1e-4) * once.abs().max().clamp(min=1e-3)
    assert felt.any(), "this row does nothing"
    if case.leaf in ("gate_up_proj", "input_linear", "Wi", "fc1", "linear_1") or case.owner.startswith("clvp"):
        return "up" if bend.abs().max() < 1e-3 * once.abs().max() else "gate"
    one_token = int(felt.any(1).sum()) == 1
    one_channel = int(felt.any(0).sum()) == (1 if one_token else case.shared)
    if "mamba" in case.owner.lower() or case.owner.startswith("jamba"):
        return "z" if one_token else "x"
    gate = "g" if case.leaf.startswith("q_") else "z"
    return {(True, False): "q", (False, False): "k", (False, True): "v", (True, True): gate}[one_token, one_channel]


def labels(table: Mapping[str, tuple[range, ...]], out: int) -> list[str]:
    """The name of each row; that the ranges are disjoint and leave none out is checked on the way."""
    rows: dict[int, str] = {}
    for name, ranges in table.items():
        for r in (r for range_ in ranges for r in range_):
            assert r not in rows
            rows[r] = name
    assert sorted(rows) == list(range(out))
    return [rows[r] for r in range(out)]


def find_class(name: str) -> Any:
    package, cls = name.rsplit(".", 1)
    if package.startswith("torch"):
        return getattr(importlib.import_module(package), cls)
    return getattr(importlib.import_module(f"transformers.models.{package}.{source_of(name).stem}"), cls)


def source_of(name: str) -> Path:
    """The modeling file that defines the class."""
    package, cls = name.split(".")
    home = Path(transformers.__file__).parent / "models" / package
    found = [
        f for f in sorted(home.glob("modeling_*.py")) if re.search(rf"^class {cls}\(", f.read_text(), re.MULTILINE)
    ]
    assert len(found) == 1, f"{name} is not there"
    return found[0]


def config_of(cls: type, case: Case) -> Any:
    if not case.config:
        return None
    home = importlib.import_module(f"transformers.models.{case.owner.split('.')[0]}")
    names = [n for n in dir(home) if n.endswith("Config")]
    name = case.config_class or min(names, key=len)
    config = getattr(home, name)(**case.config)
    config._attn_implementation = "eager"
    return config


# The classes that the table names


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.leaf}-{r.classes.split()[0]}")
def test_every_class_in_the_table_exists_and_has_the_leaf(row: Any) -> None:
    for name in row.classes.split():
        if name.startswith("torch"):
            continue
        source = source_of(name).read_text()
        cls = name.split(".")[1]
        body = re.search(rf"^class {cls}\((\w+).*?(?=^class |^@|\Z)", source, re.MULTILINE | re.DOTALL)
        assert body is not None
        if cls.endswith(("SdpaAttention",)):
            assert body[1] in row.classes  # its base class sets the layer up
        else:
            assert re.search(rf"self\.{row.leaf} = ", body[0]), f"{name} has no {row.leaf}"


def test_each_row_is_asked_of_a_model() -> None:
    asked = {(c.leaf, c.owner) for c in CASES}
    left = [
        f"{row.leaf}: {row.classes}"
        for row in TABLE
        if not any((row.leaf, name) in asked for name in row.classes.split())
    ]
    assert left == []


def test_the_experts_all_split_in_halves_gate_first() -> None:
    for row in TABLE:
        if row.leaf == "gate_up_proj" and len(row.classes.split()) > 20:
            for name in row.classes.split():
                source = source_of(name).read_text()
                cls = name.split(".")[1]
                body = re.search(rf"^class {cls}\(.*?(?=^class |^@|\Z)", source, re.MULTILINE | re.DOTALL)
                assert body is not None
                assert re.search(r"gate, up = .*chunk\(2, dim=-1\)", body[0]), name


# What is not known is not guessed


def test_unknown_owners_and_sizes_are_none() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(4, 12)

    mha = nn.MultiheadAttention(WIDTH, 2)
    assert fused_parts(None, Attention(), "c_attn", 12) is None
    assert fused_parts(None, mha, "out_proj", WIDTH) is None
    assert fused_parts(None, mha, "in_proj_weight", 49) is None
    assert fused_parts(None, mha, "in_proj_weight", 0) is None
    assert fused_parts(None, nn.MultiheadAttention(WIDTH, 2, kdim=3), "in_proj_weight", 48) is None


def test_a_subclass_counts_unless_its_forward_is_its_own() -> None:
    class Same(nn.MultiheadAttention):
        pass

    class Other(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert fused_parts(None, Same(WIDTH, 2), "in_proj_weight", 48) == {
        "q": (range(16),),
        "k": (range(16, 32),),
        "v": (range(32, 48),),
    }
    assert fused_parts(None, Other(WIDTH, 2), "in_proj_weight", 48) is None


def test_what_the_owner_does_not_know_its_model_s_config_does() -> None:
    owner = build(next(c for c in CASES if c.owner == "phi3.Phi3Attention"))
    config, owner.config = owner.config, None
    assert fused_parts(None, owner, "qkv_proj", 32) is None
    assert fused_parts(config, owner, "qkv_proj", 32) == {
        "q": (range(16),),
        "k": (range(16, 24),),
        "v": (range(24, 32),),
    }


def test_a_layout_that_does_not_come_out_even_is_none() -> None:
    assert Layout(None, {"gate": 1, "up": 1}).rows(6) == {"gate": (range(0, 6, 2),), "up": (range(1, 6, 2),)}
    assert Layout(None, {"gate": 1, "up": 1}).rows(7) is None
    assert Layout(1, {"q": 4, "k": 2}).rows(12) is None  # would fit twice: but the sizes are meant
    assert Layout(1, {"q": 4, "k": 2}, proportion=True).rows(12) == {"q": (range(8),), "k": (range(8, 12),)}
    assert Layout(2, {"k": 1, "v": 2}).rows(6) == {"k": (range(0, 6, 3),), "v": (range(1, 3), range(4, 6))}
    assert Layout(0, {"k": 1, "v": 1}).rows(6) is None
    assert Layout(1, {"k": 0, "v": 6}).rows(6) is None


def test_names_are_those_of_the_table() -> None:
    assert class_name(nn.MultiheadAttention) == "torch.nn.modules.activation.MultiheadAttention"
    assert class_name(find_class("gpt2.GPT2Attention")) == "gpt2.GPT2Attention"
