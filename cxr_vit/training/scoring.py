"""Score a split: the labels that are compared, their loss and their metrics."""

from __future__ import annotations

import time

from torch import Tensor

from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.records import UNKNOWN
from cxr_vit.engines.base import Engine
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.label_match import LabelMatch, match_labels
from cxr_vit.evaluation.metrics import EvalOutputs, flat_scores
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.module import ViTModule


def match_of(module: ViTModule, data: ChestXrayDataModule, *, trains: bool) -> LabelMatch:
    """Return how the labels of the data and of the module correspond.

    Raises ConfigError if none do, or if they differ in training.
    """
    if not trains:
        return match_labels(data.names, module.names, data.data.label_map)
    if list(data.names) != list(module.names):
        raise ConfigError(
            f"the data module has the labels {data.names}, the module {module.names}. Make both"
            " with the same configuration."
        )
    return LabelMatch.same(module.names)


def outputs_of(
    engine: Engine,
    match: LabelMatch,
    logits: Tensor,
    labels: Tensor,
    *,
    split: str,
    step: int,
    start: float,
) -> EvalOutputs:
    """Return the loss and the metrics of all logits and labels of a split, float32 ``[N, C]``.

    `start` is the `time.perf_counter()` at which the scoring began. Loss and metrics are the
    module's own, unless the data have other labels, which a module does not know, or unknown ones
    where the module's data have none.
    """
    module = engine.module
    logits, labels = match.select(logits, labels)
    has_mask = module.config.data.has_unknown or not bool((labels == UNKNOWN).any())
    is_own = match.is_identity and has_mask
    if is_own:
        loss = engine.loss(logits, labels)
    else:
        loss = float(multi_label_loss(logits, labels, has_unknown=True))
    seconds = time.perf_counter() - start
    if is_own:
        scores = module.compute_metrics(logits, labels)
    else:
        scores = flat_scores(logits, labels, match.names)
    return EvalOutputs(split, step, loss, scores, logits, labels, seconds, match.names)
