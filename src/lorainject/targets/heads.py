"""The output head of a model: the weights that "all-linear" leaves out, and why.

A head is found by what it is:

1. It is what transformers calls output embeddings, or it is tied to the word embeddings.
2. Its output leaves a model that was made for a task, or feeds the loss alone (output_flow.py); or it is next to a base
   model and its output goes into the head alone: dense and out_proj of a classifier are both new where a model is
   fine-tuned. A small block counts as one layer. A network (with attention, recurrent cells, or a list of blocks) is
   no head, but at the end of a model its own last layer is one.
3. By name only what the forward does not call, as far as its source tells: a ...Head next to the body.

A base model, which returns features, has no head: its output, too, comes from some last layer, but that layer belongs
to what was trained before. It is a model that AutoModel makes, or whose forward knows no labels, loss or logits, unless
it has output embeddings.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..lora.graft import base_class
from ..lora.model_index import ModelIndex, WeightKey
from ..lora.weight_kinds import kind_of
from .output_flow import Output, output_flow
from .source_analysis import class_methods

OUTPUT_EMBEDDINGS = "output head: the model's output embeddings"
ROUTER = "router of a mixture of experts"
TIED = "output head: tied to the word embeddings"
LEAVES = "output head: its output leaves the model"


def find_heads(index: ModelIndex) -> dict[WeightKey, str]:
    """Return the weights of the output heads of a model, with the reason for each."""
    heads: dict[WeightKey, str] = {}
    modules = [(path, m) for path, m in index.walked if not isinstance(m, torch.jit.ScriptModule)]
    for root in _outermost_models(modules):
        for output in _head_parts(root, index.first_paths) if _is_for_task(root) else ():
            parameter = output.parameter
            keys = _weights_of(output.module) if parameter is None else [(id(output.module), parameter)]
            heads |= dict.fromkeys(keys, LEAVES)
    embeddings = {id(m._parameters.get("weight")) for _, m in modules if isinstance(m, nn.Embedding)} - {id(None)}
    for output_embeddings in find_output_embeddings(index):
        heads |= dict.fromkeys(_weights_of(output_embeddings), OUTPUT_EMBEDDINGS)
    for _, module in modules:
        kind = kind_of(module)
        if kind is not None and kind.form == "linear" and id(module._parameters.get("weight")) in embeddings:
            heads.setdefault((id(module), "weight"), TIED)
    return heads


def find_output_embeddings(index: ModelIndex) -> list[nn.Module]:
    """Return the modules that the models of transformers call their output embeddings."""
    modules = (module for _, module in index.walked if not isinstance(module, torch.jit.ScriptModule))
    found = [embeddings for module in modules if (embeddings := _output_embeddings(module)) is not None]
    return list(dict.fromkeys(found))


def _outermost_models(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[nn.Module]:
    """Yield the models of transformers that are in no other such model."""
    outer = None
    for path, module in modules:
        if (outer is None or not f"{path}.".startswith(outer)) and _is_pretrained(module):
            outer = f"{path}." if path else ""
            yield module


def _weights_of(module: nn.Module) -> Iterator[WeightKey]:
    return ((id(m), name) for m in module.modules() for name in m._parameters)


def _is_pretrained(module: nn.Module) -> bool:
    """True if the module is a model of transformers, or follows its conventions."""
    return hasattr(type(module), "base_model_prefix") and hasattr(module, "config")


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(module, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        with contextlib.suppress(Exception):  # models that have none raise what they like
            found = get_output_embeddings()
            return found if isinstance(found, nn.Module) else None
    return None


def _base_model(module: nn.Module) -> nn.Module | None:
    """Return the base model that a model of transformers is built around; None if there is none."""
    return module._modules.get(getattr(module, "base_model_prefix", None) or "")


def _is_for_task(module: nn.Module) -> bool:
    """True if a model of transformers has output embeddings, or is no base model and knows labels, a loss or logits.

    A model that hands everything to one that was made for a task was made for it, too.
    """
    if _output_embeddings(module) is not None:
        return True
    inner = _base_model(module)
    if inner is not None and inner is not module and _is_pretrained(inner) and _is_for_task(inner):
        return True
    if type(module).__name__.removeprefix("Lora") in _base_models(getattr(module.config, "model_type", "")):
        return False
    forward = next((f for base in base_class(type(module)).__mro__ for f in class_methods(base)
                    if f.name == "forward"), None)  # fmt: skip
    nodes = ast.walk(forward) if forward is not None else ()
    names = (getattr(node, "id", None) or getattr(node, "arg", None) or "" for node in nodes)
    return any(word in name for name in names for word in ("label", "loss", "logits"))


@functools.cache
def _base_models(model_type: str) -> tuple[str, ...]:
    """Return the names of the classes that AutoModel makes for a type of models; those made for a task have a For."""
    with contextlib.suppress(ImportError):
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        names = MODEL_MAPPING_NAMES.get(model_type, ())
        return tuple(name for name in ((names,) if isinstance(names, str) else names) if "For" not in name)
    return ()


def _is_network(output: Output) -> bool:
    """True if an output is that of a model, or of a module with attention, recurrent cells, or a list of blocks of
    several layers each."""
    if output.parameter is not None or kind_of(output.module) is not None:
        return False
    return _is_pretrained(output.module) or any(
        isinstance(m, nn.RNNBase | nn.RNNCellBase)
        or "Attention" in type(m).__name__
        or (isinstance(m, nn.ModuleList) and any(_count_layers(block) > 1 for block in m))
        for m in output.module.modules()
    )


def _count_layers(module: nn.Module) -> int:
    return sum(kind_of(m) is not None for m in module.modules())


def _head_parts(module: nn.Module, paths: Mapping[int, str], is_root: bool = True) -> set[Output]:
    """Return the layers, small blocks and bare parameters that make up the head of a module.

    Args:
        module: The module.
        paths: The path of each module of the model, by the module's id.
        is_root: True for a model, whose base model has no head as long as there is one next to it; False for a network
            at the end of a model.
    """
    base = _base_model(module)
    if base is not None and _is_pretrained(base) and _is_for_task(base):
        base = None

    def may_be_head(output: Output) -> bool:
        path = paths.get(id(output.module), "")
        in_base = base is not None and f"{path}.".startswith(f"{paths[id(base)]}.")
        return not in_base and not _is_network(output)

    flow = output_flow(module)
    parts = set(filter(may_be_head, flow.leaving))
    for output in flow.leaving - parts:
        if output.module not in (module, base) and _is_network(output):
            parts |= _head_parts(output.module, paths, is_root=False)
    if not is_root:
        return parts
    if base is not None:  # what leads to the head alone belongs to it: a dense layer before the classifier is as new
        before = set(filter(may_be_head, flow.consumers))
        while others := {output for output in before if not flow.consumers[output] <= before | parts}:
            before -= others
        parts |= before
    called = {output.module for output in flow.computed}
    for child in module.children():  # next to the base, and not called by the forward, as far as its source tells
        is_named_head = type(child).__name__.endswith(("Head", "Heads")) or (not called and kind_of(child) is not None)
        if is_named_head and may_be_head(Output(child)) and called.isdisjoint(child.modules()):
            parts.add(Output(child))
    if not parts and base is not None and Output(base) in flow.leaving:
        return _head_parts(base, paths, is_root=False)
    return parts
