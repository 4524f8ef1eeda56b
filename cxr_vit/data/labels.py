"""The 14 findings of ChestX-ray14 in one fixed order, and text -> multi-hot.

The order is that of Wang et al., CVPR 2017, and the column order of every logit, probability,
metric and checkpoint of this project. Repositories differ in it; mixing two orders gives an AUROC
of about 0.5, so each checkpoint carries the names. Imports no torch.
"""

from __future__ import annotations

import logging
from typing import Callable, Dict, List, Sequence, Tuple

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

_KNOWN = frozenset((*FINDINGS, NO_FINDING))

logger = logging.getLogger(__name__)


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
        One string an image, findings joined by `|`, e.g. ``"Cardiomegaly|Emphysema"``. A finding
        named twice counts once; their number is logged.
    include_no_finding
        Whether `No Finding` has a column of its own; otherwise it is a row of zeros.

    Returns
    -------
    numpy.ndarray
        uint8 ``[len(texts), 14]`` (or 15).

    Raises
    ------
    DataError
        On a finding that is not one of the 14, an empty text, or `No Finding` beside a finding;
        names the number of such rows and the first, counting from 1.
    """
    # NIH's 112,120 rows hold 836 different texts: each is read once.
    distinct: Dict[str, int] = {}
    of_row = np.array([distinct.setdefault(text, len(distinct)) for text in texts], dtype=np.int64)
    found = [text.split("|") for text in distinct]
    _check_found(found, of_row)
    names = label_names(include_no_finding=include_no_finding)
    columns = {name: column for column, name in enumerate(names)}
    labels = np.zeros((len(found), len(names)), dtype=np.uint8)
    for row, findings in enumerate(found):
        # Without a column of its own, No Finding is the row of zeros.
        labels[row, [columns[name] for name in findings if name in columns]] = 1
    return labels[of_row]


def _check_found(found: Sequence[Sequence[str]], of_row: np.ndarray) -> None:
    """Refuse texts that no reading makes sense of: row i holds the findings `found[of_row[i]]`."""

    def rows_where(is_so: Callable[[Sequence[str]], bool]) -> np.ndarray:
        return np.flatnonzero(np.array([is_so(names) for names in found], dtype=bool)[of_row])

    unknown = rows_where(lambda names: not _KNOWN.issuperset(names))
    if len(unknown):
        raise DataError(_unknown_findings([found[text] for text in of_row[unknown]], unknown[0]))
    contradictory = rows_where(lambda names: NO_FINDING in names and len(set(names)) > 1)
    if len(contradictory):
        first = contradictory[0]
        raise DataError(
            f"row {first + 1} has the findings {'|'.join(found[of_row[first]])!r}: 'No Finding'"
            f" cannot stand beside a finding. Mend that row; {len(contradictory)} in all are so."
        )
    repeated = rows_where(lambda names: len(set(names)) < len(names))
    if len(repeated):
        logger.warning(
            "%d rows name a finding twice, first: row %d; it counts once",
            len(repeated),
            repeated[0] + 1,
        )


def _unknown_findings(rows: Sequence[Sequence[str]], first_row: int) -> str:
    unknown = [[name for name in names if name not in _KNOWN] for names in rows]
    name, different = unknown[0][0], {name for names in unknown for name in names}
    near = did_you_mean(name, [*FINDINGS, NO_FINDING])
    hint = f" Did you mean {near!r}?" if near else ""
    if not name:
        hint = " Write 'No Finding' for an image without a finding."
    return (
        f"row {first_row + 1} has an unknown finding {name!r}.{hint} Known findings:"
        f" {', '.join(FINDINGS)}; or 'No Finding'. {len(rows)} rows in all hold unknown findings,"
        f" {len(different)} different ones."
    )
