"""What the parts of a model are to each other: which layers are the output head, and whose weight a parent reads itself."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Container

import regex
from torch import nn

from .adapters import walk
from .graft import bare
from .kinds import kind_of

# In a method's source: `self.<layer>.weight`, unless only a property of it is asked for; and `self.<layer>(...)`.
READS = regex.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|dim|numel|data|requires_grad|is_\w+)\b|\s*=[^=])")
CALLS = regex.compile(r"\bself\.(\w+)\(")
MULTIPLIES = regex.compile(r"\bself\.(\w+)\.weight\s*@")  # even where another branch calls the layer (Jamba, Falcon Mamba)


def heads(model: nn.Module) -> set[int]:
    """The layers of the output head, by id: what transformers calls output embeddings, and every layer or ...Head that stands
    beside a base model (classifier, score, qa_outputs), wherever in the tree that is."""
    found: list[nn.Module | None] = []
    for _, part in walk(model):
        get = getattr(part, "get_output_embeddings", None)
        with contextlib.suppress(NotImplementedError, AttributeError):  # the DETR family has none, and says so by raising
            found.append(get() if callable(get) else None)
        if (base := part._modules.get(getattr(part, "base_model_prefix", None) or "")) is not None:
            beside = [child for child in part.children() if child is not base]
            found += [child for child in beside if kind_of(child) is not None or type(child).__name__.endswith("Head")]
    return {id(m) for head in found if head is not None for m in head.modules()}


def missed(module: nn.Module) -> str | None:
    """What "all-linear" would leave out in silence: matmul weights that are no layer of their own."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention's in_proj_weight can't carry an adapter yet"
    if isinstance(module, nn.RNNBase):
        return f"the weights of {type(module).__name__} can't carry an adapter yet"
    if any(p.ndim >= 2 for p in module.parameters(recurse=False)) and "expert" in type(module).__name__.lower():
        return f"the experts' weights in {type(module).__name__} can't carry an adapter yet"
    return None


def read_around(model: nn.Module, layers: Container[int]) -> dict[int, str]:
    """Of these layers (by id) the ones whose weight their parent reads itself, so that an adapter would do nothing: the reasons.

    torch's encoder layer does so in eval mode. Other parents are found by their source: a method that reads the weight of a
    layer which it does not call. A parent without source is not found.
    """
    found: dict[int, str] = {}
    for _, parent in walk(model):
        cls = bare(type(parent))
        for name, layer in parent.named_children():
            if id(layer) in layers and name in _weights_read(cls):
                found[id(layer)] = f"{cls.__name__} reads its weight instead of calling it: an adapter would do nothing"
    return found


_READ: dict[type, frozenset[str]] = {}  # reading a source takes milliseconds


def _weights_read(cls: type[nn.Module]) -> frozenset[str]:
    if cls not in _READ:
        _READ[cls] = frozenset({"linear1", "linear2"}) if issubclass(cls, nn.TransformerEncoderLayer) else _by_source(cls)
    return _READ[cls]


def _by_source(cls: type[nn.Module]) -> frozenset[str]:
    if cls.__module__.startswith("torch.nn."):
        return frozenset()
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        methods = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef) and "init" not in f.name]
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    texts = [ast.get_source_segment(source, f) or "" for f in methods]
    return frozenset(name for text in texts for name in {*READS.findall(text)} - {*CALLS.findall(text)} | {*MULTIPLIES.findall(text)})
