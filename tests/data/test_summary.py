"""What data commands say at their end, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmlg_scale.cli import main
from mmlg_scale.data.summary import caption_lengths, num_pairs, summarise_split
from mmlg_scale.data.tokens import word_tokenizer_files
from mmlg_scale.towers import BytePairTokenizer, FileTokenizer


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten images of 20 x 30 up to 29 x 30; image i has the captions "red i" and one of i + 1 words; two have a long one."""
    lines = ["filepath,caption,split"]
    for index in range(10):
        Image.new("RGB", (20 + index, 30), (index, 0, 0)).save(tmp_path / f"{index}.png")
        split = "val" if index == 8 else "test" if index == 9 else "train"
        lines += [f"{index}.png,red {index},{split}", f"{index}.png,{' '.join(['dog'] * (index + 1))},{split}"]
    lines += [f"{index}.png,{' '.join(['cat'] * 80)},train" for index in (0, 1)]
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_pack_ends_with_what_is_in_the_set(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pack", str(table), "--out", str(tmp_path / "data"), "--tokenizer", "words"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 15
    sizes = [sum(path.stat().st_size for path in (tmp_path / "data" / split).glob("*.tar")) for split in ("train", "val", "test")]
    assert lines[:4] == [
        f"{tmp_path / 'data'}:",
        f"  train         8 images  18 captions  {sizes[0] / 1e3:.1f} kB",
        f"  val           1 images  2 captions  {sizes[1] / 1e3:.1f} kB",
        f"  test          1 images  2 captions  {sizes[2] / 1e3:.1f} kB",
    ]
    assert lines[4] == "  images: 20 to 29 pixels wide and 30 high, median 24 × 30"
    # A word is a token, and there are two more: ten of 4, one each of 3 to 12, two of 82.
    assert lines[5] == ("  captions: median 4 tokens, 99 % up to 82, longest 82; 2 of 22 exceed CLIP's context length of 77 tokens")
    # red, dog, cat, 0 to 7 and four special tokens; the 8 and the 9 are unknown.
    assert lines[6:] == [
        "  vocabulary: 15 ids, from the words of the training captions; 2 words of the val and test captions are not in it"
    ]


def test_a_set_without_a_tokenizer_is_measured_in_byte_pairs(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pack", str(table), "--out", str(tmp_path / "data"), "--resize", "16"]) == 0
    said = capsys.readouterr().out
    assert "  images: 16 × 16 pixels\n" in said
    assert "none offered; models trained from scratch on this set use open_clip's byte pairs" in said
    assert "longest 82;" in said


def test_index_and_scenes_say_it_too(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "scenes", "--out", str(tmp_path / "s"), "--num_train", "6", "--num_val", "2", "--num_test", "2"]) == 0
    said = capsys.readouterr().out
    assert "train         6 images  18 captions" in said
    assert "vocabulary: 33 ids" in said
    assert "pixels" not in said
    (tmp_path / "s" / "dataset.json").unlink()
    assert main(["data", "index", str(tmp_path / "s")]) == 2  # a tokenizer of the user's, as far as index can know
    for path in (tmp_path / "s" / "tokenizer").iterdir():
        path.unlink()
    (tmp_path / "s" / "tokenizer").rmdir()
    capsys.readouterr()
    assert main(["data", "index", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert "train         6 images  18 captions" in said
    assert "images: 32 × 32 pixels" in said
    assert said.count("\n") < 15


def test_large_splits_are_sampled(table: Path, tmp_path: Path) -> None:
    assert main(["data", "pack", str(table), "--out", str(tmp_path / "data")]) == 0
    assert num_pairs(tmp_path / "data" / "train") == (8, 18)
    found = summarise_split(tmp_path / "data" / "train", max_samples=4, max_images=2)
    assert (found.num_samples, found.num_read, len(found.image_sizes)) == (8, 4, 2)
    assert found.num_captions == 2 * len(found.captions)
    assert not found.is_whole


@pytest.mark.parametrize("text", ["a dog", "!!! wow !!!", "a dog!", ""])
def test_lengths_are_those_of_the_tokens(text: str) -> None:
    """Also where a text ends in the byte pair whose id is the padding's."""
    pairs = BytePairTokenizer()
    ids = pairs([text], 77)[0].tolist()
    assert caption_lengths(pairs, [text]).tolist() == [ids.index(49407) + 1]
    words = FileTokenizer(word_tokenizer_files(["a dog wow !"]))
    encoded = words._fast.encode(text)
    assert caption_lengths(words, [text]).tolist() == [len(encoded.ids)]
