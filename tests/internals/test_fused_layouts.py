"""Every layout of TABLE is checked against a real model: each row of the fused weight is moved alone, and the effect on
the output tells which part the row belongs to.

The direction of the move is such that only one token feels it, and the output projection passes everything on. A row of
q then moves the output of this token in all channels of the head; a row of k moves all tokens that see this one, in all
channels; a row of v moves all tokens that see this one, in one channel; a row of a gate on the output moves this token
in one channel. For gate and up: the output is linear in up, and not in gate. So the model itself names each row, and a
table with two parts swapped could not agree with it.
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
TOKENS, WIDTH = 5, 16
MOVED = 1  # a token that sees an earlier one and is seen by later ones, where attention is causal
OUTPUTS = ("c_proj", "dense", "out_proj", "o_proj", "proj", "projection", "to_out", "Wo")


@dataclass(frozen=True)
class Case:
    """A class of the table, a small config for it, and how to build and call it."""

    owner: str
    """The name of the class, as in the table."""
    leaf: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_class: str = ""
    """Name of the config's class; empty for <Model>Config of the same package."""
    make: Callable[..., nn.Module] = lambda cls, config: cls(config)
    call: Callable[[nn.Module, Tensor], Any] = lambda owner, x: call(owner, x)
    prepare: Callable[[Any], None] = lambda owner: None
    shared: int = 1
    """Number of query heads that share a key-value head, which is the number of channels that a row of v moves."""
    dtype: torch.dtype = torch.float64
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.owner}.{self.leaf}{self.note and '-' + self.note}"


class Plain(nn.Module):
    """Stands in for a gated norm: the gate without the norm."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x if gate is None else x * torch.tanh(gate)


def rotation(owner: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of a rotary embedding."""
    dim = getattr(owner, "qk_rope_head_dim", None) or getattr(owner, "rotary_ndims", None) or owner.head_dim
    angles = torch.linspace(0.1, 1, TOKENS * dim).view(*shape, -1).double()
    return angles.cos(), angles.sin()


def call(owner: nn.Module, x: Tensor, **more: Any) -> Any:
    """Call the owner on x (tokens, width), with the other arguments that its signature requires."""
    names = inspect.signature(owner.forward).parameters
    packed = "cu_seqlens" in names  # vision towers of the Qwen-VL kind: no batch
    defaults = {
        "attention_mask": None,
        "layer_past": None,
        "past_key_values": None,
        "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
        "position_ids": torch.arange(TOKENS)[None],
        "residual": torch.zeros(1, TOKENS, x.shape[1], dtype=x.dtype),
    }
    arguments = {name: value for name, value in defaults.items() if name in names} | more
    if "position_embeddings" in names and "position_embeddings" not in more:
        arguments["position_embeddings"] = rotation(owner, (TOKENS,) if packed else (1, TOKENS))
    return owner(x if packed else x[None], **arguments)


def call_on_image(owner: nn.Module, x: Tensor) -> Tensor:
    """Call the owner on the first four tokens, as an image of 2 x 2."""
    return owner(x[:4].view(1, 2, 2, -1))[0].reshape(4, -1)


def call_experts(owner: nn.Module, x: Tensor) -> Tensor:
    """Call stacked experts, with the tokens routed to two of them in turn."""
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


def with_layer_index(cls: type, config: Any) -> nn.Module:
    return cls(config, layer_idx=0)


def as_cross_attention(cls: type, config: Any) -> nn.Module:
    return cls(config, is_cross_attention=True, layer_idx=0)


def call_cross_attention(owner: nn.Module, x: Tensor) -> Any:
    return call(owner, torch.ones_like(x), encoder_hidden_states=x[None])


def call_falcon(owner: nn.Module, x: Tensor) -> Any:
    return call(owner, x, alibi=None, attention_mask=torch.zeros(1, 1, TOKENS, TOKENS).double())


def without_window(cls: type, config: Any) -> nn.Module:
    return cls(config, window_size=0)


def remove_convolution(owner: Any) -> None:
    """Make the convolution pass each token on unchanged, and remove the norm after it."""
    owner.conv1d.weight.data.zero_()
    owner.conv1d.weight.data[..., -1] = 1
    owner.norm = Plain()


def pass_experts_through(owner: Any) -> None:
    """Make JetMoe's output projection, which lies in its experts, the identity."""
    owner.experts.output_linear.weight.copy_(torch.eye(WIDTH).expand(2, -1, -1))


def select_all_tokens(owner: Any) -> None:
    """Replace the indexer by one that leaves no token out."""
    owner.indexer = None
    owner.__dict__["indexer"] = lambda *args, **kwargs: torch.arange(TOKENS).expand(1, TOKENS, TOKENS)


def remove_norm(owner: Any) -> None:
    """Remove the norm of MiniMax's attention, which mixes channels."""
    owner.norm = Plain()


CASES = (
    Case("gpt2.GPT2Attention", "c_attn", GPT2, make=with_layer_index),
    Case("gpt2.GPT2Attention", "c_attn", GPT2, make=as_cross_attention, call=call_cross_attention, note="cross"),
    Case(
        "decision_transformer.DecisionTransformerGPT2Attention", "c_attn", SMALL | {"n_head": 2}, make=with_layer_index
    ),
    Case("imagegpt.ImageGPTAttention", "c_attn", GPT2, make=with_layer_index),
    Case(
        "imagegpt.ImageGPTAttention", "c_attn", GPT2, make=as_cross_attention, call=call_cross_attention, note="cross"
    ),
    Case("openai.Attention", "c_attn", GPT2, "OpenAIGPTConfig", make=lambda cls, c: cls(WIDTH, TOKENS, c, scale=True)),
    Case(
        "gpt_bigcode.GPTBigCodeAttention",
        "c_attn",
        GPT2 | {"multi_query": True},
        make=with_layer_index,
        shared=2,
        note="multi-query",
    ),
    Case(
        "gpt_bigcode.GPTBigCodeAttention",
        "c_attn",
        GPT2 | {"multi_query": False},
        make=with_layer_index,
        note="multi-head",
    ),
    Case(
        "bark.BarkSelfAttention",
        "att_proj",
        {"hidden_size": WIDTH, "num_heads": 2, "block_size": TOKENS},
        "BarkSemanticConfig",
    ),
    Case("gpt_neox.GPTNeoXAttention", "query_key_value", SMALL | {"rotary_pct": 1.0}, make=with_layer_index),
    Case("gpt_neox_japanese.GPTNeoXJapaneseAttention", "query_key_value", SMALL, make=with_layer_index),
    Case(
        "bloom.BloomAttention",
        "query_key_value",
        SMALL | {"n_head": 4},
        make=with_layer_index,
        call=lambda o, x: call(
            o, x, alibi=torch.zeros(4, 1, TOKENS).double(), attention_mask=torch.zeros(1, 1, TOKENS, TOKENS).double()
        ),
    ),
    Case("persimmon.PersimmonAttention", "query_key_value", SMALL, make=with_layer_index),
    Case(
        "falcon.FalconAttention",
        "query_key_value",
        GQA | {"num_kv_heads": 2, "new_decoder_architecture": True},
        make=with_layer_index,
        call=call_falcon,
        shared=2,
        note="40B",
    ),
    Case(
        "falcon.FalconAttention",
        "query_key_value",
        SMALL | {"num_attention_heads": 2, "multi_query": True, "new_decoder_architecture": False},
        make=with_layer_index,
        call=call_falcon,
        shared=2,
        note="7B",
    ),
    Case(
        "falcon.FalconAttention",
        "query_key_value",
        SMALL | {"multi_query": False, "new_decoder_architecture": False},
        make=with_layer_index,
        call=call_falcon,
        note="RW",
    ),
    Case(
        "codegen.CodeGenAttention",
        "qkv_proj",
        {"n_embd": WIDTH, "n_head": 8, "rotary_dim": 2, "n_positions": TOKENS},
        make=with_layer_index,
    ),
    Case("phi3.Phi3Attention", "qkv_proj", GQA | {"pad_token_id": 0}, make=with_layer_index, shared=2),
    Case(
        "phi4_multimodal.Phi4MultimodalAttention",
        "qkv_proj",
        GQA | {"pad_token_id": 0},
        make=with_layer_index,
        shared=2,
    ),
    Case(
        "minimax.MiniMaxLightningAttention",
        "qkv_proj",
        SMALL | {"head_dim": 4, "block_size": 8},
        make=with_layer_index,
        prepare=remove_norm,
    ),
    Case(
        "mpt.MptAttention",
        "Wqkv",
        {"d_model": WIDTH, "n_heads": 2},
        call=lambda o, x: call(o, x, position_bias=torch.zeros(2, TOKENS, TOKENS).double()),
    ),
    Case("modernbert.ModernBertAttention", "Wqkv", SMALL | {"pad_token_id": 0}, make=with_layer_index),
    Case(
        "dbrx.DbrxAttention",
        "Wqkv",
        {"d_model": WIDTH, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e9, "rope_theta": 1e4}},
        make=with_layer_index,
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
        "sam.SamVisionAttention",
        "qkv",
        VISION | {"use_rel_pos": False},
        "SamVisionConfig",
        make=without_window,
        call=call_on_image,
    ),
    Case(
        "sam.SamVisionSdpaAttention",
        "qkv",
        VISION | {"use_rel_pos": False},
        "SamVisionConfig",
        make=without_window,
        call=call_on_image,
    ),
    Case(
        "got_ocr2.GotOcr2VisionAttention",
        "qkv",
        VISION | {"use_rel_pos": False},
        "GotOcr2VisionConfig",
        make=without_window,
        call=call_on_image,
    ),
    Case(
        "seggpt.SegGptAttention",
        "qkv",
        VISION | {"use_relative_position_embeddings": False, "image_size": [32, 32], "patch_size": 16},
        call=call_on_image,
    ),
    Case(
        "sam2.Sam2MultiScaleAttention",
        "qkv",
        {"num_attention_heads": 2},
        "Sam2HieraDetConfig",
        make=lambda cls, c: cls(c, WIDTH, WIDTH, 2),
        call=call_on_image,
    ),
    Case("vitdet.VitDetAttention", "qkv", VISION | {"use_relative_position_embeddings": False}, call=call_on_image),
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
    # Its channels attend to each other, over the tokens: the roles of token and channel change places, in the rows of q
    # and of v alike.
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
    Case(
        "qwen3_5.Qwen3_5GatedDeltaNet",
        "in_proj_qkv",
        DELTA,
        "Qwen3_5TextConfig",
        make=with_layer_index,
        prepare=remove_convolution,
    ),
    Case("qwen3_next.Qwen3NextGatedDeltaNet", "in_proj_qkvz", DELTA, make=with_layer_index, prepare=remove_convolution),
    Case("qwen3_next.Qwen3NextAttention", "q_proj", DELTA, make=with_layer_index),
    Case("qwen3_5.Qwen3_5Attention", "q_proj", DELTA, "Qwen3_5TextConfig", make=with_layer_index),
    Case(
        "axk2.AXK2Attention",
        "q_gate_proj",
        MLA,
        make=with_layer_index,
        prepare=select_all_tokens,
        call=lambda o, x: call(o, x, attention_mask=torch.zeros(1, 1, TOKENS, TOKENS).double()),
    ),
    Case(
        "jetmoe.JetMoeAttention",
        "kv_proj",
        SMALL | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
        make=with_layer_index,
        prepare=pass_experts_through,
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
        make=with_layer_index,
        call=lambda o, x: call(
            o,
            x,
            position_embeddings=torch.polar(
                torch.ones(1, TOKENS, 1).double(), torch.linspace(0, 1, TOKENS).double().view(1, -1, 1)
            ),
        ),
    ),
    Case("deepseek_v3.DeepseekV3Attention", "kv_b_proj", MLA, make=with_layer_index),
    Case("minicpm3.MiniCPM3Attention", "kv_b_proj", MLA, make=with_layer_index),
    Case("longcat_flash.LongcatFlashMLA", "kv_b_proj", MLA, make=with_layer_index),
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
    Case("mixtral.MixtralExperts", "gate_up_proj", MOE, call=call_experts),
    Case("qwen3_moe.Qwen3MoeExperts", "gate_up_proj", MOE, call=call_experts),
    Case("deepseek_v3.DeepseekV3Experts", "gate_up_proj", MOE, call=call_experts),
    Case("granitemoe.GraniteMoeExperts", "gate_up_proj", MOE, call=call_experts),
    Case("minimax_m3_vl.MiniMaxM3VLExperts", "gate_up_proj", MOE, "MiniMaxM3VLTextConfig", call=call_experts),
    Case("openai_privacy_filter.OpenAIPrivacyFilterExperts", "gate_up_proj", MOE, call=call_experts),
    Case("aria.AriaExperts", "gate_up_proj", MOE | {"moe_num_experts": 2}, "AriaTextConfig", call=call_experts),
    Case("llama4.Llama4TextExperts", "gate_up_proj", MOE, "Llama4TextConfig", call=lambda o, x: o(x[:4])),
    Case("gpt_oss.GptOssExperts", "gate_up_proj", MOE, call=call_experts),
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
    Case("mamba.MambaMixer", "in_proj", MAMBA, make=with_layer_index),
    Case(
        "falcon_mamba.FalconMambaMixer", "in_proj", MAMBA, make=lambda cls, c: cls(c, 0, initialize_mixer_weights=False)
    ),
    Case("jamba.JambaMambaMixer", "in_proj", MAMBA, make=with_layer_index),
    Case(
        "zamba.ZambaMambaMixer",
        "in_proj",
        {k: v for k, v in MAMBA.items() if k != "num_hidden_layers"} | {"n_mamba_heads": 2},
        make=with_layer_index,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_each_row_has_the_part_that_the_model_shows(case: Case) -> None:
    """The table names each row as the model does, and would not if two parts were swapped."""
    owner = build(case)
    observed = observe(owner, case)
    table = fused_parts(None, owner, case.leaf, len(observed))
    assert table is not None
    assert labels(table, len(observed)) == observed
    for a, b in combinations(table, 2):
        assert labels(table | {a: table[b], b: table[a]}, len(observed)) != observed


def build(case: Case) -> nn.Module:
    """Return the owner in double precision, with random weights and an identity as its output projection."""
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
    """Return the part that each row of the fused weight turns out to belong to."""
    layer = getattr(owner, case.leaf)
    weight = layer.weight if isinstance(layer, nn.Module) else layer
    inputs: list[Tensor] = []
    hook = None
    if isinstance(layer, nn.Module):
        hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    x = torch.randn(TOKENS, WIDTH, dtype=case.dtype)
    with torch.no_grad():
        base = output(case, owner, x)
        if hook is not None:
            hook.remove()
        layer_input = inputs[0].reshape(-1, inputs[0].shape[-1]) if inputs and weight.ndim == 2 else x
        direction = torch.linalg.pinv(layer_input)[:, MOVED]  # orthogonal to the inputs of all other tokens
        return [
            part_of_row(case, effect_of_row(case, owner, x, base, row, direction))
            for row in row_views(owner, case, weight)
        ]


def row_views(owner: nn.Module, case: Case, weight: Tensor) -> list[Tensor]:
    """Return each row of W (out, in) as a view into the stored weight, for all experts at once."""
    is_conv1d = type(getattr(owner, case.leaf)).__name__ == "Conv1D"
    transposed = is_conv1d or case.owner.split(".")[0] in ("aria", "llama4", "openai_privacy_filter", "gpt_oss")
    matrix = weight.transpose(-1, -2) if transposed else weight
    return [matrix[..., r, :] for r in range(matrix.shape[-2])]


def effect_of_row(
    case: Case, owner: nn.Module, x: Tensor, base: Tensor, row: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how the output changes when the row moves, and how much more than twice this if it moves twice as far."""
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


def part_of_row(case: Case, effect: tuple[Tensor, Tensor]) -> str:
    """Return the part whose rows have this effect on the output."""
    once, bend = effect
    changed = once.abs() > (1e-6 if case.dtype == torch.float64 else 1e-4) * once.abs().max().clamp(min=1e-3)
    assert changed.any(), "this row does nothing"
    if case.leaf in ("gate_up_proj", "input_linear", "Wi", "fc1", "linear_1") or case.owner.startswith("clvp"):
        return "up" if bend.abs().max() < 1e-3 * once.abs().max() else "gate"
    one_token = int(changed.any(1).sum()) == 1
    one_channel = int(changed.any(0).sum()) == (1 if one_token else case.shared)
    if "mamba" in case.owner.lower() or case.owner.startswith("jamba"):
        return "z" if one_token else "x"
    gate = "g" if case.leaf.startswith("q_") else "z"
    return {(True, False): "q", (False, False): "k", (False, True): "v", (True, True): gate}[one_token, one_channel]


def labels(table: Mapping[str, tuple[range, ...]], out: int) -> list[str]:
    """Return the part of each row. Asserts that the ranges are disjoint and leave no row out."""
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
    return getattr(importlib.import_module(f"transformers.models.{package}.{source_file(name).stem}"), cls)


def source_file(name: str) -> Path:
    """Return the modeling file that defines the class."""
    package, cls = name.split(".")
    folder = Path(transformers.__file__).parent / "models" / package
    pattern = rf"^class {cls}\("
    files = [f for f in sorted(folder.glob("modeling_*.py")) if re.search(pattern, f.read_text(), re.MULTILINE)]
    assert len(files) == 1, f"{name} does not exist"
    return files[0]


def config_of(cls: type, case: Case) -> Any:
    if not case.config:
        return None
    package = importlib.import_module(f"transformers.models.{case.owner.split('.')[0]}")
    names = [n for n in dir(package) if n.endswith("Config")]
    name = case.config_class or min(names, key=len)
    config = getattr(package, name)(**case.config)
    config._attn_implementation = "eager"
    return config


# The classes that the table names


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.leaf}-{r.classes.split()[0]}")
def test_every_class_in_the_table_exists_and_has_the_leaf(row: Any) -> None:
    """transformers has each class that the table names, and the class sets the leaf up."""
    for name in row.classes.split():
        if name.startswith("torch"):
            continue
        source = source_file(name).read_text()
        cls = name.split(".")[1]
        body = re.search(rf"^class {cls}\((\w+).*?(?=^class |^@|\Z)", source, re.MULTILINE | re.DOTALL)
        assert body is not None
        if cls.endswith(("SdpaAttention",)):
            assert body[1] in row.classes  # its base class sets the layer up
        else:
            assert re.search(rf"self\.{row.leaf} = ", body[0]), f"{name} has no {row.leaf}"


def test_each_row_is_checked_on_a_model() -> None:
    """Each row of the table has a case for one of its classes at least."""
    checked = {(c.leaf, c.owner) for c in CASES}
    unchecked = [
        f"{row.leaf}: {row.classes}"
        for row in TABLE
        if not any((row.leaf, name) in checked for name in row.classes.split())
    ]
    assert unchecked == []


def test_all_experts_split_in_halves_with_gate_first() -> None:
    """The source of every class in the long row of experts splits into gate, up."""
    for row in TABLE:
        if row.leaf == "gate_up_proj" and len(row.classes.split()) > 20:
            for name in row.classes.split():
                source = source_file(name).read_text()
                cls = name.split(".")[1]
                body = re.search(rf"^class {cls}\(.*?(?=^class |^@|\Z)", source, re.MULTILINE | re.DOTALL)
                assert body is not None
                assert re.search(r"gate, up = .*chunk\(2, dim=-1\)", body[0]), name


# An unknown layout is None, never a guess


def test_unknown_owners_and_sizes_have_no_parts() -> None:
    """A known leaf in an unknown class, an unknown leaf, and rows that do not divide evenly give None."""

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


def test_a_subclass_has_the_layout_unless_it_overrides_forward() -> None:
    """A subclass that inherits forward has its base's layout; one with its own forward has none."""

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


def test_missing_sizes_come_from_the_model_config() -> None:
    """A size that the owner does not hold is taken from the model's config."""
    owner = build(next(c for c in CASES if c.owner == "phi3.Phi3Attention"))
    config, owner.config = owner.config, None
    assert fused_parts(None, owner, "qkv_proj", 32) is None
    assert fused_parts(config, owner, "qkv_proj", 32) == {
        "q": (range(16),),
        "k": (range(16, 24),),
        "v": (range(24, 32),),
    }


def test_a_layout_that_does_not_divide_the_rows_is_none() -> None:
    """Sizes are exact, proportions scale, and parts of size one become one range with a step."""
    assert Layout(None, {"gate": 1, "up": 1}).rows(6) == {"gate": (range(0, 6, 2),), "up": (range(1, 6, 2),)}
    assert Layout(None, {"gate": 1, "up": 1}).rows(7) is None
    assert Layout(1, {"q": 4, "k": 2}).rows(12) is None  # it would fit twice, but these are sizes
    assert Layout(1, {"q": 4, "k": 2}, proportion=True).rows(12) == {"q": (range(8),), "k": (range(8, 12),)}
    assert Layout(2, {"k": 1, "v": 2}).rows(6) == {"k": (range(0, 6, 3),), "v": (range(1, 3), range(4, 6))}
    assert Layout(0, {"k": 1, "v": 1}).rows(6) is None
    assert Layout(1, {"k": 0, "v": 6}).rows(6) is None


def test_class_names_are_those_of_the_table() -> None:
    """Classes of transformers.models are named by package and class, other classes in full."""
    assert class_name(nn.MultiheadAttention) == "torch.nn.modules.activation.MultiheadAttention"
    assert class_name(find_class("gpt2.GPT2Attention")) == "gpt2.GPT2Attention"
