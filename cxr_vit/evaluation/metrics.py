"""AUROC and average precision per label over a whole split.

A label without positives or negatives is undefined (None) and excluded from the mean, and the
number of defined ones is reported. A label that is unknown for an image leaves the image out of
this label's scores alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from cxr_vit.config.columns import is_no_finding
from cxr_vit.data.records import UNKNOWN
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.evaluation.statistics import ranking

#: Metric name (`auroc_macro`, `auroc/Hernia`) -> value, None where it is undefined.
Scores = Dict[str, Optional[float]]
#: The scores of a validation that are the limits of the macro AUROC's interval.
MACRO_LIMITS = ("auroc_macro_low", "auroc_macro_high")


@dataclass(frozen=True)
class EvalOutputs:
    """A scored split: logits and labels are float32 ``[N, C]`` in the split's order.

    `names` are the labels: those of the model, or of a data set with other ones.
    """

    split: str
    step: int
    loss: float
    scores: Scores
    logits: Tensor
    labels: Tensor
    seconds: float
    names: Sequence[str] = ()

    def tagged(self) -> Scores:
        """Return loss and scores under their tags, such as ``val/auroc_macro``."""
        named = {f"{self.split}/{name}": value for name, value in self.scores.items()}
        return {**named, f"{self.split}/loss": self.loss}


def probabilities(logits: Tensor) -> Tensor:
    """Return the sigmoid of logits ``[N, C]`` in float32: findings are not mutually exclusive."""
    return torch.sigmoid(logits.float())


def scorable(logits: Tensor, labels: Tensor) -> List[Tuple[Tensor, Tensor]]:
    """Return the probabilities and the truth (int64) of each label, where it is known.

    `logits` and `labels` are float32 ``[N, C]``. A pair is C times ``[n]``, n at most N.
    """
    probs, truth = probabilities(logits), labels.to(torch.int64)
    columns = zip(probs.unbind(1), truth.unbind(1))
    return [(prob[true != UNKNOWN], true[true != UNKNOWN]) for prob, true in columns]


def refuse_nonfinite(logits: Tensor) -> None:
    """Raise NonFiniteLoss if a logit of ``[N, C]`` is NaN or infinite: NaN has no rank."""
    broken = int((~torch.isfinite(logits)).any(dim=1).sum())
    if broken:
        raise NonFiniteLoss(
            f"the model's logits are not finite for {broken} of {len(logits)} images, so it cannot"
            " be scored. Use an earlier checkpoint, or train with a lower learning rate."
        )


def evaluate(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Dict[str, Any]:
    """Score a whole split, given float32 ``[N, C]``; labels are 0, 1 or `UNKNOWN`.

    Returns `num_samples`; `auroc` and `average_precision` by label name, None where undefined (no
    image that is known to be positive, or none that is known to be negative); `positives` by label
    name; `auroc_macro` and `average_precision_macro`, the means over the defined *findings*;
    `auroc_defined` and `num_findings`. With `No Finding` as a class, `auroc_macro_with_no_finding`
    is the mean over all classes. If labels are unknown, `unknown` is their number by label name.
    Raises NonFiniteLoss if a logit is NaN or infinite.
    """
    refuse_nonfinite(logits)
    findings = [column for column, name in enumerate(names) if not is_no_finding(name)]
    truth = labels.numpy()
    everyone = np.zeros(len(truth), np.int64)
    statistic = ranking(
        probabilities(logits).detach().numpy(), truth, everyone, names, findings, means=("macro",)
    )
    (found,) = statistic.of(np.ones((1, 1), np.int64)).tolist()
    values = {
        key: None if math.isnan(value) else value for key, value in zip(statistic.names, found)
    }
    auroc = {name: values[f"auroc/{name}"] for name in names}
    scores: Dict[str, Any] = {
        "num_samples": len(labels),
        "auroc_macro": values["auroc/macro"],
        "auroc_defined": sum(auroc[names[column]] is not None for column in findings),
        "num_findings": len(findings),
        "average_precision_macro": values["average_precision/macro"],
        "auroc": auroc,
        "average_precision": {name: values[f"average_precision/{name}"] for name in names},
        "positives": dict(zip(names, (truth == 1).sum(axis=0).tolist())),
    }
    if len(findings) < len(names):
        scores["auroc_macro_with_no_finding"] = mean_of_defined(list(auroc.values()))
    unknown = (labels == UNKNOWN).sum(dim=0).tolist()
    if any(unknown):
        scores["unknown"] = dict(zip(names, unknown))
    return scores


def mean_of_defined(values: List[Optional[float]]) -> Optional[float]:
    """Return the mean of the values that are not None, None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def flat_scores(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Scores:
    """Score a split under the tags of the logs: `auroc_macro`, `auroc/Hernia`, ..."""
    flat: Scores = {}
    for key, value in evaluate(logits, labels, names).items():
        if key in ("auroc", "average_precision"):
            flat.update({f"{key}/{name}": score for name, score in value.items()})
        elif key not in ("positives", "unknown", "num_samples"):
            flat[key] = value
    return flat
