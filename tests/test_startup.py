"""Which heavy packages stay out of commands that do not need them: each costs up to seconds in every command, rank and loader worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmlg_scale import towers
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.learngene.structure import Structure
from tests.training.tiny import ANY_SIZE, CONFIG

HEAVY = ("open_clip", "torchvision", "timm", "transformers", "deepspeed", "tensorboard", "wandb", "torch._dynamo", "sympy", "triton")
ALSO_HEAVY = ("scipy", "matplotlib", "jinja2", "ftfy", "datasets", "pandas")
SCRIPT = """
import json, sys
from mmlg_scale.cli import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
print("LOADED", json.dumps(sorted({*json.loads(sys.argv[2])} & {*sys.modules})))
"""


def loaded(*commands: list[str]) -> list[str]:
    """Which of the heavy packages a fresh process has after these commands."""
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps([*HEAVY, *ALSO_HEAVY])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.rpartition("LOADED ")[2])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a learngene."""
    root = tmp_path_factory.mktemp("startup")
    write_scenes(root / "data", num_train=8, num_val=4, num_test=4)
    tokenizer = open_pairs(root / "data").tokenizer
    assert tokenizer is not None
    text = {**CONFIG["text_cfg"], "vocab_size": tokenizer.vocab_size, "context_length": 16}
    spec = towers.ModelSpec(towers.model_config({**CONFIG, "text_cfg": text}), tokenizer=tokenizer)
    auxiliary = AuxiliaryCLIP.from_ancestor(
        towers.build_clip(spec.config, seed=0).state_dict(), Structure(spec.config, num_knots=2), seed=0
    )
    gene = Learngene.from_auxiliary(auxiliary.structure, auxiliary.state_dict(), spec=spec, extraction={}, trained=ANY_SIZE)
    gene.save(root / "learngene.safetensors")
    return root


def test_commands_import_what_they_need(folder: Path) -> None:
    """Evaluating imports all that a loader worker does, too."""
    descend = [
        "descend",
        str(folder / "learngene.safetensors"),
        "--image-layers",
        "3",
        "--text-layers",
        "2",
        "--out",
        str(folder / "model"),
    ]
    evaluate = ["eval", str(folder / "model"), "--data", str(folder / "data")]
    assert loaded(["--help"], ["train", "demo", "--print-config"], descend, evaluate) == []
