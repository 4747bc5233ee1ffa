"""Mutated files of all formats: one row each, and no harm to their neighbours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


@pytest.mark.parametrize("length", range(1, 9))
def test_files_of_any_length_can_be_mutated(length: int) -> None:
    """Two mutations in a row may meet a file of a byte or two, which the first of them has left."""
    import hostile

    for mutate in hostile.MUTATIONS:
        changed = {
            bytes(mutate(bytes(length), random.Random(seed), b"other file")) for seed in range(200)
        }
        assert len(changed) > 1, mutate


def test_every_mutated_file_is_one_row_and_no_neighbour_changes(tmp_path: Path) -> None:
    """Four hundred of them here; the long form is `python benchmarks/hostile.py --files 5000`,
    docs/faults.md has its result.
    """
    import hostile

    report = hostile.hostile(tmp_path, 400, seed=2)
    assert (report.files, report.good) == (400, 134)
    assert report.statuses.keys() >= {
        "ok",
        "corrupt",
        "truncated",
        "too_large",
        "not_an_image",
        "unsupported",
        "empty",
    }
    assert report.statuses["too_large"] >= 12, "bombs are not to be decoded"
