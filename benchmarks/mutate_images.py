"""Decode mutated images of every format, and compare each verdict with plain Pillow's.

    python benchmarks/mutate_images.py --count 10000 --seed 1

Damages small files of all formats that are decoded; in about half of the cases the checksums fit
the damage, so that it reaches the decoder. Prints a table of format and verdict, how often each
named exception applied, and every other difference. Exit code 1 if there is
one: an image that is `ok` although Pillow refuses it, one that is refused although Pillow reads it,
or other pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import mutations
from imagemill.records import Status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, help="write the files with a difference into this folder"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    verdicts: Counter[tuple[str, str]] = Counter()
    exceptions: Counter[str] = Counter()
    faults = []
    for number, (name, data) in enumerate(mutations.cases(arguments.count, arguments.seed)):
        decoded, difference = mutations.compare(data)
        verdicts[name.split()[0], decoded.status.value] += 1
        if difference is None:
            continue
        if difference in mutations.EXCEPTIONS:
            exceptions[difference] += 1
            continue
        faults.append(f"#{number} {name}: {difference}")
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            (arguments.keep / f"{number}-{name.replace(' ', '-')}").write_bytes(data)
    shown = [status.value for status in Status if any(found == status for _, found in verdicts)]
    print(f"{'format':10}" + "".join(f"{status:>14}" for status in shown))
    for name in sorted({name for name, _ in verdicts}):
        print(f"{name:10}" + "".join(f"{verdicts[name, status]:14}" for status in shown))
    for name, (reason, _) in mutations.EXCEPTIONS.items():
        print(f"\nexception {name}: {exceptions[name]} images. {reason}.")
    print("\n".join(["", *faults]))
    print(
        f"{arguments.count} mutations, seed {arguments.seed}: {len(faults)} unexplained"
        f" differences, {time.perf_counter() - began:.0f} s"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
