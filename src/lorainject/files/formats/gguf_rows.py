"""In which order llama.cpp stores the rows of a model's weights, by its name for the architecture.

llama.cpp's converter changes the order of rows of some weights when it makes GGUF of a checkpoint, and an adapter must
have its rows in the same order:

    SAME      all rows as in transformers
    PAIRS     the rows of q_proj and k_proj: halves of each head (n, 2, d/2) become rotary pairs (n, d/2, 2)
    GROUPS    the rows of query_key_value: groups of query heads with their k and v become all q, all k, all v

Neither the adapter nor its base says which rule was used, so an architecture that is not in the table is refused.

Source: modify_tensors in llama.cpp's convert_hf_to_gguf.py, which convert_lora_to_gguf.py (commit 0b03adaa6) applies to
adapters. The classes are in conversion/<file>.py of https://github.com/ggml-org/llama.cpp, and were read at these
commits; the converter itself was not run.

    00487aad0  command_r                        0274f0fc7  llama (arcee, smollm3, llama-embed, llama4, apertus too)
    010f22d8a  granite                          01a723dc6  deepseek
    03173d5e7  qwen                             051139f51  arctic, ernie, exaone, glm, llada, olmo (seed_oss too), phi
    061b8c5f9  gemma                            2bbcf7fc9  bloom, chameleon
    2eb57bcbc  gptneox                          32e9e0448  minicpm, mistral3, internlm (internlm3 is a llama)
    5535795be  falcon, gpt2, starcoder

Not in the table, because they need rules of another kind: deci (heads that differ per layer), xverse (another order
where heads are grouped), baichuan, bailingmoe and internlm2 (a fused weight is split, too), plamo (columns, too). glm4
is that of text models: in GLM-4.1V, which has the same name in GGUF, the converter sorts q and k.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .. import transforms
from ..io.open_adapter import Hints
from .language_model_names import attention_heads

SAME, PAIRS, GROUPS = "same", "pairs", "groups"
LEAVES = {SAME: (), PAIRS: ("q_proj", "k_proj"), GROUPS: ("query_key_value",)}
"""The layers whose rows a rule sorts in another way."""
RULES = {
    **dict.fromkeys((
        "llama", "llama-embed", "mistral3", "arcee", "smollm3", "granite", "granitemoe", "granitehybrid", "olmo",
        "minicpm", "arctic", "chameleon", "deepseek", "llada",
    ), PAIRS),
    **dict.fromkeys(("falcon", "bloom", "gptneox"), GROUPS),
    **dict.fromkeys((
        "apertus", "cohere2", "command-r", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "glm4", "gpt2", "llama4",
        "olmo2", "olmoe", "phi2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "seed_oss", "starcoder2",
    ), SAME),
}  # fmt: skip
"""The rule of each architecture, by llama.cpp's name for it."""
MODEL_TYPES = {
    "mistral": "llama", "mixtral": "llama", "cohere": "command-r", "gpt_neox": "gptneox", "gemma3_text": "gemma3",
    "olmo3": "olmo2", "phi": "phi2", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "llama4_text": "llama4",
    "ministral3": "mistral3", "granitemoehybrid": "granitehybrid", "granitemoeshared": "granitemoe",
    "internlm3": "llama",
}  # fmt: skip
"""llama.cpp's names for transformers' model types that have other ones."""


def unknown_rows(architecture: str) -> list[str]:
    """Return a problem if the order of the architecture's rows is not known."""
    if architecture in RULES:
        return []
    return [
        f"in which order llama.cpp stores the rows of the architecture {architecture!r} is not known here: merge the"
        " adapter into its base (merge_checkpoint) and convert the result with llama.cpp; known are"
        f" {', '.join(sorted(RULES))} (Hints(architecture=...) takes llama.cpp's word)"
    ]


def heads_of(architecture: str, hints: Hints) -> tuple[int, int] | None:
    """Return the number of heads of queries, and of keys and values, by the hints or the model's config."""
    config: Any = getattr(hints.model, "config", None)
    if hints.heads is None and architecture == "falcon" and config is not None:
        if not config.new_decoder_architecture and not config.multi_query:
            return None  # the converter reads a number from config.json that transformers ignores
        return config.num_attention_heads, config.num_kv_heads if config.new_decoder_architecture else 1
    return attention_heads(hints)


def missing_heads(architecture: str, paths: Iterable[str], heads: tuple[int, int] | None) -> list[str]:
    """Return a problem if the order of the rows of some path depends on the heads, and these are unknown."""
    leaves = LEAVES[RULES.get(architecture, SAME)]
    if heads is not None or not any(path.rpartition(".")[2] in leaves for path in paths):
        return []
    return [f"the rows of {' and '.join(leaves)} have another order in this format than in transformers:"
            " give the heads, as in Hints(heads=(32, 8)), or the model"]  # fmt: skip


def row_order(architecture: str, path: str, rows: int, heads: tuple[int, int] | None) -> Tensor | None:
    """Return the order in which llama.cpp has the rows of a weight: B_gguf = B[order]; None if it does not change.

    Raises:
        FileError: If the rows cannot be shared among the heads.
    """
    rule, leaf = RULES[architecture], path.rpartition(".")[2]
    if heads is None or leaf not in LEAVES[rule]:
        return None
    if rule == PAIRS:
        return transforms.pairs_from_halves(rows, heads[leaf == "k_proj"])
    return transforms.parts_from_groups(rows, *heads)
