"""Tables, folders and shards whose content would be lost without a word."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmlg_scale.data.indexing import index_dataset, index_shard, print_index
from mmlg_scale.data.pack import PackSettings, PairCheck, _rows, pack_folders, pack_table
from mmlg_scale.data.pack_json import pack_json
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError
from tests.data.test_check_and_index import image, write_tar
from tests.data.test_sets import write_images

COLUMNS = ("filepath", "caption")


def read(text: str, name: str) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(text.encode())
        return [(row["filepath"], row["caption"]) for _, row in _rows(path, COLUMNS)]


@settings(max_examples=200, deadline=None)
@given(
    captions=st.lists(st.text(st.sampled_from('ab ,"\t\n\u00e9'), min_size=1, max_size=20), max_size=6),
    delimiter=st.sampled_from(",\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_whatever_was_written_with_quotes_is_read(captions: list[str], delimiter: str, quoting: int) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    rows = [(f"{number}.png", caption) for number, caption in enumerate(captions)]
    writer.writerows([COLUMNS, *rows])
    assert read(buffer.getvalue(), "t.tsv" if delimiter == "\t" else "t.csv") == rows


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("t.csv", ["0.png,a red cat, asleep"], "row 2: 3 fields, the header has 2. Put a caption with commas in quotes"),
        ("t.csv", ["0.png,a cat", "1.png,a dog,"], "row 3: 3 fields, the header has 2"),
        ("t.tsv", ["0.png\ta cat\tasleep"], "row 2: 3 fields, the header has 2. Put a caption with tabs in quotes"),
        # An open quote: closed by another one inside a row, at the end of a row, or never.
        (
            "t.tsv",
            ["0.png\tx", '1.png\t"wow , he said', "2.png\ty", '3.png\tan 8" pizza'],
            "row 3: the quotes are wrong, read up to line 5",
        ),
        ("t.tsv", ["0.png\tx", '1.png\t"wow , he said', "2.png\ty", '3.png\tno, 8"', "4.png\tz"], "rows 3 to 5: .* over the row of 2.png"),
        ("t.csv", ["0.png,x", '1.png,"wow he said', "2.png,y", '3.png,no 8"', "4.png,z"], "rows 3 to 5: .* over the row of 2.png"),
        ("t.csv", ["0.png,x", '1.png,"wow', "2.JPG,y"], "row 3: the quotes are wrong, read up to line 4"),
        ("t.csv", ['0.png,"wow" he said'], "row 2: the quotes are wrong, read up to line 2"),
        (
            "t.csv",
            ["0.png,x", f"1.png,{'x' * 140_000}"],
            "row 3: a caption of 140000 characters; at most 5000 are .* --skip-bad",
        ),
        ("t.csv", ["0.png,x", f"{'x' * 140_000},y"], "row 3: filepath has 140000 characters, more than any path. .* --skip-bad"),
        # A quote that takes in the rest of a long table is no long caption, also where such are left out.
        ("t.csv", ["0.png,x", '1.png,"wow', *["2.png,y" + "z" * 4000] * 50], "row 3: the quotes are wrong, read up to line 53"),
    ],
)
def test_rows_that_would_be_cut_or_swallowed_are_refused(name: str, rows: list[str], said: str, tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    table = tmp_path / name
    table.write_text("\n".join(["\t".join(COLUMNS) if name.endswith("tsv") else ",".join(COLUMNS), *rows]) + "\n")
    with pytest.raises(UserError, match=said) as raised:
        pack_table(table, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert not (tmp_path / "out").exists()
    assert csv.field_size_limit() == 131_072
    if "--skip-bad" not in said:
        with pytest.raises(UserError, match=said):
            pack_table(table, tmp_path / "out", PackSettings(skip_bad=True))


def test_rows_with_fields_over_the_limit_of_csv_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, 6)
    table, long = tmp_path / "t.csv", "x" * 140_000
    rows = ["0.png,a,1", f'1.png,"{long}",2', f"{long}.png,b,3", *[f"{number}.png,c,4" for number in range(1, 6)], f"2.png,d,{long}"]
    table.write_text("\n".join(["filepath,caption,note", *rows]) + "\n")
    pack_table(table, tmp_path / "out", PackSettings(skip_bad=True, val=0.2, test=0.2))
    assert "left out 2 files, folders and captions" in capsys.readouterr().out
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [line.removeprefix(f"{table} ").split(".")[0] for line in skipped] == [
        "row 3: a caption of 140000 characters; at most 5000 are supported",
        "row 4: filepath has 140004 characters, more than any path",
    ]
    readers = [ShardReader(tmp_path / "out" / split) for split in ("train", "val", "test")]
    captions = sorted(text for reader in readers for index in range(len(reader)) for text in reader.about(index)["captions"])
    assert captions == ["a", "c", "c", "c", "c", "c", "d"]


def test_half_an_emoji_is_a_bad_caption() -> None:
    strict, lenient = PairCheck(skip_bad=False), PairCheck(skip_bad=True)
    assert lenient.is_caption("a cat \U0001f408", "x: ")
    assert not lenient.is_caption("a cat \ud83d", "x: ")
    assert lenient.skipped == ["x: a caption is not valid Unicode: 'a cat ?'. Correct it."]
    with pytest.raises(
        UserError, match=r"x: a caption is not valid Unicode: 'a cat \?'\. Correct it\. Or leave such captions out with --skip-bad"
    ):
        strict.is_caption("a cat \ud83d", "x: ")


def test_files_of_classes_that_are_left_out_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "in" / name, 10)
        Image.new("RGB", (9, 9)).save(tmp_path / "in" / name / "a.gif")
        (tmp_path / "in" / name / "more.png").mkdir()
        (tmp_path / "in" / name / ".hidden").write_text("")
    Image.new("RGB", (9, 9)).save(write_images(tmp_path / "bad" / "cat", 5)[0].parents[1] / "a.gif")
    (tmp_path / "bad" / "dog").mkdir()
    with pytest.raises(UserError, match="dog has no images"):
        pack_folders(tmp_path / "bad", tmp_path / "out", templates=["a {}"])
    pack_folders(tmp_path / "in", tmp_path / "out", PackSettings(val=0.1, test=0.1), templates=["a {}"])
    assert [len(ShardReader(tmp_path / "out" / split)) for split in ("train", "val", "test")] == [16, 2, 2]
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [line.removeprefix(f"{tmp_path}/in/") for line in listed] == [
        f"{name}/{rest}"
        for name in ("cat", "dog")
        for rest in (
            "a.gif does not end in .png, .jpg, .jpeg, .webp, .bmp. Convert it.",
            "more.png is a folder inside the folder of a class. Move its images there.",
        )
    ]
    out = capsys.readouterr().out
    assert f"left out 4 files, folders and captions, listed in {tmp_path / 'out' / 'skipped.json'}. First: {listed[0]}" in out


def test_keys_with_dots_and_other_members_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {}
    for number in range(6):
        key = f"{number}.v2" if number % 2 else str(number)
        members |= {f"{key}.jpg": image(number, "jpg"), f"{key}.txt": b"thing", f"{key}.npy": b"1"}
    for split in ("train", "val", "test"):
        write_tar(tmp_path / split / "0.tar", members)
    counts, problems = index_dataset(tmp_path)
    assert counts == {"train": 3, "val": 3, "test": 3}
    assert index_shard(tmp_path / "train" / "0.tar", tmp_path / "train").problems.total() == 12
    print_index(counts, problems, tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert "left out: 18 members with a dot in their name before the extension, where webdataset ends the key" in out[2]
    assert out[1] == "left out: 18 members of other kinds"


@pytest.mark.parametrize("kind", ["table", "folders", "json"])
def test_nothing_is_decoded_before_it_is_known_that_it_can_be_packed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes hours for millions of images."""
    decoded = list[bytes]()
    monkeypatch.setattr("mmlg_scale.data.pack.check_decodes", decoded.append)
    images = write_images(tmp_path / "in" / "cat", 5) + write_images(tmp_path / "in" / "dog", 5)
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,caption\n" + "".join(f"{path},an image\n" for path in images))
    about = [{"id": number, "file_name": str(path)} for number, path in enumerate(images)]
    captions = [{"image_id": number, "caption": "an image"} for number in range(len(images))]
    (tmp_path / "coco.json").write_text(json.dumps({"images": about, "annotations": captions}))
    (tmp_path / "file").write_text("x")

    def pack(out: Path, how: PackSettings) -> None:
        if kind == "table":
            pack_table(table, out, how)
        elif kind == "folders":
            pack_folders(tmp_path / "in", out, how, templates=["a {}"])
        else:
            pack_json(tmp_path / "coco.json", out, how, images=tmp_path)

    new, drawn = tmp_path / "out", PackSettings(val=0.1, test=0.1)
    for out, how, said in (
        (tmp_path / "file", drawn, "file is a file"),
        (tmp_path / "in", drawn, "in contains files that are not a data set"),
        (new, PackSettings(val=0.0), "the fractions of val and test are 0.0 and 0.1"),
        (new, PackSettings(val=0.5, test=0.5), "the fractions of val and test are 0.5 and 0.5"),
        (new, PackSettings(tokenizer=str(tmp_path / "none")), "none"),
    ):
        with pytest.raises(UserError, match=said):
            pack(out, how)
    assert not decoded
    assert not new.exists()
    pack(new, drawn)
    assert len(decoded) == 10


def test_fractions_that_are_not_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "in", 6)
    table = tmp_path / "pairs.csv"
    splits = ("train", "train", "val", "val", "test", "test")
    table.write_text("filepath,caption,split\n" + "".join(f"{path},x,{split}\n" for path, split in zip(images, splits, strict=True)))
    for name, how, told in (("a", PackSettings(), False), ("b", PackSettings(val=0.4), True), ("c", PackSettings(seed=1), True)):
        pack_table(table, tmp_path / name, how)
        assert ("--val, --test and --seed are not used" in capsys.readouterr().out) is told
        assert [len(ShardReader(tmp_path / name / split)) for split in ("train", "val", "test")] == [2, 2, 2]
