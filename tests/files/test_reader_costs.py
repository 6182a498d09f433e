"""Every reader's work grows with the number of tensors, and not with its square."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import FrameType

import pytest

import lorainject as li
import reader_costs


def calls_of_a_read(path: Path) -> int:
    """Return how often Python functions and generators were entered while an adapter was read."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # finalizers are calls, too
    sys.setprofile(note)
    try:
        li.read(path, allow_pickle=True, hints=reader_costs.READ)
    except li.FileError:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("kind", reader_costs.KINDS)
@pytest.mark.parametrize("reader", reader_costs.READERS)
def test_four_times_as_many_tensors_are_four_times_the_work(reader, kind, tmp_path):
    """Calls are counted, because times differ; each step of a generator is a call."""
    pytest.importorskip({"gguf": "gguf", "onnx": "onnxruntime"}.get(reader, "torch"))
    calls = {}
    for count in (100, 400, 1600):
        (folder := tmp_path / str(count)).mkdir()
        calls[count] = calls_of_a_read(reader_costs.write_names(count, kind, reader, folder))
    assert calls[1600] - calls[400] <= 4.2 * (calls[400] - calls[100]) + 1000
