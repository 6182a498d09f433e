"""A tiny model, and inputs that it accepts, for every model type of the installed transformers.

    types()           names, such as "llama"
    build(type)       a module with random weights, in eval mode; the same one each time. "bert:BertForMaskedLM" names
                      a class for a task, instead of the base model
    inputs(model)     keyword arguments for its forward

Nothing is downloaded, and feed.py finds the inputs. The default config of a type is shrunk by rules that go by the
names of the settings, in four strengths. The first strength whose model can be built, and runs on some inputs, is
taken. What the rules cannot know is in EXCEPTIONS. A part that does not run by itself is cut out of a model that has
it.

If the environment variable LORAINJECT_TINY_CONFIGS names a JSON file {type: {"module", "class", "config"}}, the config
in it is tried before the rules.
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
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

from feed import IDS, VOCAB, NoModel, find_inputs, tensors

MAX_PARAMETERS = 40_000_000  # larger models are not tiny, and the checks would take minutes


# --- configs ----------------------------------------------------------------------------------------------------------

# Patterns that tell by the name of a setting what it is. A width is shrunk unless FIXED says that it depends on the
# input, or on something else that keeps its size.
WIDTH = re.compile(
    r"(hidden|embeddings?|intermediate|projection|projector|expert|pooler_output|ffn|mlp|adapter_input|word_embed_proj)"
    r"_?(size|dim|dimension)s?$"
    r"|(^|_)(d_model|d_ff|d_kv|n_embd|n_inner|dim|dim_head|hidden|width|linear_units|ff_size|ffn_size|num_filters)$"
    r"|(^|_)(upsample_groups|channels_list)$"
    r"|(^|_)(bottleneck_features|num_out_features|hidden_size_global|upsample_initial_channel|embed_dim_per_stage)$"
    r"|_(dims?|channels|rank|size_per_head|per_layer_input)$"
)
FIXED = re.compile(
    r"num_channels|in_chans|audio_channels|input_channels|^in_channels|^out_channels|image|patch|input_dim|^input_size"
    r"|num_mel|feature_size|mel_dim|state_size|_d_conv|_d_state|time_|temporal|window|kernel|chunk_size|block_size"
    r"|codebook_size|^mask_|model_in_dim|bridge|rotary_dim|rope_dim|num_pos_feats|partial"
)
LAYERS = re.compile(
    r"(^|_)(num|n)_.*(layers?|blocks?)$|^(encoder|decoder|e|d|n|num)_layers?$|^depth$|_depth$|^layers$|_layers$"
)
NOT_LAYERS = re.compile(
    r"window_layers|feat_extract|tap|residual|kv_shared|mlp_only|no_rope|upscale|feature_layers?|res_blocks"
    r"|encoder_blocks"
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
    """One strength of shrinking a config."""

    width: Callable[[int], int]
    """Returns the smaller width."""
    heads: int
    """The largest number of attention heads."""
    mrope: bool
    """True if the model reads `mrope_section`, which must fit the heads."""
    special: dict[int, int] = field(default_factory=dict)
    """The new ids of special tokens."""

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a smaller copy of a config, which is given as a dict, with the configs inside it."""
        if values.get("model_type") == "timm_backbone":  # needs another library
            return dict(BACKBONE)
        depth, layers = self.depths(values)
        out = {str(k): self.one(str(k), v, depth, layers) for k, v in values.items() if k not in DERIVED}
        self.agree(values, out)
        return out

    def depths(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """Return the number of layers that the model keeps, enough for one of each kind, and the number that it had."""
        layers = next((v for k, v in values.items() if k in DEPTH and isinstance(v, int)), 0)
        depth = 2
        for key, v in values.items():
            if isinstance(v, list) and v and PER_LAYER.search(str(key)):
                depth = max(depth, min(4, len(v) if len(v) < layers else len(set(map(str, v)))))
            elif isinstance(v, list) and re.search(r"out_indices|_layers_out$", str(key)) and len(v) < 5:
                depth = max(depth, len(v))
        return depth, layers

    def one(self, key: str, value: Any, depth: int, layers: int) -> Any:
        """Return the smaller value of one setting."""
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
        """Return the smaller value of a setting that is a list."""
        if any(isinstance(v, Mapping) for v in value):
            return [self(v) if isinstance(v, Mapping) else v for v in value]
        if SPECIAL.search(key):
            return [self.token(v) for v in value]
        if layers and len(value) == layers > depth:  # one entry per layer: keep one of each kind, in order
            kinds = [i for i, v in enumerate(value) if v not in value[:i]][:depth]
            others = [i for i in range(layers) if i not in kinds][: depth - len(kinds)]
            return [value[i] for i in sorted(kinds + others)]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return value
        if HEADS.search(key):  # the stages of a hierarchy, whose widths double
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
        """Return a special token's id in the small vocabulary, away from ordinary tokens. Equal ids stay equal."""
        if not isinstance(value, int) or value < 5:
            return value
        return self.special.setdefault(value, IDS[1] + len(self.special) % (VOCAB - IDS[1]))

    def agree(self, old: Mapping[str, Any], out: dict[str, Any]) -> None:
        """Make settings fit together that depend on each other."""
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
            names = ("qk_head_dim", "swa_head_dim", *(["head_dim"] if whole else []))
            out |= {name: nope + rope for name in names if name in out}
        elif nope and number("head_dim"):
            out["qk_nope_head_dim"] = out["head_dim"] // 2
        for count, size, expand in STATES:
            if count in out and expand in out and hidden:
                out[count], out[size] = 4, int(hidden * out[expand]) // 4
                out |= {k: min(out[k], 2) for k in ("n_groups", "mamba_n_groups", "mamba_ngroups") if number(k)}
        if number("image_embedding_size") and number("patch_size"):
            out["image_embedding_size"] = out["image_size"] // out["patch_size"]
        ropes = [out.get("rope_parameters"), out.get("rope_scaling"), *(out.get("rope_parameters") or {}).values()]
        for rope_settings in ropes:
            if not isinstance(rope_settings, dict) or not hidden or not heads:
                continue
            if "mrope_section" in rope_settings or (self.mrope and "rope_theta" in rope_settings):
                partial = rope_settings.get("partial_rotary_factor") or out.get("partial_rotary_factor") or 1
                half = int((out.get("head_dim") or hidden // heads) * partial) // 2
                rope_settings["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        if out.get("use_timm_backbone"):
            out |= {
                "use_timm_backbone": False,
                "backbone": None,
                "backbone_config": out.get("backbone_config") or dict(BACKBONE),
            }


STATES = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"), ("num_heads", "head_dim", "expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"), ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)  # fmt: skip
"""Names of settings with heads x size of a head = expand x hidden_size."""
AT_MOST = {
    r"vocab_size|^num_embeds$": VOCAB, r"(^|_)(num|n)_.*experts$": 4,
    r"experts_per_tok|^(moe_)?top_?k(_experts)?$|moe_k$": 2, r"^n_group$|topk_group|num_expert_groups?$": 1,
    r"first_k_dense_replace": 1, r"num_kv_shared_layers": 0, r"mm_tokens_per_image": 4,
    r"max_(target_|2d_)?position|n_positions|max_seq_len|^n_ctx$|seq_length$|max_sequence_length": 128,
    r"max_source_positions": 40, r"^(image|img|input|max_image|pretrain_image)_size$": 64,
    r"^num_(queries|query_tokens|latents)$": 8,
}  # fmt: skip
"""The largest value of settings whose names match, in every strength."""
DERIVED = (
    "out_features", "stage_names", "_out_features", "transformers_version", "architectures", "dtype", "torch_dtype",
    "id2label", "label2id",
)  # fmt: skip
"""Settings that follow from others."""
BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip


def strengths(mrope: bool) -> Iterator[tuple[str, Shrink]]:
    """Yield the strengths with their names, from tiny to hardly smaller."""
    yield "tiny", Shrink(lambda v: min(v, 32), 4, mrope)
    yield "scaled", Shrink(lambda v: v if v <= 16 else max(16, v // 16 // 8 * 8), 4, mrope)
    yield "eighth", Shrink(lambda v: v if v <= 8 else max(8, v // 8), 1 << 10, mrope)
    yield "short", Shrink(lambda v: v, 1 << 10, mrope)


# --- which class ------------------------------------------------------------------------------------------------------


def types() -> list[str]:
    """Return all model types that transformers knows, sorted."""
    return sorted(CONFIG_MAPPING_NAMES)


def model_class(model_type: str) -> type[nn.Module]:
    """Return the class of the base model; for a type that has none, a model for a task, or a part of a model, with its
    config."""
    model_type, _, name = model_type.partition(":")
    config = CONFIG_MAPPING[model_type]
    if name:
        return next(cls for cls in task_classes(model_type) if cls.__name__ == name)
    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    tasks = sorted(m for m in vars(modeling_auto) if m.startswith("MODEL_FOR_") and m.endswith("_MAPPING_NAMES"))
    for mapping in ["MODEL_MAPPING_NAMES", *tasks]:
        name = vars(modeling_auto)[mapping].get(model_type)
        if name is None:
            continue
        if (cls := getattr(transformers, name if isinstance(name, str) else name[-1], None)) is not None:
            return cls
    classes = list(_module_classes(importlib.import_module(config.__module__.rpartition(".")[0])))
    matching = [
        c
        for c in classes
        if issubclass(c, transformers.PreTrainedModel)
        and c.config_class is config
        and not c.__name__.endswith("PreTrainedModel")
    ]
    matching = matching or [c for c in classes if _takes_config(c, config)]
    if not matching:
        raise NoModel("no class of transformers takes this config")
    stem = config.__name__.removesuffix("Config")

    def rank(cls: type[nn.Module]) -> tuple[object, ...]:
        name = cls.__name__
        return name not in (f"{stem}Model", stem), "For" in name, not name.startswith(stem), len(name)

    return min(matching, key=rank)


def task_classes(model_type: str) -> list[type[nn.Module]]:
    """Return the classes of a type that were made for a task, with a head each."""
    config = CONFIG_MAPPING[model_type.partition(":")[0]]
    try:
        classes = _module_classes(importlib.import_module(config.__module__.rpartition(".")[0]))
        return [
            c
            for c in classes
            if issubclass(c, transformers.PreTrainedModel)
            and c.config_class is config
            and re.search("For[A-Z]|Head", c.__name__)
        ]
    except ImportError:
        return []


def _module_classes(package: ModuleType) -> Iterator[type[nn.Module]]:
    """Yield the module classes that are defined in the modeling files of a package."""
    for path in sorted(os.listdir(os.path.dirname(str(package.__file__)))):
        if path.startswith("modeling_") and path.endswith(".py"):
            module = importlib.import_module(f"{package.__name__}.{path[:-3]}")
            for c in vars(module).values():
                if inspect.isclass(c) and issubclass(c, nn.Module) and c.__module__ == module.__name__:
                    yield c


def _takes_config(cls: type[nn.Module], config: type) -> bool:
    """True if the constructor's `config` is annotated as this class of configs."""
    parameters = inspect.signature(cls.__init__).parameters
    return "config" in parameters and _annotation(parameters["config"]) == config.__name__


def _annotation(parameter: inspect.Parameter) -> str:
    return getattr(parameter.annotation, "__name__", str(parameter.annotation)).split("|")[0].strip()


def configs(model_type: str) -> Iterator[tuple[str, type[nn.Module], Any]]:
    """Yield the strength, the class and the config of each attempt; an exception in place of a config that failed."""
    if model_type in tiny_configs():
        entry = tiny_configs()[model_type]
        cls = getattr(importlib.import_module(entry["module"]), entry["class"])
        yield "from the file", cls, cls.config_class(**{k: v for k, v in entry["config"].items() if k != "model_type"})
    cls = model_class(model_type)
    model_type = model_type.partition(":")[0]
    config = CONFIG_MAPPING[model_type]
    for name, shrink in strengths("mrope_section" in inspect.getsource(sys.modules[cls.__module__])):
        try:
            values = config(**COMPOSITES.get(model_type, dict)()).to_dict()
            yield name, cls, config.from_dict(overlay(shrink(values), EXCEPTIONS.get(model_type, {})))
        except Exception as e:
            yield name, cls, e


def overlay(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes, which may concern configs inside: {"text_config": {"head_dim": 8}}."""
    inner = {k: overlay(values.get(k) or {}, v) if isinstance(v, Mapping) else v for k, v in changes.items()}
    return values | inner


@functools.cache
def tiny_configs() -> dict[str, Any]:
    """Return the configs of the file that LORAINJECT_TINY_CONFIGS names."""
    path = os.environ.get("LORAINJECT_TINY_CONFIGS")
    return json.load(open(path)) if path else {}


def _parts(**names: str) -> dict[str, Any]:
    """Return configs for a model that consists of two models. The one called `decoder` gets cross-attention."""
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
CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "speecht5": "SpeechT5ForSpeechToText",
}
"""Types whose base model is not the one to run."""
_SHAPE = {"coordinate_size": 6, "shape_size": 4}
_SERIES = {"prediction_length": 4, "context_length": 16}
_NARROW = {"width_coefficient": 0.25, "depth_coefficient": 0.25}
_CLAP = {
    "spec_size": 64, "num_mel_bins": 16, "patch_size": 2, "patch_stride": 2, "depths": [2, 2],
    "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16, "hidden_size": 32, "freq_ratio": 2, "window_size": 4,
}  # fmt: skip
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
EXCEPTIONS: dict[str, dict[str, Any]] = {  # changes to the shrunk config of a type
    "align": {"vision_config": _NARROW}, "align_vision_model": _NARROW, "efficientnet": _NARROW,
    "aria": {"projector_patch_to_query_dict": {4: 4, 16: 4}},
    "autoformer": _SERIES, "informer": _SERIES, "time_series_transformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 90}, "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{f"{part}_config": {"head_dim": 8} for part in ("patcher", "encoder", "decoder", "global")},
    },
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGBAZ": 91}},
    "clap": {"audio_config": _CLAP}, "clap_audio_model": _CLAP,
    "clvp": {"text_config": _WIDE, "speech_config": _WIDE}, "clvp_encoder": _WIDE,
    "cohere_compass": {"text_config": _TWO_ROPES}, "cohere_compass_text": _TWO_ROPES,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": None, "topk_group": None,
                    "topk_method": "greedy"},
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
    "llama4": {"vision_config": {"intermediate_size": 128}},
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32},
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
    "t5gemma2_decoder": {"dropout_rate": 0.0}, "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 16, "num_frames": 2},
    "xclip_vision_model": {"num_frames": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": _ZAMBA},
}  # fmt: skip


# --- building ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to build a model of a type that runs, and on which inputs."""

    strength: str
    """The strength of shrinking, or the type of which the model is a part."""
    build: Callable[[], nn.Module]
    inputs: dict[str, Any]


@functools.cache
def recipe(model_type: str) -> Recipe:
    """Return the first config whose model can be built and runs, with the inputs. Raise NoModel if there is none."""
    reasons: dict[str, None] = {}
    try:
        for strength, cls, config in configs(model_type):
            try:
                if isinstance(config, Exception):
                    raise config
                return Recipe(strength, functools.partial(make, cls, config), find_inputs(make(cls, config)))
            except Exception as e:
                reasons[_message(e)] = None
    except Exception as e:  # there is no class, or a library is missing
        reasons[_message(e)] = None
    try:
        return within_another(model_type)
    except NoModel as e:
        raise NoModel("; ".join([*list(reasons)[:2], *([] if reasons else [_message(e)])])) from None


def _message(e: Exception) -> str:
    text = " ".join(str(e).split())[:200]
    return text if isinstance(e, NoModel) else f"{type(e).__name__}: {text}"


def within_another(model_type: str) -> Recipe:
    """Cut a part out of a model that has it, with the inputs that it gets there. Raise NoModel if none has it."""
    if ":" in model_type:
        raise NoModel("a class for a task is no part of another model")
    config, package = CONFIG_MAPPING[model_type], model_type_to_module_name(model_type)
    name = config.__name__.removesuffix("Config")
    for other in types():
        if other == model_type or model_type_to_module_name(other) != package:
            continue
        if config not in _inner_configs(CONFIG_MAPPING[other]):
            continue
        try:
            model = build(other)
        except NoModel:
            continue
        calls: list[tuple[str, dict[str, Any]]] = []
        hooks = [
            module.register_forward_pre_hook(functools.partial(_record_call, calls, path), with_kwargs=True)
            for path, module in model.named_modules()
            if (path and type(getattr(module, "config", None)) is config) or type(module).__name__ == name
        ]
        with torch.no_grad():
            model(**inputs(model))
        for hook in hooks:
            hook.remove()
        if calls:
            path, arguments = calls[0]
            if _runs(model.get_submodule(path), arguments):
                return Recipe(f"within {other}", functools.partial(_part, other, path), arguments)
    raise NoModel("no model that runs here has it as a part")


def _part(model_type: str, path: str) -> nn.Module:
    return copy.deepcopy(build(model_type).get_submodule(path))


def _inner_configs(config: Any) -> list[Any]:
    """Return the classes of all configs inside a config."""
    subs = list((getattr(config, "sub_configs", None) or {}).values())
    return [*subs, *(c for sub in subs if inspect.isclass(sub) for c in _inner_configs(sub))]


def _record_call(calls: list[tuple[str, dict[str, Any]]], path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Note the arguments of a forward, by name; a forward pre-hook."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    arguments = {k: v for k, v in bound.items() if k != "self"}
    arguments |= arguments.pop("kwargs", {})
    copies = {k: copy.deepcopy(v.detach() if isinstance(v, Tensor) else v) for k, v in arguments.items()}
    calls.append((path, copies))


def _runs(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    try:
        with torch.no_grad():
            return any(True for _ in tensors(model(**copy.deepcopy(dict(arguments)))))
    except Exception:
        return False


def build(model_type: str) -> nn.Module:
    """Return a tiny model of this type in eval mode, the same one each time. Raise NoModel if none runs."""
    how = recipe(model_type)
    model = how.build()
    _INPUTS[model] = how.inputs
    return model


def inputs(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments for the forward of a model that `build` returned."""
    return copy.deepcopy(_INPUTS[model])


_INPUTS: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def make(cls: type[nn.Module], config: Any) -> nn.Module:
    """Build a model with the same random weights each time. Raise NoModel if it is too large."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        except (NotImplementedError, RuntimeError):  # the constructor computes with values
            size = 0
    if size > MAX_PARAMETERS:
        raise NoModel(f"{size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            # A weight or a gate that is zero would hide the gradients of everything before it.
            if not name.endswith("bias") and p.numel() and not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return model
