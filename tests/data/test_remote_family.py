"""A whole family over HTTP: every command of it, and the figures of a family from disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from tests.data.server import Server
from tests.test_family import RECIPE, complete, figures


def plan(recipe: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(recipe), "--json", "--flops-per-second", "1e12", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_family_over_http_is_that_of_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ancestor, extraction, direct pre-training, descendants and baselines; each shard is fetched once for all of them."""
    data, recipe, cache = tmp_path / "data", tmp_path / "recipe.yaml", tmp_path / "cache"
    write_scenes(data, num_train=160, num_val=24, num_test=24, seed=0, samples_per_shard=16)
    recipe.write_text(yaml.safe_dump({key: value for key, value in RECIPE.items() if key != "data"}))
    server = Server(data)
    try:
        server.plan["train/shard-000003.tar"], server.plan["test/shard-000000.tar"] = ["500"], ["cut"]
        remote, local = ["--data.path", server.url, "--data.cache_dir", str(cache)], ["--data.path", str(data)]
        plans = [plan(recipe, options, capsys) for options in (remote, local)]
        assert plans[0]["steps"] == plans[1]["steps"]
        said = complete(recipe, tmp_path / "http", *remote)
        tars = {name: count for name, count in dict(server.requests).items() if name.endswith(".tar")}
        assert tars == {f"{path.parent.name}/{path.name}": 1 for path in data.rglob("*.tar")} | {
            "train/shard-000003.tar": 2,
            "test/shard-000000.tar": 2,
        }
        there = plan(recipe, [*remote, "--out", str(tmp_path / "http")], capsys)
        assert {step["state"] for step in there["steps"]} == {"kept"}
    finally:
        server.close()
    complete(recipe, tmp_path / "disk", *local)
    assert re.search(r"\] learngene: complete after", said)
    found, wanted = figures(tmp_path / "http"), figures(tmp_path / "disk")
    for family in (found, wanted):
        assert family["recipe"]["data"].pop("path") in (server.url, str(data))
        del family["recipe"]["data"]["cache_dir"]
    assert found == wanted
