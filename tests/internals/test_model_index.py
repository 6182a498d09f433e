"""How often each verb walks over a model, and what the index of the model lists."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorainject as li
from lorainject.lora import model_index
from lorainject.lora.model_index import ModelIndex

from models import ids, llama, randomize


class CountingDict(dict[str, Any]):
    """The children of a module; counts how often a walk descends into them, walks by torch included."""

    walks = 0

    def items(self):
        self.walks += 1
        return super().items()


def count_walks(model: nn.Module, verb: Callable[[], object]) -> int:
    """Return how often a verb walks over the model: how often it descends into one module."""
    attention = model.get_submodule("model.layers.0.self_attn")
    children = attention.__dict__["_modules"] = CountingDict(attention._modules)
    try:
        verb()
    finally:
        attention.__dict__["_modules"] = dict(children)
    return children.walks


def injected(*names: str) -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    for name in names:
        li.inject(model, ["q_proj", "v_proj", "up_proj"], r=2, name=name)
    randomize(model)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return li.save(injected("default"), tmp_path / "adapter")


def test_every_verb_walks_the_model_once(saved, tmp_path):
    """Each verb builds one index of the model; activate builds none while no module was registered anywhere."""
    both = injected("a", "b")
    merged, again = injected("default"), injected("default")
    li.merge(merged)
    li.merge(again)
    plain = li.eject(injected("default"))
    walks = {
        "find": count_walks(plain, lambda: li.find(plain, ["q_proj", "v_proj"])),
        "find, all-linear": count_walks(plain, lambda: li.find(plain, "all-linear")),
        "load": count_walks(plain, lambda: li.load(plain, saved)),
        "inject": count_walks(plain, lambda: li.inject(plain, ["o_proj"], name="other")),
        "save": count_walks(plain, lambda: li.save(plain, tmp_path / "other", "other")),
        "hotswap": count_walks(plain, lambda: li.hotswap(plain, saved)),
        "parameters": count_walks(plain, lambda: list(li.parameters(plain, "other"))),
        "deltas": count_walks(plain, lambda: list(li.deltas(plain))),
        "probe": count_walks(plain, lambda: li.probe(plain, input_ids=ids())),
        "merge": count_walks(both, lambda: li.merge(both)),
        "unmerge": count_walks(merged, lambda: li.unmerge(merged)),
        "eject one": count_walks(plain, lambda: li.eject(plain, "other")),
        "eject all": count_walks(plain, lambda: li.eject(plain)),
        "eject while merged": count_walks(again, lambda: li.eject(again)),
    }
    assert walks == dict.fromkeys(walks, 1)
    assert count_walks(both, lambda: li.unmerge(both)) == 1

    def visit() -> None:
        with li.merged(both, "a"):
            pass

    assert count_walks(both, visit) == 2, "one at each end: the modules may have changed inside"
    li.activate(both, "b")
    assert count_walks(both, lambda: li.activate(both, "a")) == 0


def test_a_failed_inject_walks_twice(monkeypatch):
    """An inject that fails halfway walks again, to find what it has put on the model, and leaves no adapter."""
    model = llama()

    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lorainject.surgery._freeze", fail)

    def inject() -> None:
        with pytest.raises(MemoryError):
            li.inject(model, ["q_proj"])

    assert count_walks(model, inject) == 2
    assert not ModelIndex(model).sites


def test_switching_a_whole_model_walks_over_no_module(monkeypatch):
    """activate, disabled and rows take no walk on a model that was found to be complete.

    Copies, parts and mistakes are still recognized.
    """
    model = injected("fr", "de")
    twin = copy.deepcopy(model)
    walked = []
    walk = model_index.iter_modules
    li.activate(model, "de")  # the first walk finds the model complete
    monkeypatch.setattr(model_index, "iter_modules", lambda m: walked.append(m) or walk(m))
    li.activate(model, "fr")
    with li.disabled(model), li.rows(model, ["de", None]):
        pass
    assert not walked
    li.activate(twin, "de")
    assert walked
    assert ModelIndex(model).active == ("fr",)
    assert ModelIndex(twin).active == ("de",)
    with pytest.raises(li.StateError, match="no adapter named 'es'"):
        li.activate(model, "es")
    with pytest.raises(li.StateError, match="part of a model that was injected as a whole"):
        li.activate(model.model.layers[0], "de")
    li.merge(model)
    with pytest.raises(li.StateError, match="cannot activate while 'fr' is merged"):
        li.activate(model, "de")
    li.eject(model)
    with pytest.raises(li.StateError, match="carries no adapter"):
        li.activate(model, "de")


def test_shared_modules_and_wrappers():
    """A shared module is listed under each of its paths and its site once; the parts that wrappers add are left out."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    li.inject(model, ["a"], r=2)
    index = ModelIndex(torch.nn.DataParallel(model))
    assert [path for path, module in index.walked if module is shared] == ["a", "b.0"]
    assert list(index.sites) == ["a"]
    assert index.first_paths[id(shared)] == "a"
