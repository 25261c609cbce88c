"""`mmlg data check` and `mmlg data index`, as a user runs them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlg_scale import files
from mmlg_scale.cli import main
from mmlg_scale.data import indexing, manifest
from mmlg_scale.data import reader as reader_module
from mmlg_scale.data.check import check_dataset
from mmlg_scale.data.index import key_checksum
from mmlg_scale.data.indexing import index_dataset, index_shard
from mmlg_scale.data.manifest import shards_of
from mmlg_scale.data.publish import Sample, new_dataset, write_split
from mmlg_scale.data.reader import HASH, HEADER, IMAGE, LONG, ShardReader, header_problem
from mmlg_scale.data.scan import scan
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.data.tokens import offered_tokenizer
from mmlg_scale.errors import UserError
from tests.data.damage import KINDS, overwrite


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    root = tmp_path / "scenes"
    write_scenes(root, num_train=24, num_val=6, num_test=6, seed=4, samples_per_shard=12)
    return root


def test_a_whole_set_passes_and_need_not_be_checked_again(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(packed)]) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    states = json.loads((packed / "train" / "checked.json").read_text())["shards"]
    assert [state["decode"] for state in states.values()] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_one_line_with_its_remedy(kind: str, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, cause = KINDS[kind]
    lost = damage(packed / "train", 1, 4)
    assert main(["data", "check", str(packed)]) == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(str(packed / "train" / "shard-000001.tar"))]
    assert f": {cause} (" in lines[0]
    assert f"{len(lost)} samples" in lines[0] or "sample 00000016:" in lines[0]
    assert "copy the shard again" in lines[0] or "pack again" in lines[0]
    assert [line for line in lines if f": {HASH} (" in line] == lines[1:]
    assert len(lines) == (1 if kind == "shard missing" else 2)
    assert "samples lost" in out
    assert main(["data", "check", str(packed), "--split", "val", "test"]) == 0


def test_bytes_that_only_the_hash_tells(packed: Path) -> None:
    place = ShardReader(packed / "val").place(2)
    assert place.text is not None
    overwrite(packed / "val", 0, place.text[0], b"A")
    assert [(line.split, line.key, line.cause, line.num_samples) for line in check_dataset(packed)] == [("val", None, HASH, 0)]


def test_no_decode_leaves_images_alone(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KINDS["image cut"][0](packed / "train", 0, 3)
    assert {line.cause for line in check_dataset(packed, decode=False)} == {HASH}
    assert main(["data", "check", str(packed), "--no-decode"]) == 1
    assert IMAGE not in capsys.readouterr().out
    assert {line.cause for line in check_dataset(packed)} == {HASH, IMAGE}


def test_check_says_what_is_no_data_set(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "contains no data set")):
        assert main(["data", "check", str(folder)]) == 2
        assert said in capsys.readouterr().err
    shutil.rmtree(packed / "val")
    assert main(["data", "check", str(packed), "--split", "val"]) == 2
    assert "has no split 'val'; it has: train, test" in capsys.readouterr().err
    (packed / "train" / "manifest.json").write_text("{")
    assert main(["data", "check", str(packed)]) == 2


def image(number: int, extension: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "jpeg": "JPEG", "JPG": "JPEG"}.get(extension, extension))
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))


def img2dataset(first: int, count: int) -> dict[str, bytes]:
    """What img2dataset writes: image, caption, and a JSON about the download."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        about = {"url": "http://x/y.jpg", "key": f"{number:09d}", "status": "success", "caption": f"caption {number}"}
        members |= {
            f"{number:09d}.jpg": image(number, "jpg"),
            f"{number:09d}.txt": f"caption {number}".encode(),
            f"{number:09d}.json": json.dumps(about).encode(),
        }
    return members


def captions(root: Path, split: str) -> list[list[str]]:
    reader = ShardReader(root / split)
    return [reader.about(index)["captions"] for index in range(len(reader))]


def test_shards_from_elsewhere_become_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    for shard in range(5):
        write_tar(root / f"{shard:05d}.tar", img2dataset(10 * shard, 10))
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("*.tar")}
    assert main(["data", "index", str(root), "--val-shards", "1", "--test-shards", "2"]) == 0
    assert "train 20, val 10, test 20 samples" in capsys.readouterr().out
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("*.tar")} == before
    assert captions(root, "train") == [[f"caption {number}"] for number in range(20)]
    assert captions(root, "val") == [[f"caption {number}"] for number in range(20, 30)]
    assert captions(root, "test") == [[f"caption {number}"] for number in range(30, 50)]
    assert ShardReader(root / "val").image_bytes(3) == image(23, "jpg")
    assert main(["data", "check", str(root)]) == 0
    assert main(["data", "index", str(root)]) == 0  # again, with the default of one shard each
    assert len(captions(root, "train")) == 30
    with pytest.raises(UserError, match="2 for val and 3 for test leave none for train"):
        index_dataset(root, val_shards=2, test_shards=3)


def test_many_ways_to_name_and_caption(tmp_path: Path) -> None:
    """Several extensions, folders in keys, captions in a text, a JSON caption or a list of captions; other members are no concern."""
    long = "deep/" * 30 + "key"
    members = {
        "readme": b"x",
        "a/b.c/one.JPG": image(1, "JPG"),
        "a/b.c/one.txt": b" one \n",
        "two.png": image(2, "png"),
        "two.json": b'{"caption": "two"}',
        "two.cls": b"7",
        "three.webp": image(3, "webp"),
        "three.txt": b"not this",
        "three.json": b'{"captions": ["three", "drei"], "label": 4}',
        "./four.jpeg": image(4, "jpeg"),
        "./four.txt": "vi\u00e9r".encode(),
        "four.seg.png": image(5, "png"),
        f"{long}.jpg": image(6, "jpg"),
        f"{long}.txt": b"long",
        "\u00fcnf.jpg": image(7, "jpg"),
        "\u00fcnf.txt": b"umlaut",
        "six.jpg": image(8, "jpg"),
        "six.txt": b"first",
        "six.jpeg": image(9, "jpg"),
        "seven.jpg": image(10, "jpg"),
        "eight.txt": b"no image",
        "nine.jpg": image(11, "jpg"),
        "nine.json": b'{"caption": null}',
    }
    for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        root = tmp_path / str(format)
        for split in ("train", "val", "test"):
            write_tar(root / split / "x.tar", members, format=format)
        counts, problems = index_dataset(root, tokenizer="words")
        assert counts == {"train": 7, "val": 7, "test": 7}
        assert captions(root, "train") == [["one"], ["two"], ["three", "drei"], ["vi\u00e9r"], ["long"], ["umlaut"], ["first"]]
        assert ShardReader(root / "train").about(2)["label"] == 4
        assert ShardReader(root / "train").image_bytes(6) == members["six.jpg"]
        found = {cause: count for cause, count in problems.items() if count}
        assert {cause.split(" (")[0]: count for cause, count in found.items()} == {
            "duplicate members": 3,
            "samples without an image": 3,
            "samples without a caption": 6,
            "members with a dot in their name before the extension, where webdataset ends the key": 3,
            "labels": 3,
        }
        assert {fault.key: fault.cause for fault in scan(root / "train", ShardReader(root / "train"))} == {}
        reader = ShardReader(root / "train")
        assert [reader.key(index) for index in range(7)] == ["a/b.c/one", "two", "three", "./four", long, "\u00fcnf", "six"]
        tokenizer = offered_tokenizer(root)
        assert tokenizer is not None
        assert tokenizer.vocab_size == 4 + len({"one", "two", "three", "drei", "vi\u00e9r", "long", "umlaut", "first"})


def test_webdatasets_own_shards_are_read_as_it_reads_them(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        with webdataset.TarWriter(str(tmp_path / split / "0.tar")) as writer:
            for number in range(6):
                writer.write({"__key__": f"sub.dir/{number}", "jpg": image(number, "jpg"), "txt": f"text {number}"})
    index_dataset(tmp_path)
    theirs = list(webdataset.WebDataset(str(tmp_path / "train" / "0.tar"), shardshuffle=False))
    reader = ShardReader(tmp_path / "train")
    assert [reader.key(index) for index in range(len(reader))] == [sample["__key__"] for sample in theirs]
    for index, sample in enumerate(theirs):
        assert reader.image_bytes(index) == sample["jpg"]
        assert reader.about(index)["captions"] == [sample["txt"].decode()]


@settings(max_examples=60, deadline=None)
@given(
    headers=st.sets(st.integers(0, 23), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 23)),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]),
)
def test_indexing_finds_every_sample_that_is_whole(headers: set[int], cut: int | None, format: int) -> None:
    """Members 2 n and 2 n + 1 are image and text of sample n; a sample is lost just when a header of its own or its data is."""
    import tempfile

    members = {f"{number // 2:04d}.{('jpg', 'txt')[number % 2]}": bytes([number + 1]) * (700 + number) for number in range(24)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        write_tar(path, members, format=format)
        with tarfile.open(path) as tar:
            places = [(member.offset, member.offset_data) for member in tar]
        payload = bytearray(path.read_bytes())
        for number in headers:
            payload[places[number][0] + 150] ^= 0x11  # in the checksum
        if cut is not None:
            del payload[places[cut][1] + 350 :]
        path.write_bytes(payload)
        found = index_shard(path, Path(folder))
        reader = ShardReader.of_shards(shards_of(Path(folder), [found.entry]))
        keys = [reader.key(index) for index in range(len(reader))]
    lost = {number // 2 for number in headers} | (set(range(cut // 2, 12)) if cut is not None else set())
    assert [int(key) for key in keys] == sorted(set(range(12)) - lost)
    reached = {number for number in headers if cut is None or number < cut}
    runs = {number for number in reached if number - 1 not in reached}
    places_counted = found.problems["damaged places (tar header)"]
    assert places_counted >= len(runs)
    assert bool(places_counted) == bool(headers if cut is None else {number for number in headers if number <= cut})
    assert found.problems["cut shards"] == (cut is not None and cut not in headers)


def test_what_cannot_be_indexed(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "bare" / "train" / "0.tar", {"a.jpg": b"x"})
    (tmp_path / "noise" / "train").mkdir(parents=True)
    (tmp_path / "noise" / "train" / "0.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    write_tar(tmp_path / "part" / "val" / "0.tar", {"a.jpg": b"x"})
    for root, said in (
        (tmp_path / "none", "no folder"),
        (tmp_path / "empty", "contains no .tar shards"),
        (tmp_path / "bare", "split train has no whole sample .* 1 samples without a caption"),
        (tmp_path / "noise", "1 damaged places"),
        (tmp_path / "part", "split val has no whole sample"),
        (packed, r"was packed by another command \(scenes\)"),
    ):
        with pytest.raises(UserError, match=said):
            index_dataset(root)
    write_tar(tmp_path / "torn" / "train" / "0.tar", {"a.jpg": b"x", "a.txt": b"x"})
    (tmp_path / "torn" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        index_dataset(tmp_path / "torn")


def test_a_huge_json_is_not_read_by_indexing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (indexing, reader_module):
        monkeypatch.setattr(module, "MAX_SAMPLE_TEXT_BYTES", 100)
    about = json.dumps({"captions": ["long " * 50]}).encode()
    write_tar(tmp_path / "train" / "0.tar", {"a.jpg": b"x", "a.txt": b"short", "a.json": about, "b.jpg": b"x", "b.json": about})
    with mock.patch.object(indexing.json, "loads", side_effect=AssertionError):
        found = indexing.index_shard(tmp_path / "train" / "0.tar", tmp_path / "train")
    reader = ShardReader.of_shards(shards_of(tmp_path / "train", [found.entry]))
    assert [(reader.key(index), reader.place(index).json is None) for index in range(2)] == [("a", True), ("b", False)]
    assert found.state["faults"][0][:3] == (1, 1, LONG)


def test_a_manifest_too_large_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 500)
    samples = [Sample(f"{index:08d}", b"x", "png", ["x"]) for index in range(20)]
    with pytest.raises(UserError, match=r"a manifest of 4 shards would take .* Make larger shards"):
        write_split(tmp_path, "train", samples, samples_per_shard=5)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 511), value=st.integers(1, 255))
def test_any_changed_byte_of_a_header_is_noticed(position: int, value: int) -> None:
    info = tarfile.TarInfo("sub/key.png")
    info.size = 123456
    header = bytearray(info.tobuf())
    key = key_checksum("sub/key")
    assert header_problem(bytes(header), "png", 123456, key) is None
    header[position] ^= value
    changed = header_problem(bytes(header), "png", 123456, key)
    # The two bytes behind the checksum's digits are padding that its own sum leaves out.
    assert changed is not None or 148 <= position < 156
    assert header_problem(info.tobuf(), "png", 123456, key_checksum("sub/kez")) is not None
    assert header_problem(info.tobuf(), "jpg", 123456, key) is not None
    assert header_problem(info.tobuf(), "png", 123457, key) is not None
    assert header_problem(info.tobuf(), "png", 123456, None) is None


def is_there_during_a_start(out: Path, folder: Path) -> bool:
    """Whether `folder` is there while a data set is written to `out`, which then fails."""
    found = None
    files.remove_leftovers.cache_clear()
    with contextlib.suppress(ZeroDivisionError), new_dataset(out, "x", {}):
        found = folder.is_dir()
        raise ZeroDivisionError
    assert found is not None
    return found


def test_a_killed_command_leaves_a_folder_that_the_next_start_removes(tmp_path: Path) -> None:
    out = tmp_path / "set"
    code = "import sys; from mmlg_scale.data.publish import new_dataset; from pathlib import Path\n"
    code += "with new_dataset(Path(sys.argv[1]), 'x', {}) as root: print(root, flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        try:
            assert is_there_during_a_start(out, left)  # its owner runs
        finally:
            process.kill()
    assert left.is_dir()
    assert is_there_during_a_start(out, left)  # process ids of another container can look dead
    elsewhere = left.with_name(".set.00000000." + left.name.split(".", 3)[3])
    elsewhere.mkdir()
    for folder in (left, elsewhere):
        os.utime(folder, (0, 0))
    assert not is_there_during_a_start(out, left)
    assert [path.name for path in tmp_path.iterdir()] == [elsewhere.name]  # another host's process may still run


def test_a_damaged_header_hides_no_other_sample(packed: Path) -> None:
    for position in (0, 5, 11):
        KINDS["image header"][0](packed / "train", 0, position)
    found = scan(packed / "train", ShardReader(packed / "train"))
    assert [(fault.index, fault.cause) for fault in found] == [(0, HEADER), (5, HEADER), (11, HEADER)]
