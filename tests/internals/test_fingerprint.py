"""The fingerprint of a base weight: where its values are, and when two of them agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorainject.numerics.fingerprint import OLD_SAMPLES, SAMPLES, sample_positions, sample_values, samples_agree, ulp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return samples_agree(sample_values(a), sample_values(b), a.dtype, b.dtype)


@pytest.mark.parametrize("width", [64, 1000, 1024, 2584, 4096, 14336])
@pytest.mark.parametrize("rows", [48, 987, 1024, 4096, 32000])
def test_positions_lie_in_many_rows_and_columns(rows, width):
    """Whatever the width, no row, column, or residue of columns has more than a few of them."""
    positions = torch.tensor(sample_positions(rows * width))
    assert len(positions) == SAMPLES
    assert (positions.diff() > 0).all()
    assert len((positions // width).unique()) > 40 or rows < 64
    columns = positions % width
    assert len(columns.unique()) > 35
    assert columns.max() > 0.85 * width
    assert columns.min() < 0.15 * width
    for step in (2, 4, 8):
        assert (columns % step).bincount(minlength=step).min() > 0


def test_positions_are_part_of_the_file_format():
    """They are the same on all machines and in all versions."""
    assert sample_positions(1 << 20)[:6] == [14472, 23454, 33201, 65058, 67278, 87282]
    assert sample_positions(1 << 20, OLD_SAMPLES) == [(2 * i + 1) << 16 for i in range(8)]


@given(numel=st.one_of(st.integers(1, 200), st.integers(1, 1 << 40)), count=st.sampled_from([SAMPLES, OLD_SAMPLES]))
def test_every_weight_has_positions(numel, count):
    positions = sample_positions(numel, count)
    assert len(positions) == count
    assert positions == sorted(positions)
    assert 0 <= positions[0] <= positions[-1] < numel


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 0.02, 1.0, 1000.0])
@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_one_weight_agrees_with_itself_in_every_dtype(a, b, size):
    """Both are rounded from one value, subnormal numbers in float16 included, whatever is rounded first."""
    w = (randn(512, 640) * size).double()
    assert agree(w.to(a), w.to(b))
    assert agree(w.to(a), w.to(a).to(b))
    assert agree(w.to(a).to(b), w.to(a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", DTYPES)
def test_a_change_beyond_rounding_is_noticed_across_dtypes(dtype, other):
    """A change of 1 % of the weight, or of 0.3 % in float16, is more than its rounding."""
    w = randn(512, 512) * 0.02
    change = 0.01 if torch.bfloat16 in (dtype, other) else 0.003
    assert not agree(w.to(dtype), (w + change * 0.02 * randn(512, 512, seed=1)).to(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_change_of_a_sampled_value_is_noticed_within_a_dtype(dtype):
    w = randn(64, 64).to(dtype)
    for position in sample_positions(64 * 64):
        changed = w.clone()
        changed.view(-1)[position] *= 1 + 2 * max(torch.finfo(dtype).eps, 2.0**-23)
        assert not agree(w, changed)
    assert agree(w, w.clone())


def test_nan_agrees_with_nan():
    """A base that holds NaN is recognized."""
    w = torch.full((8, 8), float("nan"))
    assert agree(w, w.clone())
    assert agree(w, w.bfloat16())
    assert not agree(w, torch.ones(8, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_unit_in_the_last_place_is_the_distance_of_neighbors(dtype):
    info = torch.finfo(dtype)
    for x in (1.0, 1.5, 2.0, 3.0, 0.02, info.smallest_normal, info.smallest_normal / 4, 0.0):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[info.bits // 8]
        value = torch.tensor([x], dtype=dtype)
        after = (value.view(bits) + 1).view(dtype)
        assert float(ulp(value.double(), dtype)) == float(after.double() - value.double())
