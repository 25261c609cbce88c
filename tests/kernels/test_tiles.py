"""Tiles other than the fixed ones: same numbers, read from a table that was measured, or from none when it is no table."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from mmlg_kernels import tiles, tuning
from mmlg_kernels.tiles import DEFAULTS, Tile, forced, read_table, table_path, tile_for, write_table

PAIRS, WIDTH, TEACHER_WIDTH = 70, 40, 24


@pytest.mark.parametrize("kernel", DEFAULTS)
@pytest.mark.parametrize("tile", [Tile(16, 64, 16, 2, 1), Tile(64, 16, 64, 4, 2)], ids=str)
def test_every_kernel_computes_the_same_with_other_tiles(kernel: str, tile: Tile) -> None:
    run = tuning.runs(PAIRS, WIDTH, TEACHER_WIDTH, torch.float32, "cpu")[kernel]
    expected = run()
    with forced(kernel, tile):
        assert tile_for(kernel, torch.float32) == tile
        found = run()
    assert tile_for(kernel, torch.float32) == tiles.INTERPRETED
    # The sum of the student's logits cancels to a hundredth of its terms.
    assert tuning.difference(found, expected) < (1e-4 if kernel == "distillation_forward" else 1e-5)
    assert all(float(x.double().norm()) > 1e-3 for x in expected)


def test_the_fastest_tile_with_the_same_numbers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    default, fast, slow, wrong, faster_by_noise = (Tile(rows, 32, 32, 4, 1) for rows in (32, 16, 64, 128, 256))
    run = tuning.runs(PAIRS, WIDTH, TEACHER_WIDTH, torch.float32, "cpu")["softmax_forward"]
    milliseconds = {default: 1.0, fast: 0.9, slow: 3.0, faster_by_noise: 0.99}
    launched: list[Tile] = []

    def clock(_: tuning.Run) -> float:
        launched.append(tile_for("softmax_forward", torch.float32))
        return milliseconds[launched[-1]]

    def broken() -> Sequence[torch.Tensor]:
        found = run()
        return [x + 1 for x in found] if tile_for("softmax_forward", torch.float32) == wrong else found

    best, said = tuning.tune("softmax_forward", broken, default, [slow, wrong, fast, default], clock)
    assert best == fast
    assert launched == [default, slow, fast]
    assert "from the fixed tile's numbers" in str(said["128 32 32 4 1"])
    assert said["16 32 32 4 1"] == 0.9
    assert tuning.tune("softmax_forward", run, default, [faster_by_noise], clock)[0] == default


def test_a_table_is_read_for_its_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLG_TILES", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Some GPU")
    tile = Tile(64, 128, 32, 4, 2)
    write_table(table_path("NVIDIA Some GPU"), "NVIDIA Some GPU", {"softmax_forward bfloat16": tile}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["tiles-nvidia-some-gpu.json"]
    assert tile_for("softmax_forward", torch.bfloat16) == tile
    assert tile_for("softmax_forward", torch.float32) == DEFAULTS["softmax_forward"][4]
    assert tile_for("softmax_gradient", torch.bfloat16) == DEFAULTS["softmax_gradient"][2]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Other GPU")
    assert tile_for("softmax_forward", torch.bfloat16) == DEFAULTS["softmax_forward"][2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content | {"triton": "1.0"},
        lambda content: content | {"tiles": {"softmax_forward bfloat16": [100, 64, 64, 8, 3]}},
        lambda content: content | {"tiles": {"softmax_forward bfloat16": [128, 64, 64]}},
        lambda content: content | {"tiles": [1]},
        lambda content: [content],
        lambda content: None,
    ],
)
def test_what_is_no_table_is_left_unused_with_a_warning(damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tiles-gpu.json"
    write_table(path, "GPU", {"softmax_forward bfloat16": Tile(128, 64, 64, 8, 3)}, {})
    assert {key: astuple(tile) for key, tile in read_table(path).items()} == {"softmax_forward bfloat16": (128, 64, 64, 8, 3)}
    read_table.cache_clear()
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))  # type: ignore[operator]
    with caplog.at_level(logging.WARNING, "mmlg_kernels"):
        assert read_table(path) == {}
    assert "mmlg_kernels.tuning" in caplog.text
    path.write_text("{")
    read_table.cache_clear()
    assert read_table(path) == {}
