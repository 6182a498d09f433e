"""Settings of all tests: how many examples Hypothesis draws, and that nothing is downloaded or compiled.

Profiles (`scripts/test --hypothesis-profile=NAME`):

    quick   the default: a quarter of the examples (tests/support/example_count.py), the same ones each time
    whole   all examples, the same ones each time; `scripts/test --whole` takes it
    fresh   all examples, other ones each time
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from compilers import use_python_unpacking

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("whole", settings.get_profile("ci"), max_examples=100)
settings.register_profile("quick", settings.get_profile("whole"), max_examples=25)
settings.register_profile("fresh", settings.get_profile("whole"), derandomize=False)


@pytest.fixture
def quanto_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quanto unpack in Python, so that a test needs no compiler."""
    use_python_unpacking(monkeypatch)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
