"""Class numbers of shards made elsewhere, and the lists of classes beside them, as CLIP_benchmark writes its webdataset sets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mmlg_scale import towers
from mmlg_scale.cli.main import main
from mmlg_scale.data.check import check_dataset
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.evaluation import load_eval_split
from mmlg_scale.data.images import open_image
from mmlg_scale.data.indexing import LABEL_BESIDE, NAMES_BESIDE, ONLY_LABEL, index_dataset, index_shards_of, join_dataset
from mmlg_scale.data.reader import LABEL, DamagedSample, ShardReader
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.evaluate import evaluate_folder, folder_features, require_metric
from mmlg_scale.metric_names import METRICS, ZERO_SHOT
from tests.data.specs import spec_for

CLASSES = ["tabby cat", "golden retriever", "fire truck"]
TEMPLATES = ["a photo of a {c}.", "{c}, seen from {c}"]


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 33)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write_shard(path: Path, samples: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"s{number:07d}", "webp": picture(number), **sample})


def benchmark_set(root: Path, labels: list[object], *, splits: tuple[str, ...] = ("test",)) -> Path:
    """Shards of 4 samples; webdataset's writer turns a class number into text."""
    for split in splits:
        for shard in range(0, len(labels), 4):
            write_shard(root / split / f"{shard // 4}.tar", [{"cls": label} for label in labels[shard : shard + 4]])
        (root / split / "nshards.txt").write_text(f"{-(-len(labels) // 4)}\n")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


def tiny_model(folder: Path) -> Path:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    spec = towers.ModelSpec(towers.model_config(config))
    clip = towers.build_clip(spec.config, seed=3)
    towers.export(towers.Bundle(spec, clip.state_dict()), folder)
    return folder


def test_a_zero_shot_set_of_clip_benchmark_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `mmlg data index` and `mmlg eval`; the figures are those of open_clip's model on the same images, labels and texts."""
    labels = [2, 0, 1, 1, 0, 2, 2, 0, 1, 0]
    root = benchmark_set(tmp_path / "set", list(labels), splits=("train", "test"))
    assert main(["data", "index", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"left out: 10 {ONLY_LABEL}" in out
    assert "no train split" in out
    assert not (root / "train" / "manifest.json").exists()
    assert json.loads((root / "classes.json").read_text())["templates"] == ["a photo of a {}.", "{}, seen from {}"]
    model = tiny_model(tmp_path / "model")
    assert main(["eval", str(model), "--data", str(root)]) == 0
    found = json.loads(capsys.readouterr().out)

    clip, _, transform = towers.open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokenizer = towers.open_clip.get_tokenizer(f"local-dir:{model}")
    clip.eval()
    with torch.no_grad():
        images = torch.stack([transform(open_image(picture(number % 4))) for number in range(10)])
        their_ND = torch.nn.functional.normalize(clip.encode_image(images), dim=-1)
        classes = []
        for name in CLASSES:
            each = clip.encode_text(tokenizer([template.format(c=name) for template in TEMPLATES]))
            classes.append(torch.nn.functional.normalize(torch.nn.functional.normalize(each, dim=-1).mean(dim=0), dim=-1))
        best_N = (their_ND @ torch.stack(classes).T).argmax(dim=1)
    right = [int(best_N[number]) == label for number, label in enumerate(labels)]
    assert set(found) == set(ZERO_SHOT)  # there is nothing to retrieve
    assert found["acc1"] == pytest.approx(np.mean(right))
    assert found["acc5"] == 1
    per_class = [np.mean([hit for hit, label in zip(right, labels, strict=True) if label == number]) for number in range(3)]
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(per_class))

    parts = benchmark_set(tmp_path / "parts", list(labels))
    for part in (1, 2):
        index_shards_of(parts, (part, 2), val_shards=1, test_shards=1, processes=1, progress=lambda items: items)
    assert join_dataset(parts, val_shards=1, test_shards=1, tokenizer="none")[0] == {"test": 10}
    assert evaluate_folder(model, parts, "test") == found
    image_ND, text_MD, _ = folder_features(model, parts, "test")
    assert torch.allclose(torch.nn.functional.normalize(image_ND, dim=-1), their_ND, atol=1e-5)
    assert len(text_MD) == 0
    index_dataset(parts)  # again, over the classes.json that the first pass has written
    assert check_dataset(parts) == []


def test_labels_lie_beside_captions(tmp_path: Path) -> None:
    samples: list[dict[str, object]] = [
        {"txt": "a cat", "cls": 0},
        {"txt": "a dog", "cls": 1, "json": {"source": "web", "width": 3}},
        {"json": {"captions": ["a", "b"], "label": 2}, "cls": 1},
        {"json": {"width": 40}, "cls": 2},
        {"txt": "no label"},
    ]
    for split in ("train", "test"):
        write_shard(tmp_path / split / "0.tar", samples)
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    counts, problems = index_dataset(tmp_path)
    assert counts == {"train": 4, "test": 5}
    assert {cause: count for cause, count in problems.items() if count} == {LABEL_BESIDE: 2, NAMES_BESIDE: 2, ONLY_LABEL: 1}
    reader = ShardReader(tmp_path / "test")
    assert [reader.about(index) for index in range(5)] == [
        {"captions": ["a cat"], "label": 0},
        {"captions": ["a dog"], "label": 1},
        {"captions": ["a", "b"], "label": 2},
        {"captions": [], "label": 2},
        {"captions": ["no label"], "label": None},
    ]
    assert reader.about(3, ("alt",))["named"] == [[]]
    train = ShardReader(tmp_path / "train")
    assert [train.about(index)["captions"] for index in range(4)] == [["a cat"], ["a dog"], ["a", "b"], ["no label"]]
    with pytest.raises(UserError, match=r"nothing can be measured: 4 of 5 images have a caption, and there is no label for each"):
        evaluate_folder(tiny_model(tmp_path / "model"), tmp_path, "test")


def test_a_label_that_not_all_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "test" / "0.tar", [{"txt": "a cat", "cls": 0}, {"txt": "a dog"}, {"txt": "a truck", "cls": 2}])
    index_dataset(tmp_path)
    capsys.readouterr()
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    index_dataset(tmp_path)
    model = tiny_model(tmp_path / "model")
    assert set(evaluate_folder(model, tmp_path, "test")) == set(METRICS) - set(ZERO_SHOT)
    assert "zero-shot classification is left out, since 1 of 3 samples have no label" in capsys.readouterr().out

    both = tmp_path / "both"
    write_shard(both / "test" / "0.tar", [{"txt": "a cat", "cls": 0}, {"cls": 1}])
    (both / "classnames.txt").write_text("\n".join(CLASSES))
    index_dataset(both)
    assert set(evaluate_folder(model, both, "test")) == set(ZERO_SHOT)
    assert "retrieval is left out, since only 1 of 2 images have a caption" in capsys.readouterr().out
    split = Corpus(open_pairs(both), spec_for(both)).eval_split("test")
    require_metric("acc1", split, "x/test")
    with pytest.raises(UserError, match=r"mean_recall@1 cannot be measured on x/test: of 2 images, 1 have a caption"):
        require_metric("mean_recall@1", split, "x/test")
    split = Corpus(open_pairs(tmp_path), spec_for(tmp_path)).eval_split("test")
    require_metric("mean_recall@1", split, "x/test")
    with pytest.raises(UserError, match=r"acc1 cannot be measured on x/test: not every image has a label"):
        require_metric("acc1", split, "x/test")


@pytest.mark.parametrize("bad", [b"-1", b"cat", b"1.5", b"", b"\xff", b"9" * 40, b"1" * 2000, b"0x1", b"1 2"])
def test_bad_labels_are_damage(tmp_path: Path, bad: bytes) -> None:
    benchmark_set(tmp_path, [b"0", b" 2\n", bad, b"1"])
    index_dataset(tmp_path)
    reader = ShardReader(tmp_path / "test")
    assert [reader.about(index)["label"] for index in (0, 1, 3)] == [0, 2, 1]
    with pytest.raises(DamagedSample, match=r"s0000002: bad label .*no class number from 0.*Remedy: write the class") as raised:
        reader.about(2)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert [(damage.key, damage.cause) for damage in check_dataset(tmp_path)] == [("s0000002", LABEL)]
    spec = spec_for(tmp_path)
    split = load_eval_split(tmp_path / "test", spec, max_bad_fraction=0.3)
    assert split.labels_N is not None
    assert split.labels_N.tolist() == [0, 2, 1]
    assert [fault.cause for fault in split.skipped] == [LABEL]
    with pytest.raises(UserError, match=r"1 damaged samples \(bad label 1\) are more than"):
        load_eval_split(tmp_path / "test", spec)


def test_labels_and_classes_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_set(tmp_path, [0, 1, 3, 2])
    index_dataset(tmp_path)
    with pytest.raises(UserError, match=r"sample s0000002: label 3, classes.json has 3 classes, numbered from 0"):
        Corpus(open_pairs(tmp_path), spec_for(tmp_path)).eval_split("test")
    (tmp_path / "classnames.txt").write_text("\n".join([*CLASSES, "pelican"]))
    with pytest.raises(UserError, match=r"classes.json says something else than classnames.txt"):
        index_dataset(tmp_path)
    (tmp_path / "classes.json").unlink()
    index_dataset(tmp_path)
    split = Corpus(open_pairs(tmp_path), spec_for(tmp_path)).eval_split("test")
    assert split.labels_N is not None
    assert split.labels_N.tolist() == [0, 1, 3, 2]

    for file, text, said in (
        ("classnames.txt", "a\n\nb\n", "classnames.txt line 2 is empty"),
        ("classnames.txt", "a\n" + "b" * 6000, "a line of 6000 characters"),
        ("zeroshot_classification_templates.txt", "a {c}\nno place\n", r"line 2: 'no place' has no \{c\}"),
    ):
        bad = benchmark_set(tmp_path / str(len(said)), [0, 1, 2])
        (bad / file).write_text(text)
        with pytest.raises(UserError, match=said):
            index_dataset(bad)

    alike = benchmark_set(tmp_path / "alike", [0, 1, 2])
    (alike / "classnames.txt").write_text("crane\nmaillot\n Crane \n")
    assert main(["data", "index", str(alike)]) == 0
    assert "classes: 'Crane' is the name of several, which cannot be told apart\n" in capsys.readouterr().out

    bare = benchmark_set(tmp_path / "bare", [0, 1])
    (bare / "classnames.txt").unlink()
    capsys.readouterr()
    assert main(["data", "index", str(bare)]) == 0
    assert "there are labels, and no list of classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing can be measured: 0 of 2 images have a caption, and there is no list of classes"):
        evaluate_folder(tiny_model(tmp_path / "model"), bare, "test")
