"""Makes Python on Linux lack what it lacks on macOS. On PYTHONPATH, it does so in child processes
too.

Python reads neither /proc nor /sys, and has none of the functions that only Linux has.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import types
from typing import Any

LINUX_ONLY = """
    copy_file_range eventfd getxattr memfd_create pidfd_open posix_fadvise posix_fallocate
    sched_getaffinity sched_setaffinity setns setresuid splice unshare
""".split()


_stat = os.stat


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.scandir", "os.listdir"):
        path = str(arguments[0])
        if path.startswith(("/proc/", "/sys/")):
            raise FileNotFoundError(2, "No such file or directory", path)


def _stat_others(path: Any, **options: Any) -> os.stat_result:
    if not isinstance(path, int):
        _refuse("open", (os.fsdecode(path),))
    return _stat(path, **options)


for _name in LINUX_ONLY:
    if hasattr(os, _name):
        delattr(os, _name)
os.stat = _stat_others
sys.addaudithook(_refuse)
sysconfig.get_config_vars()  # looks for a file with the platform's name, once
sys.platform = "darwin"
_settings = types.ModuleType("_scproxy")  # urllib asks it for proxies on macOS
_settings._get_proxies = _settings._get_proxy_settings = dict  # type: ignore[attr-defined]
sys.modules["_scproxy"] = _settings
