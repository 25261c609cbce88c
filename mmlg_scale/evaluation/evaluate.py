"""Retrieval and zero-shot metrics of a pair of encoders on an evaluation split, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale import towers
from mmlg_scale.data.corpus import Corpus, PairSet, open_pairs
from mmlg_scale.data.evaluation import Chunks, EvalSplit, TensorChunks
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.retrieval import recall_at_k
from mmlg_scale.evaluation.zeroshot import class_embeddings, zero_shot_metrics
from mmlg_scale.metric_names import RETRIEVAL
from mmlg_scale.ranks import is_first_rank

Encoder = Callable[[Tensor], Tensor]


def encode_texts(encode: Encoder, texts: Chunks | Tensor, device: torch.device) -> Tensor:
    """`encode_in_chunks` of captions, each chunk cut to its longest one. Those in memory are taken by length."""

    def cut(chunk: Tensor) -> Tensor:
        return chunk[:, : towers.cut_length(chunk)]

    if not isinstance(texts, Tensor):
        return encode_in_chunks(encode, texts, device, prepare=cut)
    order_M = texts.argmax(dim=-1).argsort(stable=True)
    found_MD = encode_in_chunks(encode, texts[order_M], device, prepare=cut)
    return torch.empty_like(found_MD).index_copy_(0, order_M, found_MD)


def encode_in_chunks(
    encode: Encoder, inputs: Chunks | Tensor, device: torch.device, *, prepare: Callable[[Tensor], Tensor] = lambda chunk: chunk
) -> Tensor:
    """`encode` over the rows of `inputs`, prepared and then moved to `device` chunk by chunk -> fp32 features [N, D] on the CPU.

    Under several ranks each reads and encodes every world-size-th chunk and all get all features: the same numbers as on one rank. Every
    rank calls `encode` equally often (the last chunk again where there are none left), since under ZeRO-3 a forward pass is a collective.
    """
    chunks = TensorChunks(inputs) if isinstance(inputs, Tensor) else inputs
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return torch.cat([encode(prepare(chunk).to(device)).float().cpu() for chunk in chunks.read(range(len(chunks)))])
    world_size, parts = dist.get_world_size(), list[Tensor]()
    rounds = range(0, len(chunks), world_size)
    for start, chunk in zip(rounds, chunks.read(min(start + dist.get_rank(), len(chunks) - 1) for start in rounds), strict=True):
        own = encode(prepare(chunk).to(device)).float()
        # Rows of a chunk that is not full, the last one, are preceded by their number.
        padded = own.new_zeros(chunks.chunk_size + 1, own.shape[1])
        padded[0], padded[1 : len(own) + 1] = len(own), own
        gathered = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(gathered, padded)
        parts += [part[1 : int(part[0, 0]) + 1].cpu() for part in gathered[: len(chunks) - start]]
    return torch.cat(parts)


def require_metric(metric: str, split: EvalSplit, where: str) -> None:
    """Raise UserError where a run's metric needs captions, or labels, that not every image of the split has."""
    num_images, num_captioned = len(split.images.samples_N), len(torch.unique(split.text_to_image_M))
    lacking = f"of {num_images} images, {num_captioned} have a caption" if num_captioned < num_images else "not every image has a label"
    if (num_captioned < num_images) if metric in RETRIEVAL else (split.labels_N is None):
        raise UserError(
            f"recipe key evaluation.metric: {metric} cannot be measured on {where}: {lacking}. Use another metric, or other data."
        )


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

    Of a split in which not every image has a caption, only the latter.

    Args:
        encode_image: float images [n, 3, H, W] -> features [n, D].
        encode_text: token ids [n, T], T up to the context length (`towers.cut_length`) -> features [n, D].
        preprocess: uint8 -> normalised float images.
        tokenize: captions -> token ids; needed with `classes`.

    Raises:
        UserError: there is neither a caption for every image nor a label.
    """
    num_captioned = len(torch.unique(split.text_to_image_M))
    is_captioned, is_labelled = num_captioned == len(split.images.samples_N), classes is not None and split.labels_N is not None
    if not is_captioned:
        told = f"{num_captioned} of {len(split.images.samples_N)} images have a caption"
        if not is_labelled:
            raise UserError(
                f"nothing can be measured: {told}, and there is no {'label for each' if classes is not None else 'list of classes'}. "
                "Give captions; or for classification a .cls for each image and classnames.txt, and index again."
            )
        if num_captioned and is_first_rank():
            print(f"retrieval is left out, since only {told}", flush=True)
    image_ND = encode_in_chunks(lambda images: encode_image(preprocess(images)), split.images, device)
    metrics = dict[str, float]()
    if is_captioned:
        metrics |= recall_at_k(image_ND, encode_texts(encode_text, split.texts, device), split.text_to_image_M, device=device)
    if classes is not None and split.labels_N is not None:
        assert tokenize is not None
        class_CD = class_embeddings(
            lambda texts: encode_texts(encode_text, texts, device),
            tokenize,
            classes["classnames"],
            classes["templates"],
        )
        metrics |= zero_shot_metrics(image_ND, class_CD, split.labels_N)
    return metrics


class _Loaded:
    """An open_clip folder and a split read for it, ready to encode: its own tokenizer, its own preprocessing."""

    def __init__(self, model: Path, data: Path | PairSet, split: str) -> None:
        bundle = towers.load_clip(model)
        bundle.spec.require_tokenizer(str(model))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.clip = towers.build_clip(bundle.spec.config, seed=0)
        self.clip.load_state_dict(bundle.state)
        self.clip.to(self.device).eval()
        self.preprocess = bundle.spec.preprocess
        self.corpus = Corpus(data if isinstance(data, PairSet) else open_pairs(data), bundle.spec)
        self.split = self.corpus.eval_split(split)

    def image(self, image: Tensor) -> Tensor:
        """Features of normalised images."""
        return towers.encode_image_with_hidden(self.clip, image)[0]

    def text(self, text: Tensor) -> Tensor:
        """Features of token ids."""
        return towers.encode_text_with_hidden(self.clip, text)[0]


@torch.no_grad()
def evaluate_folder(model: Path, data: Path | PairSet, split: str) -> dict[str, float]:
    """All metrics of an open_clip folder on a split of a data set, by the model's own tokenizer and preprocessing.

    Raises:
        UserError: the folder is no model that is supported, or the split is missing.
    """
    loaded = _Loaded(model, data, split)
    towers.say(f"{split}: {len(loaded.split.images.samples_N):,} images, {len(loaded.split.captions):,} captions")
    return evaluate_pairs(
        loaded.image,
        loaded.text,
        loaded.split,
        loaded.preprocess,
        loaded.device,
        classes=loaded.corpus.classes,
        tokenize=loaded.corpus.tokenize,
    )


@torch.no_grad()
def folder_features(model: Path, data: Path | PairSet, split: str) -> tuple[Tensor, Tensor, EvalSplit]:
    """Features of a split, [N, D] of its images and [M, D] of its captions, and the split itself."""
    loaded = _Loaded(model, data, split)
    image_ND = encode_in_chunks(lambda chunk: loaded.image(loaded.preprocess(chunk)), loaded.split.images, loaded.device)
    if not len(loaded.split.captions):
        return image_ND, image_ND[:0], loaded.split
    return image_ND, encode_texts(loaded.text, loaded.split.texts, loaded.device), loaded.split
