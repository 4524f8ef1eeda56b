"""From the stored values of a DICOM file to the gray levels that are displayed."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import numpy as np
from PIL import Image

from cxr_vit.data.codestreams import Unusable

GRAYS = ("MONOCHROME1", "MONOCHROME2")
#: Photometric interpretations that are colours, and their channels.
COLOURS = {
    **{"RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3, "YBR_ICT": 3, "YBR_RCT": 3},
    "PALETTE COLOR": 1,
}

#: Pixels that are converted at a time, in double precision.
_BAND_PIXELS = 2**18


def choose_view(dataset: Any, name: Optional[str]) -> None:
    """Leave the lookup table or window of this name only; None changes nothing.

    Raises Unusable if the file has none of that name, in upper or lower case.
    """
    if name is None:
        return
    tables = list(dataset.get("VOILUTSequence") or [])
    centers, widths = _texts(dataset, "WindowCenter"), _texts(dataset, "WindowWidth")
    of_tables = [str(table.get("LUTExplanation") or "") for table in tables]
    of_windows = _texts(dataset, "WindowCenterWidthExplanation")[: min(len(centers), len(widths))]
    names = [found.strip().lower() for found in (*of_tables, *of_windows)]
    wanted = name.strip().lower()
    if wanted not in names:
        known = [found.strip()[:64] for found in (*of_tables, *of_windows) if found.strip()]
        has = f"it has {', '.join(known[:10])}" if known else "it names none"
        raise Unusable(f"a DICOM file without a window {name!r}: {has}. Set data.dicom_window.")
    index = names.index(wanted)
    if index < len(tables):
        dataset.VOILUTSequence = [tables[index]]
        return
    if tables:
        del dataset.VOILUTSequence  # it would come before the window
    index -= len(tables)
    dataset.WindowCenter, dataset.WindowWidth = centers[index], widths[index]


def _texts(dataset: Any, keyword: str) -> List[str]:
    """Return the values of an element, of which there may be none, one or several."""
    value = dataset.get(keyword)
    if value is None:
        return []
    return [str(value)] if isinstance(value, (str, float)) else [str(each) for each in value]


def displayed(dataset: Any, cells: np.ndarray) -> np.ndarray:
    """Return 8-bit gray of the stored cells; black is 0, also where the file means the opposite."""
    kind = dataset.PhotometricInterpretation
    if kind not in GRAYS:
        return _luminance(dataset, cells, kind)
    rows = max(1, _BAND_PIXELS // cells.shape[1])
    bands = [cells[top : top + rows] for top in range(0, len(cells), rows)]
    limits = _limits(dataset)
    if limits is None:
        extremes = [_extremes(dataset, band) for band in bands]
        limits = min(low for low, _ in extremes), max(high for _, high in extremes)
    black, white = limits
    gray = np.zeros(cells.shape, np.uint8)
    if black == white or np.isinf(black):  # one value, or nothing but padding
        return gray
    for index, band in enumerate(bands):
        values = _values(dataset, _stored(dataset, band)).astype(np.float32)
        shown = np.round(np.clip((values - black) * (255.0 / (white - black)), 0, 255))
        shown = 255 - shown if kind == "MONOCHROME1" else shown
        shown[_is_padding(dataset, band)] = 0
        gray[index * rows : index * rows + len(band)] = shown
    return gray


def _luminance(dataset: Any, cells: np.ndarray, kind: str) -> np.ndarray:
    """Return the luminance of colours; that of Y, Cb and Cr is Y."""
    if kind in ("YBR_FULL", "YBR_FULL_422"):
        return np.ascontiguousarray(cells[..., 0])
    if kind == "PALETTE COLOR":
        # Of the palette's entries: those of the pixels may be many more.
        entries = _luts().apply_color_lut(np.arange(256), dataset)[..., :3]
        colours = entries if entries.dtype == np.uint8 else entries >> 8
        levels = Image.fromarray(colours.astype(np.uint8)[None]).convert("L")
        palette: np.ndarray = np.asarray(levels)[0]
        return palette[cells.view(np.uint8)]
    # YBR_ICT and YBR_RCT are RGB once they are decoded.
    return np.asarray(Image.fromarray(cells).convert("L"))


def _stored(dataset: Any, cells: np.ndarray) -> np.ndarray:
    """Return the values of cells: the bits stored, without those above and below.

    PS3.5, section 8.1.1: the other bits may hold anything, once an overlay; the sign is the highest
    bit stored.
    """
    bits = _bits_stored(dataset, cells)
    high = int(dataset.get("HighBit", bits - 1))
    if not 0 < bits <= high + 1 <= 8 * cells.dtype.itemsize:
        high = bits - 1
    return _cut(cells, bits, high)


def _bits_stored(dataset: Any, cells: np.ndarray) -> int:
    return min(int(dataset.BitsStored), 8 * cells.dtype.itemsize)


def _cut(cells: np.ndarray, bits: int, high: int) -> np.ndarray:
    """Return the values of the `bits` of cells from the bit `high` down."""
    width = 8 * cells.dtype.itemsize
    lifted = np.left_shift(cells, width - 1 - high, dtype=cells.dtype)
    return np.right_shift(lifted, width - bits, dtype=cells.dtype)


def _is_padding(dataset: Any, cells: np.ndarray) -> np.ndarray:
    """Return which cells are no pixels of the image, bool ``[H, W]`` (PS3.3, C.7.5.1.1.2)."""
    limits = [dataset.get("PixelPaddingValue")]
    limits.append(dataset.get("PixelPaddingRangeLimit", limits[0]))
    if not all(isinstance(limit, int) for limit in limits):
        return np.zeros(cells.shape, bool)
    given = np.array(limits, np.int64).astype(cells.dtype)  # may be read as of the other sign
    low, high = np.sort(given)
    # A value that the bits stored cannot hold is compared with the whole cell.
    bits = _bits_stored(dataset, cells)
    is_possible = (_cut(given, bits, bits - 1) == given).all()
    values = _stored(dataset, cells) if is_possible else cells
    return np.asarray((values >= low) & (values <= high))


def _extremes(dataset: Any, cells: np.ndarray) -> Tuple[float, float]:
    """Return the smallest and the largest value that is displayed; infinite if all is padding."""
    values = _values(dataset, _stored(dataset, cells))[~_is_padding(dataset, cells)]
    return (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)


def _luts() -> Any:
    """Return pydicom's module of lookup tables."""
    try:
        from pydicom.pixels import processing
    except ImportError:  # pydicom 2
        from pydicom.pixel_data_handlers import (  # type: ignore[no-redef,unused-ignore]
            util as processing,
        )
    return processing


def _apply_view(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Apply the file's first lookup table or window."""
    with np.errstate(over="ignore"):
        return np.asarray(_luts().apply_voi_lut(values, dataset))


def _limits(dataset: Any) -> Optional[Tuple[float, float]]:
    """Return black and white of what `_values` returns; None for the extremes of the image.

    Called before `_values`: lookup tables are made to be of 16 bits, which pydicom can apply.
    """
    for table in dataset.get("ModalityLUTSequence") or ():
        table.LUTDescriptor[2] = 16  # pydicom fails with 10, 12 or 14
    tables = dataset.get("VOILUTSequence")
    if tables:
        bits = tables[0].LUTDescriptor[2]
        tables[0].LUTDescriptor[2] = 16  # with 8, pydicom looks up the index modulo 256
        return 0, 2**bits - 1
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return (0, 255) if _is_gray(dataset) else None
    # The output of a window has the range of the input, which depends on several fields. Values
    # far outside of the window give it.
    black, white = _apply_view(np.array([-1e12, 1e12]), dataset)
    return float(black), float(white)


def _is_gray(dataset: Any) -> bool:
    """Whether the stored values are gray levels of 8 bits, as those of a PNG are."""
    is_changed = dataset.get("ModalityLUTSequence") or dataset.get("RescaleSlope", 1) != 1
    is_changed = is_changed or dataset.get("RescaleIntercept", 0) != 0
    return dataset.BitsStored == 8 and dataset.PixelRepresentation == 0 and not is_changed


def _values(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Return values after lookup table or window."""
    wide = stored.astype(np.int64 if stored.dtype.itemsize > 2 else np.int32)
    values = np.asarray(_luts().apply_modality_lut(wide, dataset))
    if dataset.get("VOILUTSequence"):
        return _apply_view(np.round(values).astype(np.int32), dataset)
    return _apply_view(values, dataset)
