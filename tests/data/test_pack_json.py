"""COCO and Karpathy JSON, and what packing does with images that do not decode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlg_scale.bounds import MAX_CAPTION
from mmlg_scale.cli import main
from mmlg_scale.data.pack import PackSettings, pack_folders, pack_table
from mmlg_scale.data.pack_json import pack_json
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError


def write_jpegs(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        paths.append(folder / f"{number:03d}.jpg")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def contents(root: Path, split: str) -> dict[bytes, list[str]]:
    reader = ShardReader(root / split)
    return {reader.image_bytes(index): reader.about(index)["captions"] for index in range(len(reader))}


def coco(folder: Path, count: int) -> Path:
    """Annotations in another order than images, two or three an image."""
    write_jpegs(folder / "train2017", count)
    images = [{"id": 1000 - number, "file_name": f"{number:03d}.jpg", "license": 1} for number in range(count)]
    notes = [
        {"image_id": 1000 - number, "id": 7 * number + k, "caption": f" image {number} text {k}\n"}
        for k in range(3)
        for number in reversed(range(count))
        if k < 2 + number % 2
    ]
    path = folder / "captions_train2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    return path


def test_coco_captions(tmp_path: Path) -> None:
    source = coco(tmp_path / "in", 20)
    pack_json(source, tmp_path / "out", images=tmp_path / "in" / "train2017")
    found = {split: contents(tmp_path / "out", split) for split in ("train", "val", "test")}
    assert [len(part) for part in found.values()] == [17, 1, 2]
    expected = {
        path.read_bytes(): [f"image {number} text {k}" for k in range(2 + number % 2)]
        for number, path in enumerate(sorted((tmp_path / "in" / "train2017").iterdir()))
    }
    assert {**found["train"], **found["val"], **found["test"]} == expected


def test_coco_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco(tmp_path / "in", 6)
    images, out = tmp_path / "in" / "train2017", tmp_path / "out"
    content = json.loads(source.read_text())
    assert main(["data", "pack", str(source), "--out", str(out)]) == 2
    assert "--images is missing" in capsys.readouterr().err
    for change, said in (
        (lambda c: c["images"].pop(), "1 images have annotations but no entry, such as id 995"),
        (lambda c: c["annotations"].clear(), r"images\[0\]: 000.jpg has no captions"),
        (lambda c: c["annotations"][3].update(caption=" "), r"annotations\[3\]: empty caption.* --skip-bad"),
        (lambda c: [note.pop("caption") for note in c["annotations"]], "Give captions_"),
        (lambda c: c["images"][2].update(file_name="000.jpg"), "000.jpg appears twice"),
        (lambda c: c["images"][2].update(file_name="x.jpg"), r"images\[2\]: no image .*x.jpg"),
        (lambda c: c.pop("images"), "has no list of images"),
    ):
        changed = json.loads(json.dumps(content))
        change(changed)
        source.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            pack_json(source, out, images=images)
        assert not out.exists()
    source.write_text("[")
    with pytest.raises(UserError, match="is not JSON"):
        pack_json(source, out, images=images)


def karpathy(path: Path, counts: dict[str, int], dataset: str, filepath: str | None = None) -> Path:
    """Entry n has the image NNN.jpg and the captions "n a", "n b"; splits are dealt in turn as long as they last."""
    left, images = dict(counts), []
    while any(left.values()):
        for split, remaining in list(left.items()):
            if remaining:
                left[split] -= 1
                number = len(images)
                entry = {"filename": f"{number:03d}.jpg", "split": split, "sentences": [{"raw": f"{number} {k} "} for k in "ab"]}
                images.append({**entry, "filepath": filepath} if filepath else entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "dataset": dataset}))
    return path


@pytest.mark.parametrize(("restval", "sizes"), [("train", (9, 2, 2)), ("drop", (6, 2, 2))])
def test_karpathy_splits_are_obeyed(tmp_path: Path, restval: str, sizes: tuple[int, int, int]) -> None:
    source = karpathy(tmp_path / "in" / "k.json", {"train": 6, "restval": 3, "val": 2, "test": 2}, "mine", "val2014")
    paths = write_jpegs(tmp_path / "in" / "val2014", 13)
    pack_json(source, tmp_path / "out", images=tmp_path / "in", restval=restval)
    entries = json.loads(source.read_text())["images"]
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        wanted = {split} | ({"restval"} if split == "train" and restval == "train" else set())
        assert contents(tmp_path / "out", split) == {
            paths[number].read_bytes(): [f"{number} a", f"{number} b"] for number, entry in enumerate(entries) if entry["split"] in wanted
        }
        assert len(ShardReader(tmp_path / "out" / split)) == size
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("dataset", "counts", "restval", "said"),
    [
        # The counts pass: then the first image is missing.
        ("flickr30k", {"train": 29000, "val": 1014, "test": 1000}, "train", "no image .*000.jpg"),
        ("flickr30k", {"train": 29783, "val": 1000, "test": 1000}, "train", "no image .*000.jpg"),
        ("coco", {"train": 82783, "restval": 30504, "val": 5000, "test": 5000}, "train", "no image .*000.jpg"),
        ("coco", {"train": 82783, "restval": 30504, "val": 5000, "test": 5000}, "drop", "no image .*000.jpg"),
        ("mine", {"train": 3, "val": 1, "test": 1}, "train", "no image .*000.jpg"),
        (
            "flickr30k",
            {"train": 29001, "val": 1013, "test": 1000},
            "train",
            "should have 29,000 / 1,014 / 1,000 .* has 29,001 / 1,013 / 1,000",
        ),
        ("coco", {"train": 82783, "val": 5000, "test": 5000}, "train", "should have 113,287 / 5,000 / 5,000 .* has 82,783 / 5,000 / 5,000"),
    ],
)
def test_known_splits_have_their_counts(tmp_path: Path, dataset: str, counts: dict[str, int], restval: str, said: str) -> None:
    source = karpathy(tmp_path / "k.json", counts, dataset)
    with pytest.raises(UserError, match=said):
        pack_json(source, tmp_path / "out", images=tmp_path, restval=restval)


def test_other_counts_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = karpathy(tmp_path / "k.json", {"train": 4, "val": 1, "test": 1}, "flickr30k")
    write_jpegs(tmp_path / "images", 6)
    with pytest.raises(UserError, match="pass --allow-other-counts"):
        pack_json(source, tmp_path / "out", images=tmp_path / "images")
    pack_json(source, tmp_path / "out", images=tmp_path / "images", allow_other_counts=True)
    assert "not comparable with published results" in capsys.readouterr().out
    assert len(contents(tmp_path / "out", "train")) == 4


def test_karpathy_mistakes_are_named(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "k.json", {"train": 4, "val": 1, "test": 1}, "mine")
    content = json.loads(source.read_text())
    for change, said in (
        (lambda entry: entry.pop("split"), r"images\[2\] is not an entry .* KeyError\('split'\)"),
        (lambda entry: entry.update(split="dev"), r"images\[2\]: split 'dev' is not one of"),
        (lambda entry: entry.update(sentences=[]), r"images\[2\]: 002.jpg has no captions"),
    ):
        changed = json.loads(json.dumps(content))
        change(changed["images"][2])
        source.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=said):
            pack_json(source, tmp_path / "out", images=tmp_path)
    with pytest.raises(UserError, match="restval 'keep' is unknown"):
        pack_json(source, tmp_path / "out", images=tmp_path, restval="keep")


def test_a_cut_jpeg_is_found_before_anything_is_written_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_jpegs(tmp_path / "in", 20)
    cut(paths[4])
    with Image.open(paths[4]) as image:
        image.verify()  # looks whole until it is decoded
    rows = "".join(f"{path.name},text {number}\n{path.name},more\n" for number, path in enumerate(paths)) + "gone.jpg,x\n"
    table, out = tmp_path / "in" / "t.csv", tmp_path / "out"
    table.write_text("filepath,caption\n" + rows)
    with pytest.raises(UserError, match=r"t.csv row 10: .*004.jpg cannot be read as an image .*truncated.* --skip-bad"):
        pack_table(table, out)
    assert not out.exists()
    skip = PackSettings(skip_bad=True)
    pack_table(table, out, skip)
    assert "left out 2 files, folders and captions" in capsys.readouterr().out
    listed = json.loads((out / "skipped.json").read_text())
    assert len(listed) == 2
    assert "row 10" in listed[0]
    assert "row 42: no image" in listed[1]
    found = [contents(out, split) for split in ("train", "val", "test")]
    kept = [path.read_bytes() for path in paths if path != paths[4]]
    assert sorted(key for part in found for key in part) == sorted(kept)

    source = karpathy(tmp_path / "k.json", {"train": 18, "val": 1, "test": 1}, "mine")
    with pytest.raises(UserError, match=r"images\[4\]: .*004.jpg cannot be read as an image"):
        pack_json(source, tmp_path / "json", images=tmp_path / "in")
    pack_json(source, tmp_path / "json", skip, images=tmp_path / "in")
    assert paths[4].read_bytes() not in contents(tmp_path / "json", "train")

    for name in ("cat", "dog"):
        cut(write_jpegs(tmp_path / "classes" / name, 10)[7])
    with pytest.raises(UserError, match=r"cat/007.jpg cannot be read as an image"):
        pack_folders(tmp_path / "classes", tmp_path / "folders", templates=["a {}"])
    pack_folders(tmp_path / "classes", tmp_path / "folders", skip, templates=["a {}"])
    assert sum(len(ShardReader(tmp_path / "folders" / split)) for split in ("train", "val", "test")) == 18


def test_bad_captions_are_left_out_and_listed(tmp_path: Path) -> None:
    """Of tables, COCO and Karpathy files: the image keeps its other captions, or is left out with its last one."""
    paths, long, skip = write_jpegs(tmp_path / "in", 12), "x" * (MAX_CAPTION + 1), PackSettings(skip_bad=True)
    given = [[f"{number} a", f"{number} b"] for number in range(12)]
    given[2][1], given[5], given[7][0] = " ", ["", long], long
    wanted = {path.read_bytes(): [f"{number} a", f"{number} b"] for number, path in enumerate(paths) if number != 5}
    wanted[paths[2].read_bytes()], wanted[paths[7].read_bytes()] = ["2 a"], ["7 b"]
    table = tmp_path / "in" / "t.csv"
    rows = [f"{path.name},{text}\n" for path, texts in zip(paths, given, strict=True) for text in texts]
    table.write_text("filepath,caption\n" + "".join(rows))
    notes = [{"image_id": number, "caption": text} for number, texts in enumerate(given) for text in texts]
    images = [{"id": number, "file_name": path.name} for number, path in enumerate(paths)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    entries = [
        {"filename": path.name, "split": ("train", "val", "test")[number % 3], "sentences": [{"raw": text} for text in texts]}
        for number, (path, texts) in enumerate(zip(paths, given, strict=True))
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": entries}))
    packs = {
        "table": lambda out, settings: pack_table(table, out, settings),
        "coco": lambda out, settings: pack_json(tmp_path / "coco.json", out, settings, images=tmp_path / "in"),
        "karpathy": lambda out, settings: pack_json(tmp_path / "karpathy.json", out, settings, images=tmp_path / "in"),
    }
    for name, pack in packs.items():
        with pytest.raises(UserError, match=r"empty caption\. Give one, or remove it\. Or leave such captions out with --skip-bad"):
            pack(tmp_path / name, PackSettings())
        assert not (tmp_path / name).exists()
        pack(tmp_path / name, skip)
        listed = json.loads((tmp_path / name / "skipped.json").read_text())
        assert len([line for line in listed if "empty caption" in line]) == 2
        assert len([line for line in listed if f"a caption of {MAX_CAPTION + 1} characters" in line]) == 2
        found = [contents(tmp_path / name, split) for split in ("train", "val", "test")]
        assert {image: texts for part in found for image, texts in part.items()} == wanted
