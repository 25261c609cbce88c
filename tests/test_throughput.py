"""mmlg benchmark: what it measures of a small model, how it keeps rows of several calls, and what it says of scaling."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import forward_flops, training_flops
from mmlg_scale.cli import main
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.synthetic import WORDS, sample, write_pairs
from mmlg_scale.throughput import Cell, efficiency, merged, settings_of, table
from mmlg_scale.training.sizes import SizeDraw
from tests.artefacts import CONFIG

Row = dict[str, Any]


def row(**changes: Any) -> Row:
    found = {"model": "m", "role": "ancestor", "precision": "fp32", "zero_stage": 0, "batch_size": 8, "layers": None, "ranks": 1}
    found |= {"local_batch": 8, "samples_per_second": 100.0, "step_samples_per_second": 110.0, "step_cpu_seconds": 0.5, "step_mfu": 0.4}
    return found | {"loader_stall": 0.1, "peak_memory_bytes": 2**30} | changes


def test_a_combination_that_is_measured_again_has_its_last_figures() -> None:
    old = [row(), row(ranks=2, batch_size=16), row(role="descendant", layers=[1, 1])]
    found = merged(json.loads(json.dumps(old)), [row(samples_per_second=50.0), row(zero_stage=3)])
    assert [(each["role"], each["zero_stage"], each["ranks"]) for each in found] == [
        ("ancestor", 0, 1),
        ("ancestor", 0, 2),
        ("ancestor", 3, 1),
        ("descendant", 0, 1),
    ]
    assert found[0]["samples_per_second"] == 50.0


def test_scaling_is_weak_with_as_many_pairs_per_rank_and_strong_with_as_many_in_all() -> None:
    one = row()
    weak = row(ranks=4, batch_size=32, samples_per_second=300.0)
    strong = row(ranks=2, batch_size=8, local_batch=4, samples_per_second=160.0)
    rows = [one, weak, strong, row(ranks=2, batch_size=16, zero_stage=1), row(ranks=1, note="out of memory", zero_stage=1)]
    assert efficiency(weak, rows) == ("weak", 0.75)
    assert efficiency(strong, rows) == ("strong", 0.8)
    assert efficiency(one, rows) is None
    assert efficiency(rows[3], rows) is None
    told = table(rows)
    assert "weak 75%" in told
    assert "strong 80%" in told
    assert "out of memory" in told
    assert all(line.count("|") == told.splitlines()[0].count("|") for line in told.splitlines())


def test_generated_pairs(tmp_path: Path) -> None:
    """Words of the list, in the range; images of the size; the same bytes for the same seed and no two alike."""
    made = [sample(position, [0, 0], 64, (5, 25)) for position in range(30)]
    counts = [len(pair.captions[0].split()) for pair in made]
    assert min(counts) >= 5
    assert max(counts) <= 25
    assert max(counts) - min(counts) > 10
    assert {word for pair in made for word in pair.captions[0].split()} <= set(WORDS)
    assert made[3] == sample(3, [0, 0], 64, (5, 25))
    assert len({pair.image for pair in made}) == len({pair.captions[0] for pair in made}) == 30
    with Image.open(io.BytesIO(made[0].image)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 64), "RGB")
    write_pairs(tmp_path / "pairs", num_train=7, num_val=2, num_test=1, image_size=32, samples_per_shard=4)
    assert [len(ShardReader(tmp_path / "pairs" / split)) for split in ("train", "val", "test")] == [7, 2, 1]
    several = sample(3, [0, 0], 64, (5, 25), 3)
    assert several.image == made[3].image
    assert several.captions[0] == made[3].captions[0]
    assert len(set(several.captions)) == 3


def test_every_role_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FLOPs are those of the model; rates, seconds and shares agree with one another; and a second call adds to the first."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"config": CONFIG}, "extraction": {"width_shares": [1.0]}}))
    options = ["--out", str(tmp_path / "out"), "--batch-sizes", "8", "--steps", "1", "--repeats", "3", "--warmup", "1", "--num-pairs", "40"]
    assert main(["benchmark", str(recipe), "--roles", "ancestor", "descendant", "--quiet", *options]) == 0
    assert capsys.readouterr().out == ""
    assert main(["benchmark", str(recipe), "--roles", "extraction", *options]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [found["role"] for found in rows] == ["ancestor", "extraction", "descendant"]
    assert all(f"16 x 2 + 16 x 2 | {found['role']}" in printed for found in rows)
    assert (tmp_path / "out" / "benchmark.svg").stat().st_size > 1000
    config = towers.model_config(CONFIG)
    ancestor, extraction, descendant = (found["flops_per_sample"] for found in rows)
    assert ancestor == training_flops(config)
    whole = training_flops(config, pooled=())  # of the last block all, since its hidden state is compared
    assert extraction == pytest.approx(whole + whole / 3)  # and the teacher's forward pass
    shallow = training_flops(towers.with_sizes(config, image_layers=1, text_layers=1))
    assert descendant == pytest.approx(shallow + ancestor / 3)  # only features are compared
    for found in rows:
        assert (found["ranks"], found["local_batch"], found["batch_size"]) == (1, 8, 8)
        assert found["samples_per_second"] == pytest.approx(8 / found["seconds"])
        assert 0 < found["seconds_p20"] <= found["seconds"] <= found["seconds_p80"]
        assert found["step_mfu"] == pytest.approx(found["flops_per_sample"] * found["step_samples_per_second"] / found["peak_flops"])
        assert 0 < found["loader_stall"] < 1
        assert found["peak_memory_bytes"] > 10 * 2**20


def test_extraction_is_measured_at_all_depths() -> None:
    """Steps of a recipe whose depths grow are measured as they are at its end."""
    config = towers.model_config(CONFIG | {name: {**CONFIG[name], "layers": 4} for name in ("vision_cfg", "text_cfg")})  # type: ignore[dict-item]
    settings = recipe.Recipe(extraction=recipe.Extraction(growth=1.0))
    draw = SizeDraw(settings_of(settings, Cell("extraction", None, "fp32", zero_stage=0, batch_size=8)).extraction, config, seed=0)
    assert {draw.sizes(step)[0]["image_layers"] for step in range(30)} == {2, 3, 4}


def test_several_captions_an_image_are_a_combination_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the row of one caption, charged for the image once; each image has as many that differ."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"config": CONFIG}}))
    options = [
        "--out",
        str(tmp_path / "out"),
        "--roles",
        "ancestor",
        "--batch-sizes",
        "8",
        "--steps",
        "1",
        "--repeats",
        "1",
        "--warmup",
        "1",
    ]
    options += ["--generate", "photos", "--photo-size", "32", "--num-pairs", "24", "--runtime.text", "full"]
    assert main(["benchmark", str(recipe), *options]) == 0
    assert main(["benchmark", str(recipe), *options, "--data.captions_per_image=3"]) == 0
    said = capsys.readouterr()
    assert "ancestor, 3 captions an image" in said.out
    assert "were read twice" not in said.out + said.err
    one, three = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert (one.get("captions_per_image"), three["captions_per_image"]) == (None, 3)
    flops = forward_flops(towers.model_config(CONFIG), pooled=("image", "text"))
    assert three["flops_per_sample"] == 3 * (flops["image"] + 3 * flops["text"])
    assert one["flops_per_sample"] == 3 * flops["total"]


def test_other_runtime_options_are_a_combination_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the row at the defaults, which it does not replace; measured again, it has its last figures."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"config": CONFIG}}))
    options = ["--out", str(tmp_path / "out"), "--roles", "ancestor", "--batch-sizes", "8", "--steps", "1", "--repeats", "1"]
    options += ["--warmup", "1", "--num-pairs", "24"]
    others = ["--runtime.text", "full", "--runtime.activation_checkpointing", "true", "--ancestor.accumulation", "2"]
    for more in ([], others, others):
        assert main(["benchmark", str(recipe), *options, *more]) == 0
    assert "| ancestor, activation_checkpointing true, text full, accumulation 2 |" in capsys.readouterr().out
    plain, changed = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert "options" not in plain
    assert changed["options"] == {"activation_checkpointing": True, "text": "full", "accumulation": 2}


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: str) -> str:
        assert main(["benchmark", "demo", *words]) == 2
        return capsys.readouterr().err

    out = ("--out", str(tmp_path))
    assert "--out is missing" in said()
    assert "Give one of them" in said(*out, "--batch-sizes", "8", "--global-batch-sizes", "8", "--num-processes", "1")
    assert "go together" in said(*out, "--image-layers", "2", "--num-processes", "1")
    assert "--roles" in said(*out, "--roles", "teacher")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "under mmlg launch" in said(*out, "--num-processes", "2")


@pytest.mark.slow
def test_open_clip_train_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides start from one loss; other images are noticed before anything is timed."""
    from benchmarks import throughput
    from mmlg_scale.runtime import Runtime

    task = throughput.make_task("demo", tmp_path, batch_size=8, steps=2, precision="fp32", num_pairs=64)
    found = throughput.compare(task, Runtime(cache_decoded=False), pairs=1)
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
    for kind in ("", "_step", "_loader"):
        assert found[f"ratio{kind}_cpu"] == pytest.approx(found[f"theirs{kind}_cpu_seconds"] / found[f"ours{kind}_cpu_seconds"])
    prepared = throughput.Theirs.prepared
    monkeypatch.setattr(throughput.Theirs, "prepared", lambda self, batch: (prepared(self, batch)[0].flip(-1), batch.text_NT))
    with pytest.raises(RuntimeError, match="not the same model or data"):
        throughput.compare(task, Runtime(cache_decoded=False), pairs=1)
    assert "RANK" not in os.environ  # the session is closed: the next process started from here is no rank of it
