"""The 14 findings of ChestX-ray14 in one fixed order, and text -> multi-hot.

The order is that of Wang et al., CVPR 2017, and the column order of every logit, probability,
metric and checkpoint of this project. Repositories differ in it; mixing two orders gives an AUROC
of about 0.5, so each checkpoint carries the names. Imports no torch.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from cxr_vit.errors import DataError, did_you_mean

__all__ = ["FINDINGS", "NO_FINDING", "label_names", "multi_hot"]

FINDINGS: Tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"


def label_names(*, include_no_finding: bool = False) -> List[str]:
    """Return the names of the label columns, in order.

    Parameters
    ----------
    include_no_finding
        Append `No Finding` as a 15th class, as Graphcore's tutorial has it.
    """
    return [*FINDINGS, NO_FINDING] if include_no_finding else list(FINDINGS)


def multi_hot(texts: Sequence[str], *, include_no_finding: bool = False) -> np.ndarray:
    """Turn the CSV's `Finding Labels` into a matrix of zeros and ones.

    Parameters
    ----------
    texts
        One string a film, findings joined by `|`, e.g. ``"Cardiomegaly|Emphysema"``.
    include_no_finding
        Whether `No Finding` has a column of its own; otherwise it is a row of zeros.

    Returns
    -------
    numpy.ndarray
        uint8 ``[len(texts), 14]`` (or 15).

    Raises
    ------
    DataError
        On a finding that is not one of the 14, or `No Finding` beside a finding.
    """
    names = label_names(include_no_finding=include_no_finding)
    columns = {name: column for column, name in enumerate(names)}
    labels = np.zeros((len(texts), len(names)), dtype=np.uint8)
    for row, text in enumerate(texts):
        found = text.split("|")
        if NO_FINDING in found:
            if len(found) > 1:
                raise DataError(
                    f"row {row + 1} has the findings {text!r}: 'No Finding' cannot"
                    " stand beside a finding. Mend that row."
                )
            if include_no_finding:
                labels[row, columns[NO_FINDING]] = 1
            continue
        for name in found:
            if name not in columns:
                raise DataError(_unknown_finding(name, row))
            labels[row, columns[name]] = 1
    return labels


def _unknown_finding(name: str, row: int) -> str:
    near = did_you_mean(name, FINDINGS)
    hint = f" Did you mean {near!r}?" if near else ""
    return (
        f"row {row + 1} has an unknown finding {name!r}.{hint} "
        f"Known findings: {', '.join(FINDINGS)}; or 'No Finding'."
    )
