"""What a job does if a device has too little free memory: a new job takes smaller batches, a frozen
one waits for a moment and then ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from imagemill.display.observer import Watcher
from imagemill.errors import DeviceMemoryError
from imagemill.job.open_job import OpenJob
from imagemill.records import DeviceSpec, Settings, Summary
from imagemill.runner import freeze

WAIT_S: Final = 30.0
"""How long a frozen job waits. The memory of a process that was killed is free again after a few
seconds.
"""
_PAUSE_S: Final = 2.0


def run_with_memory(
    attempt: Callable[[OpenJob, bool], Summary],
    opened: OpenJob,
    chosen: Sequence[DeviceSpec],
    settings: Settings,
    watcher: Watcher,
    *,
    is_new: bool,
) -> Summary:
    """Return what `attempt` returns, and repeat it if a device has too little free memory.

    Args:
        attempt: carries the job out; is given the job, and whether it was begun before.
        opened: the frozen job.
        chosen: its devices.
        settings: a batch size in them is never changed.
        watcher: shows what is changed or waited for.
        is_new: whether this call has frozen the job.

    Raises:
        DeviceMemoryError: there is too little memory for the smallest batch, or still too little
        for the frozen one.
    """
    deadline: float | None = None
    while True:
        try:
            return attempt(opened, deadline is not None or not is_new)
        except DeviceMemoryError as error:
            size = opened.frozen.job.session.batch_size
            if is_new and not opened.committed():
                if settings.batch_size or size == 1:
                    raise DeviceMemoryError(
                        f"{error} Free memory, or give another --output"
                        + (" and a smaller --batch-size." if size > 1 else " and --devices cpu.")
                    ) from error
                watcher.say(f"{error} Starting with batches of {size // 2}.")
                opened = freeze.with_batch_size(opened, size // 2, chosen)
            elif deadline is None:
                deadline = time.monotonic() + WAIT_S
                watcher.say(f"{error} Waiting up to {WAIT_S:g} s for more.")
                time.sleep(_PAUSE_S)
            elif time.monotonic() < deadline:
                time.sleep(_PAUSE_S)
            else:
                raise DeviceMemoryError(
                    f"{error} This job was frozen with that batch size. Free memory, or give"
                    " another --output."
                ) from error
