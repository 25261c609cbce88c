"""Data sets without a model, and as one model reads them."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from mmlg_scale import towers
from mmlg_scale.data.corpus import Corpus, PairSet, choose_tokenizer, open_pairs
from mmlg_scale.data.pack import PackSettings, pack_folders
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.scenes import classnames, write_scenes
from mmlg_scale.data.tokens import word_tokenizer_files
from mmlg_scale.errors import UserError
from mmlg_scale.records import KEY
from tests.data.specs import spec_for
from tests.data.test_sets import write_images

WORDS = towers.FileTokenizer(word_tokenizer_files(["red blue"]))
OTHER = towers.FileTokenizer(word_tokenizer_files(["red rose"]))  # as many ids
BPE = towers.BytePairTokenizer()


def test_a_moved_set_has_the_same_digest_and_other_pairs_another(scenes: Path, tmp_path: Path) -> None:
    original = open_pairs(scenes)
    copy = Path(shutil.copytree(scenes, tmp_path / "copy"))
    assert open_pairs(str(copy)).digest() == original.digest()
    shutil.rmtree(copy / "tokenizer")  # belongs to models
    assert open_pairs(copy).digest() == original.digest()
    digests = {original.digest()}
    classes = json.loads((copy / "classes.json").read_text())
    del classes[KEY]
    for change in (
        lambda: (copy / "classes.json").write_text(json.dumps({**classes, "templates": ["{}"]})),
        (copy / "classes.json").unlink,
        lambda: shutil.rmtree(copy / "test"),
        lambda: shutil.copy(copy / "val" / "manifest.json", copy / "train" / "manifest.json"),
    ):
        change()
        digests.add(open_pairs(copy).digest())
    write_scenes(tmp_path / "other", num_train=150, num_val=20, num_test=30, seed=4, samples_per_shard=40)
    digests.add(open_pairs(tmp_path / "other").digest())
    assert len(digests) == 6


def test_pairs_packed_with_another_vocabulary_have_the_same_digest(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / "in" / name, 10)
    found = {}
    for choice in ("none", "words", "bpe"):
        pack_folders(tmp_path / "in", tmp_path / choice, PackSettings(tokenizer=choice), templates=["a {}"])
        pairs = open_pairs(tmp_path / choice)
        found[choice] = pairs.tokenizer and pairs.tokenizer.identity
        assert pairs.digest() == open_pairs(tmp_path / "none").digest()
        assert pairs.classes == {"classnames": ["cat", "dog"], "templates": ["a {}"]}
    assert found["none"] is None
    assert found["bpe"] == BPE.identity
    assert found["words"] == towers.FileTokenizer(word_tokenizer_files(["a cat", "a dog"])).identity


def test_what_is_no_data_set(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe key data.path is null"):
        open_pairs(None)
    with pytest.raises(UserError, match=f"recipe key data.path: {tmp_path} contains no data set"):
        open_pairs(tmp_path)
    copy = Path(shutil.copytree(scenes, tmp_path / "copy"))
    for content, said in (
        ("{", "classes.json is damaged"),
        ("[]", "is a JSON list, not an object"),
        ('{"classnames": [], "templates": ["{}"]}', r"classnames is \[\]"),
        ('{"classnames": ["a", 3], "templates": ["{}"]}', r"classnames is \['a', 3\]"),
        ('{"classnames": ["a"], "templates": "a {}"}', "templates is 'a {}'"),
        ('{"classnames": ["a"], "templates": ["a {}", "b"]}', "the template 'b' has no {} for the class name"),
    ):
        (copy / "classes.json").write_text(content)
        with pytest.raises(UserError, match=said) as raised:
            open_pairs(copy)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("offered", "model", "choice", "expected"),
    [
        (None, None, "auto", BPE),
        (WORDS, None, "auto", WORDS),
        (BPE, None, "auto", BPE),
        (WORDS, None, "model", BPE),
        (None, WORDS, "auto", WORDS),
        (None, BPE, "auto", BPE),
        (WORDS, WORDS, "auto", WORDS),
        (BPE, towers.BytePairTokenizer(), "auto", BPE),
        (WORDS, BPE, "model", BPE),
        (OTHER, WORDS, "model", WORDS),
        (WORDS, BPE, "auto", None),
        (BPE, WORDS, "auto", None),
        (OTHER, WORDS, "auto", None),  # as many ids, and not the same
    ],
)
def test_a_models_tokenizer_is_its_own(offered, model, choice, expected) -> None:
    pairs = PairSet(Path("pairs"), offered, None)
    if expected is not None:
        assert choose_tokenizer(pairs, model, choice, what="the ancestor").identity == expected.identity
        return
    with pytest.raises(UserError) as raised:
        choose_tokenizer(pairs, model, choice, what="the ancestor in DIR")
    message = str(raised.value)
    assert message.startswith(f"the ancestor in DIR has {towers.told(model)}, the data set pairs was packed with {towers.told(offered)}. ")
    assert "Set data.tokenizer to model to tokenise with the model's, or pack the pairs with --tokenizer none." in message


def test_a_corpus_reads_as_its_model_does(scenes: Path, tmp_path: Path) -> None:
    spec = spec_for(scenes, image_size=24, context_length=12, preprocess=towers.Preprocess(resize_mode="squash"))
    corpus = Corpus(open_pairs(scenes), spec)
    settings = StreamSettings(global_batch_size=10, seed=2, augment="crop")
    ours = list(islice(corpus.stream(settings, 3, record=tmp_path), 2))
    theirs = list(islice(TrainStream(scenes / "train", spec, settings, start_step=3), 2))
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.image_uint8_BCHW, right.image_uint8_BCHW)
        assert torch.equal(left.text_NT, right.text_NT)
        assert left.text_NT.shape == (10, 12)
    assert json.loads((tmp_path / "data-skipped.json").read_text())["shards"] == {}
    split = corpus.eval_split("val")
    assert split.images_uint8_NCHW().shape == (20, 3, 24, 24)
    assert torch.equal(corpus.tokenize(split.captions), split.texts_MT())
    assert corpus.classes is not None
    assert corpus.classes["classnames"] == classnames()
    samples = corpus.sweep()[0]
    assert samples.image_uint8_NCHW.shape == (150, 3, 24, 24)
    assert samples.text_MT.shape == (450, 12)
