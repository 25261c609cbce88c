"""Run by test_zero.py: many cases in turn in one pair of ranks, because a process start costs more than a case.

MORE are those that combine what other cases show apart: for `pytest -m slow`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor

from mmlg_scale import recipe, towers
from mmlg_scale.runtime import Runtime
from mmlg_scale.towers import compiled
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.stages import ClipStage, ExtractionStage, Stage
from mmlg_scale.training.state import write_files
from mmlg_scale.training.step import compute_gradients
from tests.training.tiny import BATCH, OPTIMIZER, STEPS, batch, build_stage


@dataclass(frozen=True)
class Case:
    """Three SGD steps of a stage under DeepSpeed; `change` is what is done to the loss."""

    kind: str
    zero_stage: int
    accumulation: int = 1
    patch_dropout: float = 0.0
    checkpointing: bool = False
    precision: str = "fp32"
    per_layer: bool = False
    shard: bool = False
    packed: bool = False
    compiled: bool = False
    captions: int = 1
    change: str | None = None

    @property
    def name(self) -> str:
        parts = [self.kind, f"zero{self.zero_stage}", self.precision]
        parts += [f"a{self.accumulation}"] if self.accumulation > 1 else []
        parts += [f"p{self.patch_dropout}"] if self.patch_dropout else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["per-layer"] if self.per_layer else []
        parts += ["sharded-teacher"] if self.shard else []
        parts += ["packed"] if self.packed else []
        parts += ["compiled"] if self.compiled else []
        parts += [f"c{self.captions}"] if self.captions > 1 else []
        return "-".join([*parts, *([self.change] if self.change else [])])


KINDS = ("ancestor", "extraction")
CONTEXT = 16
COMPILED = [
    Case("ancestor", 3, compiled=True),  # by default
    *(Case("ancestor", zero, compiled=True) for zero in (0, 1)),
    Case("extraction", 2, 2, 0.5, compiled=True),
    Case("extraction", 3, checkpointing=True, per_layer=True, compiled=True),
    Case("extraction", 3, shard=True, compiled=True),
]
EXACT = [
    *(Case(kind, zero) for zero in (0, 1, 2, 3) for kind in KINDS),
    *(Case(kind, zero, 4, 0.5) for zero in (0, 2, 3) for kind in KINDS),
    *(Case(kind, zero, 1, 0.5, True) for zero in (1, 3) for kind in KINDS),
    Case("extraction", 2, 2, 0.5, True),
    *(Case("extraction", zero, checkpointing=True, per_layer=True) for zero in (1, 2, 3)),
    *(Case(kind, zero, parts) for zero, parts in ((1, 1), (3, 2)) for kind in ("affinity", "students")),
    *(Case("siglip", zero, parts) for zero, parts in ((0, 1), (2, 4))),
    Case("siglip_extraction", 3),
    *(Case(kind, zero, parts) for zero, parts in ((0, 1), (3, 2)) for kind in ("pretraining", "in_place", "factorised")),
    *(Case("extraction", zero, parts, dropout, shard=True) for zero, parts, dropout in ((0, 1, 0.0), (3, 4, 0.5))),
    *(Case("extraction", zero, parts, checkpointing=zero == 3, shard=zero == 3, packed=True) for zero, parts in ((1, 1), (3, 2))),
    Case("ancestor", 0, change="own_gather"),
    *(Case("ancestor", zero, parts, captions=3) for zero, parts in ((1, 1), (3, 4))),
    *(Case("extraction", zero, 2, 0.5, packed=zero == 0, captions=2) for zero in (0, 2)),
    Case("affinity", 0, captions=2),
    *COMPILED,
]
WRONG = [
    Case("ancestor", 0, change="world_factor"),
    Case("extraction", 2, change="world_factor"),
    Case("ancestor", 2, change="detached_gather"),
]
COMPILED_BF16 = [Case("extraction", 1, precision="bf16", compiled=True), Case("ancestor", 3, precision="bf16", compiled=True)]
BF16 = [*(Case(kind, zero, precision="bf16") for zero in (0, 1, 2, 3) for kind in KINDS), *COMPILED_BF16]
MUON = [("ancestor", 0), ("extraction", 1), ("ancestor", 2), ("factorised", 2)]
RESUMED = [(kind, zero, "adamw") for zero in (0, 1, 2, 3) for kind in KINDS] + [("extraction", 2, "muon")]
MORE = {
    *COMPILED[1:],
    *COMPILED_BF16,
    *(Case(kind, zero, 4, 0.5) for kind, zero in (("ancestor", 0), ("ancestor", 2), ("extraction", 2), ("extraction", 3))),
    *(Case(kind, zero, 1, 0.5, True) for kind, zero in (("ancestor", 1), ("extraction", 3))),
    Case("extraction", 2, checkpointing=True, per_layer=True),
    *(Case(kind, 1) for kind in ("affinity", "students")),
    *(Case(kind, 0) for kind in ("pretraining", "in_place")),
    *(Case(kind, zero, precision="bf16") for kind, zero in (("ancestor", 0), ("extraction", 1), ("ancestor", 2), ("extraction", 3))),
    *((kind, zero, "adamw") for kind, zero in (("extraction", 0), ("ancestor", 1), ("extraction", 2), ("ancestor", 3))),
}
assert {*EXACT, *BF16, *RESUMED} >= MORE


class OwnContrastive(ClipStage):
    """The ancestor's loss written out: local rows against all features, which are gathered with or without gradient."""

    detached = False

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_NT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        image, text = (F.normalize(outputs[f"{tower}_features"], dim=-1) for tower in ("image", "text"))
        labels = torch.arange(len(image)) + dist.get_rank() * len(image)
        logits = [outputs["logit_scale"] * one @ self._gather(other).T for one, other in ((image, text), (text, image))]
        loss = (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2
        return loss, {"contrastive": loss}

    def _gather(self, local_BD: Tensor) -> Tensor:
        padding = [torch.zeros_like(local_BD) for _ in range(dist.get_world_size())]
        padding[dist.get_rank()] = local_BD
        everything = all_reduce(torch.cat(padding))
        if not self.detached:
            return everything
        rows = [part.detach() for part in everything.chunk(dist.get_world_size())]
        rows[dist.get_rank()] = local_BD
        return torch.cat(rows)


def changed(stage: Stage, change: str | None) -> Stage:
    """The stage with its loss computed as `change` says."""
    if change == "world_factor":
        right = stage.objective

        def scaled(*args: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, terms = right(*args)
            return loss * dist.get_world_size(), terms

        stage.objective = scaled  # type: ignore[method-assign]
    elif change is not None:
        stage.__class__ = OwnContrastive
        stage.detached = change == "detached_gather"  # type: ignore[attr-defined]
    return stage


def make(case: Case, device: torch.device, name: str = "sgd") -> tuple[Stage, Engine]:
    """The case's stage and an engine around it."""
    stage = build_stage(
        case.kind,
        device,
        accumulation=case.accumulation,
        patch_dropout=case.patch_dropout,
        shard=case.shard,
        compiled=case.compiled,
        context_length=CONTEXT,
    )
    if isinstance(stage, ExtractionStage):
        stage.compose_per_layer = case.per_layer
        kept = [p.to_local() if isinstance(p, DTensor) else p for p in stage.teacher.model.parameters()]
        share = sum(p.numel() for p in kept) / sum(p.numel() for p in stage.teacher.model.parameters())
        assert share < 0.55 if case.shard else share == 1
    runtime = Runtime(
        zero_stage=case.zero_stage,  # type: ignore[arg-type]
        persistence_threshold=0,  # else ZeRO-3 leaves models as small as these whole on every rank
        activation_checkpointing=case.checkpointing,
        compile=case.compiled,
    )
    optimizer = OPTIMIZER if name == "sgd" else recipe.Optimizer(name=name, learning_rate=1e-3)  # type: ignore[arg-type]
    stage.training.optimizer = optimizer
    engine = Engine(
        stage.model,
        stage.parameter_groups(),
        runtime=runtime,
        batch_size=BATCH,
        optimizer=optimizer,
        precision=case.precision,
        sgd=name == "sgd",
    )
    if case.zero_stage == 3:
        assert all(parameter.numel() == 0 for parameter in stage.model.parameters())  # each rank holds only its part
    return changed(stage, case.change), engine


def advance(stage: Stage, engine: Engine, steps: range, *, packed: bool = False, captions: int = 1) -> None:
    share, rank = BATCH // dist.get_world_size(), dist.get_rank()
    for step in steps:
        images, texts = batch(step, CONTEXT, captions)
        rows, text = slice(rank * share, (rank + 1) * share), texts[rank * share * captions : (rank + 1) * share * captions]
        # The first rank's captions are short, and cut; the second's are not: each rank decides for itself.
        text = text[:, : towers.cut_length(text)]
        assert text.shape[1] == (8 if dist.get_rank() == 0 else CONTEXT)
        compute_gradients(stage, engine, Inputs(images[rows], text, lengths=towers.lengths_of(text), packed=packed), step)
        engine.step(rate_factor=1.0)


def finish(engine: Engine, file: Path) -> None:
    state = engine.state_dict()
    engine.close()
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def resume(kind: str, zero_stage: int, name: str, device: torch.device, out: Path) -> None:
    """Four steps in one go, and the last two of them again from a checkpoint in between."""
    case = Case(kind, zero_stage)
    stage, engine = make(case, device, name)
    advance(stage, engine, range(2))
    folder = out / f"checkpoint-{case.name}-{name}"
    folder.mkdir(exist_ok=True)
    for _ in write_files(engine.copies(), folder):
        pass
    dist.barrier()
    advance(stage, engine, range(2, 4))
    finish(engine, out / f"straight-{case.name}-{name}.safetensors")
    stage, engine = make(case, device, name)
    engine.load(folder)
    advance(stage, engine, range(2, 4))
    finish(engine, out / f"resumed-{case.name}-{name}.safetensors")


def main(out: Path, more: bool) -> None:
    device = start_ranks(Runtime())
    if not more:
        compiled.BACKEND = "aot_eager"  # the same graphs, run by torch's own operators
    for case in (*EXACT, *WRONG, *BF16):
        if (case in MORE) != more:
            continue
        stage, engine = make(case, device)
        advance(stage, engine, range(STEPS), packed=case.packed, captions=case.captions)
        (out / f"{case.name}-rank{dist.get_rank()}.norm").write_text(str(float(engine.gradient_norm)))
        finish(engine, out / f"{case.name}.safetensors")
    for kind, zero_stage in () if more else MUON:
        case = Case(kind, zero_stage)
        stage, engine = make(case, device, "muon")
        advance(stage, engine, range(STEPS))
        finish(engine, out / f"muon-{case.name}.safetensors")
    for kind, zero_stage, name in RESUMED:
        if ((kind, zero_stage, name) in MORE) == more:
            resume(kind, zero_stage, name, device, out)
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), more=sys.argv[2] == "more")
