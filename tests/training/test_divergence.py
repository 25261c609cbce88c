"""Runs that diverge: the loop's own line with step, rank and rate, soon, and nothing of them is saved or exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.training import loop
from tests.test_machine_errors import RECIPE, refused


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("divergence") / "data"
    write_scenes(root, num_train=64, num_val=8, num_test=8, seed=0, image_size=32)
    return root


def broken_after(step: int, how: Callable[[Any], None]) -> Callable[..., Any]:
    """`train_step` that does something to the model after a step."""
    original, calls = loop.train_step, 0

    def broken(stage: Any, engine: Any, batch: Any, number: int) -> Any:
        nonlocal calls
        found = original(stage, engine, batch, number)
        if number + 1 == step:
            with torch.no_grad():
                how(engine.model)
        return found

    return broken


def spoil(name: str, value: float) -> Callable[[Any], None]:
    return lambda model: next(tensor for key, tensor in model.named_parameters() if key.endswith(name)).fill_(value)


CASES = {
    # what becomes of the weights after step 2; the step that is told; what is told
    "a scale that is not a number": ("logit_scale", float("nan"), "the weights are not finite after step 2 on rank 0"),
    "an infinite weight": ("visual.proj", float("inf"), "the weights are not finite after step 2 on rank 0"),
    "weights so large that the loss overflows": ("visual.conv1.weight", 3e38, "the loss is not finite after step 3 on rank 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_or_loss_that_are_no_numbers(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value, said = CASES[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "runtime": {"log_every": 1, "checkpoint_every": 1}}))
    monkeypatch.setattr(loop, "train_step", broken_after(2, spoil(name, value)))
    line = refused(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")], capsys)
    assert f"training diverged: {said}, at learning rate " in line
    rate = float(line.split("at learning rate ")[1].split(". ")[0])
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {text["step"]: text["learning_rate"] for text in lines if "loss" in text}
    assert rate > 0
    last = int(said.split("step ")[1].split(" ")[0]) - 1
    assert max(logged) == last
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*"))
    assert saved[-1] == f"step-{last:08d}"
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_real_divergence_is_noticed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate at which the weights overflow by themselves."""
    recipe = tmp_path / "recipe.yaml"
    training = {**RECIPE["ancestor"], "steps": 30, "eval_every": 30}
    rates = {"learning_rate": 1e20, "gradient_clipping": 0.0, "warmup_fraction": 0.0}
    recipe.write_text(yaml.safe_dump({**RECIPE, "ancestor": {**training, "optimizer": rates}}))
    line = refused(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")], capsys)
    assert "training diverged: the " in line
    assert "on rank 0, at learning rate 1e+20" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_scale_that_rounds_to_nothing_is_no_error_of_the_kernels(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-200) is 0 in fp32, which the kernels refuse as a scale. The weights are numbers: training continues with equal similarities."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(loop, "train_step", broken_after(2, spoil("logit_scale", -200.0)))
    assert main(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [text["loss"] for text in lines if "loss" in text]
    assert losses[3:] == pytest.approx([float(torch.tensor(16.0).log())] * 3, rel=1e-5)


def test_a_look_is_taken_when_figures_are_logged_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looks nothing is read from the device; the first step that was lost is the one that is told."""
    import torch.distributed as dist

    class Engine:
        device = torch.device("cpu")
        learning_rate = 0.25

        def is_finite(self) -> torch.Tensor:
            return torch.tensor(True)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        health = loop._Health(Engine())  # type: ignore[arg-type]
        with monkeypatch.context() as patched:
            for read in ("item", "tolist", "__bool__", "__float__", "__int__"):
                patched.setattr(torch.Tensor, read, lambda *_: pytest.fail("a synchronisation"))
            for step, loss in enumerate((1.0, float("inf"), 2.0, float("nan")), start=1):
                health.note(torch.tensor(loss), step)
        with pytest.raises(loop.UserError, match=r"the loss is not finite after step 2 on rank 0, at learning rate 0\.25"):
            health.check(4)
    finally:
        dist.destroy_process_group()
