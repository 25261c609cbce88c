"""A split as an evaluation reads it: texts and labels at once, images a chunk at a time, decoded by as many threads as there are cores.

Damaged samples are known before the first chunk (`scan.py`), so that all passes and all ranks see the same images.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mmlg_scale.data.faults import MAX_BAD_FRACTION, check_limit, told_truncation
from mmlg_scale.data.reader import DamagedSample, Fault, ShardReader
from mmlg_scale.data.scan import ahead, num_threads, scan
from mmlg_scale.data.store import Store
from mmlg_scale.data.tokens import truncated
from mmlg_scale.errors import UserError
from mmlg_scale.ranks import is_first_rank, several_ranks
from mmlg_scale.reading import shown
from mmlg_scale.towers import ModelSpec

CHUNK = 256
"""Images, or texts, that are encoded at a time."""
KEPT_BYTES = 64 * 2**20
"""Decoded images up to this size are kept between passes, and so are token ids: a small split is evaluated often."""
_AHEAD = 2
"""Chunks that are decoded while one is encoded."""


class Chunks(Protocol):
    """Rows of a long array, a chunk at a time, each of `chunk_size` rows but for the last."""

    chunk_size: int

    def __len__(self) -> int:
        """How many chunks there are."""

    def read(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The chunks of these numbers."""


class TensorChunks:
    """The chunks of an array that is in memory."""

    def __init__(self, rows: Tensor, chunk_size: int = CHUNK) -> None:
        self.rows, self.chunk_size = rows, chunk_size

    def __len__(self) -> int:
        return (len(self.rows) + self.chunk_size - 1) // self.chunk_size

    def read(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The chunks of these numbers."""
        return (self.rows[number * self.chunk_size : (number + 1) * self.chunk_size] for number in numbers)


class Texts(Sequence[str]):
    """Many texts in one piece of memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        content, ends = bytearray(), [0]
        for text in texts:
            content += text.encode("utf-8", "surrogatepass")
            ends.append(len(content))
        self._content, self._ends = bytes(content), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._content[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class ImageChunks:
    """The intact images of a split, decoded as the model `spec` sees them: uint8 [n, 3, H, W]."""

    def __init__(self, reader: ShardReader, samples_N: np.ndarray, spec: ModelSpec) -> None:
        self.samples_N, self.chunk_size = samples_N, CHUNK
        self._reader, self._spec = reader, spec
        side = spec.image_size
        self._kept: dict[int, Tensor] | None = {} if len(samples_N) * 3 * side * side <= KEPT_BYTES else None

    def __len__(self) -> int:
        return (len(self.samples_N) + CHUNK - 1) // CHUNK

    def read(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The chunks of these numbers, the next ones being decoded while one is used.

        Raises:
            UserError: an image that could be read when the split was opened cannot be any more.
        """
        kept = self._kept if self._kept is not None else {}
        threads = num_threads()
        # Threads share what a chunk has been cut into; a reader's files are not for several threads, and reading is the lesser part.
        with ThreadPoolExecutor(threads) as pool:

            def chunk(number: int) -> Tensor:
                if number in kept:
                    return kept[number]
                samples = self.samples_N[number * CHUNK : (number + 1) * CHUNK]
                parts = list(pool.map(self._decoded, np.array_split(samples, min(threads, len(samples)))))
                found = torch.cat(parts)
                if self._kept is not None:
                    self._kept[number] = found
                return found

            with ThreadPoolExecutor(1) as ordered:
                for _, found in ahead(ordered, chunk, numbers, _AHEAD):
                    yield found

    def one(self, index: int) -> Tensor:
        """Image `index` alone, uint8 [3, H, W]. Raises as `read`."""
        kept = (self._kept or {}).get(index // CHUNK)
        return kept[index % CHUNK] if kept is not None else self._decoded(self.samples_N[index : index + 1])[0]

    def _decoded(self, samples: np.ndarray) -> Tensor:
        reader, spec = self._reader.clone(), self._spec
        images = np.empty((len(samples), spec.image_size, spec.image_size, 3), np.uint8)
        try:
            for row, index in enumerate(samples.tolist()):
                images[row] = reader.image(index, spec.image_size, preprocess=spec.preprocess)
        except DamagedSample as damage:
            raise UserError(f"{damage.fault}. It could be read when this evaluation began.") from damage
        finally:
            reader.close()
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class TextChunks:
    """Texts as a model's token ids: [n, T]."""

    def __init__(self, texts: Texts, spec: ModelSpec) -> None:
        self._texts, self._spec, self.chunk_size = texts, spec, CHUNK
        kept = list[Tensor]() if len(texts) * spec.context_length * 4 <= KEPT_BYTES else None
        self.num_truncated = 0
        for start in range(0, len(texts), CHUNK):
            words = texts[start : start + CHUNK]
            ids = spec.tokenizer(words, spec.context_length)
            self.num_truncated += len(truncated(spec.tokenizer, words, ids))
            if kept is not None:
                kept.append(ids.int())
        self._kept = kept

    def __len__(self) -> int:
        return (len(self._texts) + CHUNK - 1) // CHUNK

    def read(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """The chunks of these numbers."""
        for number in numbers:
            if self._kept is not None:
                yield self._kept[number].long()
            else:
                yield self._spec.tokenizer(self._texts[number * CHUNK : (number + 1) * CHUNK], self._spec.context_length)


@dataclass(frozen=True)
class EvalSplit:
    """A whole split as a model sees it.

    Attributes:
        images: uint8 [n, 3, H, W] a chunk; N in all.
        texts: token ids [n, T] a chunk; M in all, those of an image one after the other.
        text_to_image_M: the image of each caption, int64; none at all in a split of images and labels.
        labels_N: class of each image, where all have one.
        captions: all captions as texts.
        skipped: the damaged samples, which are left out.
        num_truncated: captions that are cut to the context length.
    """

    images: ImageChunks
    texts: TextChunks
    text_to_image_M: Tensor
    labels_N: Tensor | None
    captions: Texts
    skipped: list[Fault] = field(default_factory=list)
    num_truncated: int = 0

    def images_uint8_NCHW(self) -> Tensor:
        """All images at once: of small splits."""
        return torch.cat(list(self.images.read(range(len(self.images)))))

    def texts_MT(self) -> Tensor:
        """All token ids at once."""
        return torch.cat(list(self.texts.read(range(len(self.texts)))))

    def image_png(self, index: int) -> bytes:
        """Image `index` as a PNG file."""
        image_CHW = self.images.one(index)
        buffer = io.BytesIO()
        Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        return buffer.getvalue()


def load_eval_split(
    folder: Path,
    spec: ModelSpec,
    *,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    store: Store | None = None,
    num_classes: int | None = None,
) -> EvalSplit:
    """Open a split as the model `spec` sees it. Where ranks run as one process group, all open it together.

    The shards are in `store` where one is given. With `num_classes` labels are numbers below it.

    Damaged samples are left out and named on the console, metrics are then over the others; captions that are cut are counted there.

    Raises:
        UserError: more than `max_bad_fraction` of the samples are damaged, with the first of them; a label beyond the classes.
    """
    reader = ShardReader(folder, store)
    where = reader.shards.where
    shared = several_ranks() and dist.is_initialized()
    faults = scan(folder, reader, check="decode", threads=num_threads(), shared=shared)
    check_limit(faults.counts, faults, len(reader), max_bad_fraction, None, where)
    samples_N = np.setdiff1d(np.arange(len(reader)), faults.positions(), assume_unique=True)
    if not len(samples_N):
        raise UserError(f"{where}: no sample can be read. mmlg data check says why.")
    owners, labels = list[int](), list[int | None]()

    def read_captions() -> Iterator[str]:
        for row, index in enumerate(samples_N.tolist()):
            about = reader.about(index)
            labels.append(about["label"])
            if num_classes is not None and about["label"] is not None and not 0 <= about["label"] < num_classes:
                raise UserError(
                    f"{where}, sample {shown(reader.key(index))}: label {about['label']}, classes.json has {num_classes} classes, numbered "
                    "from 0. Correct the label, or the list of classes."
                )
            owners.extend([row] * len(about["captions"]))
            yield from about["captions"]

    captions = Texts(read_captions())
    reader.close()
    texts, skipped = TextChunks(captions, spec), list(faults)
    if is_first_rank():
        for fault in skipped:
            print(f"left out of the evaluation: {fault}", flush=True)
        if texts.num_truncated:
            print(f"{where}: {told_truncation(texts.num_truncated, len(captions), spec.context_length)}", flush=True)
        unlabelled = labels.count(None)
        if num_classes is not None and 0 < unlabelled < len(labels):
            print(f"{where}: zero-shot classification is left out, since {unlabelled} of {len(labels)} samples have no label", flush=True)
    labels_N = None if any(label is None for label in labels) else torch.tensor(labels)
    return EvalSplit(
        ImageChunks(reader, samples_N, spec),
        texts,
        torch.tensor(owners, dtype=torch.long),
        labels_N,
        captions,
        skipped,
        texts.num_truncated,
    )
