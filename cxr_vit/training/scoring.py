"""Score a split: the labels that are compared, views and models that are averaged, the metrics."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Callable, List, Optional, Sequence, Tuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cxr_vit.config.columns import is_no_finding
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.records import UNKNOWN, Records
from cxr_vit.data.views import VIEWS
from cxr_vit.engines.base import Engine
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.bootstrap import Resamples, intervals
from cxr_vit.evaluation.label_match import LabelMatch, match_labels
from cxr_vit.evaluation.metrics import MACRO_LIMITS, EvalOutputs, flat_scores, probabilities
from cxr_vit.evaluation.statistics import ranking
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


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """Return the logits of the mean of the probabilities, float32 ``[N, C]`` like each given one.

    Computed in float64 from the logarithms of p and 1 - p, so that no probability rounds to 0 or 1.
    """
    stacked = torch.stack([each.double() for each in logits])
    log_p, log_q = (logsigmoid(sign * stacked).logsumexp(dim=0) for sign in (1, -1))
    return (log_p - log_q).float()


def describe_views(views: str) -> List[str]:
    """Return a line about the cost of several views of each image; none for one view."""
    count = len(VIEWS[views])
    if count == 1:
        return []
    return [f"evaluation.views={views}: {count} views of each image, {count} times the time of one"]


def predict_views(
    engine: Engine,
    dataset: ChestXrayDataset,
    views: str,
    *,
    stops: Optional[Callable[[], bool]] = None,
) -> Tuple[Tensor, Tensor]:
    """Score every image of a split; see `Engine.predict_dataset`.

    The probabilities of several views of an image are averaged.
    """
    if len(VIEWS[views]) == 1:
        return engine.predict_dataset(dataset, stops=stops)
    scored = [engine.predict_dataset(dataset.seen_from(view), stops=stops) for view in VIEWS[views]]
    return mean_logits([logits for logits, _ in scored]), scored[0][1]


def ensemble(members: Sequence[EvalOutputs]) -> EvalOutputs:
    """Return the scores of the mean of several models' probabilities of the same images.

    `members` are the `Trainer.test_outputs` of each; the caller knows that the images are the same.
    The loss is binary cross-entropy. Raises ConfigError if the labels are not the same.
    """
    first = members[0]
    for number, other in enumerate(members[1:], start=2):
        same = list(first.names) == list(other.names) and torch.equal(first.labels, other.labels)
        if not same:
            raise ConfigError(
                f"members 1 and {number} of the ensemble were scored on other labels or images."
                " Score the same split of the same data with each."
            )
    logits = mean_logits([member.logits for member in members])
    return EvalOutputs(
        first.split,
        first.step,
        float(multi_label_loss(logits, first.labels, has_unknown=True)),
        flat_scores(logits, first.labels, first.names),
        logits,
        first.labels,
        sum(member.seconds for member in members),
        first.names,
    )


def with_interval(outputs: EvalOutputs, records: Records, resamples: int) -> EvalOutputs:
    """Add the 95 % interval of the macro AUROC to the scores: `MACRO_LIMITS`, None without one.

    It is that of a bootstrap over the patients of `records`, which are in the order of the outputs.
    Scores of a module's own, and those with no resamples, are returned as they are.
    """
    if resamples == 0 or "auroc_defined" not in outputs.scores:
        return outputs
    patients, distinct = pd.factorize(records.table["patient"])
    statistic = ranking(
        probabilities(outputs.logits).numpy(),
        outputs.labels.numpy(),
        patients,
        outputs.names,
        [column for column, name in enumerate(outputs.names) if not is_no_finding(name)],
        means=("macro",),
    )
    macro = intervals(statistic, len(distinct), Resamples(resamples)).get("auroc/macro")
    limits = (None, None) if macro is None else (macro.low, macro.high)
    return replace(outputs, scores={**outputs.scores, **dict(zip(MACRO_LIMITS, limits))})


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
