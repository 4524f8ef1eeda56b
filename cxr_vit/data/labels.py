"""The encoding of ChestX-ray14's 14 findings as columns.

The order of the findings is that of Wang et al., CVPR 2017. Every logit, probability, metric and
checkpoint has its columns in the configuration's order. Other repositories use other orders, and
mixing two gives an AUROC of about 0.5, so each checkpoint stores the names.
"""

from __future__ import annotations

import logging
from typing import Callable, Dict, List, Sequence, Tuple

import numpy as np

from cxr_vit.config.columns import NO_FINDING
from cxr_vit.errors import DataError, did_you_mean

FINDINGS: Tuple[str, ...] = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
)  # fmt: skip

_KNOWN = frozenset((*FINDINGS, NO_FINDING))

logger = logging.getLogger(__name__)


def nih_names(*, include_no_finding: bool = False) -> List[str]:
    """Return NIH's 14 findings, or 15 labels with `No Finding`."""
    return [*FINDINGS, NO_FINDING] if include_no_finding else list(FINDINGS)


def multi_hot(texts: Sequence[str], *, include_no_finding: bool = False) -> np.ndarray:
    """Encode the CSV's `Finding Labels` as zeros and ones, int8 ``[len(texts), 14]`` (or 15).

    A text is the findings of an image joined by `|`: ``"Cardiomegaly|Emphysema"``. A repeated
    finding counts once and is logged; `No Finding` is a row of zeros unless it is a column.

    Raises DataError on an unknown finding, an empty text, or `No Finding` combined with a finding.
    The message gives the number of such rows and the first, counted from 1.
    """
    # NIH's 112,120 rows hold 836 different texts: parse each once.
    distinct: Dict[str, int] = {}
    indices = [distinct.setdefault(text, len(distinct)) for text in texts]
    text_of_row = np.array(indices, dtype=np.int64)
    found = [text.split("|") for text in distinct]
    _check_found(found, text_of_row)
    names = nih_names(include_no_finding=include_no_finding)
    columns = {name: column for column, name in enumerate(names)}
    labels = np.zeros((len(found), len(names)), dtype=np.int8)
    for row, findings in enumerate(found):
        labels[row, [columns[name] for name in findings if name in columns]] = 1
    return labels[text_of_row]


def _check_found(found: Sequence[Sequence[str]], text_of_row: np.ndarray) -> None:
    """Check the findings of each row i, which are `found[text_of_row[i]]`."""

    def rows_where(applies: Callable[[Sequence[str]], bool]) -> np.ndarray:
        applying = np.array([applies(names) for names in found], dtype=bool)
        return np.flatnonzero(applying[text_of_row])

    unknown = rows_where(lambda names: not _KNOWN.issuperset(names))
    if len(unknown):
        rows = [found[text] for text in text_of_row[unknown]]
        raise DataError(_describe_unknown(rows, unknown[0]))
    contradictory = rows_where(lambda names: NO_FINDING in names and len(set(names)) > 1)
    if len(contradictory):
        text = "|".join(found[text_of_row[contradictory[0]]])
        raise DataError(
            f"row {contradictory[0] + 1} has the findings {text!r}: 'No Finding' cannot be combined"
            f" with a finding. Fix that row; {len(contradictory)} in all are like it."
        )
    repeated = rows_where(lambda names: len(set(names)) < len(names))
    if len(repeated):
        text = "%d rows repeat a finding, first: row %d; it counts once"
        logger.warning(text, len(repeated), repeated[0] + 1)


def _describe_unknown(rows: Sequence[Sequence[str]], first_row: int) -> str:
    unknown = [name for names in rows for name in names if name not in _KNOWN]
    name = unknown[0]
    near = did_you_mean(name, [*FINDINGS, NO_FINDING])
    hint = f" Did you mean {near!r}?" if near else ""
    if not name:
        hint = " Write 'No Finding' for an image without a finding."
    return (
        f"row {first_row + 1} has an unknown finding {name!r}.{hint} Known findings:"
        f" {', '.join(FINDINGS)}; or 'No Finding'. {len(rows)} rows in all hold unknown findings,"
        f" {len(set(unknown))} different ones."
    )
