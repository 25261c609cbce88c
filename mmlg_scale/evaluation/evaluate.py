"""Retrieval and zero-shot metrics of a pair of encoders on an evaluation split, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmlg_scale.data.pipeline import EvalSplit
from mmlg_scale.evaluation.retrieval import recall_at_k
from mmlg_scale.evaluation.zeroshot import class_embeddings, zero_shot_metrics

Encoder = Callable[[Tensor], Tensor]


def encode_in_chunks(encode: Encoder, inputs: Tensor, device: torch.device, *, chunk_size: int = 256) -> Tensor:
    """`encode` over the rows of `inputs`, moved to `device` chunk by chunk -> fp32 features [N, D] on the CPU."""
    parts = [encode(chunk.to(device)).float().cpu() for chunk in inputs.split(chunk_size)]
    return torch.cat(parts)


def evaluate_pairs(
    encode_image: Encoder,
    encode_text: Encoder,
    split: EvalSplit,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    classes: dict[str, list[str]] | None = None,
    tokenize: Callable[[list[str]], Tensor] | None = None,
) -> dict[str, float]:
    """Retrieval both ways on `split`; with `classes` ({"classnames", "templates"}) and a labelled split, zero-shot metrics too.

    Args:
        encode_image: float images [n, 3, H, W] -> features [n, D].
        encode_text: token ids [n, T] -> features [n, D].
        preprocess: uint8 -> normalised float images.
        tokenize: captions -> token ids; needed with `classes`.
    """
    image_ND = encode_in_chunks(lambda images: encode_image(preprocess(images)), split.images_uint8_NCHW, device)
    text_MD = encode_in_chunks(encode_text, split.texts_MT, device)
    metrics = recall_at_k(image_ND, text_MD, split.text_to_image_M)
    if classes is not None and split.labels_N is not None:
        assert tokenize is not None
        class_CD = class_embeddings(
            lambda texts: encode_in_chunks(encode_text, texts, device),
            tokenize,
            classes["classnames"],
            classes["templates"],
        )
        metrics |= zero_shot_metrics(image_ND, class_CD, split.labels_N)
    return metrics


def retrieval_features(
    encode_image: Encoder,
    encode_text: Encoder,
    split: EvalSplit,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Features of a whole split, for drawing retrieval samples: {"image_ND", "text_MD"}."""
    return {
        "image_ND": encode_in_chunks(lambda images: encode_image(preprocess(images)), split.images_uint8_NCHW, device),
        "text_MD": encode_in_chunks(encode_text, split.texts_MT, device),
    }
