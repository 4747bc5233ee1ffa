"""What the errors of obstore and boto3 mean: an OSError with the system's number and one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import responses

_NUMBERS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT}
"""HTTP's status → the system's number of an error."""
_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)")
_CODE = re.compile(r"<Code>([^<]+)</Code>")
_PREFIX = "Generic S3 error: "
_CUT = ("response body error", "Content-Range header not present")
_TRIES = re.compile(r"after (\d+) retries")
_CAUSES = {
    "Connection refused": "the connection was refused",
    "ConnectionRefused": "the connection was refused",
    "ConnectionReset": "the connection was reset",
    "TimedOut": "no answer in time",
    "dns error": "its name cannot be resolved",
    "certificate": "its certificate is not trusted",
    "IncompleteMessage": "the connection was cut",
    "UnexpectedEof": "the connection was cut",
    "Connection was closed": "the connection was cut",
    "Connection broken": "the connection was cut",
    "Read timeout": "no answer in time",
    "Connect timeout": "no answer in time",
    "Could not connect": "the connection was refused",
}


class UnsupportedKeyError(OSError):
    """obstore met a key that it refuses."""


class TemporaryError(ConnectionResetError):
    """A failure of boto3 that another attempt may not meet."""


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Turn the library's errors into the system's, with one line of text."""
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, reason(error), url) from error
    except exceptions.AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, "is there already", url) from error
    except exceptions.PreconditionError as error:
        raise OSError(errno.ESTALE, "changed while it was being read", url) from error
    except exceptions.InvalidPathError as error:
        raise UnsupportedKeyError(errno.EINVAL, reason(error), url) from error
    except (exceptions.BaseError, ValueError) as error:
        text = str(error)
        found = _STATUS.search(text)
        kind = _NUMBERS.get(int(found[1][:3]) if found else 0, errno.EIO)
        if any(mark in text for mark in _CUT):
            kind = errno.ECONNRESET
        # The number makes it a PermissionError or a FileNotFoundError.
        raise OSError(kind, reason(error), url) from error
    except Exception as error:
        if not type(error).__module__.startswith("botocore"):
            raise
        raise _from_boto3(error, url) from error


def _from_boto3(error: Exception, url: str) -> OSError:
    """Turn an error of boto3 into the system's. A temporary one is a ConnectionResetError."""
    answer = getattr(error, "response", None)
    if not isinstance(answer, dict):  # there was no answer
        is_passing = type(error).__name__ not in (
            "NoCredentialsError",
            "PartialCredentialsError",
            "ParamValidationError",
            "SSLError",
        )
        return (TemporaryError if is_passing else OSError)(errno.EIO, reason(error), url)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    text = f"{status} {responses.get(status, '')} ({answer.get('Error', {}).get('Code', '')})"
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
        return TemporaryError(errno.EIO, text, url)
    return OSError(_NUMBERS.get(status, errno.EIO), text, url)


def reason(error: Exception) -> str:
    """Return an error's text as one line: the libraries write many."""
    text = str(error)
    first = " ".join(text.partition("\n\nDebug source:")[0].split())
    if "169.254.169.254" in first or "Unable to locate credentials" in first:
        return (
            "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
            " AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    status, code, tries = _STATUS.search(text), _CODE.search(first), _TRIES.search(first)
    if status:
        why = status[1].strip() + (f" ({code[1]})" if code else "")
    else:
        why = next(
            (words for mark, words in _CAUSES.items() if mark in text),
            first.rpartition(" - ")[2].removeprefix(_PREFIX)[:300],
        )
    return f"{why}, after {int(tries[1]) + 1} tries" if tries else why
