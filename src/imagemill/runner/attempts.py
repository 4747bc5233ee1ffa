"""What a job does if its devices cannot be used as it was frozen.

    too little free memory    a new job takes smaller batches; a frozen one waits, then ends
    GPUs of `auto` fail       a new job starts on the CPU

A job counts as new while the call that froze it runs and nothing is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from imagemill.display.observer import Watcher
from imagemill.errors import DeviceError, DeviceMemoryError, InexactError, ModelError, WorkerError
from imagemill.job.open_job import OpenJob
from imagemill.records import DeviceSpec, Settings, Summary
from imagemill.runner import freeze

WAIT_S: Final = 30.0
"""How long a frozen job waits. The memory of a process that was killed is free again after a few
seconds.
"""
_PAUSE_S: Final = 2.0


def attempt_until_it_fits(
    attempt: Callable[[OpenJob, Sequence[DeviceSpec], bool], Summary],
    opened: OpenJob,
    chosen: Sequence[DeviceSpec],
    settings: Settings,
    watcher: Watcher,
    *,
    is_new: bool,
    fall_back: Callable[[], tuple[OpenJob, Sequence[DeviceSpec]]] | None,
) -> Summary:
    """Return what `attempt` returns, and repeat it if the devices cannot be used.

    Args:
        attempt: carries the job out; is given the job, its devices, and whether it was begun
            before.
        opened: the frozen job.
        chosen: its devices.
        settings: a batch size in them is never changed.
        watcher: shows what is changed or waited for.
        is_new: whether this call has frozen the job.
        fall_back: freezes a new job again for the CPU; None: the devices were asked for.

    Raises:
        DeviceMemoryError: there is too little memory for the smallest batch, or still too little
            for the frozen one.
        ImagemillError: of the last attempt.
    """
    deadline: float | None = None
    while True:
        try:
            return attempt(opened, chosen, deadline is not None or not is_new)
        except (DeviceError, ModelError, WorkerError) as error:
            is_new = is_new and not opened.committed()
            size = opened.frozen.job.session.batch_size // 2
            may_shrink = is_new and settings.batch_size is None and size > 0
            if may_shrink and isinstance(error, DeviceMemoryError):
                watcher.notify(f"{error} Starting with batches of {size}.")
                opened = freeze.with_batch_size(opened, size, chosen)
            elif is_new and fall_back and not isinstance(error, InexactError):
                reason = str(error).partition("\n")[0]
                watcher.notify(f"{opened.frozen.devices} is not used, but the CPU: {reason}")
                nonce = opened.frozen.plan_nonce
                (opened, chosen), fall_back = fall_back(), None
                opened.store.forget_plan(nonce)
            elif not isinstance(error, DeviceMemoryError):
                raise
            elif is_new or (deadline is not None and time.monotonic() >= deadline):
                raise DeviceMemoryError(f"{error} {_remedy(opened, is_new=is_new)}") from error
            else:
                if deadline is None:
                    watcher.notify(f"{error} Waiting up to {WAIT_S:g} s for more.")
                    deadline = time.monotonic() + WAIT_S
                time.sleep(_PAUSE_S)


def _remedy(opened: OpenJob, *, is_new: bool) -> str:
    if not is_new:
        return "This job was frozen with that batch size. Free memory, or give another --output."
    is_smallest = opened.frozen.job.session.batch_size == 1
    other = "--devices cpu" if is_smallest else "a smaller --batch-size"
    return f"Free memory, or give another --output and {other}."
