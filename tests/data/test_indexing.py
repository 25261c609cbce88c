"""Indexing in parts, again, and of sets that earlier versions wrote."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from mmlg_scale.cli import main
from mmlg_scale.data import indexing, scan
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.index import NAMES_ONLY
from mmlg_scale.data.indexing import index_dataset
from mmlg_scale.data.manifest import load_manifest
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import CUT, ENCODING, JSON, ShardReader
from mmlg_scale.data.reindexing import rewrite_index
from mmlg_scale.data.tokens import NONE
from mmlg_scale.errors import UserError
from mmlg_scale.records import write_record
from tests.data.damage import KINDS
from tests.data.specs import spec_for
from tests.data.test_check_and_index import img2dataset, write_tar


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_shards(root: Path, count: int = 5) -> Path:
    for shard in range(count):
        members = img2dataset(4 * shard, 4)
        if shard == 1:
            members["000000005.txt"] = b"caf\xe9"
        write_tar(root / f"{shard:05d}.tar", members)
    return root


def test_parts_give_what_one_pass_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = write_shards(tmp_path / "whole"), tmp_path / "parts"
    shutil.copytree(whole, parts)
    assert main(["data", "index", str(whole)]) == 0
    words = ["data", "index", str(parts)]
    assert main([*words, "--part", "1/2"]) == 0
    assert "part 1/2: 3 shards indexed, 0 were" in capsys.readouterr().out
    assert main([*words, "--join"]) == 2
    assert f"shard {parts / '00001.tar'} is not indexed" in capsys.readouterr().err
    assert not (parts / "dataset.json").exists()
    assert main([*words, "--part", "2/2"]) == 0
    # A pass that was stopped: what is done is not done again.
    (parts / "train" / "index" / "00002.json").unlink()
    assert main([*words, "--part", "1/2"]) == 0
    assert "part 1/2: 1 shards indexed, 2 were" in capsys.readouterr().out
    assert main([*words, "--join"]) == 0
    assert contents(whole) == contents(parts)
    assert {Path(name).suffix for name in contents(parts)} == {".tar", ".npy", ".json"}
    assert not list(parts.glob("*/index/*.json"))
    for part in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        assert main([*words, "--part", part]) == 2
        assert "is no part" in capsys.readouterr().err
    assert main([*words, "--part", "1/2", "--join"]) == 2
    assert "do not go together" in capsys.readouterr().err


def test_a_shard_that_changes_between_the_passes_is_indexed_again(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set")
    options: dict[str, Any] = {"val_shards": 1, "test_shards": 1}
    indexing.index_shards_of(root, (1, 1), processes=1, progress=lambda items: items, **options)
    write_tar(root / "00002.tar", img2dataset(100, 6))
    with pytest.raises(UserError, match=r"00002\.tar is not indexed, or has changed"):
        indexing.join_dataset(root, tokenizer=NONE, **options)
    counts, _ = index_dataset(root)
    assert counts == {"train": 14, "val": 4, "test": 4}
    assert index_dataset(root, val_shards=0)[0] == {"train": 18, "test": 4}
    assert not [path for path in (root / "val").rglob("*") if path.is_file()]  # nothing of the split that is no more


def test_the_index_pass_has_checked_headers_and_captions(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set")
    index_dataset(root)
    reader = ShardReader(root / "train")
    with mock.patch.object(scan, "check_samples", side_effect=AssertionError):
        found = list(scan.scan(root / "train", reader, check="structure", hashed=True))
    assert [(fault.index, fault.key, fault.cause) for fault in found] == [(5, "000000005", ENCODING)]
    with pytest.raises(AssertionError), mock.patch.object(scan, "check_samples", side_effect=AssertionError):
        scan.scan(root / "train", reader, check="decode")
    assert [scan.resolved("auto", count) for count in (1, scan.AUTO_DECODE_SAMPLES, scan.AUTO_DECODE_SAMPLES + 1)] == [
        "decode",
        "decode",
        "structure",
    ]


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_shards(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(one, two)
    index_dataset(one)
    monkeypatch.setattr(indexing, "FEW_BYTES", 0)
    seen: list[int] = []
    index_dataset(two, processes=2, progress=lambda items: [seen.append(1) or item for item in items])  # type: ignore[func-returns-value]
    assert contents(one) == contents(two)
    assert len(seen) == 5


def as_earlier_versions_wrote(root: Path) -> None:
    """Manifests that list every sample, in place of those that list shards."""
    for split in ("train", "val", "test"):
        reader, shards = ShardReader(root / split), load_manifest(root / split)["shards"]
        position = 0
        for shard in shards:
            count, shard["samples"] = shard["samples"], []
            shard["num_bytes"] = shard.pop("bytes")
            del shard["index"]
            for index in range(position, position + count):
                place = reader.place(index)
                sample = {"key": place.key, "image": [place.extension, *place.image]}
                about = place.json if not reader.locate(np.array([index]))[1]["flags"][0] & NAMES_ONLY else None
                sample |= {name: span for name, span in (("text", place.text), ("json", about)) if span is not None}
                shard["samples"].append(sample)
            position += count
        content = {"format_version": 1, "split": split, "num_samples": position, "shards": shards}
        write_record(root / split / "manifest.json", content)
        shutil.rmtree(root / split / "index")
        (root / split / "checked.json").unlink()


def without_names(index: bytes) -> bytes:
    """The records of an index without JSONs that are there for named captions only, which earlier versions left out."""
    records = np.load(io.BytesIO(index)).copy()
    named = (records["flags"] & NAMES_ONLY) > 0
    records["json"][named] = records["json_size"][named] = 0
    records["flags"][named] &= ~np.uint8(NAMES_ONLY)
    return records.tobytes()


def batches(root: Path) -> list[torch.Tensor]:
    stream = TrainStream(root / "train", spec_for(root), StreamSettings(global_batch_size=24, seed=5, max_bad_fraction=1.0))
    return [part for batch in islice(stream, 8) for part in (batch.samples_BS, batch.image_uint8_BCHW, batch.text_NT)]


@pytest.mark.parametrize("kind", ["scenes", "indexed"])
def test_a_set_of_an_earlier_version_is_rewritten(kind: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "set"
    if kind == "scenes":
        shutil.copytree(scenes, root)
        KINDS["json cut"][0](root / "train", 1, 4)  # a damaged sample stays one
    else:
        write_shards(root)
        index_dataset(root, val_shards=2, test_shards=1)
    expected, before = batches(root) if kind == "scenes" else [], contents(root)
    as_earlier_versions_wrote(root)
    old, shards = open_pairs(root).digest(), {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}
    with pytest.raises(UserError) as told:
        ShardReader(root / "train")
    assert f"mmlg data index {root} rewrites it" in str(told.value)
    assert "\n" not in str(told.value)
    capsys.readouterr()
    assert main(["data", "check", str(root)]) == 2
    assert f"mmlg data index {root} rewrites it" in capsys.readouterr().err
    assert main(["data", "index", str(root)]) == 0
    assert "index rewritten, train " in capsys.readouterr().out
    assert open_pairs(root).digest() == old  # runs know it again
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")} == shards
    after = contents(root)
    assert {name for name in before if "checked" not in name} == {name for name in after if "checked" not in name}
    assert all(after[name] == before[name] for name in before if name.endswith((".tar", "dataset.json")))
    assert all(without_names(after[name]) == without_names(before[name]) for name in before if name.endswith(".npy"))
    if kind == "scenes":
        assert all(torch.equal(one, other) for one, other in zip(batches(root), expected, strict=True))
    (root / "train" / "manifest.json").write_text('{"format_version": 2, "num_samples": 1, "shards": [], "identity": 5}')
    assert open_pairs(root).digest() != old


def test_old_manifests_are_not_trusted(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "set"))
    as_earlier_versions_wrote(root)
    good = json.loads((root / "train" / "manifest.json").read_text())
    del good["content_sha256"]
    for name, value, said in (
        ("file", "../../canary", "no shard's name"),
        ("file", "a/b.tar", "no shard's name"),
        ("image", ["png", -512, 1], "no place in a shard"),
        ("image", ["png", 512, 2**40], "no place in a shard"),
        ("image", ["exe", 512, 1], "an image of kind exe"),
        ("text", [512.5, 1], "no place in a shard"),
    ):
        content = json.loads(json.dumps(good))
        of = content["shards"][0] if name == "file" else content["shards"][0]["samples"][0]
        of[name] = value
        (root / "train" / "manifest.json").write_text(json.dumps(content, indent=1))
        assert main(["data", "index", str(root)]) == 2, said
        with pytest.raises(UserError, match=said):
            rewrite_index(root)
    assert not list(tmp_path.glob("canary*"))


def test_a_packed_set_gets_its_index_back(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "set"))
    before = contents(root)
    (root / "train" / "index" / "shard-000001.npy").unlink()
    (root / "val" / "index" / "shard-000000.npy").write_bytes(b"x")
    assert main(["data", "index", str(root)]) == 0
    assert "2 of its files were missing or damaged" in capsys.readouterr().out
    assert contents(root) == before
    (root / "train" / "index" / "shard-000001.npy").unlink()
    KINDS["shard cut"][0](root / "train", 2, 3)
    assert main(["data", "index", str(root)]) == 0
    (root / "train" / "index" / "shard-000002.npy").unlink()
    assert main(["data", "index", str(root)]) == 2
    assert "is not the shard that was packed" in capsys.readouterr().err


def test_a_check_in_parts_is_one_check(scenes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "set"))
    assert not len(scan.scan(root / "train", ShardReader(root / "train")))  # what is known of a shard that changes is no longer true
    lost = {40 + position for position in KINDS["json cut"][0](root / "train", 1, 4)}
    lost |= {80 + position for position in KINDS["shard cut"][0](root / "train", 2, 38)}
    assert main(["data", "check", str(root), "--split", "train", "--part", "1/2"]) == 1
    assert main(["data", "check", str(root), "--split", "train", "--part", "2/2"]) == 1
    names = sorted(path.name for path in (root / "train").glob("checked*"))
    assert names == ["checked-1-of-2.json", "checked-2-of-2.json", "checked.json"]
    with mock.patch.object(scan, "check_samples", side_effect=AssertionError):
        found = scan.scan(root / "train", ShardReader(root / "train"), check="decode")
    assert found.positions().tolist() == sorted(lost)
    assert dict(found.counts) == {JSON: 1, CUT: 2}
    assert [path.name for path in (root / "train").glob("checked*")] == ["checked.json"]
    with mock.patch.object(scan, "check_samples", side_effect=AssertionError):
        assert scan.scan(root / "train", ShardReader(root / "train"), check="decode").spans == found.spans


def test_a_long_check_is_written_down_on_the_way(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that dies in the last shard has the others behind it."""
    root = Path(shutil.copytree(scenes, tmp_path / "set"))
    (root / "train" / "checked.json").unlink()
    monkeypatch.setattr(scan, "SAVE_SECONDS", -1.0)
    check = scan.check_samples

    def dies(reader: ShardReader, samples: range, start: int, *, decode: bool) -> list[scan.Span]:
        if start == 120:
            raise ZeroDivisionError
        return check(reader, samples, start, decode=decode)

    monkeypatch.setattr(scan, "check_samples", dies)
    with pytest.raises(ZeroDivisionError):
        scan.scan(root / "train", ShardReader(root / "train"))
    kept = json.loads((root / "train" / "checked.json").read_text())["shards"]
    assert {"shard-000000.tar", "shard-000001.tar"} <= set(kept)
    assert all(state["decode"] for state in kept.values())


def test_an_empty_caption_of_several_does_not_lose_the_sample(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set", 3)
    members = img2dataset(0, 3)
    for number, listed in enumerate((["", "a dog", " \n"], [" ", ""], ["a cat"])):
        del members[f"{number:09d}.txt"]
        members[f"{number:09d}.json"] = json.dumps({"captions": listed}).encode()
    write_tar(root / "00000.tar", members)
    index_dataset(root, tokenizer=NONE)
    reader = ShardReader(root / "train")
    assert [reader.about(index)["captions"] for index in (0, 2)] == [["a dog"], ["a cat"]]
    found = scan.scan(root / "train", reader, check="structure")
    assert [(fault.index, fault.cause) for fault in found] == [(1, JSON)]


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_a_compressed_shard_is_one_line(name: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set", 3)
    (root / "00001.tar").write_bytes(pack((root / "00001.tar").read_bytes()))
    with pytest.raises(UserError, match=rf"shard .*00001\.tar is compressed by {name}: training reads samples at any place\. Unpack it"):
        index_dataset(root, tokenizer=NONE, processes=1)


def test_a_member_may_be_named_as_a_compressed_file_begins(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "set", 3)
    write_tar(root / "00000.tar", {name.replace("0000", "BZh0"): content for name, content in img2dataset(0, 4).items()})
    assert index_dataset(root, tokenizer=NONE, processes=1)[0]["train"] == 4


@pytest.mark.parametrize("name", ["dataset.json", "classes.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
def test_a_check_covers_the_files_beside_the_splits(name: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(scenes, tmp_path / "set")
    words = ["data", "check", str(tmp_path / "set"), "--no-decode"]
    assert main(words) == 0
    with open(tmp_path / "set" / name, "ab") as file:
        file.write(b"x")
    capsys.readouterr()
    assert main(words) == 1
    assert f"{tmp_path / 'set' / name} is " in capsys.readouterr().out.splitlines()[0]
