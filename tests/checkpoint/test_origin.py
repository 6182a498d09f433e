"""The manifest: adapters and merged checkpoints say what they were made from."""

from __future__ import annotations

import json

import torch

import lorainject as li
from lorainject import algebra
from lorainject.checkpoint.shards import fingerprint, read_shards
from lorainject.files.origin import adapter_digest, origin_lines

from models import llama


def manifest(path):
    """Return the manifest of a merged checkpoint."""
    return json.loads((path / "lorainject_merge.json").read_text())


def test_a_merged_checkpoint_says_what_it_holds(folder):
    """Base, adapters, weights and version are named; a merge into a merged checkpoint keeps the first one's entry."""
    li.merge_checkpoint(folder / "base", [folder / "adapter0", folder / "adapter1"], folder / "one", weights=[1, -0.5])
    first = manifest(folder / "one")
    assert first["lorainject"] == li.__version__
    assert [(a["file"], a["weight"]) for a in first["adapters"]] == [("adapter0", 1), ("adapter1", -0.5)]
    assert first["adapters"][0]["digest"] == adapter_digest(li.read(folder / "adapter0"))
    assert first["base"]["fingerprint"] == fingerprint(read_shards(folder / "base"))
    li.merge_checkpoint(folder / "one", folder / "adapter1", folder / "two", check_base=False)
    second = manifest(folder / "two")
    assert second["base"]["origin"] == first
    assert [a["file"] for a in second["adapters"]] == ["adapter1"]
    li.merge_in_place(folder / "base", folder / "adapter0")
    in_place = json.loads((folder / "base" / ".lorainject-merge" / "manifest.json").read_text())
    assert in_place["origin"]["adapters"] == [first["adapters"][0]]
    li.unmerge_in_place(folder / "base")


def test_a_fingerprint_is_that_of_the_values(folder):
    """Other shards have the same fingerprint, and other values another one."""
    before = fingerprint(read_shards(folder / "base"))
    torch.manual_seed(0)
    a, b = llama(), llama()
    a.save_pretrained(folder / "a")
    a.save_pretrained(folder / "again", max_shard_size="40KB")
    b.save_pretrained(folder / "b")
    prints = [fingerprint(read_shards(folder / name)) for name in ("a", "again", "b")]
    assert prints[0] == prints[1]
    assert len({before, *prints}) == 3


def test_an_adapter_says_what_it_was_computed_from(folder):
    """combine, compress and extract are in the header, nested, and the digest survives a conversion."""
    total = algebra.combine([folder / "adapter0", folder / "adapter1"], [0.5, 2])
    li.write(algebra.compress(total, r=2), folder / "small")
    origin = li.read(folder / "small").origin
    assert (origin["verb"], origin["r"]) == ("compress", 2)
    inner = origin["adapters"][0]["origin"]
    assert [a["weight"] for a in inner["adapters"]] == [0.5, 2]
    assert any("adapter1" in line for line in origin_lines(origin))
    li.convert(folder / "adapter0", folder / "safe.safetensors", format="lorainject")
    assert adapter_digest(li.read(folder / "safe.safetensors")) == adapter_digest(li.read(folder / "adapter0"))
    li.merge_checkpoint(folder / "base", folder / "adapter1", folder / "merged")
    found = algebra.extract(folder / "base", folder / "merged")
    assert found.origin["base"]["fingerprint"] == manifest(folder / "merged")["base"]["fingerprint"]
