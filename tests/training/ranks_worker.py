"""Run under torchrun by test_zero.py: three SGD steps of a stage under DeepSpeed, then the gathered parameters to a file."""

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from mmlg_scale import recipe
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from tests.training.tiny import BATCH, OPTIMIZER, STEPS, batch, build_stage


def main(kind: str, zero_stage: int, out: Path) -> None:
    settings = recipe.Engine(zero_stage=zero_stage)  # type: ignore[arg-type]
    device = start_ranks(settings)
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
    stop_ranks()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
