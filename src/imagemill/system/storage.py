"""Files and objects opened for random access by many threads, and object stores.

`open_blob` takes a local path or an object's URL. Archives and tables are read through the blob, so
the same code reads a zip on a disk and a zip in an object store. `open_bucket` returns a bucket,
or what is below a prefix of it, to list, read and write.

obstore (Rust's object_store) makes the requests: a GET is one request, threads wait outside the
interpreter's lock, and keys are listed as they come. Its clients live in threads that a fork does
not copy; imagemill's processes are spawned, and each makes its own. obstore refuses keys with an
empty, `.` or `..` part or a control character, so boto3 lists and reads these.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

from msgspec.structs import replace

from imagemill.errors import UsageError
from imagemill.system import interruptible, userdirs
from imagemill.system.retry import Attempts, RetryPolicy
from imagemill.system.storage_errors import (
    TemporaryError,
    UnsupportedKeyError,
    reason,
    translated_errors,
)
from imagemill.version import __version__

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, ObjectStore, S3CredentialProvider

SCHEMES = ("s3", "gs", "az")
"""Object stores that can be named in a URL."""
T = TypeVar("T")
_URL = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://")
_ODD_KEY = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f]")
"""Keys that obstore does not read, or takes for another key: with an empty, `.` or `..` part, or a
control character.
"""


READING = RetryPolicy(attempts=10, seconds=35.0, pause_s=0.1, longest_pause_s=5.0)
"""Ends before the 60 s of --max-seconds do, so that an outage is a row and not a dead worker."""
PROBING = replace(READING, attempts=4, seconds=8.0, connect_s=3.0, silence_s=5.0)
"""To find out whether something exists, before anything starts: a mistyped address fails soon."""
WRITING = replace(READING, seconds=90.0, silence_s=None, request_s=120.0)
"""Servers are silent while they receive an upload."""
CLOSING = replace(READING, attempts=1, seconds=2.0, connect_s=2.0, silence_s=None, request_s=4.0)
"""For logs, after the user has asked for the end."""


class Blob(Protocol):
    """A file or object opened for random access. Safe to read from many threads."""

    size: int
    """Bytes."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`; fewer only where the blob ends. Raises: OSError,
        FileNotFoundError where it is gone.
        """
        ...


class LocalBlob:
    """A regular file of a file system."""

    _handle = -1

    def __init__(self, path: bytes) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        found = os.fstat(self._handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "is not a regular file")
        self.size = found.st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset; fewer only at the end."""
        pieces = []
        while length > 0 and (piece := os.pread(self._handle, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)


def is_url(location: str | bytes) -> bool:
    """Return whether a location is a URL and not a path."""
    return _URL.match(os.fsencode(location)) is not None


def is_object(location: str | bytes) -> bool:
    """Return whether a location is the URL of something in an object store."""
    return is_url(location) and os.fsdecode(location).partition("://")[0] in SCHEMES


NO_PLACE = "not a place in an object store. Write it like s3://bucket/prefix"
NO_PASSWORDS = (
    "the URL holds a user name or password, which would be written into every row. Put it into"
    " ~/.netrc or the environment."
)


def names_password(location: str | bytes) -> bool:
    """Return whether a location is a URL with a user name or password in it."""
    rest = os.fsencode(location).partition(b"://")[2]
    return is_url(location) and b"@" in re.split(rb"[/?#]", rest, maxsplit=1)[0]


def beside(file: bytes, path: bytes) -> bytes:
    """Return the location that a path or URL in a file means. It is relative to the folder of the
    file, which is at a path or URL.

    Raises:
        ValueError: it is a `file:` URL of another host, or leads above the bucket or host of the
        file.
    """
    if is_file_url(path):
        return local_path(path)
    if is_url(path):
        return path
    folder = os.path.dirname(file.partition(b"?")[0] if is_url(file) else file)  # noqa: PTH120 - bytes, for names that are not UTF-8
    location = os.path.join(folder, path)  # noqa: PTH118
    return _without_dots(location) if is_url(location) else location


def _without_dots(url: bytes) -> bytes:
    """Resolve `.` and `..` in a URL, which no server does. Raises: ValueError where it leads above
    the host or bucket.
    """
    scheme, _, rest = url.partition(b"://")
    host, *parts = rest.split(b"/")
    kept: list[bytes] = []
    for part in parts:
        if part == b"..":
            if not kept:
                raise ValueError(f"it leads above {os.fsdecode(scheme)}://{os.fsdecode(host)}")
            kept.pop()
        elif part != b".":
            kept.append(part)
    return scheme + b"://" + b"/".join((host, *kept))


def is_file_url(location: str | bytes) -> bool:
    """Return whether a location is a `file:` URL: `file:///a.jpg`, `file://localhost/a.jpg`, or
    `file:/a.jpg` as Java writes it.
    """
    return os.fsencode(location)[:6].lower() == b"file:/"


def local_path(url: bytes) -> bytes:
    """Return the path that a `file:` URL means. Raises: ValueError where it names another host."""
    path = url[len("file:") :]
    if path.startswith(b"//"):
        host, slash, path = path[2:].partition(b"/")
        if host.lower() not in (b"", b"localhost"):
            raise ValueError(
                f"file://{os.fsdecode(host)} is another machine. Mount its disk and give the path"
            )
        path = slash + path
    return unquote_to_bytes(path)


def is_place(url: str) -> bool:
    """Return whether a URL is written as that of a place in an object store."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    is_named = re.fullmatch(r"[\w.-]+", bucket, re.ASCII) is not None
    return scheme in SCHEMES and is_named and "//" not in f"/{prefix}"


def open_bucket(url: str, policy: RetryPolicy | None = None) -> Bucket:
    """Open a bucket, or what is below a prefix of it; nothing is asked of it yet.

    Credentials, region and endpoint come from the standard variables of the environment
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …); boto3 reads the profiles of `~/.aws`.

    Args:
        url: `s3://bucket/prefix`; `gs://` and `az://` come with the library and are not tested.
        policy: when to give up listing and reading; None: `READING`.

    Raises:
        UsageError: the URL makes no sense, or a package is missing.
    """
    if not is_place(url):
        raise UsageError(f"{url}: {NO_PLACE}.")
    return Bucket(*split(url.rstrip("/")), policy or READING)


def split(url: str) -> tuple[str, str]:
    """Return the URL of an object's bucket, and its key."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def open_blob(location: bytes) -> Blob:
    """Open a local path or an object's URL. Raises: OSError; UsageError where a package is
    missing.
    """
    if is_object(location):
        bucket, key = split(os.fsdecode(location))
        return open_bucket(bucket).open(key)
    if is_url(location):
        raise OSError(
            errno.EPROTONOSUPPORT, "an archive or table cannot be read over this protocol"
        )
    return LocalBlob(location)


class Bucket:
    """A bucket of an object store, or what is below a prefix of it. Its objects have keys with `/`
    between their parts. Safe to use from many threads.
    """

    url: str
    """`s3://bucket/prefix`, without a slash at its end."""

    def __init__(self, bucket: str, prefix: str, policy: RetryPolicy) -> None:
        self.url = f"{bucket}/{prefix}" if prefix else bucket
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        self._policy = policy
        self._is_s3 = bucket.startswith("s3://")
        self._client()

    def _client(self, policy: RetryPolicy | None = None) -> ObjectStore:
        return _make_client(self._bucket, policy or self._policy, _environment())

    @property
    def _boto3(self) -> tuple[Any, str]:
        """boto3's client, for the keys that obstore refuses, and what it calls the bucket."""
        return _make_boto3_client(self._policy, _environment()), self._bucket.partition("://")[2]

    def list(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Yield the keys (relative to `url`) that begin with `below`, in the order of their bytes,
        and their sizes. Raises: OSError.
        """
        if not self._prefix and self._is_s3:  # obstore would list a key `/a.jpg` as `a.jpg`
            yield from self._boto3_paths(below, "")
            return
        before: tuple[str, int] | None = None
        for path, size in self._paths(self._prefix + below):
            # An empty object `a/`, which consoles make to show a folder, is listed as `a`, by which
            # name it cannot be read.
            if before is not None and (before[1] or not path.startswith(before[0] + "/")):
                yield before[0][len(self._prefix) :], before[1]
            before = path, size
        if before is not None:
            yield before[0][len(self._prefix) :], before[1]

    def _path(self, key: str) -> str:
        if _ODD_KEY.search(key):
            why = (
                "the key has an empty, `.` or `..` part or a control character, which is not"
                " supported here"
            )
            raise OSError(errno.EINVAL, why, f"{self.url}/{key}")
        return self._prefix + key

    def _paths(self, start: str) -> Iterator[tuple[str, int]]:
        folder = start.rpartition("/")[0] or None  # the library lists folder by folder
        last: str | None = None
        chunks, attempts = None, Attempts(self._policy)
        while True:
            try:
                with translated_errors(self.url):
                    if chunks is None:
                        chunks = iter(self._client().list(folder, offset=last, chunk_size=1_000))
                    chunk = interruptible.run(partial(next, chunks, None))
            except ConnectionResetError as error:
                _pause_or_raise(error, attempts)
                chunks = None
                continue
            except UnsupportedKeyError:
                if not self._is_s3:
                    raise
                yield from self._boto3_paths(start, last or "")
                return
            if chunk is None:
                return
            attempts = Attempts(self._policy)
            for found in chunk:
                if found["path"].startswith(start) and found["path"] != last:
                    yield found["path"], found["size"]
                last = found["path"]

    def _boto3_paths(self, start: str, after: str) -> Iterator[tuple[str, int]]:
        """List the keys after `after` by boto3, which changes none, a page at a time. An empty
        object `a/` only shows a folder.
        """
        client, bucket = self._boto3
        while True:
            ask = partial(client.list_objects_v2, Bucket=bucket, Prefix=start, StartAfter=after)
            page = _read_with_retries(ask, self.url, self._policy)
            for found in page.get("Contents", ()):
                after = found["Key"]
                if found["Size"] or not after.endswith("/"):
                    yield after, found["Size"]
            if not page["IsTruncated"]:
                return
            if not page.get("Contents"):
                raise OSError(
                    errno.EIO, f"the listing stops after {after!r}, and should go on", self.url
                )

    def read(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return one whole object, by one request.

        Raises:
            FileNotFoundError, PermissionError, OSError. With the number EFBIG, it has more than
            `max_bytes`, of which none is read.
        """
        is_odd = self._is_s3 and _ODD_KEY.search(key)
        read = partial(self._read_odd if is_odd else self._read, key, max_bytes)
        return _read_with_retries(read, f"{self.url}/{key}", self._policy)

    def _read(self, key: str, max_bytes: int | None) -> bytes:
        answer = self._client().get(self._path(key))
        _check_size(answer.meta["size"], max_bytes)
        return bytes(answer.bytes())

    def _read_odd(self, key: str, max_bytes: int | None) -> bytes:
        client, bucket = self._boto3
        answer = client.get_object(Bucket=bucket, Key=self._prefix + key)
        with contextlib.closing(answer["Body"]) as body:
            _check_size(answer["ContentLength"], max_bytes)
            data: bytes = body.read()
        return data

    def open(self, key: str) -> Blob:
        """Open an object for random access. Raises: FileNotFoundError, PermissionError, OSError."""
        return _ObjectBlob(self._client(), f"{self.url}/{key}", self._path(key), self._policy)

    def put(
        self,
        key: str,
        data: bytes | memoryview,
        *,
        create: bool = False,
        policy: RetryPolicy | None = None,
    ) -> None:
        """Write one object. Others see all of it or nothing.

        Args:
            key: of the object, relative to `url`.
            data: its content.
            create: write it only if there is none.
            policy: when to give up; None: `WRITING`.

        Raises:
            FileExistsError: `create`, and the object exists. OSError: it could not be written,
            after some tries.
        """
        with translated_errors(f"{self.url}/{key}"):
            client = self._client(policy or WRITING)
            mode: Literal["create", "overwrite"] = "create" if create else "overwrite"
            interruptible.run(
                lambda: client.put(self._path(key), data, mode=mode, use_multipart=False),
                writes=True,
            )

    def remove(self, key: str) -> None:
        """Remove one object, if it exists. Raises: OSError."""
        with translated_errors(f"{self.url}/{key}"):
            client = self._client(WRITING)
            with contextlib.suppress(FileNotFoundError):
                interruptible.run(lambda: client.delete(self._path(key)), writes=True)


class _ObjectBlob:
    """A `Blob` in an object store. What is read must be of the object that was opened: it is asked
    for by its entity tag.
    """

    def __init__(self, client: ObjectStore, url: str, path: str, policy: RetryPolicy) -> None:
        self._client = client
        self._policy = policy
        self._url = url
        self._path = path
        with translated_errors(url):
            found = interruptible.run(lambda: client.head(path))
        self.size = found["size"]
        self._tag = found["e_tag"]

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset; fewer only at the end."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""  # a range of nothing is an error to object stores
        options: GetOptions = {"range": (offset, end), "if_match": self._tag}
        return _read_with_retries(
            lambda: bytes(self._client.get(self._path, options=options).bytes()),
            self._url,
            self._policy,
        )


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise OSError(errno.EFBIG, f"has {size} bytes, more than {max_bytes}")


def _pause_or_raise(error: OSError, attempts: Attempts) -> None:
    """Sleep before the next attempt, or raise the error if there is none.

    obstore repeats requests itself, but not all that were cut while the answer was being read.
    """
    if attempts.pause():
        return
    if isinstance(error, TemporaryError):
        text = f"{error.strerror}, after {attempts.failures} tries"
        raise OSError(errno.EIO, text, error.filename) from error
    raise error


def _read_with_retries(read: Callable[[], T], url: str, policy: RetryPolicy) -> T:
    attempts = Attempts(policy)
    while True:
        try:
            with translated_errors(url):
                return interruptible.run(read)
        except ConnectionResetError as error:
            _pause_or_raise(error, attempts)


def _environment() -> tuple[tuple[str, str], ...]:
    """Return the variables that configure a client. After one was corrected, an older client must
    not be used.
    """
    return tuple(
        sorted(
            item for item in os.environ.items() if item[0].startswith(("AWS_", "GOOGLE_", "AZURE_"))
        )
    )


@functools.lru_cache(maxsize=256)
def _make_client(
    bucket: str, policy: RetryPolicy, environment: tuple[tuple[str, str], ...]
) -> ObjectStore:
    """Return this process's client for a bucket, with its connections. Raises: UsageError."""
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UsageError(
            f"{bucket}: object stores need a package that is not installed. Type: pip install"
            " 'imagemill[s3]'"
        ) from error
    variables = dict(environment)
    endpoints = (variables.get(name, "") for name in _ENDPOINTS)
    options: ClientConfig = {
        # An explicit http endpoint is deliberate.
        "allow_http": any(endpoint.startswith("http://") for endpoint in endpoints),
        "connect_timeout": timedelta(seconds=policy.connect_s),
        "timeout": timedelta(seconds=policy.request_s),
        "user_agent": f"imagemill/{__version__}",
    }
    if policy.silence_s is not None:
        options["read_timeout"] = timedelta(seconds=policy.silence_s)
    try:
        return from_url(
            bucket,
            client_options=options,
            retry_config={
                "max_retries": policy.attempts - 1,
                "retry_timeout": timedelta(seconds=policy.seconds),
                "backoff": {
                    "init_backoff": timedelta(seconds=policy.pause_s),
                    "max_backoff": timedelta(seconds=policy.longest_pause_s),
                    "base": 2,
                },
            },
            credential_provider=_profile(variables) if bucket.startswith("s3://") else None,
        )
    except Exception as error:  # the library's own are of no common kind
        raise UsageError(
            f"{bucket}: cannot be opened: {reason(error)}. Look at the variables {_VARIABLES}."
        ) from error


@functools.lru_cache(maxsize=16)
def _make_boto3_client(policy: RetryPolicy, environment: tuple[tuple[str, str], ...]) -> Any:
    """Return boto3's client, for the keys that obstore refuses. It finds the same endpoint, region
    and credentials. Raises: UsageError.
    """
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise UsageError(
            "S3 needs a package that is not installed. Type: pip install 'imagemill[s3]'"
        ) from error

    variables = dict(environment)
    is_public = variables.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=next(filter(None, (variables.get(name) for name in _ENDPOINTS)), None),
        region_name=variables.get("AWS_REGION")
        or variables.get("AWS_DEFAULT_REGION")
        or session.region_name
        or "us-east-1",
        config=Config(
            user_agent=f"imagemill/{__version__}",
            connect_timeout=policy.connect_s,
            read_timeout=policy.silence_s or policy.request_s,
            retries={"total_max_attempts": 1, "mode": "standard"},  # `Attempts` counts them
            s3={"addressing_style": "path"},
            signature_version=UNSIGNED if is_public else None,
        ),
    )


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_VARIABLES = "AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_OTHER_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def _profile(variables: dict[str, str]) -> S3CredentialProvider | None:
    """Credentials from `~/.aws`, by boto3, where a profile is named, or where the environment has
    none and there is such a file.
    """
    named = "AWS_PROFILE" in variables
    if not named and (
        any(name in variables for name in _OTHER_CREDENTIALS)
        or not ((home := userdirs.home()) and (home / ".aws").is_dir())
    ):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except Exception as error:
        if not named:
            return None  # the folder is there, credentials are not
        raise UsageError(f"AWS_PROFILE {variables['AWS_PROFILE']}: {reason(error)}") from error


class BlobFile(io.RawIOBase):
    """A blob as a file object, for libraries that want one; wrap it in `io.BufferedReader`. One
    thread at a time.
    """

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob = blob
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer; return how many bytes were read."""
        data = self._blob.read_at(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
