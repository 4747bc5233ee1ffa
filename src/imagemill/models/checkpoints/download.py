"""Download one file over HTTP(S): resumable, checked, and whole or not at all.

Meanwhile the bytes are in `NAME.partial`, and `NAME.partial.json` says what they are a part of, so
that a later call continues there. The file gets its final name once its size and hash are right.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.parse
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import asdict

from imagemill.errors import DownloadError, UsageError
from imagemill.system import files
from imagemill.system.http import (
    CHUNK_BYTES,
    Answer,
    Client,
    HttpError,
    StatusError,
    UnreachableError,
    announced_bytes,
)
from imagemill.system.messages import DownloadProgress
from imagemill.system.retry import Attempts, RetryPolicy

MIRROR_VARIABLE: Final = "IMAGEMILL_MIRROR"
DOWNLOADING: Final = RetryPolicy(pause_s=1.0, longest_pause_s=30.0, connect_s=3.0, silence_s=30.0)
"""Progress of 1 MiB starts the count of attempts again. Connecting ends after 3 s, so that a
command without a network fails within 5 s.
"""
MAX_BYTES: Final = 16 * 2**30
"""A longer file is refused."""
_PROGRESS_BYTES: Final = 2**20
_RANGE_NOT_SATISFIABLE: Final = 416


def mirrored(url: str) -> str:
    """Return where to fetch `url` from: `$IMAGEMILL_MIRROR/HOST/PATH`, the layout of `wget -x`, or
    `url` itself if the variable is not set.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return url
    parts = urllib.parse.urlsplit(url)
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}"


def fetch(
    url: str,
    target: Path,
    *,
    sha256_prefix: str | None = None,
    progress: DownloadProgress | None = None,
    policy: RetryPolicy | None = None,
) -> str:
    """Download `url` to `target`; return its sha256.

    Args:
        url: http or https.
        target: appears whole, or not at all.
        sha256_prefix: hexadecimal start of the hash it must have; None: any.
        progress: called after every chunk.
        policy: timeouts, attempts and pauses; None: `DOWNLOADING`.

    Raises:
        UsageError: the URL is not http or https.
        DownloadError: it cannot be reached, does not exist, or is not what was expected; says what
            to do.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(
            f"{url!r} cannot be downloaded: give a URL that begins with http:// or https://."
        )
    download = _Download(url, target, progress, policy or DOWNLOADING)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return download.run(sha256_prefix)
    except OSError as error:
        raise DownloadError(
            f"{target} cannot be written: {files.reason(error)}. Free some space, correct the"
            " permissions, or choose another folder with --models-dir."
        ) from error


class _Part(Struct, frozen=True):
    """The file that a `.partial` file is a part of."""

    url: str
    validator: str | None
    """ETag or Last-Modified."""
    total: int | None


class _Download:
    """One file on its way; `fetch` explains the arguments."""

    def __init__(
        self,
        url: str,
        target: Path,
        progress: DownloadProgress | None,
        policy: RetryPolicy,
    ) -> None:
        self._url = url
        self._target = target
        self._partial = target.with_name(target.name + ".partial")
        self._note = target.with_name(target.name + ".partial.json")
        self._progress = progress
        self._policy = policy
        self._client = Client(connect_deadline=True)

    def run(self, sha256_prefix: str | None) -> str:
        """Download the file, check its hash and give it its name."""
        for is_last in (False, True):
            is_joined = self._complete()
            with self._partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            if sha256_prefix is None or found.startswith(sha256_prefix.lower()):
                self._partial.replace(self._target)
                self._note.unlink(missing_ok=True)
                return found
            self._discard()
            if is_last or not is_joined:  # parts of two versions: start again, once
                break
        raise self._error(
            f"sent the wrong file: its sha256 is {found}, it should begin with {sha256_prefix}."
            " The file was removed."
        )

    def _complete(self) -> bool:
        """Repeat requests until the partial file is complete.

        A server that cannot be reached at the first attempt is not tried again: there is no
        network, or the address is wrong.

        Returns:
            whether the file was joined from more than one answer.
        """
        attempts, is_joined, was_reached = Attempts(self._policy), False, False
        while True:
            before = self._bytes()
            try:
                return self._request() or is_joined
            except HttpError as error:
                was_reached = was_reached or not isinstance(error, UnreachableError)
                now = self._bytes()
                is_joined = is_joined or now > 0
                if now >= before + _PROGRESS_BYTES:
                    attempts = Attempts(self._policy)
                is_final = not error.is_temporary or not was_reached
                if is_final or not attempts.pause(error.wait_s):
                    kept = f" {now} bytes are kept; the same command continues there."
                    count = f" ({attempts.failures} attempts)" if attempts.failures > 1 else ""
                    raise self._error(
                        f"cannot be downloaded: {error}{count}.{kept if now else ''}"
                    ) from error

    def _request(self) -> bool:
        """Ask once for the missing bytes and append them. Return whether some were there."""
        have, part = self._resumable()
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if part.validator:
                headers["If-Range"] = part.validator
        try:
            with self._client.get(self._url, self._policy, headers) as answer:
                return self._receive(answer, have, part)
        except StatusError as error:
            if error.code != _RANGE_NOT_SATISFIABLE:
                raise
            raise self._changed() from error

    def _receive(self, answer: Answer, have: int, part: _Part) -> bool:
        if answer.status != 206:
            have = 0
        elif not have or not _continues(answer.headers.get("Content-Range"), have, part):
            raise self._changed()
        length = announced_bytes(answer)
        total = None if length is None else have + length
        if total is not None:
            self._check_size(total, "announces")
        self._note.write_text(json.dumps(asdict(_Part(self._url, _validator(answer), total))))
        got = have
        with self._partial.open("ab" if have else "wb") as file:
            while got <= MAX_BYTES and (chunk := answer.read1(CHUNK_BYTES, decode_content=False)):
                file.write(chunk)
                got += len(chunk)
                if self._progress is not None:
                    self._progress(got, total)
        self._check_size(got, "sent")
        return have > 0

    def _resumable(self) -> tuple[int, _Part]:
        """Return how many bytes can be kept, and what they are a part of."""
        nothing = _Part(self._url, None, None)
        try:
            part = _Part(**json.loads(self._note.read_text()))
            have = self._partial.stat().st_size
        except (OSError, ValueError, TypeError):
            return 0, nothing
        if part.url != self._url or (part.total is not None and have >= part.total):
            return 0, nothing
        return have, part

    def _check_size(self, found: int, verb: str) -> None:
        if found > MAX_BYTES:
            self._discard()
            raise self._error(
                f"{verb} {found} bytes instead of at most {MAX_BYTES}. Nothing was kept."
            )

    def _changed(self) -> HttpError:
        self._discard()
        return HttpError("the file on the server has changed meanwhile")

    def _bytes(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _discard(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def _error(self, text: str) -> DownloadError:
        return DownloadError(
            f"{self._url} {text} Get the file some other way and type `imagemill get-model NAME"
            " --from FILE`, give `get-model` another address with --url, or set"
            f" {MIRROR_VARIABLE} to a mirror (laid out as HOST/PATH)."
        )


def _continues(content_range: str | None, have: int, part: _Part) -> bool:
    """Compare `bytes 100-999/1000` with the partial file."""
    unit, _, rest = (content_range or "").partition(" ")
    span, _, total = rest.partition("/")
    same_total = part.total is None or not total.isdigit() or int(total) == part.total
    return unit == "bytes" and span.split("-")[0] == str(have) and same_total


def _validator(answer: Answer) -> str | None:
    etag = answer.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
