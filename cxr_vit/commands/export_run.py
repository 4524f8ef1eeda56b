"""Export a checkpoint: compare it with what is written, and say in a manifest what it is."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

import numpy as np

from cxr_vit.checkpoint_files import WEIGHTS
from cxr_vit.commands.fitted_points import points_of_checkpoint
from cxr_vit.config import Config
from cxr_vit.console import progress
from cxr_vit.data.cache import CacheSettings
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.text_files import check_data_root
from cxr_vit.data.views import VIEWS
from cxr_vit.errors import DataError
from cxr_vit.evaluation.operating_points import OPERATING_POINTS
from cxr_vit.evaluation.report import METRICS, MODEL_CARD, NOTICE
from cxr_vit.files import remove, replacing, write_text, writing_to
from cxr_vit.model.module import ViTModule
from cxr_vit.prediction.hub_export import (
    PlainScorer,
    refuse_other_models,
    save_weights,
    short_card,
)
from cxr_vit.prediction.manifest import MANIFEST, MANIFEST_KEY, Kind, Manifest, Parity
from cxr_vit.prediction.onnx_export import onnx_graph
from cxr_vit.prediction.onnx_model import Session, optional_module
from cxr_vit.prediction.parity import CheckpointScorer, Scorer, largest_difference
from cxr_vit.regular_files import MOST_METRICS, read_bytes, read_json
from cxr_vit.training.run_folder import package_versions, report_folder

logger = logging.getLogger(__name__)

ONNX, CARD = "model.onnx", "README.md"
#: Images of noise that are compared where there is no data set, and their seed.
_NOISE_IMAGES, _SEED = 64, 0
#: Views of images that are compared at a time.
_BATCH = 32
_LARGEST_CARD = 2**24  # bytes


class Images(NamedTuple):
    """What is compared: the split, or `random`, and a function from rows to uint8 ``[n, S, S]``."""

    split: str
    rows: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]


class Source:
    """A checkpoint with its module, and the facts of it that an export has.

    Raises CheckpointError or ModelError if it cannot be loaded.
    """

    def __init__(self, checkpoint: Path, state: Mapping[str, Any], config: Config) -> None:
        self.checkpoint, self.state, self.config = checkpoint, state, config
        self.module = ViTModule.load_from_checkpoint(checkpoint, config=config)
        self.module.setup()
        self.module.eval()
        self.points = points_of_checkpoint(checkpoint, state, config, self.module.names)
        self.scorer = CheckpointScorer(self.module)

    def manifest(self, kind: Kind, views: str, parity: Parity) -> Manifest:
        """Return the manifest of an export of a kind, with the views that it averages."""
        values = {
            "format": 1,
            "kind": kind,
            "notice": NOTICE,
            "labels": list(self.module.names),
            "reading": CacheSettings.of(self.config.data),
            "image_size": self.config.data.image_size,
            "views": views,
            "model": self._model_facts(),
            "points": self.points,
            "weights_sha256": self.state["sha256"][WEIGHTS],
            "versions": package_versions(),
            "parity": parity,
        }
        return Manifest.model_validate(values)

    def _model_facts(self) -> Dict[str, Any]:
        model = self.module.model
        keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
        return {
            "run": self.config.run.name,
            "step": self.state["step"],
            **{key: getattr(model.config, key) for key in (*keys, "patch_size", "hidden_act")},
            "pooling": model.pool.pooling,
            "parameters": sum(weight.numel() for weight in model.parameters()),
            **model.normalised(),
        }


def check_can_write(source: Source, kind: Kind) -> None:
    """Raise EngineUnavailable or ModelError for an export that is not possible."""
    if kind == "hf":
        refuse_other_models(source.module)
    else:
        for name in ("onnx", "onnxruntime"):
            optional_module(name)


def images_of(config: Config, split: Optional[str], most: Optional[int]) -> Images:
    """Return the images of a split, by default val, else test, or noise where there is no data set.

    Raises DataError if the data of a `split` that is given cannot be read.
    """
    try:
        check_data_root(config.data)
        data = ChestXrayDataModule(config)
        chosen = split or ("val" if len(data.splits.val) else "test")
        dataset = data.dataset(chosen)
    except DataError as error:
        if split is not None:
            raise
        reason = str(error).split("\n")[0]
        print(f"the images of the run are not here, so noise is compared: {reason}", flush=True)
        side, rows = config.data.read_size, np.arange(min(_NOISE_IMAGES, most or _NOISE_IMAGES))
        return Images("random", rows, lambda rows: _noise(rows, side))
    count = len(dataset) if most is None else min(most, len(dataset))
    rows = np.arange(count) * len(dataset) // count
    return Images(chosen, rows, dataset.read_images)


def _noise(rows: np.ndarray, side: int) -> np.ndarray:
    generator = np.random.default_rng([_SEED, *rows.tolist()])
    return generator.integers(0, 256, (len(rows), side, side), dtype=np.uint8)


def _compare(
    reference: Scorer, other: Scorer, images: Images, of: str, views: str = "center"
) -> Parity:
    """Compare two scorers of the same views of images, and print the largest difference."""
    step = max(1, _BATCH // len(VIEWS[views]))

    def chunks(advance: Callable[[int], None]) -> Iterator[np.ndarray]:
        for start in range(0, len(images.rows), step):
            rows = images.rows[start : start + step]
            yield images.read(rows)
            advance(len(rows))

    with progress("compare", done=0, total=len(images.rows)) as advance:
        largest = largest_difference(reference, other, chunks(advance))
    print(
        f"parity over {len(images.rows)} {images.split} images: largest difference {largest:.1e} of"
        f" a {of}",
        flush=True,
    )
    facts = {"split": images.split, "images": len(images.rows), "of": of}
    return Parity.model_validate({**facts, "largest_difference": largest})


def write_onnx(source: Source, out: Path, images: Images) -> None:
    """Write model.onnx, which holds the manifest, and manifest.json."""
    onnx, path = optional_module("onnx"), out / ONNX
    graph = onnx_graph(source.module)
    session = Session(graph.SerializeToString(), path, num_labels=len(source.module.names))
    reference, views = source.scorer.probabilities, source.config.evaluation.views
    parity = _compare(reference, session.probabilities, images, "probability", views)
    manifest = source.manifest("onnx", views, parity)
    onnx.helper.set_model_props(graph, {MANIFEST_KEY: manifest.model_dump_json()})
    content = graph.SerializeToString()
    with writing_to(out, "the export"):
        remove(out / MANIFEST)  # of an earlier export: not beside another file
        with replacing(path) as temporary:
            temporary.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        _write_manifest(out, manifest.model_copy(update={"onnx_sha256": sha256}))
    _say_written(path, source, len(content))


def write_hub(source: Source, out: Path, images: Images) -> None:
    """Write the folder that transformers loads."""
    if source.config.evaluation.views != "center":
        text = "evaluation.views=%s is not in the folder: transformers sees the middle of an image"
        logger.warning(text, source.config.evaluation.views)
    files = {**source.module.model.hub_files(), CARD: _card(source)}
    with writing_to(out, "the export"):
        with replacing(out / WEIGHTS) as temporary:
            save_weights(source.module, temporary)
            plain = PlainScorer(files, temporary, source.scorer)
            parity = _compare(source.scorer.logits, plain.logits, images, "logit")
            remove(out / MANIFEST)  # of an earlier export: not beside other weights
        for name, text in files.items():
            write_text(out / name, text)
        if source.points is None:
            remove(out / OPERATING_POINTS)
        else:
            source.points.write(out / OPERATING_POINTS)
        _write_manifest(out, source.manifest("hf", "center", parity))
    _say_written(out, source, (out / WEIGHTS).stat().st_size)


def _write_manifest(out: Path, manifest: Manifest) -> None:
    """Write it last: where it is, the export is complete."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, allow_nan=False)
    write_text(out / MANIFEST, text + "\n")


def _card(source: Source) -> str:
    """Return the model card of the run's report if it is of this checkpoint, else a short one."""
    report = report_folder(source.checkpoint, "test", default="test")
    try:
        metrics = read_json(report / METRICS, limit=MOST_METRICS)
        if metrics.get("step") == source.state["step"]:
            return read_bytes(report / MODEL_CARD, limit=_LARGEST_CARD).decode("utf-8")
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("the report's model card is not used: %s: %s", report, error)
    return short_card(source.config.run.name, list(source.module.names), NOTICE)


def _say_written(path: Path, source: Source, size: int) -> None:
    labels: List[str] = source.module.names
    points = "with" if source.points is not None else "without"
    print(f"{path}: {size / 1e6:.1f} MB, {len(labels)} labels, {points} operating points")
    print(NOTICE)
