"""Where the planner's numbers are from, and how it stands to what others measured.

Imports no torch.
"""

from __future__ import annotations

from typing import List

from cxr_vit.config import load_config
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.hardware import (
    CACHED_PER_S,
    CODE_BYTES,
    DECODED_PER_S,
    DEFAULT_PROPORTION,
    IMBALANCE,
    PUBLISHED,
    Hardware,
    Sourced,
)
from cxr_vit.planner.text import columns, percent, prose, signed_percent

__all__ = ["source_lines"]


def source_lines(hardware: Hardware) -> List[str]:
    """List a device's numbers and the published runs, each with its source."""
    lines = [hardware.name]
    for field, value in zip(hardware._fields, hardware):
        if isinstance(value, Sourced):
            lines += prose("", f"{field} {value.value:,.15g}: {value.source}")
    constants = {
        "code_bytes": CODE_BYTES,
        "imbalance": IMBALANCE,
        "default_proportion": DEFAULT_PROPORTION,
        "decoded_per_s": DECODED_PER_S,
        "cached_per_s": CACHED_PER_S,
    }
    for name, value in constants.items():
        lines += prose("", f"{name} {value.value:,.15g}: {value.source}")
    lines.append("published runs, samples/s, and how full their fullest device is predicted")
    rows = [["", "published", "predicted", "measured over it", "", "fullest"]]
    for run in PUBLISHED:
        config = load_config([], [*run.settings, f"planner.hardware={run.hardware}"])
        plan = make_plan(config, image_bytes=run.image_bytes)
        rows.append(
            [
                f"  {run.what}",
                f"{run.samples_per_s:,.0f}",
                f"{plan.samples_per_s:,.0f}",
                signed_percent(run.samples_per_s / plan.samples_per_s - 1),
                "fitted" if run.is_fitted else "",
                percent(plan.fullest.memory.share),
            ]
        )
    lines += columns(rows)
    for run in PUBLISHED:
        note = f" It was {run.note}." if run.note else ""
        lines += prose("", f"{run.what}: {run.source}.{note}")
    return lines
