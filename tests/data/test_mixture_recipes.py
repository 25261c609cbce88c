"""Recipes of mixtures: what is refused, what the identity of a run has, and what evaluation reads."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmlg_scale import records
from mmlg_scale.data.corpus import Corpus, pairs_of
from mmlg_scale.errors import UserError
from mmlg_scale.family import Plan, _check_batches, check
from mmlg_scale.recipe import Data, Recipe, Training
from mmlg_scale.recipe_file import load_recipe, to_content
from mmlg_scale.sources import Source
from tests.data.sets import SIZES, about, batches, keys, mixture_of, write_set
from tests.data.specs import spec_for

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
RULE = {"synthetic": 0.75, "alt": 0.25}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Data(path="a", sources=[Source("b")]), "data.sources: is given, and data.path is a. Give one of them"),
        (Data(sources=[]), "data.sources: is an empty list. List data sets"),
        (Data(sources=[Source("a"), Source()]), r"data.sources\[1\].path: is missing"),
        (Data(sources=[Source("a", math.inf)]), r"data.sources\[0\].weight: is inf"),
        (Data(sources=[Source("a", math.nan)]), r"data.sources\[0\].weight: is nan"),
        (Data(sources=[Source("a", -1.0)]), r"data.sources\[0\].weight: is -1.0"),
        (Data(sources=[Source(str(index)) for index in range(1000)]), "data.sources: has 1,000 data sets. At most 256 are supported"),
        (Data(sources=[Source("a")], captions={"b": 1.0}), "data.captions: is given beside data.sources. Give captions with each source"),
        (Data(path="a", captions={}), "data.captions: has 0 names; 1 to 64 are supported"),
        (Data(path="a", captions={"a": 1.0, "b": math.inf}), "data.captions: the weight of 'b' is inf"),
        (Data(path="a", captions={"a": 1.0, "b": 1e-9}), "data.captions: 'b' would be drawn less than once in 1,000,000 times"),
        (Data(sources=[Source("a", captions={"b": 0.0})]), r"data.sources\[0\].captions: the weight of 'b' is 0"),
        (Data(evaluate_on="a"), "data.evaluate_on: is given, data.path is null"),
    ],
)
def test_fields_that_do_not_go_together(data: Data, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        Recipe(data=data).check()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ("[{path: a, weight: 0}]", "weight"),
        ("[{path: a, weight: -1}]", "weight"),
        ("[{path: a, weight: .nan}]", "weight"),
        ("[{path: a, weight: [1]}]", "weight"),
        ("[{path: a, wieght: 1}]", r"data.sources\[0\].wieght. Nearest valid key: data.sources\[0\].weight"),
        ("[a, b]", "Give a mapping of keys"),
        ("{path: a}", "sources"),
        ("[{path: a, captions: {alt: 0}}]", "captions"),
        ("[{path: a, captions: [alt]}]", "captions"),
    ],
)
def test_recipes_with_invalid_sources_are_refused_in_one_line(sources: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data:\n  sources: {sources}\n")
    with pytest.raises(UserError, match=said) as raised:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert "\n" not in str(raised.value)


def test_a_set_is_named_once_whatever_it_is_called(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root / "small")
    for other in (root / "small", root / "large" / ".." / "small", tmp_path / "link", f"file://{root / 'small'}"):
        data = Data(sources=[Source(str(root / "small")), Source(str(root / "large")), Source(str(other))])
        with pytest.raises(
            UserError, match=r"data.sources\[2\].path: .* is that of data.sources\[0\] too. Give it once, with a larger weight"
        ):
            pairs_of(data)
    data = Data(sources=[Source(str(root / "small")), Source(str(tmp_path / "nothing"))])
    with pytest.raises(UserError, match=rf"recipe key data.sources\[1\].path: {tmp_path / 'nothing'} contains no data set"):
        pairs_of(data)
    copy = Path(shutil.copytree(root / "small", tmp_path / "copy" / "small"))
    assert [part.name for part in pairs_of(Data(sources=[Source(str(root / "small")), Source(str(copy))])).parts] == ["0-small", "1-small"]


def test_a_source_without_a_training_split_is_refused(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root / "small", tmp_path / "small"))
    manifest = json.loads((copy / "train" / "manifest.json").read_text())
    shutil.rmtree(copy / "train")
    data = Data(sources=[Source(str(root / "large")), Source(str(copy))])
    with pytest.raises(UserError, match=f"no data in {copy / 'train'}: the folder is missing"):
        batches(data, root, 1)
    (copy / "train").mkdir()
    manifest = {key: value for key, value in manifest.items() if key != records.KEY}
    records.write_record(copy / "train" / "manifest.json", {**manifest, "num_samples": 0, "shards": []})
    with pytest.raises(UserError, match=f"{copy / 'train' / 'manifest.json'} is empty"):
        batches(data, root, 1)


def test_sources_need_one_tokenizer(root: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "words", 8, tokenizer="words")
    write_set(tmp_path / "others", 9, tokenizer="words")
    write_set(tmp_path / "pairs", 8, tokenizer="bpe")
    for first, second in (("small", "words"), ("words", "small"), ("words", "others"), ("pairs", "words")):
        paths = [str((root if name == "small" else tmp_path) / name) for name in (first, second)]
        data = Data(sources=[Source(path) for path in paths])
        with pytest.raises(
            UserError, match=f"data.sources need one tokenizer: {paths[0]} was packed for .*, {paths[1]} for .* Set data.tok"
        ):
            pairs_of(data)
        data.tokenizer = "model"
        assert len(pairs_of(data).parts) == 2
    data = Data(sources=[Source(str(root / "small")), Source(str(tmp_path / "pairs"))])
    assert len(pairs_of(data).parts) == 2  # byte pairs, whether they are offered or not


def test_the_identity_of_a_run_has_sets_weights_and_captions(root: Path, tmp_path: Path) -> None:
    def identity(data: Data, role: str = "ancestor") -> str:
        return json.dumps([Recipe(data=data).used_by(role), pairs_of(data).digest()], sort_keys=True)

    plain, data = Data(path=str(root / "small")), mixture_of(root)
    assert Recipe(data=plain).used_by("ancestor")["data"] == {"augment": "none", "check": "auto"}  # as before there were mixtures
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    assert identity(mixture_of(moved)) == identity(data)
    seen = {identity(data), identity(plain), identity(Data(path=str(root / "small"), captions=RULE))}
    for change in ("weight", "captions", "order", "less", "evaluate_on", "content"):
        other = mixture_of(moved)
        assert other.sources is not None
        if change == "weight":
            other.sources[1].weight = 0.31
        elif change == "captions":
            other.sources[1].captions = {"alt": 1.0}
        elif change == "order":
            other.sources.reverse()
        elif change == "less":
            del other.sources[1]
        elif change == "evaluate_on":
            other.evaluate_on = str(root / "large")
        else:
            shutil.rmtree(moved / "large")
            write_set(moved / "large", 149, about=about)
        seen.add(identity(other))
    assert len(seen) == 3 + 6
    # Features are of all captions that may be read, however often they are; and so is what they are kept under.
    rules: list[dict[str, float] | None] = [None, {"alt": 1.0, "synthetic": 1.0}, {"synthetic": 5.0, "alt": 1.0}, {"alt": 1.0}]
    features = [json.dumps(Recipe(data=Data(path="a", captions=rule)).used_by("features")) for rule in rules]
    assert features[1] == features[2]
    assert len(set(features)) == 3
    assert features[0] == json.dumps({"engine": {"precision": "fp32"}})


def test_evaluation_reads_the_first_source_or_the_set_that_is_named(root: Path) -> None:
    spec = spec_for(root / "small")
    for data, name in ((mixture_of(root), "small"), (mixture_of(root, evaluate_on=str(root / "large")), "large")):
        split = Corpus(pairs_of(data), spec).eval_split("val")
        assert list(split.captions) == [f"{name} number {index}" for index in range(4)]
        assert [source.name for source in pairs_of(data).training()] == list(SIZES)
    alone = pairs_of(Data(path=str(root / "small"), evaluate_on=str(root / "large")))
    assert alone.root == root / "large"
    assert [source.folder for source in alone.training()] == [root / "small" / "train"]


def test_the_documents_example_is_a_recipe(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for block in DOCS.read_text(encoding="utf-8").split("```yaml\n")[1:] if "sources:" in block]
    (tmp_path / "recipe.yaml").write_text(example.partition("```")[0])
    settings, _ = load_recipe(str(tmp_path / "recipe.yaml"))
    assert settings.data.sources is not None
    for source in settings.data.sources:
        shutil.copytree(root / "middle", tmp_path / source.path)
    monkeypatch.chdir(tmp_path)
    found = batches(settings.data, root, 5)
    assert len({name.partition("-")[0] for batch in keys(settings.data, found) for name in batch}) == 1
    assert len(settings.data.sources) >= 2


def test_steps_of_a_family_read_the_mixture_of_its_recipe(root: Path, tmp_path: Path) -> None:
    settings, runtime = load_recipe("demo")
    settings.data = mixture_of(root)
    members = Plan(settings, runtime, tmp_path, image_size=32).members
    assert "data" not in [member.step.id for member in members]  # nothing is generated
    assert all("--data.path" not in member.step.argv for member in members)
    assert all(member.role.settings.data.sources == settings.data.sources for member in members if member.role is not None)
    assert settings.data.sources is not None
    settings.data.sources[1].captions = {"alt": 1.0, "txt": 0.5}
    for _ in range(2):  # what was read can be written again
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_content(settings, runtime)))
        again, runtime = load_recipe(str(tmp_path / "recipe.yaml"))
        assert again.data == settings.data
        settings = again


def test_a_family_needs_enough_pairs_of_each_source_before_anything_is_trained(root: Path, tmp_path: Path) -> None:
    """Of 20 pairs a batch at most 5 are the small source's 21; of a pool of 120, 24."""
    settings, runtime = load_recipe("demo")
    settings.data = mixture_of(root)
    for training in (settings.ancestor, settings.baselines.scratch, settings.pretraining and settings.pretraining.training):
        assert training is not None
        training.batch_size = 20
    for training in (settings.baselines.distil, settings.baselines.even):
        assert training is not None
        training.batch_size = 8
    for loss, _ in settings.comparisons().values():
        loss.teacher_pool = None
    check(settings, runtime, tmp_path)
    settings.extraction.loss.teacher_pool = 120
    with pytest.raises(UserError, match=r"recipe key extraction\.loss: .*small/train has 21 samples, a teacher_pool of 120 takes 24"):
        check(settings, runtime, tmp_path)
    settings.extraction.loss.teacher_pool = None
    assert settings.baselines.scratch is not None
    settings.baselines.scratch.batch_size = 128
    with pytest.raises(UserError, match=r"recipe key baselines\.scratch: .*small/train has 21 samples, batch_size is 128, 27 of them"):
        check(settings, runtime, tmp_path)


def test_what_is_not_trained_needs_no_pairs() -> None:
    """An ancestor that is given, an adaptation of no steps, and one of a learngene that is left out: their batches of 128 do not count."""
    settings, runtime = load_recipe("demo", **{"pretraining": "null", "data.scenes.num_train": "20"})
    settings.baselines = replace(settings.baselines, scratch=None, even=None, distil=None, tleg=None)
    settings.extraction.loss.teacher_pool = None
    settings.adaptation.training.steps, settings.adaptation.training.batch_size = 0, 128
    settings.adaptation.direct = Training(steps=5)
    with pytest.raises(UserError, match="recipe key ancestor: the data set has 20 samples, batch_size is 128"):
        _check_batches(settings, runtime, None)
    settings.model.weights = "weights.safetensors"
    _check_batches(settings, runtime, None)
