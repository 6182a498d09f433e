"""check: every tensor that an engine would ignore or misread is named, and what it says agrees with convert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from test_sums import record, site

import lorainject as li
from lorainject import algebra

from adapter_files import LLAMA_HINTS, records
from example_count import examples


def test_ranks_and_scales_are_named(tmp_path):
    """vLLM takes one rank and one scale: the sites with others are named, and convert rewrites them."""
    file = record(site("q", r=4, alpha=8.0), site("k", r=4, alpha=8.0), site("v", r=2, alpha=8.0))
    li.write(file, tmp_path / "a", format="peft")
    report = algebra.check(tmp_path / "a", "vllm")
    assert not report.ok
    assert not report.refused
    assert [line.split(":")[0] for line in report.rewritten] == ["v", "v"]
    li.convert(tmp_path / "a", tmp_path / "b", engine="vllm")
    assert algebra.check(tmp_path / "b", "vllm").ok
    assert "--max-lora-rank 8" in algebra.check(tmp_path / "b", "vllm").asks


def test_what_no_conversion_can_express_is_refused():
    """Magnitudes, updates of biases and whole tensors have no form in vLLM; each is named."""
    file = record(site("q", magnitude=torch.ones(6)), site("k", bias=torch.ones(6)), replaced={"norm": torch.ones(6)})
    report = algebra.check(file, "vllm")
    assert [line.split(":")[0] for line in report.refused] == ["q", "k", "norm"]
    assert "no form in this engine" in str(report)
    named = algebra.check(record(site("wte", kind="embedding")), "vllm")
    assert "only embeddings called" in named.refused[0]
    assert "rank 513 is above 512" in algebra.check(record(site("q", r=513)), "vllm").refused[0]


def test_the_format_and_the_scaling_count():
    """A file of another format is not read at all, and a rank-stabilized scale is misread."""
    report = algebra.check(record(site("q")), "llama.cpp")
    assert "the engine reads gguf" in report.rewritten[0]
    report = algebra.check(replace(record(site("q", scaling="rslora")), format="peft"), "vllm")
    assert "rank-stabilized" in report.rewritten[0]


def test_an_unknown_engine_is_an_error():
    """The error lists the engines."""
    with pytest.raises(li.SpecError, match="choose one of vllm"):
        algebra.check(record(site()), "nobody")


@settings(max_examples=examples(60))
@given(file=records())
def test_convert_writes_what_check_calls_rewritten(file):
    """If nothing is refused, convert for the engine succeeds, and check of what it wrote finds nothing."""
    import tempfile

    for engine in ("vllm", "sglang", "transformers"):
        report = algebra.check(file, engine, hints=LLAMA_HINTS)
        with tempfile.TemporaryDirectory() as folder:
            try:
                li.write(file, f"{folder}/a", engine=engine, hints=LLAMA_HINTS)
            except li.FileError:
                assert report.refused
                continue
            assert not report.refused
            assert algebra.check(f"{folder}/a", engine, hints=LLAMA_HINTS).ok
