"""What does composing weights cost one extraction step of the real ViT-B-32 auxiliary model, in operators and in memory?

    python -m benchmarks.extraction_step                   # table; about a minute on two cores
    python -m benchmarks.extraction_step --out DIR         # and extraction_step.json

Three ways of composing the layers' weights out of the blocks: one product per matrix (as eager torch does it), `block_transfer` of all
layers at once, and one layer at a time inside activation-checkpointed layers (`runtime.compose_per_layer`). Each runs in a process of
its own, since a process's peak memory only rises. Operators are counted by the profiler while the weights are composed, those that only
view or allocate left out; memory is the process's peak in one forward and backward pass (random weights, 8 pairs, contrastive loss, fp32,
all blocks checkpointed), less what the process held before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import torch
from mmlg_kernels import contrastive_loss
from torch import Tensor

from benchmarks import measure
from benchmarks.block_transfer import num_operators
from mmlg_scale import towers
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.blocks import narrow
from mmlg_scale.learngene.compose import Get, Layer, Sizes, _vectors, compose_layers, compose_lazily
from mmlg_scale.learngene.mixing import interpolate
from mmlg_scale.learngene.structure import Structure

MODES = ("per matrix", "all at once", "layer by layer")
BATCH = 8


def compose_per_matrix(structure: Structure, get: Get, sizes: Sizes, *, dtype: torch.dtype | None = None) -> dict[str, list[Layer]]:
    """The same layers, by slicing, concatenating and one matrix product for each of the four matrices of each tower."""
    found = {}
    for tower, (num_layers, width) in sizes.items():
        (coefficients_LGK,) = interpolate([get(f"coefficients_{tower}")], [num_layers])
        (vectors_LV,) = interpolate([get(f"vectors_{tower}")], [num_layers])
        found[tower] = _vectors(structure, tower, width, vectors_LV)
        for index, entry in enumerate(structure.layout(tower, width).matrices):
            blocks = []
            for name, owner in (("multimodal", structure.wide), (f"unimodal_{tower}", tower)):
                matrix_K = structure.layout(owner).matrices[index].view(get(name))
                blocks.append(narrow(entry.name, matrix_K, entry.shape).flatten(1))
            for layer, values in zip(found[tower], (coefficients_LGK[:, index] @ torch.cat(blocks)).unbind(0), strict=True):
                layer[entry.name] = values.unflatten(0, entry.shape)
    return found


def make_step(model: str, mode: str) -> tuple[measure.Step, measure.Step]:
    """Composing the weights, and a whole step, of a model's auxiliary CLIP."""
    config = towers.model_config(model)
    structure = Structure(config)
    auxiliary = AuxiliaryCLIP.from_ancestor(towers.build_clip(config, seed=0).state_dict(), structure, seed=1)
    compose = compose_per_matrix if mode == "per matrix" else compose_layers
    layers = {tower: towers.num_layers(config, tower) for tower in ("image", "text")}
    size = towers.image_size(config)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, size, size, generator=generator)
    texts = torch.randint(1, 1000, (BATCH, towers.context_length(config)), generator=generator)

    def forward() -> Tensor:
        with mock.patch("mmlg_scale.learngene.auxiliary.compose_layers", compose):
            outputs = auxiliary(
                images,
                texts,
                image_layers=layers["image"],
                text_layers=layers["text"],
                checkpoint=True,
                compose_per_layer=mode == "layer by layer",
            )
        return contrastive_loss(outputs["image_features"], outputs["text_features"], outputs["logit_scale"], normalize=True)

    sizes = {tower: (count, None) for tower, count in layers.items()}
    alone = measure.Step(lambda: compose(structure, auxiliary._get, sizes), lambda value: None)
    if mode == "layer by layer":

        def each() -> list[Layer]:
            return [make() for made in compose_lazily(structure, auxiliary._get, sizes).values() for make in made]

        alone = measure.Step(each, lambda value: None)
    return alone, measure.Step(forward, lambda loss: torch.autograd.grad(loss, list(auxiliary.parameters()), allow_unused=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--out", type=Path, default=None, help="folder for extraction_step.json")
    parser.add_argument("--peak-of", choices=MODES, default=None, help="print this mode's extra bytes, in this process")
    args = parser.parse_args()
    if args.peak_of:
        # The smallest configuration first, so that libraries have their memory.
        measure.print_extra_bytes(make_step("ViT-S-32-alt", args.peak_of)[1], lambda: make_step(args.model, args.peak_of)[1])
        return
    rows = []
    print("| composing | operators | extra memory of a step |\n|---|---|---|")
    for mode in MODES:
        compose, _ = make_step(args.model, mode)
        compose.forward()  # plans are made once
        row = {"mode": mode, "operators": num_operators(compose)}
        row["extra_bytes"] = measure.extra_bytes_of_process("benchmarks.extraction_step", mode, "--model", args.model)
        rows.append(row)
        print(f"| {mode} | {row['operators']} | {int(row['extra_bytes']) / 2**30:.2f} GiB |", flush=True)
    if args.out is not None:
        content = {"model": args.model, "batch": BATCH, "environment": measure.environment("cpu"), "rows": rows}
        (args.out / "extraction_step.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
