"""Makes decoders fail: Python runs this at its start if the folder is in PYTHONPATH, and a fork of
`tests/forked.py` if TEST_HOOKS names it.

An image that contains `imagemill-test-crash` ends the process by SIGSEGV, `imagemill-test-hang`
sleeps for ever, `imagemill-test-alarm` ends the process as its own time limit does, and
`imagemill-test-oom` runs out of memory.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
import time

MODULE = "imagemill.pipeline.decoding.decode"


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the first functions that see an image's bytes, once the decoder is imported."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


def patch(module):
    module.read_header = failing(module.read_header)
    module.pillow.decode = failing(module.pillow.decode)


def failing(function):
    def wrapped(data, *arguments):
        if b"imagemill-test-crash" in data:
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)  # another thread may take the signal first
        if b"imagemill-test-alarm" in data:
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(60)
        while b"imagemill-test-hang" in data:
            time.sleep(3600)
        if b"imagemill-test-oom" in data:
            import numpy as np

            # Never written to, so that it costs address space only.
            [np.empty(1 << doubling, np.uint8) for doubling in range(20, 63)]
        return function(data, *arguments)

    return wrapped


if MODULE in sys.modules:
    patch(sys.modules[MODULE])
else:
    sys.meta_path.insert(0, Finder())
