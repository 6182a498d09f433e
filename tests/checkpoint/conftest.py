"""The checkpoint and the adapters that the tests of merges on disk begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorainject as li
from checkpoints import mixtral

from models import randomize


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `base`, a sharded bfloat16 Mixtral checkpoint with other files, and two adapters for it."""
    torch.manual_seed(0)
    model = mixtral().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="120KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "base" / "extra" / "notes.txt").write_text("kept")
    for i, targets in enumerate((["all-linear"], ["q_proj", "down_proj"])):
        randomize(li.inject(model, targets, r=2 + i), seed=i)
        li.save(model, tmp_path / f"adapter{i}")
        li.eject(model)
    return tmp_path
