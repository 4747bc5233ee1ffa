"""The targets: what the figures of one run on one card must come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One figure of a stage, and how large it must be at least, or may be at most."""

    name: str
    what: str
    goal: float
    stage: str = ""
    """Empty: what it measures is not built."""
    figure: str = ""
    is_least: bool = True
    stretch: float | None = None

    def judge(self, stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the target's line of the table, given each stage's figures."""
        value = stages.get(self.stage, {}).get(self.figure)
        if not self.stage:
            verdict = "not built"
        elif value is None:
            verdict = "not run"
        else:
            is_met = value >= self.goal if self.is_least else value <= self.goal
            verdict = "ok" if is_met else "MISSED"
        sign = "≥" if self.is_least else "≤"
        goal = f"{sign} {self.goal:g}" + ("" if self.stretch is None else f" ({self.stretch:g})")
        shown = "" if value is None else f"{value:.4g}"
        line = {"target": self.name, "what": self.what, "goal": goal}
        return line | {"value": shown, "verdict": verdict}


TARGETS = (
    Target("T1", "session ÷ timm, AMP channels-last", 1.5, "S6", "to_timm_amp", stretch=2),
    Target("T2", "session ÷ torch.compile", 1.0, "S6", "to_compile", stretch=1.25),
    Target("T3", "session ÷ torch.compile, max-autotune", 0.95, "S12", "to_autotune", stretch=1.1),
    Target("T4", "session ÷ limit by memory traffic", 0.45, "S5", "to_limit", stretch=0.6),
    Target("T5", "its FLOP/s ÷ a bf16 matrix product's", 0.25, "S5", "to_matmul", stretch=0.33),
    Target("T6", "stream with copies ÷ replaying its graph", 0.97, "S5", "to_replay", stretch=0.99),
    Target("T7", "end to end ÷ the slower of decode, compute", 0.95, "S10", "to_slower"),
    Target("T8", "null session ÷ decode only", 0.95),
    Target("T9", "decode only ÷ independent decoder loops", 0.9),
    Target("T10", "CPU of the session's process, µs per image", 40, is_least=False),
    Target("T11", "end to end ÷ timm's inference.py", 2.0, "S10", "to_timm", stretch=2.5),
    Target("T12", "command → first part, seconds", 8, "S10", "first_part_s", False, 6),
    Target("T13a", "fp32 as fp32 on the CPU: top-1", 0.999, "S8", "fp32_top1"),
    Target("T13b", "fp32, difference ÷ largest logit", 1e-4, "S8", "fp32_difference", False),
    Target("T14a", "fp16, EfficientNet-Lite0: top-1", 0.995, "S8", "trained_half_top1"),
    Target("T14b", "fp16, ResNeXt-101 random: top-1", 0.99, "S8", "large_half_top1"),
    Target("T15a", "answers that depend on place or process", 0, "S7", "inexact", False),
    Target("T15b", "parts that differ after kills", 0, "S11", "different_parts", False),
    Target("T15c", "rows that differ in another order", 0, "S11", "different_rows", False),
    Target("T16", "2 GiB free: a new job fits, a frozen one ends", 1, "S11", "fits_small_memory"),
    Target("T17", "GB of the smallest batch at 0.98 of the best", 4, "S5", "compact_gb", False),
)


def table(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per target, given each stage's figures."""
    return [target.judge(stages) for target in TARGETS]


def format_table(lines: list[dict[str, Any]]) -> str:
    """Return the table as text."""
    return "\n".join(
        f"{line['target']:5} {line['what']:46} {line['value']:>9}  {line['goal']:14}"
        f" {line['verdict']}"
        for line in lines
    )
