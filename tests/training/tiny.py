"""A CLIP small enough for exact comparisons, its stages, and fixed batches."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from mmlg_scale import recipe, towers
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.stages import ClipStage, ElasticStage, ExtractionStage, Stage
from mmlg_scale.training.teacher import LiveTeacher

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 3},
}
BATCH, STEPS = 32, 3
KINDS = ("ancestor", "extraction")
ANY_SIZE = {tower: {"layers": [1, 1000], "width": [1, 100_000]} for tower in ("image", "text")}
"""For learngenes of tests: no size is outside what was trained."""
OPTIMIZER = recipe.Optimizer(learning_rate=0.05, weight_decay=0.0, gradient_clipping=0.0)


def batch(step: int, context_length: int = 8, captions: int = 1) -> tuple[Tensor, Tensor]:
    """Images [32, 3, 16, 16] and token ids [32 captions, T] whose end token (19) is at different places: below 8, in a longer context's
    second half of the rows from 8 on."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    texts = torch.randint(3, 19, (BATCH * captions, context_length), generator=generator)
    for row in range(len(texts)):
        end = 3 + row % 5 + (6 if context_length > 8 and row >= len(texts) // 2 else 0)
        texts[row, end] = 19
        texts[row, end + 1 :] = 0
    return images, texts


def build_stage(
    kind: str,
    device: torch.device,
    *,
    accumulation: int = 1,
    patch_dropout: float = 0.0,
    shard: bool = False,
    compiled: bool = False,
    context_length: int = 8,
) -> Stage:
    """`ancestor` (only contrastive) or `extraction` (auxiliary model, hidden states, all terms), with `affinity`, or 3 `students`.

    `pretraining` is the auxiliary model without an ancestor, `in_place` the same with three sizes a step, of which the greatest teaches;
    `factorised` is `extraction` with a token embedding of rank 5.
    `siglip` and `siglip_extraction` are the same two with SigLIP's loss. `shard`, `compiled`: the teacher.
    """
    training = recipe.Training(steps=STEPS, batch_size=BATCH, optimizer=OPTIMIZER, accumulation=accumulation)
    vision = {**CONFIG["vision_cfg"], "patch_dropout": patch_dropout}  # type: ignore[dict-item]
    text = {**CONFIG["text_cfg"], "context_length": context_length}  # type: ignore[dict-item]
    config = towers.model_config(CONFIG | {"vision_cfg": vision, "text_cfg": text})
    if kind.startswith("siglip"):
        config = towers.with_logit_bias(config)
    model = towers.Bundle(towers.ModelSpec(config), towers.build_clip(config, seed=1).state_dict())
    if kind in ("ancestor", "siglip"):
        return ClipStage("ancestor", model, training, device, seed=4)
    if kind in ("pretraining", "in_place"):
        sandwich = {"students_per_step": 3, "sampling": "sandwich", "in_place": 4.0, "width_shares": [1.0, 0.5]}
        elastic = recipe.Pretraining(training=training, min_layers=2, **(sandwich if kind == "in_place" else {}))  # type: ignore[arg-type]
        return ElasticStage(elastic, AuxiliaryCLIP.fresh(Structure(config, num_knots=4), seed=2), model.spec, device, seed=3)
    rank = 5 if kind == "factorised" else None
    auxiliary = AuxiliaryCLIP.from_ancestor(model.state, Structure(config, num_knots=4, embedding_rank=rank), seed=2)
    loss = recipe.DistillationLoss(affinity=2.0 if kind == "affinity" else 0.0)
    more = {"students_per_step": 3 if kind == "students" else 1, "embedding_rank": rank}
    settings = recipe.Extraction(training=training, min_layers=2, loss=loss, **more)
    return ExtractionStage(settings, auxiliary, LiveTeacher(model, device, shard=shard, compiled=compiled), device, seed=3)


def plain_loss(stage: Stage, step: int, captions: int = 1) -> Tensor:
    """The loss of a step on the whole batch in one piece, in one process; of several captions, without a teacher, one after the other."""
    images, texts = batch(step, towers.context_length(stage.spec.config), captions)
    if captions > 1 and stage.teacher is None:
        parts = [texts[number::captions] for number in range(captions)]
        return torch.stack([stage.objective(stage.model(images, part), None, part)[0] for part in parts]).mean()
    patches = stage.patches(step, 0, BATCH)
    targets = stage.targets(nullcontext, Inputs(images, texts, patches))
    losses = []
    for student in stage.students(step):
        outputs = stage.model(images, texts, patches=patches, **student)
        losses.append(stage.objective(outputs, targets, texts)[0])
        targets = stage.next_targets(targets, outputs)
    return torch.stack(losses).mean()


def plain_updates(stage: Stage, captions: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Parameters before, and after three plain torch.optim.SGD steps on whole batches; the norm of the last step's gradients."""
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    optimizer = torch.optim.SGD(stage.parameter_groups())
    for step in range(STEPS):
        optimizer.zero_grad()
        plain_loss(stage, step, captions).backward()
        optimizer.step()
    norms = [parameter.grad.norm() for parameter in stage.model.parameters() if parameter.grad is not None]
    return before, stage.model.state_dict(), float(torch.stack(norms).norm())
