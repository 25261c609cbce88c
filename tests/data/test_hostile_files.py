"""Shards, indices, tables and images made to do harm. `tests/test_hostile.py` has everything that is not a data set."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmlg_scale.bounds import MAX_CAPTION
from mmlg_scale.data.index import RECORD, index_content, index_digest, write_index
from mmlg_scale.data.indexing import index_dataset
from mmlg_scale.data.manifest import write_manifest
from mmlg_scale.data.reader import LONG, DamagedSample, ShardReader
from tests.hostile import DEEP, no_hang, refused  # noqa: F401  # a fixture for every test here
from tests.towers.models import assert_one_line


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One block, its checksum right, with any size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = b"\xff" * 4 + (size % 2**64).to_bytes(8, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pixels() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


SHARDS = {
    "a negative size": header("evil.png", -512) + bytes(512),
    "a negative size, many times": header("evil.png", -512) * 50,
    "a negative extended header": header("evil", -512, tarfile.XHDTYPE) + bytes(512),
    "an absurd extended header": header("evil", 2**40, tarfile.XHDTYPE) + bytes(512),
    "extended headers of extended headers": header("evil", 1, tarfile.GNUTYPE_LONGNAME).ljust(1024, b"x") * 3000,
    "a sparse map that is none": header("evil.png", 512, tarfile.GNUTYPE_SPARSE) + b"9" * 512,
}


@pytest.mark.parametrize("kind", sorted(SHARDS))
def test_tars_that_would_go_on_for_ever(kind: str, tmp_path: Path) -> None:
    """What lies behind the attack is found all the same, or the shard is told to be cut."""
    good = tar_of({"good.png": pixels(), "good.txt": b"red"})
    (tmp_path / "a.tar").write_bytes(tar_of({"first.png": pixels(), "first.txt": b"red"})[:2048] + SHARDS[kind] + good)
    counts, problems = index_dataset(tmp_path, val_shards=0, test_shards=0)
    assert counts["train"] >= 1
    assert counts["train"] == 2 or problems.total() >= 1


def test_names_in_a_tar_are_never_paths(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    names = ("../../canary", "/tmp/mmlg-canary", "x/../../../canary")
    (tmp_path / "set" / "a.tar").write_bytes(
        tar_of({f"{name}.{kind}": payload for name in names for kind, payload in (("png", pixels()), ("txt", b"red"))})
    )
    index_dataset(tmp_path / "set", val_shards=0, test_shards=0)
    reader = ShardReader(tmp_path / "set" / "train")
    assert [reader.about(index)["captions"] for index in range(len(reader))] == [["red"]] * len(reader)
    written = ["a.npy", "a.tar", "checked.json", "dataset.json", "manifest.json"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == written
    assert not Path("/tmp/mmlg-canary.png").exists()


@pytest.mark.parametrize("name", ["../../canary", "/etc/hostname", "..", "a/b.tar", "", 5])
def test_a_manifest_names_shards_alone(name: Any, tmp_path: Path) -> None:
    write_manifest(tmp_path / "train", "train", [{"file": name, "samples": 1, "bytes": 4096, "sha256": "0", "index": "0"}])
    assert_one_line(lambda: ShardReader(tmp_path / "train"), "manifest.json", "no shard's name")


@pytest.mark.parametrize(
    "change",
    [
        {"image": 0},
        {"image": 100},
        {"image": 513},
        {"image": 2**63},
        {"image_size": 2**32 - 1},
        {"text": 4096},
        {"text": 2**64 - 512},
        {"text_size": 4097},
        {"text": 0},
        {"text": 0, "text_size": 0},
        {"json_size": 1},
        {"extension": 200},
    ],
    ids=str,
)
def test_places_in_an_index_are_places(change: dict[str, int], tmp_path: Path) -> None:
    folder = tmp_path / "train"
    record = {"image": 512, "image_size": 100, "text": 1536, "text_size": 3, "key": 1}
    for content in (record, record | change):
        records = np.zeros(1, RECORD)
        for name, value in content.items():
            records[name] = value
        entry = {"file": "a.tar", "samples": 1, "bytes": 4096, "sha256": "0", "index": write_index(folder, "a.tar", records)}
        write_manifest(folder, "train", [entry])
        if content is record:
            assert ShardReader(folder).records(0)["image"] == 512
    assert_one_line(lambda: ShardReader(folder).about(0), "index/a.npy is damaged", "no place in a shard of 4096 bytes")


class Planter:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("canary",)


def npy(header: str, body: bytes = b"") -> bytes:
    padded = header.ljust(118 - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("latin1") + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(Planter())),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"),
        npy("__import__('os').system('touch canary')"),
        npy("(" * 100),
        index_content(np.zeros(2, RECORD)),
        index_content(np.zeros(1, RECORD))[:-1],
        index_content(np.zeros(1, RECORD)).replace(b"<u8", b"|O8"),
    ],
)
def test_an_index_is_nothing_but_its_records(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it is unpickled or evaluated, also where its size is right and the manifest names it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "train"
    (folder / "index").mkdir(parents=True)
    for given in (content, content.ljust(len(index_content(np.zeros(1, RECORD))), b"\0")):
        (folder / "index" / "a.npy").write_bytes(given)
        entry = {"file": "a.tar", "samples": 1, "bytes": 4096, "sha256": "0", "index": index_digest(given)}
        write_manifest(folder, "train", [entry])
        assert_one_line(lambda: ShardReader(folder).about(0), "index/a.npy is damaged")
    assert not (tmp_path / "canary").exists()
    write_manifest(folder, "train", [entry | {"index": "0" * 32}])
    (folder / "index" / "a.npy").write_bytes(index_content(np.zeros(1, RECORD)))
    assert_one_line(lambda: ShardReader(folder).about(0), "index/a.npy is damaged", "SHA-256")
    (folder / "index" / "a.npy").unlink()
    assert_one_line(lambda: ShardReader(folder).about(0), "no index", "mmlg data index")
    os.mkfifo(folder / "index" / "a.npy")
    assert_one_line(lambda: ShardReader(folder).about(0), "index/a.npy is damaged")


@pytest.mark.parametrize("extension", ["txt", "json"])
def test_captions_of_any_length(extension: str, tmp_path: Path) -> None:
    """Twenty megabytes are counted as damaged, not tokenised; so is what is just above the bound."""
    for length in (20_000_000, MAX_CAPTION + 1, MAX_CAPTION):
        text = "ab" * (length // 2) + "a" * (length % 2)
        payload = text.encode() if extension == "txt" else json.dumps({"captions": [text]}).encode()
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "a.tar").write_bytes(tar_of({"a.png": pixels(), f"a.{extension}": payload}))
        index_dataset(folder, val_shards=0, test_shards=0)
        reader = ShardReader(folder / "train")
        if length > MAX_CAPTION:
            with pytest.raises(DamagedSample) as caught:
                reader.about(0)
            assert caught.value.cause == LONG
        else:
            assert reader.about(0)["captions"] == [text]


def test_long_captions_and_deep_json_are_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(pixels())
    (tmp_path / "t.csv").write_text(f"filepath,caption\na.png,{'x' * (MAX_CAPTION + 1)}\n")
    assert "row 2: a caption of 5001 characters" in refused("data", "pack", tmp_path / "t.csv", "--out", tmp_path / "o", capsys=capsys)
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x" * 20_000_000}]}
    for text, said in ((json.dumps(content), "a caption of 20000000 characters"), (f'{{"images": {DEEP}', "nested too deeply")):
        (tmp_path / "c.json").write_text(text)
        words = ("data", "pack", tmp_path / "c.json", "--images", tmp_path, "--out", tmp_path / "o")
        assert said in refused(*words, capsys=capsys)


def test_deep_json_in_a_shard_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"a.png": pixels(), "a.txt": b"red", "b.png": pixels(), "b.json": DEEP.encode()}))
    index_dataset(tmp_path, val_shards=0, test_shards=0)
    reader = ShardReader(tmp_path / "train")
    assert reader.about(0)["captions"] == ["red"]
    with pytest.raises(DamagedSample, match="unreadable JSON"):
        reader.about(1)


def test_an_image_starts_no_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS that is called .jpg: PIL would start `gs`, which here leaves a trace."""
    canary, bin_folder = tmp_path / "canary", tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "gs").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (bin_folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    (tmp_path / "t.csv").write_text("filepath,caption\na.jpg,x\n")
    assert "no image of a supported format" in refused("data", "pack", tmp_path / "t.csv", "--out", tmp_path / "o", capsys=capsys)
    assert not canary.exists()
