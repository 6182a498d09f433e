"""Which rows of a fused weight are q, k and v, or gate and up: a LoRA on "the queries" of GPT-2 is one on a third of c_attn.

Every layout here is one formula. The rows are so many equal *blocks*, and each block holds the parts one after the other:
thirds are one block of q, k, v; heads that each keep their own q, k, v are a block a head; an interleaving of gate and up is
a block of two rows. What differs is how many blocks, in which order and how large, and that is the table.

The same leaf name hides different layouts (c_attn has four, query_key_value six), and a wrong one trains the wrong matrix
without a word. So a row names the classes that it was read from, and holds for these and for what is derived from them with
their forward; for any other owner, and when the sizes don't fit, the answer is None: never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..lora.graft import base_class

Parts = dict[str, tuple[range, ...]]


def fused_parts(model_config: Any, owner: nn.Module, leaf: str, out: int) -> Parts | None:
    """The rows of each part of the fused weight `leaf` of `owner`; None if it isn't fused or its layout is not known.

    Rows are those of W (out, in), whichever way it is stored; of stacked experts, those of each expert. The ranges are disjoint
    and cover range(out). Parts are q, k, v; gate, up (gate goes through the activation, up does not); x, z of Mamba; z and g, the
    gates on a linear attention's and an attention's output. `model_config` is asked only for what the owner does not know.
    """
    row = _row(owner, leaf)
    if row is None:
        return None
    try:
        layout = row.layout(Facts(owner, getattr(owner, "config", None), model_config))
    except LookupError:
        return None
    return layout.rows(out) if layout is not None else None


def is_fused(owner: nn.Module, leaf: str) -> bool:
    """Whether the table has a row for this weight."""
    return _row(owner, leaf) is not None


@dataclass(frozen=True)
class Layout:
    """`blocks` equal blocks (None: as many as fit), in each the parts in this order."""

    blocks: int | None
    parts: dict[str, int]
    """Rows of each part in a block, or only their proportion."""
    proportion: bool = False

    def rows(self, out: int) -> Parts | None:
        """The ranges in a weight of so many rows; None if they don't come out even."""
        total = sum(self.parts.values())
        if min(self.parts.values()) < 1 or out < 1:
            return None
        blocks = out // total if self.blocks is None else self.blocks
        unit, rest = divmod(out, blocks * total) if blocks > 0 else (0, 1)
        if rest or unit < 1 or (unit > 1 and not self.proportion):
            return None
        found: Parts = {}
        start, step = 0, unit * total
        for name, size in self.parts.items():
            size *= unit
            single = (range(start, out, step),)  # every so-manieth row: one range with a step, not thousands of rows
            found[name] = (
                single
                if size == 1 and blocks > 1
                else tuple(range(b * step + start, b * step + start + size) for b in range(blocks))
            )
            start += size
        return found


class Facts:
    """What the owner, its config and the model's config say, in this order."""

    def __init__(self, *sources: Any) -> None:
        self.sources = sources

    def __call__(self, *names: str) -> Any:
        """The value under the first of these names that anyone knows; LookupError if nobody does."""
        for name in names:
            for source in self.sources:
                if source is not None and (value := getattr(source, name, None)) is not None:
                    return value
        raise LookupError(names)


def equal(*names: str) -> Callable[[Facts], Layout]:
    """One block of parts of the same size."""
    return lambda of: Layout(1, dict.fromkeys(names, 1), proportion=True)


def alternating(*names: str) -> Callable[[Facts], Layout]:
    """Row by row in turn."""
    return lambda of: Layout(None, dict.fromkeys(names, 1))


def per_head(*names: str) -> Callable[[Facts], Layout]:
    """A block a head, of parts of the same size."""
    return lambda of: Layout(of("num_heads", "num_attention_heads"), dict.fromkeys(names, 1), proportion=True)


def grouped(of: Facts) -> Layout:
    """All of q, then fewer heads of k and of v (grouped-query attention)."""
    # Phi3Attention keeps num_key_value_heads but leaves num_attention_heads to its config.
    heads, kv, dim = of("num_heads", "num_attention_heads"), of("num_key_value_heads"), of("head_dim")
    return Layout(1, {"q": heads * dim, "k": kv * dim, "v": kv * dim})


def gpt2(of: Facts) -> Layout:
    """In cross-attention c_attn sees the encoder only, and q_attn makes the queries."""
    return (equal("k", "v") if of("is_cross_attention") else equal("q", "k", "v"))(of)


def gpt_bigcode(of: Facts) -> Layout | None:
    """Multi-query: q, then one head of k and of v; otherwise a block a head. Its cross-attention can't run, and so has no layout."""
    if of("is_cross_attention"):
        return None
    dim, heads = of("head_dim"), of("num_heads")
    return (
        Layout(1, {"q": heads * dim, "k": dim, "v": dim})
        if of("multi_query")
        else Layout(heads, {"q": dim, "k": dim, "v": dim})
    )


def falcon(of: Facts) -> Layout:
    """40B: a block a key-value head, of its query heads, k, v. 7B: all query heads, one k, one v. RW-1B: a block a head."""
    heads, dim = of("num_heads"), of("head_dim")
    if of("new_decoder_architecture"):
        return Layout(of("num_kv_heads"), {"q": heads // of("num_kv_heads") * dim, "k": dim, "v": dim})
    return (
        Layout(1, {"q": heads * dim, "k": dim, "v": dim})
        if of("multi_query")
        else Layout(heads, {"q": dim, "k": dim, "v": dim})
    )


def mla(of: Facts) -> Layout:
    """Multi-head latent attention, up from the latent: a block a head, of k without its rotary part, and v."""
    return Layout(of("num_heads", "num_attention_heads"), {"k": of("qk_nope_head_dim"), "v": of("v_head_dim")})


def delta_net(of: Facts) -> Layout:
    """A gated delta net: heads of k (and q) and of v differ in number and size."""
    return Layout(1, {"q": of("key_dim"), "k": of("key_dim"), "v": of("value_dim")})


def delta_net_z(of: Facts) -> Layout:
    """A block a key head: its q and k, then the v and z of the value heads that share it."""
    heads, k = of("num_k_heads"), of("head_k_dim")
    v = of("num_v_heads") // heads * of("head_v_dim")
    return Layout(heads, {"q": k, "k": k, "v": v, "z": v})


def torch_mha(of: Facts) -> Layout | None:
    """Thirds, unless kdim or vdim differ: then there are q_proj_weight, k_proj_weight and v_proj_weight instead."""
    return equal("q", "k", "v")(of) if of("_qkv_same_embed_dim") else None


@dataclass(frozen=True)
class Row:
    """One family: in these classes, this leaf is laid out so."""

    leaf: str
    classes: str
    """package.Class for transformers.models.package.modeling_*.Class; any other class in full."""
    layout: Callable[[Facts], Layout | None]


# Read from transformers 5.23; the comments quote the line that decides. tests/targets/test_fused_layouts.py asks the models themselves.
TABLE = (
    # gpt2/modeling_gpt2.py GPT2Attention: self.c_attn(hidden_states).split(self.split_size, dim=2), or key, value = self.c_attn(encoder_...)
    # imagegpt/modeling_imagegpt.py ImageGPTAttention: the same, in both cases
    Row(
        "c_attn",
        "gpt2.GPT2Attention decision_transformer.DecisionTransformerGPT2Attention imagegpt.ImageGPTAttention",
        gpt2,
    ),
    # openai/modeling_openai.py Attention: query, key, value = x.split(self.split_size, dim=2)
    Row("c_attn", "openai.Attention", equal("q", "k", "v")),
    # gpt_bigcode/modeling_gpt_bigcode.py GPTBigCodeAttention: .split((self.embed_dim, self.kv_dim, self.kv_dim)), or
    # .view(*hidden_states.shape[:2], self.num_heads, 3 * self.head_dim)...split(3 * [self.head_dim], dim=3)
    Row("c_attn", "gpt_bigcode.GPTBigCodeAttention", gpt_bigcode),
    # bark/modeling_bark.py BarkSelfAttention: self.att_proj(hidden_states).split(self.embed_dim, dim=2)
    Row("att_proj", "bark.BarkSelfAttention", equal("q", "k", "v")),
    # gpt_neox/modeling_gpt_neox.py GPTNeoXAttention: self.query_key_value(...).view((*input_shape, -1, 3 * self.head_size))...chunk(3, dim=-1)
    # gpt_neox_japanese/modeling_gpt_neox_japanese.py GPTNeoXJapaneseAttention: qkv[..., : self.head_size] and so on
    # bloom/modeling_bloom.py BloomAttention: fused_qkv.view(batch_size, seq_length, self.num_heads, 3, self.head_dim)
    # persimmon/modeling_persimmon.py PersimmonAttention (Fuyu too): fused_qkv.view(batch_size, seq_length, self.num_heads, 3, self.head_dim)
    Row(
        "query_key_value",
        "gpt_neox.GPTNeoXAttention gpt_neox_japanese.GPTNeoXJapaneseAttention bloom.BloomAttention persimmon.PersimmonAttention",
        per_head("q", "k", "v"),
    ),
    # falcon/modeling_falcon.py FalconAttention._split_heads: qkv.view(..., -1, self.num_heads // self.num_kv_heads + 2, self.head_dim);
    # .view(..., self.num_heads + 2, self.head_dim); .view(..., self.num_heads, 3, self.head_dim)
    Row("query_key_value", "falcon.FalconAttention", falcon),
    # codegen/modeling_codegen.py CodeGenAttention: mp_num = 4; qkv.reshape(qkv.shape[:-1] + (mp_num, -1)); query, value, key = torch.split(...)
    Row("qkv_proj", "codegen.CodeGenAttention", lambda of: Layout(4, {"q": 1, "v": 1, "k": 1}, proportion=True)),
    # phi3/modeling_phi3.py Phi3Attention (Phi-4 too): query_states = qkv[..., :query_pos], then num_key_value_heads * head_dim each
    # phi4_multimodal/modeling_phi4_multimodal.py Phi4MultimodalAttention: the same
    Row("qkv_proj", "phi3.Phi3Attention phi4_multimodal.Phi4MultimodalAttention", grouped),
    # minimax/modeling_minimax.py MiniMaxLightningAttention: .reshape(..., self.num_attention_heads, 3 * self.head_dim), split by head_dim
    Row("qkv_proj", "minimax.MiniMaxLightningAttention", per_head("q", "k", "v")),
    # mpt/modeling_mpt.py MptAttention: mixed_qkv.chunk(3, dim=2)
    # modernbert/modeling_modernbert.py ModernBertAttention: qkv.view(*input_shape, 3, -1, self.head_dim).unbind(dim=-3)
    Row("Wqkv", "mpt.MptAttention modernbert.ModernBertAttention", equal("q", "k", "v")),
    # dbrx/modeling_dbrx.py DbrxAttention: .split([self.hidden_size, self.num_key_value_heads * self.head_dim, ...], dim=2)
    Row("Wqkv", "dbrx.DbrxAttention", grouped),
    # deberta/modeling_deberta.py DisentangledSelfAttention: transpose_for_scores(qp).chunk(3, dim=-1), that is inside each head
    Row("in_proj", "deberta.DisentangledSelfAttention", per_head("q", "k", "v")),
    # esm/modeling_esmfold.py EsmFoldSelfAttention: self.proj(x).view(*x.shape[:2], self.num_heads, -1)...chunk(3, dim=-1)
    Row("proj", "esm.EsmFoldSelfAttention", per_head("q", "k", "v")),
    # layoutlmv2/modeling_layoutlmv2.py LayoutLMv2SelfAttention (fast_qkv): torch.chunk(qkv, 3, dim=-1)
    Row("qkv_linear", "layoutlmv2.LayoutLMv2SelfAttention", equal("q", "k", "v")),
    # torch/nn/functional.py _in_projection_packed: unflatten(-1, (3, E))
    Row("in_proj_weight", "torch.nn.modules.activation.MultiheadAttention", torch_mha),
    # All of them reshape to (..., 3, heads, head_dim); none keeps q, k, v inside a head. The Sdpa classes override the forward.
    Row(
        "qkv",
        "blip.BlipAttention blip_2.Blip2Attention cohere_compass.CohereCompassVisionAttention deepseek_ocr2.DeepseekOcr2SamVisionAttention "
        "deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention dots3_note.Dots3NoteVisionAttention ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention "
        "florence2.Florence2VisionChannelAttention florence2.Florence2VisionWindowAttention glm4v.Glm4vVisionAttention "
        "glm4v_moe.Glm4vMoeVisionAttention glm5_next.Glm5NextVisionAttention glm_image.GlmImageVisionAttention glm_ocr.GlmOcrVisionAttention "
        "got_ocr2.GotOcr2VisionAttention hiera.HieraMaskUnitAttention instructblip.InstructBlipAttention "
        "instructblipvideo.InstructBlipVideoAttention mgp_str.MgpstrAttention pp_formulanet.PPFormulaNetVisionAttention "
        "pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention pp_ocrv5_server_rec.PPOCRV5ServerRecAttention pp_ocrv6_small_rec.PPOCRV6SmallRecAttention "
        "qwen2_5_vl.Qwen2_5_VLVisionAttention qwen2_vl.VisionAttention qwen3_5.Qwen3_5VisionAttention qwen3_5_moe.Qwen3_5MoeVisionAttention "
        "qwen3_omni_moe.Qwen3OmniMoeVisionAttention qwen3_vl.Qwen3VLVisionAttention qwen3_vl_moe.Qwen3VLMoeVisionAttention "
        "qwen4_exp.Qwen4ExpVisionAttention sam.SamVisionAttention sam.SamVisionSdpaAttention sam2.Sam2MultiScaleAttention "
        "sam_hq.SamHQVisionAttention sam_hq.SamHQVisionSdpaAttention seggpt.SegGptAttention slanext.SLANeXtVisionAttention "
        "timesformer.TimesformerSelfAttention unlimited_ocr.UnlimitedOcrSamVisionAttention unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention "
        "vitdet.VitDetAttention",
        equal("q", "k", "v"),
    ),
    # exaone4_5/modeling_exaone4_5.py Exaone4_5_VisionAttention: .split([self.q_dim, self.kv_dim, self.kv_dim], dim=-1)
    Row("qkv", "exaone4_5.Exaone4_5_VisionAttention", grouped),
    # qwen3_5/modeling_qwen3_5.py Qwen3_5GatedDeltaNet: torch.split(mixed_qkv, [self.key_dim, self.key_dim, self.value_dim], dim=-1)
    Row(
        "in_proj_qkv",
        "qwen3_5.Qwen3_5GatedDeltaNet qwen3_5_moe.Qwen3_5MoeGatedDeltaNet qwen4_exp.Qwen4ExpTextGatedDeltaNet",
        delta_net,
    ),
    # qwen3_next/modeling_qwen3_next.py Qwen3NextGatedDeltaNet.fix_query_key_value_ordering: .view(..., self.num_k_heads, ...), then split
    Row("in_proj_qkvz", "qwen3_next.Qwen3NextGatedDeltaNet", delta_net_z),
    # qwen3_next/modeling_qwen3_next.py Qwen3NextAttention: torch.chunk(self.q_proj(...).view(*input_shape, -1, self.head_dim * 2), 2, dim=-1)
    Row(
        "q_proj",
        "qwen3_next.Qwen3NextAttention qwen3_5.Qwen3_5Attention qwen3_5_moe.Qwen3_5MoeAttention qwen4_exp.Qwen4ExpTextAttention",
        lambda of: Layout(None, {"q": of("head_dim"), "g": of("head_dim")}),
    ),
    # axk2/modeling_axk2.py AXK2Attention: .view(..., -1, self.qk_head_dim + self.v_head_dim), torch.split(..., [self.qk_head_dim, self.v_head_dim])
    Row(
        "q_gate_proj",
        "axk2.AXK2Attention",
        lambda of: Layout(of("num_heads"), {"q": of("qk_head_dim"), "g": of("v_head_dim")}),
    ),
    # jetmoe/modeling_jetmoe.py JetMoeAttention: self.kv_proj(hidden_states).chunk(2, dim=-1)
    Row("kv_proj", "jetmoe.JetMoeAttention", equal("k", "v")),
    # granite_speech/modeling_granite_speech.py GraniteSpeechConformerAttention: self.to_kv(hidden_states).chunk(2, dim=-1)
    # evolla/modeling_evolla.py EvollaSequenceCompressorAttention: self.to_kv(kv_input).chunk(2, dim=-1)
    Row(
        "to_kv",
        "granite_speech.GraniteSpeechConformerAttention granite_speech_plus.GraniteSpeechPlusConformerAttention "
        "evolla.EvollaSequenceCompressorAttention",
        equal("k", "v"),
    ),
    # deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention: .view(..., -1, qk_nope_head_dim + v_head_dim), torch.split; the others the same
    Row(
        "kv_b_proj",
        "axk1.AXK1Attention axk2.AXK2Attention bailing_hybrid.BailingHybridAttention deepseek_v2.DeepseekV2Attention "
        "deepseek_v3.DeepseekV3Attention deepseek_v32.DeepseekV32Attention dots3_note.Dots3NoteTextAttention glm4_moe_lite.Glm4MoeLiteAttention "
        "glm5_next.Glm5NextTextAttention glm_moe_dsa.GlmMoeDsaAttention hy_v4.HYV4Attention kimi_linear.KimiLinearAttention "
        "longcat_flash.LongcatFlashMLA minicpm3.MiniCPM3Attention mistral4.Mistral4Attention mistral_large4.MistralLarge4TextAttention "
        "youtu.YoutuAttention",
        mla,
    ),
    # phi3/modeling_phi3.py Phi3MLP: gate, up_states = up_states.chunk(2, dim=-1); up_states * self.activation_fn(gate); the others the same
    Row(
        "gate_up_proj",
        "dia.DiaMLP dots3_note.Dots3NoteAudioMLP esmfold2.EsmFold2SwiGLU glm.GlmMLP glm4.Glm4MLP glm4v.Glm4vTextMLP glm_image.GlmImageTextMLP "
        "glm_ocr.GlmOcrTextMLP minimax_m3_vl.MiniMaxM3VLDenseMLP phi3.Phi3MLP phi4_multimodal.Phi4MultimodalMLP zamba2.Zamba2MLP",
        equal("gate", "up"),
    ),
    # phi4_multimodal/modeling_phi4_multimodal.py Phi4MultimodalAudioMLP: up_states, gate = up_states.chunk(2, dim=-1)
    Row("gate_up_proj", "phi4_multimodal.Phi4MultimodalAudioMLP", equal("up", "gate")),
    # mixtral/modeling_mixtral.py MixtralExperts: gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1); the others the same.
    # Stored (E, in, out) in Aria, Llama 4 and OpenAI's privacy filter, which changes nothing here.
    Row(
        "gate_up_proj",
        "afmoe.AfmoeExperts aria.AriaExperts axk1.AXK1Experts axk2.AXK2Experts bailing_hybrid.BailingHybridExperts beam.BeamExperts "
        "cohere2_moe.Cohere2MoeExperts deepseek_ocr2.DeepseekOcr2TextExperts deepseek_v2.DeepseekV2Experts deepseek_v3.DeepseekV3Experts "
        "deepseek_v32.DeepseekV32Experts deepseek_v4.DeepseekV4Experts diffusion_gemma.DiffusionGemmaTextExperts dots1.Dots1Experts "
        "dots3_note.Dots3NoteExperts ernie4_5_moe.Ernie4_5_MoeExperts ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts exaone_moe.ExaoneMoeExperts "
        "flex_olmo.FlexOlmoExperts flint.FlintExperts gemma4.Gemma4TextExperts glm4_moe.Glm4MoeExperts glm4_moe_lite.Glm4MoeLiteExperts "
        "glm4v_moe.Glm4vMoeTextExperts glm5_next.Glm5NextTextExperts glm_moe_dsa.GlmMoeDsaExperts granitemoe.GraniteMoeExperts "
        "granitemoe_swa.GraniteMoeSWAExperts granitemoehybrid.GraniteMoeHybridExperts granitemoeshared.GraniteMoeSharedExperts "
        "hunyuan_v1_moe.HunYuanMoEV1Experts hy_v3.HYV3Experts hy_v4.HYV4Experts inkling.InklingExperts inkling2.Inkling2Experts jamba.JambaExperts "
        "kimi_linear.KimiLinearExperts kolibri1.Kolibri1Experts laguna.LagunaExperts lfm2_moe.Lfm2MoeExperts llama4.Llama4TextExperts "
        "longcat_flash.LongcatFlashExperts mellum.MellumExperts mimo_v2_flash.MiMoV2FlashExperts minimax.MiniMaxExperts minimax_m2.MiniMaxM2Experts "
        "minimax_m3_vl.MiniMaxM3VLExperts mistral4.Mistral4Experts mistral_large4.MistralLarge4TextExperts mixtral.MixtralExperts "
        "muse_spark.MuseSparkExperts olmoe.OlmoeExperts openai_privacy_filter.OpenAIPrivacyFilterExperts phimoe.PhimoeExperts "
        "qwen2_moe.Qwen2MoeExperts qwen3_5_moe.Qwen3_5MoeExperts qwen3_moe.Qwen3MoeExperts qwen3_next.Qwen3NextExperts "
        "qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts qwen3_vl_moe.Qwen3VLMoeTextExperts "
        "qwen4_exp.Qwen4ExpTextExperts solar_open.SolarOpenExperts step3p7.Step3p7Experts unlimited_ocr.UnlimitedOcrTextExperts zaya.ZayaExperts",
        equal("gate", "up"),
    ),
    # gpt_oss/modeling_gpt_oss.py GptOssExperts: gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    Row("gate_up_proj", "gpt_oss.GptOssExperts", alternating("gate", "up")),
    # granitemoeshared/modeling_granitemoeshared.py GraniteMoeSharedMLP: self.activation(chunked[0]) * chunked[1]
    # jetmoe/modeling_jetmoe.py JetMoeMoE: the same, on stacked experts
    Row(
        "input_linear",
        "granitemoeshared.GraniteMoeSharedMLP granitemoehybrid.GraniteMoeHybridMLP granitemoe_swa.GraniteMoeSWAMLP jetmoe.JetMoeMoE",
        equal("gate", "up"),
    ),
    # modernbert/modeling_modernbert.py ModernBertMLP: input, gate = self.Wi(x).chunk(2, dim=-1); self.act(input) * gate: what it calls gate is not
    Row("Wi", "modernbert.ModernBertMLP modernbert_decoder.ModernBertDecoderMLP", equal("gate", "up")),
    # moonshine/modeling_moonshine.py MoonshineDecoderMLP: hidden_states, gate = hidden_states.chunk(2, dim=-1); act(gate) * hidden_states
    Row("fc1", "moonshine.MoonshineDecoderMLP moonshine_streaming.MoonshineStreamingDecoderMLP", equal("up", "gate")),
    # moshi/modeling_moshi.py MoshiGatingMLP: .view(batch_size, sequence_length, 2, -1); act(x[..., 0, :]) * x[..., 1, :]
    Row("fc1", "moshi.MoshiGatingMLP kyutai_speech_to_text.KyutaiSpeechToTextGatingMLP", equal("gate", "up")),
    # clvp/modeling_clvp.py ClvpGatedLinearUnit: hidden_states, gate = self.proj(x).chunk(2, dim=-1); hidden_states * act(gate)
    Row("proj", "clvp.ClvpGatedLinearUnit", equal("up", "gate")),
    # aya_vision/modeling_aya_vision.py AyaVisionMultiModalProjector, cohere2_vision: x, gate = hidden_states.chunk(2, dim=-1); act(gate) * x
    Row(
        "linear_1",
        "aya_vision.AyaVisionMultiModalProjector cohere2_vision.Cohere2VisionMultiModalProjector",
        equal("up", "gate"),
    ),
    # mamba/modeling_mamba.py MambaMixer, falcon_mamba, jamba: hidden_states_B_C, gate = projected_states.chunk(2, dim=1)
    Row("in_proj", "mamba.MambaMixer falcon_mamba.FalconMambaMixer jamba.JambaMambaMixer", equal("x", "z")),
    # zamba/modeling_zamba.py ZambaMambaMixer: projected_states.view(batch_size, -1, 2, seq_len).chunk(2, dim=2): row by row, not halves
    Row("in_proj", "zamba.ZambaMambaMixer", alternating("x", "z")),
)


_BY_NAME = {(row.leaf, name): row for row in TABLE for name in row.classes.split()}


def _row(owner: nn.Module, leaf: str) -> Row | None:
    cls = base_class(type(owner))
    for c in cls.__mro__:
        if (row := _BY_NAME.get((leaf, name_of(c)))) is not None:
            return row if cls.forward is c.__dict__.get("forward") else None
    return None


def name_of(cls: type) -> str:
    """The class as the table names it."""
    home = cls.__module__.split(".")
    if home[:2] == ["transformers", "models"] and len(home) > 3:
        return f"{home[2]}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"
