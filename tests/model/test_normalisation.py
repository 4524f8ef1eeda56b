"""Mean and standard deviation of the images: where they come from, and how they are applied."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from cxr_vit import ViTModule
from cxr_vit.config import BatchPlan
from cxr_vit.data.dataset import dataset_of_files
from cxr_vit.data.images import read_gray
from cxr_vit.engines.ipu.graphs import graph_shape
from cxr_vit.errors import ConfigError, ModelError
from cxr_vit.model.normalisation import Normalise
from cxr_vit.model.source import read_preprocessor
from families import images, save

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
GIVEN = ("model.image_mean=[0.485, 0.456, 0.406]", "model.image_std=[0.229, 0.224, 0.225]")


@pytest.fixture
def make_module(make_config, tmp_path, caplog):
    """Set up a module on a folder with these keys in its preprocessor_config.json."""
    caplog.set_level(logging.INFO, logger="cxr_vit")
    folder = tmp_path / "start"

    def make(preprocessor, *overrides, **settings):
        save("vit", folder, **settings)
        if preprocessor is not None:
            kind = {"image_processor_type": "ViTImageProcessor", "do_normalize": True}
            text = json.dumps({**kind, **preprocessor})
            (folder / "preprocessor_config.json").write_text(text)
        module = ViTModule(
            make_config(f"model.name={folder}", "pipeline.layers_per_stage=[1, 1]", *overrides)
        )
        module.setup()
        return module

    return make


def saved(module):
    return json.loads(module.model.hub_files()["preprocessor_config.json"])


def test_numbers_of_the_weights_are_used_and_named(make_module, caplog):
    module = make_module(IMAGENET)
    assert {key: saved(module)[key] for key in IMAGENET} == IMAGENET
    assert "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225], from the pre" in caplog.text
    assert "WARNING" not in caplog.text


def test_one_number_of_the_weights_is_for_all_channels(make_module, caplog):
    module = make_module({"do_normalize": False})
    assert (saved(module)["image_mean"], saved(module)["image_std"]) == ([0.0] * 3, [1.0] * 3)
    module = make_module({"do_normalize": False}, *GIVEN)
    assert {key: saved(module)[key] for key in IMAGENET} == IMAGENET
    assert "model.image_mean=[0.485, 0.456, 0.406], model.image_std" in caplog.text
    assert "has mean 0.0, std 1.0" in caplog.text


def test_a_half_of_the_weights_needs_no_words(make_module, caplog):
    module = make_module({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert saved(module)["image_mean"] == saved(module)["image_std"] == [0.5] * 3
    assert "normalised" not in caplog.text


def test_a_half_as_the_default_is_named(make_module, caplog, tmp_path):
    assert saved(make_module(None))["image_mean"] == [0.5] * 3
    line = (
        f"no preprocessor_config.json beside {tmp_path / 'start'}: images are normalised with mean"
        " 0.5, std 0.5; set model.image_mean and model.image_std"
    )
    assert line in caplog.text
    caplog.clear()
    make_module(None, *GIVEN)
    assert "normalised" not in caplog.text


def test_one_of_mean_and_deviation_is_taken(make_module, caplog):
    module = make_module({"image_mean": IMAGENET["image_mean"], "resample": 3})
    assert saved(module)["image_mean"] == IMAGENET["image_mean"]
    assert saved(module)["image_std"] == [0.5] * 3
    assert "has no std: images are normalised with std 0.5; set model.image_std" in caplog.text
    assert "has resample=bicubic" in caplog.text
    module = make_module({"image_mean": 0.4, "image_std": IMAGENET["image_std"]})
    assert saved(module)["image_mean"] == [0.4] * 3
    assert saved(module)["image_std"] == IMAGENET["image_std"]


def test_keys_that_are_only_compared_may_have_any_form(make_module, caplog):
    module = make_module({**IMAGENET, "size": "large", "resample": "bicubic"})
    assert saved(module)["image_mean"] == IMAGENET["image_mean"]
    assert "size='large' is of an unknown form and is ignored" in caplog.text


def test_damaged_file_is_refused_only_if_it_is_needed(make_module, caplog):
    bad = {"image_mean": "a"}
    with pytest.raises(ModelError, match=r"Correct it, or set model\.image_mean and") as caught:
        make_module(bad)
    assert "Set it to a folder" not in str(caught.value)
    assert "Input should be" not in str(caught.value)
    assert saved(make_module(bad, *GIVEN))["image_mean"] == IMAGENET["image_mean"]
    assert "It is ignored: model.image_mean and model.image_std are set" in caplog.text


def test_file_of_other_channels_is_named(make_module):
    with pytest.raises(ModelError, match=r"the mean in the preprocessor_config\.json of .* has 4"):
        make_module({"image_mean": [0.5] * 4, "image_std": [0.5] * 4})


def test_configuration_counts_and_a_difference_is_named(make_module, caplog):
    module = make_module(IMAGENET, "model.image_mean=0.45", "model.image_std=0.229")
    assert saved(module)["image_mean"] == [0.45] * 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(
        "images are normalised with model.image_mean=0.45, model.image_std=0.229; the preprocessor_"
    )
    assert line.endswith("has mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]")


def test_configuration_that_says_the_same_needs_no_words(make_module, caplog):
    make_module(IMAGENET, *GIVEN)
    assert "normalised" not in caplog.text


@pytest.mark.parametrize(
    ("preprocessor", "words"),
    [
        ({"size": {"height": 64, "width": 64}}, "has 64 pixels, and data.image_size=32"),
        ({"resample": 3}, "has resample=bicubic, and data.resample=bilinear"),
        ({"resample": 2, "size": {"height": 32, "width": 32}}, None),
        (
            {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
            "has images cut out of 40 pixels, and data.resize=null",
        ),
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
            None,
        ),
    ],
)
def test_another_size_and_filter_are_named(make_module, caplog, preprocessor, words):
    make_module({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **preprocessor})
    assert (words or "") in caplog.text
    assert ("the configuration counts" in caplog.text) == bool(words)


@pytest.mark.parametrize("cut", ["[2]", "[1, 1]"])
def test_every_channel_has_its_own_numbers(make_module, tmp_path, cut):
    module = make_module(None, *GIVEN, f"pipeline.layers_per_stage={cut}", "data.resample=bicubic")
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, text in module.model.hub_files().items():
        (folder / name).write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    image = torch.from_numpy(read_gray(folder / "image.png", 32))[None, None]
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    with Image.open(folder / "image.png") as file:
        theirs = processor(file.convert("RGB"), return_tensors="pt")["pixel_values"]
    ours = module.model.stage(0).normalise(image)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert not torch.equal(ours[:, 0], ours[:, 2])
    assert saved(module)["resample"] == 3  # Pillow's bicubic


def test_the_saved_preprocessor_resizes_and_cuts_out_the_center(make_config, tmp_path):
    overrides = ("data.image_size=32", "data.resize=40", "data.root=" + str(tmp_path))
    module = ViTModule(make_config(*overrides))
    module.setup()
    for name, text in module.model.hub_files().items():
        (tmp_path / name).write_text(text)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)  # no square
    Image.fromarray(pixels).save(tmp_path / "image.png")
    files = dataset_of_files([tmp_path / "image.png"], num_classes=2, data=module.config.data)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    with Image.open(tmp_path / "image.png") as file:
        theirs = processor(file.convert("RGB"), return_tensors="pt")["pixel_values"]
    ours = module.model.stage(0).normalise(files[0].image[None])
    assert ours.shape == theirs.shape == (1, 3, 32, 32)
    assert torch.allclose(ours, theirs, atol=1e-6)
    saved = read_preprocessor(tmp_path)
    assert (saved.size, saved.read_size) == (32, 40)


def test_equal_channels_are_computed_once():
    ours = Normalise(mean=[0.4] * 3, std=0.3, num_channels=3)(images(8))
    once = images(8).float() * (1.0 / (255.0 * 0.3)) + -0.4 / 0.3
    assert torch.equal(ours, once.expand(-1, 3, -1, -1))
    assert ours.stride(1) == 0


def test_fp16_does_not_round_the_numbers():
    exact = Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), num_channels=3)
    expected = exact(images(8))
    assert torch.equal(exact.half()(images(8)), expected)
    assert not list(exact.buffers())


def test_numbers_must_be_those_of_the_channels(make_module):
    with pytest.raises(ModelError, match="the model takes images of 1 channel"):
        make_module(None, *GIVEN, num_channels=1)


def test_compiled_graphs_of_other_numbers_are_not_used(make_module):
    """PopART finds a graph in the cache by its operations, not by the values of constants."""
    keys = []
    for overrides in (
        (),
        ("model.image_mean=0.5", "model.image_std=[0.5, 0.5, 0.5]"),
        GIVEN,
        GIVEN[:1],
        ("model.pooling=mean",),
        ("loss.name=focal",),
        ("loss.name=asymmetric",),
        ("loss={name: asymmetric, clip: 0}",),
    ):
        module = make_module(None, *overrides)
        batch = BatchPlan.from_section(module.config.batch)
        keys.append(json.dumps(graph_shape(module.config, batch, module.model), default=str))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 7


@pytest.mark.parametrize("value", ["0", "1", "[]", "[0.5, 0]", "gray"])
def test_mean_out_of_range_is_refused(make_config, value):
    with pytest.raises(ConfigError, match="image_mean"):
        make_config(f"model.image_mean={value}")
