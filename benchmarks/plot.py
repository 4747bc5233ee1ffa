"""Draw docs/performance.svg from what benchmarks/peers/run.py measured.

python benchmarks/plot.py peers.json [more.json …] --output docs/performance.svg      (needs
matplotlib)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    rates: dict[str, float] = {}
    for file in asked.measured:
        for name, lines in json.loads(file.read_text()).items():
            steady = [
                line["steady_images_per_second"]
                for line in lines
                if line.get("steady_images_per_second")
            ]
            if steady and name not in rates:
                rates[name] = median(steady)
    names = sorted(rates, key=rates.__getitem__)
    colours = [
        (
            "#999999"
            if name.startswith("limit")
            else "#1f6fb4"
            if name.startswith("imagemill")
            else "#d08c3c"
        )
        for name in names
    ]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 0.9))
    bars = axes.barh(names, [rates[name] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlabel(
        "resnext101_32x4d, images/s, steady medians (blue: imagemill, orange: peers, grey: limit)",
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    mpl.rcParams["svg.hashsalt"] = "imagemill"
    figure.savefig(asked.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
