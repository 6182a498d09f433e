"""Checkpoints of adapters: what is in them, and that a training goes on from them to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lorainject as li
from lorainject import training

from models import bits, ids, llama, randomize
from processes import run_in_processes

SPEC = li.LoraSpec(targets=("q_proj", "down_proj"), r=4, dropout=0.3)
"""With dropout, a training is repeated only if the random generators are."""


def base() -> nn.Module:
    torch.manual_seed(3)
    return llama()


def injected(**changes: Any) -> nn.Module:
    return li.inject(base(), spec=SPEC, **changes)


def arguments(folder: Path | str, **changes: Any) -> Any:
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1, "max_steps": 4,
        "save_steps": 2,
    }  # fmt: skip
    return TrainingArguments(**settings | changes)


def trainer(model: nn.Module, folder: Path | str, *, cls: Any = None, options: Any = None, **changes: Any) -> Any:
    from transformers import Trainer

    rows = [{"input_ids": row, "labels": row} for row in ids(rows=16)]
    return training.adapter_checkpoints(
        (cls or Trainer)(
            model, arguments(folder, **changes), train_dataset=rows, eval_dataset=rows[:4], **(options or {})
        )
    )


def trained(model: nn.Module) -> list[bytes | str]:
    return [bits(p) for p in model.parameters() if p.requires_grad]


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training that was not interrupted."""
    run = trainer(injected(), tmp_path_factory.mktemp("whole"))
    run.train()
    return run


@pytest.mark.parametrize("make", [base, injected])
def test_resume_is_exact(make, whole_run, tmp_path):
    """Into a model with the adapter and into the bare base, a resumed training has the losses and the bits of one that
    was not interrupted."""
    model = make()
    run = trainer(model, tmp_path)
    run.train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-2")
    assert trained(model) == trained(whole_run.model)
    assert losses(run) == losses(whole_run)


def test_a_checkpoint_holds_nothing_of_the_base(whole_run):
    """A checkpoint has A and B, as save writes them, and the states of the training."""
    folder = Path(whole_run.args.output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert files(folder / "checkpoint-4") == {
        "adapter_config.json", "adapter_model.safetensors", "lorainject.json", "optimizer.pt", "rng_state.pth",
        "scheduler.pt", "trainer_state.json", "training_args.bin",
    }  # fmt: skip
    model = li.load(base(), folder / "checkpoint-4")
    assert trained(model) == trained(whole_run.model)
    with safe_open(folder / "checkpoint-4" / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_A." in key or ".lora_B." in key for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"alpha": 8}, ["'default' has alpha=4.0 in the checkpoint, alpha=8.0 on the model (2 times)"]),
        ({"r": 2}, ["'default' has r=4, alpha=4.0 in the checkpoint, r=2, alpha=2.0 on the model (2 times)"]),
        ({"dropout": 0.0}, ["has dropout=0.3 in the checkpoint, dropout=0.0 on the model"]),
        ({"dtype": torch.bfloat16}, ["A=torch.float32 (4, 32)", "A=torch.bfloat16 (4, 32)"]),
        ({"targets": ("q_proj", "up_proj")}, ["up_proj: carries the adapter 'default' on the model alone",
                                              "down_proj: carries the adapter 'default' in the checkpoint alone"]),
    ],
)  # fmt: skip
def test_resume_with_other_settings_names_both_sides(changes, lines, whole_run, tmp_path):
    """Adapters that differ from those of the checkpoint are refused, with both sides, and nothing is changed."""
    model = li.inject(base(), spec=li.LoraSpec(**{k: getattr(SPEC, k) for k in ("targets", "r", "dropout")} | changes))
    before = trained(model)
    with pytest.raises(li.FileError) as error:
        trainer(model, tmp_path).train(resume_from_checkpoint=f"{whole_run.args.output_dir}/checkpoint-2")
    for line in lines:
        assert line in str(error.value)
    assert trained(model) == before


def test_resume_under_another_name_or_with_other_parameters(whole_run, tmp_path):
    """Another name of the adapter, and parameters that train on one side alone, are refused."""
    checkpoint = f"{whole_run.args.output_dir}/checkpoint-2"
    with pytest.raises(li.FileError, match="has the adapters 'default', the model 'other'"):
        trainer(injected(name="other"), tmp_path).train(resume_from_checkpoint=checkpoint)
    model = injected()
    model.model.layers[0].self_attn.q_proj.lora["default"].A.requires_grad_(False)
    with pytest.raises(li.FileError, match=r"0\.self_attn\.q_proj\.lora\.default\.A: trains in the checkpoint alone"):
        trainer(model, tmp_path).train(resume_from_checkpoint=checkpoint)


def two_adapters() -> nn.Module:
    """A frozen adapter, and one that trains on top of it."""
    model = injected(name="sft")
    randomize(model, "sft")
    li.inject(model, ["q_proj", "k_proj"], r=2, name="dpo")
    li.activate(model, "sft", "dpo")
    for p in li.parameters(model, "sft"):
        p.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [base, two_adapters])
def test_several_adapters(make, tmp_path):
    """All adapters are in the checkpoint, the one that trains at its root; a frozen one stays frozen."""
    expected = two_adapters()
    whole = trainer(expected, tmp_path)
    whole.train()
    assert "sft/adapter_model.safetensors" in files(tmp_path / "checkpoint-2")
    assert li.read(tmp_path / "checkpoint-2").name == "dpo"
    model = make()
    run = trainer(model, tmp_path / "again")
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {k: bits(t) for k, t in model.state_dict().items()} == {k: bits(t) for k, t in expected.state_dict().items()}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in expected.named_parameters() if p.requires_grad
    ]
    assert losses(run) == losses(whole)


def test_adapters_in_another_order_are_refused(tmp_path):
    """The states of an optimizer belong to parameters by their order."""

    def both(*names: str) -> nn.Module:
        model = base()
        for name in names:
            li.inject(model, ["q_proj"], r=2, name=name)
        li.activate(model, "a", "b")
        return model

    trainer(both("a", "b"), tmp_path, max_steps=2).train()
    with pytest.raises(li.FileError, match="added in the order 'a', 'b', on the model 'b', 'a'"):
        trainer(both("b", "a"), tmp_path).train(resume_from_checkpoint=True)


def test_best_model_and_number_of_checkpoints(tmp_path):
    """The best adapter is back at the end, the optimizer's parameters are the same objects, and of the checkpoints the
    best and the last one are left."""
    model = injected()
    parameters = list(li.parameters(model))
    run = trainer(
        model, tmp_path, max_steps=8, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False, save_total_limit=2, learning_rate=0.5,
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    scores = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    assert best == str(tmp_path / f"checkpoint-{min(scores, key=scores.__getitem__)}")
    assert best != str(tmp_path / "checkpoint-8"), "the last one is best, so that nothing is tested"
    assert {path.name for path in tmp_path.iterdir()} == {Path(best).name, "checkpoint-8"}
    assert json.loads(Path(best, "trainer_state.json").read_text())["best_model_checkpoint"] == best
    assert trained(li.load(base(), best)) == trained(model)
    assert all(p is q for p, q in zip(parameters, li.parameters(model), strict=True))


def test_save_only_model(tmp_path):
    """Without the optimizer's states, a resumed training is another one, and a warning says so."""
    trainer(injected(), tmp_path, save_only_model=True).train()
    assert "optimizer.pt" not in files(tmp_path / "checkpoint-4")
    with pytest.warns(UserWarning, match="was saved with save_only_model"):
        trainer(injected(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("writer", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_half_a_checkpoint_is_none(writer, whole_run, tmp_path, monkeypatch):
    """What interrupts the writing of a checkpoint leaves nothing that looks like one, and the training is resumed from
    the one before."""
    from transformers import Trainer

    model = injected()
    run = trainer(model, tmp_path)
    original = getattr(type(run), writer)

    def interrupt(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer if writer != "_save" else type(run), writer, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "_lorainject-unfinished"}
    with pytest.raises(li.FileError, match="not written to its end"):
        trainer(base(), tmp_path).train(resume_from_checkpoint=f"{tmp_path}/_lorainject-unfinished/checkpoint-4")
    model = base()
    trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert trained(model) == trained(whole_run.model)


@pytest.mark.long
def test_killed_while_a_checkpoint_is_written(whole_run, tmp_path):
    """After kill -9 in the middle of a checkpoint, the training is resumed from the last whole one."""
    code = f"""
import os, signal
from transformers import Trainer
from test_adapter_checkpoints import injected, trainer
def die(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save_scaler = die
trainer(injected(), {str(tmp_path)!r}).train()
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "_lorainject-unfinished"}
    model = base()
    trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert trained(model) == trained(whole_run.model)


def test_a_checkpoint_replaces_an_older_one_of_its_name(tmp_path):
    """A second training into the same folder overwrites the checkpoints of the first."""
    (tmp_path / "checkpoint-2" / "old").mkdir(parents=True)
    trainer(injected(), tmp_path, max_steps=2).train()
    assert "optimizer.pt" in files(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2" / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


@pytest.mark.parametrize("bare", [False, True])
def test_parameters_of_the_base_that_train_are_in_the_checkpoint(bare, tmp_path):
    """A norm that trains beside A and B is in the checkpoint, and a final save warns that load does not read it."""

    def with_norm() -> nn.Module:
        model = injected()
        model.model.norm.weight.requires_grad_(True)
        return model

    expected = with_norm()
    run = trainer(expected, tmp_path)
    run.train()
    model = base() if bare else with_norm()
    trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trained(model) == trained(expected)
    assert model.model.norm.weight.requires_grad
    with pytest.warns(UserWarning, match=r"model\.norm\.weight train too"):
        run.save_model()


def test_optimizer_with_groups(tmp_path):
    """The groups of LoRA+, passed to the trainer as an optimizer, are resumed to the bit."""

    def run(model: nn.Module, folder: Path) -> Any:
        optimizer = torch.optim.AdamW(training.parameter_groups(model, lr=1e-3))
        return trainer(model, folder, options={"optimizers": (optimizer, None)})

    expected, model = injected(), injected()
    run(expected, tmp_path).train()
    run(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trained(model) == trained(expected)


def test_magnitudes_and_whole_tensors(tmp_path):
    """Whatever save stores is resumed: DoRA's magnitudes and a whole tensor (modules_to_save), from a file of PEFT."""
    import peft

    theirs = peft.get_peft_model(
        base(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lm_head" in name and p.requires_grad:
                p.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")

    def loaded() -> nn.Module:
        return li.load(base(), tmp_path / "theirs")

    expected = loaded()
    trainer(expected, tmp_path).train()
    for model in (loaded(), base()):
        trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trained(model) == trained(expected)


def test_checkpoint_of_an_unchanged_trainer(whole_run, tmp_path):
    """A training that began with an unchanged Trainer goes on with checkpoints of adapters."""
    from transformers import Trainer

    rows = [{"input_ids": row, "labels": row} for row in ids(rows=16)]
    with pytest.warns(UserWarning, match="from_pretrained will not restore the adapters"):
        Trainer(injected(), arguments(tmp_path, save_steps=2), train_dataset=rows).train()
    model = injected()
    trainer(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trained(model) == trained(whole_run.model)


def test_hub_gets_the_adapter_and_its_recipe(tmp_path, monkeypatch):
    """A push uploads the adapter of a whole checkpoint, and in the end the model card with the recipe."""
    import transformers.trainer

    uploads = []

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, **options: Any) -> Any:
            uploads.append((repo_id, commit_message, files(Path(folder_path)), options.get("path_in_repo")))
            done: Future[None] = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    model = injected()
    run = trainer(model, tmp_path / "run", push_to_hub=True, hub_strategy="checkpoint")
    run.train()
    run.push_to_hub()
    assert {repo for repo, *_ in uploads} == {"me/run"}
    assert all("adapter_model.safetensors" in names for _, _, names, _ in uploads)
    assert not any(
        "unfinished" in name or "model.safetensors" in name.split("/") for *_, names, _ in uploads for name in names
    )
    assert "optimizer.pt" in next(names for *_, names, path in uploads if path == "last-checkpoint")
    assert "README.md" in uploads[-1][2]
    assert trained(li.load(base(), tmp_path / "run")) == trained(model)
    card = (tmp_path / "run" / "README.md").read_text()
    for part in ("library_name: lorainject",
                 "| default | model.layers.*.mlp.down_proj | 2 | 4 | 4.0 | standard | 0.3 |",
                 "| learning_rate | 0.01 |", "| train_loss |"):  # fmt: skip
        assert part in card


def test_what_is_refused(tmp_path):
    """A bare model would train its base, and adapters of PEFT have checkpoints of their own."""
    import peft

    with pytest.raises(li.StateError, match="carries no adapter"):
        trainer(base(), tmp_path).train()
    with pytest.raises(li.StateError, match="adapters of PEFT"):
        trainer(peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    run = trainer(injected(), tmp_path)
    run.is_fsdp_enabled = True
    with pytest.raises(li.StateError, match="FSDP shards A and B"):
        training.adapter_checkpoints(run)


def test_the_class_changes_once(tmp_path):
    """An instance and a class get the same derived class, once."""
    from transformers import Trainer

    cls = training.adapter_checkpoints(Trainer)
    run = trainer(injected(), tmp_path)
    assert type(run) is cls
    assert isinstance(run, Trainer)
    assert training.adapter_checkpoints(run) is run
    assert training.adapter_checkpoints(cls) is cls
    assert type(run) is cls


def test_save_pretrained_warns_of_lost_adapters(tmp_path):
    """save_pretrained keeps the base, and says that from_pretrained will not restore the adapters; after merge or eject
    it says nothing."""
    model = injected()
    with pytest.warns(
        UserWarning, match=r"from_pretrained will not restore the adapters on it \('default'\)"
    ) as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    li.merge(model)
    model.save_pretrained(tmp_path)
    li.eject(li.unmerge(model)).save_pretrained(tmp_path)
    injected().state_dict()


def _two_processes(rank: int, folder: str, checkpoint: str | None) -> list[bytes | str]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # asked for, but the group is there already
    model = base() if checkpoint else injected()
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "ddp_backend": "gloo"}
    run = trainer(model, folder, **changes)
    run.train(resume_from_checkpoint=checkpoint)
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    return trained(model)


@pytest.mark.long
def test_two_processes(tmp_path):
    """In a data-parallel training, one process writes, both read, and both have the adapter of one uninterrupted
    training."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run_in_processes(_two_processes, tmp_path / "a", str(tmp_path / "run"), None)
    assert whole[0] == whole[1]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= files(tmp_path / "run" / "checkpoint-2")
    again = run_in_processes(
        _two_processes, tmp_path / "b", str(tmp_path / "again"), str(tmp_path / "run/checkpoint-2")
    )
    assert again == whole
