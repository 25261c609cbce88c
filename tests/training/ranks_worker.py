"""Run under torchrun by test_zero.py: three SGD steps of each stage under DeepSpeed, then the gathered parameters to files."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mmlg_scale import recipe
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from tests.training.tiny import BATCH, KINDS, OPTIMIZER, STEPS, batch, build_stage


def main(zero_stage: int, out: Path) -> None:
    settings = recipe.Engine(zero_stage=zero_stage)  # type: ignore[arg-type]
    device = start_ranks(settings)
    for kind in KINDS:
        train(kind, settings, device, out / f"{kind}.safetensors")
    stop_ranks()


def train(kind: str, settings: recipe.Engine, device: torch.device, out: Path) -> None:
    stage = build_stage(kind, device)
    engine = Engine(stage.model, stage.parameter_groups(), settings=settings, batch_size=BATCH, optimizer=OPTIMIZER, name="sgd")
    share = BATCH // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    for step in range(STEPS):
        images, texts = batch(step)
        loss, _ = stage.loss(engine, engine.autocast, images[rows], texts[rows], step)
        engine.step(loss, rate_factor=1.0)
    state = engine.state_dict()
    engine.close()
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
