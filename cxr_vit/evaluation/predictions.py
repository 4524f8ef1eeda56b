"""predictions.csv: one row a film, truth and probability a finding, in the split's order."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from cxr_vit.data.records import Records
from cxr_vit.evaluation.metrics import probabilities

__all__ = ["write_predictions"]


def write_predictions(
    path: Path, records: Records, *, split: str, names: Sequence[str], logits: Tensor
) -> None:
    """Write `image, patient, split`, then `<finding>` (0/1) and `<finding>_probability` each.

    Written aside and renamed.

    Parameters
    ----------
    path
        The CSV.
    records
        The split's films, in the order of `logits`.
    split
        Its name.
    names
        The C label names.
    logits
        float32 ``[N, C]``.
    """
    probs = probabilities(logits).numpy()
    assert probs.shape == (len(records), len(names))
    columns = {
        "image": records.table["image"].to_numpy(),
        "patient": records.table["patient"].to_numpy(),
        "split": np.full(len(records), split),
    }
    for column, name in enumerate(names):
        columns[name] = records.labels[:, column]
        columns[f"{name}_probability"] = probs[:, column]
    aside = path.with_name(f".{path.name}.writing")
    pd.DataFrame(columns).to_csv(aside, index=False)
    aside.replace(path)
