"""Which projection plays which role, in any architecture: "query" for q_proj, query, q_lin, to_q, and some forty more.

Names say it, but only together with where they stand: `dense` is attention's output in BertSelfOutput and half of the
feed-forward in BertIntermediate, `key` makes keys in attention and not in RWKV's feed-forward, `gate` routes where there
are experts. So a weight is placed first, by its ancestors from the nearest up (their classes' names, then the names that
they have in their parents); only then its own name is read, word by word.

A weight that holds several parts (see layouts) has the role of its place alone; its parts have theirs in PART_ROLES.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..lora.graft import base_class
from .fused_layouts import is_fused

ROLES = ("attention", "mlp", "experts", "query", "key", "value", "output", "router", "head")
"""What a weight can be. "head" is not said here: that takes the whole model (see anatomy.heads)."""

PART_ROLES = {"q": "query", "k": "key", "v": "value"}
"""The role of a part of a fused weight; the other parts have none."""

# Where a weight is, by its nearest ancestor of which a row holds; within one ancestor the first row decides.
# (place, what the class's name contains, what the ancestor is called in its parent)
PLACES = tuple(
    (place, re.compile(classes), frozenset(names.split()))
    for place, classes, names in (
        ("router", r"Router|TopKGating|(MoE|Moe)\w*Gate$", "router"),  # with all in it: some are small MLPs
        (
            "shared",
            r"Shared(Expert|MLP)",
            "shared_expert shared_experts shared_mlp",
        ),  # called experts, but every token passes
        ("experts", r"Experts?$|ExpertGLU|ExpertMLP", "experts"),
        # What is in these is no query or key of the attention that they serve: they choose its tokens or shorten its memory.
        ("beside attention", r"Indexer|Compressor$", ""),
        # Layers and blocks named after their attention hold more than it (but VQ-VAE's AttentionBlock does not); Levit's attention is
        # built of MLPLayerWithBN.
        (
            "",
            r"(Layer|(?<!MLP)(?<!VAEAttention)(?<!VAEAttn)Block|Model|Encoder|Decoder|Stack|Merger|Norm|Cell|PredictionHead)$|^MLPLayerWithBN$",
            "",
        ),
        (
            "attention",
            r"Attention|Attn|MLA$|DeltaNet|(Self|Cross|Attention)Output$",
            "attn self_attn cross_attn attention self_attention linear_attn",
        ),
        (
            "mlp",
            r"MLP|Mlp|FF[NW]|FeedForward|ForwardNetwork|DenseAct|DenseGated|GLU|GatedLinear|Intermediate$|Output$",
            "mlp ffn ff feed_forward",
        ),
    )
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Feed-forward projections that stand in the layer itself, beside its attention (OPT, BART, Whisper; ALBERT).
IN_THE_LAYER = _words(
    "fc1 fc2 fc3 fc_in fc_out linear1 linear2 lin1 lin2 ffn ffn_output ffn1 ffn2 wi wo w1 w2 w3 up_proj gate_proj down_proj gate_up_proj"
)
LAYERS = re.compile(r"(?<!Projection)Layer|Block|Encoder|Decoder")

# In a block with experts, what sends the tokens to them.
GATES = _words("gate router router_gate wg gating shared_expert_gate")

# Words of a name in attention: query_proj, self_attn_query_pos_proj and q_b_proj each have one of the first line, and none of another.
WORDS = {
    "query": _words("q query queries wq qlin"),
    "key": _words("k key keys wk"),
    "value": _words("v value values wv"),
}
# With these it makes keys of distances (Transformer-XL's kind), or several things at once, or is no projection.
NOT_WITH = _words("relative rel kv qk qkv norm gate mix pooling")
DISTANCES = _words("pos_key_proj pos_query_proj pos_q_proj pos_proj")  # DeBERTa's

OUTPUTS = _words(
    "o o_proj out_proj out out_lin output dense c_proj proj projection projection_layer to_out wo output_proj output_projection proj_out "
    "linear_out attention_out post_proj post final final_proj out_vision_proj out_text_proj o_a_proj o_b_proj"
)

# Names that say nothing: the wrapped layer of a clippable or normed linear, the place in a Sequential, the parameter itself.
EMPTY = re.compile(r"\d+|linear|weight|base_layer|original0|original1")


def role_names(path: str, owners: Sequence[nn.Module], leaf: str) -> frozenset[str]:
    """The roles of one weight: of the layer or parameter `leaf` at `path`, whose ancestors are `owners`, from the root down.

    Empty for what is none of these: embeddings, norms, Mamba's mixers, projectors between towers.
    """
    called = ["", *path.split(".")[: len(owners) - 1]]
    classes = [base_class(type(owner)).__name__ for owner in owners]
    places = [_place(cls, name) for cls, name in zip(classes, called, strict=True)]
    at = max((i for i, place in enumerate(places) if place), default=-1)
    place, outer = (places[at] if at >= 0 else ""), places[: max(at, 0)]
    if place == "router" or (leaf in GATES and _has_experts(owners[-1], classes[-1])):
        return frozenset({"router"})
    if (
        place == "mlp"
        and next((p for p in reversed(outer) if p in ("shared", "experts", "attention")), "") == "experts"
    ):
        place = "experts"  # each an MLP in a list
    if place == "experts":  # JetMoe's attention has experts too
        return frozenset({"experts"} | {"attention"} & {*outer})
    if place == "beside attention":
        return frozenset({"attention"} & {*outer})
    if place == "attention":
        return frozenset({"attention"}) | _in_attention(called[at + 1 :], owners[-1], leaf)
    if place in ("mlp", "shared") or (not place and leaf in IN_THE_LAYER and LAYERS.search(classes[-1])):
        return frozenset({"mlp"})
    return frozenset()


def _place(cls: str, name: str) -> str:
    for place, classes, names in PLACES:
        if classes.search(cls) or name in names:
            return place
    return ""


def _has_experts(owner: nn.Module, cls: str) -> bool:
    return (
        "experts" in owner._modules
        or "experts" in owner._parameters
        or re.search(r"MoE|Moe(?!\w*Attention)", cls) is not None
    )


def _in_attention(between: Sequence[str], owner: nn.Module, leaf: str) -> frozenset[str]:
    """What a weight in attention makes, by the last of its names that says anything."""
    if is_fused(owner, leaf):
        return frozenset()
    said = [name for name in [*between, leaf] if not EMPTY.fullmatch(name)]
    name = said[-1].lower() if said else ""
    words = set(name.split("_"))
    makes = {role for role, any_of in WORDS.items() if words & any_of}
    if len(makes) == 1 and not words & NOT_WITH and name not in DISTANCES:
        return frozenset(makes)
    return frozenset({"output"}) if not makes and name in OUTPUTS else frozenset()


PROJECTIONS = frozenset().union(*WORDS.values())
GATED = frozenset(("gate_proj", "up_proj", "gate", "up", "w1", "w3", "wi_0", "wi_1"))
CROSS = re.compile(r"cross|enc\w*dec|encoder_attn", re.IGNORECASE)  # attention whose q reads another input than k and v


def input_group(path: str) -> str:
    """Projections for which this is the same probably read the same input; empty for one that reads its own."""
    owner, _, name = path.rpartition(".")
    words = set(name.lower().split("_"))
    if words & PROJECTIONS and not words & NOT_WITH:
        return f"{owner}: {'q' if CROSS.search(owner) and words & WORDS['query'] else 'attention'}"
    return f"{owner}: gated" if name in GATED else ""
