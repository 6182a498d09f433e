"""Where weights lie on disk: every parameter that from_pretrained loads, put together again from the file through its places, to the bit."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorainject.files import weight_map as module
from lorainject.files.weight_map import Place, View, meta_model, places

import zoo

Sites = Mapping[str, tuple[Place, ...]]


def build(name: str, model_type: str, **changes: Any) -> nn.Module:
    """A class of transformers with the zoo's tiny config of a type, all weights random."""
    config = next(config for strength, _, config in zoo.configs(model_type) if strength != "given")
    assert not isinstance(config, Exception), config
    return randomised(getattr(transformers, name)(type(config).from_dict(zoo._laid_over(config.to_dict(), changes))))


def randomised(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and not p.is_meta:
                p.copy_(torch.randn(p.shape, generator=g))
        for m in model.modules():
            if isinstance(m, nn.Embedding) and m.padding_idx is not None:  # some models zero this row after loading
                m.weight[m.padding_idx] = 0
    return model


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}


def mapped(folder: Path, model: nn.Module | None = None) -> tuple[Sites, dict[str, str], list[str]]:
    model = meta_model(folder) if model is None else model
    assert model is not None
    return places(model, {key: tuple(t.shape) for key, t in on_disk(folder).items()})


def strided(t: Tensor, view: View) -> Tensor:
    return t.as_strided(view.sizes, view.strides, view.offset)


def assert_found(found: Sites, disk: Mapping[str, Tensor], loaded: nn.Module) -> None:
    """Each parameter that has places is what they say: every element once, and equal to what was loaded, to the bit."""
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    for name, all_of_it in found.items():
        want = parameters[name].detach()
        got, index = torch.full(want.shape, math.nan, dtype=want.dtype), torch.arange(want.numel())
        seen = [strided(index, place.memory).flatten() for place in all_of_it]
        assert torch.equal(torch.cat([*seen, index[:0]]).sort().values, index), f"{name}: not every element once"
        for place in all_of_it:
            assert place.disk.sizes == place.memory.sizes
            strided(got, place.memory).copy_(strided(disk[place.key], place.disk).to(want.dtype))
        assert torch.equal(got, want), name


def loaded(folder: Path, cls: type[nn.Module]) -> nn.Module:
    return cls.from_pretrained(folder)  # type: ignore[attr-defined]


TEXT, VISION = "model.language_model.layers.1.", "model.vision_tower."
# A class, the zoo's type, changes of its config; a parameter, in how many pieces it lies, and a tensor on disk with some of it.
CASES: list[tuple[str, str, dict[str, Any], str, int, str]] = [
    ("LlamaForCausalLM", "llama", {}, "model.layers.1.mlp.up_proj.weight", 1, "model.layers.1.mlp.up_proj.weight"),
    # tied
    ("GPT2LMHeadModel", "gpt2", {}, "lm_head.weight", 1, "transformer.wte.weight"),
    ("T5ForConditionalGeneration", "t5", {}, "decoder.embed_tokens.weight", 1, "shared.weight"),
    ("WhisperForConditionalGeneration", "whisper", {}, "proj_out.weight", 1, "model.decoder.embed_tokens.weight"),
    ("BertForMaskedLM", "bert", {}, "cls.predictions.decoder.bias", 1, "cls.predictions.bias"),
    # stacked experts; more than ten, whose names don't sort as their numbers do
    ("MixtralForCausalLM", "mixtral", {"num_local_experts": 12}, "model.layers.1.mlp.experts.gate_up_proj", 24,
     "model.layers.1.block_sparse_moe.experts.11.w3.weight"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_local_experts": 12, "moe_intermediate_size": 24}, "model.layers.1.mlp.experts.down_proj", 12,
     "model.layers.1.mlp.experts.11.down_proj.weight"),
    ("GptOssForCausalLM", "gpt_oss", {}, "model.layers.1.mlp.experts.gate_up_proj", 1, "model.layers.1.mlp.experts.gate_up_proj"),
    ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", {"text_config": {"moe_intermediate_size": 24}},
     TEXT + "mlp.experts.down_proj", 1, TEXT + "mlp.experts.down_proj"),
    ("Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe", {}, TEXT + "mlp.vision_moe.experts.gate_up_proj", 8,
     "model.layers.1.mlp.experts.7.up_proj.weight"),
    # fused on disk, and halves interleaved; three convolutions on disk, and one in memory; rotary halves
    ("NomicBertForMaskedLM", "nomic_bert", {}, "nomic_bert.layers.1.self_attn.k_proj.weight", 1, "nomic_bert.encoder.layers.1.attn.Wqkv.weight"),
    ("InklingForConditionalGeneration", "inkling_mm_model", {}, TEXT + "mlp.shared_experts.up_proj", 1,
     "model.llm.layers.1.mlp.shared_experts.shared_w13_weight"),
    ("OlmoHybridForCausalLM", "olmo_hybrid", {}, "model.layers.0.linear_attn.conv1d.weight", 3, "model.layers.0.linear_attn.k_conv1d.weight"),
    ("MistralLarge4ForConditionalGeneration", "mistral_large4", {}, VISION + "transformer.layers.0.attention.q_proj.weight", 1,
     "vision_encoder.transformer.layers.0.attention.wq.weight"),
    # names
    ("LlavaForConditionalGeneration", "llava", {}, TEXT + "mlp.up_proj.weight", 1, "language_model.model.layers.1.mlp.up_proj.weight"),
    ("DetrForObjectDetection", "detr", {}, "model.backbone.model.embedder.embedder.convolution.weight", 1,
     "model.backbone.conv_encoder.model.embedder.embedder.convolution.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model_type", "changes", "parameter", "pieces", "key"), CASES, ids=[case[0] for case in CASES]
)
def test_every_element(tmp_path, name, model_type, changes, parameter, pieces, key):
    """All of an architecture's parameters are found as from_pretrained loads them; one of them is where its files have it."""
    model = build(name, model_type, **changes)
    model.save_pretrained(tmp_path)
    found, reasons, problems = mapped(tmp_path)
    assert (reasons, problems) == ({}, [])
    assert list(found) == [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert_found(found, on_disk(tmp_path), loaded(tmp_path, type(model)))
    assert len(found[parameter]) == pieces
    assert key in {place.key for place in found[parameter]}


def test_transposed():
    """Experts whose shape on disk is the transposed one are read across; those that have the model's shape are not."""
    changes = {"text_config": {"moe_intermediate_size": 24}}
    with torch.device("meta"):
        model = build("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", **changes)
    name = TEXT + "mlp.experts.down_proj"
    experts, rows, columns = model.get_parameter(name).shape
    for shape, strides in {
        (experts, columns, rows): (rows * columns, 1, rows),
        (experts, rows, columns): (rows * columns, columns, 1),
    }.items():
        (place,) = places(model, {name: shape})[0][name]
        assert place.disk == View(0, (experts, rows, columns), strides)


def test_shards(tmp_path):
    """Experts of one layer in several files."""
    model = build("MixtralForCausalLM", "mixtral")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    found, reasons, problems = mapped(tmp_path)
    assert (reasons, problems) == ({}, [])
    assert_found(found, on_disk(tmp_path), loaded(tmp_path, type(model)))


def test_prefix_is_added(tmp_path):
    """A bare BertModel's file, for a model with a head: the head alone is not on disk."""
    build("BertModel", "bert", add_pooling_layer=False).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(tmp_path))
    found, reasons, problems = mapped(tmp_path, model)
    assert_found(found, on_disk(tmp_path), loaded(tmp_path, transformers.BertForMaskedLM))
    assert not reasons
    assert {n for n, _ in model.named_parameters(remove_duplicate=False) if n not in found} == {
        p.split(": not on disk")[0] for p in problems if p.startswith("cls.")
    }
    assert [p for p in problems if not p.startswith("cls.")] == [
        "pooler.dense.bias: leads nowhere in the model",
        "pooler.dense.weight: leads nowhere in the model",
    ]
    assert found["bert.encoder.layer.0.output.dense.weight"][0].key == "encoder.layer.0.output.dense.weight"


def test_prefix_is_taken_off(tmp_path):
    """A file of a model with a head, for the bare model: the head leads nowhere, the pooler is not on disk."""
    build("BertForMaskedLM", "bert").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig.from_pretrained(tmp_path))
    found, reasons, problems = mapped(tmp_path, model)
    assert_found(found, on_disk(tmp_path), loaded(tmp_path, transformers.BertModel))
    assert not reasons
    assert {p.split(".")[0] for p in problems if p.endswith("leads nowhere in the model")} == {"cls"}
    assert {p for p in problems if p.endswith("not on disk")} == {
        "pooler.dense.weight: not on disk",
        "pooler.dense.bias: not on disk",
    }
    assert found["encoder.layer.0.output.dense.weight"][0].key == "bert.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("name", "model_type", "old"),
    [
        (
            "BertForMaskedLM",
            "bert",
            lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        ),
        ("CLIPTextModel", "clip_text_model", lambda key: f"text_model.{key}"),
    ],
    ids=["gamma", "clip"],
)
def test_old_names(tmp_path, name, model_type, old):
    """Files that older versions wrote."""
    model = build(name, model_type)
    model.save_pretrained(tmp_path)
    disk = {old(key): t for key, t in on_disk(tmp_path).items()}
    assert set(disk) != set(on_disk(tmp_path))
    save_file(disk, tmp_path / "model.safetensors", {"format": "pt"})
    found, reasons, problems = mapped(tmp_path)
    assert (reasons, problems) == ({}, [])
    assert set(found) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert_found(found, disk, loaded(tmp_path, type(model)))


def test_tied_whichever_is_on_disk():
    """Both names of a tied weight have the place, be it the head or the embedding that was saved; each its own if both were."""
    with torch.device("meta"):
        model = build("GPT2LMHeadModel", "gpt2")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    both = ["transformer.wte.weight", "lm_head.weight"]
    shape = shapes.pop(both[0])
    for keys in ([both[0]], [both[1]], both):
        found, reasons, problems = places(model, shapes | dict.fromkeys(keys, shape))
        assert (reasons, problems) == ({}, [])
        assert [found[name][0].key for name in both] == (keys * 2)[:2]


def test_left_over():
    """What has no counterpart is named, unless transformers itself ignores it; a wrong shape is a reason."""
    with torch.device("meta"):
        model = build("LlamaForCausalLM", "llama")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    del shapes["model.norm.weight"]
    shapes |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "model.stranger": (2,), "lm_head.weight": (7, 32)}
    found, reasons, problems = places(model, shapes)
    assert set(problems) == {"model.stranger: leads nowhere in the model", "model.norm.weight: not on disk"}
    assert reasons == {"lm_head.weight": "lm_head.weight: gives (7, 32), the model has (99, 32)"}
    assert set(found) == {n for n, _ in model.named_parameters()} - {"model.norm.weight", "lm_head.weight"}


def test_missing_experts():
    """transformers stacks the experts that it finds; a layer that has not all of them is not mapped, and the reason says why."""
    with torch.device("meta"):
        model = build("MixtralForCausalLM", "mixtral", num_local_experts=3)
    part = "model.layers.0.block_sparse_moe.experts."
    for keys in (
        [f"{part}{i}.w{j}.weight" for i in range(2) for j in (1, 3)],
        [f"{part}{i}.w1.weight" for i in range(3)],
    ):
        found, reasons, _ = places(model, dict.fromkeys(keys, (32, 32)))
        assert not found
        assert list(reasons) == ["model.layers.0.mlp.experts.gate_up_proj"]
        assert reasons["model.layers.0.mlp.experts.gate_up_proj"].startswith(
            f"MergeModulelist, Concatenate of {part}0.w1.weight: "
        )
    uneven = {f"{part}{i}.w2.weight": (32 - i, 32) for i in range(3)}
    assert "MergeModulelist of" in places(model, uneven)[1]["model.layers.0.mlp.experts.down_proj"]


def test_names_that_collide(tmp_path, monkeypatch):
    """Of two keys for one parameter the first is loaded, and the other leads nowhere; a rule that spoils a right name is not applied."""
    model = build("BertForMaskedLM", "bert")
    model.save_pretrained(tmp_path)
    name = "bert.embeddings.LayerNorm."
    more = {name + "gamma": torch.rand(32), name + "beta": torch.rand(32)}
    save_file(on_disk(tmp_path) | more, tmp_path / "model.safetensors", {"format": "pt"})
    found, _, problems = mapped(tmp_path)
    assert_found(found, on_disk(tmp_path), loaded(tmp_path, type(model)))
    assert problems == [f"{name}{key}: leads nowhere in the model" for key in ("bias", "weight")]

    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda *_: [WeightRenaming("embeddings", "nowhere")]
    )
    assert mapped(tmp_path)[0][f"{name}weight"][0].key == f"{name}weight"


def test_computed(monkeypatch):
    """A conversion that computes new values is refused by name: there is no place where a delta could go."""
    from transformers.core_model_loading import Chunk

    with torch.device("meta"):
        model = build("NomicBertModel", "nomic_bert")
    fused = {f"encoder.layers.{i}.attn.Wqkv.weight": (384, 32) for i in range(2)}
    assert len(places(model, fused)[0]) == 6
    plain = Chunk.convert
    for change in (lambda t: t * 2, lambda t: t.clone().mul_(2)):
        monkeypatch.setattr(
            Chunk,
            "convert",
            lambda *args, change=change, **more: {k: change(t) for k, t in plain(*args, **more).items()},
        )
        found, reasons, _ = places(model, fused)
        assert not found
        assert set(reasons) == {f"layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkv"}
        assert all(
            reason.startswith("Chunk of encoder.layers.") and "computes new values" in reason
            for reason in reasons.values()
        )
    monkeypatch.setattr(Chunk, "convert", lambda *args, **more: 1 / 0)
    assert all("division by zero" in reason for reason in places(model, fused)[1].values())


def test_without_the_rules(monkeypatch):
    """Modules that are not transformers', and versions of it with other internals: names on disk are names in memory."""
    own = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    found, reasons, problems = places(
        own, {"0.weight": (2, 3), "0.bias": (3,), "1.running_mean": (2,), "1.weight": (2,), "x": (1,)}
    )
    plain = View(0, (2, 3), (3, 1))
    assert found == {
        "0.weight": (Place("0.weight", plain, plain),),
        "1.weight": (Place("1.weight", View(0, (2,), (1,)), View(0, (2,), (1,))),),
    }
    assert reasons == {"0.bias": "0.bias: gives (3,), the model has (2,)"}
    assert problems == ["x: leads nowhere in the model", "1.bias: not on disk"]

    with torch.device("meta"):
        model = build("MixtralForCausalLM", "mixtral")
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    found, reasons, problems = places(
        model, {"model.norm.weight": (32,), "model.layers.0.block_sparse_moe.experts.0.w1.weight": (32, 32)}
    )
    assert list(found) == ["model.norm.weight"]
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight: leads nowhere in the model" in problems


def test_meta_model(tmp_path):
    """The class that the config names, or its type's bare model; None where transformers has none. Code in the folder is never run."""
    assert meta_model(tmp_path) is None
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    ).to_dict()

    def model(**changes: Any) -> nn.Module | None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return meta_model(tmp_path)

    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('run')")
    code = {"auto_map": {"AutoConfig": "modeling_mine.C", "AutoModel": "modeling_mine.M"}}
    state = torch.get_rng_state()
    assert type(model(architectures=["BertForMaskedLM"])) is transformers.BertForMaskedLM
    assert type(model()) is transformers.BertModel
    assert type(model(architectures=["MyBert"], **code)) is transformers.BertModel
    assert all(t.is_meta for t in model().parameters())
    audio = {
        "conv_dim": [8],
        "conv_kernel": [3],
        "conv_stride": [2],
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    assert type(model(model_type="wav2vec2", **audio)) is transformers.Wav2Vec2Model  # it draws numbers in real memory
    assert model(model_type="mine", **code) is None
    assert model(model_type="mine") is None
    assert torch.equal(torch.get_rng_state(), state)


def assert_traced(watch: Any, meta: Tensor, real: Tensor, shape: tuple[int, ...]) -> None:
    """The places of a stand-in say where the real numbers are: number j of tensor i on disk, of this shape, is 1000 i + j."""
    assert meta.shape == real.shape
    got = torch.full(real.shape, -1)
    for place in watch.origin(meta):
        assert place.disk.sizes == place.memory.sizes
        assert (strided(got, place.memory) == -1).all()
        strided(got, place.memory).copy_(strided(torch.arange(math.prod(shape)) + 1000 * int(place.key), place.disk))
    assert torch.equal(got, real)


MOVES: dict[str, Any] = {
    "stacked, and as a whole transposed": lambda a, b, c: torch.stack([a, b, c]).transpose(0, 2).contiguous(),
    "stacks side by side": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([b, c])], 1),
    "other halves": lambda a, b, c: torch.cat([a.chunk(2, 1)[1].T, c.chunk(2)[1].T.reshape(3, 4)]),
    "a slice of a copy": lambda a, b, c: a.T.contiguous().chunk(2)[1].contiguous().T.contiguous(),
    "halves interleaved, then chunked": lambda a, b, c: (
        b.reshape(2, 2, 6).transpose(0, 1).reshape(4, 6).chunk(2)[1].contiguous()
    ),
    "rows that cross rows": lambda a, b, c: (
        a.reshape(2, 2, 6).transpose(0, 1).contiguous().view(-1).view(2, 12).T.contiguous()
    ),
    "one stacked alone": lambda a, b, c: torch.stack([c.T]).transpose(1, 2).contiguous(),
    "a copy in the old order": lambda a, b, c: a.T.clone(),
    "flat": lambda a, b, c: torch.cat([a.T.reshape(-1), b.reshape(-1)]).view(2, 24).T.contiguous(),
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_moves(moves):
    """Chains of moves that are certainly known."""
    watch = module._Watch()
    metas = [watch.on_disk(str(i), (4, 6)) for i in range(3)]
    with watch, torch.no_grad():
        meta = moves(*metas)
    assert_traced(watch, meta, moves(*(torch.arange(24).view(4, 6) + 1000 * i for i in range(3))), (4, 6))


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        (lambda a, b: a.T.reshape(-1)[:5], "not evenly spaced"),
        (lambda a, b: a.T.reshape(-1).view(4, 6), "not evenly spaced"),
        (lambda a, b: torch.stack([a, b]).chunk(2)[1], "not evenly spaced"),
        (lambda a, b: torch.stack([a, b], 1).chunk(2, 1)[0], "a part of what was put together"),
        (lambda a, b: a.expand(2, 4, 6).contiguous(), "one element on disk for several"),
        (lambda a, b: a + b, "add computes new values"),
    ],
    ids=["rest", "rows", "half", "column", "copies", "sum"],
)
def test_no_view(moves, reason):
    """What is no strided view of whole tensors is refused."""
    watch = module._Watch()
    with watch, torch.no_grad():
        meta = moves(*(watch.on_disk(str(i), (4, 6)) for i in range(2)))
    with pytest.raises(module._NoView, match=reason):
        list(watch.origin(meta))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_moves(data):
    """Whatever moves elements, in any order: the places say where real numbers went, or there are none."""
    watch = module._Watch()
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3).map(tuple))
    count = data.draw(st.integers(1, 3))
    pairs = [
        (watch.on_disk(str(i), shape), torch.arange(math.prod(shape)).view(shape) + 1000 * i) for i in range(count)
    ]
    for _ in range(data.draw(st.integers(0, 2))):
        pairs = move(data, watch, pairs)
    if count > 1:
        join = data.draw(st.sampled_from([torch.stack, torch.cat]))
        dim = data.draw(st.integers(0, pairs[0][0].dim() - 1))
        with watch, torch.no_grad():
            joined = join([meta for meta, _ in pairs], dim)
        pairs = [(joined, join([real for _, real in pairs], dim))]
    for _ in range(data.draw(st.integers(0, 3))):
        pairs = move(data, watch, pairs)
    with contextlib.suppress(module._NoView):
        assert_traced(watch, *pairs[0], shape)


def move(data: st.DataObject, watch: Any, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same step for all: stand-ins under watch, real numbers without."""
    shape = tuple(pairs[0][0].shape)
    step: Any = data.draw(st.sampled_from(["transpose", "chunk", "reshape", "copy"]))
    a, b = (data.draw(st.integers(0, len(shape) - 1)) for _ in range(2))
    if step == "reshape":
        flat = math.prod(shape)
        first = data.draw(st.sampled_from([n for n in range(1, flat + 1) if flat % n == 0]))
        second = data.draw(st.sampled_from([n for n in range(1, flat // first + 1) if flat // first % n == 0]))
        act = lambda t: t.reshape(first, second, -1)  # noqa: E731
    elif step == "chunk":
        which = data.draw(st.integers(0, 1))
        act = lambda t: t.chunk(2, a)[which if shape[a] > 1 else 0]  # noqa: E731
    else:
        act = (lambda t: t.transpose(a, b)) if step == "transpose" else torch.Tensor.contiguous
    with watch, torch.no_grad():
        metas = [act(meta) for meta, _ in pairs]
    return [(meta, act(real)) for meta, (_, real) in zip(metas, pairs, strict=True)]


def one(model_type: str, folder: Path) -> str:
    """The first of the zoo's configs that can be built, saved and loaded again: "" if every parameter is mapped, else what is not."""
    said = ""
    try:
        tried = list(zoo.configs(model_type))
    except Exception as e:  # a part that the zoo cuts out of other models, or one that needs another library
        return f"skipped: {type(e).__name__}: {e}"
    for _, cls, config in tried:
        try:
            if isinstance(config, Exception):
                raise config
            model = randomised(zoo._make(cls, config))
            model.save_pretrained(folder)  # type: ignore[operator]
            again = loaded(folder, cls)
        except Exception as e:
            said = f"skipped: {type(e).__name__}: {' '.join(str(e).split())[:150]}"
            continue
        empty = meta_model(folder)
        if type(empty) is not cls:  # parts have classes that can't be looked up by the name in their config
            with torch.device("meta"):
                empty = cls(config)
        found, reasons, problems = mapped(folder, empty)
        assert_found(found, on_disk(folder), again)
        return "; ".join([*(f"{k}: {v}" for k, v in reasons.items()), *problems])
    return said


@pytest.mark.long
def test_every_model_type(tmp_path):
    """All of the zoo's model types that have a class of their own: every parameter is mapped, and rightly."""
    totals: Counter[str] = Counter()
    wrong = {}
    for model_type in zoo.types():
        (folder := tmp_path / model_type).mkdir()
        try:
            said = one(model_type, folder)
        except Exception as e:
            said = f"{type(e).__name__}: {e}"
        shutil.rmtree(folder)
        kind = "mapped" if not said else "skipped" if said.startswith("skipped") else "wrong"
        totals[kind] += 1
        if said:
            print(f"{kind} {model_type}: {said[:1000]}", flush=True)
        if kind == "wrong":
            wrong[model_type] = said
    print(dict(totals))
    assert not wrong
    assert totals["mapped"] > 400
