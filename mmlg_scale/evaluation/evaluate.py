"""Retrieval and zero-shot metrics of a pair of encoders on an evaluation split, in chunks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.data.pipeline import EvalSplit, load_eval_split
from mmlg_scale.data.tokens import load_tokenizer
from mmlg_scale.evaluation.retrieval import recall_at_k
from mmlg_scale.evaluation.zeroshot import class_embeddings, zero_shot_metrics

Encoder = Callable[[Tensor], Tensor]


def encode_in_chunks(encode: Encoder, inputs: Tensor, device: torch.device, *, chunk_size: int = 256) -> Tensor:
    """`encode` over the rows of `inputs`, moved to `device` chunk by chunk -> fp32 features [N, D] on the CPU.

    Under several ranks each encodes every world-size-th chunk and all get all features: the same numbers as on one rank. Every rank calls
    `encode` equally often (the last chunk again where there are none left), since under ZeRO-3 a forward pass is a collective.
    """
    chunks = inputs.split(chunk_size)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return torch.cat([encode(chunk.to(device)).float().cpu() for chunk in chunks])
    world_size, parts = dist.get_world_size(), []
    for start in range(0, len(chunks), world_size):
        own = encode(chunks[min(start + dist.get_rank(), len(chunks) - 1)].to(device)).float()
        padded = own.new_zeros(len(chunks[0]), own.shape[1])
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(gathered, padded)
        parts += [part[: len(chunk)].cpu() for part, chunk in zip(gathered, chunks[start : start + world_size], strict=False)]
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


class _Folder:
    """An open_clip folder and a split, ready to encode."""

    def __init__(self, model: Path, data: Path, split: str) -> None:
        config, state = towers.load_clip(model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clip = towers.build_clip(config, seed=0)
        self.clip.load_state_dict(state)
        self.clip.to(self.device).eval()
        self.preprocess = towers.Preprocess()
        self.tokenizer, self.context_length = load_tokenizer(data), towers.context_length(config)
        self.split = load_eval_split(data / split, self.tokenizer, towers.image_size(config), self.context_length)
        classes = data / "classes.json"
        self.classes = json.loads(classes.read_text()) if classes.is_file() else None

    def tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts, self.context_length)


@torch.no_grad()
def evaluate_folder(model: Path, data: Path, split: str) -> dict[str, float]:
    """All metrics of an open_clip folder on a split of a data set.

    Raises:
        UserError: the folder is no model that is carried, or the split is missing.
    """
    folder = _Folder(model, data, split)
    clip = folder.clip
    return evaluate_pairs(
        clip.encode_image,
        clip.encode_text,
        folder.split,
        folder.preprocess,
        folder.device,
        classes=folder.classes,
        tokenize=folder.tokenize,
    )


@torch.no_grad()
def folder_features(model: Path, data: Path, split: str) -> tuple[Tensor, Tensor, EvalSplit]:
    """Features of a split, [N, D] of its images and [M, D] of its captions, and the split itself."""
    folder = _Folder(model, data, split)
    image_ND = encode_in_chunks(
        lambda images: folder.clip.encode_image(folder.preprocess(images)), folder.split.images_uint8_NCHW, folder.device
    )
    return image_ND, encode_in_chunks(folder.clip.encode_text, folder.split.texts_MT, folder.device), folder.split
