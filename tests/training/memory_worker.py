"""Run by test_memory.py, one process for each rank: the peak of tensor memory of real training steps, by torch's profiler."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmlg_scale import recipe, towers
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.stages import ClipStage
from mmlg_scale.training.step import compute_gradients

STEPS = 2
"""The last of them is looked at: moments are there then."""


def peak_bytes(config: dict[str, Any], runtime: Runtime, batch_size: int, captions: int) -> int:
    """The most bytes of tensors that this rank holds at once in the last step."""
    gc.collect()  # what another case has left would be freed, but not allocated, before the profiler's eyes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = towers.Bundle(towers.ModelSpec(config), towers.build_clip(config, seed=0).state_dict())
        training = recipe.Training(steps=10, batch_size=batch_size)
        stage = ClipStage("ancestor", model, training, torch.device("cpu"))
        del model
        engine = Engine(stage.model, stage.parameter_groups(), runtime=runtime, batch_size=batch_size, optimizer=training.optimizer)
        rows = batch_size // dist.get_world_size()
        for step in range(STEPS):
            with torch.profiler.record_function(f"step {step}"):
                size = towers.image_size(config)
                inputs = Inputs(torch.randn(rows, 3, size, size), torch.randint(1, 50, (rows * captions, towers.context_length(config))))
                loss, _ = compute_gradients(stage, engine, inputs, step)
                engine.step(1.0, loss)
        del inputs, loss
        engine.close()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    start = next(event.start_ns() for event in events if event.name() == f"step {STEPS - 1}")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for moment, change in changes:
        held += change
        if moment >= start:
            peak = max(peak, held)
    return peak


def main(file: Path, content: str) -> None:
    found = []
    start_ranks(Runtime())
    for case in json.loads(content):
        runtime = Runtime(**case["runtime"])
        found.append(peak_bytes(towers.model_config(case["config"]), runtime, case["batch_size"], case["captions"]))
        dist.barrier()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
