"""Stores that answer wrongly, late or never: one line within a bounded time; and URLs where only folders do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlg_scale.cli import main
from mmlg_scale.data import transfer
from mmlg_scale.data.corpus import cache_of, open_pairs
from mmlg_scale.data.store import CacheSettings, Store
from mmlg_scale.data.transfer import local_path
from mmlg_scale.errors import UserError


def settings(tmp_path: Path, **options: Any) -> CacheSettings:
    return CacheSettings(tmp_path / "cache", 10**6, **{"first_pause": 0.01, "timeout": 5.0, **options})


class Library:
    """What fsspec gives for a URL: `opened` is called for each attempt."""

    def __init__(self, opened: Callable[[], Any]) -> None:
        self.opened, self.attempts = opened, 0

    def open(self, *args: object, **options: object) -> Any:
        self.attempts += 1
        return self.opened()


def use(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (library, url))


def raises(error: Exception) -> Callable[[], Any]:
    def opened() -> None:
        raise error

    return opened


class Answer(Exception):
    """As httpx and gcsfs raise: with the response, or with its code."""

    def __init__(self, told: str, status: int, *, is_code: bool) -> None:
        super().__init__(told)
        if is_code:
            self.code = status
        else:
            self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize("is_code", [False, True])
@pytest.mark.parametrize(
    ("url", "status", "attempts", "told"),
    [
        ("hf://datasets/a/b", 401, 1, "Sign in: hf auth login, or HF_TOKEN."),
        ("gs://bucket/set", 401, 1, "Sign in: gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS."),
        ("gs://bucket/set", 403, 1, "These credentials may not read it"),
        ("hf://datasets/a/b", 404, 1, "Check the bucket's and the folder's name."),
        ("hf://datasets/a/b", 429, 3, "(tried 3 times). Check the address"),
        ("gs://bucket/set", 503, 3, "(tried 3 times). Check the address"),
    ],
)
def test_what_another_attempt_would_not_help_is_said_at_once(
    url: str, status: int, attempts: int, told: str, is_code: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(raises(Answer(f"status {status}", status, is_code=is_code)))
    use(library, monkeypatch)
    with pytest.raises(UserError) as caught:
        Store(url, settings(tmp_path, attempts=3)).read_bytes("dataset.json")
    assert str(caught.value).startswith(f"{url}/dataset.json: status {status}")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert library.attempts == attempts


def test_an_answer_that_never_comes_ends_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that waits and tries again by itself, and a server that takes the connection and says nothing."""
    released = threading.Event()
    library = Library(lambda: released.wait(60))
    use(library, monkeypatch)
    with pytest.raises(UserError, match=r"^gs://b/s/x: no answer in 1 s \(tried once\)\. Check the address and the network\.$"):
        Store("gs://b/s", settings(tmp_path, attempts=1000, timeout=0.3, first_pause=0.0)).read_bytes("x")
    assert library.attempts == 1
    released.set()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"timed out \(tried [234] times\)\. Check the address and the network\.$"):
            Store(url, settings(tmp_path, attempts=1000, timeout=0.3, first_pause=0.0)).read_bytes("x")


def test_parts_come_through_the_thread_and_so_do_errors() -> None:
    def parts() -> Iterator[bytes]:
        yield b"one"
        yield b"two"
        raise OSError("cut")

    found = transfer._bounded(parts(), 5.0)
    assert [next(found), next(found)] == [b"one", b"two"]
    with pytest.raises(OSError, match="cut"):
        next(found)
    assert list(transfer._bounded(iter([b"a", b"b", b"c", b"d"]), 5.0)) == [b"a", b"b", b"c", b"d"]


def test_a_file_url_names_no_host(tmp_path: Path) -> None:
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("file://localhost/a") == Path("/a")
    with pytest.raises(UserError, match=r"file://data/pairs names a host\. Write file:// with the whole path"):
        local_path("file://data/pairs")
    with pytest.raises(UserError, match=r"memory://b/s is a URL of a kind that is not supported"):
        open_pairs("memory://b/s")
    with pytest.raises(UserError, match=r"data\.cache_dir s3://b/c is a URL\. Give a folder on a disk of this node"):
        cache_of("s3://b/c", 10**9)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["data", "index", "s3://b/set"], "mmlg data index works on folders of this machine. Run it on a local copy"),
        (["data", "check", "https://host/set"], "mmlg data check works on folders of this machine. Run it on a local copy"),
        (["data", "pack", "s3://b/pairs.csv", "--out", "d"], "mmlg data pack works on folders of this machine. Download it"),
        (["data", "scenes", "--out", "s3://b/set"], "--out s3://b/set is a URL: results are written on this machine"),
        (["train", "demo", "--out", "gs://b/run"], "--out gs://b/run is a URL: results are written on this machine"),
    ],
)
def test_commands_that_need_a_folder_refuse_a_url(
    command: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no folder named s3:
