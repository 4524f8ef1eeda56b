"""From decoded images to rows: the model, its findings, its calibrated probabilities."""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, List, NamedTuple

import numpy as np

from cxr_vit.console import count
from cxr_vit.prediction.decoding import DecodedChunk
from cxr_vit.prediction.predictor import Predictor
from cxr_vit.prediction.rows import Decider, Row, plain, plain_path


class Predicted(NamedTuple):
    """Consecutive images with what the model says of them.

    Attributes
    ----------
    first
        Number of the first among all images, from 0.
    paths
        Their paths, n of them.
    usable
        bool ``[n]``: whether the image was read. The others are black, and their numbers mean
        nothing.
    pixels
        uint8 ``[n, S, S]``, of which the model sees the middle.
    probabilities
        float32 ``[n, C]``.
    findings
        The labels at or over their threshold, of each image.
    rows
        What is written of each image.
    """

    first: int
    paths: List[str]
    usable: np.ndarray
    pixels: np.ndarray
    probabilities: np.ndarray
    findings: List[List[str]]
    rows: List[Row]


#: What is called with each chunk, before its rows are written.
Watcher = Callable[[Predicted], None]


def predict(
    predictor: Predictor, decider: Decider, chunks: Iterable[DecodedChunk]
) -> Iterator[Predicted]:
    """Yield the predictions of decoded chunks."""
    for chunk in chunks:
        # Images that cannot be used take part, so that the others are in the same batches as ever.
        pixels = chunk.pixels(predictor.facts.settings.image_size)
        probabilities = predictor.probabilities(pixels)
        usable = np.array([file.pixels is not None for file in chunk.files])
        findings = decider.findings(probabilities)
        rows = _rows(chunk, decider, probabilities, findings)
        paths = list(chunk.paths)
        yield Predicted(chunk.first, paths, usable, pixels, probabilities, findings, rows)


def _rows(
    chunk: DecodedChunk,
    decider: Decider,
    probabilities: np.ndarray,
    findings: List[List[str]],
) -> List[Row]:
    calibrated = decider.calibrated(probabilities)
    rows = []
    for index, (path, file) in enumerate(zip(chunk.paths, chunk.files)):
        tags = {keyword: plain(text) for keyword, text in file.tags.items()}
        warnings = [plain(text) for text in file.warnings]
        if file.error is not None:
            rows.append(Row(plain_path(path), {}, {}, [], warnings, plain(file.error), tags))
            continue
        own = dict(zip(decider.labels, map(_shortest, probabilities[index])))
        scaled = {name: _shortest(values[index]) for name, values in calibrated.items()}
        rows.append(Row(plain_path(path), own, scaled, findings[index], warnings, None, tags))
    return rows


def _shortest(value: np.float32) -> float:
    """Return the number with the fewest digits that is the same in float32."""
    return float(str(value))


def count_images(total: int, unread: int) -> str:
    """Describe how many images have probabilities, and how many could not be read."""
    text = f"{count(total, 'image')}: {total - unread} with probabilities"
    return f"{text}, {unread} that could not be read" if unread else text
