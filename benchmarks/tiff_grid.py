"""Compare TIFF files of every layout with tifffile: each must be read to the same pixels or be
`unsupported`.

    python benchmarks/tiff_grid.py            pairs of properties, 4,600 files, half a minute
    python benchmarks/tiff_grid.py --product  the whole product, 90,000 files, four minutes

Prints how many files had each verdict, then those that are wrong. Exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiff_files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--product", action="store_true", help="try all combinations instead of pairs"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    verdicts: Counter[str] = Counter()
    wrong = []
    for cell in tiff_files.product_cells() if arguments.product else tiff_files.cells():
        verdict = tiff_files.compare(cell)
        verdicts[verdict] += 1
        if verdict not in {"ok", "unsupported", "not written"}:
            wrong.append(f"{cell.name}: {verdict}")
    print(
        *(f"{verdict}: {count}" for verdict, count in verdicts.most_common()),
        *wrong[:200],
        sep="\n",
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
