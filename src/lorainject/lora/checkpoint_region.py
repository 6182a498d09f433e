"""Which checkpointed region runs now: gradient checkpointing runs a forward a second time, during the backward.

Each run of torch.utils.checkpoint has an object of its own, which torch keeps from the first run of the region to the
second: the context `ctx` of an autograd Function (use_reentrant=True, and the checkpointing functions of other
libraries, which are built in the same way), or a `_CheckpointFrame` (use_reentrant=False). What the first run notes on
that object, the second one finds again.

torch does not hand these objects out, so they are looked up where torch holds them: in local variables of functions
that are being called, and in the closure of the hook that packs saved tensors. If a later version of torch holds them
elsewhere, no region is found, and a test says so (tests/surgery/test_contexts.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType, GeneratorType
from typing import Any

import torch
from torch._C import _current_graph_task_id, _is_fwd_grad_enabled
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils.checkpoint import _CheckpointFrame

CHOICES = "_lora_choices"
"""The attribute of a region that holds what was noted in its first run."""


def choices_in(region: object) -> dict[Any, Any]:
    """Return what was noted on a region, to read or to write."""
    notes: dict[Any, Any] = vars(region).setdefault(CHOICES, {})
    return notes


def region_being_run() -> object | None:
    """Return the innermost checkpointed region that runs for the first time now; None outside of one."""
    if torch.is_grad_enabled():  # use_reentrant=False; the other kind runs without gradients
        hooks = _top_saved_tensors_default_hooks(True)
        cells = getattr(hooks[0], "__closure__", None) or () if hooks is not None else ()
        return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, _CheckpointFrame)), None)
    # The forward of an autograd Function disables forward-mode gradients as well, which no_grad leaves enabled.
    if _is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return None
    return next(_local_variables(forward="ctx"), None)


def regions_being_run() -> Iterator[object]:
    """Yield all checkpointed regions that run for the first time now, the innermost first. This takes longer."""
    for variable in _local_variables(forward="ctx", checkpoint="gen"):
        if isinstance(variable, GeneratorType) and variable.gi_frame is not None:
            variable = variable.gi_frame.f_locals.get("new_frame")
        if variable is not None:
            yield variable


def region_being_run_again() -> object | None:
    """Return the innermost checkpointed region whose second run is under way; None outside of a backward."""
    if _current_graph_task_id() == -1:
        return None
    return next(_local_variables(backward="ctx", unpack_hook="frame"), None)


def check_before_second_run(region: object, check: Callable[[], None]) -> None:
    """Call `check` before a region runs for the second time."""
    attribute = "recompute_fn" if isinstance(region, _CheckpointFrame) else "run_function"
    run = getattr(region, attribute, None)
    if run is not None:

        def checked_run(*args: Any) -> Any:
            check()
            return run(*args)

        setattr(region, attribute, checked_run)


def _local_variables(**names: str) -> Iterator[Any]:
    """Yield local variables of functions that are being called now, the innermost function first.

    Args:
        names: The names of functions, each with the name of the variable.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = names.get(code.co_name)
        if name is not None and (name in code.co_varnames or name in code.co_freevars):
            yield frame.f_locals.get(name)
        frame = frame.f_back
