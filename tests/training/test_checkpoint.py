"""Checkpoints on a full disk, and of another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from mmlg_scale import files
from mmlg_scale.errors import UserError
from mmlg_scale.training.checkpoint import RANKS, Checkpoints


@pytest.fixture(autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))


ENGINE: Any = SimpleNamespace(
    checkpoint_bytes=2**20, zero_stage=1, save=save, load=lambda folder: json.loads((folder / "state.json").read_text())
)


def test_a_full_disk_leaves_the_older_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(ENGINE, 10, {})
    monkeypatch.setattr(files, "free_bytes", lambda folder: 2**19)
    with pytest.raises(UserError, match="a checkpoint needs"):
        checkpoints.save(ENGINE, 20, {})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000010"]
    assert checkpoints.load_latest(ENGINE) == {"step": 10}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({"world_size": 4, "zero_stage": 1}, "written with 4 ranks, this run has 1 ranks. Resume it with 4 ranks"),
        ({"world_size": 1, "zero_stage": 3}, "written with ZeRO stage 3, this run has ZeRO stage 1"),
    ],
)
def test_another_division_is_refused(written: dict[str, int], said: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(ENGINE, 10, {})
    (checkpoints.folder / "step-00000010" / RANKS).write_text(json.dumps(written))
    with pytest.raises(UserError, match=said):
        checkpoints.load_latest(ENGINE)
