"""Tokenizers that travel as files: the ids of transformers (through open_clip) for the files that are written, and what is refused."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, processors

from mmlg_scale import towers
from mmlg_scale.towers import tokenizer as tokenizer_module
from mmlg_scale.towers.tokenizer import clean
from tests.towers.models import CAPTIONS, assert_one_line, small_bpe, word_tokenizer

WORDS = word_tokenizer("two small red squares above a circle dog cat runs sleeps word")


def word_pieces() -> dict[str, str]:
    """As BERT has them: other names of special tokens, an own normaliser, and a truncation left in the file."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "two", "small", "red", "##s", "square", "a", "dog", "wo", "##rd", "&", "[SEP]"]
    fast = FastTokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 14), ("[CLS]", 2))
    fast.enable_truncation(5, direction="left")
    fast.enable_padding(length=9, pad_token="[PAD]", direction="left")
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": {"content": "[MASK]", "lstrip": True}}
    return {"tokenizer.json": fast.to_str(), "special_tokens_map.json": json.dumps(names)}


def no_configuration() -> dict[str, str]:
    return {"tokenizer.json": WORDS["tokenizer.json"]}


def unigrams() -> dict[str, str]:
    pieces = [
        ("<pad>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁a", -2.5),
        ("▁dog", -3.0),
        ("wor", -4.0),
        ("d", -4.5),
        ("▁two", -3.5),
        ("</s>", 0.0),
    ]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=1))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.add_special_tokens(["<pad>", "<unk>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 8)])
    return {"tokenizer.json": fast.to_str(), "tokenizer_config.json": json.dumps({"eos_token": "</s>", "model_max_length": 10**30})}


KINDS = {
    "words": WORDS,
    "byte pairs": small_bpe(),
    "left": small_bpe(padding_side="left", truncation_side="left"),
    "more options": small_bpe(
        bos_token={"content": "<start_of_text>", "normalized": True},
        added_tokens_decoder={"0": {"content": "[PAD]", "special": True}},
        additional_special_tokens=["<start_of_text>"],
        clean_up_tokenization_spaces=True,
        add_prefix_space=True,
        add_bos_token=True,
        chat_template="{{ 1 }}",
        tokenizer_class="CLIPTokenizerFast",
    ),
    "word pieces": word_pieces(),
    "no configuration": no_configuration(),
    "unigrams": unigrams(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_open_clips(kind: str, tmp_path: Path) -> None:
    """For the files that an export writes, at every length from the shortest to one without truncation."""
    own = towers.FileTokenizer(KINDS[kind])
    for name, text in own.files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"hf_tokenizer_name": "tokenizer"}}}))
    theirs = towers.open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    texts = [*CAPTIONS, "a [MASK] dog", "two small red squares", "[CLS]dog</s> <pad>word"]
    for length in (3, 4, 8, 77, 1400):
        wanted = theirs(texts, length)
        found = own(texts, length)
        assert torch.equal(found, wanted)
        free = theirs.tokenizer([clean(text) for text in texts], padding=False, truncation=False)["input_ids"]
        assert own.num_truncated(texts, length) == sum(len(ids) > length for ids in free)
    assert own(texts, 77).max() < own.vocab_size
    assert own.vocab_size == len(theirs.tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_travels_is_the_same_tokenizer(kind: str) -> None:
    own = towers.FileTokenizer(KINDS[kind])
    again = towers.tokenizer_from_files(own.files)
    assert again.files == own.files
    assert towers.same_tokenizer(own, again)
    assert set(own.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_identity_is_that_of_the_ids() -> None:
    """White space in a file, or a length that no id depends on, make no other tokenizer; sides and padding do."""
    own = towers.FileTokenizer(WORDS)
    spaced = {**WORDS, "tokenizer.json": json.dumps(json.loads(WORDS["tokenizer.json"]), indent=7)}
    config = json.loads(WORDS["tokenizer_config.json"])
    longer = {**WORDS, "tokenizer_config.json": json.dumps({**config, "model_max_length": 99})}
    for same in (spaced, longer):
        assert towers.same_tokenizer(own, towers.FileTokenizer(same))
    for entry in ({"padding_side": "left"}, {"truncation_side": "left"}, {"pad_token": "<unk>"}):
        other = towers.FileTokenizer({**WORDS, "tokenizer_config.json": json.dumps(config | entry)})
        assert not towers.same_tokenizer(own, other)
    assert not towers.same_tokenizer(own, towers.BytePairTokenizer())


def test_open_clips_own_byte_pairs() -> None:
    theirs, own = towers.open_clip.get_tokenizer("ViT-B-32"), towers.BytePairTokenizer()
    texts = CAPTIONS[:-1]
    for length in (3, 8, 77):
        assert torch.equal(own(texts, length), theirs(texts, length))
        assert own.num_truncated(texts, length) == sum(len(theirs.encode(text)) + 2 > length for text in texts)
    assert own.num_truncated(["word " * 75, "word " * 76], 77) == 1


EMOJI = ("🐕", "👩🏽‍🚀", "🇩🇪", "❤️", "🫠", "©", "™")
ENTITIES = ("&amp;", "&lt;b&gt;", "&amp;lt;", "&eacute;", "&#128021;", "&#x27;", "&nbsp;", "&", "&bogus;")
CONTROLS = ("\x00", "\x07", "\x1b[31m", "\u200b", "\u202e", "\ufeff", "\t", "\r\n", "\x85", "\u2028", "\ud83d")
WORDS_OF_ALL_KINDS = (
    "don't",
    "we'LL",
    "'S",
    "it'ſ",
    "ﬁne",
    "straße",
    "İstanbul",
    "naïve",
    "â€œquotedâ€\x9d",
    "x²",
    "½",
    "<end_of_text>",
    "</w>",
)
OTHER_SCRIPTS = ("日本語", "<end_of_text>", "</w>", "ελλάδα", "한국어", "١٢", "<START_OF_TEXT>")


def generated_captions(count: int, seed: int) -> list[str]:
    """Captions as the web has them: words of the vocabulary and made-up ones, numbers, emoji, entities, control characters, other scripts,
    broken encodings, special tokens, and now and then 300 words.
    """
    draws = random.Random(seed)
    known = [token.removesuffix("</w>") for token in towers.BytePairTokenizer().vocabulary if token.isascii() and token[:-4].isalpha()]
    letters = "etaoinshrdlucmfwypvbgkqjxzETAOIN"

    def word() -> str:
        kind = draws.random()
        if kind < 0.6:
            return draws.choice(known)
        if kind < 0.75:
            return "".join(draws.choice(letters) for _ in range(draws.randint(1, 14)))
        if kind < 0.8:
            ranges = [draws.choice(((33, 126), (160, 0x24F), (0x3041, 0x9FFF))) for _ in range(4)]
            return "".join(chr(draws.randint(*ends)) for ends in ranges)
        numbers = (str(draws.randint(0, 99_999)), "3.14", "#1", "--", "...", "!!!1")
        return draws.choice(draws.choice((EMOJI, ENTITIES, CONTROLS, WORDS_OF_ALL_KINDS, OTHER_SCRIPTS, numbers)))

    def caption() -> str:
        length = 300 if draws.random() < 0.01 else draws.randint(0, 25)
        return "".join(word() + draws.choice((" ", " ", " ", "  ", ",", "", "\n")) for _ in range(length))

    return [caption() for _ in range(count)]


def assert_open_clips(texts: list[str]) -> None:
    theirs, own = towers.open_clip.get_tokenizer("ViT-B-32"), towers.BytePairTokenizer()
    wanted = theirs(texts, 77)
    found = own(texts, 77)
    for row, text in enumerate(texts):
        assert torch.equal(found[row], wanted[row]), text
    assert own.num_truncated(texts, 77) == sum(len(theirs.encode(text)) + 2 > 77 for text in texts) > 0


def test_generated_captions_have_open_clips_ids() -> None:
    assert_open_clips([*generated_captions(400, seed=1), "word " * 300, "é" * 3000])


@pytest.mark.slow
def test_ten_thousand_generated_captions_have_open_clips_ids() -> None:
    assert_open_clips(generated_captions(10_000, seed=2))


def test_pieces_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """More words than are remembered, and words too long to be: the ids stay the same."""
    texts = generated_captions(60, seed=3)
    whole = towers.BytePairTokenizer()(texts, 77)
    monkeypatch.setattr(tokenizer_module, "_REMEMBERED_WORDS", 20)
    own = towers.BytePairTokenizer()
    for _ in range(2):
        assert torch.equal(own([*texts, "y" * 1000], 77)[:-1], whole)
        assert len(own._known) <= 20
        assert max(map(len, own._known)) <= tokenizer_module._LONGEST_REMEMBERED


def test_a_tokenizer_travels_to_a_worker_without_its_tables() -> None:
    own = towers.BytePairTokenizer()
    texts = CAPTIONS[:-1]
    expected = own(texts, 77)
    sent = pickle.dumps(own)
    assert len(sent) < 200
    assert torch.equal(pickle.loads(sent)(texts, 77), expected)


def test_texts_are_cleaned_as_open_clip_cleans_them() -> None:
    theirs = towers.open_clip.tokenizer.get_clean_fn("whitespace")
    for text in [*CAPTIONS, "&lt;b&gt; &amp;amp;", "tab\tand\x00null", "ﬁne ①", "line\r\nend", "\x1b[31mred", "plain"]:
        assert clean(text) == theirs(text)


def test_too_short_a_context_is_one_line() -> None:
    assert_one_line(lambda: towers.FileTokenizer(WORDS)(["a dog"], 2), "a context of 2 tokens", "no room beside the tokenizer's 2 own")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"auto_map": {"AutoTokenizer": ["a.b", None]}}, "has auto_map"),
    ({"trust_remote_code": True}, "has trust_remote_code"),
    ({"split_special_tokens": True}, "has split_special_tokens"),
    ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class BertTokenizer is not supported"),
    ({"tokenizer_class": {}}, "tokenizer_class {} is not supported"),
    ({"pad_token": "<gone>"}, "pad_token '<gone>' is not in tokenizer.json"),
    ({"eos_token": 3}, "eos_token '3' is not in tokenizer.json"),
    ({"padding_side": "both"}, "padding_side 'both'"),
    ({"additional_special_tokens": ["<new>"]}, "additional_special_tokens '<new>' is not in tokenizer.json"),
    ({"additional_special_tokens": ["dog"]}, "'dog', which tokenizer.json does not list as an added token"),
    ({"added_tokens_decoder": {"99": {"content": "[PAD]"}}}, "added token '[PAD]' has another id than 99"),
    ({"added_tokens_decoder": [1]}, "added token 'None' is not in tokenizer.json"),
]


@pytest.mark.parametrize(("entries", "said"), REFUSED, ids=[row[1] for row in REFUSED])
def test_configurations_that_are_refused(entries: dict[str, Any], said: str) -> None:
    config = json.loads(WORDS["tokenizer_config.json"]) | entries
    files = {**WORDS, "tokenizer_config.json": json.dumps(config)}
    assert_one_line(lambda: towers.tokenizer_from_files(files, "some/folder"), "some/folder", said)


def test_files_that_are_refused() -> None:
    content = json.loads(WORDS["tokenizer.json"])
    bpe = json.loads(small_bpe()["tokenizer.json"])
    bpe["model"]["dropout"] = 0.1
    no_pad = FastTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str()
    for files, said in (
        ({**WORDS, "../escape": ""}, "'../escape' is not a tokenizer file"),
        ({**WORDS, "sub/vocab.json": ""}, "'sub/vocab.json' is not a tokenizer file"),
        ({**WORDS, "modeling.py": ""}, "'modeling.py' is not a tokenizer file"),
        ({**WORDS, "tokenizer_config.json": "[]"}, "tokenizer_config.json is a JSON list"),
        ({**WORDS, "tokenizer_config.json": "{"}, "tokenizer_config.json is damaged: it is not JSON"),
        ({**WORDS, "added_tokens.json": '{"<new>": 40}'}, "'<new>' is not in tokenizer.json"),
        ({"tokenizer_config.json": "{}"}, "no tokenizer.json"),
        ({"tokenizer.json": "[" * 100_000}, "nested too deeply"),
        ({"tokenizer.json": json.dumps(content | {"model": {"type": "Magic"}})}, "tokenizer.json is damaged"),
        ({"tokenizer.json": json.dumps(content | {"post_processor": {"type": "TemplateProcessing"}})}, "tokenizer.json is damaged"),
        ({"tokenizer.json": json.dumps(bpe)}, "model.dropout is 0.1"),
        ({"tokenizer.json": no_pad}, "names no padding token"),
        ({"tokenizer.json": "x" * (50 * 2**20 + 1)}, "has 52428801 characters"),
    ):
        assert_one_line(lambda files=files: towers.tokenizer_from_files(files, "place"), "place", said)
