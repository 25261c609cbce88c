"""A whole family at the smallest size: the real command, killed in three stages, against an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPE = {
    "data": {"scenes": {"num_train": 160, "num_val": 24, "num_test": 24}},
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 3},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 3},
        }
    },
    "ancestor": {"steps": 60, "batch_size": 32, "eval_every": 4},
    "extraction": {"min_layers": 1, "num_knots": 3, "training": {"steps": 60, "batch_size": 32, "eval_every": 4}},
    "adaptation": {"training": {"steps": 4, "batch_size": 32, "eval_every": 2}},
    "baselines": {
        "scratch": {"steps": 8, "batch_size": 32, "eval_every": 4},
        "even": {"steps": 8, "batch_size": 32, "eval_every": 4},
        "distil": {"steps": 60, "batch_size": 32, "eval_every": 4},
    },
    "family": {"sizes": [{"image_layers": 2, "text_layers": 2}, {"image_layers": 2, "modality": "image"}], "stop_at_target": False},
}


def start(recipe: Path, out: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "mmlg_scale", "family", str(recipe), "--out", str(out)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def figures(out: Path) -> dict[str, Any]:
    """family.json without what the clock decides, and the learngene's bytes."""
    family = json.loads((out / "family.json").read_text())
    del family["environment"], family["cost_ratio_seconds"]
    for part in (family["ancestor"], family["learngene"], *family["descendants"], *family["totals_by_init"].values()):
        part.pop("seconds", None)
        part.pop("seconds_to_target", None)
        for point in part.get("curve", []):
            del point["seconds"]
    family["learngene_file"] = (out / "learngene" / "learngene.safetensors").read_bytes()
    return family


def kill_when(process: subprocess.Popen[str], appears: Path, unless: Path) -> None:
    """SIGKILL the command as soon as a checkpoint of a stage stands, and check that the stage was not over."""
    end = time.monotonic() + 120
    while not list(appears.glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1.0)  # its jobs end with it
    assert not unless.exists()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family") / "undisturbed"
    finish(start(recipe_file, out))
    return out


def test_killed_in_three_stages_gives_the_same_numbers(recipe_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for stage in ("ancestor", "learngene", "descendants/i2-t2-distil"):
        kill_when(start(recipe_file, out), out / stage / "checkpoints", out / stage / "result.json")
    finish(start(recipe_file, out))
    assert figures(out) == figures(undisturbed)


def test_family_json_report_and_metrics(undisturbed: Path) -> None:
    family = json.loads((undisturbed / "family.json").read_text())
    inits = {(entry["init"], entry["modality"]) for entry in family["descendants"]}
    assert inits == {("mmlg", "both"), ("mmlg", "image"), ("scratch", "both"), ("even", "both"), ("distil", "both")}
    assert family["cost_ratio"] > 0
    assert set(family["cost_ratio_by_baseline"]) == {"even", "distil"}
    by_init = {entry["init"]: entry for entry in family["descendants"] if entry["modality"] == "both"}
    assert [point["step"] for point in by_init["mmlg"]["curve"]] == [0, 2, 4]
    assert [point["step"] for point in by_init["scratch"]["curve"]] == [4, 8]
    assert by_init["scratch"]["target"] == by_init["scratch"]["curve"][-1]["mean_recall@1"]
    page = (undisturbed / "report.html").read_text()
    assert "What is not claimed" in page
    assert page.count("data:image/png;base64,") == 30
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    lines = [json.loads(line) for line in (undisturbed / "ancestor" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == list(range(4, 61, 4))
    assert all(line["loss"] > 0 and line["samples_per_second"] > 0 for line in lines if "loss" in line)
    assert list((undisturbed / "ancestor" / "tensorboard").iterdir())


def test_a_second_start_repeats_nothing_and_another_recipe_is_refused(recipe_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    results = sorted(undisturbed.rglob("result.json"))
    stamps = [path.stat().st_mtime_ns for path in results]
    assert len(results) == 7
    before = figures(undisturbed)
    finish(start(recipe_file, undisturbed))
    assert [path.stat().st_mtime_ns for path in results] == stamps
    assert figures(undisturbed) == before
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**RECIPE, "seed": 5}))
    process = start(other, undisturbed)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "holds another recipe's run (differs in: recipe)" in said


def test_descendants_are_open_clip_models(undisturbed: Path) -> None:
    """Every exported folder, and its tokenizer, loads through open_clip and scores what the run's result says."""
    from mmlg_scale import towers
    from mmlg_scale.evaluation.evaluate import evaluate_folder

    for folder in sorted((undisturbed / "descendants").glob("i2-t2-*")):
        if folder.suffix == ".launch":
            continue
        clip, _, _ = towers.open_clip.create_model_and_transforms(f"local-dir:{folder / 'model'}")
        assert len(clip.visual.transformer.resblocks) == 2
        tokenizer = towers.open_clip.get_tokenizer(f"local-dir:{folder / 'model'}")
        assert tokenizer(["a big red circle"]).shape == (1, 16)
        result = json.loads((folder / "result.json").read_text())
        assert evaluate_folder(folder / "model", undisturbed / "data", "test") == pytest.approx(result["metrics"])


def test_kept_features_change_no_number(tmp_path: Path) -> None:
    """A family whose runs read the ancestor's features against one that runs the ancestor at every step."""
    few = {"steps": 4, "batch_size": 32, "eval_every": 2}
    loss = {"hidden": 0.0, "affinity": 1.0}
    shared = {
        **RECIPE,
        "ancestor": few,
        "extraction": {"min_layers": 1, "num_knots": 3, "training": {**few, "accumulation": 2}, "loss": loss},
        "adaptation": {"training": few, "loss": loss},
        "baselines": {"scratch": few, "even": None, "distil": few, "distil_loss": loss},
        "family": {"sizes": [{"image_layers": 2, "text_layers": 2}], "stop_at_target": False},
    }
    found = {}
    for kept in (True, False):
        recipe = tmp_path / f"{kept}.yaml"
        recipe.write_text(yaml.safe_dump({**shared, "engine": {"keep_features": kept}}))
        finish(start(recipe, tmp_path / str(kept)))
        found[kept] = tmp_path / str(kept)
    for run in ("learngene", "descendants/i2-t2-mmlg", "descendants/i2-t2-distil"):
        with_features, without = (json.loads((found[kept] / run / "result.json").read_text()) for kept in (True, False))
        lines = [[json.loads(line) for line in (found[kept] / run / "metrics.jsonl").read_text().splitlines()] for kept in (True, False)]
        losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0]
        assert with_features["metrics"] == pytest.approx(without["metrics"], abs=0.05)
        assert with_features["teacher_flops"] == 0 < without["teacher_flops"]
        assert with_features["flops"] == without["flops"]
    family = json.loads((found[True] / "family.json").read_text())
    kept_flops = family["kept_features"]["flops"]
    assert kept_flops == json.loads((found[True] / "features" / "result.json").read_text())["flops"] > 0
    assert family["totals_by_init"]["mmlg"]["flops_once"] == family["learngene"]["flops"] + kept_flops
    assert family["totals_by_init"]["distil"]["flops_once"] == kept_flops
