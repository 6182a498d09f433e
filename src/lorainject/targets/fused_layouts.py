"""The parts of fused weights: which rows are q, k and v, or gate and up. Queries of GPT-2 are a third of c_attn's rows.

One formula covers every layout: the rows are a number of equal *blocks*, and each block holds the parts one after the
other. Thirds are one block of q, k, v. Heads that each keep their own q, k, v are one block per head. Alternating rows
of gate and up are blocks of two rows. TABLE says how many blocks there are, and the order and sizes of the parts.

The same leaf name stands for different layouts (c_attn has four, query_key_value six), and a wrong layout would train
the wrong matrix without any sign. So a row of TABLE names the classes it was read from. It applies to these classes and
to subclasses that keep their forward. For any other owner, and for sizes that do not fit, the answer is None, never a
guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..lora.graft import base_class

Parts = dict[str, tuple[range, ...]]
"""The rows of each part, by its name."""
STORED_UNMARKED = frozenset({"llama4.Llama4TextExperts"})
"""Classes whose stacks are stored (E, in, out) without transformers' mark for it. What their kind calls rows are
inputs, so that gate and up are no rows."""


def fused_parts(model_config: Any, owner: nn.Module, leaf: str, out: int) -> Parts | None:
    """Return the rows of each part of a fused weight.

    Args:
        model_config: The model's config, for values that neither the owner nor the owner's config holds.
        owner: The module that has the weight: the parent of a layer, or the module that has the parameter itself.
        leaf: Name of the layer or parameter in its owner.
        out: Number of rows of W (out, in), whichever way W is stored; for stacked experts, the rows of one expert.

    Returns:
        Disjoint ranges that cover range(out). The parts are q, k, v; gate, up (the activation acts on gate, not on up);
        x, z in Mamba; z or g, the gates on the output of a linear attention or an attention. None if the weight is not
        fused or its layout is not known.
    """
    row = _row(owner, leaf)
    if row is None:
        return None
    try:
        layout = row.layout(ConfigFacts(owner, getattr(owner, "config", None), model_config))
    except LookupError:
        return None
    return layout.rows(out) if layout is not None else None


def stacked_parts(package: str, leaf: str, out: int) -> Parts | None:
    """Return the rows of each part of a stack of experts by the package of its model in transformers.

    Args:
        package: Name of the package, such as "qwen3_moe".
        leaf: Name of the stack in its module.
        out: Number of rows of one expert.

    Returns:
        As `fused_parts`. None if the table has no stack of this name in the package, or several.
    """
    rows = {id(row): row for (name, cls), row in _ROWS.items()
            if name == leaf and cls.startswith(f"{package}.") and cls.endswith("Experts")}  # fmt: skip
    if len(rows) != 1 or any(cls.startswith(f"{package}.") for cls in STORED_UNMARKED):
        return None
    (row,) = rows.values()
    layout = row.layout(ConfigFacts())
    return layout.rows(out) if layout is not None else None


def is_fused(owner: nn.Module, leaf: str) -> bool:
    """True if the table has a row for this weight."""
    return _row(owner, leaf) is not None


@dataclass(frozen=True)
class Layout:
    """How the rows of a fused weight divide: equal blocks, each with the same parts in the same order."""

    blocks: int | None
    """Number of blocks; None for as many as fit."""
    parts: dict[str, int]
    """Rows of each part in one block, or only their proportion."""
    proportion: bool = False
    """True if `parts` are proportions, so that a block can be any multiple of them."""

    def rows(self, out: int) -> Parts | None:
        """Return the ranges of each part in a weight with `out` rows; None if the rows do not divide evenly."""
        total = sum(self.parts.values())
        if min(self.parts.values()) < 1 or out < 1:
            return None
        blocks = out // total if self.blocks is None else self.blocks
        unit, rest = divmod(out, blocks * total) if blocks > 0 else (0, 1)
        if rest or unit < 1 or (unit > 1 and not self.proportion):
            return None
        parts: Parts = {}
        start, block = 0, unit * total
        for name, share in self.parts.items():
            size = share * unit
            if size == 1 and blocks > 1:  # one range with a step instead of thousands of single rows
                parts[name] = (range(start, out, block),)
            else:
                parts[name] = tuple(range(first, first + size) for first in range(start, out, block))
            start += size
        return parts


class ConfigFacts:
    """Sizes and flags of a layer, looked up in its owner, the owner's config and the model's config, in this order."""

    def __init__(self, *sources: Any) -> None:
        self.sources = sources

    def __call__(self, *names: str) -> Any:
        """Return the first value that is not None under one of the names. Raises LookupError if there is none."""
        for name in names:
            for source in self.sources:
                if source is not None and (value := getattr(source, name, None)) is not None:
                    return value
        raise LookupError(names)


def equal_parts(*names: str) -> Callable[[ConfigFacts], Layout]:
    """One block of parts with the same size."""
    return lambda facts: Layout(1, dict.fromkeys(names, 1), proportion=True)


def alternating_rows(*names: str) -> Callable[[ConfigFacts], Layout]:
    """One row of each part in turn."""
    return lambda facts: Layout(None, dict.fromkeys(names, 1))


def parts_per_head(*names: str) -> Callable[[ConfigFacts], Layout]:
    """One block per head, of parts with the same size."""
    return lambda facts: Layout(facts("num_heads", "num_attention_heads"), dict.fromkeys(names, 1), proportion=True)


def grouped_query(facts: ConfigFacts) -> Layout:
    """All heads of q, then the smaller number of heads of k and of v (grouped-query attention)."""
    # Phi3Attention keeps num_key_value_heads but leaves num_attention_heads to its config.
    heads, kv, dim = facts("num_heads", "num_attention_heads"), facts("num_key_value_heads"), facts("head_dim")
    return Layout(1, {"q": heads * dim, "k": kv * dim, "v": kv * dim})


def gpt2(facts: ConfigFacts) -> Layout:
    """Thirds. In cross-attention c_attn sees the encoder only, and q_attn makes the queries: k and v, in halves."""
    return (equal_parts("k", "v") if facts("is_cross_attention") else equal_parts("q", "k", "v"))(facts)


def multi_query_or_per_head(facts: ConfigFacts) -> Layout:
    """With `multi_query`, all heads of q, then one of k and one of v; otherwise one block per head."""
    heads, dim = facts("num_heads"), facts("head_dim")
    if facts("multi_query"):
        return Layout(1, {"q": heads * dim, "k": dim, "v": dim})
    return Layout(heads, {"q": dim, "k": dim, "v": dim})


def gpt_bigcode(facts: ConfigFacts) -> Layout | None:
    """As `multi_query_or_per_head`. The cross-attention of this class cannot run, and so has no layout."""
    return None if facts("is_cross_attention") else multi_query_or_per_head(facts)


def falcon(facts: ConfigFacts) -> Layout:
    """40B: one block per key-value head, of its query heads, k and v. 7B: multi-query. RW-1B: one block per head."""
    if not facts("new_decoder_architecture"):
        return multi_query_or_per_head(facts)
    kv, dim = facts("num_kv_heads"), facts("head_dim")
    return Layout(kv, {"q": facts("num_heads") // kv * dim, "k": dim, "v": dim})


def mla(facts: ConfigFacts) -> Layout:
    """Multi-head latent attention, up from the latent: one block per head, of k without its rotary part, and v."""
    heads = facts("num_heads", "num_attention_heads")
    return Layout(heads, {"k": facts("qk_nope_head_dim"), "v": facts("v_head_dim")})


def delta_net(facts: ConfigFacts) -> Layout:
    """A gated delta net: the heads of k (and q) and of v differ in number and size."""
    return Layout(1, {"q": facts("key_dim"), "k": facts("key_dim"), "v": facts("value_dim")})


def delta_net_z(facts: ConfigFacts) -> Layout:
    """One block per key head: its q and k, then the v and z of the value heads that share it."""
    heads, k = facts("num_k_heads"), facts("head_k_dim")
    v = facts("num_v_heads") // heads * facts("head_v_dim")
    return Layout(heads, {"q": k, "k": k, "v": v, "z": v})


def torch_mha(facts: ConfigFacts) -> Layout | None:
    """Thirds, unless kdim or vdim differ: then q_proj_weight, k_proj_weight and v_proj_weight exist instead."""
    return equal_parts("q", "k", "v")(facts) if facts("_qkv_same_embed_dim") else None


@dataclass(frozen=True)
class FusedWeight:
    """One row of the table: the layout of one weight in some classes."""

    leaf: str
    """Name of the layer or parameter in its owner."""
    classes: str
    """Classes of the owner, separated by spaces: package.Class stands for transformers.models.package.modeling_*.Class;
    any other class has its full name."""
    layout: Callable[[ConfigFacts], Layout | None]
    """The layout for an owner; None if this owner has no such fused weight. Raises LookupError if a size is unknown."""


# Read from transformers 5.23. The comments quote the line that decides; tests/internals/test_fused_layouts.py checks
# each row against the output of a real model.
TABLE = (
    # GPT2Attention: self.c_attn(hidden_states).split(self.split_size, dim=2), or key, value = self.c_attn(encoder_...)
    # ImageGPTAttention: the same, in both cases
    FusedWeight("c_attn",
        "gpt2.GPT2Attention decision_transformer.DecisionTransformerGPT2Attention imagegpt.ImageGPTAttention", gpt2),
    # Attention: query, key, value = x.split(self.split_size, dim=2)
    FusedWeight("c_attn", "openai.Attention", equal_parts("q", "k", "v")),
    # GPTBigCodeAttention: .split((self.embed_dim, self.kv_dim, self.kv_dim)), or
    # .view(*hidden_states.shape[:2], self.num_heads, 3 * self.head_dim)...split(3 * [self.head_dim], dim=3)
    FusedWeight("c_attn", "gpt_bigcode.GPTBigCodeAttention", gpt_bigcode),
    # BarkSelfAttention: self.att_proj(hidden_states).split(self.embed_dim, dim=2)
    FusedWeight("att_proj", "bark.BarkSelfAttention", equal_parts("q", "k", "v")),
    # GPTNeoXAttention: self.query_key_value(...).view((*input_shape, -1, 3 * self.head_size))...chunk(3, dim=-1)
    # GPTNeoXJapaneseAttention: qkv[..., : self.head_size] and so on
    # BloomAttention: fused_qkv.view(batch_size, seq_length, self.num_heads, 3, self.head_dim)
    # PersimmonAttention (Fuyu too): fused_qkv.view(batch_size, seq_length, self.num_heads, 3, self.head_dim)
    FusedWeight("query_key_value",
        "gpt_neox.GPTNeoXAttention gpt_neox_japanese.GPTNeoXJapaneseAttention bloom.BloomAttention "
        "persimmon.PersimmonAttention", parts_per_head("q", "k", "v")),
    # FalconAttention._split_heads: qkv.view(..., -1, self.num_heads // self.num_kv_heads + 2, self.head_dim);
    # .view(..., self.num_heads + 2, self.head_dim); .view(..., self.num_heads, 3, self.head_dim)
    FusedWeight("query_key_value", "falcon.FalconAttention", falcon),
    # CodeGenAttention: mp_num = 4; qkv.reshape(qkv.shape[:-1] + (mp_num, -1)); query, value, key = torch.split(...)
    FusedWeight("qkv_proj",
        "codegen.CodeGenAttention", lambda facts: Layout(4, {"q": 1, "v": 1, "k": 1}, proportion=True)),
    # Phi3Attention (Phi-4 too): query_states = qkv[..., :query_pos], then num_key_value_heads * head_dim each
    # Phi4MultimodalAttention: the same
    FusedWeight("qkv_proj", "phi3.Phi3Attention phi4_multimodal.Phi4MultimodalAttention", grouped_query),
    # MiniMaxLightningAttention: .reshape(..., self.num_attention_heads, 3 * self.head_dim), split by head_dim
    FusedWeight("qkv_proj", "minimax.MiniMaxLightningAttention", parts_per_head("q", "k", "v")),
    # MptAttention: mixed_qkv.chunk(3, dim=2)
    # ModernBertAttention: qkv.view(*input_shape, 3, -1, self.head_dim).unbind(dim=-3)
    FusedWeight("Wqkv", "mpt.MptAttention modernbert.ModernBertAttention", equal_parts("q", "k", "v")),
    # DbrxAttention: .split([self.hidden_size, self.num_key_value_heads * self.head_dim, ...], dim=2)
    FusedWeight("Wqkv", "dbrx.DbrxAttention", grouped_query),
    # DisentangledSelfAttention: transpose_for_scores(qp).chunk(3, dim=-1), that is inside each head
    FusedWeight("in_proj", "deberta.DisentangledSelfAttention", parts_per_head("q", "k", "v")),
    # EsmFoldSelfAttention: self.proj(x).view(*x.shape[:2], self.num_heads, -1)...chunk(3, dim=-1)
    FusedWeight("proj", "esm.EsmFoldSelfAttention", parts_per_head("q", "k", "v")),
    # LayoutLMv2SelfAttention (fast_qkv): torch.chunk(qkv, 3, dim=-1)
    FusedWeight("qkv_linear", "layoutlmv2.LayoutLMv2SelfAttention", equal_parts("q", "k", "v")),
    # torch/nn/functional.py _in_projection_packed: unflatten(-1, (3, E))
    FusedWeight("in_proj_weight", "torch.nn.modules.activation.MultiheadAttention", torch_mha),
    # All of them reshape to (..., 3, heads, head_dim); none keeps q, k, v inside a head. The Sdpa classes override the
    #   forward.
    FusedWeight("qkv",
        "blip.BlipAttention blip_2.Blip2Attention cohere_compass.CohereCompassVisionAttention "
        "deepseek_ocr2.DeepseekOcr2SamVisionAttention deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention "
        "dots3_note.Dots3NoteVisionAttention ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention "
        "florence2.Florence2VisionChannelAttention florence2.Florence2VisionWindowAttention "
        "glm4v.Glm4vVisionAttention glm4v_moe.Glm4vMoeVisionAttention glm5_next.Glm5NextVisionAttention "
        "glm_image.GlmImageVisionAttention glm_ocr.GlmOcrVisionAttention got_ocr2.GotOcr2VisionAttention "
        "hiera.HieraMaskUnitAttention instructblip.InstructBlipAttention "
        "instructblipvideo.InstructBlipVideoAttention mgp_str.MgpstrAttention "
        "pp_formulanet.PPFormulaNetVisionAttention pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention "
        "pp_ocrv5_server_rec.PPOCRV5ServerRecAttention pp_ocrv6_small_rec.PPOCRV6SmallRecAttention "
        "qwen2_5_vl.Qwen2_5_VLVisionAttention qwen2_vl.VisionAttention qwen3_5.Qwen3_5VisionAttention "
        "qwen3_5_moe.Qwen3_5MoeVisionAttention qwen3_omni_moe.Qwen3OmniMoeVisionAttention "
        "qwen3_vl.Qwen3VLVisionAttention qwen3_vl_moe.Qwen3VLMoeVisionAttention qwen4_exp.Qwen4ExpVisionAttention "
        "sam.SamVisionAttention sam.SamVisionSdpaAttention sam2.Sam2MultiScaleAttention "
        "sam_hq.SamHQVisionAttention sam_hq.SamHQVisionSdpaAttention seggpt.SegGptAttention "
        "slanext.SLANeXtVisionAttention timesformer.TimesformerSelfAttention "
        "unlimited_ocr.UnlimitedOcrSamVisionAttention unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention "
        "vitdet.VitDetAttention", equal_parts("q", "k", "v")),
    # Exaone4_5_VisionAttention: .split([self.q_dim, self.kv_dim, self.kv_dim], dim=-1)
    FusedWeight("qkv", "exaone4_5.Exaone4_5_VisionAttention", grouped_query),
    # Qwen3_5GatedDeltaNet: torch.split(mixed_qkv, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
    FusedWeight("in_proj_qkv",
        "qwen3_5.Qwen3_5GatedDeltaNet qwen3_5_moe.Qwen3_5MoeGatedDeltaNet qwen4_exp.Qwen4ExpTextGatedDeltaNet",
        delta_net),
    # Qwen3NextGatedDeltaNet.fix_query_key_value_ordering: .view(..., self.num_k_heads, ...), then split
    FusedWeight("in_proj_qkvz", "qwen3_next.Qwen3NextGatedDeltaNet", delta_net_z),
    # Qwen3NextAttention: torch.chunk(self.q_proj(...).view(*input_shape, -1, self.head_dim * 2), 2, dim=-1)
    FusedWeight("q_proj",
        "qwen3_next.Qwen3NextAttention qwen3_5.Qwen3_5Attention qwen3_5_moe.Qwen3_5MoeAttention "
        "qwen4_exp.Qwen4ExpTextAttention",
        lambda facts: Layout(None, {"q": facts("head_dim"), "g": facts("head_dim")})),
    # AXK2Attention: .view(..., -1, self.qk_head_dim + self.v_head_dim), torch.split(..., [self.qk_head_dim,
    #   self.v_head_dim])
    FusedWeight("q_gate_proj",
        "axk2.AXK2Attention",
        lambda facts: Layout(facts("num_heads"), {"q": facts("qk_head_dim"), "g": facts("v_head_dim")})),
    # JetMoeAttention: self.kv_proj(hidden_states).chunk(2, dim=-1)
    FusedWeight("kv_proj", "jetmoe.JetMoeAttention", equal_parts("k", "v")),
    # GraniteSpeechConformerAttention: self.to_kv(hidden_states).chunk(2, dim=-1)
    # EvollaSequenceCompressorAttention: self.to_kv(kv_input).chunk(2, dim=-1)
    FusedWeight("to_kv",
        "granite_speech.GraniteSpeechConformerAttention granite_speech_plus.GraniteSpeechPlusConformerAttention "
        "evolla.EvollaSequenceCompressorAttention", equal_parts("k", "v")),
    # DeepseekV3Attention: .view(..., -1, qk_nope_head_dim + v_head_dim), torch.split; the others the same
    FusedWeight("kv_b_proj",
        "axk1.AXK1Attention axk2.AXK2Attention bailing_hybrid.BailingHybridAttention "
        "deepseek_v2.DeepseekV2Attention deepseek_v3.DeepseekV3Attention deepseek_v32.DeepseekV32Attention "
        "dots3_note.Dots3NoteTextAttention glm4_moe_lite.Glm4MoeLiteAttention glm5_next.Glm5NextTextAttention "
        "glm_moe_dsa.GlmMoeDsaAttention hy_v4.HYV4Attention kimi_linear.KimiLinearAttention "
        "longcat_flash.LongcatFlashMLA minicpm3.MiniCPM3Attention mistral4.Mistral4Attention "
        "mistral_large4.MistralLarge4TextAttention youtu.YoutuAttention", mla),
    # Phi3MLP: gate, up_states = up_states.chunk(2, dim=-1); up_states * self.activation_fn(gate); the others the same
    FusedWeight("gate_up_proj",
        "dia.DiaMLP dots3_note.Dots3NoteAudioMLP esmfold2.EsmFold2SwiGLU glm.GlmMLP glm4.Glm4MLP "
        "glm4v.Glm4vTextMLP glm_image.GlmImageTextMLP glm_ocr.GlmOcrTextMLP minimax_m3_vl.MiniMaxM3VLDenseMLP "
        "phi3.Phi3MLP phi4_multimodal.Phi4MultimodalMLP zamba2.Zamba2MLP", equal_parts("gate", "up")),
    # Phi4MultimodalAudioMLP: up_states, gate = up_states.chunk(2, dim=-1)
    FusedWeight("gate_up_proj", "phi4_multimodal.Phi4MultimodalAudioMLP", equal_parts("up", "gate")),
    # MixtralExperts: gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1); the others the same.
    # Stored (E, in, out) in Aria, Llama 4 and OpenAI's privacy filter, which changes nothing here.
    FusedWeight("gate_up_proj",
        "afmoe.AfmoeExperts aria.AriaExperts axk1.AXK1Experts axk2.AXK2Experts bailing_hybrid.BailingHybridExperts "
        "beam.BeamExperts cohere2_moe.Cohere2MoeExperts deepseek_ocr2.DeepseekOcr2TextExperts "
        "deepseek_v2.DeepseekV2Experts deepseek_v3.DeepseekV3Experts deepseek_v32.DeepseekV32Experts "
        "deepseek_v4.DeepseekV4Experts diffusion_gemma.DiffusionGemmaTextExperts dots1.Dots1Experts "
        "dots3_note.Dots3NoteExperts ernie4_5_moe.Ernie4_5_MoeExperts ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts "
        "exaone_moe.ExaoneMoeExperts flex_olmo.FlexOlmoExperts flint.FlintExperts gemma4.Gemma4TextExperts "
        "glm4_moe.Glm4MoeExperts glm4_moe_lite.Glm4MoeLiteExperts glm4v_moe.Glm4vMoeTextExperts "
        "glm5_next.Glm5NextTextExperts glm_moe_dsa.GlmMoeDsaExperts granitemoe.GraniteMoeExperts "
        "granitemoe_swa.GraniteMoeSWAExperts granitemoehybrid.GraniteMoeHybridExperts "
        "granitemoeshared.GraniteMoeSharedExperts hunyuan_v1_moe.HunYuanMoEV1Experts hy_v3.HYV3Experts "
        "hy_v4.HYV4Experts inkling.InklingExperts inkling2.Inkling2Experts jamba.JambaExperts "
        "kimi_linear.KimiLinearExperts kolibri1.Kolibri1Experts laguna.LagunaExperts lfm2_moe.Lfm2MoeExperts "
        "llama4.Llama4TextExperts longcat_flash.LongcatFlashExperts mellum.MellumExperts "
        "mimo_v2_flash.MiMoV2FlashExperts minimax.MiniMaxExperts minimax_m2.MiniMaxM2Experts "
        "minimax_m3_vl.MiniMaxM3VLExperts mistral4.Mistral4Experts mistral_large4.MistralLarge4TextExperts "
        "mixtral.MixtralExperts muse_spark.MuseSparkExperts olmoe.OlmoeExperts "
        "openai_privacy_filter.OpenAIPrivacyFilterExperts phimoe.PhimoeExperts qwen2_moe.Qwen2MoeExperts "
        "qwen3_5_moe.Qwen3_5MoeExperts qwen3_moe.Qwen3MoeExperts qwen3_next.Qwen3NextExperts "
        "qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts "
        "qwen3_vl_moe.Qwen3VLMoeTextExperts qwen4_exp.Qwen4ExpTextExperts solar_open.SolarOpenExperts "
        "step3p7.Step3p7Experts unlimited_ocr.UnlimitedOcrTextExperts zaya.ZayaExperts",
        equal_parts("gate", "up")),
    # GptOssExperts: gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    FusedWeight("gate_up_proj", "gpt_oss.GptOssExperts", alternating_rows("gate", "up")),
    # GraniteMoeSharedMLP: self.activation(chunked[0]) * chunked[1]
    # JetMoeMoE: the same, on stacked experts
    FusedWeight("input_linear",
        "granitemoeshared.GraniteMoeSharedMLP granitemoehybrid.GraniteMoeHybridMLP granitemoe_swa.GraniteMoeSWAMLP "
        "jetmoe.JetMoeMoE", equal_parts("gate", "up")),
    # ModernBertMLP: input, gate = self.Wi(x).chunk(2, dim=-1); self.act(input) * gate: what it calls gate is not
    FusedWeight("Wi", "modernbert.ModernBertMLP modernbert_decoder.ModernBertDecoderMLP", equal_parts("gate", "up")),
    # MoonshineDecoderMLP: hidden_states, gate = hidden_states.chunk(2, dim=-1); act(gate) * hidden_states
    FusedWeight("fc1",
        "moonshine.MoonshineDecoderMLP moonshine_streaming.MoonshineStreamingDecoderMLP", equal_parts("up", "gate")),
    # MoshiGatingMLP: .view(batch_size, sequence_length, 2, -1); act(x[..., 0, :]) * x[..., 1, :]
    FusedWeight("fc1",
        "moshi.MoshiGatingMLP kyutai_speech_to_text.KyutaiSpeechToTextGatingMLP", equal_parts("gate", "up")),
    # ClvpGatedLinearUnit: hidden_states, gate = self.proj(x).chunk(2, dim=-1); hidden_states * act(gate)
    FusedWeight("proj", "clvp.ClvpGatedLinearUnit", equal_parts("up", "gate")),
    # AyaVisionMultiModalProjector, cohere2_vision: x, gate = hidden_states.chunk(2, dim=-1); act(gate) * x
    FusedWeight("linear_1",
        "aya_vision.AyaVisionMultiModalProjector cohere2_vision.Cohere2VisionMultiModalProjector",
        equal_parts("up", "gate")),
    # MambaMixer, falcon_mamba, jamba: hidden_states_B_C, gate = projected_states.chunk(2, dim=1)
    FusedWeight("in_proj",
        "mamba.MambaMixer falcon_mamba.FalconMambaMixer jamba.JambaMambaMixer", equal_parts("x", "z")),
    # ZambaMambaMixer: projected_states.view(batch_size, -1, 2, seq_len).chunk(2, dim=2): row by row, not halves
    FusedWeight("in_proj", "zamba.ZambaMambaMixer", alternating_rows("x", "z")),
)  # fmt: skip


_ROWS = {(row.leaf, name): row for row in TABLE for name in row.classes.split()}


def _row(owner: nn.Module, leaf: str) -> FusedWeight | None:
    """Return the row for the nearest class in the owner's bases that has one, if the owner has the forward of that
    class."""
    cls = base_class(type(owner))
    for base in cls.__mro__:
        if (row := _ROWS.get((leaf, class_name(base)))) is not None:
            return row if cls.forward is base.__dict__.get("forward") else None
    return None


def class_name(cls: type) -> str:
    """Return the name of a class as FusedWeight.classes has it."""
    modules = cls.__module__.split(".")
    if modules[:2] == ["transformers", "models"] and len(modules) > 3:
        return f"{modules[2]}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
