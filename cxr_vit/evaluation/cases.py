"""The images that a model is most right and most wrong about, by finding."""

from __future__ import annotations

from typing import Callable, Collection, List, NamedTuple, Optional

import numpy as np
from PIL import Image

from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.web_page import data_uri

#: Takes the name of an image; None if it cannot be shown.
Images = Callable[[str], Optional[Image.Image]]


class Overlays(NamedTuple):
    """What is drawn over the images a second time: a sentence about it, and what draws it.

    `draw` takes a picture and a finding, and returns the picture to show, or None.
    """

    about: str
    draw: Callable[[Image.Image, str], Optional[Image.Image]]


_LARGEST_SIDE = 192  # larger thumbnails are shrunk


class Case(NamedTuple):
    """An image of a finding: what it is an example of, and its thumbnails, "" without one."""

    kind: str
    image: str
    probability: float
    about: str
    thumbnail: str
    overlay: str


class Cases(NamedTuple):
    """The cases of a finding."""

    name: str
    cases: List[Case]


def cases(
    predictions: Predictions,
    images: Images,
    names: Collection[str],
    overlays: Optional[Overlays] = None,
) -> List[Cases]:
    """Return up to three images of each finding that is among the names.

    Its positive and its negative image with the highest probability, and its positive image with
    the lowest; of several the first. A finding with neither has none.
    """
    found = []
    for column in predictions.findings:
        if predictions.names[column] not in names:
            continue
        labels, scores = predictions.labels[:, column], predictions.probabilities[:, column]
        chosen = [
            ("highest, finding present", np.where(labels == 1, scores, -1.0)),
            ("highest, finding absent", np.where(labels == 0, scores, -1.0)),
            ("lowest, finding present", np.where(labels == 1, 1.0 - scores, -1.0)),
        ]
        of_finding = [
            _case(predictions, column, kind, int(np.argmax(values)), images, overlays)
            for kind, values in chosen
            if values.max(initial=-1.0) >= 0.0
        ]
        if of_finding:
            found.append(Cases(predictions.names[column], of_finding))
    return found


def _case(
    predictions: Predictions,
    column: int,
    kind: str,
    row: int,
    images: Images,
    overlays: Optional[Overlays],
) -> Case:
    record = predictions.table.iloc[row]
    facts = []
    if not np.isnan(record.get("age", np.nan)):
        facts.append(f"{record['age']:.0f} years")
    facts += [str(record[name]) for name in ("sex", "view") if record.get(name, "")]
    picture = covered = images(record["image"])
    if picture is not None:
        covered = None if overlays is None else overlays.draw(picture, predictions.names[column])
    thumbnails = [
        "" if shown is None else data_uri(shown, largest_side=_LARGEST_SIDE)
        for shown in (picture, covered)
    ]
    probability = float(predictions.probabilities[row, column])
    return Case(kind, record["image"], probability, ", ".join(facts), *thumbnails)
