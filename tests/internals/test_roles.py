"""Roles in architectures with very different names: seventeen written down by hand, the others by what holds for
any."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from lorainject.targets.fused_layouts import fused_parts, is_fused
from lorainject.targets.roles import PART_ROLES, ROLES, role_names

transformers = pytest.importorskip("transformers")

# From the modeling files: the end of the path -> roles. Where one name occurs in two places, the path is longer.
A, M = "attention", "mlp"
BY_HAND: dict[str, dict[str, set[str]]] = {
    "llama": {
        "self_attn.q_proj": {A, "query"}, "self_attn.k_proj": {A, "key"}, "self_attn.v_proj": {A, "value"},
        "self_attn.o_proj": {A, "output"}, "mlp.gate_proj": {M}, "mlp.up_proj": {M}, "mlp.down_proj": {M},
    },
    "gpt2": {"attn.c_attn": {A}, "attn.c_proj": {A, "output"}, "mlp.c_fc": {M}, "mlp.c_proj": {M}},
    "bert": {
        "attention.self.query": {A, "query"}, "attention.self.key": {A, "key"}, "attention.self.value": {A, "value"},
        "attention.output.dense": {A, "output"}, "intermediate.dense": {M}, "layer.output.dense": {M}, "pooler.dense":
        set(),
    },
    "albert": {
        "attention.query": {A, "query"}, "attention.key": {A, "key"}, "attention.value": {A, "value"},
        "attention.dense": {A, "output"}, "ffn": {M}, "ffn_output": {M}, "embedding_hidden_mapping_in": set(), "pooler":
        set(),
    },
    "t5": {
        "SelfAttention.q": {A, "query"}, "SelfAttention.k": {A, "key"}, "SelfAttention.v": {A, "value"},
        "SelfAttention.o": {A, "output"}, "EncDecAttention.q": {A, "query"}, "EncDecAttention.k": {A, "key"},
        "EncDecAttention.v": {A, "value"}, "EncDecAttention.o": {A, "output"}, "DenseReluDense.wi": {M},
        "DenseReluDense.wo": {M},
    },
    "opt": {
        "self_attn.q_proj": {A, "query"}, "self_attn.k_proj": {A, "key"}, "self_attn.v_proj": {A, "value"},
        "self_attn.out_proj": {A, "output"}, "fc1": {M}, "fc2": {M},
    },
    "distilbert": {
        "attention.q_lin": {A, "query"}, "attention.k_lin": {A, "key"}, "attention.v_lin": {A, "value"},
        "attention.out_lin": {A, "output"}, "ffn.lin1": {M}, "ffn.lin2": {M},
    },
    "gpt_neox": {"attention.query_key_value": {A}, "attention.dense": {A, "output"}, "dense_h_to_4h": {M},
    "dense_4h_to_h": {M}}, "deberta": {
        "self.in_proj": {A}, "self.pos_proj": {A}, "self.pos_q_proj": {A}, "attention.output.dense": {A, "output"},
        "intermediate.dense": {M}, "layer.output.dense": {M},
    },
    "mixtral": {
        "self_attn.q_proj": {A, "query"}, "self_attn.k_proj": {A, "key"}, "self_attn.v_proj": {A, "value"},
        "self_attn.o_proj": {A, "output"}, "gate.weight": {"router"}, "experts.gate_up_proj": {"experts"},
        "experts.down_proj": {"experts"},
    },
    "qwen2_moe": {
        "self_attn.q_proj": {A, "query"}, "self_attn.k_proj": {A, "key"}, "self_attn.v_proj": {A, "value"},
        "self_attn.o_proj": {A, "output"}, "gate.weight": {"router"}, "experts.gate_up_proj": {"experts"},
        "experts.down_proj": {"experts"}, "shared_expert_gate": {"router"}, "shared_expert.gate_proj": {M},
        "shared_expert.up_proj": {M}, "shared_expert.down_proj": {M},
    },
    "deepseek_v3": {
        "q_a_proj": {A, "query"}, "q_b_proj": {A, "query"}, "kv_a_proj_with_mqa": {A}, "kv_b_proj": {A}, "o_proj": {A,
        "output"}, "mlp.gate_proj": {M}, "mlp.up_proj": {M}, "mlp.down_proj": {M}, "gate.weight": {"router"},
        "experts.gate_up_proj": {"experts"}, "experts.down_proj": {"experts"}, "shared_experts.gate_proj": {M},
        "shared_experts.up_proj": {M}, "shared_experts.down_proj": {M},
    },
    "switch_transformers": {
        "SelfAttention.q": {A, "query"}, "SelfAttention.k": {A, "key"}, "SelfAttention.v": {A, "value"},
        "SelfAttention.o": {A, "output"}, "EncDecAttention.q": {A, "query"}, "EncDecAttention.k": {A, "key"},
        "EncDecAttention.v": {A, "value"}, "EncDecAttention.o": {A, "output"}, "router.classifier": {"router"},
        "expert_0.wi": {"experts"}, "expert_1.wi": {"experts"}, "expert_0.wo": {"experts"}, "expert_1.wo": {"experts"},
        "mlp.wi": {M}, "mlp.wo": {M},
    },
    "whisper": {
        "attn.q_proj": {A, "query"}, "attn.k_proj": {A, "key"}, "attn.v_proj": {A, "value"}, "attn.out_proj": {A,
        "output"}, "fc1": {M}, "fc2": {M},
    },
    "rwkv": {
        "attention.key": {A, "key"}, "attention.value": {A, "value"}, "attention.receptance": {A}, "attention.output":
        {A, "output"}, "feed_forward.key": {M}, "feed_forward.value": {M}, "feed_forward.receptance": {M},
    },
    "qwen3_next": {
        "self_attn.q_proj": {A}, "self_attn.k_proj": {A, "key"}, "self_attn.v_proj": {A, "value"}, "self_attn.o_proj":
        {A, "output"}, "linear_attn.in_proj_qkvz": {A}, "linear_attn.in_proj_ba": {A}, "linear_attn.out_proj": {A,
        "output"}, "gate.weight": {"router"}, "experts.gate_up_proj": {"experts"}, "experts.down_proj": {"experts"},
        "shared_expert_gate": {"router"}, "shared_expert.gate_proj": {M}, "shared_expert.up_proj": {M},
        "shared_expert.down_proj": {M},
    },
    "mamba": {"in_proj": set(), "x_proj": set(), "dt_proj": set(), "out_proj": set()},
}  # fmt: skip

NAMES = """
    aria_text bart beit big_bird bigbird_pegasus blip bloom canine clip clipseg codegen conditional_detr convbert cpmant
    ctrl dab-detr data2vec-text dbrx deberta-v2 deit detr dinov2 dpt electra ernie esm falcon flaubert fsmt funnel
    gemma3_text git glm gpt_bigcode gpt_neo gpt_oss gptj granitemoe groupvit hubert ibert imagegpt jamba jetmoe kosmos-2
    layoutlm layoutlmv3 led lilt llama4_text longformer longt5 luke lxmert m2m_100 mllama minimax mobilebert modernbert
    moonshine moshi mpnet mpt nllb-moe olmoe openai-gpt owlvit pegasus perceiver persimmon phi phi3 phimoe plbart
    prophetnet pvt qwen2_5_vl qwen3_moe reformer rembert roberta roformer sam sam2 seamless_m4t segformer siglip
    speech_to_text speecht5 splinter stablelm swin swinv2 tapas time_series_transformer timesformer udop umt5 vilt vit
    vit_mae vitdet wav2vec2 wav2vec2-bert wavlm xlm xlnet xmod yolos zamba2
"""
OTHERS = NAMES.split()

RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet"},
}
NEEDS: dict[str, dict[str, Any]] = {
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "detr": RESNET,
    "esm": {"vocab_size": 33},
    "funnel": {"architectures": ["FunnelModel"]},
    "time_series_transformer": {"prediction_length": 4},
}
LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
UNCUT = {"funnel", "jamba", "prophetnet"}  # their number of layers cannot be changed alone


@cache
def model(kind: str) -> nn.Module:
    """Return the model on the meta device, with the default sizes, but about four layers and two experts."""
    torch.set_num_threads(1)
    default = transformers.CONFIG_MAPPING[kind](**NEEDS.get(kind, {}))
    for config in [default, *(c for c in vars(default).values() if isinstance(c, transformers.PreTrainedConfig))]:
        cut = [
            *((name, 4) for name in LAYER_COUNTS if kind not in UNCUT and can_cut_layers(config)),
            *((name, 2) for name in EXPERT_COUNTS),
        ]
        for name, to in cut:
            if isinstance(value := getattr(config, name, None), int) and value > to:
                setattr(config, name, to)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(default)


def can_cut_layers(config: Any) -> bool:
    """True if the config has no list with one entry per layer."""
    return not any(
        isinstance(v, list | tuple) and len(v) == getattr(config, "num_hidden_layers", -1)
        for v in vars(config).values()
    )


def weights(kind: str) -> Iterator[tuple[str, list[nn.Module], str, nn.Parameter]]:
    """Yield each linear weight with its path, its ancestors and its leaf."""
    modules = dict(model(kind).named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for name, p in module.named_parameters(recurse=False):
            if (
                p.ndim < 2
                or name.startswith("time_mix")
                or isinstance(module, nn.Embedding)
                or ("Conv" in type(module).__name__ and type(module).__name__ != "Conv1D")
            ):
                continue
            is_layer = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            full_path = path if name == "weight" and is_layer else f"{path}.{name}".lstrip(".")
            names = full_path.split(".")
            yield full_path, [modules[".".join(names[:i])] for i in range(len(names))], names[-1], p


@pytest.mark.parametrize("kind", BY_HAND)
def test_roles_match_those_written_by_hand(kind: str) -> None:
    """Each weight has the roles that BY_HAND gives to the longest end of its path, and none if it gives none."""
    seen: set[str] = set()
    for path, owners, leaf, _ in weights(kind):
        unnumbered = ".".join(name for name in ["", *path.split(".")] if not name.isdigit())
        ends = [end for end in BY_HAND[kind] if unnumbered.endswith((f".{end}", f"_{end}"))]
        if ends:
            end = max(ends, key=len)
            seen.add(end)
            assert role_names(path, owners, leaf) == BY_HAND[kind][end], path
        else:
            assert not role_names(path, owners, leaf), path
    assert seen == set(BY_HAND[kind])


@pytest.mark.parametrize("kind", [*BY_HAND, *OTHERS])
def test_roles_are_consistent(kind: str) -> None:
    """No weight has contradicting roles, and an attention with queries also has keys, values and an output."""
    by_attention: dict[str, set[str]] = defaultdict(set)
    all_roles: set[str] = set()
    for path, owners, leaf, p in weights(kind):
        roles = role_names(path, owners, leaf)
        all_roles |= roles
        assert roles <= {*ROLES} - {"head"}
        assert len(roles & {"query", "key", "value", "output"}) <= 1, path
        assert len(roles & {"mlp", "experts", "router"}) <= 1, path
        assert not (roles & {"query", "key", "value", "output"} and "attention" not in roles), path
        assert not (roles & {"mlp", "router"} and "attention" in roles), path
        if is_fused(owners[-1], leaf):
            assert not roles & {"query", "key", "value"}, path
        if "attention" in roles:
            parts = fused_parts(model(kind).config, owners[-1], leaf, row_count(owners[-1], leaf, p)) or {}
            by_attention[attention_path(path, owners)] |= roles | {PART_ROLES[q] for q in parts if q in PART_ROLES}
    for path, roles in by_attention.items():
        if "query" in roles:
            assert {"key", "value", "output"} <= roles, f"{path}: {sorted(roles)}"
    assert kind == "mamba" or (all_roles >= {"attention"} and all_roles & {"mlp", "experts"})


def row_count(owner: nn.Module, leaf: str, p: nn.Parameter) -> int:
    """Return the number of rows of W (out, in)."""
    conv1d = type(getattr(owner, leaf)).__name__ == "Conv1D"
    transposed = getattr(owner, "is_transposed", False) or type(owner).__name__ == "Llama4TextExperts"
    return p.shape[-1] if conv1d or transposed else p.shape[-2]


def attention_path(path: str, owners: list[nn.Module]) -> str:
    """Return the path of the outermost attention with no layer in between: BertAttention, not BertSelfAttention."""
    names = path.split(".")
    outermost = len(owners)
    for i in range(len(owners) - 1, 0, -1):
        if any(word in type(owners[i]).__name__ for word in ("Attention", "Attn", "MLA", "DeltaNet")):
            outermost = i
        elif outermost < len(owners) and not isinstance(owners[i], nn.ModuleList | nn.Sequential):
            break
    return ".".join(names[:outermost])


def test_more_than_100_architectures_are_checked() -> None:
    """The lists above are not cut down by accident."""
    assert len({*BY_HAND, *OTHERS}) > 100


def test_the_parts_q_k_v_have_roles() -> None:
    """The parts q, k and v have roles of ROLES, and no other part has one."""
    assert {*PART_ROLES.values()} <= {*ROLES}
    assert {*PART_ROLES} == {"q", "k", "v"}


def test_a_name_without_its_surroundings_has_no_role() -> None:
    """The same leaf has different roles in attention, in a feed-forward network and outside of both."""

    class FeedForward(nn.Module):
        pass

    class Attention(nn.Module):
        pass

    assert role_names("q_proj", [nn.Module()], "q_proj") == frozenset()
    assert role_names("ff.key", [nn.Module(), FeedForward()], "key") == {"mlp"}
    assert role_names("a.key", [nn.Module(), Attention()], "key") == {"attention", "key"}
    assert role_names("a.to_out.0", [nn.Module(), Attention(), nn.Sequential()], "0") == {"attention", "output"}
    assert role_names("ff.experts.0.up", [nn.Module(), FeedForward(), nn.ModuleList(), FeedForward()], "up") == {
        "experts"
    }


def test_roles_in_the_attention_of_torch() -> None:
    """nn.MultiheadAttention and nn.TransformerEncoderLayer have the same roles as any other model."""
    layer = nn.TransformerEncoderLayer(8, 2)
    split = nn.MultiheadAttention(8, 2, kdim=4)
    assert role_names("self_attn.in_proj_weight", [layer, layer.self_attn], "in_proj_weight") == {"attention"}
    assert role_names("self_attn.out_proj", [layer, layer.self_attn], "out_proj") == {"attention", "output"}
    assert role_names("linear1", [layer], "linear1") == {"mlp"}
    assert role_names("a.q_proj_weight", [nn.Module(), split], "q_proj_weight") == {"attention", "query"}
    assert role_names("a.k_proj_weight", [nn.Module(), split], "k_proj_weight") == {"attention", "key"}
