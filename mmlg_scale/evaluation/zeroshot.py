"""Zero-shot classification with caption templates (Radford et al. 2021, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def class_embeddings(
    encode_text: Callable[[Tensor], Tensor], tokenize: Callable[[list[str]], Tensor], classnames: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """[C, D]: for each class the normalised mean of its templates' normalised features; `{}` in a template is the class name."""
    texts = [template.replace("{}", name) for name in classnames for template in templates]
    features = F.normalize(encode_text(tokenize(texts)).float(), dim=-1)
    return F.normalize(features.unflatten(0, (len(classnames), len(templates))).mean(dim=1), dim=-1)


def zero_shot_metrics(image_ND: Tensor, class_CD: Tensor, labels_N: Tensor) -> dict[str, float]:
    """`acc1`, `acc5` (of all classes where there are fewer) and `mean_per_class_recall` over the classes that occur."""
    scores_NC = F.normalize(image_ND.float(), dim=-1) @ class_CD.T
    best = scores_NC.topk(min(5, len(class_CD)), dim=1).indices
    right1 = (best[:, 0] == labels_N).double()
    right5 = (best == labels_N[:, None]).any(dim=1).double()
    per_class = [right1[labels_N == label].mean() for label in torch.unique(labels_N)]
    return {
        "acc1": right1.mean().item(),
        "acc5": right5.mean().item(),
        "mean_per_class_recall": torch.stack(per_class).mean().item(),
    }
