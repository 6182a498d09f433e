"""The report on adapters: its figures, and the page that shows them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject import analysis

from models import gpt2, llama, randomize, state
from moe_models import mixtral


class Page(HTMLParser):
    """Collects the tags of a page, and checks that they close in order."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def adapted(build=llama, targets=("q_proj", "v_proj"), r: int = 4, seed: int = 0, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = li.inject(build(), list(targets), r=r, **settings)
    with torch.no_grad():
        randomize(model, seed=seed)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a directory with a base and two adapters for it, with different ranks and sites."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    li.save(adapted(), tmp_path / "one")
    li.save(adapted(targets=("q_proj", "down_proj"), r=8, seed=1), tmp_path / "two")
    return tmp_path


def test_figures_are_those_of_the_dense_updates():
    """Norm, relative size, singular values, survival and amplification equal those of the dense matrices."""
    model = adapted().bfloat16()
    result = analysis.report(model)
    for (name, W0, delta), row in zip(li.deltas(model), result.sites, strict=True):
        W0, delta = W0.double(), delta.double()
        assert row.name == name
        assert row.dtype == "bfloat16"
        assert row.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row.relative_size == pytest.approx(float(delta.norm() / W0.norm()), rel=1e-5)
        U, S, Vh = torch.linalg.svd(delta)
        assert row.singular_values == pytest.approx(S[:4].tolist(), rel=1e-4)
        factor = delta.norm() / (U[:, :4].mT @ W0 @ Vh[:4].mT).norm()
        assert row.amplification == pytest.approx(float(factor), rel=1e-4)
        merged = (W0 + delta).bfloat16().double()
        survived = float(((merged - W0) * delta).sum() / delta.square().sum())
        assert row.survival == pytest.approx(survived, abs=2e-3)


def test_file_and_model_give_the_same_report(saved):
    """An adapter on its model, its file with the base, and its record with the base have the same figures."""
    on_model = analysis.report(adapted())
    from_file = analysis.report(saved / "one", base=saved / "base")
    from_record = analysis.report(li.read(saved / "one"), base=llama_base(saved))
    fields = ("norm", "relative_size", "amplification", "survival", "rank_95", "intruders")
    for field in fields:
        expected = [getattr(row, field) for row in on_model.sites]
        for other in (from_file, from_record):
            assert [getattr(row, field) for row in other.sites] == pytest.approx(expected, rel=1e-5)


def llama_base(saved: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(saved / "base")


def test_report_changes_nothing(saved):
    """Neither the base nor the adapted model is changed."""
    base, model = llama_base(saved), adapted()
    before = state(base), state(model)
    analysis.report(saved / "one", model, base=base)
    assert (state(base), state(model)) == before


def test_two_adapters_are_compared_where_both_have_updates(saved):
    """Ranks and sites may differ; an adapter beside itself has phi = 1."""
    result = analysis.report(saved / "one", saved / "two", base=saved / "base")
    assert result.adapters == ("default", "two")
    assert {s.site for s in result.similarities} == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    grid = result.similarities[0].grid
    assert (len(grid), len(grid[0])) == (4, 8)
    same = analysis.report(saved / "one", saved / "one").similarities
    assert all(s.at_rank_95 == pytest.approx(1) and s.grid[0][0] == pytest.approx(1) for s in same)


def test_report_without_a_base(saved):
    """What needs W0 is None, with the reason; the rest is the same."""
    row = analysis.report(saved / "one").sites[0]
    assert row.relative_size is row.amplification is row.survival is row.dtype is None
    assert row.remark == "no base was passed"
    assert row.norm > 0


def test_unusual_things_are_named():
    """Unused rank, zero updates, and updates that do not survive the rounding are named."""
    model = adapted(r=8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora." in name and "layers.0" in name and name.endswith("B"):
                p[:, 2:] = 0
                if "v_proj" in name:
                    p.zero_()
    notes = "\n".join(analysis.report(model).notes["default"])
    assert "r 8, of which" in notes
    assert "zero at model.layers.0.self_attn.v_proj" in notes
    tiny = adapted(alpha=1e-5).bfloat16()
    assert "would keep less than 0.9" in "\n".join(analysis.report(tiny).notes["default"])


def test_weights_that_cannot_be_read_are_named():
    """On the meta device there is no W0; the figures of A and B are there all the same."""
    model = adapted()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.empty(32, 32, device="meta"), False)
    row = analysis.report(model).sites[0]
    assert "meta device" in row.remark
    assert row.norm > 0
    assert row.relative_size is None


@pytest.mark.parametrize(("build", "targets"), [
    (llama, ["q_proj", "v_proj"]), (gpt2, ["c_attn[q,v]", "mlp"]), (mixtral, ["all-linear"]),
])  # fmt: skip
def test_page_is_whole_and_needs_no_network(build, targets, tmp_path):
    """The page is well-formed, has a figure and a table for everything, and refers to nothing outside itself."""
    result = analysis.report(adapted(build, targets))
    path = result.write(tmp_path / "report.html")
    text = path.read_text()
    page = Page(text)
    assert page.tags.count("svg") >= 4
    assert page.tags.count("table") >= 1
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "script" not in page.tags
    assert "@import" not in text
    assert text.count("http") == text.count("http://www.w3.org/")  # namespaces of SVG
    for row in result.sites:
        assert f"<td>{row.name}</td>" in text.replace("&#39;", "'")


def test_page_escapes_names(saved):
    """A name from a file cannot bring markup into the page."""
    from dataclasses import replace

    file = li.read(saved / "one")
    page = analysis.report(replace(file, name="<script>alert(1)</script>")).html()
    assert "<script>alert" not in page


def test_json_of_a_report(saved):
    """All numbers of the page are in the JSON, which has no NaN."""
    result = analysis.report(saved / "one", saved / "two", base=saved / "base")
    read = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert read["adapters"] == ["default", "two"]
    assert len(read["sites"]) == len(result.sites)
    down = next(part for part in read["layers"]["two"] if part["projection"] == "model.layers.*.mlp.down_proj")
    assert down["layers"] == [0, 1]
    assert down["table"][0][0] == pytest.approx(1)


def test_bad_input_of_a_report(saved):
    """What cannot be reported on is refused with the reason."""
    with pytest.raises(li.SpecError, match="adapters as paths"):
        analysis.report()
    with pytest.raises(li.StateError, match="no adapter"):
        analysis.report(llama())
    with pytest.raises(li.FileError, match="another base model"):
        torch.manual_seed(1)
        analysis.report(saved / "one", base=llama())
    with pytest.raises(li.FileError, match="no config"):
        analysis.report(saved / "one", base=saved / "one")
    merged = adapted()
    li.merge(merged)
    with pytest.raises(li.StateError, match="unmerge"):
        analysis.report(merged)
