"""Bytes out of a store: which URLs there are, how one is read, and what is said of one that cannot be."""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, shown

EXTRAS = {"s3": "s3", "gs": "gcs", "hf": None, "http": None, "https": None}
"""Protocol -> the extra of mmlg-scale that brings its file system, where the base does not have it."""
CHUNK = 2**20
LEAST_BYTES = 2**16
"""Of a transfer in each `timeout`: less is a stall."""
_MISSING = (404, 410)


class StoreError(OSError):
    """A remote file could not be had, after all attempts. It counts as damage of its shard."""


class FileMissingError(UserError):
    """The store can be had, but has no such file."""


class FinalError(StoreError):
    """Trying again would not help."""


class MissingError(FinalError):
    """There is no such file."""


def is_remote(path: str) -> bool:
    """Whether a path is the URL of a store; file:// is this machine."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    """A path of this machine; file:// may begin it.

    Raises:
        UserError: a URL that names a host, as file://folder does.
    """
    if path.startswith("file://") and not path.startswith(("file:///", "file://localhost/")):
        raise UserError(f"{shown(path)} names a host. Write file:// with the whole path, file:///data/pairs, or the path alone.")
    return Path(unquote(urlsplit(path).path)) if path.startswith("file://") else Path(path)


def check_url(url: str) -> None:
    protocol = url.partition("://")[0] if "://" in url else "file"
    if protocol not in (*EXTRAS, "file") or "::" in url:
        known = ", ".join(f"{name}://" for name in (*EXTRAS, "file"))
        raise UserError(f"{shown(url)} is a URL of a kind that is not supported. Supported: {known}.")


SIGN_IN = {
    "s3": "Sign in: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    "gs": "Sign in: gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS.",
    "hf": "Sign in: hf auth login, or HF_TOKEN.",
}


def at_the_start(url: str, error: StoreError) -> str:
    """A store that is unavailable, in one line with what to do."""
    said = str(error)
    if re.search(r"[Cc]redential|token|Unauthorized|Anonymous|\b401\b", said):
        remedy = SIGN_IN.get(url.partition("://")[0], "Sets behind https:// are read without signing in: make it readable, or use a store.")
    elif re.search(r"Forbidden|denied|\b403\b|[Pp]ermission", said):
        remedy = "These credentials may not read it: ask its owner, or sign in as somebody else."
    elif re.search(r"\b404\b|[Nn]o such|[Nn]ot ?[Ff]ound|does not exist|NoSuchBucket", said):
        remedy = "Check the bucket's and the folder's name."
    else:
        remedy = "Check the address and the network."
    return f"{said if url in said else f'{url}: {said}'}. {remedy}"


def stream(url: str, timeout: float) -> Iterator[bytes]:
    """The file's bytes in parts. Raises TimeoutError where fewer than LEAST_BYTES come in `timeout` seconds, or what a library does."""
    parts = _http(url, timeout) if url.startswith("http") else _bounded(_fsspec(url, timeout), 2 * timeout)
    since, count = time.monotonic(), 0
    for part in parts:
        yield part
        count += len(part)
        if time.monotonic() - since > timeout:
            if count < LEAST_BYTES:
                raise TimeoutError(f"{url}: {count} bytes in {timeout:.0f} s")
            since, count = time.monotonic(), 0


def _bounded(parts: Iterator[bytes], timeout: float) -> Iterator[bytes]:
    """The parts, read by a thread. Raises TimeoutError where the next one takes longer: libraries wait and try again for minutes.

    The thread is then left to its library's own end.
    """
    found: queue.Queue[bytes | BaseException | None] = queue.Queue(2)
    over = threading.Event()

    def put(item: bytes | BaseException | None) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return found.put(item, timeout=1.0)

    def read() -> None:
        try:
            for part in parts:
                put(part)
                if over.is_set():
                    return
            put(None)
        except BaseException as error:  # raised where the parts are wanted
            put(error)

    threading.Thread(target=read, name="store", daemon=True).start()
    try:
        while True:
            try:
                item = found.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no answer in {timeout:.0f} s") from None
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        over.set()


def _http(url: str, timeout: float) -> Iterator[bytes]:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "mmlg-scale", "Accept-Encoding": "identity"})  # noqa: S310 (check_url)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
            promised, count = response.headers.get("Content-Length"), 0
            while part := response.read1(CHUNK):
                count += len(part)
                yield part
            if promised is not None and promised.isdigit() and count != int(promised):
                raise StoreError(f"{url}: the connection was cut after {count:,} of {int(promised):,} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        told = f"{url}: HTTP {error.code} {error.reason}"
        if error.code in _MISSING:
            raise MissingError(told) from error
        raise (FinalError if _is_final(error.code) else StoreError)(told) from error


def _fsspec(url: str, timeout: float) -> Iterator[bytes]:
    import fsspec

    protocol = url.partition("://")[0]
    for library in ("gcsfs", "s3fs", "huggingface_hub"):
        logging.getLogger(library).addHandler(logging.NullHandler())  # what they would log, with tracebacks, is raised, too
    # Attempts are counted here: a library that tries again by itself would multiply them.
    limits = {"read_timeout": timeout, "connect_timeout": timeout, "retries": {"max_attempts": 1}}
    options: dict[str, Any] = {"config_kwargs": limits} if protocol == "s3" else {}
    try:
        system, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS[protocol]
        package = f"mmlg-scale[{extra}]" if extra else "huggingface_hub"
        raise UserError(f"{url}: {protocol}:// needs another package. Install it: pip install '{package}'.") from error
    try:
        with system.open(path, "rb", block_size=8 * CHUNK, cache_type="readahead") as file:
            while part := file.read(CHUNK):
                yield part
    except FileNotFoundError as error:
        told = one_line(error)
        raise MissingError(f"{url}: {told if re.search('[Nn]ot? ', told) else f'not found ({told})'}") from error
    except PermissionError as error:
        raise FinalError(f"{url}: {one_line(error) or type(error).__name__}") from error
    except Exception as error:
        told, status = f"{url}: {one_line(error)}", _status(error)
        if status in _MISSING:
            raise MissingError(told) from error
        if "Credential" in type(error).__name__ or "Forbidden" in told or _is_final(status):
            raise FinalError(told) from error
        raise


def _status(error: Exception) -> int | None:
    """The HTTP status that a library's error has, if any."""
    found = str(getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None))
    return int(found) if found.isdecimal() else None


def _is_final(status: int | None) -> bool:
    """Of the client's mistakes only "too slow" and "too many" pass by themselves."""
    return status is not None and 400 <= status < 500 and status not in (408, 429)
