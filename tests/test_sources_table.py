"""Lists of images in tables: a path or URL in each row of a column, exact to the byte, and no row
lost.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
import sample_images
from imagemill.errors import SourceError
from imagemill.pipeline.sources import open_all, resolve
from imagemill.pipeline.sources.base import Skipped
from imagemill.records import BadImage, Entry, Filters, Settings, Status
from imagemill.runner import run

Jobs = Callable[..., Settings]
CLI = Callable[..., helpers.Result]


def listed(source: str, filters: Filters | None = None) -> list[Entry]:
    (opened,) = open_all(resolve([source]))
    return list(opened.entries(filters or Filters(), Skipped()))


def paths(source: str) -> list[bytes]:
    return [entry.path for entry in listed(source)]


def table(folder: Path, text: str | bytes, name: str = "t.csv") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return f"@{folder / name}"


# ── CSV ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("anything\na.jpg\nb.jpg\n", [b"a.jpg", b"b.jpg"]),
        ("anything\r\na.jpg\r\nb.jpg", [b"a.jpg", b"b.jpg"]),
        ("\ufeffpath,n\na.jpg,1\n", [b"a.jpg"]),
        ("n,url,path\n1,u,p\n", [b"p"]),
        ("n,image_url,label\n1,https://x/y.jpg,z\n", [b"https://x/y.jpg"]),
        (
            'path,n\n"a,b.jpg",1\n"say ""x"".jpg",2\n"new\nline.jpg",3\n',
            [b"a,b.jpg", b'say "x".jpg', b"new\nline.jpg"],
        ),
        (b"path,n\nnot-utf8-\xff\xfe.jpg,1\n", [b"not-utf8-\xff\xfe.jpg"]),
        (
            b"\xff\xfe" + 'path,n\r\n"\u00fc,\n.jpg",1\r\n'.encode("utf-16-le"),
            ["\u00fc,\n.jpg".encode()],
        ),
        (b"\xfe\xff" + "path\na.jpg\n".encode("utf-16-be"), [b"a.jpg"]),
        ("path\na.jpg\n".encode("utf-32"), [b"a.jpg"]),
        ("path\n\na.jpg\n\n", [b"a.jpg"]),
        ("path\n", []),
        ("path,n\n  spaces.jpg ,1\n", [b"  spaces.jpg "]),
        pytest.param(f"path,mask\na.jpg,{'0 1 ' * 500_000}\n", [b"a.jpg"], id="long"),
    ],
)
def test_cells_are_read_as_they_are(tmp_path: Path, text: str | bytes, found: list[bytes]) -> None:
    """Quotes, line breaks in them, either kind of line end, every Unicode encoding, bytes that are
    not UTF-8, blanks, a cell of two million characters.
    """
    assert paths(table(tmp_path, text)) == found


def test_tabs_set_apart_in_tsv(tmp_path: Path) -> None:
    """And commas do not."""
    assert paths(table(tmp_path, "n\tfile\n1\ta,b.jpg\n", "T.TSV")) == [b"a,b.jpg"]


@given(
    names=st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
        min_size=1,
    )
)
def test_whatever_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    """Any names, in a table of two columns."""
    file = tmp_path_factory.mktemp("csv") / "t.csv"
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([["path", "n"], *([name, 1] for name in names)])
    assert paths(f"@{file}") == [name.encode() for name in names]


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("a,b\n1,2\n", "", "has several columns: 'a', 'b'. Name the one of the paths: {source}#a."),
        ("a,b\n1,2\n", "#c", "the table has no column 'c'. Its columns: 'a', 'b'."),
        (
            "path,path\n1,2\n",
            "",
            "the table has several columns 'path'. Its columns: 'path', 'path'.",
        ),
        (
            "a.jpg\nb.jpg\n",
            "",
            (
                "its first line, 'a.jpg', looks like no column's name. The first line must name the"
                " columns"
            ),
        ),
        ("https://x/1\n", "", "its first line, 'https://x/1', looks like no column's name."),
        ("path;n\na.jpg;1\n", "", "its first line, 'path;n', looks like no column's name."),
        ("", "", "is empty. Its first line must name its columns."),
        (
            "path,n\na.jpg,1\nb,c.jpg,2\n",
            "",
            "line 3: has 3 cells, the header names 2 columns. Correct the line",
        ),
        ("path,n\na.jpg,1\nb\n", "", "line 3: has 1 cell, the header names 2 columns."),
        (
            'path,n\n"a.jpg,1\nb,2\n',
            "",
            "cannot be read: unexpected end of data. Correct the line.",
        ),
        (
            'path,n\n"a"b.jpg,1\n',
            "",
            "line 2: cannot be read: ',' expected after '\"'. Correct the line.",
        ),
        (
            "path,n\n" + "x" * (2**24 + 1) + ",1\n",
            "",
            "line 2: cannot be read: field larger than field limit",
        ),
        (
            "path\na.jpg\n".encode("utf-16") + b"x",
            "",
            "cannot be read: 'utf-16-le' codec can't decode byte 0x78 in position",
        ),
        ("path\nhttps://me:secret@x/1.jpg\n", "", "row 1: "),
    ],
)
def test_a_table_that_cannot_be_understood_is_one_clear_message(
    tmp_path: Path, text: str | bytes, suffix: str, message: str
) -> None:
    """What is wrong, on which line, and what to do."""
    source = table(tmp_path, text)
    with pytest.raises(SourceError) as caught:
        listed(source + suffix)
    assert message.format(source=source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_column_is_named_behind_a_hash(tmp_path: Path) -> None:
    """Whatever else it is called; and a file that has the whole of it for a name wins."""
    source = table(tmp_path, "path,b#c\na.jpg,b.jpg\n")
    assert paths(f"{source}#b#c") == [b"b.jpg"]
    (tmp_path / "t.csv#path").write_text("plain.jpg\n")
    assert paths(f"{source}#path") == [b"plain.jpg"]


def test_filters_hold_for_tables_and_empty_cells_stay(tmp_path: Path) -> None:
    """--include and --exclude choose among the cells; an empty one has no name to be chosen by, and
    is kept.
    """
    source = table(tmp_path, "path,n\na.jpg,1\nb.png,2\n,3\n")
    skipped = Skipped()
    (opened,) = open_all(resolve([source]))
    assert [entry.path for entry in opened.entries(Filters(include=("*.png",)), skipped)] == [
        b"b.png",
        b"",
    ]
    assert skipped.by_filter == 1


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_paths_of_any_text_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    """Plain, large, view or dictionary; nulls are empty cells."""
    column = pa.array(["a.jpg", None, "é.jpg", ""], pa.string()).cast(kind)
    pq.write_table(
        pa.table({"n": range(4), "file_path": column}), tmp_path / "t.parquet", row_group_size=3
    )
    entries = listed(f"@{tmp_path / 't.parquet'}")
    assert [entry.path for entry in entries] == [b"a.jpg", b"", "é.jpg".encode(), b""]
    assert [entry.locator for entry in entries] == [b"", b"2", b"", b"4"]


def test_names_with_dots_are_columns_like_any_other(tmp_path: Path) -> None:
    """`url` is not `url.md5` beside it, nor the other way round."""
    pq.write_table(
        pa.table({"url.md5": ["1", "2"], "url": ["a.jpg", "b.jpg"]}), tmp_path / "t.parquet"
    )
    assert paths(f"@{tmp_path / 't.parquet'}") == [b"a.jpg", b"b.jpg"]
    assert paths(f"@{tmp_path / 't.parquet'}#url.md5") == [b"1", b"2"]


def test_a_column_that_holds_no_paths_is_one_clear_message(tmp_path: Path) -> None:
    """Numbers, or the images themselves."""
    image = pa.array(
        [{"bytes": b"x", "path": "y"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"n": [1], "image": image}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match=r"column 'n' holds int64, not paths\.$"):
        listed(f"@{tmp_path / 't.parquet'}#n")
    with pytest.raises(
        SourceError,
        match=(
            r"column 'image' holds struct of bytes, path, not paths. If these are images:"
            r" .*t\.parquet\.$"
        ),
    ):
        listed(f"@{tmp_path / 't.parquet'}")


# ── rows and whole runs ───────────────────────────────────────────────────────────────────────────


def test_an_empty_cell_is_a_missing_row(tmp_path: Path) -> None:
    """With the number of its row."""
    source = table(tmp_path, 'path\na.jpg\n""\n')
    (opened,) = open_all(resolve([source]))
    entry = listed(source)[1]
    with pytest.raises(BadImage) as caught:
        opened.fetch(entry.path, entry.locator, 99)
    assert (caught.value.status, caught.value.error) == (
        Status.MISSING,
        "the table's cell is empty: row 2",
    )


def test_tables_give_the_answers_of_the_folder(
    job: Jobs, some_jpegs: dict[str, bytes], tmp_path: Path, imagemill: CLI
) -> None:
    """Relative and absolute paths, from CSV, TSV and Parquet, with empty cells and a hostile name:
    the folder's rows, and sound.
    """
    files = dict(sorted(some_jpegs.items())) | {'z/odd, "x"\n.jpg': sample_images.jpeg()}
    folder = helpers.fill(tmp_path / "folder", files)
    run.run(job(folder, output=str(tmp_path / "calm"), save=("logits",), devices="cpu:1"))
    calm = helpers.by_path(tmp_path / "calm")
    relative = [f"folder/{name}" for name in files]
    with (tmp_path / "t.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows(
            [["n", "path"], *([str(n), name] for n, name in enumerate(relative)), ["-", ""]]
        )
    with (tmp_path / "t.tsv").open("w", newline="") as opened:
        rows = [["which one", "n"], *([str(tmp_path / name), "1"] for name in relative)]
        csv.writer(opened, delimiter="\t").writerows(rows)
    pq.write_table(
        pa.table({"url": ["no"] * 42, "image_path": [*relative, None]}), tmp_path / "t.parquet"
    )
    for number, (source, empty, prefix) in enumerate(
        (("t.csv", 1, "folder/"), ("t.tsv#which one", 0, f"{folder}/"), ("t.parquet", 1, "folder/"))
    ):
        output = tmp_path / f"out{number}"
        summary = run.run(
            job(
                f"@{tmp_path / source}",
                output=str(output),
                save=("logits",),
                devices="cpu:1",
                shard_size=5,
            )
        )
        assert (summary.images, dict(summary.failed_by_status)) == (
            41 + empty,
            {"missing": 1} if empty else {},
        )
        found = helpers.by_path(output)
        assert (found.pop("")["error"] if empty else None) == (
            "the table's cell is empty: row 42" if empty else None
        )
        assert {
            path.removeprefix(prefix): row | {"path": path.removeprefix(prefix)}
            for path, row in found.items()
        } == calm
        assert imagemill("verify", output).code == 0
        assert (output / "failed.txt").read_bytes() == b""


def test_failed_paths_of_a_table_are_a_list_again(job: Jobs, tmp_path: Path) -> None:
    """Absolute, as @failed.txt reads them; an empty cell has no path and is left out."""
    (tmp_path / "bad.jpg").write_bytes(b"")
    source = table(tmp_path, 'path\nbad.jpg\n"gone\n.jpg"\n""\n')
    run.run(job(source))
    lines = (tmp_path / "out" / "failed.txt").read_text().splitlines()
    assert lines == [f"{tmp_path}/bad.jpg", f'"{tmp_path}/gone\\n.jpg"']
    again = run.run(job(f"@{tmp_path / 'out' / 'failed.txt'}", output=str(tmp_path / "again")))
    assert dict(again.failed_by_status) == {"empty": 1, "missing": 1}


def test_a_path_that_no_file_can_have_is_a_row(job: Jobs, tmp_path: Path) -> None:
    """A NUL byte in a cell ends no worker."""
    pq.write_table(pa.table({"path": ["nul\0.jpg", "x" * 5_000, "."]}), tmp_path / "t.parquet")
    summary = run.run(job(f"@{tmp_path / 't.parquet'}"))
    assert summary.failed == 3
    assert {row["status"] for row in helpers.rows(tmp_path / "out")} <= {"missing", "read_error"}


def test_a_table_that_is_gone_is_one_line(tmp_path: Path, imagemill: CLI) -> None:
    """Before anything is written."""
    result = imagemill(
        "run",
        f"@{tmp_path}/none.csv#path",
        "--output",
        tmp_path / "out",
        "--model",
        "tiny",
        "--devices",
        "null",
    )
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "No such file or directory" in result.err
    assert not os.path.exists(tmp_path / "out")
