"""The names of all metrics, declared once. Imports nothing heavy: recipes are checked against them."""

from __future__ import annotations

import difflib

from mmlg_scale.errors import UserError

KS = (1, 5, 10)
RETRIEVAL = tuple(f"{kind}_recall@{k}" for kind in ("image_retrieval", "text_retrieval") for k in KS) + tuple(
    f"mean_recall@{k}" for k in KS
)
"""Of every data set; mean_recall@k is the mean of both directions."""
ZERO_SHOT = ("acc1", "acc5", "mean_per_class_recall")
"""Of data sets with classes."""
METRICS = (*RETRIEVAL, *ZERO_SHOT)


def check_metric(name: str, *, has_classes: bool) -> None:
    """Raise UserError for a metric that does not exist (naming the nearest), or that needs classes where there are none."""
    key = "recipe key evaluation.metric"
    if name not in METRICS:
        both = f"mean_{name}"
        near = [both] if both in METRICS else difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)
        raise UserError(f"{key}: {name!r} is unknown. Did you mean {near[0]}? Known: {', '.join(METRICS)}.")
    if name in ZERO_SHOT and not has_classes:
        raise UserError(
            f"{key}: {name} needs classes, the data set has none (no classes.json). Use mean_recall@1. Shards with a .cls "
            "for each image need classnames.txt, and mmlg data index again."
        )
