"""The official test split of the real ChestX-ray14, with random scores."""

from __future__ import annotations

import gzip
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.nih import read_records
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.evaluation.predictions import Predictions, predictions_of

NIH = Path(__file__).resolve().parents[3] / "shared" / "data" / "nih"
CSV = "Data_Entry_2017_v2020.csv"
RELABELS = "google2019_nih-chest-xray-labels.csv"
TEST = "test_list.txt"


@lru_cache(maxsize=None)
def nih_test_split() -> Predictions:
    """Return 25,596 images; the scores of positives are higher by 1.2 standard deviations."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in (CSV, RELABELS, TEST):
            packed = NIH / f"{file}.gz"
            if not packed.is_file():
                pytest.skip(f"the real NIH files are not available ({packed})")
            (folder / file).write_bytes(gzip.decompress(packed.read_bytes()))
        records = read_records(folder / CSV, include_no_finding=False, relabels=folder / RELABELS)
        images = set((folder / TEST).read_text().split())
    records = records.take(records.table["image"].isin(images).to_numpy())
    labels = torch.from_numpy(records.labels).float()
    noise = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    outputs = EvalOutputs("test", 0, 0.0, {}, noise + 1.2 * labels - 2, labels, 0.0, FINDINGS)
    return predictions_of(records, outputs)
