"""The readers of files that a user is handed, each with valid files and a way to read one."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule, cli
from cxr_vit.config import load_config, read_config
from cxr_vit.config.columns import PatternColumn, searchable_length
from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.schema import ModelSection
from cxr_vit.data.dicom_header import read_dicom_header
from cxr_vit.data.image_source import open_image_source
from cxr_vit.data.images import gray_or_reason
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.nih import read_boxes, read_records, read_relabels
from cxr_vit.data.records import RELABELS
from cxr_vit.data.splits import make_splits
from cxr_vit.data.table import read_table_records
from cxr_vit.data.table_files import read_columns, read_header
from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CxrVitError, ModelError
from cxr_vit.model.source import read_config as read_saved_config
from cxr_vit.model.source import read_preprocessor
from cxr_vit.model.vit import build_vit, check_source
from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint
from cxr_vit.training.loggers import CsvLogger, JsonlLogger

from . import inputs
from .inputs import Strategy
from .runs import SMALL

#: Side of the images of the fuzzed cache and files, pixels.
SIDE = 16


class Reader(NamedTuple):
    """What is drawn, and the function that reads it."""

    strategy: Strategy
    read: Callable[[Any], Any]
    #: Fraction of the examples that a slower reader is given.
    share: float = 1.0


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Configuration

_CONFIG: Dict[str, Any] = {
    "run": {"name": "a", "seed": 1},
    "data": {"root": "data/x", "image_size": 64, "val_fraction": 0.1, "cache": "auto"},
    "pipeline": {"layers_per_stage": [1, 1, 2], "recompute": ["every_layer", [0, 1], []]},
    "batch": {"micro_batch_size": 4, "global_batch_size": 32},
    "optim": {"lr": 1e-3, "loss_scaling": "auto"},
    "engine": {"poptorch_options": {"both": {"a": 1}}, "name": "torch"},
    "callbacks": [{"class": "a.B", "args": {"x": 1, "y": [1e-3, {"z": None}]}}],
    "loggers": ["jsonl", {"class": "c.D", "args": {}}],
}


def config_files(folder: Path) -> Reader:
    path = folder / "config.yaml"
    return Reader(
        inputs.damaged_yaml([_CONFIG]), lambda data: read_config([_write(path, data)], [])
    )


def overrides(folder: Path) -> Reader:
    from hypothesis import strategies as st

    keys = [key for section in _CONFIG if isinstance(_CONFIG[section], dict) for key in [section]]
    fields = [f"{key}.{field}" for key in keys for field in _CONFIG[key]]
    words = [*keys, *fields, "callbacks", "loggers", "engine.popart_options", ".", "", "a.b"]
    key = st.one_of(st.sampled_from(words), st.text(max_size=8))
    word = st.builds("{}={}".format, key, inputs.yaml_text())
    words_of_a_line = st.lists(word | st.text(max_size=20), min_size=1, max_size=3)
    return Reader(words_of_a_line, lambda given: load_config([], given))


_IPU_CONFIG: Dict[str, Any] = {
    "layers_per_ipu": [3, 3, -1, -1],
    "ipus_per_replica": 4,
    "replication_factor": {"pod4": 1, "default": 2},
    "matmul_proportion": [0.1, 0.2, 0.3, 0.4],
    "inference_layers_per_ipu": [6, 6],
    "optimizer_state_offchip": True,
    "executable_cache_dir": "./cache",
    "seed": 3,
}
_EXAMPLE: Dict[str, Any] = {
    "a": {
        "layers_per_ipu": [3, 3, 3, 3],
        "precision": "16.16",
        "adam_betas": [0.9, 0.99],
        "training_steps": 100,
        "device_iterations": 2,
        "patches_size": [16, 16],
        "layer_norm_eps": 1e-6,
        "pretrain": True,
        "recompute_mid_layers": [1, 4],
        "recompute_checkpoint_every_layer": True,
        "<<": {"optimizer": "LAMB", "max_norm": 1.5},
    }
}


def ipu_configs(folder: Path) -> Reader:
    path = folder / "ipu_config.json"
    words = ["import-ipu-config", str(path)]
    return Reader(
        inputs.damaged_json([_IPU_CONFIG]), lambda data: (_write(path, data), cli.main(words))
    )


def example_entries(folder: Path) -> Reader:
    path = folder / "configs.yml"
    words = ["import-ipu-config", str(path), "--entry", "a"]
    return Reader(
        inputs.damaged_yaml([_EXAMPLE]), lambda data: (_write(path, data), cli.main(words))
    )


# Tables

_CSV_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
_NAMES = [f"{patient:08d}_{visit:03d}.png" for patient in range(1, 6) for visit in range(2)]
_CSV = "\n".join(
    [_CSV_HEADER]
    + [
        f"{name},{FINDINGS[row]}|Mass,{row % 2},{row // 2 + 1},5{row},M,PA,2048,2500,0.1,0.1"
        for row, name in enumerate(_NAMES)
        if FINDINGS[row] != "Mass"
    ]
)
_BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + "\n".join(
    f"{name},Mass,{10 * row}.5,20,30,40,,," for row, name in enumerate(_NAMES)
)
_RELABELS = f"Image Index,{','.join(RELABELS)}\n" + "\n".join(
    f"{name},YES,NO,NO,YES" for name in _NAMES
)


def nih_csv(folder: Path) -> Reader:
    path = folder / "labels.csv"
    return Reader(
        inputs.damaged_table([_CSV]),
        lambda data: read_records(_write(path, data), include_no_finding=True),
    )


def boxes(folder: Path) -> Reader:
    path = folder / "boxes.csv"
    return Reader(inputs.damaged_table([_BOXES]), lambda data: read_boxes(_write(path, data)))


def relabels(folder: Path) -> Reader:
    path = folder / "relabels.csv"
    return Reader(inputs.damaged_table([_RELABELS]), lambda data: read_relabels(_write(path, data)))


_COLUMNS = {
    "image": "path",
    "patient": {"column": "path", "pattern": r"p\d+"},
    **{key: key for key in ("split", "sex", "age", "view", "source")},
}
_TABLE = "path,split,sex,age,view,source,Mass,Nodule\n" + "\n".join(
    f"p{row // 2}/{row}.png,train,Female,5{row}.0,PA,X,{'1.0' if row % 2 else -1},{row % 3 % 2}"
    for row in range(8)
)


def tables(folder: Path) -> Reader:
    """A table with every column, joined to a valid one."""
    _write(
        folder / "views.csv",
        b"path,room\n" + b"\n".join(b"p%d/%d.png,1" % (row // 2, row) for row in range(8)),
    )
    data: Any = {"format": "table", "csv": "t.csv", "join": ["views.csv"], "columns": _COLUMNS}
    section = DataSection(
        root=str(folder), labels=["Mass", "Nodule"], repeated_images="any", **data
    )
    path = folder / "t.csv"
    seeds = [_TABLE, _TABLE.replace(",", ";")]
    return Reader(
        inputs.damaged_table(seeds),
        lambda data: (_write(path, data), read_table_records(section), read_header(path, "*")),
    )


def patterns(folder: Path) -> Reader:
    """Patterns of columns, and the texts that they take longest to search."""

    def read(pattern: str) -> None:
        try:
            PatternColumn(column="a", pattern=pattern)
        except ValidationError:
            return
        length = searchable_length(pattern) - 1
        for text in ("a" * length, ("ab" * length)[:length]):
            re.search(pattern, f"{text}!")

    return Reader(inputs.regular_expressions(), read)


def parquet(folder: Path) -> Reader:
    import pytest

    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra: parquet)")
    from pyarrow.parquet import write_table

    path = folder / "t.parquet"
    columns = {"a": ["x", None, "y"] * 9, "b": [1.0, None, -1.0] * 9, "c": [True, None, False] * 9}
    write_table(
        pyarrow.table({**columns, "d": pyarrow.array(["u"] * 27).dictionary_encode()}), path
    )

    def read(data: bytes) -> Any:
        names = [name for name in read_header(_write(path, data), []) if name in "abcd"]
        return read_columns(path, names)

    return Reader(inputs.damaged_bytes([path.read_bytes()]), read)


def lists(folder: Path) -> Reader:
    """A training list; the test list is valid."""
    csv = _write(folder / "labels.csv", _CSV.encode())
    records = read_records(csv, include_no_finding=False)
    held_out = _write(folder / "test_list.txt", "\n".join(_NAMES[8:]).encode())
    path = folder / "train_val_list.txt"
    data = DataSection(
        split="official", train_list=str(path), test_list=str(held_out), val_fraction=0.3
    )

    def read(given: bytes) -> Any:
        _write(path, given)
        return make_splits(records, folder, data)

    seeds = ["\n".join(_NAMES[:8]), "\n".join(f"images_001/{name} 0 1" for name in _NAMES[:8])]
    return Reader(inputs.damaged_table(seeds), read)


# Images and their cache


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pictures() -> List[bytes]:
    gray = Image.fromarray(np.random.default_rng(0).integers(1, 255, (24, 24), dtype=np.uint8))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 16)
    colour = gray.convert("RGB")
    large = Image.new("L", (4000, 3000))
    pngs = [gray, deep, colour, colour.convert("RGBA"), gray.convert("P"), large]
    return [
        *[_encoded(image, "PNG") for image in pngs],
        *[_encoded(image, "JPEG", quality=80) for image in (gray, colour)],
        _encoded(colour, "JPEG", progressive=True, quality=60),
    ]


def _dicom() -> bytes:
    """A DICOM file; the test is skipped without pydicom, which writes it."""
    import pytest

    pydicom = pytest.importorskip("pydicom", reason="reading DICOM needs pydicom (extra: dicom)")
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    dataset = Dataset()
    dataset.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Rows = dataset.Columns = 24
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = "2048", "4096"
    dataset.RescaleIntercept, dataset.RescaleSlope = "-100", "1.5"
    dataset.PixelData = (np.arange(24 * 24) * 7).astype("<u2").tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    buffer = io.BytesIO()
    if pydicom.__version__.startswith("2."):
        dataset.is_little_endian, dataset.is_implicit_VR = True, False
        dataset.save_as(buffer, write_like_original=False)
    else:
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _read_image(path: Path, data: bytes) -> Any:
    result = gray_or_reason(_write(path, data), SIDE, max_megapixels=64)
    if isinstance(result, str):
        assert result.strip()
    else:
        assert result.shape == (SIDE, SIDE) and result.dtype == np.uint8
    return result


def images(folder: Path) -> Reader:
    path = folder / "image.png"
    return Reader(inputs.damaged_images(_pictures()), lambda data: _read_image(path, data))


def dicom(folder: Path) -> Reader:
    path = folder / "image.dcm"

    def read(data: bytes) -> Any:
        result = _read_image(path, data)
        found = read_dicom_header(path, ["PatientID", "WindowCenter"])
        assert "".join((*found.warnings, *found.tags.values())).isprintable()
        return result

    return Reader(inputs.damaged_bytes([_dicom()]), read)


def cache_index(folder: Path) -> Reader:
    """The index of a cache; its pixels and the images are those it was built from."""
    source = folder / "images"
    source.mkdir()
    for name, data in zip(_NAMES, _pictures()[:4]):
        _write(source / name, data)
    _write(source / _NAMES[4], b"damaged")
    names = _NAMES[:5]
    data = DataSection(root=str(source), image_size=SIDE, cache_workers=1)
    open_image_source(data, names)
    (index,) = (source / "cxr_vit_cache").glob("*.json")
    seed = json.loads(index.read_text(encoding="utf-8"))

    def read(given: bytes) -> Any:
        _write(index, given)
        opened = open_image_source(data, names)
        out = np.empty((len(opened.reader), SIDE, SIDE), np.uint8)
        opened.reader.read(np.arange(len(opened.reader)), out)
        return opened

    return Reader(inputs.damaged_json([seed]), read)


# Checkpoints and models


def sign(checkpoint: Path, state: Any) -> None:
    """Write trainer_state.json with a right digest, as somebody would who means harm."""
    text = inputs.as_json(state)
    if text.endswith(b"}"):
        text = text[:-1]
        digest = hashlib.sha256(text).hexdigest()
        text += f',\n  "digest": "{digest}"\n}}'.encode()
    _write(checkpoint / "trainer_state.json", text)


def sign_files(checkpoint: Path, state: Dict[str, Any]) -> None:
    """Give a checkpoint the hashes of its present files."""
    hashes = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in state["sha256"]
    }
    sign(checkpoint, {**state, "sha256": hashes})


def trainer_state(folder: Path, run: Path) -> Reader:
    checkpoint, seed = _copied(folder, run)

    def read(given: Any) -> Any:
        if isinstance(given, bytes):
            _write(checkpoint / "trainer_state.json", given)
        else:
            sign(checkpoint, given)
        return load_checkpoint(checkpoint)

    from hypothesis import strategies as st

    trees = inputs.damaged_trees([seed], root=True)
    raw = inputs.damaged_bytes([(run / "trainer_state.json").read_bytes()])
    return Reader(st.one_of(trees, trees, trees, raw), read)


def resumed_state(folder: Path, run: Path, sample_root: Path) -> Reader:
    """What a resume does with a state that it can read: engine, callbacks, steps."""
    checkpoint, seed = _copied(folder, run)
    resume = _resuming(folder, checkpoint, sample_root)

    def read(given: Any) -> Any:
        sign(checkpoint, given)
        return resume()

    return Reader(inputs.damaged_trees([seed], root=True), read, share=0.1)


def tensors(folder: Path, name: str) -> Reader:
    """A safetensors file of a checkpoint of two small parameters."""
    weights = {"classifier.bias": torch.ones(3), "classifier.weight": torch.ones(3, 2)}
    slots = {key: {"exp_avg": value, "step": torch.ones(())} for key, value in weights.items()}
    checkpoint = CheckpointStore(folder).save(
        2,
        EngineState(weights, slots, "torch.AdamW", {"updates": 2.0}, torch.arange(4)),
        files={"config.json": "{}"},
        trainer_state={},
    )
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["digest"]

    def read(given: bytes) -> Any:
        _write(checkpoint / name, given)
        sign_files(checkpoint, state)
        return load_checkpoint(checkpoint)

    return Reader(inputs.damaged_tensors([(checkpoint / name).read_bytes()]), read)


def resumed_optimizer(folder: Path, run: Path, sample_root: Path) -> Reader:
    """What a resume does with an optimizer's state that it can read."""
    checkpoint, state = _copied(folder, run)
    resume = _resuming(folder, checkpoint, sample_root)

    def read(given: bytes) -> Any:
        _write(checkpoint / "optimizer.safetensors", given)
        sign_files(checkpoint, state)
        return resume()

    seed = (run / "optimizer.safetensors").read_bytes()
    return Reader(inputs.damaged_tensors([seed]), read, share=0.1)


def _copied(folder: Path, run: Path) -> Any:
    """Copy a checkpoint; return its path and its state without the digest."""
    checkpoint = folder / "step_00000002"
    shutil.copytree(str(run), str(checkpoint))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["digest"]
    return checkpoint, state


def _resuming(folder: Path, checkpoint: Path, sample_root: Path) -> Callable[[], Any]:
    """Return a function that resumes a checkpoint for one step, in a new folder each time."""
    given = [*SMALL, f"data.root={sample_root}", "train.steps=3", "loggers=[]"]
    config = load_config([], [*given, f"run.dir={folder / 'resumed'}"])
    data = ChestXrayDataModule(config)

    def resume() -> Any:
        shutil.rmtree(str(folder / "resumed"), ignore_errors=True)
        module = ViTModule(config, data, checkpoint=checkpoint)
        Trainer(config).fit(module, data, ckpt_path=checkpoint)

    return resume


def model_config(folder: Path, run: Path) -> Reader:
    """config.json of a model's folder: checked, and the model built if it passes."""
    model = folder / "model"
    shutil.copytree(str(run), str(model))
    section = ModelSection(name=str(model))
    settings = {"image_size": 32, "layers_per_stage": [1, 1]}

    def read(given: bytes) -> Any:
        _write(model / "config.json", given)
        check_source(section, **settings)
        with torch.random.fork_rng(devices=[]):
            return build_vit(section, names=list(FINDINGS), seed=0, **settings)

    seed = json.loads((run / "config.json").read_text())
    return Reader(inputs.damaged_json([seed]), read)


def _timm_weights() -> bytes:
    """Return a safetensors file of the smallest ViT under timm's names."""
    width = 192  # of 3 heads
    block = {
        **{f"norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")},
        **{"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)},
        **{"attn.proj.weight": (width, width), "attn.proj.bias": (width,)},
        **{"mlp.fc1.weight": (4, width), "mlp.fc1.bias": (4,)},
        **{"mlp.fc2.weight": (width, 4), "mlp.fc2.bias": (width,)},
    }
    shapes = {
        **{"cls_token": (1, 1, width), "pos_embed": (1, 17, width)},
        **{"patch_embed.proj.weight": (width, 3, 8, 8), "patch_embed.proj.bias": (width,)},
        **{f"blocks.{i}.{name}": shape for i in (0, 1) for name, shape in block.items()},
        **{"norm.weight": (width,), "norm.bias": (width,), "head.weight": (2, width)},
    }
    return bytes(save({name: torch.zeros(shape) for name, shape in shapes.items()}))


def model_tensors(folder: Path) -> Reader:
    """The tensors of a model without config.json: they give its shape."""
    model = folder / "model"
    model.mkdir()
    section = ModelSection(name=str(model))
    settings = {"image_size": 32, "layers_per_stage": [1, 1]}

    def read(given: bytes) -> Any:
        _write(model / "model.safetensors", given)
        check_source(section, **settings)
        return build_vit(section, names=list(FINDINGS), seed=0, **settings)

    return Reader(inputs.damaged_tensors([_timm_weights()]), read)


_PREPROCESSOR: Dict[str, Any] = {
    **{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3], "rescale_factor": 1 / 255},
    **{"size": {"height": 32, "width": 32}, "crop_size": 32, "resample": 2, "do_resize": True},
}
_TIMM: Dict[str, Any] = {
    **{"architecture": "vit_tiny", "model_args": {"num_heads": 3, "img_size": [32, 32]}},
    "pretrained_cfg": {"mean": [0.5], "std": [0.5], "input_size": [3, 32, 32]},
}


def preprocessors(folder: Path) -> Reader:
    """preprocessor_config.json, and timm's config.json."""
    path = folder / "preprocessor_config.json"
    timm = folder / "config.json"
    (folder / "model.safetensors").write_bytes(_timm_weights())

    def read(given: bytes) -> None:
        try:
            _write(path, given)
            read_preprocessor(folder)
            path.unlink()
            _write(timm, given)
            read_preprocessor(folder)
            read_saved_config(folder)
        except (ValueError, OSError) as error:  # the builder of the model makes an error of it
            raise ModelError(str(error)) from error

    return Reader(inputs.damaged_json([_PREPROCESSOR, _TIMM]), read)


# Metrics


def metrics_jsonl(folder: Path) -> Reader:
    return _metrics(folder, JsonlLogger)


def metrics_csv(folder: Path) -> Reader:
    return _metrics(folder, CsvLogger)


def _metrics(folder: Path, kind: Any) -> Reader:
    """The file of a logger when a run is resumed at step 3; it must accept all of them."""

    def opened(step: int) -> Any:
        log = kind()
        log.setup(folder, step)
        return log

    log = opened(0)
    for step in range(1, 6):
        log.log_metrics({"train/loss": 0.5 / step, "train/lr": None}, step)
    seed = log.path.read_bytes()

    def read(given: bytes) -> None:
        _write(log.path, given)
        try:
            resumed = opened(3)
            resumed.log_metrics({"train/loss": 1.0, "new": 2.0}, 4)
        except CxrVitError as error:
            raise AssertionError("a damaged log must not stop a run") from error

    return Reader(inputs.damaged_bytes([seed]) | inputs.damaged_table([seed.decode()]), read)


def all_readers(folder: Path, run: Path, sample_root: Path) -> Dict[str, Callable[[], Reader]]:
    """Return the readers by name; `run` is a checkpoint, `folder` an empty one."""

    def own(make: Callable[..., Reader], *more: Any) -> Callable[[], Reader]:
        return lambda: make(folder, *more)

    return {
        "config files": own(config_files),
        "overrides": own(overrides),
        "IPUConfigs": own(ipu_configs),
        "entries of Graphcore's example": own(example_entries),
        "NIH's CSV": own(nih_csv),
        "tables": own(tables),
        "patterns": own(patterns),
        "Parquet": own(parquet),
        "lists": own(lists),
        "boxes": own(boxes),
        "relabels": own(relabels),
        "images": own(images),
        "DICOM": own(dicom),
        "cache index": own(cache_index),
        "trainer state": own(trainer_state, run),
        "resumed state": own(resumed_state, run, sample_root),
        "model weights": own(tensors, "model.safetensors"),
        "optimizer": own(tensors, "optimizer.safetensors"),
        "resumed optimizer": own(resumed_optimizer, run, sample_root),
        "model config": own(model_config, run),
        "model tensors": own(model_tensors),
        "preprocessors": own(preprocessors),
        "metrics.jsonl": own(metrics_jsonl),
        "metrics.csv": own(metrics_csv),
    }


def names(readers: Optional[Sequence[str]] = None) -> List[str]:
    """Return the names of all readers, for parametrisation."""
    return list(all_readers(Path(), Path(), Path()))
