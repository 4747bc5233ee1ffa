"""huggingface_hub as imagemill uses it: loaded without telemetry, silent, and with errors that are
one line.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final, TypeVar

from imagemill.errors import DownloadError, UsageError
from imagemill.system import interruptible
from imagemill.system.messages import DownloadProgress, one_line
from imagemill.system.retry import Attempts, RetryPolicy

T = TypeVar("T")

_RETRYING: Final = RetryPolicy(attempts=3, pause_s=1.0)


def load() -> Any:
    """Import huggingface_hub with its telemetry off, unless the user turns it on.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UsageError(
            "hf: names need a package that is not installed. Type: pip install 'imagemill[hub]'"
        ) from error
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


class UnreachableError(DownloadError):
    """The Hub did not answer, or must not be asked."""


def call(repo: str, revision: str, function: Callable[[], T], *, cleans_up: bool = False) -> T:
    """Return what a function of huggingface_hub returns; repeat it after errors that may pass.

    Args:
        repo: for messages.
        revision: for messages.
        function: is called in a thread, so that a name server that does not answer cannot block
            signals.
        cleans_up: call it in this thread instead: a signal ends it there, so that it removes its
            temporary files.

    Raises:
        DownloadError: one line, whatever the library raised.
    """
    attempts = Attempts(_RETRYING)
    while True:
        try:
            with _quiet():
                return function() if cleans_up else interruptible.run(function)
        except Exception as error:
            cause = _cause(error)
            if not _is_temporary(cause) or not attempts.pause():
                raise _translated(repo, revision, cause) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings off the terminal: errors are reported in our own words."""
    import warnings

    logging = load().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _cause(error: BaseException) -> BaseException:
    """Return the error that a "not in the cache either" error hides."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_temporary(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # httpx's; a name that is not known, or nobody who listens, will be so in a second, too.
    return type(error).__name__ in (
        "ReadTimeout", "ReadError", "RemoteProtocolError", "WriteError", "PoolTimeout"
    )  # fmt: skip


def _translated(repo: str, revision: str, error: BaseException) -> DownloadError:
    """Return the line for an error of the library."""
    from huggingface_hub import constants, errors

    where = f"hf:{repo}"
    page = f"{constants.ENDPOINT}/{repo}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"{where} is gated: its owner wants you to accept conditions. Accept them at {page},"
            f" then {login}."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(
            f"{where} has no revision {revision}. {page} lists its branches and tags."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        answer = f" ({status})" if status else ""
        return DownloadError(
            f"{where} does not exist or is private{answer}. Check the name at {page}. If it is"
            f" private, {login}."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UnreachableError(
            f"{where} at {revision} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or"
            f" fill the cache on a machine with a connection: hf download {repo}."
        )
    text = re.sub(r"^\[Errno -?\d+\] ", "", one_line(error)).rstrip(".")
    if status is None and (type(error).__module__ or "").startswith("httpx"):
        return UnreachableError(
            f"{where} cannot be downloaded from {constants.ENDPOINT}: {text}. Check the connection;"
            " HF_ENDPOINT names a mirror."
        )
    return DownloadError(f"{where} cannot be downloaded from {constants.ENDPOINT}: {text}.")


def make_bar(done: int, total: int, progress: DownloadProgress | None) -> type:
    """Return a class that huggingface_hub uses as tqdm, and that reports to `progress`."""

    class Bar:
        total = None
        format_dict: ClassVar[dict[str, object]] = {}

        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self.n = initial

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            if progress is not None:
                progress(min(done + self.n, total), total)

        def update_transfer(self, count: float | None = 1) -> None:
            """Ignore bytes on the network, which are compressed; a class that has this method gets
            the bytes of the file in `update`.
            """

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return Bar
