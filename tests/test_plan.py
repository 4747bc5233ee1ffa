"""The plan: the listing, frozen, cut into shards."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from imagemill.errors import OutputError
from imagemill.job import plan
from imagemill.records import Entry


def freeze(folder: Path, entries: list[Entry], shard_size: int, *, by_group: bool = False) -> Path:
    folder.mkdir()
    listing = folder / "listing"
    plan.spool(iter(entries), listing)
    plan.cut(listing, folder, shard_size, by_group=by_group)
    return folder


def listing(groups: list[int]) -> list[Entry]:
    """`groups[i]` images in group i; sizes and names differ."""
    names = ((group, number) for group, count in enumerate(groups) for number in range(count))
    return [
        Entry(group % 2, b"%d/\xff%d.jpg" % (group, number), number - 1, group)
        for group, number in names
    ]


@pytest.mark.process
@examples(max_examples=60)
@given(
    groups=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    shard_size=st.integers(1, 50),
    by_group=st.booleans(),
)
def test_shards_cover_the_listing_exactly_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], shard_size: int, by_group: bool
) -> None:
    """Whatever the sizes: every entry is in one shard, in listing order, numbered from 0; no shard
    is empty or larger than asked.
    """
    entries = listing(groups)
    folder = freeze(
        tmp_path_factory.mktemp("plan") / "plan", entries, shard_size, by_group=by_group
    )
    shards = plan.shards(folder)
    rows = [row for shard in shards for row in plan.read(folder, shard)]
    assert [(row.source, row.path, row.size) for row in rows] == [
        (entry.source, entry.path, entry.size) for entry in entries
    ]
    assert [row.index for row in rows] == list(range(len(entries)))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert [shard.first for shard in shards] == [
        sum(s.count for s in shards[:number]) for number in range(len(shards))
    ]
    assert all(1 <= shard.count <= shard_size for shard in shards)
    full = [shard for shard in shards if shard.count == shard_size]
    assert len(shards) - len(full) <= (len(groups) if by_group else 1)


@examples(max_examples=30)
@given(groups=st.lists(st.integers(1, 30), min_size=2, max_size=5), shard_size=st.integers(1, 40))
def test_shards_end_where_a_group_ends(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], shard_size: int
) -> None:
    """Cut by group, a shard holds images of one group alone and says which."""
    entries = listing(groups)
    folder = freeze(tmp_path_factory.mktemp("plan") / "plan", entries, shard_size, by_group=True)
    for shard in plan.shards(folder):
        assert {entries[row.index].group for row in plan.read(folder, shard)} == {shard.group}


def test_every_row_group_is_one_shard(tmp_path: Path) -> None:
    """A worker reads its shard's rows and no others; more than a file's worth of shards go to a
    second file.
    """
    folder = freeze(tmp_path / "plan", listing([500]), 1)
    files = sorted(folder.glob("plan-*.parquet"))
    assert [pq.read_metadata(path).num_row_groups for path in files] == [200, 200, 100]
    assert [plan.read(folder, shard)[0].index for shard in plan.shards(folder)[::99]] == [
        0,
        99,
        198,
        297,
        396,
        495,
    ]


def test_more_rows_than_a_record_batch_are_cut_across_its_border(tmp_path: Path) -> None:
    """The spool's own batches leave no trace in the shards."""
    entries = [Entry(0, b"%d" % number, -1) for number in range(plan._SPOOL_ROWS * 2 + 5)]
    folder = freeze(tmp_path / "plan", entries, 1_000)
    shards = plan.shards(folder)
    assert [shard.count for shard in shards] == [1_000] * 8 + [197]
    assert plan.read(folder, shards[4])[96].path == b"4096"


@pytest.mark.parametrize(
    ("images", "devices", "size"),
    [
        (0, 1, 32),
        (328, 2, 32),
        (4_000, 8, 62),
        (8_000, 1, 1_000),
        (40_504, 8, 632),
        (100_000, 1, 1_024),
        (10_000_000, 1, 1_024),
        (14_000_000, 8, 1_400),
        (100_000_001, 1, 10_001),
    ],
)
def test_auto_shard_size_is_an_eighth_of_a_devices_share(
    images: int, devices: int, size: int
) -> None:
    """images / (8 × devices), between 32 and 1,024, larger above ten million so that there are
    never more than 10,000 parts.
    """
    assert plan.auto_shard_size(images, devices) == size


def test_memory_does_not_grow_with_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times the images take no more of Python's memory to spool."""
    monkeypatch.setattr(plan, "_SPOOL_ROWS", 2_000)

    def peak(images: int) -> int:
        tracemalloc.start()
        try:
            plan.spool(
                (Entry(0, b"folder/%012d.jpg" % number, number) for number in range(images)),
                tmp_path / str(images),
            )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    one = peak(2_000)
    assert peak(20_000) < 1.3 * one


def test_an_empty_listing_has_no_shards(tmp_path: Path) -> None:
    """No image: no shard, and no error."""
    assert plan.spool(iter(()), tmp_path / "listing") == plan.Listing(0, 0)
    assert plan.shards(freeze(tmp_path / "plan", [], 7)) == []


def test_a_damaged_plan_is_one_clear_error(tmp_path: Path) -> None:
    """It cannot be rebuilt, and the message says so."""
    folder = freeze(tmp_path / "plan", listing([5]), 2)
    shard = plan.shards(folder)[0]
    path = next(folder.glob("plan-*.parquet"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        OutputError,
        match=r"plan-00000-00000\.parquet is damaged: .* start again in another --output",
    ):
        plan.shards(folder)
    with pytest.raises(OutputError, match="is damaged"):
        plan.read(folder, shard)
    path.unlink()
    with pytest.raises(OutputError, match=r"is missing\. If the output was moved or its disk unm"):
        plan.read(folder, shard)


def test_a_listing_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    """Neither the spool nor the plan is taken for whole where the system refuses a write."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file/spool: "):
        plan.spool(iter([Entry(0, b"a", 1)]), tmp_path / "file" / "spool")
    assert plan.spool(iter([Entry(0, b"a", 1)]), tmp_path / "spool") == plan.Listing(1, 1)
    with pytest.raises(OutputError, match=r"cannot write .*file: "):
        plan.cut(tmp_path / "spool", tmp_path / "file", 7, by_group=False)


def test_a_plan_is_compressed_and_its_groups_count_from_0(tmp_path: Path) -> None:
    """Paths resemble each other: a plan of a billion images would take many times the room. A
    source without sub-folders is one group.
    """
    folder = freeze(
        tmp_path / "plan",
        [Entry(0, b"folder/%d.jpg" % number, 1) for number in range(3)],
        7,
        by_group=True,
    )
    assert [path.name for path in folder.glob("plan-*")] == ["plan-00000-00000.parquet"]
    assert [shard.group for shard in plan.shards(folder)] == [0]
    group = pq.read_metadata(folder / "plan-00000-00000.parquet").row_group(0)
    assert {group.column(number).compression for number in range(group.num_columns)} == {"ZSTD"}
