"""Files that are not of an export, or that somebody changed: a message, and nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from random_run import module_of_kind

from cxr_vit.errors import EngineUnavailable, ModelError
from cxr_vit.prediction.onnx_export import onnx_graph
from cxr_vit.prediction.onnx_model import open_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

_SETTINGS = {"image_size": 40, "max_megapixels": 64, "resize": "bilinear, antialiased (Pillow)"}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file."""
    module = module_of_kind("vit", tmp_path_factory.mktemp("model") / "model")
    graph = onnx_graph(module)
    parity = {"split": "random", "images": 1, "of": "probability", "largest_difference": 0}
    manifest = {
        **{"format": 1, "kind": "onnx", "notice": "", "labels": module.names, "image_size": 32},
        **{"reading": _SETTINGS, "views": "center", "model": {}, "points": None, "versions": {}},
        **{"weights_sha256": "0" * 64, "parity": parity},
    }
    onnx.helper.set_model_props(graph, {"cxr_vit_manifest": json.dumps(manifest)})
    return bytes(graph.SerializeToString())


@pytest.fixture
def refusal(content: bytes, tmp_path: Path) -> Callable[..., str]:
    """Return the message for a file that a function changed."""

    def message_for(change: Callable[[Any], None]) -> str:
        proto = onnx.load_model_from_string(content)
        change(proto)
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError) as caught:
            open_onnx(path).probabilities(np.zeros((1, 40, 40), np.uint8))
        message = str(caught.value)
        assert str(path) in message
        assert len(message) < 700
        return message

    return message_for


def test_whole_file_is_opened(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    predictor = open_onnx(path)
    assert predictor.chunk == 64
    assert predictor.probabilities(np.zeros((2, 40, 40), np.uint8)).shape == (2, 14)


def test_file_that_is_not_that_of_the_manifest_beside_it_is_refused(
    content: bytes, tmp_path: Path
) -> None:
    path, beside = tmp_path / "model.onnx", tmp_path / "manifest.json"
    path.write_bytes(content)
    beside.write_text(json.dumps({"onnx_sha256": hashlib.sha256(content).hexdigest()}))
    open_onnx(path)
    proto = onnx.load_model_from_string(content)
    proto.doc_string = "changed"  # runs as before
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="it was changed, or damaged in a copy"):
        open_onnx(path)
    beside.write_text('{"name": "another program"}')
    open_onnx(path)
    beside.write_text("{")
    with pytest.raises(ModelError, match=r"manifest\.json, which has the hash"):
        open_onnx(path)


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_part_of_a_file_is_refused(content: bytes, tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content[:size])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        open_onnx(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    for path in (tmp_path, tmp_path / "absent.onnx", pipe):
        with pytest.raises(ModelError, match=r"Correct the path"):
            open_onnx(path)
    text = tmp_path / "page.onnx"
    text.write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(ModelError, match=r"page\.onnx"):
        open_onnx(text)


def set_manifest(**changes: Any) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        (item,) = proto.metadata_props
        item.value = json.dumps({**json.loads(item.value), **changes})

    return change


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format"),
        ({"labels": []}, "labels"),
        ({"labels": ["Mass", "Mass"]}, "two are the same"),
        ({"kind": "hf"}, "an export --to hf"),
        ({"labels": ["\x1b[2J"]}, "labels"),
        ({"image_size": 10**6}, "image_size"),
        ({"reading": {**_SETTINGS, "image_size": 60000}}, "manifest"),
        ({"reading": {**_SETTINGS, "image_size": 16}}, "manifest"),
        ({"reading": {**_SETTINGS, "max_megapixels": 60000}}, "manifest"),
        ({"reading": {**_SETTINGS, "resize": "nearest"}}, "manifest"),
        ({"parity": {"largest_difference": float("nan")}}, "manifest"),
        ({"command": "rm -r /"}, "command"),
        ({"notice": "x" * 2**24}, "too long"),
    ],
)
def test_other_manifest_is_refused(refusal: Any, changes: Any, reason: str) -> None:
    assert reason in refusal(set_manifest(**changes))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null"])
def test_text_in_place_of_a_manifest_is_refused(refusal: Any, text: str) -> None:
    def change(proto: Any) -> None:
        proto.metadata_props[0].value = text

    assert "its manifest cannot be used" in refusal(change)


def test_other_number_of_labels_is_refused(refusal: Any) -> None:
    assert "no probability of each label" in refusal(set_manifest(labels=["Mass"]))


def test_output_that_is_no_probability_is_refused(refusal: Any) -> None:
    def change(proto: Any) -> None:
        (node,) = [node for node in proto.graph.node if node.op_type == "Sigmoid"]
        node.op_type = "Neg"

    assert "no probability of each label" in refusal(change)


def test_file_without_manifest_is_refused(refusal: Any) -> None:
    assert "no manifest" in refusal(lambda proto: proto.ClearField("metadata_props"))


def _external(tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")


@pytest.mark.parametrize("place", ["initializer", "attribute"])
def test_weights_in_other_files_are_refused(refusal: Any, place: str) -> None:
    def change(proto: Any) -> None:
        if place == "initializer":
            _external(proto.graph.initializer[0])
        else:
            (node,) = [node for node in proto.graph.node if node.op_type == "Constant"][:1]
            _external(node.attribute[0].t)

    assert "Nothing of it was run" in refusal(change)


def test_operators_of_other_libraries_are_refused(refusal: Any) -> None:
    def change(proto: Any) -> None:
        proto.opset_import.add(domain="com.example", version=1)
        (node,) = [node for node in proto.graph.node if node.op_type == "Sigmoid"]
        node.domain = "com.example"

    assert "onnxruntime cannot run it" in refusal(change)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_missing_library_is_named(
    content: bytes, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineUnavailable, match=rf"{name} .*cxr-vit\[export\]"):
        open_onnx(path)
