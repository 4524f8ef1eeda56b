"""Predict with an exported ONNX file, by onnxruntime on the CPU."""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from cxr_vit.data.spawn import usable_cores
from cxr_vit.data.views import VIEWS
from cxr_vit.errors import EngineUnavailable, ModelError
from cxr_vit.prediction.manifest import (
    LARGEST_MANIFEST,
    MANIFEST,
    MANIFEST_KEY,
    Manifest,
    parse_manifest,
)
from cxr_vit.prediction.predictor import Facts, Predictor
from cxr_vit.regular_files import read_bytes, read_json

#: Names in the graph.
INPUT, OUTPUTS = "images", ("probabilities", "logits")
#: Size limit of a file, that of protobuf, bytes.
LARGEST_ONNX = 2**31 - 1
#: Views of images that are computed at a time.
_BATCH = 64
#: Only onnxruntime's own operators on its own threads; no message but an exception.
_PROVIDERS, _FATAL_ONLY = ["CPUExecutionProvider"], 4


def optional_module(name: str) -> Any:
    """Import a module of the extra `export`. Raises EngineUnavailable if that is not possible."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineUnavailable(
            f"{name} cannot be imported ({error}). Exported models need it: pip install"
            ' "cxr-vit[export]"'
        ) from error


class Session:
    """A graph in onnxruntime.

    Raises ModelError, with `source`, for what onnxruntime refuses.
    """

    def __init__(self, content: bytes, source: Path, *, num_labels: int) -> None:
        runtime = optional_module("onnxruntime")
        self.source, self.num_labels = source, num_labels
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = _num_threads()
        try:
            self._session = runtime.InferenceSession(content, options, providers=_PROVIDERS)
        except Exception as error:  # of a hostile file, any
            raise self._problem(error) from error

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return float32 ``[n, C]`` for uint8 ``[n, S, S]``."""
        try:
            (found,) = self._session.run([OUTPUTS[0]], {INPUT: images[:, None]})
        except Exception as error:
            raise self._problem(error) from error
        is_array = isinstance(found, np.ndarray) and found.dtype == np.float32
        is_array = is_array and found.shape == (len(images), self.num_labels)
        if not (is_array and bool(((found >= 0) & (found <= 1)).all())):
            raise self._problem("its output is no probability of each label")
        return np.asarray(found)

    def _problem(self, reason: Any) -> ModelError:
        text = " ".join(str(reason).split())[:300]
        return ModelError(f"{self.source}: onnxruntime cannot run it ({text}). Export it again.")


class OnnxPredictor(Predictor):
    """An exported file, given its content."""

    def __init__(self, session: Session, manifest: Manifest, sha256: str) -> None:
        self._session = session
        # More are not faster on a CPU, and take more memory. The views are one batch.
        self.chunk = max(1, _BATCH // len(VIEWS[manifest.views]))
        self.facts = Facts(
            labels=list(manifest.labels),
            settings=manifest.reading,
            image_size=manifest.image_size,
            points=manifest.points,
            identity={"onnx_sha256": sha256},
        )

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return float32 ``[n, C]`` for uint8 ``[n, S, S]``, S being ``settings.image_size``."""
        return self._session.probabilities(images)


def open_onnx(path: Path) -> Predictor:
    """Open a file that `export --to onnx` wrote. Its metadata are enough.

    Raises EngineUnavailable without onnx or onnxruntime, and ModelError for a file that is damaged,
    not of an export, that names other files, or that a manifest.json beside it is not of.
    """
    onnx = optional_module("onnx")
    try:
        content = read_bytes(path, limit=LARGEST_ONNX)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}. Correct the path.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    _check_beside(path, sha256)
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf has several
        raise ModelError(
            f"{path} is no ONNX file, or it is damaged. Copy or export it again."
        ) from error
    _check_own_data(onnx, proto, path)
    texts = [item.value for item in proto.metadata_props if item.key == MANIFEST_KEY]
    if len(texts) != 1:
        raise ModelError(
            f"{path} has no manifest of cxr_vit, so neither labels nor preprocessing are known."
            " Give a file of export --to onnx."
        )
    manifest = parse_manifest(texts[0], path)
    if manifest.kind != "onnx":
        raise ModelError(
            f"{path} has the manifest of an export --to {manifest.kind}. Export again."
        )
    session = Session(content, path, num_labels=len(manifest.labels))
    return OnnxPredictor(session, manifest, sha256)


def _check_beside(path: Path, sha256: str) -> None:
    """Raise ModelError if the manifest.json beside a file has the hash of another one."""
    beside = path.with_name(MANIFEST)
    try:
        recorded = read_json(beside, limit=LARGEST_MANIFEST).get("onnx_sha256")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{beside}, which has the hash of {path.name}, cannot be read ({error}). Copy both"
            " again, or export them again."
        ) from error
    if recorded not in (None, sha256):  # None: of a folder for transformers, or of something else
        raise ModelError(
            f"{path} is not the file that {beside} was written for: it was changed, or damaged in"
            " a copy. Copy both again, or export them again."
        )


def _check_own_data(onnx: Any, proto: Any, path: Path) -> None:
    """Raise ModelError if a tensor anywhere in a model is in another file, which may be any."""
    for message in _messages(proto):
        is_tensor = isinstance(message, onnx.TensorProto)
        if is_tensor and (message.external_data or message.data_location):
            raise ModelError(
                f"{path} keeps weights in other files, which an export never does. Nothing of it"
                " was run. Export it again."
            )


def _messages(message: Any) -> Iterator[Any]:
    """Yield a message of protobuf and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            is_list = hasattr(value, "__len__")
            for each in value if is_list else [value]:
                yield from _messages(each)


def _num_threads() -> int:
    """Return the number of threads that torch would use: OMP_NUM_THREADS, or one per core."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return usable_cores()
