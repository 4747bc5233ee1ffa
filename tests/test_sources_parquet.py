"""Parquet files with images in them: found by what the table says, read forward, and never a wrong
image under a right name.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import helpers
import sample_images
from faults.harness import Hold
from imagemill.errors import SourceError
from imagemill.pipeline.sources import open_all, parquet, resolve
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import BadImage, Entry, Filters, Settings, Status
from imagemill.runner import run
from s3 import Bucket, FaultProxy

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Jobs = Callable[..., Settings]
CLI = Callable[..., helpers.Result]


@pytest.fixture(autouse=True)
def _no_open_tables() -> None:
    """Each test begins as a process does: with no table open."""
    parquet._table.cache_clear()


def hf_table(rows: list[tuple[bytes | None, str | None]], column: str = "image") -> pa.Table:
    """A table as 🤗 datasets lays it out, by hand."""
    return pa.table(
        {
            "label": pa.array(range(len(rows))),
            column: pa.array([{"bytes": b, "path": p} for b, p in rows], IMAGE),
        }
    )


def written(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def listed(source: object, filters: Filters | None = None) -> list[Entry]:
    (opened,) = open_all(resolve([str(source)]))
    return list(opened.entries(filters or Filters(), Skipped()))


def fetched(source: object, entry: Entry, max_bytes: int = 2**28) -> bytes:
    (opened,) = open_all(resolve([str(source)]))
    return opened.fetch(entry.path, entry.locator, max_bytes)


def refusal(source: object, entry: Entry, max_bytes: int = 2**28) -> tuple[Status, str]:
    with pytest.raises(BadImage) as caught:
        fetched(source, entry, max_bytes)
    return caught.value.status, caught.value.error


# ── which column ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(4),
        pa.dictionary(pa.int32(), pa.binary()),
    ],
)
def test_bytes_of_any_width_are_images(tmp_path: Path, kind: pa.DataType) -> None:
    """Plain, large, view, of a fixed size, or behind a dictionary."""
    file = written(
        tmp_path / "t.parquet",
        pa.table(
            {"label": [1, 2], "anything": pa.array([b"abcd", b"efgh"], pa.binary()).cast(kind)}
        ),
    )
    assert [fetched(file, entry) for entry in listed(file)] == [b"abcd", b"efgh"]


def test_rows_are_named_by_number_and_by_what_the_table_says(tmp_path: Path) -> None:
    """The number finds the row again; the table's name comes behind it, also where it is absolute,
    odd or missing.
    """
    names = [
        "cat.jpg",
        None,
        "a/b c.png",
        "/absolute.jpg",
        "cat.jpg",
        "\udcff.jpg".encode("utf-8", "surrogateescape").decode("latin-1"),
    ]
    file = written(
        tmp_path / "t.parquet", hf_table([(b"x", name) for name in names]), row_group_size=4
    )
    assert [entry.path for entry in listed(file)] == [
        b"00000000/cat.jpg",
        b"00000001",
        b"00000002/a/b c.png",
        b"00000003//absolute.jpg",
        b"00000004/cat.jpg",
        b"00000005/\xc3\xbf.jpg",
    ]
    assert [entry.path for entry in listed(file, Filters(include=("*.png",)))] == [
        b"00000002/a/b c.png"
    ]
    assert [entry.path for entry in listed(file, Filters(exclude=("*.jpg",)))] == [
        b"00000001",
        b"00000002/a/b c.png",
    ]


def test_datasets_say_which_column_holds_images(tmp_path: Path) -> None:
    """A table written by 🤗 datasets: the column is the one it calls Image, whatever its name and
    beside other bytes.
    """
    import datasets

    data = [sample_images.jpeg(20, 20, seed=seed) for seed in range(3)]
    features = datasets.Features(
        {
            "mask": datasets.Value("binary"),
            "scan": datasets.Image(),
            "label": datasets.Value("int64"),
        }
    )
    made = datasets.Dataset.from_dict(
        {
            "mask": [b"no"] * 3,
            "scan": [{"bytes": item, "path": f"{n}.jpg"} for n, item in enumerate(data)],
            "label": [0, 1, 2],
        },
        features,
    )
    made.to_parquet(str(tmp_path / "t.parquet"))
    entries = listed(tmp_path / "t.parquet")
    assert [entry.path for entry in entries] == [
        b"00000000/0.jpg",
        b"00000001/1.jpg",
        b"00000002/2.jpg",
    ]
    assert [fetched(tmp_path / "t.parquet", entry) for entry in entries] == data


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"thumbnail": b"t", "image": b"i"}, b"i"),
        ({"mask": b"m", "img": b"i", "name": "x"}, b"i"),
        ({"name": "x", "blob": b"b"}, b"b"),
        ({"image": b"i", "bytes": b"b"}, b"i"),
    ],
)
def test_a_column_of_a_known_name_is_taken(
    tmp_path: Path, columns: dict[str, object], chosen: bytes
) -> None:
    """`image` before all, else the only known name, else the only bytes."""
    file = written(
        tmp_path / "t.parquet", pa.table({name: [value] for name, value in columns.items()})
    )
    assert fetched(file, listed(file)[0]) == chosen


@pytest.mark.parametrize(
    ("columns", "suffix", "message"),
    [
        (
            {"front": b"", "back": b""},
            "",
            "has several columns that may be images: front, back. Name one: {file}#front.",
        ),
        (
            {"img": b"", "jpg": b""},
            "",
            "has several columns that may be images: img, jpg. Name one: {file}#img.",
        ),
        (
            {"n": 1, "s": "x"},
            "",
            (
                "has no column of image bytes. Its columns: n (int64), s (string). A column of"
                " paths is read with"
            ),
        ),
        (
            {"image": "x.jpg"},
            "",
            (
                "column 'image' holds text, not the bytes of images. If these are paths:"
                " @{file}#image."
            ),
        ),
        (
            {"image": "x.jpg", "n": 1},
            "#image",
            (
                "column 'image' holds text, not the bytes of images. If these are paths:"
                " @{file}#image."
            ),
        ),
        (
            {"image": b"", "n": 1},
            "#n",
            (
                "column 'n' holds int64, not the bytes of images. Its columns: image (binary), n"
                " (int64)."
            ),
        ),
        (
            {"image": b"", "n": 1},
            "#m",
            "the table has no column 'm'. Its columns: image (binary), n (int64).",
        ),
        (
            {"image": {"data": b""}},
            "",
            "column 'image' holds struct of data, not the bytes of images.",
        ),
        ({"image": [b""]}, "", "column 'image' holds list<"),
    ],
)
def test_a_column_that_cannot_be_chosen_is_one_clear_message(
    tmp_path: Path, columns: dict[str, object], suffix: str, message: str
) -> None:
    """What there is, and how to choose."""
    file = written(
        tmp_path / "t.parquet", pa.table({name: [value] for name, value in columns.items()})
    )
    with pytest.raises(SourceError) as caught:
        listed(f"{file}{suffix}")
    assert message.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_is_named_behind_a_hash_and_a_file_of_that_name_wins(tmp_path: Path) -> None:
    """`t.parquet#back`; unless `t.parquet#back` is itself a file."""
    file = written(tmp_path / "t.parquet", pa.table({"front": [b"f"], "back": [b"b"]}))
    assert fetched(f"{file}#back", listed(f"{file}#back")[0]) == b"b"
    written(tmp_path / "t.parquet#front", pa.table({"x": [b"x"]}))
    os.rename(tmp_path / "t.parquet#front", tmp_path / "t.parquet#front.parquet")
    assert fetched(f"{file}#front.parquet", listed(f"{file}#front.parquet")[0]) == b"x"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """There is no telling which is meant."""
    file = written(
        tmp_path / "t.parquet",
        pa.Table.from_arrays([pa.array([b"a"]), pa.array([b"b"])], names=["image", "image"]),
    )
    with pytest.raises(SourceError, match="has two columns of one name"):
        listed(file)


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────


def test_nulls_are_rows_that_say_so(tmp_path: Path) -> None:
    """No bytes and no path: missing. A path alone is fetched from beside the table; empty bytes are
    an empty image.
    """
    (tmp_path / "there.jpg").write_bytes(b"beside")
    rows = [(b"x", None), (None, None), (None, "there.jpg"), (None, "gone.jpg"), (b"", "empty.jpg")]
    table = hf_table(rows).append_column("n", pa.array(range(5)))
    table = pa.concat_tables([table, table.slice(0, 1).set_column(1, "image", pa.nulls(1, IMAGE))])
    file = written(tmp_path / "t.parquet", table)
    entries = listed(file)
    assert [entry.path for entry in entries][-1] == b"00000005"
    null = (Status.MISSING, "the table has neither bytes nor a path in this row")
    assert fetched(file, entries[0]) == b"x"
    assert refusal(file, entries[1]) == null
    assert fetched(file, entries[2]) == b"beside"
    assert refusal(file, entries[3])[0] is Status.MISSING
    assert fetched(file, entries[4]) == b""
    assert refusal(file, entries[5]) == null


def test_too_large_an_image_is_a_row(tmp_path: Path) -> None:
    """By the length of its bytes."""
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"12345", b"1"]}))
    first, second = listed(file)
    assert refusal(file, first, 4) == (Status.TOO_LARGE, "has 5 bytes, more than --max-bytes 4")
    assert fetched(file, second, 4) == b"1"


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A table of three row groups, the first by far the largest, in many batches of small pages."""
    data = [random.Random(number).randbytes(60_000) + number.to_bytes(4) for number in range(1_200)]
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(
        tmp_path / "deep.parquet", schema, write_batch_size=8, data_page_size=100_000
    ) as writer:
        for first, last in ((0, 1_000), (1_000, 1_001), (1_001, 1_200)):
            writer.write_table(
                pa.table({"image": data[first:last]}, schema), row_group_size=last - first
            )
    return tmp_path / "deep.parquet", data


@pytest.mark.process
def test_any_order_from_any_number_of_threads_gives_the_same_bytes(
    deep: tuple[Path, list[bytes]],
) -> None:
    """Forward from many threads, from the middle, backward and at random."""
    file, data = deep
    entries = listed(file)
    (source,) = open_all(resolve([str(file)]))

    def right(number: int) -> bool:
        return source.fetch(entries[number].path, entries[number].locator, 2**20) == data[number]

    shuffled = random.Random(0).sample(range(1_200), 24)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(1_200)))
        assert all(pool.map(right, [*range(900, 1_100), 1_199, 0, *shuffled]))


def test_reading_forward_reads_each_byte_once(
    deep: tuple[Path, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads that fetch in roughly rising order never begin a row group again, and what is
    kept stays within its bound.
    """
    begun: list[int] = []
    begin = parquet._RowGroup._begin

    def counting(self: Any) -> None:
        begun.append(self._group)
        begin(self)

    monkeypatch.setattr(parquet._RowGroup, "_begin", counting)
    file, _ = deep
    entries = listed(file)
    (source,) = open_all(resolve([str(file)]))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda entry: source.fetch(entry.path, entry.locator, 2**20), entries))
    assert begun == [0, 1, 2]
    assert parquet._table.cache_info().currsize == 1
    table = parquet._table(os.fsencode(file), None, str(file))
    assert parquet._table.cache_info().currsize == 1
    assert list(table._groups) == [1, 2]
    for group in table._groups.values():
        assert sum(kept.nbytes for _, kept in group._kept) <= parquet._KEPT_BYTES


def test_an_image_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    """It is read whole, as a batch of one row."""
    image = bytes(parquet._BATCH_BYTES * 2)
    file = written(tmp_path / "a.parquet", pa.table({"image": [image, b"small"]}))
    assert [fetched(file, entry) for entry in listed(file)] == [image, b"small"]


def test_few_tables_are_open_however_many_are_sources(tmp_path: Path) -> None:
    """A thousand files of a data set hold no more memory, and no more descriptors, than two."""
    before = len(os.listdir("/proc/self/fd"))
    written(tmp_path / "000.parquet", pa.table({"image": [b"0"]}))
    for number in range(1, 60):
        written(tmp_path / f"{number:03d}.parquet", pa.table({"image": [b"%d" % number]}))
    opened = open_all(resolve([str(tmp_path / "{000..059}.parquet")]))
    assert len(opened) == 60
    for number, source in enumerate(opened):
        (entry,) = source.entries(Filters(), Skipped())
        assert source.fetch(entry.path, entry.locator, 99) == b"%d" % number
    assert len(os.listdir("/proc/self/fd")) - before <= 4


# ── damage ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spoil", ["cut", "empty", "footer", "text", "folder-gone"])
def test_a_table_without_a_sound_footer_is_one_clear_message(tmp_path: Path, spoil: str) -> None:
    """Truncated, empty, flipped or no Parquet at all: a SourceError at listing."""
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"x" * 100] * 50}))
    data = file.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    damaged = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "footer": data[: -8 - length] + bytes(length) + data[-8:],
        "text": b"hello\n" * 30,
        "folder-gone": None,
    }[spoil]
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    with pytest.raises(
        SourceError, match=r"^source .*/t\.parquet (is damaged|cannot be read): "
    ) as caught:
        listed(file)
    assert "\n" not in str(caught.value)


def test_damage_inside_costs_what_lies_behind_it_in_its_row_group(tmp_path: Path) -> None:
    """Rows before the damage and other row groups are read; those behind it are corrupt rows, each
    reported in one line, at once.
    """
    data = [random.Random(number).randbytes(500_000) for number in range(40)]
    with pq.ParquetWriter(
        tmp_path / "t.parquet",
        pa.schema([("image", pa.binary())]),
        compression="zstd",
        use_dictionary=False,
        write_batch_size=1,
    ) as writer:
        for half in (data[:20], data[20:]):
            writer.write_table(pa.table({"image": half}))
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    at = content.index(data[12][:64])
    content[at - 200 : at] = bytes(200)
    (tmp_path / "t.parquet").write_bytes(content)
    entries = listed(tmp_path / "t.parquet")
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(
                "ok" if fetched(tmp_path / "t.parquet", entry) == data[number] else "wrong"
            )
        except BadImage as bad:
            assert bad.error.startswith("the table is damaged from row ")
            found.append(bad.status.value)
    first = found.index("corrupt")
    assert 4 <= first <= 12, found
    assert found == ["ok"] * first + ["corrupt"] * (20 - first) + ["ok"] * 20


def test_damage_further_on_costs_no_image_before_it_in_any_order(tmp_path: Path) -> None:
    """A row has one answer, whatever was asked for before it."""
    data = [random.Random(number).randbytes(2**20) for number in range(60)]
    pq.write_table(
        pa.table({"image": data}),
        tmp_path / "t.parquet",
        row_group_size=60,
        use_dictionary=False,
        write_batch_size=1,
        data_page_size=1,
    )
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    at = content.index(data[55][:64])
    content[at - 200 : at] = bytes(200)
    (tmp_path / "t.parquet").write_bytes(content)
    entries = listed(tmp_path / "t.parquet")
    for asked, known in ((5, True), (59, False), (5, True), (50, True), (59, False)):
        if known:
            assert fetched(tmp_path / "t.parquet", entries[asked]) == data[asked]
        else:
            with pytest.raises(BadImage, match="the table is damaged from row"):
                fetched(tmp_path / "t.parquet", entries[asked])


def test_images_that_are_stored_once_for_many_rows_take_no_more_memory(tmp_path: Path) -> None:
    """As in tables of questions about images. A batch is measured in decoded bytes."""
    image = random.Random(0).randbytes(700_000)
    pq.write_table(pa.table({"image": [image] * 300}), tmp_path / "t.parquet")
    entries = listed(tmp_path / "t.parquet")
    before = pa.total_allocated_bytes()
    assert fetched(tmp_path / "t.parquet", entries[0]) == image
    assert pa.total_allocated_bytes() - before < 80e6


@pytest.mark.process
def test_no_flipped_bytes_end_the_process(tmp_path: Path) -> None:
    """Wherever they are: a SourceError, a bad row, or bytes that the decoder judges."""
    random_bytes = random.Random(1)
    table = hf_table([(random_bytes.randbytes(300), f"{n}.jpg") for n in range(40)])
    whole = written(
        tmp_path / "whole.parquet", table, row_group_size=15, compression="snappy"
    ).read_bytes()
    outcomes = set()
    for number in range(250):
        content = bytearray(whole)
        for _ in range(3):
            content[random_bytes.randrange(len(content))] ^= 1 << random_bytes.randrange(8)
        file = tmp_path / f"{number % 8}.parquet"
        file.write_bytes(content)
        parquet._table.cache_clear()
        try:
            for entry in listed(file):
                try:
                    outcomes.add(type(fetched(file, entry)).__name__)
                except BadImage as bad:
                    outcomes.add(bad.status.value)
        except SourceError:
            outcomes.add("SourceError")
    assert {"bytes", "corrupt", "SourceError"} <= outcomes
    assert outcomes <= {"bytes", "corrupt", "SourceError", "missing", "read_error", "too_large"}


def test_a_failure_of_reading_is_a_row_of_its_own_and_nobody_waits_for_it_twice(
    tmp_path: Path,
) -> None:
    """While a table cannot be opened each of many threads fails once; as soon as it can, images
    come.
    """
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"right"] * 8}))
    entries = listed(file)
    file.rename(tmp_path / "moved")
    file.symlink_to(file)  # a loop
    with ThreadPoolExecutor(8) as pool:
        refused = list(pool.map(lambda entry: refusal(file, entry), entries))
    assert {status for status, _ in refused} == {Status.READ_ERROR}
    assert {error.partition(" symbolic")[0] for _, error in refused} == {
        "cannot be read: the table: Too many levels of"
    }
    file.unlink()
    (tmp_path / "moved").rename(file)
    assert [fetched(file, entry) for entry in entries] == [b"right"] * 8


def test_a_table_that_is_gone_or_replaced_gives_no_image(tmp_path: Path) -> None:
    """Another table under the same name would put its images under the listed names; its footer
    gives it away.
    """
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"right"] * 3}))
    entries = listed(file)
    file.rename(tmp_path / "moved.parquet")
    assert refusal(file, entries[0]) == (Status.MISSING, "the table was listed but is gone")
    written(file, pa.table({"image": [b"wrong"] * 3}))
    assert refusal(file, entries[0]) == (
        Status.READ_ERROR,
        "the table was replaced since it was listed: its footer is another",
    )
    parquet._table.cache_clear()
    file.write_text("no table at all")
    assert refusal(file, entries[0])[0] is Status.READ_ERROR
    os.replace(tmp_path / "moved.parquet", file)
    assert fetched(file, entries[0]) == b"right"


# ── in an object store ────────────────────────────────────────────────────────────────────────────


def test_a_table_in_a_store_is_read_forward_and_in_pieces(
    deep: tuple[Path, list[bytes]],
    s3_faults: FaultProxy,
    s3: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same images as from the disk; listing reads the footer alone, and no byte is asked for
    twice while reading forward.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_faults.url)
    file, data = deep
    s3.fill({"deep.parquet": file.read_bytes()})
    entries = listed(f"{s3.url}/deep.parquet")
    assert len(entries) == len(data)
    assert s3_faults.count("GET", "deep.parquet") <= 4
    (source,) = open_all([f"{s3.url}/deep.parquet"])
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda entry: source.fetch(entry.path, entry.locator, 2**20), entries)
        )
    assert found == data
    assert (
        s3_faults.count("GET", "deep.parquet")
        <= 8 + 2 * file.stat().st_size / parquet._BUFFER_BYTES
    )


def test_a_table_that_a_store_does_not_give_is_rows_that_say_so(tmp_path: Path, s3: Bucket) -> None:
    """Gone since it was listed: missing; and once it is back its images are."""
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"right"] * 3}))
    url = s3.fill({"t.parquet": file.read_bytes()}, "below/") + "/t.parquet"
    entries = listed(url)
    s3.remove("below/t.parquet")
    assert refusal(url, entries[0])[0] is Status.MISSING
    s3.fill({"t.parquet": file.read_bytes()}, "below/")
    assert fetched(url, entries[2]) == b"right"


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────


def answers(output: Path) -> list[dict[str, Any]]:
    """Rows without what differs between kinds of source by right."""
    return [
        {key: value for key, value in row.items() if key not in ("source", "path")}
        for row in helpers.rows(output)
    ]


def test_a_table_gives_the_answers_of_its_folder(
    job: Jobs, some_jpegs: dict[str, bytes], tmp_path: Path, imagemill: CLI
) -> None:
    """The same images as folder, as 🤗 data set in two files, and as plain bytes: identical answers,
    each complete and sound.
    """
    files = dict(sorted(some_jpegs.items())) | {"z/bad.jpg": b"not an image" * 9}
    folder = helpers.fill(tmp_path / "folder", files)
    rows: list[tuple[bytes | None, str | None]] = [(data, name) for name, data in files.items()]
    written(tmp_path / "train-0.parquet", hf_table(rows[:25]), row_group_size=7)
    written(tmp_path / "train-1.parquet", hf_table(rows[25:]), row_group_size=100)
    written(tmp_path / "plain.parquet", pa.table({"bytes": list(files.values())}))
    for name, source in (
        ("a", folder),
        ("b", tmp_path / "train-{0..1}.parquet"),
        ("c", tmp_path / "plain.parquet"),
    ):
        summary = run.run(
            job(
                source,
                output=str(tmp_path / name),
                shard_size=6,
                save=("logits",),
                devices="cpu:1",
                num_workers=3,
            )
        )
        assert (summary.images, dict(summary.failed_by_status)) == (41, {"not_an_image": 1})
        assert imagemill("verify", tmp_path / name).code == 0
    assert answers(tmp_path / "b") == answers(tmp_path / "c") == answers(tmp_path / "a")
    assert [row["path"].partition("/")[2] for row in helpers.rows(tmp_path / "b")] == list(files)
    assert (tmp_path / "b" / "failed.txt").read_bytes() == b""
    assert (tmp_path / "a" / "failed.txt").read_text() == f"{folder}/z/bad.jpg\n"


def test_failed_rows_of_a_table_are_reported_and_retried(
    jpegs: Callable[..., Path], tmp_path: Path, imagemill: CLI
) -> None:
    """No line of failed.txt can name them; the run says how many there are, and --retry-failed
    heals what was fixed.
    """
    folder = jpegs(2, **{"bad.jpg": b"x" * 99})
    rows: list[tuple[bytes | None, str | None]] = [
        (sample_images.jpeg(), "in.jpg"),
        (None, "late.jpg"),
        (b"", "empty.jpg"),
    ]
    file = written(tmp_path / "t.parquet", hf_table(rows))
    arguments = (
        "run",
        folder,
        file,
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null",
        "--json",
    )
    result = imagemill(*arguments)
    assert result.json["failed_by_status"] == {"empty": 1, "missing": 1, "not_an_image": 1}
    assert (
        "imagemill: 2 failed images are in archives or tables: not in failed.txt, but"
        " --retry-failed processes them again" in result.err
    )
    assert (tmp_path / "out" / "failed.txt").read_text() == f"{folder}/bad.jpg\n"
    (tmp_path / "late.jpg").write_bytes(sample_images.jpeg())
    assert imagemill(*arguments, "--retry-failed=missing").json["failed_by_status"] == {
        "empty": 1,
        "not_an_image": 1,
    }
    assert imagemill("verify", tmp_path / "out").code == 0


def test_a_killed_run_over_a_table_resumes(
    small_jpegs: Path,
    models_dir: Path,
    tmp_path: Path,
    start: Callable[..., Any],
    imagemill: CLI,
    job: Jobs,
) -> None:
    """SIGKILL to the launcher amid one row group: the same command ends with every row once, as an
    undisturbed run's.
    """
    rows: list[tuple[bytes | None, str | None]] = [
        (path.read_bytes(), path.name) for path in sorted(small_jpegs.iterdir())
    ]
    file = written(tmp_path / "t.parquet", hf_table(rows), compression="none", use_dictionary=False)
    arguments = (
        "--model",
        "tiny",
        "--devices",
        "null:1",
        "--shard-size",
        "4",
        "--batch-size",
        "2",
        "--num-workers",
        "2",
    )
    hold = Hold(tmp_path, 24, IMAGEMILL_MODELS=str(models_dir))
    process = start("run", file, "--output", tmp_path / "out", *arguments, env=hold.environment)
    helpers.until(lambda: len(helpers.parts(tmp_path / "out")) >= 2, process=process)
    process.kill()
    process.wait()
    pids = helpers.worker_pids(tmp_path / "out")
    helpers.until(lambda: not any(map(helpers.running, pids)))
    kept = helpers.parts(tmp_path / "out")
    assert 2 <= len(kept) < 12
    result = imagemill("run", file, "--output", tmp_path / "out", *arguments, "--json")
    assert (result.code, result.json["images"], result.json["ok"]) == (0, 48, 48)
    assert kept.items() <= helpers.parts(tmp_path / "out").items()
    run.run(job(small_jpegs, output=str(tmp_path / "calm")))
    assert answers(tmp_path / "out") == answers(tmp_path / "calm")
    assert imagemill("verify", tmp_path / "out").code == 0


def test_a_row_group_that_ends_early_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the footer promises and nobody finds are rows that say so."""
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"x", b"y"]}))
    first, second = listed(file)
    whole = pq.ParquetFile.iter_batches

    def cut(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        return (batch.slice(0, 1) for batch in whole(self, *arguments, **options))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", cut)
    assert fetched(file, first) == b"x"
    status, error = refusal(file, second)
    assert status is Status.CORRUPT
    assert error == (
        "the table is damaged from row 1 of row group 0 on: row group 0 lacks 1 value of image"
    )


def test_a_row_group_is_begun_again_after_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error passes, and the row that was asked for is there the next time."""
    file = written(tmp_path / "t.parquet", pa.table({"image": [b"x", b"y"]}))
    first, second = listed(file)
    batches = parquet.OpenTable.batches

    def exhausted(*_: Any) -> Iterator[Any]:
        monkeypatch.setattr(parquet.OpenTable, "batches", batches)
        raise MemoryError
        yield

    monkeypatch.setattr(parquet.OpenTable, "batches", exhausted)
    with pytest.raises(MemoryError):
        fetched(file, second)
    assert (fetched(file, second), fetched(file, first)) == (b"y", b"x")


def test_a_table_that_cannot_be_listed_ends_before_anything_is_written(
    tmp_path: Path, imagemill: CLI
) -> None:
    """One line, exit 2; also for a table that is not there."""
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no more")
    for source, text in (
        (tmp_path / "t.parquet", "is damaged"),
        (tmp_path / "none.parquet#image", "No such file or directory"),
    ):
        result = imagemill(
            "run", source, "--output", tmp_path / "out", "--model", "tiny", "--devices", "null"
        )
        assert (result.code, result.out) == (2, "")
        assert text in result.err
        assert result.err.count("\n") == 1


def test_json_of_a_footer_that_is_none_of_ours_does_not_matter(tmp_path: Path) -> None:
    """What another program notes under 🤗's name is not trusted to have their form."""
    for note in (
        b"[]",
        b"{",
        json.dumps({"info": {"features": {"image": "x"}}}).encode(),
        b"\xff",
        b'{"info": null}',
    ):
        file = written(
            tmp_path / "t.parquet",
            pa.table({"image": [b"x"]}).replace_schema_metadata({b"huggingface": note}),
        )
        assert fetched(file, listed(file)[0]) == b"x"
