"""`imagemill bench`: how fast this machine computes, decodes, and does both; which one bounds a
job, and what to change.

settings ─► measure.run ─► one process per device, rounds of compute | decode | end to end
         ─► verdict ─► report
"""

from __future__ import annotations

from imagemill.bench.measure import run
from imagemill.bench.records import BenchReport, BenchSettings, Rates
from imagemill.bench.verdict import told

__all__ = ["BenchReport", "BenchSettings", "Rates", "run", "told"]
