"""Whole runs over a mixture of three sources: the same samples and losses on any ranks, with any workers, stopped and resumed."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml

from mmlg_scale.cli import main
from mmlg_scale.data.corpus import pairs_of
from mmlg_scale.data.mixture import JoinedReader
from mmlg_scale.recipe_file import load_recipe
from tests.data.damage import KINDS
from tests.data.mixture_worker import as_rank
from tests.data.sets import write_set
from tests.forks import start
from tests.test_machine_errors import RECIPE

SIZES = {"small": 10, "middle": 31, "large": 90}
WEIGHTS = {"small": 0.25, "middle": 0.3, "large": 0.45}
DAMAGED = {"small": [], "middle": [7], "large": [4, 5]}
STEPS, STOP, BATCH = 18, 7, 12
"""Step 7 begins at place 84: the 38th sample of the large set, in the first of its two windows and of its epochs."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, size in SIZES.items():
        write_set(folder / name, size, about=lambda index: {"alt": f"alternative {index}"})
        for index in DAMAGED[name]:
            KINDS["image cut"][0](folder / name / "train", index // 4, index % 4)
    sources = [{"path": str(folder / name), "weight": weight} for name, weight in WEIGHTS.items()]
    sources[2] |= {"captions": {"alt": 1.0, "txt": 1.0}}
    training = {"steps": STEPS, "batch_size": BATCH, "eval_every": STEPS}
    data = {"sources": sources, "max_bad_fraction": 0.1, "augment": "crop"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "ancestor": training, "data": data}))
    run(folder, "straight", STEPS, 1, 0)
    return folder


def run(root: Path, case: str, stop_at: int, ranks: int, workers: int) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    with open(root / f"{case}.log", "a") as log:
        forks = [start(log.fileno(), as_rank, rank, ranks, port, root, case, stop_at, workers) for rank in range(ranks)]
    for fork in forks:
        fork.join(580)
    assert [fork.exitcode for fork in forks] == [0] * ranks, (root / f"{case}.log").read_text()[-3000:]


def read_by(root: Path, case: str) -> list[tuple[int, list[list[int]]]]:
    """(step, samples and captions of all ranks in their order)."""
    lines = [json.loads(line) for file in sorted(root.glob(f"{case}.rank*.samples")) for line in file.read_text().splitlines()]
    found: dict[int, list[list[int]]] = {}
    for line in sorted(lines, key=lambda line: (line["step"], line["rank"])):
        assert len(line["samples"]) * line["ranks"] == BATCH
        found.setdefault(line["step"], []).extend(line["samples"])
    return sorted(found.items())


def figures(root: Path, case: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (root / case / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_reads_whole_epochs_of_each_source_and_says_so(root: Path) -> None:
    """Keys as they are in the tars: none lost, none repeated within a source's epoch; epochs as metrics.jsonl has them."""
    settings, _ = load_recipe(str(root / "recipe.yaml"))
    reader = JoinedReader.of(pairs_of(settings.data).training())

    def key(sample: int) -> str:
        source = reader.source(sample)
        return reader.readers[source].key(sample - int(reader.starts[source]))

    keys = [[key(sample) for sample, _ in samples] for _, samples in read_by(root, "straight")]
    assert [len(of_step) for of_step in keys] == [BATCH] * STEPS
    noted = figures(root, "straight")
    for name, size in SIZES.items():
        intact = {f"{name}-{index:05d}" for index in range(size) if index not in DAMAGED[name]}
        own = [key for of_step in keys for key in of_step if key.startswith(name)]
        assert abs(len(own) - STEPS * BATCH * WEIGHTS[name]) < 1
        for epoch in range(0, len(own), len(intact)):
            part = own[epoch : epoch + len(intact)]
            assert len(set(part)) == len(part)
            assert set(part) <= intact
        counts = [sum(key.startswith(name) for of_step in keys[: step + 1] for key in of_step) for step in range(STEPS)]
        assert [line[f"epochs/{name}"] for line in noted] == pytest.approx([count / len(intact) for count in counts])
    assert len({caption for _, samples in read_by(root, "straight") for _, caption in samples}) == 2
    assert "large" in (root / "straight.log").read_text()
    assert "middle, epoch 0: 1 samples skipped (undecodable image 1), listed in " in (root / "straight.log").read_text()


def check(root: Path, ranks: int, workers: int) -> None:
    case = f"{ranks}-ranks-{workers}-workers"
    run(root, case, STOP, ranks, workers)
    assert len(figures(root, case)) == STOP
    run(root, case, STEPS, ranks, workers)
    assert read_by(root, case) == read_by(root, "straight")
    found, wanted = figures(root, case), figures(root, "straight")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], abs=1e-4)
    assert max(line["loss"] for line in wanted) - min(line["loss"] for line in wanted) > 0.05  # something was learned
    names = [f"epochs/{name}" for name in SIZES]
    assert [[line[name] for name in names] for line in found] == [[line[name] for name in names] for line in wanted]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (4, 0), (1, 3), (2, 3), (4, 3)])
def test_a_run_is_the_same_on_any_ranks_and_workers(ranks: int, workers: int, root: Path) -> None:
    check(root, ranks, workers)


def test_a_plan_and_another_mixture_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(root / "recipe.yaml"), "--engine.keep_features=true", *NO_HIDDEN, *SMALL]) == 0
    # All captions that may be read: two of each sample of the large set.
    assert "features of 131 images and 221 captions" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main(["train", str(root / "recipe.yaml"), "--out", str(root / "straight"), "--data.max_bad_fraction=0.2"]) == 0  # the same run
    changed = yaml.safe_load((root / "recipe.yaml").read_text())
    changed["data"]["sources"][0]["weight"] = 0.5
    (root / "changed.yaml").write_text(yaml.safe_dump(changed))
    capsys.readouterr()
    assert main(["train", str(root / "changed.yaml"), "--out", str(root / "straight")]) == 2
    assert "contains another run: data.sources was" in capsys.readouterr().err
    assert main(["train", str(root / "recipe.yaml"), "--data.path", str(root / "small"), "--out", str(root / "other")]) == 2
    assert "recipe key data.sources: is given, and data.path is" in capsys.readouterr().err


SMALL = [f"--{key}.batch_size=12" for key in ("extraction.training", "baselines.scratch", "baselines.even", "baselines.distil")]
"""Batches that the smallest set is enough for."""
NO_HIDDEN = ["--data.augment=none", "--extraction.loss.hidden=0", "--baselines.distil_loss.hidden=0"]
