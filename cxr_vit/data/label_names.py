"""The labels of a configuration."""

from __future__ import annotations

from typing import List

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.labels import nih_names


def label_names(data: DataSection) -> List[str]:
    """Return the names of the label columns, in order.

    A pattern in `data.labels` needs the header of the table. Graphcore's tutorial has `No Finding`
    as a 15th class; `data.include_no_finding` appends it to NIH's.

    Raises DataError if the table is not there or has no column of the pattern.
    """
    if data.format == "nih":
        return nih_names(include_no_finding=data.include_no_finding)
    if isinstance(data.labels, list):
        return list(data.labels)
    from cxr_vit.data.table import labels_matching

    return labels_matching(data)
