"""A tiny model, and inputs that it accepts, for every model type of the installed transformers.

    types()           names, such as "llama"
    build(type)       a module with random weights, in eval mode; the same one each time
    inputs(model)     keyword arguments for its forward

Nothing is downloaded. Inputs are found by feed.py. A config's defaults are shrunk by the rules below, which go by the names of the settings, in four
strengths: the first whose model can be built, and run on one of the inputs that we try, is taken. What the rules cannot
know stands in EXCEPTIONS. A part that does not run by itself is cut out of a model that has it.

If the environment variable LORAINJECT_TINY_CONFIGS names a JSON file {type: {"module", "class", "config"}}, then a type's
config from there is tried before the rules.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

from feed import IDS, VOCAB, NoModel, find_inputs, tensors

MOST = 40_000_000  # parameters: beyond that it is not tiny, and the checks would take minutes


# --- configs -----------------------------------------------------------------------------------------------------------

# By a setting's name: what it is. A width shrinks unless it is fixed by the input, or by something else that we keep.
WIDTH = re.compile(
    r"(hidden|embeddings?|intermediate|projection|projector|expert|pooler_output|ffn|mlp|adapter_input|word_embed_proj)_?(size|dim|dimension)s?$"
    r"|(^|_)(d_model|d_ff|d_kv|n_embd|n_inner|dim|dim_head|hidden|width|linear_units|ff_size|ffn_size|num_filters|upsample_groups|channels_list)$"
    r"|(^|_)(bottleneck_features|num_out_features|hidden_size_global|upsample_initial_channel|embed_dim_per_stage)$"
    r"|_(dims?|channels|rank|size_per_head|per_layer_input)$"
)
FIXED = re.compile(
    r"num_channels|in_chans|audio_channels|input_channels|^in_channels|^out_channels|image|patch|input_dim|^input_size|num_mel|feature_size|mel_dim"
    r"|state_size|_d_conv|_d_state|time_|temporal|window|kernel|chunk_size|block_size|codebook_size|^mask_|model_in_dim|bridge|rotary_dim"
    r"|rope_dim|num_pos_feats|partial"
)
LAYERS = re.compile(
    r"(^|_)(num|n)_.*(layers?|blocks?)$|^(encoder|decoder|e|d|n|num)_layers?$|^depth$|_depth$|^layers$|_layers$"
)
NOT_LAYERS = re.compile(
    r"window_layers|feat_extract|tap|residual|kv_shared|mlp_only|no_rope|upscale|feature_layers?|res_blocks|encoder_blocks"
)
HEADS = re.compile(r"(heads|^n_head|_n_head|num_head)$")
SPECIAL = re.compile(
    r"(token|tok)_?(id|index|ids)s?$|_token_id|_start_id$|_end_id$|(eo|bo)[a-z]_index$"
    r"|^(pad|bos|eos|unk|mask|cls|sep|lang|audio|image|video)_(index|id|idx|token)$"
)
PER_LAYER = re.compile(r"layer_types|layers_block_type|block_types")
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")


@dataclass
class Shrink:
    """One strength of shrinking: what happens to widths, and to everything else by name."""

    width: Callable[[int], int]
    heads: int
    mrope: bool
    special: dict[int, int] = field(default_factory=dict)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A smaller copy of a config given as a dict, with the configs inside it."""
        if values.get("model_type") == "timm_backbone":  # that needs another library
            return dict(BACKBONE)
        depth, layers = self.depths(values)
        out = {str(k): self.one(str(k), v, depth, layers) for k, v in values.items() if k not in DERIVED}
        self.agree(values, out)
        return out

    def depths(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """How many layers the model keeps, one of each kind, and how many it had."""
        layers = next((v for k, v in values.items() if k in DEPTH and isinstance(v, int)), 0)
        depth = 2
        for key, v in values.items():
            if isinstance(v, list) and v and PER_LAYER.search(str(key)):
                depth = max(depth, min(4, len(v) if len(v) < layers else len(set(map(str, v)))))
            elif isinstance(v, list) and re.search(r"out_indices|_layers_out$", str(key)) and len(v) < 5:
                depth = max(depth, len(v))
        return depth, layers

    def one(self, key: str, value: Any, depth: int, layers: int) -> Any:
        """One setting, by its name."""
        if key == "per_layer_config" and isinstance(value, Mapping):
            return {k: self(v) for k, v in value.items() if str(k).isdigit() and int(k) < depth}
        if isinstance(value, Mapping):
            return self(value)
        if isinstance(value, list | tuple):
            return self.many(key, list(value), depth, layers)
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if SPECIAL.search(key):
            return self.token(value)
        for pattern, most in AT_MOST.items():
            if re.search(pattern, key):
                return min(value, most)
        if LAYERS.search(key) and not NOT_LAYERS.search(key):
            return min(value, depth)
        if HEADS.search(key):
            return min(value, self.heads)
        return self.width(value) if WIDTH.search(key) and not FIXED.search(key) else value

    def many(self, key: str, value: list[Any], depth: int, layers: int) -> Any:
        """A setting that is a list."""
        if any(isinstance(v, Mapping) for v in value):
            return [self(v) if isinstance(v, Mapping) else v for v in value]
        if SPECIAL.search(key):
            return [self.token(v) for v in value]
        if layers and len(value) == layers > depth:  # one entry a layer: one of each kind, in order
            new = [i for i, v in enumerate(value) if v not in value[:i]][:depth]
            return [value[i] for i in sorted([*new, *[i for i in range(layers) if i not in new][: depth - len(new)]])]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return value
        if HEADS.search(key):  # of a hierarchy, whose widths double
            return [min(v, 2) if self.heads <= 4 else v for v in value]
        if re.search(r"out_indices$|_layers_out$", key):
            return (
                list(range(depth - len(value) + 1, depth + 1))
                if value and max(value) > depth >= len(value) and layers
                else value
            )
        if re.search(r"indexes$|_indices$|feature_layers?$|layer_ids$", key):
            return [v if v < 0 else min(v, depth - 1) for v in value]
        if re.search(r"^depths$|_depths$|num_blocks$|blocks_per_stage|numb_of_layers", key):
            return [min(v, 2) for v in value]
        if re.search(r"^(image|img|input)_size$", key):
            return [min(v, 64) for v in value]
        return [self.width(v) for v in value] if WIDTH.search(key) and not FIXED.search(key) else value

    def token(self, value: Any) -> Any:
        """A special token's id, within the small vocabulary and out of the way of ordinary tokens; equal ones stay equal."""
        if not isinstance(value, int) or value < 5:
            return value
        return self.special.setdefault(value, IDS[1] + len(self.special) % (VOCAB - IDS[1]))

    def agree(self, old: Mapping[str, Any], out: dict[str, Any]) -> None:
        """What must fit together."""
        number = {k: v for k, v in out.items() if isinstance(v, int) and not isinstance(v, bool)}.get
        hidden, heads = number("hidden_size", 0), number("num_attention_heads", 0)
        if hidden and heads:
            heads = out["num_attention_heads"] = next(h for h in range(heads, 0, -1) if hidden % h == 0)
            if out.get("head_dim", 0) is None:
                out["head_dim"] = hidden // heads
        if heads and "num_key_value_heads" in out and not isinstance(out["num_key_value_heads"], list):
            kv = old["num_key_value_heads"]
            out["num_key_value_heads"] = (
                heads if kv in (None, old["num_attention_heads"]) else 1 if kv == 1 else max(1, heads // 2)
            )
        if number("head_dim") and number("decoder_attention_heads") and number("d_model"):
            out["head_dim"] = out["d_model"] // out["decoder_attention_heads"]
        nope, rope = number("qk_nope_head_dim"), number("qk_rope_head_dim")
        if nope and rope:
            whole = old.get("head_dim") == old["qk_nope_head_dim"] + old["qk_rope_head_dim"]
            out |= {
                k: nope + rope for k in ("qk_head_dim", "swa_head_dim", *(["head_dim"] if whole else [])) if k in out
            }
        elif nope and number("head_dim"):
            out["qk_nope_head_dim"] = out["head_dim"] // 2
        for count, size, expand in STATES:
            if count in out and expand in out and hidden:
                out[count], out[size] = 4, int(hidden * out[expand]) // 4
                out |= {k: min(out[k], 2) for k in ("n_groups", "mamba_n_groups", "mamba_ngroups") if number(k)}
        if number("image_embedding_size") and number("patch_size"):
            out["image_embedding_size"] = out["image_size"] // out["patch_size"]
        ropes = [out.get("rope_parameters"), out.get("rope_scaling"), *(out.get("rope_parameters") or {}).values()]
        for each in ropes:
            if (
                isinstance(each, dict)
                and hidden
                and heads
                and ("mrope_section" in each or (self.mrope and "rope_theta" in each))
            ):
                partial = each.get("partial_rotary_factor") or out.get("partial_rotary_factor") or 1
                half = int((out.get("head_dim") or hidden // heads) * partial) // 2
                each["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        if out.get("use_timm_backbone"):
            out |= {
                "use_timm_backbone": False,
                "backbone": None,
                "backbone_config": out.get("backbone_config") or dict(BACKBONE),
            }


STATES = (  # heads x size of a head = expand x hidden_size
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("num_heads", "head_dim", "expand"), ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)  # fmt: skip
# At most this much, whatever the strength.
AT_MOST = {
    r"vocab_size|^num_embeds$": VOCAB, r"(^|_)(num|n)_.*experts$": 4, r"experts_per_tok|^(moe_)?top_?k(_experts)?$|moe_k$": 2,
    r"^n_group$|topk_group|num_expert_groups?$": 1, r"first_k_dense_replace": 1, r"num_kv_shared_layers": 0, r"mm_tokens_per_image": 4,
    r"max_(target_|2d_)?position|n_positions|max_seq_len|^n_ctx$|seq_length$|max_sequence_length": 128, r"max_source_positions": 40,
    r"^(image|img|input|max_image|pretrain_image)_size$": 64, r"^num_(queries|query_tokens|latents)$": 8,
}  # fmt: skip
DERIVED = (
    "out_features",
    "stage_names",
    "_out_features",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
)
BACKBONE = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip


def strengths(mrope: bool) -> Iterator[tuple[str, Shrink]]:
    """From tiny to hardly shrunk. `mrope`: whether the model reads `mrope_section`, which must fit the heads."""
    yield "tiny", Shrink(lambda v: min(v, 32), 4, mrope)
    yield "scaled", Shrink(lambda v: v if v <= 16 else max(16, v // 16 // 8 * 8), 4, mrope)
    yield "eighth", Shrink(lambda v: v if v <= 8 else max(8, v // 8), 1 << 10, mrope)
    yield "short", Shrink(lambda v: v, 1 << 10, mrope)


# --- which class -------------------------------------------------------------------------------------------------------


def types() -> list[str]:
    """All model types that transformers knows, in order."""
    return sorted(CONFIG_MAPPING_NAMES)


def model_class(model_type: str) -> type[nn.Module]:
    """The base model's class; for a type that has none, another one with this config: a model for a task, or a mere part of one."""
    config = CONFIG_MAPPING[model_type]
    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    for mapping in [
        "MODEL_MAPPING_NAMES",
        *sorted(m for m in vars(modeling_auto) if m.startswith("MODEL_FOR_") and m.endswith("_MAPPING_NAMES")),
    ]:
        name = vars(modeling_auto)[mapping].get(model_type)
        if (
            name is not None
            and (cls := getattr(transformers, name if isinstance(name, str) else name[-1], None)) is not None
        ):
            return cls
    package = importlib.import_module(config.__module__.rpartition(".")[0])
    found = []
    for path in sorted(os.listdir(os.path.dirname(str(package.__file__)))):
        if path.startswith("modeling_") and path.endswith(".py"):
            module = importlib.import_module(f"{package.__name__}.{path[:-3]}")
            found += [
                c
                for c in vars(module).values()
                if inspect.isclass(c) and issubclass(c, nn.Module) and c.__module__ == module.__name__
            ]
    ours = [
        c
        for c in found
        if issubclass(c, transformers.PreTrainedModel)
        and c.config_class is config
        and not c.__name__.endswith("PreTrainedModel")
    ]
    ours = ours or [
        c
        for c in found
        if "config" in (p := inspect.signature(c.__init__).parameters) and _annotation(p["config"]) == config.__name__
    ]
    if not ours:
        raise NoModel("no class of transformers takes this config")
    stem = config.__name__.removesuffix("Config")
    return min(
        ours,
        key=lambda c: (
            c.__name__ not in (f"{stem}Model", stem),
            "For" in c.__name__,
            not c.__name__.startswith(stem),
            len(c.__name__),
        ),
    )


def _annotation(parameter: inspect.Parameter) -> str:
    return getattr(parameter.annotation, "__name__", str(parameter.annotation)).split("|")[0].strip()


def configs(model_type: str) -> Iterator[tuple[str, type[nn.Module], Any]]:
    """(strength, class, config) to be tried in this order."""
    if model_type in TINY_CONFIGS():
        entry = TINY_CONFIGS()[model_type]
        cls = getattr(importlib.import_module(entry["module"]), entry["class"])
        yield "given", cls, cls.config_class(**{k: v for k, v in entry["config"].items() if k != "model_type"})
    cls, config = model_class(model_type), CONFIG_MAPPING[model_type]
    for name, shrink in strengths("mrope_section" in inspect.getsource(sys.modules[cls.__module__])):
        try:
            values = config(**COMPOSITES.get(model_type, dict)()).to_dict()
            yield name, cls, config.from_dict(_laid_over(shrink(values), EXCEPTIONS.get(model_type, {})))
        except Exception as e:
            yield name, cls, e


def _laid_over(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the changes, which may reach into configs inside: {"text_config": {"head_dim": 8}}."""
    return {
        **values,
        **{k: _laid_over(values.get(k) or {}, v) if isinstance(v, Mapping) else v for k, v in changes.items()},
    }


@functools.cache
def TINY_CONFIGS() -> dict[str, Any]:
    path = os.environ.get("LORAINJECT_TINY_CONFIGS")
    return json.load(open(path)) if path else {}


def _parts(**names: str) -> dict[str, Any]:
    """Configs of two types, for a model made of two models; `decoder` is one that looks at the other's output."""
    return {
        key: CONFIG_MAPPING[name](**{"is_decoder": True, "add_cross_attention": True} if key == "decoder" else {})
        for key, name in names.items()
    }


COMPOSITES: dict[str, Callable[[], dict[str, Any]]] = {
    "encoder-decoder": lambda: _parts(encoder="bert", decoder="bert"),
    "vision-encoder-decoder": lambda: _parts(encoder="vit", decoder="gpt2"),
    "speech-encoder-decoder": lambda: _parts(encoder="wav2vec2", decoder="bert"),
    "vision-text-dual-encoder": lambda: _parts(vision_config="vit", text_config="bert"),
    "rag": lambda: _parts(question_encoder="dpr", generator="bart"),
}
CLASSES = {  # where the base model is not the one to run
    "musicgen": "MusicgenForConditionalGeneration", "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "speecht5": "SpeechT5ForSpeechToText",
}  # fmt: skip
_SHAPE = {"coordinate_size": 6, "shape_size": 4}
_SERIES = {"prediction_length": 4, "context_length": 16}
_NARROW = {"width_coefficient": 0.25, "depth_coefficient": 0.25}
_CLAP = {"spec_size": 64, "num_mel_bins": 16, "patch_size": 2, "patch_stride": 2, "depths": [2, 2], "num_attention_heads": [2, 2],
         "patch_embeds_hidden_size": 16, "hidden_size": 32, "freq_ratio": 2, "window_size": 4}  # fmt: skip
_HIERA = {
    "hidden_size": 12,
    "image_size": [128, 128],
    "embed_dim_per_stage": [12, 24, 48, 96],
    "blocks_per_stage": [1, 2, 7, 2],
}
_SAM2 = {
    "backbone_config": _HIERA,
    "backbone_channel_list": [96, 48, 24, 12],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 32,
}
_SAM2_ALL = {"vision_config": _SAM2, "prompt_encoder_config": {"image_size": 128}, "image_size": 128}
_WIDE = {"hidden_size": 128, "num_attention_heads": 4}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_TWO_ROPES = {
    "layer_types": ["full_attention", "sliding_attention"],
    "head_dim": 8,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000, "mrope_section": [1, 1, 2]},
        "sliding_attention": None,
    },
}
_ZAMBA = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": {"vision_config": _NARROW}, "align_vision_model": _NARROW, "efficientnet": _NARROW,
    "aria": {"projector_patch_to_query_dict": {4: 4, 16: 4}},
    "autoformer": _SERIES, "informer": _SERIES, "time_series_transformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 90}, "instructblip": {"image_token_index": 90}, "instructblipvideo": {"video_token_index": 90},
    "blt": {"encoder_hash_byte_group_vocab": 64, **{f"{part}_config": {"head_dim": 8} for part in ("patcher", "encoder", "decoder", "global")}},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGBAZ": 91}},
    "clap": {"audio_config": _CLAP}, "clap_audio_model": _CLAP,
    "clvp": {"text_config": _WIDE, "speech_config": _WIDE}, "clvp_encoder": _WIDE,
    "cohere_compass": {"text_config": _TWO_ROPES}, "cohere_compass_text": _TWO_ROPES,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": None, "topk_group": None, "topk_method": "greedy"},
    "deepseek_ocr2": {"text_config": _SPARSE}, "deepseek_ocr2_text": _SPARSE,
    "depth_pro": {"patch_size": 64},
    "diffusion_gemma": {"text_config": _EXPERTS}, "diffusion_gemma_text": _EXPERTS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token000000|>": 92}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 2]}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv2": _SHAPE, "layoutlmv3": _SHAPE, "layoutxlm": _SHAPE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lighton_ocr": {"vision_config": {"head_dim": 8}},
    "lw_detr": {"projector_scale_factors": [1.0], "num_feature_levels": 1},
    "llama4": {"vision_config": {"intermediate_size": 128}}, "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 25, "class_order": list(range(25))},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "rag": {"n_docs": 2},
    "sam2": _SAM2_ALL, "sam2_hiera_det_model": _HIERA, "sam2_video": _SAM2_ALL, "sam2_vision_model": _SAM2,
    "seggpt": {"merge_index": 0, "image_size": [64, 32], "pretrain_image_size": 32},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "step3p5": {"sliding_window": 16}, "step3p7": {"text_config": {"sliding_window": 16}},
    "t5gemma2_decoder": {"dropout_rate": 0.0}, "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}}, "t5gemma2_text": {"dropout_rate": 0.0},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 16, "num_frames": 2},
    "xclip_vision_model": {"num_frames": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": _ZAMBA},
}  # fmt: skip


# --- building ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What was found to work for a type."""

    strength: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Any]


@functools.cache
def recipe(model_type: str) -> Recipe:
    """The first config that builds and runs, and the inputs with which it does."""
    reasons: dict[str, None] = {}
    try:
        for strength, cls, config in configs(model_type):
            try:
                if isinstance(config, Exception):
                    raise config
                return Recipe(strength, functools.partial(_make, cls, config), find_inputs(_make(cls, config)))
            except Exception as e:
                reasons[_said(e)] = None
    except Exception as e:  # no class, or a library that is not there
        reasons[_said(e)] = None
    try:
        return within_another(model_type)
    except NoModel as e:
        raise NoModel("; ".join([*list(reasons)[:2], *([] if reasons else [_said(e)])])) from None


def _said(e: Exception) -> str:
    text = " ".join(str(e).split())[:200]
    return text if isinstance(e, NoModel) else f"{type(e).__name__}: {text}"


def within_another(model_type: str) -> Recipe:
    """A part that does not run on inputs that we know: cut out of a model that has it, with the inputs that it gets there."""
    config, package = CONFIG_MAPPING[model_type], model_type_to_module_name(model_type)
    for other in types():
        if (
            other == model_type
            or model_type_to_module_name(other) != package
            or config not in _inner(CONFIG_MAPPING[other])
        ):
            continue
        try:
            model = build(other)
        except NoModel:
            continue
        caught: list[tuple[str, dict[str, Any]]] = []
        handles = []
        for path, module in model.named_modules():
            if (path and type(getattr(module, "config", None)) is config) or type(
                module
            ).__name__ == config.__name__.removesuffix("Config"):
                handles.append(
                    module.register_forward_pre_hook(functools.partial(_catch, caught, path), with_kwargs=True)
                )
        with torch.no_grad():
            model(**inputs(model))
        for handle in handles:
            handle.remove()
        if caught:
            path, given = caught[0]
            if not _runs(model.get_submodule(path), given):
                continue
            return Recipe(f"within {other}", functools.partial(_part, other, path), given)
    raise NoModel("no model that we can run has it as a part")


def _part(model_type: str, path: str) -> nn.Module:
    return copy.deepcopy(build(model_type).get_submodule(path))


def _inner(config: Any) -> list[Any]:
    """The classes of the configs inside, however deep."""
    subs = list((getattr(config, "sub_configs", None) or {}).values())
    return [*subs, *(c for sub in subs if inspect.isclass(sub) for c in _inner(sub))]


def _catch(caught: list[tuple[str, dict[str, Any]]], path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    given = {k: v for k, v in bound.items() if k != "self"}
    given |= given.pop("kwargs", {})
    caught.append((path, {k: copy.deepcopy(v.detach() if isinstance(v, Tensor) else v) for k, v in given.items()}))


def _runs(model: nn.Module, given: Mapping[str, Any]) -> bool:
    try:
        with torch.no_grad():
            return any(True for _ in tensors(model(**copy.deepcopy(dict(given)))))
    except Exception:
        return False


def build(model_type: str) -> nn.Module:
    """A tiny model of this type, in eval mode, the same one each time. Raises NoModel."""
    found = recipe(model_type)
    model = found.make()
    _INPUTS[model] = found.inputs
    return model


def inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that this model's forward accepts; of a model that `build` made."""
    return copy.deepcopy(_INPUTS[model])


_INPUTS: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def _make(cls: type[nn.Module], config: Any) -> nn.Module:
    config = copy.deepcopy(config)
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        except (NotImplementedError, RuntimeError):  # computes with values while it is built: the real one will tell
            size = 0
    if size > MOST:
        raise NoModel(f"{size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if (
                not name.endswith("bias") and p.numel() and not p.any()
            ):  # a zero weight, or gate, would hide the gradients of all that lies before it
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return model
