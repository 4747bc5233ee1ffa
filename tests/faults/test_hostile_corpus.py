"""Mutated files of all formats: one row each, and no harm to their neighbours."""

from __future__ import annotations

from pathlib import Path


def test_every_mutated_file_is_one_row_and_no_neighbour_changes(tmp_path: Path) -> None:
    """Four hundred of them here; the long form is `python bench/hostile.py --files 5000`, docs/faults.md has its result."""
    import hostile

    report = hostile.hostile(tmp_path, 400, seed=2)
    assert (report.files, report.good) == (400, 134)
    assert report.statuses.keys() >= {"ok", "corrupt", "truncated", "too_large", "not_an_image", "unsupported", "empty"}
    assert report.statuses["too_large"] >= 12, "bombs are not to be decoded"
