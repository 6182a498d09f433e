"""The weight map: a parameter that is assembled from its pieces on disk has the bits that from_pretrained loads."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorainject.files.weight_map import (
    StoredPiece,
    StridedView,
    TraceMode,
    Untraceable,
    WeightMap,
    build_meta_model,
    locate_weights,
)

import zoo
from example_count import examples

Pieces = Mapping[str, tuple[StoredPiece, ...]]


def build(name: str, model_type: str, **changes: Any) -> nn.Module:
    """Build a class of transformers from the zoo's tiny config of a model type, with random weights."""
    config = next(config for strength, _, config in zoo.configs(model_type) if strength != "from the file")
    assert not isinstance(config, Exception), config
    return randomize(getattr(transformers, name)(type(config).from_dict(zoo.overlay(config.to_dict(), changes))))


def randomize(model: nn.Module) -> nn.Module:
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


def map_folder(folder: Path, model: nn.Module | None = None) -> tuple[Pieces, dict[str, str], list[str]]:
    """Return the pieces, the reasons and the leftovers of the checkpoint in a folder."""
    model = build_meta_model(folder) if model is None else model
    assert model is not None
    weight_map = locate_weights(model, {key: tuple(t.shape) for key, t in on_disk(folder).items()})
    return weight_map.pieces, weight_map.reasons, leftovers(model, weight_map)


def leftovers(model: nn.Module, weight_map: WeightMap) -> list[str]:
    """Return a line for each unused key and each missing parameter, without those that transformers ignores."""
    pieces, reasons, unused = weight_map
    missing = [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in pieces and n not in reasons]
    info = SimpleNamespace(unexpected_keys=set(unused.values()), missing_keys=set(missing))
    if adjust := getattr(model, "_adjust_missing_and_unexpected_keys", None):
        adjust(info)
    lines = [f"{key}: unused" for key, name in unused.items() if name in info.unexpected_keys]
    return lines + [f"{name}: not on disk" for name in missing if name in info.missing_keys]


def strided(t: Tensor, view: StridedView) -> Tensor:
    return t.as_strided(view.sizes, view.strides, view.offset)


def assert_assembled(pieces: Pieces, disk: Mapping[str, Tensor], loaded: nn.Module) -> None:
    """Assert that each located parameter equals its pieces to the bit, and that they cover every element once."""
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    for name, parts in pieces.items():
        expected = parameters[name].detach()
        assembled = torch.full(expected.shape, math.nan, dtype=expected.dtype)
        index = torch.arange(expected.numel())
        covered = [strided(index, piece.memory).flatten() for piece in parts]
        assert torch.equal(torch.cat([*covered, index[:0]]).sort().values, index), f"{name}: not every element once"
        for piece in parts:
            assert piece.disk.sizes == piece.memory.sizes
            strided(assembled, piece.memory).copy_(strided(disk[piece.key], piece.disk).to(expected.dtype))
        assert torch.equal(assembled, expected), name


def load(folder: Path, cls: type[nn.Module]) -> nn.Module:
    return cls.from_pretrained(folder)  # type: ignore[attr-defined]


LAYER, TEXT, VISION = "model.layers.1.", "model.language_model.layers.1.", "model.vision_tower."
NOMIC = "nomic_bert.layers.1.self_attn.k_proj.weight", "nomic_bert.encoder.layers.1.attn.Wqkv.weight"
DETR = "model.backbone.model.embedder.embedder.", "model.backbone.conv_encoder.model.embedder.embedder."
# A class, the zoo's model type, changes of its config; a parameter, the number of its pieces, and the key of one of
# them (None: the parameter's name).
CASES: list[tuple[str, str, dict[str, Any], str, int, str | None]] = [
    ("LlamaForCausalLM", "llama", {}, LAYER + "mlp.up_proj.weight", 1, None),
    # tied
    ("GPT2LMHeadModel", "gpt2", {}, "lm_head.weight", 1, "transformer.wte.weight"),
    ("T5ForConditionalGeneration", "t5", {}, "decoder.embed_tokens.weight", 1, "shared.weight"),
    ("WhisperForConditionalGeneration", "whisper", {}, "proj_out.weight", 1, "model.decoder.embed_tokens.weight"),
    ("BertForMaskedLM", "bert", {}, "cls.predictions.decoder.bias", 1, "cls.predictions.bias"),
    # stacked experts; with more than ten, the order of the names is not the order of the numbers
    ("MixtralForCausalLM", "mixtral", {"num_local_experts": 12}, LAYER + "mlp.experts.gate_up_proj", 24,
     LAYER + "block_sparse_moe.experts.11.w3.weight"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_local_experts": 12, "moe_intermediate_size": 24},
     LAYER + "mlp.experts.down_proj", 12, LAYER + "mlp.experts.11.down_proj.weight"),
    ("GptOssForCausalLM", "gpt_oss", {}, LAYER + "mlp.experts.gate_up_proj", 1, None),
    ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", {"text_config": {"moe_intermediate_size": 24}},
     TEXT + "mlp.experts.down_proj", 1, None),
    ("Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe", {}, TEXT + "mlp.vision_moe.experts.gate_up_proj", 8,
     LAYER + "mlp.experts.7.up_proj.weight"),
    # fused on disk; interleaved halves; three convolutions on disk and one in memory; rotary halves
    ("NomicBertForMaskedLM", "nomic_bert", {}, NOMIC[0], 1, NOMIC[1]),
    ("InklingForConditionalGeneration", "inkling_mm_model", {}, TEXT + "mlp.shared_experts.up_proj", 1,
     "model.llm.layers.1.mlp.shared_experts.shared_w13_weight"),
    ("OlmoHybridForCausalLM", "olmo_hybrid", {}, "model.layers.0.linear_attn.conv1d.weight", 3,
     "model.layers.0.linear_attn.k_conv1d.weight"),
    ("MistralLarge4ForConditionalGeneration", "mistral_large4", {},
     VISION + "transformer.layers.0.attention.q_proj.weight", 1,
     "vision_encoder.transformer.layers.0.attention.wq.weight"),
    # names
    ("LlavaForConditionalGeneration", "llava", {}, TEXT + "mlp.up_proj.weight", 1,
     "language_model.model.layers.1.mlp.up_proj.weight"),
    ("DetrForObjectDetection", "detr", {}, DETR[0] + "convolution.weight", 1, DETR[1] + "convolution.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model_type", "changes", "parameter", "count", "key"), CASES, ids=[case[0] for case in CASES]
)
def test_every_parameter_of_an_architecture_is_located(tmp_path, name, model_type, changes, parameter, count, key):
    """Every parameter has the pieces that from_pretrained loads, and the one named here lies under its key on disk."""
    model = build(name, model_type, **changes)
    model.save_pretrained(tmp_path)
    pieces, reasons, left = map_folder(tmp_path)
    assert (reasons, left) == ({}, [])
    assert list(pieces) == [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert_assembled(pieces, on_disk(tmp_path), load(tmp_path, type(model)))
    assert len(pieces[parameter]) == count
    assert (key or parameter) in {piece.key for piece in pieces[parameter]}


def test_experts_stored_transposed_are_read_along_columns():
    """Experts whose shape on disk is the transposed one are located with exchanged strides; others are not."""
    changes = {"text_config": {"moe_intermediate_size": 24}}
    with torch.device("meta"):
        model = build("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", **changes)
    name = TEXT + "mlp.experts.down_proj"
    experts, rows, columns = model.get_parameter(name).shape
    for shape, strides in {
        (experts, columns, rows): (rows * columns, 1, rows),
        (experts, rows, columns): (rows * columns, columns, 1),
    }.items():
        (piece,) = locate_weights(model, {name: shape}).pieces[name]
        assert piece.disk == StridedView(0, (experts, rows, columns), strides)


def test_experts_spread_over_several_shards(tmp_path):
    """The experts of one layer are located although they are in several files."""
    model = build("MixtralForCausalLM", "mixtral")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    pieces, reasons, left = map_folder(tmp_path)
    assert (reasons, left) == ({}, [])
    assert_assembled(pieces, on_disk(tmp_path), load(tmp_path, type(model)))


def test_file_of_a_bare_model_fits_the_model_with_a_head(tmp_path):
    """A BertModel's file is located in BertForMaskedLM under the added prefix; only the head is not on disk."""
    build("BertModel", "bert", add_pooling_layer=False).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(tmp_path))
    pieces, reasons, left = map_folder(tmp_path, model)
    assert_assembled(pieces, on_disk(tmp_path), load(tmp_path, transformers.BertForMaskedLM))
    assert not reasons
    assert {n for n, _ in model.named_parameters(remove_duplicate=False) if n not in pieces} == {
        p.split(": not on disk")[0] for p in left if p.startswith("cls.")
    }
    assert [p for p in left if not p.startswith("cls.")] == ["pooler.dense.bias: unused", "pooler.dense.weight: unused"]
    assert pieces["bert.encoder.layer.0.output.dense.weight"][0].key == "encoder.layer.0.output.dense.weight"


def test_file_of_a_model_with_a_head_fits_the_bare_model(tmp_path):
    """BertForMaskedLM's file is located in BertModel without the prefix; the head is unused, the pooler not on disk."""
    build("BertForMaskedLM", "bert").save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig.from_pretrained(tmp_path))
    pieces, reasons, left = map_folder(tmp_path, model)
    assert_assembled(pieces, on_disk(tmp_path), load(tmp_path, transformers.BertModel))
    assert not reasons
    assert {p.split(".")[0] for p in left if p.endswith(": unused")} == {"cls"}
    assert {p for p in left if p.endswith("not on disk")} == {
        "pooler.dense.weight: not on disk",
        "pooler.dense.bias: not on disk",
    }
    assert pieces["encoder.layer.0.output.dense.weight"][0].key == "bert.encoder.layer.0.output.dense.weight"


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
def test_names_of_older_versions(tmp_path, name, model_type, old):
    """Files with the names that older versions of transformers wrote are located completely."""
    model = build(name, model_type)
    model.save_pretrained(tmp_path)
    disk = {old(key): t for key, t in on_disk(tmp_path).items()}
    assert set(disk) != set(on_disk(tmp_path))
    save_file(disk, tmp_path / "model.safetensors", {"format": "pt"})
    pieces, reasons, left = map_folder(tmp_path)
    assert (reasons, left) == ({}, [])
    assert set(pieces) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert_assembled(pieces, disk, load(tmp_path, type(model)))


def test_tied_weights_whichever_name_is_on_disk():
    """Both names of a tied weight get the pieces of the one that was saved; if both were, each gets its namesake's."""
    with torch.device("meta"):
        model = build("GPT2LMHeadModel", "gpt2")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    both = ["transformer.wte.weight", "lm_head.weight"]
    shape = shapes.pop(both[0])
    for keys in ([both[0]], [both[1]], both):
        weight_map = locate_weights(model, shapes | dict.fromkeys(keys, shape))
        pieces = weight_map.pieces
        assert (weight_map.reasons, leftovers(model, weight_map)) == ({}, [])
        assert [pieces[name][0].key for name in both] == (keys * 2)[:2]


def test_unused_keys_missing_parameters_and_wrong_shapes():
    """A key without a parameter is unused, a parameter without a key is missing, and a wrong shape gives a reason."""
    with torch.device("meta"):
        model = build("LlamaForCausalLM", "llama")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    del shapes["model.norm.weight"]
    shapes |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "model.stranger": (2,), "lm_head.weight": (7, 32)}
    weight_map = locate_weights(model, shapes)
    pieces, reasons, _ = weight_map
    assert set(leftovers(model, weight_map)) == {"model.stranger: unused", "model.norm.weight: not on disk"}
    assert reasons == {
        "lm_head.weight": "lm_head.weight: gives shape (7, 32), but the model's parameter has shape (99, 32)"
    }
    assert set(pieces) == {n for n, _ in model.named_parameters()} - {"model.norm.weight", "lm_head.weight"}


def test_layers_that_lack_an_expert_are_not_located():
    """A layer that lacks experts is not located, and the reason names the conversion and its first tensor."""
    with torch.device("meta"):
        model = build("MixtralForCausalLM", "mixtral", num_local_experts=3)
    part = "model.layers.0.block_sparse_moe.experts."
    for keys in (
        [f"{part}{i}.w{j}.weight" for i in range(2) for j in (1, 3)],
        [f"{part}{i}.w1.weight" for i in range(3)],
    ):
        pieces, reasons, _ = locate_weights(model, dict.fromkeys(keys, (32, 32)))
        assert not pieces
        assert list(reasons) == ["model.layers.0.mlp.experts.gate_up_proj"]
        assert reasons["model.layers.0.mlp.experts.gate_up_proj"].startswith(
            f"MergeModulelist, Concatenate of {part}0.w1.weight: "
        )
    uneven = {f"{part}{i}.w2.weight": (32 - i, 32) for i in range(3)}
    assert "MergeModulelist of" in locate_weights(model, uneven)[1]["model.layers.0.mlp.experts.down_proj"]


def test_names_that_collide(tmp_path, monkeypatch):
    """Of two keys for one parameter the first is used; a renaming that would spoil a correct name is not applied."""
    model = build("BertForMaskedLM", "bert")
    model.save_pretrained(tmp_path)
    name = "bert.embeddings.LayerNorm."
    old_names = {name + "gamma": torch.rand(32), name + "beta": torch.rand(32)}
    save_file(on_disk(tmp_path) | old_names, tmp_path / "model.safetensors", {"format": "pt"})
    pieces, _, left = map_folder(tmp_path)
    assert_assembled(pieces, on_disk(tmp_path), load(tmp_path, type(model)))
    assert left == [f"{name}{key}: unused" for key in ("bias", "weight")]

    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    monkeypatch.setattr(
        conversion_mapping, "get_model_conversion_mapping", lambda *_: [WeightRenaming("embeddings", "nowhere")]
    )
    assert map_folder(tmp_path)[0][f"{name}weight"][0].key == f"{name}weight"


def test_conversions_that_compute_values_are_refused(monkeypatch):
    """A conversion that computes new values, or fails, gives a reason that names it: a delta could not be written."""
    from transformers.core_model_loading import Chunk

    with torch.device("meta"):
        model = build("NomicBertModel", "nomic_bert")
    fused = {f"encoder.layers.{i}.attn.Wqkv.weight": (384, 32) for i in range(2)}
    assert len(locate_weights(model, fused)[0]) == 6
    plain = Chunk.convert
    for change in (lambda t: t * 2, lambda t: t.clone().mul_(2)):
        monkeypatch.setattr(
            Chunk,
            "convert",
            lambda *args, change=change, **more: {k: change(t) for k, t in plain(*args, **more).items()},
        )
        pieces, reasons, _ = locate_weights(model, fused)
        assert not pieces
        assert set(reasons) == {f"layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qkv"}
        assert all(
            reason.startswith("Chunk of encoder.layers.") and "computes new values" in reason
            for reason in reasons.values()
        )
    monkeypatch.setattr(Chunk, "convert", lambda *args, **more: 1 / 0)
    assert all("division by zero" in reason for reason in locate_weights(model, fused)[1].values())


def test_without_transformers_rules_names_are_taken_as_they_are(monkeypatch):
    """For other modules, and versions of transformers with other internals, names on disk are those in memory."""
    model: nn.Module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weight_map = locate_weights(
        model, {"0.weight": (2, 3), "0.bias": (3,), "1.running_mean": (2,), "1.weight": (2,), "x": (1,)}
    )
    pieces, reasons, _ = weight_map
    plain = StridedView(0, (2, 3), (3, 1))
    assert pieces == {
        "0.weight": (StoredPiece("0.weight", plain, plain),),
        "1.weight": (StoredPiece("1.weight", StridedView(0, (2,), (1,)), StridedView(0, (2,), (1,))),),
    }
    assert reasons == {"0.bias": "0.bias: gives shape (3,), but the model's parameter has shape (2,)"}
    assert leftovers(model, weight_map) == ["x: unused", "1.bias: not on disk"]

    with torch.device("meta"):
        model = build("MixtralForCausalLM", "mixtral")
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    weight_map = locate_weights(
        model, {"model.norm.weight": (32,), "model.layers.0.block_sparse_moe.experts.0.w1.weight": (32, 32)}
    )
    assert list(weight_map.pieces) == ["model.norm.weight"]
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight: unused" in leftovers(model, weight_map)


def test_build_meta_model(tmp_path):
    """The class is the config's, else the model type's bare model, else None; code in the folder is never run."""
    assert build_meta_model(tmp_path) is None
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    ).to_dict()

    def model(**changes: Any) -> nn.Module | None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return build_meta_model(tmp_path)

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


def assert_traced(trace: TraceMode, meta: Tensor, real: Tensor, shape: tuple[int, ...]) -> None:
    """Assert that the pieces say where the real values came from: element j of tensor i is 1000 i + j."""
    assert meta.shape == real.shape
    assembled = torch.full(real.shape, -1)
    for piece in trace.pieces(meta):
        assert piece.disk.sizes == piece.memory.sizes
        assert (strided(assembled, piece.memory) == -1).all()
        strided(assembled, piece.memory).copy_(
            strided(torch.arange(math.prod(shape)) + 1000 * int(piece.key), piece.disk)
        )
    assert torch.equal(assembled, real)


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
def test_chains_of_moves_are_traced(moves):
    """Each of these chains of operators is located, not only refused."""
    trace = TraceMode()
    metas = [trace.stand_in(str(i), (4, 6)) for i in range(3)]
    with trace, torch.no_grad():
        meta = moves(*metas)
    assert_traced(trace, meta, moves(*(torch.arange(24).view(4, 6) + 1000 * i for i in range(3))), (4, 6))


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        (lambda a, b: a.T.reshape(-1)[:5], "not evenly spaced"),
        (lambda a, b: a.T.reshape(-1).view(4, 6), "not evenly spaced"),
        (lambda a, b: torch.stack([a, b]).chunk(2)[1], "not evenly spaced"),
        (lambda a, b: torch.stack([a, b], 1).chunk(2, 1)[0], "only a part of a tensor that was joined from several"),
        (lambda a, b: a.expand(2, 4, 6).contiguous(), "one element on disk fills several"),
        (lambda a, b: a + b, "add computes new values"),
    ],
    ids=["rest", "rows", "half", "column", "copies", "sum"],
)
def test_elements_without_a_strided_view_are_refused(moves, reason):
    """A result that is not made of strided views of tensors on disk raises Untraceable with the reason."""
    trace = TraceMode()
    with trace, torch.no_grad():
        meta = moves(*(trace.stand_in(str(i), (4, 6)) for i in range(2)))
    with pytest.raises(Untraceable, match=reason):
        list(trace.pieces(meta))


@settings(max_examples=examples(400), deadline=None)
@given(st.data())
def test_any_chain_of_moves_is_traced_or_refused(data):
    """For any chain of operators that move elements, the pieces are right, or Untraceable is raised."""
    trace = TraceMode()
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3).map(tuple))
    count = data.draw(st.integers(1, 3))
    pairs = [
        (trace.stand_in(str(i), shape), torch.arange(math.prod(shape)).view(shape) + 1000 * i) for i in range(count)
    ]
    for _ in range(data.draw(st.integers(0, 2))):
        pairs = move(data, trace, pairs)
    if count > 1:
        join = data.draw(st.sampled_from([torch.stack, torch.cat]))
        dim = data.draw(st.integers(0, pairs[0][0].dim() - 1))
        with trace, torch.no_grad():
            joined = join([meta for meta, _ in pairs], dim)
        pairs = [(joined, join([real for _, real in pairs], dim))]
    for _ in range(data.draw(st.integers(0, 3))):
        pairs = move(data, trace, pairs)
    with contextlib.suppress(Untraceable):
        assert_traced(trace, *pairs[0], shape)


def move(data: st.DataObject, trace: Any, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Apply one random operator to all pairs: to the meta tensors under the mode, to the real ones without it."""
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
    with trace, torch.no_grad():
        metas = [act(meta) for meta, _ in pairs]
    return [(meta, act(real)) for meta, (_, real) in zip(metas, pairs, strict=True)]


def check_model_type(model_type: str, folder: Path) -> str:
    """Check the first of the zoo's configs that can be saved and loaded again; return what is not located, or ""."""
    result = ""
    try:
        tried = list(zoo.configs(model_type))
    except Exception as e:  # a part that the zoo cuts out of other models, or one that needs another library
        return f"skipped: {type(e).__name__}: {e}"
    for _, cls, config in tried:
        try:
            if isinstance(config, Exception):
                raise config
            model = randomize(zoo.make(cls, config))
            model.save_pretrained(folder)  # type: ignore[operator]
            again = load(folder, cls)
        except Exception as e:
            result = f"skipped: {type(e).__name__}: {' '.join(str(e).split())[:150]}"
            continue
        empty = build_meta_model(folder)
        if type(empty) is not cls:  # parts have classes that cannot be looked up by the name in their config
            with torch.device("meta"):
                empty = cls(config)
        pieces, reasons, left = map_folder(folder, empty)
        assert_assembled(pieces, on_disk(folder), again)
        return "; ".join([*(f"{k}: {v}" for k, v in reasons.items()), *left])
    return result


@pytest.mark.long
def test_every_model_type(tmp_path):
    """Every parameter of every model type in the zoo that has a class is located, and correctly."""
    totals: Counter[str] = Counter()
    wrong = {}
    for model_type in zoo.types():
        (folder := tmp_path / model_type).mkdir()
        try:
            result = check_model_type(model_type, folder)
        except Exception as e:
            result = f"{type(e).__name__}: {e}"
        shutil.rmtree(folder)
        kind = "mapped" if not result else "skipped" if result.startswith("skipped") else "wrong"
        totals[kind] += 1
        if result:
            print(f"{kind} {model_type}: {result[:1000]}", flush=True)
        if kind == "wrong":
            wrong[model_type] = result
    print(dict(totals))
    assert not wrong
    assert totals["mapped"] > 400
