"""What becomes of parts that are damaged on disk: `verify` finds them, `--quarantine` moves them
to another folder, `run` computes them again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import harness
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import helpers
import sample_images

pytestmark = pytest.mark.process


def change(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def act(part: Path) -> None:
        pq.write_table(edit(pq.read_table(part)), part, write_page_checksum=True)

    return act


def renamed(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata(
        {**table.schema.metadata, b"imagemill.answer_id": b"0123456789abcdef"}
    )


def flip(part: Path, at: int, bit: int) -> None:
    data = bytearray(part.read_bytes())
    data[at] ^= 1 << bit
    part.write_bytes(data)


DAMAGES: list[tuple[Callable[[Path], None], str, bool]] = [
    (Path.unlink, "is missing", False),
    (change(lambda table: table.slice(1)), "has 7 rows, its shard has 8 images", True),
    (
        change(lambda table: pa.concat_tables([table.slice(0, 7), table.slice(0, 1)])),
        "has image 16 twice",
        True,
    ),
    (change(renamed), "has answer id 0123456789abcdef, the job has", True),
    (lambda part: part.write_bytes(b""), "cannot be read", True),
]
"""By shard: what is done to its part, what `verify` says, and whether there is something to move
to another folder.
"""


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "no manifest"])
def test_damage_is_found_moved_aside_and_computed_again(
    null_run, imagemill, small_jpegs: Path, tmp_path: Path, with_manifest: bool
) -> None:
    """Every kind of it, through the command line, manifest or no manifest to tell by; sound parts
    are left alone.
    """
    output = tmp_path / "out"
    assert null_run(small_jpegs, "--output", output).code == 0
    before, untouched = harness.part_sums(output), helpers.parts(output)["part-000005.parquet"]
    parts = [output / "predictions" / f"part-{shard:06d}.parquet" for shard in range(len(DAMAGES))]
    for part, (act, _, _) in zip(parts, DAMAGES, strict=True):
        act(part)
    if not with_manifest:
        (output / "manifest.json").unlink()
    found = imagemill("verify", output)
    assert found.code == 1
    reported = found.out.splitlines()
    for part, (_, what, damaged) in zip(parts, DAMAGES, strict=True):
        expected = (
            "is not the file that was committed: its sha256 differs from the manifest's"
            if with_manifest and damaged
            else what
        )
        assert any(line.startswith(f"{part} {expected}") for line in reported), (part, reported)
    assert len(reported) == len(DAMAGES) + 1 + (not with_manifest)

    found = imagemill("verify", output, "--quarantine", "--json")
    assert found.code == 1
    moved = [Path(path) for path in found.json["moved"]]
    assert len(moved) == sum(damaged for _, _, damaged in DAMAGES)
    assert all(path.parent == output / "quarantine" and path.exists() for path in moved)
    assert not any(part.exists() for part in parts)
    result = null_run(small_jpegs, "--output", output, "--json")
    assert (result.code, result.json["resumed_shards"]) == (0, 1)
    assert imagemill("verify", output).code == 0
    harness.assert_complete(output)
    assert harness.part_sums(output) == before
    assert helpers.parts(output)["part-000005.parquet"] == untouched


def test_a_flipped_bit_anywhere_is_found(
    null_run, imagemill, small_jpegs: Path, tmp_path: Path
) -> None:
    """Every byte of a part counts: two hundred flips over a part, first and last byte included,
    none escapes; undone, all is sound.
    """
    from imagemill.job.open_job import OpenJob

    output = tmp_path / "out"
    source = helpers.fill(
        tmp_path / "source", {f"{seed}.jpg": sample_images.jpeg(seed=seed) for seed in range(8)}
    )
    assert null_run(source, "--output", output).code == 0
    part = output / "predictions" / "part-000000.parquet"
    size, rng = part.stat().st_size, random.Random(1)
    for at in (0, 1, size - 1, size - 5, *rng.sample(range(size), 196)):
        bit = rng.randrange(8)
        flip(part, at, bit)
        problems, _ = OpenJob.open(output).verify()
        assert [problem.path for problem in problems] == [part], (at, bit)
        flip(part, at, bit)
    assert imagemill("verify", output).code == 0
