"""Remote files: whole copies or none, one fetch for a node, a bounded cache, and what is said of stores that fail."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlg_scale.data import store as store_module
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.pipeline import StreamSettings
from mmlg_scale.data.store import CacheSettings, RemoteFile, Store, StoreError
from mmlg_scale.errors import UserError
from tests.data.server import SIZE, Server, content, files_in, used
from tests.data.specs import spec_for


def remote(name: str, size: int = SIZE, *, checked: bool = False) -> RemoteFile:
    return RemoteFile(name, size, hashlib.sha256(content(name, size)).hexdigest() if checked else None)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def settings(tmp_path: Path, *, files: float = 100.0, **options: Any) -> CacheSettings:
    """A cache with room for so many files."""
    return CacheSettings(tmp_path / "cache", int(files * SIZE), **{"first_pause": 0.01, "timeout": 0.4, **options})


def read(store: Store, file: RemoteFile) -> bytes:
    with store.open(file) as opened:
        return os.pread(opened.fileno(), file.size + 1, 0)


def test_a_copy_is_fetched_once_and_is_whole(server: Server, tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(Store(server.url, settings(tmp_path))))  # as a loader worker gets it
    for _ in range(3):
        assert read(store, remote("train/a b.tar".replace(" ", "-"), checked=True)) == content("train/a-b.tar")
    assert server.requests == {"train/a-b.tar": 1}
    # Another version under the same name is another copy.
    assert read(store, remote("train/a-b.tar")) == content("train/a-b.tar")
    assert server.requests == {"train/a-b.tar": 2}


@pytest.mark.parametrize("trouble", [["500", "503", "429"], ["cut", "cut"], ["stall", "500"], ["wrong", "cut"]])
def test_a_store_in_trouble_is_asked_again(trouble: list[str], server: Server, tmp_path: Path) -> None:
    server.plan["x.tar"] = list(trouble)
    cache = settings(tmp_path)
    assert read(Store(server.url, cache), remote("x.tar", checked=True)) == content("x.tar")
    assert server.requests["x.tar"] == len(trouble) + 1
    assert len(files_in(cache)) == 1


@pytest.mark.parametrize(
    ("plan", "file", "requests", "said"),
    [
        (["500"] * 3, remote("x.tar"), 3, "HTTP 500"),
        (["cut"] * 3, remote("x.tar"), 3, "cut after 50,000 of 100,000 bytes"),
        (["stall"] * 3, remote("x.tar"), 3, "timed out"),
        (["404"], remote("x.tar"), 1, "HTTP 404"),
        (["403"], remote("x.tar"), 1, "HTTP 403"),
        ([], remote("x.tar", SIZE - 1), 3, "more than the 99,999 bytes that the manifest says"),
        ([], remote("x.tar", SIZE + 1), 3, "100,000 bytes came, the manifest says 100,001"),
        (["wrong"] * 3, remote("x.tar", checked=True), 3, "its SHA-256 is"),
    ],
)
def test_what_cannot_be_had_leaves_nothing(
    plan: list[str], file: RemoteFile, requests: int, said: str, server: Server, tmp_path: Path
) -> None:
    server.plan["x.tar"] = plan
    cache = settings(tmp_path, attempts=3)
    with pytest.raises(StoreError) as caught:
        Store(server.url, cache).open(file)
    assert said in str(caught.value)
    assert f"{server.url}/x.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.requests["x.tar"] == requests
    assert files_in(cache) == []


def test_pauses_grow(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(store_module.time, "sleep", pauses.append)
    server.plan["x.tar"] = ["500"] * 4
    read(Store(server.url, settings(tmp_path, first_pause=0.5)), remote("x.tar"))
    assert pauses == [0.5, 1, 2, 4]


def test_the_cache_stays_under_its_bound_and_the_last_used_stay(server: Server, tmp_path: Path) -> None:
    cache = settings(tmp_path, files=3.5)
    store = Store(server.url, cache)
    for number in range(8):
        assert read(store, remote(f"{number}.tar")) == content(f"{number}.tar")
        assert used(cache) <= cache.max_bytes
        read(store, remote("0.tar"))  # used all the time
    assert [name[25:] for name in files_in(cache) if "0.tar" in name] == ["0.tar"]
    assert server.requests["0.tar"] == 1
    assert sorted(name[25:] for name in files_in(cache)) == ["0.tar", "6.tar", "7.tar"]


def test_files_of_others_in_its_folder_are_left_alone(server: Server, tmp_path: Path) -> None:
    cache = settings(tmp_path, files=1.5)
    cache.folder.mkdir()
    others = [cache.folder / name for name in ("thesis.tex", ".draft.tmp", "photos.tar")]
    for other in others:
        other.write_bytes(content(other.name))
        os.utime(other, (0, 0))  # used longest ago
    for number in range(3):
        assert read(Store(server.url, cache), remote(f"{number}.tar")) == content(f"{number}.tar")
    assert [other.read_bytes() for other in others] == [content(other.name) for other in others]
    assert [name[25:] for name in files_in(cache) if name[:1].isalnum() and "-" in name] == ["2.tar"]


def test_what_is_open_is_removed_last_and_stays_readable(server: Server, tmp_path: Path) -> None:
    cache = settings(tmp_path, files=2)
    store = Store(server.url, cache)
    with store.open(remote("a.tar")) as opened:
        for name in ("b.tar", "c.tar", "d.tar"):
            read(store, remote(name))
        assert sorted(name[25:] for name in files_in(cache)) == ["a.tar", "d.tar"]
        with store.open(remote("d.tar")), store.open(remote("e.tar")):
            assert sorted(name[25:] for name in files_in(cache)) == ["d.tar", "e.tar"]  # the one unused for longest
            assert os.pread(opened.fileno(), SIZE, 0) == content("a.tar")
    assert used(cache) <= cache.max_bytes


def test_a_file_larger_than_the_cache_is_one_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_bytes is 50,000, .*x.tar alone has 100,000 bytes. Allow more."):
        Store(server.url, settings(tmp_path, files=0.5)).open(remote("x.tar"))


SCRIPT = """
import hashlib, os, sys
from pathlib import Path
from mmlg_scale.data.store import CacheSettings, RemoteFile, Store
url, folder, max_bytes, size, *names = sys.argv[1:]
store = Store(url, CacheSettings(Path(folder), int(max_bytes), first_pause=0.01, timeout=20.0))
for name in names:
    with store.open(RemoteFile(name, int(size))) as file:
        print(name, hashlib.sha256(os.pread(file.fileno(), int(size) + 1, 0)).hexdigest(), flush=True)
"""


def start(url: str, cache: CacheSettings, *names: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SCRIPT, url, str(cache.folder), str(cache.max_bytes), str(SIZE), *names]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_eight_processes_fetch_each_file_once_and_keep_the_bound(server: Server, tmp_path: Path) -> None:
    names = [f"{number}.tar" for number in range(5)]
    roomy = settings(tmp_path)
    processes = [start(server.url, roomy, *names) for _ in range(8)]
    wanted = "".join(f"{name} {hashlib.sha256(content(name)).hexdigest()}\n" for name in names)
    assert [process.communicate(timeout=120)[0] for process in processes] == [wanted] * 8
    assert server.requests == dict.fromkeys(names, 1)
    # With room for less than is read, all still read the right bytes, and the bound holds at any moment.
    tight = CacheSettings(tmp_path / "tight", int(2.5 * SIZE))
    tight.folder.mkdir()
    processes = [start(server.url, tight, *order) for order in (names, names[::-1], names[2:] + names[:2])]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, used(tight))
        time.sleep(0.002)
    for process in processes:
        lines = process.communicate()[0].splitlines()
        assert sorted(lines) == sorted(wanted.splitlines())
    assert SIZE <= most <= tight.max_bytes


def test_a_kill_in_mid_fetch_leaves_no_bad_file(server: Server, tmp_path: Path) -> None:
    cache = settings(tmp_path)
    server.plan["x.tar"] = ["stall"]
    process = start(server.url, cache, "x.tar")
    until = time.monotonic() + 60
    while not (cache.folder.is_dir() and files_in(cache)) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = files_in(cache)
    assert left.endswith(".tmp")
    assert used(cache) == SIZE  # its bytes were reserved, and count until they are removed
    store = Store(server.url, cache)
    assert read(store, remote("y.tar")) == content("y.tar")
    assert [name[25:] for name in files_in(cache)] == ["y.tar"]
    assert read(store, remote("x.tar")) == content("x.tar")
    assert server.requests["x.tar"] == 2


def test_the_next_files_are_fetched_ahead_without_removing_what_is_read(server: Server, tmp_path: Path) -> None:
    cache = settings(tmp_path, files=4)
    store = Store(server.url, cache)
    old, now, ahead = ([remote(f"{kind}{number}.tar") for number in range(2)] for kind in ("old", "now", "next"))
    for file in [*old, *now]:
        read(store, file)
    store.prefetch(ahead, keep=now)
    store.wait()
    assert sorted(name[25:] for name in files_in(cache)) == ["next0.tar", "next1.tar", "now0.tar", "now1.tar"]
    store.prefetch([remote("far.tar"), remote("gone.tar")], keep=[*now, *ahead])
    store.wait()  # no room: left for later
    assert server.requests["far.tar"] == 0
    server.plan["gone.tar"] = ["404"] * 2
    store.prefetch([remote("gone.tar")])
    store.wait()  # an error is left to who opens the file
    with pytest.raises(StoreError, match="HTTP 404"):
        store.open(remote("gone.tar"))
    assert read(store, ahead[0]) == content("next0.tar")
    assert server.requests["next0.tar"] == 1


def test_a_full_disk_is_said_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module.os, "truncate", refuse)
    cache = settings(tmp_path)
    with pytest.raises(OSError, match="No space left") as caught:
        Store(server.url, cache).open(remote("x.tar"))
    assert not isinstance(caught.value, StoreError)
    assert caught.value.filename == str(cache.folder)
    assert server.requests["x.tar"] == 0


@pytest.mark.parametrize("root", ["", "file://"])
def test_files_of_this_machine_are_opened_where_they_lie(root: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.tar").write_bytes(content("x.tar"))
    store = Store(f"{root}{tmp_path}")
    assert read(store, remote("train/x.tar")) == content("x.tar")
    assert store.read_bytes("train/x.tar") == content("x.tar")
    with pytest.raises(FileNotFoundError):
        store.open(remote("train/y.tar"))


def test_names_that_lead_elsewhere_are_refused() -> None:
    for root in ("ftp://x", "simplecache::s3://bucket/set", "zip://a::s3://b", "memory://x"):
        with pytest.raises(UserError, match="of a kind that is not supported"):
            Store(root)
    far = Store("s3://bucket/set")
    for name in ("../x.tar", "/etc/passwd", "a/../../x", "a\0b"):
        with pytest.raises(UserError, match="leads out of the set"):
            far.url(name)
    with pytest.raises(UserError, match="a file of this machine, which a remote set may not name"):
        far.url("file:///etc/passwd")
    with pytest.raises(UserError, match="not supported"):
        far.url("memory://x")
    assert far.url("gs://other/x.tar") == "gs://other/x.tar"
    assert far.url("train/x y.tar") == "s3://bucket/set/train/x y.tar"
    assert Store("https://host/set/").url("train/x y#1.tar") == "https://host/set/train/x%20y%231.tar"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (["404"], "HTTP 404 Not Found. Check the bucket's and the folder's name."),
        (["403"], "HTTP 403 Forbidden. These credentials may not read it"),
        (["401"], "HTTP 401 Unauthorized. Sets behind https:// are read without signing in"),
        (["500"] * 2, "HTTP 500 Internal Server Error (tried 2 times). Check the address and the network."),
        (["cut"] * 2, "the connection was cut after 50,000 of 100,000 bytes (tried 2 times)."),
    ],
)
def test_a_store_that_cannot_be_had_is_one_line_at_the_start(plan: list[str], said: str, server: Server, tmp_path: Path) -> None:
    server.plan["manifest.json"] = list(plan)
    with pytest.raises(UserError) as caught:
        Store(server.url, settings(tmp_path, attempts=2)).read_bytes("manifest.json")
    assert str(caught.value).startswith(f"{server.url}/manifest.json: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_a_missing_cache_and_a_file_too_long(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9/m.json: .*Check the address and the network"):
        Store("http://127.0.0.1:9", settings(tmp_path, attempts=1)).read_bytes("m.json")
    with pytest.raises(UserError, match=r"is remote. Give a folder for copies of it: data.cache_dir"):
        Store(server.url).open(remote("x.tar"))
    with pytest.raises(UserError, match="has more than 1,000 bytes"):
        Store(server.url, settings(tmp_path)).read_bytes("x.tar", max_bytes=1000)
    assert Store(server.url, settings(tmp_path)).read_bytes("x.tar") == content("x.tar")


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*args: object, **options: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"gs:// needs another package. Install it: pip install 'mmlg-scale\[gcs\]'"):
        Store("gs://bucket/set", settings(tmp_path)).read_bytes("manifest.json")


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """moto's server on loopback, with a bucket of five files, and credentials in the environment."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    with pytest.MonkeyPatch.context() as patch:
        server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="pairs")
        for number in range(5):
            client.put_object(Bucket="pairs", Key=f"set/train/{number}.tar", Body=content(f"{number}.tar"))
        client.put_object(Bucket="pairs", Key="set/train/manifest.json", Body=b"{}")
        yield
        server.stop()


def test_s3_is_read_as_from_disk(s3: None, tmp_path: Path) -> None:
    cache = settings(tmp_path, files=2.5, timeout=20.0)
    store = Store("s3://pairs/set", cache)
    assert store.read_bytes("train/manifest.json") == b"{}"
    for _ in range(2):
        for number in range(5):
            file = RemoteFile(f"train/{number}.tar", SIZE, hashlib.sha256(content(f"{number}.tar")).hexdigest())
            assert read(store, file) == content(f"{number}.tar")
            assert used(cache) <= cache.max_bytes
    with pytest.raises(StoreError, match=r"s3://pairs/set/train/9.tar"):
        store.open(remote("train/9.tar"))


def test_a_set_in_a_bucket_gives_the_batches_of_the_disk(s3: None, scenes: Path, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3")
    for file in scenes.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="pairs", Key=f"scenes/{file.relative_to(scenes)}", Body=file.read_bytes())
    disk, remote = open_pairs(scenes), open_pairs("s3://pairs/scenes", CacheSettings(tmp_path / "cache", 10**8, timeout=20.0))
    assert remote.digest() == disk.digest()
    wanted, found = (
        next(iter(Corpus(pairs, spec_for(scenes)).stream(StreamSettings(global_batch_size=50, seed=2)))) for pairs in (disk, remote)
    )
    assert torch.equal(found.samples_BS, wanted.samples_BS)
    assert torch.equal(found.image_uint8_BCHW, wanted.image_uint8_BCHW)
    with pytest.raises(UserError, match=r"^s3://pears/scenes/dataset.json: .*Check the bucket's and the folder's name.$"):
        open_pairs("s3://pears/scenes", CacheSettings(tmp_path / "cache", 10**8, attempts=1, timeout=20.0))


def test_a_wrong_bucket_and_missing_credentials_are_one_line(s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    cache = settings(tmp_path, attempts=2, timeout=20.0)
    with pytest.raises(UserError, match=r"^s3://pears/set/manifest.json: .*Check the bucket's and the folder's name.$"):
        Store("s3://pears/set", cache).read_bytes("manifest.json")
    fsspec.config.conf.clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://pairs/set/train/manifest.json: .*[Cc]redentials.* Sign in: AWS_PROFILE"):
        Store("s3://pairs/set", cache).read_bytes("train/manifest.json")
