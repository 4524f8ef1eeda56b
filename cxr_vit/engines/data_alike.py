"""The data of a run, opened by all its processes and found to be the same."""

from __future__ import annotations

from cxr_vit.config.schema import DataSection
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.engines.shared_store import call_once, main_first, same_everywhere
from cxr_vit.errors import DataError

__all__ = ["open_alike"]


def open_alike(data: DataSection, *, may_write_sample: bool = True) -> ChestXrayDataModule:
    """Open the data of a configuration, in the first process before the others.

    Parameters
    ----------
    data, may_write_sample
        As for `ChestXrayDataModule`.

    Raises
    ------
    DataError
        If this process has other data than the first one: its rows would be other films.
    """
    with main_first("data"):
        opened = ChestXrayDataModule(data, may_write_sample=may_write_sample, once=call_once)
    differing = same_everywhere("data", opened.fingerprint())
    if differing:
        raise DataError(
            f"the data of this host are not those of the first process: {'; '.join(differing)}."
            " Give all hosts the same CSV, lists and films."
        )
    return opened
