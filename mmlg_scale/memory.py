"""Bytes that training takes, in memory and on disk: formulas for `mmlg plan` and for the check before a checkpoint is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmlg_scale.accounting import BYTES_PER_PARAMETER, height_and_width
from mmlg_scale.towers import num_patches


def state_bytes(params: int, *, zero_stage: int, ranks: int) -> dict[str, float]:
    """Bytes on each rank of what training keeps of `params` fp32 parameters: {"weights", "gradients", "optimizer"}.

    AdamW has two moments. From ZeRO stage 1 on, the optimiser's part is divided among the ranks and holds a copy of the weights; stage 2
    divides the gradients too, stage 3 the weights. DeepSpeed's buffers are not counted.
    """
    part = params / ranks
    return {
        "weights": BYTES_PER_PARAMETER * (part if zero_stage == 3 else params),
        "gradients": BYTES_PER_PARAMETER * (part if zero_stage >= 2 else params),
        "optimizer": BYTES_PER_PARAMETER * (3 * part if zero_stage else 2 * params),
    }


def peak_bytes(
    params: int,
    *,
    zero_stage: int,
    ranks: int,
    activations: float,
    bucket_size: int,
    overlap: bool,
    bf16_communication: bool = False,
    accumulates: bool = False,
) -> dict[str, float]:
    """Bytes of one rank at the fullest moment of a step of AdamW: {"weights", "optimizer", "gradients", "buffers", "activations"}.

    That is either near the beginning of the backward pass, with all activations and no gradients of weights, or where it ends, with all
    gradients and what DeepSpeed needs to exchange them. In between, each layer's gradients take the place of its activations. At the end
    stage 0 flattens all gradients; stage 1 has them all, and a bucket or its own part of them flat; stage 2 copies its own part twice and
    flattens a bucket. Stages 1 and 2 have buffers of a bucket, two with overlap. Checked against torch's profiler within 10 % at stages 0
    to 2 (tests/training/test_memory.py); of stage 3, gathered parameters are not counted.

    Args:
        activations: bytes that the forward pass keeps, and those that the backward pass needs besides.
        bucket_size: numbers in a bucket, at most `params`.
        accumulates: whether a forward pass runs when gradients of another are there already (micro-batches, several students).
    """
    state = state_bytes(params, zero_stage=zero_stage, ranks=ranks)
    whole, part = BYTES_PER_PARAMETER * params, BYTES_PER_PARAMETER * params / ranks
    bucket = BYTES_PER_PARAMETER * min(bucket_size, params) if zero_stage else 0
    second = bucket if overlap and zero_stage in (1, 2) else 0
    gradients = whole if zero_stage < 2 else part
    exchanged = {
        0: whole * (2 if ranks > 1 else 1),
        1: whole + max(bucket, part) + second,
        2: bucket + max(bucket + 2 * part * (1 - bucket / whole), 2 * part) + second,
        3: part + bucket,
    }[zero_stage]
    if bf16_communication and ranks > 1:
        exchanged += (bucket or whole) / 2
    fixed = {"weights": state["weights"], "optimizer": state["optimizer"]}
    begin = {"gradients": gradients if accumulates else 0.0, "buffers": bucket + second, "activations": activations}
    end = {"gradients": gradients, "buffers": exchanged - gradients, "activations": 0.0}
    return fixed | max(begin, end, key=lambda moment: sum(moment.values()))


def checkpoint_bytes(params: int) -> int:
    """About what a checkpoint takes on disk: a parameter in fp32 and AdamW's two moments."""
    return 3 * BYTES_PER_PARAMETER * params


def activation_bytes(
    config: Mapping[str, Any], *, bf16: bool, checkpointing: bool, captions: int = 1, pooled: Collection[str] = ("image", "text")
) -> int:
    """About what the forward pass on one image and its captions keeps for the backward pass, in bytes.

    A block keeps for each token the inputs of its norms and products: 8 + 2 x mlp_ratio numbers a channel, of which the two inputs of the
    norms are fp32 and the others are of the precision. With checkpointing, a block's input, and one block at a time whole. Of a `pooled`
    tower's last block (see `accounting.forward_flops`), a norm's input and result, keys and values are kept. Captions are taken as whole,
    and all patches as staying. Not counted: the norms' statistics, projections, the loss.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    height, width = height_and_width(vision.get("image_size", 224))
    tokens = {"vision_cfg": num_patches(config) + 1, "text_cfg": text.get("context_length", 77)}
    total = 3 * 4 * height * width  # the image itself
    number = 2 if bf16 else 4
    for key, tower, default in (("vision_cfg", vision, 768), ("text_cfg", text, 512)):
        channels, layers = tokens[key] * tower.get("width", default), tower.get("layers", 12)
        channels *= captions if key == "text_cfg" else 1
        one_row = "text" in pooled if key == "text_cfg" else "image" in pooled and vision.get("pool_type", "tok") == "tok"
        per_block = channels * (8 + number * (6 + 2 * tower.get("mlp_ratio", 4.0)))
        last = channels * (4 + number * 3) if one_row else per_block
        total += 4 * channels * layers + per_block if checkpointing else per_block * (layers - 1) + last
    return int(total)


def backward_bytes(config: Mapping[str, Any], *, bf16: bool, captions: int = 1) -> int:
    """About what the backward pass holds of one image and its captions besides what was kept: gradients inside one block, of one tower.

    Of the block's result, and of the input and the output of the MLP's activation: 1 + 2 x mlp_ratio numbers a channel.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    image = (num_patches(config) + 1) * vision.get("width", 768) * (1 + 2 * vision.get("mlp_ratio", 4.0))
    caption = captions * text.get("context_length", 77) * text.get("width", 512) * (1 + 2 * text.get("mlp_ratio", 4.0))
    return int((2 if bf16 else 4) * max(image, caption))


def compared_bytes(config: Mapping[str, Any], depths: int, *, captions: int = 1) -> int:
    """About what comparing the hidden states of one image and its captions at so many depths keeps: the teacher's, the student's mapped
    ones, differences."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    image = (num_patches(config) + 1) * vision.get("width", 768)
    return 3 * BYTES_PER_PARAMETER * depths * int(image + captions * text.get("context_length", 77) * text.get("width", 512))


def loss_bytes(batch_size: int, embed_dim: int, *, teacher: bool, captions: int = 1) -> int:
    """What the loss keeps of the whole batch on each rank: both towers' gathered features and their gradients, and a teacher's features.

    No matrix of similarities: the kernels hold a tile of it at a time. Several captions of an image are as many losses.
    """
    return BYTES_PER_PARAMETER * batch_size * captions * embed_dim * (6 if teacher else 4)
