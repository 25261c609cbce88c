"""Tokenizers of data sets: vocabularies, what --tokenizer means, what is cut."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from mmlg_scale import towers
from mmlg_scale.data.evaluation import load_eval_split
from mmlg_scale.data.indexing import index_dataset
from mmlg_scale.data.pack import PackSettings, pack_table
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.tokens import MAX_IDS, WORDS_LIMIT, offered_tokenizer, read_offer, truncated, word_tokenizer_files
from mmlg_scale.errors import UserError
from tests.data.specs import spec_for
from tests.data.test_check_and_index import img2dataset, write_tar
from tests.data.test_sets import write_images


def vocabulary(files: dict[str, str]) -> dict[str, int]:
    return json.loads(files["tokenizer.json"])["model"]["vocab"]


def test_vocabulary_is_made_of_cleaned_words(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = towers.FileTokenizer(word_tokenizer_files(["Don\u2019t &lt;go&gt;"]))
    # [PAD] <unk> <start> ' < > don go t <end>
    assert tokenizer(["don't go <3"], 8).tolist() == [[2, 6, 3, 8, 7, 4, 1, 9]]
    assert capsys.readouterr().out == ""


def test_rare_words_are_left_out_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["b c d"] * 3 + ["e e e e"] + ["g a"] + ["f g"] * 2
    whole = vocabulary(word_tokenizer_files(captions))
    assert sorted(whole, key=lambda word: whole[word]) == ["[PAD]", "<unk>", "<start_of_text>", *"abcdefg", "<end_of_text>"]
    assert word_tokenizer_files(captions) == word_tokenizer_files(captions, limit=7)
    assert capsys.readouterr().out == ""
    # Counts: e 4; b, c, d, g 3; f 2; a 1. Of those with equally many the first in the alphabet stay.
    part = vocabulary(word_tokenizer_files(captions, limit=4))
    assert sorted(part, key=lambda word: part[word]) == ["[PAD]", "<unk>", "<start_of_text>", *"bcde", "<end_of_text>"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "of 7 distinct words the 4 most frequent are kept; the other 3, 31.58% of all words" in said  # 6 of 19
    tokenizer = towers.FileTokenizer(word_tokenizer_files(captions, limit=4))
    assert tokenizer(["b f e"], 5).tolist() == [[2, 3, 1, 6, 7]]


def test_a_word_vocabulary_is_no_larger_than_clips() -> None:
    assert MAX_IDS == towers.BytePairTokenizer().vocab_size == 49_408
    files = word_tokenizer_files(f"w{number} w{number % 9}" for number in range(WORDS_LIMIT + 50))
    found = vocabulary(files)
    assert len(found) == MAX_IDS
    assert sorted(found.values()) == list(range(MAX_IDS))
    assert max(found, key=lambda word: found[word]) == "<end_of_text>"


def test_open_clip_gives_the_same_tokens(scenes: Path, tmp_path: Path) -> None:
    spec = spec_for(scenes, context_length=9)
    state = towers.build_clip(spec.config, seed=0).state_dict()
    towers.export(towers.Bundle(spec, state), tmp_path / "model")
    theirs = towers.open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    texts = [
        "a big red circle",
        "A  Small blue RING, left of a zebra!",
        "the large red cross is to the left of the big green ring",
        "",
        "red &amp; blue",  # open_clip decodes entities and repairs broken encodings first
        "caf\u00c3\u00a9 a\u00a0big\u200b \u201cred\u201d circle",
        "a <end_of_text> red [PAD] circle <unk>",
        "the circle is red\x1b[36m",
    ]
    tokenizer = spec.tokenizer
    ours = tokenizer(texts, 9)
    assert torch.equal(ours, theirs(texts))
    assert (ours.max(dim=1).values == tokenizer.vocab_size - 1).all()  # the end token survives truncation
    assert ours[0].tolist()[-3:] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["words", "byte pairs"])
def test_texts_that_are_cut_are_those_with_more_tokens(kind: str) -> None:
    texts = [" ".join(["red"] * count) for count in (0, 1, 5, 6, 7, 8, 20, 2)]
    tokenizer = towers.FileTokenizer(word_tokenizer_files(texts)) if kind == "words" else towers.BytePairTokenizer()
    for order in (texts, texts[:4], texts[4:7], texts[:1]):  # some, none, all; with start and end token six words fit
        assert truncated(tokenizer, order, tokenizer(order, 8)) == [row for row, text in enumerate(order) if len(text.split()) > 6]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_images(tmp_path / "in", 20)
    rows = "".join(f"{number}.png,{' '.join(['thing'] * (1 + number))}\n" for number in range(20))
    path = tmp_path / "in" / "t.csv"
    path.write_text("filepath,caption\n" + rows)
    return path


def test_cut_captions_are_counted_by_epoch_and_said(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Caption n of the table has n + 1 words; with a context of 8 six of them fit."""
    pack_table(table, tmp_path / "out", PackSettings(tokenizer="words", val=0.2, test=0.2))
    spec = spec_for(tmp_path / "out", context_length=8)
    reader = ShardReader(tmp_path / "out" / "train")
    long = {index for index in range(12) if len(reader.about(index)["captions"][0].split()) > 6}
    assert 0 < len(long) < 12
    wanted = [(epoch, 12, len(long)) for epoch in range(3)]
    for num_workers in (0, 2):
        reports: list = []
        settings = StreamSettings(global_batch_size=6, seed=0, num_workers=num_workers)
        list(islice(TrainStream(tmp_path / "out" / "train", spec, settings, on_epoch=reports.append), 6))
        assert [(report.epoch, report.num_captions, report.num_truncated) for report in reports] == wanted
    halves = []
    for rank in range(2):
        reports = []
        settings = StreamSettings(global_batch_size=4, seed=0, rank=rank, world_size=2)  # three batches an epoch, half of each here
        batches = list(islice(TrainStream(tmp_path / "out" / "train", spec, settings, on_epoch=reports.append), 9))
        for epoch, report in enumerate(reports):
            own = torch.cat([batch.indices_B for batch in batches[3 * epoch : 3 * epoch + 3]]).tolist()
            assert (report.num_captions, report.num_truncated) == (6, len(long & set(own)))
        halves.append([report.num_truncated for report in reports])
    assert [left + right for left, right in zip(*halves, strict=True)] == [len(long)] * 3
    capsys.readouterr()
    list(islice(TrainStream(tmp_path / "out" / "train", spec, StreamSettings(global_batch_size=6, seed=0)), 4))
    line = f"{len(long)} of 12 captions are cut to the context length of 8 tokens"
    assert capsys.readouterr().out.splitlines() == [f"epoch 0: {line}", f"epoch 1: {line}"]
    wide = spec_for(tmp_path / "out", context_length=22)
    list(islice(TrainStream(tmp_path / "out" / "train", wide, StreamSettings(global_batch_size=6, seed=0)), 4))
    assert load_eval_split(tmp_path / "out" / "val", wide).num_truncated == 0
    assert capsys.readouterr().out == ""


def test_an_epoch_in_the_middle_of_a_batch_counts_its_own_captions(table: Path, tmp_path: Path) -> None:
    pack_table(table, tmp_path / "out", PackSettings(tokenizer="words", val=0.2, test=0.2))
    spec = spec_for(tmp_path / "out", context_length=8)
    reports: list = []
    settings = StreamSettings(global_batch_size=5, seed=0)
    list(islice(TrainStream(tmp_path / "out" / "train", spec, settings, on_epoch=reports.append), 12))  # 60 captions: five epochs
    assert [(report.epoch, report.num_captions) for report in reports] == [(epoch, 12) for epoch in range(5)]
    assert len({report.num_truncated for report in reports}) == 1


def test_an_evaluation_says_once_how_many_captions_are_cut(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_table(table, tmp_path / "out", PackSettings(val=0.2, test=0.2))
    spec = spec_for(tmp_path / "out", context_length=8)
    assert spec.tokenizer.identity == towers.BytePairTokenizer.identity
    capsys.readouterr()
    split = load_eval_split(tmp_path / "out" / "val", spec)
    long = sum(len(text.split()) > 6 for text in split.captions)
    assert split.num_truncated == long > 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'val'}: {long} of 4 captions are cut to the context length of 8 tokens\n"


def test_what_a_set_offers(table: Path, scenes: Path, tmp_path: Path) -> None:
    tokenizers = scenes / "tokenizer"
    foreign = offered_tokenizer(scenes)
    assert isinstance(foreign, towers.FileTokenizer)
    named, unnamed = spec_for(scenes), towers.ModelSpec(spec_for(scenes).config)
    state = towers.build_clip(named.config, seed=0).state_dict()
    for name, spec in (("named", named), ("unnamed", unnamed)):
        towers.export(towers.Bundle(spec, state), tmp_path / name)
    words = towers.FileTokenizer(word_tokenizer_files(["thing"])).identity
    for choice, identity, recorded in (
        ("none", None, "none"),
        ("words", words, "words"),
        ("bpe", towers.BytePairTokenizer.identity, "bpe"),
        (str(tmp_path / "named"), foreign.identity, foreign.identity),
        (str(tmp_path / "unnamed"), towers.BytePairTokenizer.identity, "bpe"),
        (str(tokenizers), foreign.identity, foreign.identity),
        (str(tokenizers / "tokenizer.json"), foreign.identity, foreign.identity),
    ):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        pack_table(table, out, PackSettings(tokenizer=choice))
        found = offered_tokenizer(out)
        assert (found and found.identity) == identity, choice
        assert json.loads((out / "dataset.json").read_text())["args"]["tokenizer"] == recorded


def test_what_is_no_tokenizer(table: Path, tmp_path: Path) -> None:
    empty, damaged, model = tmp_path / "empty", tmp_path / "damaged", tmp_path / "model"
    for folder in (empty, damaged, model):
        folder.mkdir()
    (damaged / "tokenizer.json").write_text("{")
    (model / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {"hf_tokenizer_name": "tokenizer"}}}')
    for choice, said in (
        ("word", "--tokenizer word is unknown: no such path. Use none, words, bpe"),
        (str(empty), "has no tokenizer.json and no open_clip model"),
        (str(table), "t.csv is not a tokenizer.json"),
        (str(damaged), "has no readable tokenizer"),
        (str(model), "has no tokenizer.json"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            pack_table(table, tmp_path / "out", PackSettings(tokenizer=choice))
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()
    (model / "open_clip_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"open_clip_config.json is a JSON list, not an object"):
        read_offer(str(model))


def test_sets_of_earlier_versions_offer_what_they_did(scenes: Path, tmp_path: Path) -> None:
    own = offered_tokenizer(scenes)
    assert own is not None
    assert own.files == {path.name: path.read_text() for path in (scenes / "tokenizer").iterdir()}
    (tmp_path / "dataset.json").write_text('{"format_version": 1, "kind": "packed", "args": {"tokenizer": "bpe"}}')
    assert isinstance(offered_tokenizer(tmp_path), towers.BytePairTokenizer)
    (tmp_path / "dataset.json").write_text('{"format_version": 1, "kind": "scenes", "args": {}}')
    assert offered_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match=r"tokenizer has no readable tokenizer: .*no tokenizer.json.* Pack the data set again"):
        offered_tokenizer(tmp_path)


def test_indexing_renews_its_own_tokenizer_and_leaves_others(tmp_path: Path) -> None:
    for shard in range(4):
        write_tar(tmp_path / "set" / f"{shard}.tar", img2dataset(10 * shard, 10))
    root = tmp_path / "set"
    index_dataset(root)
    assert offered_tokenizer(root) is None
    index_dataset(root, tokenizer="words")
    first = offered_tokenizer(root)
    assert first is not None
    assert first.vocab_size == 4 + 1 + 20  # "caption" and twenty numbers
    index_dataset(root, tokenizer="words", test_shards=2)
    second = offered_tokenizer(root)
    assert second is not None
    assert second.vocab_size == 4 + 1 + 10
    index_dataset(root, tokenizer="bpe")
    assert isinstance(offered_tokenizer(root), towers.BytePairTokenizer)
    assert not (root / "tokenizer").exists()
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "mine").write_text("mine")
    for choice in ("none", "bpe", "words"):
        with pytest.raises(UserError, match=r"tokenizer is not from mmlg data index. Move it away"):
            index_dataset(root, tokenizer=choice)
    assert (root / "tokenizer" / "mine").read_text() == "mine"
