"""Read the records of any table: CSV, TSV or Parquet with the columns that `data.columns` names."""

from __future__ import annotations

from pathlib import Path
from typing import List, Tuple

from cxr_vit.config.schema import DataSection
from cxr_vit.data.records import Records


def labels_matching(data: DataSection) -> List[str]:
    """Return the columns of the table that `data.labels` matches, in the table's order."""
    raise NotImplementedError


def read_table_records(data: DataSection) -> Tuple[List[Path], Records]:
    """Return the files of `data.csv` and `data.join`, and the records of all their images."""
    raise NotImplementedError
