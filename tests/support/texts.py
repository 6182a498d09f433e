"""A tokenizer of a few words, and texts of these words, for the trainers of TRL."""

from __future__ import annotations

import random
from typing import Any

WORDS = [f"w{i}" for i in range(90)]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(n: int) -> str:
    return " ".join(random.Random(n).choices(WORDS, k=8))


def rows(kind: str) -> Any:
    """Return a dataset for the trainer of this kind: "SFT", "DPO" or "GRPO"."""
    from datasets import Dataset

    return Dataset.from_list(
        {
            "SFT": [{"text": text(i)} for i in range(8)],
            "DPO": [{"prompt": text(i), "chosen": f" {text(-i)}", "rejected": f" {text(99 + i)}"} for i in range(8)],
            "GRPO": [{"prompt": text(i)} for i in range(8)],
        }[kind]
    )
