"""The role of each projection, in any architecture: "query" for q_proj, query, q_lin, to_q and some forty other names.

A name tells the role only together with its surroundings: `dense` is the output of attention in BertSelfOutput and a
half of the feed-forward network in BertIntermediate; `key` makes keys in attention, but not in RWKV's feed-forward;
`gate` routes where there are experts. So the *place* of a weight is determined first, from its ancestors, the nearest
first: by the names of their classes, then by their names in their parents. Only then the weight's own name is read,
word by word.

A weight that holds several parts (see fused_layouts.py) has the role of its place only. PART_ROLES gives the roles of
its parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..lora.graft import base_class
from .fused_layouts import is_fused

ROLES = ("attention", "mlp", "experts", "query", "key", "value", "output", "router", "head")
"""All roles. `role_names` does not give "head", which takes a look at the whole model (heads.py)."""

PART_ROLES = {"q": "query", "k": "key", "v": "value"}
"""The roles of the parts of a fused weight. Other parts have none."""

ATTENTION_HELPER = "attention helper"  # an indexer or compressor: its q and k are not those of the attention it serves
SHARED_EXPERT = "shared expert"  # called an expert, but every token passes through it
NO_PLACE = ""  # a whole layer or block: an ancestor further out may have a place

# Each row: a place, a pattern in the class name of an ancestor, and names that the ancestor has in its parent. The
# first row that matches an ancestor gives its place. The nearest ancestor that has a place decides.
PLACES = tuple(
    (place, re.compile(class_pattern), frozenset(names.split()))
    for place, class_pattern, names in (
        ("router", r"Router|TopKGating|(MoE|Moe)\w*Gate$", "router"),  # some routers are small MLPs
        (SHARED_EXPERT, r"Shared(Expert|MLP)", "shared_expert shared_experts shared_mlp"),
        ("experts", r"Experts?$|ExpertGLU|ExpertMLP", "experts"),
        (ATTENTION_HELPER, r"Indexer|Compressor$", ""),
        # Layers and blocks that are named after their attention hold more than it. Two exceptions: VQ-VAE's
        # AttentionBlock is an attention, and Levit's attention is built of MLPLayerWithBN.
        (NO_PLACE, r"(Layer|(?<!MLP)(?<!VAEAttention)(?<!VAEAttn)Block|Model|Encoder|Decoder|Stack|Merger|Norm|Cell|"
                   r"PredictionHead)$|^MLPLayerWithBN$", ""),
        ("attention", r"Attention|Attn|MLA$|DeltaNet|(Self|Cross|Attention)Output$",
         "attn self_attn cross_attn attention self_attention linear_attn"),
        ("mlp", r"MLP|Mlp|FF[NW]|FeedForward|ForwardNetwork|DenseAct|DenseGated|GLU|GatedLinear|Intermediate$|Output$",
         "mlp ffn ff feed_forward"),
    )
)  # fmt: skip


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Projections of a feed-forward network that lie directly in the layer (OPT, BART, Whisper, ALBERT).
MLP_IN_LAYER = _words(
    "fc1 fc2 fc3 fc_in fc_out linear1 linear2 lin1 lin2 ffn ffn_output ffn1 ffn2 wi wo w1 w2 w3 up_proj gate_proj "
    "down_proj gate_up_proj"
)
LAYER_CLASS = re.compile(r"(?<!Projection)Layer|Block|Encoder|Decoder")

# Names of the layer that routes tokens, in a module that has experts.
GATES = _words("gate router router_gate wg gating shared_expert_gate")

# Words in the name of a projection in attention: query_proj, self_attn_query_pos_proj and q_b_proj each have one of
# "query", and none of "key" and "value".
WORDS = {
    "query": _words("q query queries wq qlin"),
    "key": _words("k key keys wk"),
    "value": _words("v value values wv"),
}
# With one of these words, a name makes keys of distances (as in Transformer-XL) or several things, or is no projection.
NOT_WITH = _words("relative rel kv qk qkv norm gate mix pooling")
DISTANCES = _words("pos_key_proj pos_query_proj pos_q_proj pos_proj")  # DeBERTa's

OUTPUTS = _words(
    "o o_proj out_proj out out_lin output dense c_proj proj projection projection_layer to_out wo output_proj "
    "output_projection proj_out linear_out attention_out post_proj post final final_proj out_vision_proj out_text_proj "
    "o_a_proj o_b_proj"
)

# Names without meaning: a wrapped layer (clipped or normalized), an index in a Sequential, the parameter itself.
MEANINGLESS = re.compile(r"\d+|linear|weight|base_layer|original0|original1")


def role_names(path: str, owners: Sequence[nn.Module], leaf: str) -> frozenset[str]:
    """Return the roles of one weight.

    Args:
        path: Path of the layer or parameter in the model.
        owners: The modules on the way to it: the model first, its parent last.
        leaf: Its name in its parent.

    Returns:
        A subset of ROLES without "head". Empty for embeddings, norms, Mamba's mixers and projectors between towers.
    """
    names = ["", *path.split(".")[: len(owners) - 1]]  # of the owners, in their parents
    classes = [base_class(type(owner)).__name__ for owner in owners]
    places = [_place(cls, name) for cls, name in zip(classes, names, strict=True)]
    nearest = max((i for i, place in enumerate(places) if place), default=-1)
    place, outer = (places[nearest], places[:nearest]) if nearest >= 0 else (NO_PLACE, [])
    attention = frozenset({"attention"} & {*outer})
    if place == "router" or (leaf in GATES and _has_experts(owners[-1], classes[-1])):
        return frozenset({"router"})
    if place == "experts" or (place == "mlp" and _is_expert(outer)):
        return attention | {"experts"}  # JetMoe's attention has experts, too
    if place == ATTENTION_HELPER:
        return attention
    if place == "attention":
        return _attention_role(names[nearest + 1 :], owners[-1], leaf) | {"attention"}
    in_layer = place == NO_PLACE and leaf in MLP_IN_LAYER and LAYER_CLASS.search(classes[-1])
    return frozenset({"mlp"}) if place in ("mlp", SHARED_EXPERT) or in_layer else frozenset()


def _place(cls: str, name: str) -> str:
    return next((place for place, pattern, names in PLACES if pattern.search(cls) or name in names), NO_PLACE)


def _is_expert(outer_places: Sequence[str]) -> bool:
    """True if an MLP with these places around it is one of a list of experts."""
    enclosing = (place for place in reversed(outer_places) if place in (SHARED_EXPERT, "experts", "attention"))
    return next(enclosing, "") == "experts"


def _has_experts(owner: nn.Module, cls: str) -> bool:
    has_child = "experts" in owner._modules or "experts" in owner._parameters
    return has_child or re.search(r"MoE|Moe(?!\w*Attention)", cls) is not None


def _attention_role(names: Sequence[str], owner: nn.Module, leaf: str) -> frozenset[str]:
    """Return what a weight in attention makes, by the last name with a meaning: query, key, value, output or
    nothing."""
    if is_fused(owner, leaf):
        return frozenset()
    name = next((name.lower() for name in (leaf, *reversed(names)) if not MEANINGLESS.fullmatch(name)), "")
    words = set(name.split("_"))
    roles = frozenset(role for role, role_words in WORDS.items() if words & role_words)
    if len(roles) == 1 and not words & NOT_WITH and name not in DISTANCES:
        return roles
    return frozenset({"output"}) if not roles and name in OUTPUTS else frozenset()
