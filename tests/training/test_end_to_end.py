"""Whole runs through the command line: on two ranks as on one, from a checkpoint as in one go."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes

STEPS = 6
# An epsilon far above any gradient makes AdamW's update proportional to its first moment: rounding noise in small gradients, which Adam
# otherwise blows up to full steps, stays small, so that runs on other numbers of ranks can be compared.
OPTIMIZER = {"learning_rate": 30.0, "epsilon": 10.0, "weight_decay": 0.0, "gradient_clipping": 0.0, "warmup_fraction": 0.0}
TRAINING = {"steps": STEPS, "batch_size": 16, "eval_every": 3, "optimizer": OPTIMIZER}
RECIPE: dict[str, Any] = {
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
        }
    },
    "ancestor": TRAINING,
    "extraction": {"min_layers": 1, "num_knots": 3, "training": {**TRAINING, "optimizer": {**OPTIMIZER, "learning_rate": 1.0}}},
}


def mmlg(*words: str, ranks: int = 1, code: int = 0) -> str:
    """Run a command, in this process or on several ranks; returns what it printed."""
    if ranks == 1:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            found = main(list(words))
        assert found == code, said.getvalue()
        return said.getvalue()
    launch = ["launch", "local", f"--num-processes={ranks}", f"--run-folder={words[-1]}.launch", "--"]
    argv = [sys.executable, "-m", "mmlg_scale", *launch, *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("end-to-end")
    write_scenes(root / "data", num_train=96, num_val=12, num_test=12, seed=0, image_size=32)
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


def run(folder: Path, name: str, ranks: int, *options: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Train and extract; weights and results of both."""
    common = (str(folder / "recipe.yaml"), "--data.path", str(folder / "data"), *options)
    ancestor, gene = folder / f"{name}-ancestor", folder / f"{name}-gene"
    mmlg("train", *common, "--out", str(ancestor), ranks=ranks)
    mmlg("extract", *common, "--ancestor-model", str(ancestor / "model"), "--out", str(gene), ranks=ranks)
    results = [json.loads((out / "result.json").read_text()) for out in (ancestor, gene)]
    model = load_file(ancestor / "model" / "open_clip_model.safetensors")
    return model, results[0], load_file(gene / "learngene.safetensors"), results[1]


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    return run(folder, "one", 1)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 error of a tensor."""
    assert set(found) == set(expected)
    return max(float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-3)) for name in expected)


@pytest.mark.parametrize(
    ("stage", "options"),
    [pytest.param(1, (), marks=pytest.mark.slow), (3, ("--runtime.persistence_threshold=0", "--runtime.num_workers=1"))],
)
def test_two_ranks_equal_one(stage: int, options: tuple[str, ...], folder: Path, alone: Any) -> None:
    """Loop, checkpoints, evaluation and export under ZeRO on two ranks: weights agree to rounding, metrics and costs exactly."""
    model, ancestor, gene, extraction = run(folder, f"two-zero{stage}", 2, f"--runtime.zero_stage={stage}", *options)
    assert worst(model, alone[0]) < 1e-3
    assert worst(gene, alone[2]) < 2e-3
    initial = alone[1]["curve"][0]["mean_recall@1"], alone[3]["metrics"]
    assert all(torch.isfinite(torch.tensor(value)).all() for value in (initial[0], *initial[1].values()))
    for found, expected in ((ancestor, alone[1]), (extraction, alone[3])):
        assert [found[key] for key in ("steps", "flops", "teacher_flops", "params")] == [
            expected[key] for key in ("steps", "flops", "teacher_flops", "params")
        ]
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=0.05)  # a near tie of 12 images may fall the other way
        assert [point["step"] for point in found["curve"]] == [3, 6]


def test_training_moved_the_weights(folder: Path, alone: Any) -> None:
    """The comparison above would show nothing if nothing was learned."""
    losses = [json.loads(line)["loss"] for line in (folder / "one-ancestor" / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    untrained = folder / "untrained.yaml"
    untrained.write_text(
        yaml.safe_dump({**RECIPE, "ancestor": {**TRAINING, "steps": 1, "optimizer": {**OPTIMIZER, "learning_rate": 1e-9}}})
    )
    mmlg("train", str(untrained), "--data.path", str(folder / "data"), "--out", str(folder / "untrained"))
    start = load_file(folder / "untrained" / "model" / "open_clip_model.safetensors")
    assert losses
    assert worst(alone[0], start) > 0.1


def test_a_complete_run_says_so_and_another_one_is_refused(folder: Path, alone: Any) -> None:
    common = (str(folder / "recipe.yaml"), "--data.path", str(folder / "data"))
    said = mmlg("train", *common, "--out", str(folder / "one-ancestor"), "--runtime.zero_stage=2", "--runtime.log_every=3")
    assert "complete: 6 steps, mean_recall@1" in said
    said = mmlg("train", *common, "--out", str(folder / "one-ancestor"), "--ancestor.steps=7", code=2)
    assert "ancestor.steps was 6, now 7" in said
