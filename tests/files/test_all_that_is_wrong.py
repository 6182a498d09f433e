"""A conversion that is refused names every site that cannot be written, whatever the format and the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorainject as li

Q, K, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj", "model.layers.{}.mlp.up_proj"
EXPERT = "model.layers.{}.mlp.experts.1.up_proj"  # without an adapter on expert 0
SLICE = {"label": "0:2", "rows": (range(2),)}
LLAMA = li.Hints(heads=(4, 2), architecture="llama", component="unet")
FIVE_HEADS = replace(LLAMA, heads=(5, 5))


def site(path: str, out: int = 8, in_: int = 6, **more: object) -> li.StoredSite:
    return li.StoredSite(path=path, A=torch.randn(2, in_), B=torch.randn(out, 2), alpha=3, **more)


def qkv(layer: int) -> list[li.StoredSite]:
    """Return q and k of one layer, which read different inputs."""
    return [site(Q.format(layer), 8, 6), site(K.format(layer), 8, 5)]


def dora(path: str) -> li.StoredSite:
    return site(path, magnitude=torch.ones(8))


def slices(layer: int) -> list[li.StoredSite]:
    """Return two slices of one weight that read different inputs, so that they cannot be joined."""
    second = site(f"a.{layer}.x", 2, 5, label="2:5", rows=(range(2, 5, 2),), shape=(8, 5))
    return [site(f"a.{layer}.x", 2, 6, **SLICE, shape=(8, 6)), second]


CASES = {
    "kohya, component": ("kohya", [site(f"a.{i}.x") for i in (0, 1)], li.Hints(component="transformer"), 2),
    "kohya, no component": ("kohya", [site(f"a.{i}.x") for i in (0, 1)], li.Hints(), 2),
    "kohya, one name": ("kohya", [site(p) for p in ("a.b_c", "a_b.c", "a_b_c")], LLAMA, 2),
    "kohya, transposed": ("kohya", [replace(site(f"a.{i}.x"), kind="conv^T", shape=(6, 8)) for i in (0, 1)], LLAMA, 2),
    "diffusers, no component": ("diffusers", [site(f"a.{i}.x") for i in (0, 1)], li.Hints(), 2),
    "diffusers, two reasons": ("diffusers", [site("a.0.x", peft=False), site("a.1.x")], li.Hints(), 3),
    "gguf, heads": ("gguf", [site(Q.format(i)) for i in (0, 1)], FIVE_HEADS, 2),
    "gguf, names": ("gguf", [site(f"a.{i}.x") for i in (0, 1)], LLAMA, 2),
    "gguf, experts": ("gguf", [site(EXPERT.format(i)) for i in (0, 1)], LLAMA, 2),
    "gguf, every reason": ("gguf", [site(EXPERT.format(0)), site(Q.format(0)), site("a.x")], FIVE_HEADS, 3),
    "gguf, DoRA": ("gguf", [dora(UP.format(i)) for i in (0, 1)], LLAMA, 2),
    "mlx, experts": ("mlx", [site(EXPERT.format(i)) for i in (0, 1)], LLAMA, 2),
    "mlx, slices": ("mlx", [site(f"a.{i}.x", 2, **SLICE) for i in (0, 1)], LLAMA, 2),
    "mlx, slices of two inputs": ("mlx", [s for i in (0, 1) for s in slices(i)], LLAMA, 2),
    "torchtune, heads": ("torchtune", [site(Q.format(i)) for i in (0, 1)], FIVE_HEADS, 2),
    "torchtune, two reasons": ("torchtune", [site(Q.format(0)), site("a.x")], FIVE_HEADS, 2),
    "litgpt, inputs": ("litgpt", [s for i in (0, 1) for s in qkv(i)], LLAMA, 2),
    "litgpt, two reasons": ("litgpt", [*qkv(0), site("a.x")], LLAMA, 2),
    "loralib, slices of two inputs": ("loralib", [s for i in (0, 1) for s in slices(i)], LLAMA, 2),
    "adapterhub, names": ("adapterhub", [site(f"a.{i}.x") for i in (0, 1)], li.Hints(), 3),
    "onnx, DoRA": ("onnx", [dora(f"a.{i}.x") for i in (0, 1)], LLAMA, 2),
    "onnx, slices and DoRA": ("onnx", [site("a.0.x", 2, **SLICE), dora("a.1.x")], LLAMA, 2),
    "peft, slices": ("peft", [site(f"a.{i}.x", 2, **SLICE) for i in (0, 1)], LLAMA, 2),
    "peft, named": ("peft", [site(f"a.{i}.x", named=True) for i in (0, 1)], LLAMA, 2),
}


@pytest.mark.parametrize(("format", "sites", "hints", "count"), CASES.values(), ids=CASES)
def test_every_site_that_cannot_be_written_is_named(format, sites, hints, count, tmp_path):
    """One line per site and reason, each with the site's path, and nothing is written."""
    pytest.importorskip("onnxruntime") if format == "onnx" else None
    file = li.AdapterFile(path=Path("made"), format="lorainject", sites=tuple(sites))
    with pytest.raises(li.FileError) as e:
        li.write(file, tmp_path / f"x{li.FORMATS[format].suffix}", format=format, hints=hints)
    assert len(e.value.problems) == count, e.value.problems
    text = "\n".join(e.value.problems)
    layers = {".".join(s.path.split(".")[:3] if s.path.startswith("model.") else s.path.split(".")[:2]) for s in sites}
    assert all(layer in text for layer in layers), text
    assert "\n=> " in str(e.value)
    assert not list(tmp_path.iterdir())


def test_the_table_has_every_format():
    """All formats but our own, which holds everything, are in the table."""
    assert {format for format, *_ in CASES.values()} == li.FORMATS.keys() - {"lorainject"}
