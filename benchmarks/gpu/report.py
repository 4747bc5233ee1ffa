"""Prints the section of docs/performance.md about a card, from device.py's results.json.

python benchmarks/gpu/report.py OUT/results.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def report(results: Mapping[str, Any]) -> str:
    """Return the section as Markdown."""
    stages = results["stages"]
    figures = {name: found["figures"] for name, found in stages.items()}
    facts = figures.get("S0", {})
    versions = facts.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    machine = f"{facts.get('card', 'no GPU')}, {facts.get('cores', '?')} cores of"
    blocks = [
        f"## How fast is it on an {facts.get('card', results['device'])}?",
        f"Measured on {results['begun'][:10]} by `benchmarks/gpu/device.py` in"
        f" {results['seconds']:.0f} s: {machine} {facts.get('cpu', 'CPU')}. {named}.",
        _table(
            ("", "", "value", "target (stretch)", ""),
            (tuple(x.values()) for x in _targets(results)),
        ),
    ]
    if rows := figures.get("S5", {}).get("sessions"):
        header = ("precision, batch", "images/s", "GB", "seconds to open")
        cells = (
            (name, f"{row['images_s']:,.0f}", f"{row['gb']:.2f}", f"{row['opened_s']:.1f}")
            for name, row in rows.items()
        )
        blocks.append(_table(header, cells))
    for stage, name, what in (
        ("S5", "runners", "one setting of the runner each"),
        ("S6", "rates", "compute only, in alternation"),
        ("S6", "compiled", "compute only, in alternation"),
        ("S12", "compiled", "compute only, max-autotune, in alternation"),
        ("S10", "rates", "from files"),
        ("S10", "null_device", "without a network"),
    ):
        if rates := figures.get(stage, {}).get(name):
            each = ((one, f"{rate:,.0f}") for one, rate in rates.items())
            blocks.append(_table((what, "images/s"), each))
    if results["is_tiny"]:
        blocks.insert(1, "**This was a rehearsal on a tiny network: the figures mean nothing.**")
    bench = figures.get("S10", {}).get("bench") or {}
    if bench.get("busy") is not None:
        bound = figures["S10"]["bound"]
        why = f"bound by {bound}" if bound else figures["S10"]["advice"]
        text = f"From files, the GPU computed {bench['busy']:.0%} of the time; {why}."
        if bench.get("cores_needed"):
            text += f" It would need {bench['cores_needed']} such cores."
        blocks.append(text)
    wrong = [
        f"{name}: {found['status']}" for name, found in stages.items() if found["status"] != "ok"
    ]
    if wrong:
        blocks.append("Stages that did not end well: " + "; ".join(wrong) + ".")
    return "\n\n".join(blocks)


def _targets(results: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for line in results["targets"]:
        yield {key: line[key] for key in ("target", "what", "value", "goal", "verdict")}


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    """Print the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    print(report(json.loads(parser.parse_args().results.read_text())))


if __name__ == "__main__":
    main()
