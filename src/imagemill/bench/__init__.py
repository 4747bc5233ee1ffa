"""`imagemill bench` measures how fast this machine computes, decodes and does both, and says what
bounds a job.

settings ─► measure.run ─► one process per device, rounds of compute | decode | end to end
         ─► result ─► report
"""

from __future__ import annotations

from imagemill.bench.measure import run
from imagemill.bench.records import BenchReport, BenchSettings, Rates

__all__ = ["BenchReport", "BenchSettings", "Rates", "run"]
