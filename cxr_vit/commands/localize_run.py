"""Compare the maps of a checkpoint with the boxes of a split: scores, sanity check, figure."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import pandas as pd

from cxr_vit import ChestXrayDataModule, ViTModule
from cxr_vit.commands.localization_tables import sanity_lines, score_lines
from cxr_vit.commands.map_model import map_model
from cxr_vit.commands.scored_data import ScoredData
from cxr_vit.config import Config
from cxr_vit.config.schema import MAP_METHODS
from cxr_vit.console import progress
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.nih import BOX_FILES, NONE, find_boxes
from cxr_vit.data.splits import SPLIT_NAMES
from cxr_vit.errors import ConfigError, DataError, ModelError
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.label_match import LabelMatch
from cxr_vit.evaluation.localization import (
    MAPS,
    SCORES,
    Pair,
    boxed_pairs,
    center_map,
    localization,
    map_scores,
    random_scores,
    rank_correlations,
    similarity,
)
from cxr_vit.evaluation.localization_figure import localization_figure
from cxr_vit.evaluation.report import NOTICE
from cxr_vit.files import make_folder, remove, replacing, write_text, writing_to
from cxr_vit.model.stages import StagedViT
from cxr_vit.saliency.maps import METHODS
from cxr_vit.saliency.randomised import cascade
from cxr_vit.training.run_folder import report_folder

#: Version of the keys of localization.json.
SCHEMA_VERSION = 1
#: Images whose maps are computed together: attention and its gradients of all layers are kept.
_TOGETHER = 8
#: Pairs in the figure.
_SHOWN = 12
#: Files that are written.
_SCORES, _FIGURE = "localization.json", "localization.png"


class Chosen(NamedTuple):
    """What the command line asks for; None is the default."""

    split: Optional[str]
    method: str
    images: Optional[int]
    sanity: int
    out: Optional[Path]


def run_localize(
    checkpoint: Path, state: Mapping[str, Any], config: Config, chosen: Chosen
) -> None:
    """Score the maps, print the tables and write the files.

    Raises DataError if no image of the split has a box of a finding that the model knows.
    """
    config = _with_boxes(config)
    data = ChestXrayDataModule(config)
    module = ViTModule.load_from_checkpoint(checkpoint, config=config)
    split = chosen.split or data.default_split()
    known = _known_pairs(data, split, module.names)
    seen = [pair for pair in known if len(pair.boxes)]
    if not seen:
        raise DataError(_no_boxes(data, split))
    pairs = [seen[place] for place in _places(seen, chosen.images)]
    match = LabelMatch.same(module.names)
    facts = ScoredData(config, config).facts(data, match, state, split)
    folder = _folder(checkpoint, split, data.default_split(), chosen)
    if chosen.out is None and facts["changed_since_training"]:
        raise ConfigError(
            f"the data are not those of the run ({', '.join(facts['changed_since_training'])}), and"
            f" {folder} is for the scores of those. Give another folder with --out."
        )
    out = make_folder(chosen.out, folder)
    print(data.describe(), flush=True)
    maps_of = _Maps(data.dataset(split), module, chosen.method)
    maps = maps_of(maps_of.model, pairs, "maps")
    patients, resamples = maps_of.patients(pairs), Resamples(config.evaluation.resamples)
    scores = _scores(pairs, maps)
    findings = [pair.finding for pair in pairs]
    found: Dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "notice": NOTICE,
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "method": chosen.method,
        "split": split,
        **facts,
        "counts": {
            **_counts(pairs, patients, maps),
            "pairs_outside": len(known) - len(seen),
            "pairs_not_chosen": len(seen) - len(pairs),
        },
        **localization(scores, findings, patients, resamples),
    }
    print("\n".join(score_lines(found)), flush=True)
    found["sanity"] = _sanity(maps_of, pairs, maps, resamples, chosen.sanity)
    print("\n".join([*sanity_lines(found["sanity"]), NOTICE]), flush=True)
    with writing_to(out):
        if config.report.images:
            title = f"{chosen.method} of {config.run.name}, {checkpoint.resolve().name}"
            _draw(out / _FIGURE, title, maps_of, pairs, maps, scores[MAPS])
        else:
            remove(out / _FIGURE)  # of another call
        write_text(out / _SCORES, json.dumps(found, indent=2, allow_nan=False) + "\n")
    print(f"localization: {out}")


def _with_boxes(config: Config) -> Config:
    """Return the configuration with the file of the boxes, which must be there and readable."""
    data = config.data
    root = Path(data.root)
    if data.format == "nih" and data.boxes != NONE:
        found = find_boxes(root, data.boxes)
        if found is not None:
            return config.changed(data={"boxes": str(found)})
        problem = f"{root} has none of {', '.join(BOX_FILES)}"
        advice = "Put NIH's list of boxes there, or give it with data.boxes."
    elif data.format == "nih":
        problem, advice = f"data.boxes={NONE}", "Leave it out, or give NIH's list of boxes."
    else:
        problem = f"data.format={data.format} has none"
        advice = "Only NIH's layout does: data.format=nih with its list of boxes in data.root."
    raise DataError(
        f"localize compares maps with boxes, and there are no boxes: {problem}. {advice}"
    )


def _known_pairs(data: ChestXrayDataModule, split: str, names: Sequence[str]) -> List[Pair]:
    """Return the pairs of a split whose finding is a label of the model."""
    found = boxed_pairs(
        data.dataset(split).records,
        read_size=data.data.read_size,
        image_size=data.data.image_size,
    )
    return [pair for pair in found if pair.finding in names]


def _no_boxes(data: ChestXrayDataModule, split: str) -> str:
    rows = data.records.boxes["row"]
    counts = [f"{name} {rows.isin(getattr(data.splits, name)).sum()}" for name in SPLIT_NAMES]
    return (
        f"no box of {data.data.boxes} is on the part that the model sees of a {split} image. Boxes"
        f" by split: {', '.join(counts)}. Choose one with --split, or all images with"
        " data.split=all."
    )


def _places(pairs: Sequence[Pair], most: Optional[int]) -> List[int]:
    """Return the places of the pairs of up to `most` images, chosen at random with a fixed seed."""
    rows = np.array([pair.row for pair in pairs])
    kept = np.random.default_rng(0).permutation(np.unique(rows))[:most]
    return [int(place) for place in np.flatnonzero(np.isin(rows, kept))]


def _folder(checkpoint: Path, split: str, default: str, chosen: Chosen) -> Path:
    """Return the default folder; that of the defaults has no suffix."""
    report = report_folder(checkpoint, split, default=default)
    name = report.name.replace("report", "localization", 1)
    method = "" if chosen.method == MAP_METHODS[0] else f"_{chosen.method}"
    part = "" if chosen.images is None else f"_{chosen.images}_images"
    return report.with_name(f"{name}{method}{part}")


class _Maps:
    """Computes the maps of pairs: with the model of a checkpoint, or another one."""

    def __init__(self, dataset: ChestXrayDataset, module: ViTModule, method: str) -> None:
        self.model = map_model(module)
        self._device = next(self.model.parameters()).device
        self._dataset, self._method = dataset, METHODS[method]
        self._names, self._checkpoint = module.names, module.checkpoint

    def __call__(self, model: StagedViT, pairs: Sequence[Pair], label: str) -> np.ndarray:
        """Return the maps of pairs, which are ordered by finding: float32 ``[N, rows, columns]``.

        Raises ModelError if they are not finite.
        """
        parts: List[np.ndarray] = []
        with progress(label, done=0, total=len(pairs)) as advance:
            for finding, group in groupby(pairs, key=lambda pair: pair.finding):
                rows = [pair.row for pair in group]
                for start in range(0, len(rows), _TOGETHER):
                    images = self._dataset.__getitems__(rows[start : start + _TOGETHER]).images
                    column = self._names.index(finding)
                    maps = self._method(model, images.to(self._device), [column])
                    parts.append(maps[:, 0].numpy())
                    advance(len(images))
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise ModelError(f"{self._checkpoint}: maps are not finite: its weights are damaged.")
        return found

    def patients(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return a number for the patient of each pair, int64 ``[N]``."""
        rows = [pair.row for pair in pairs]
        return np.asarray(pd.factorize(self._dataset.records.table["patient"].iloc[rows])[0])

    def images(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return what the model sees of the image of each pair: uint8 ``[N, H, W]``."""
        images = self._dataset.__getitems__([pair.row for pair in pairs]).images
        return images[:, 0].numpy()


def _scores(pairs: Sequence[Pair], maps: np.ndarray) -> Dict[str, np.ndarray]:
    """Return the scores of the maps and of the baselines, each ``[N, len(SCORES)]``."""
    center, shape = center_map()[None], maps.shape[1:]
    by_pair = {
        MAPS: [map_scores(each[None], pair.boxes)[0] for each, pair in zip(maps, pairs)],
        "center": [map_scores(center, pair.boxes)[0] for pair in pairs],
        "random": [random_scores(pair, shape) for pair in pairs],
    }
    return {name: np.stack(values) for name, values in by_pair.items()}


def _counts(pairs: Sequence[Pair], patients: np.ndarray, maps: np.ndarray) -> Dict[str, Any]:
    findings = np.array([pair.finding for pair in pairs])
    return {
        "pairs": len(pairs),
        "images": len({pair.row for pair in pairs}),
        "patients": len(np.unique(patients)),
        "boxes": sum(len(pair.boxes) for pair in pairs),
        "flat_maps": int((maps.max(axis=(1, 2)) == maps.min(axis=(1, 2))).sum()),
        "findings": {
            name: {
                "pairs": int((findings == name).sum()),
                "patients": len(np.unique(patients[findings == name])),
            }
            for name in sorted(set(findings.tolist()))
        },
    }


def _sanity(
    maps_of: _Maps, pairs: Sequence[Pair], maps: np.ndarray, resamples: Resamples, most: int
) -> Optional[Dict[str, Any]]:
    """Compare the maps of up to `most` images with those of randomised weights."""
    if most == 0:
        return None
    places = _places(pairs, most)
    chosen, own = [pairs[place] for place in places], maps[places]
    correlations = {
        name: rank_correlations(own, maps_of(model, chosen, f"maps, randomised to {name}"))
        for name, model in cascade(maps_of.model)
    }
    return {
        "score": "mean rank correlation with the maps of the trained weights",
        "pairs": len(chosen),
        "images": len({pair.row for pair in chosen}),
        "steps": similarity(correlations, maps_of.patients(chosen), resamples),
    }


def _draw(
    path: Path,
    title: str,
    maps_of: _Maps,
    pairs: Sequence[Pair],
    maps: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Draw the first pair of each finding, then the second, up to `_SHOWN`."""
    findings = pd.Series([pair.finding for pair in pairs])
    order = findings.groupby(findings).cumcount().sort_values(kind="stable")
    places = order.index[:_SHOWN].to_numpy()
    shown = [pairs[place] for place in places]
    hits = scores[places, SCORES.index("pointing_game")]
    title = f"{title}: boxes, and maps with their maximum (+)\n{NOTICE}"
    figure = localization_figure(shown, maps_of.images(shown), maps[places], hits, title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
