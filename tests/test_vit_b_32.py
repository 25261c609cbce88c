"""The real ViT-B/32 through a user's commands: weights from a file, JPEG shards, the BPE tokenizer, two steps of extraction."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmlg_scale import load_learngene, towers
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.structure import Structure

pytestmark = pytest.mark.slow
DEPTHS = (12, 9, 6, 4, 3)


def mmlg(*words: str | Path) -> float:
    """Run a command; returns its seconds."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "mmlg_scale", *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, 224-pixel shards, and the learngene after two steps."""
    root = tmp_path_factory.mktemp("b32")
    rng = np.random.default_rng(0)
    with open(root / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("filepath", "caption", "split"))
        for index in range(16):
            blurred = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
            blurred.save(root / f"{index}.jpg", quality=90)
            rows.writerow((f"{index}.jpg", f"a blurred pattern, number {index}", ("train", "val", "test")[min(2, index // 6)]))
    state = towers.build_clip(towers.model_config("ViT-B-32"), seed=3).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, root / "ancestor.safetensors")
    mmlg("data", "pack", root / "table.csv", "--out", root / "data", "--tokenizer", "bpe")
    small = ["steps=2", "batch_size=4", "eval_every=2"]
    options = [f"--extraction.training.{option}" for option in small]
    options += ["--data.path", str(root / "data"), "--runtime.num_workers=0", "--engine.precision=fp32", "--runtime.zero_stage=0"]
    mmlg("extract", "vit-b-32", "--ancestor-model", root / "ancestor.safetensors", "--out", root / "gene", *options)
    return root


def test_storage(folder: Path) -> None:
    """At equal precision: <= 31 % of the ancestor with M and U, <= 25 % with only M, <= 10 % of the family of five."""
    gene = folder / "gene" / "learngene.safetensors"
    config = towers.model_config("ViT-B-32")
    ancestor = (folder / "ancestor.safetensors").stat().st_size
    assert gene.stat().st_size / ancestor <= 0.31
    family = sum(
        4 * sum(p.numel() for p in towers.build_meta(towers.with_sizes(config, image_layers=n, text_layers=n)).parameters()) for n in DEPTHS
    )
    assert gene.stat().st_size / family <= 0.10
    alone = Structure(config, num_unimodal=0)
    assert 4 * sum(math.prod(shape) for shape in alone.shapes().values()) / ancestor <= 0.25


@pytest.mark.parametrize("sizes", [(n, n, None, None, "both") for n in DEPTHS] + [(6, 4, 512, 256, "both"), (5, None, 384, None, "image")])
def test_descendants(folder: Path, sizes: tuple[int | None, ...]) -> None:
    """Written by the command, loaded by open_clip, and equal to the auxiliary model to 1e-4."""
    names = ("image_layers", "text_layers", "image_width", "text_width")
    wanted = {name: value for name, value in zip(names, sizes, strict=False) if value is not None}
    modality, out = str(sizes[-1]), folder / "-".join(map(str, sizes))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    mmlg("descend", folder / "gene" / "learngene.safetensors", "--out", out, "--modality", modality, *options)
    learngene = load_learngene(folder / "gene" / "learngene.safetensors")
    model = AuxiliaryCLIP(learngene.structure).eval()
    model.load_state_dict({name.replace(".", "/"): tensor for name, tensor in learngene.tensors.items()})
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    texts = towers.BytePairTokenizer()(["a blurred pattern", "something else altogether"], 77)
    with torch.no_grad():
        expected = model(images, texts if modality == "both" else None, **wanted)
        if modality == "image":
            found = {"image": towers.load_tower(out).eval()(images)}
        else:
            clip = towers.open_clip.create_model(f"local-dir:{out}").eval()
            found = {"image": clip.encode_image(images), "text": clip.encode_text(texts)}
    for tower, features in found.items():
        wanted_features = expected[f"{tower}_features"]
        assert (features - wanted_features).norm() <= 1e-4 * wanted_features.norm()
