"""Model folders and hub names of others: what is read of them, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import evaluate
import train
from cxr_vit import cli
from cxr_vit.checkpoint_files import sha256, state_text
from cxr_vit.config.schema import ModelSection
from cxr_vit.data.labels import FINDINGS
from cxr_vit.errors import ModelError
from cxr_vit.model import source
from cxr_vit.model.key_names import hub_name
from cxr_vit.model.source import read_preprocessor
from cxr_vit.model.vit import build_vit, check_source

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def build(name: Any, **settings: Any) -> ViTForImageClassification:
    model = ModelSection(name=str(name), **settings)
    arguments: Dict[str, Any] = {"image_size": 32, "layers_per_stage": [1, 1]}
    check_source(model, **arguments)
    return build_vit(
        model, names=FINDINGS, seed=0, prevalence=np.full(len(FINDINGS), 0.1), **arguments
    )


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    folder = tmp_path / "trunk"
    ViTModel(ViTConfig(**TINY)).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def shard(folder: Path) -> List[Path]:
    """Divide model.safetensors into two files and an index."""
    weights = load_file(str(folder / "model.safetensors"))
    places = {name: index % 2 for index, name in enumerate(weights)}
    paths = [folder / f"model-0000{index + 1}-of-00002.safetensors" for index in range(2)]
    for index, path in enumerate(paths):
        part = {name: value for name, value in weights.items() if places[name] == index}
        save_file(part, str(path))
    named = {name: paths[index].name for name, index in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    (folder / "model.safetensors").unlink()
    return paths


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        build(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert len(message) < 1000
    return message


# Nothing is executed

EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("")
from transformers import ViTConfig
class EvilConfig(ViTConfig):
    pass
"""


@pytest.fixture
def plant(tmp_path: Path) -> Any:
    """Add code to a model folder that its config.json names; return a check that it did not run."""
    marker = tmp_path / "executed"

    def plant_in(folder: Path) -> Any:
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        edit_config(folder, auto_map={"AutoConfig": "evil.EvilConfig"}, model_type="vit")
        return lambda: not marker.exists()

    return plant_in


def test_training_runs_no_code_of_a_model_folder(
    repository: Path, trunk: Path, plant: Any, small_overrides: List[str], tmp_path: Path
) -> None:
    is_clean = plant(trunk)
    done = subprocess.run(
        [
            *[sys.executable, "train.py", "--config", "configs/vit_demo.yaml", *small_overrides],
            *[f"model.name={trunk}", "pipeline.layers_per_stage=[1, 1]"],
            f"run.dir={tmp_path / 'run'}",
        ],
        cwd=str(repository),
        input="y\n" * 9,
        capture_output=True,
        text=True,
    )
    assert is_clean()
    assert done.returncode == 2, done.stderr
    assert "names code to run (auto_map)" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_runs_no_code_of_a_run(
    plant: Any,
    small_overrides: List[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def call(script: Any, *words: Any) -> int:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        with pytest.raises(SystemExit) as ended:
            cli.run(script.main)
        return int(ended.value.code or 0)

    run = tmp_path / "run"
    config = ["--config", "configs/vit_demo.yaml", *small_overrides, "train.steps=1"]
    assert call(train, *config, f"run.dir={run}") == 0
    checkpoint = (run / "checkpoints" / "last").resolve()
    is_clean = plant(checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["digest"]
    state["sha256"]["config.json"] = sha256(checkpoint / "config.json")  # who plants can compute it
    (checkpoint / "trainer_state.json").write_text(state_text(state))
    assert call(evaluate, "--checkpoint", checkpoint) == 2
    assert is_clean()
    monkeypatch.undo()
    errors = capsys.readouterr().err
    assert "names code to run (auto_map)" in errors
    assert "Traceback" not in errors


def test_model_folder_is_no_code_on_the_import_path(trunk: Path) -> None:
    before = list(sys.path), set(sys.modules)
    build(trunk)
    assert before == (list(sys.path), set(sys.modules) & before[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "evil.Model"}),
        ("custom_pipelines", {"x": {"impl": "evil.Pipeline"}}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
    ],
)
def test_config_that_names_code_is_refused(trunk: Path, key: str, value: Any) -> None:
    edit_config(trunk, **{key: value})
    assert f"names code to run ({key})" in refusal(trunk)


# config.json


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "somebody/kernels"),
        ("_attn_implementation", "flash_attention_2"),
        ("hidden_act", "no_such_activation"),
        ("hidden_act", ["gelu"]),
        ("torch_dtype", "int8"),
        ("dtype", "evil.dtype"),
        ("num_hidden_layers", 1_000_000),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", None),
        ("hidden_size", 1 << 40),
        ("hidden_size", -24),
        ("hidden_size", {"evil": 1}),
        ("num_attention_heads", 0),
        ("intermediate_size", "48"),
        ("patch_size", 0),
        ("patch_size", [8, 4]),
        ("image_size", [32, 64, 1]),
        ("image_size", [32, "64"]),
        ("num_channels", 10**9),
        ("qkv_bias", "yes"),
        ("layer_norm_eps", 0),
        ("initializer_range", 1e9),
        ("initializer_range", 0),
        ("id2label", ["a", "b"]),
        ("id2label", {"first": "a"}),
        ("id2label", {"0": {"a": 1}}),
        ("id2label", {"0": "a" * 100_000}),
        ("architectures", "ViTForImageClassification"),
    ],
)
def test_value_out_of_range_is_named_in_one_line(trunk: Path, key: str, value: Any) -> None:
    edit_config(trunk, **{key: value})
    message = refusal(trunk)
    assert key in message
    assert "constrained" not in message and f"{key}." not in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size=24 is no multiple of num_attention_heads=5"),
        ({"image_size": 4}, "image_size=4 is less than patch_size=8"),
        ({"hidden_size": 60_000, "num_hidden_layers": 50}, "more than 3e+09 parameters"),
        ({"image_size": 16_000, "patch_size": 1, "hidden_size": 30}, "more than 3e+09 parameters"),
        ({"model_type": "beit"}, "of a 'beit' model; only 'vit', 'vit_mae', 'deit' and 'dinov2'"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": ["vit"] * 1000}, "only 'vit', 'vit_mae'"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(
    trunk: Path, keys: Dict[str, Any], words: str
) -> None:
    edit_config(trunk, **keys)
    assert words in refusal(trunk)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "1", '"vit"', "null", "[" * 100_000, '{"a":' * 100_000),
        *('{"model_type": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": "\\ud800"}'),
        *('{"a": ' + "9" * 5000 + "}", "\ufeff{}", '{"model_type": "vit"} {}'),
    ],
)
def test_config_that_is_no_strict_json_is_refused_in_one_line(trunk: Path, text: str) -> None:
    (trunk / "config.json").write_text(text, encoding="utf-8")
    refusal(trunk)


@pytest.mark.parametrize("kind", ["large", "pipe", "device", "latin-1", "folder", "absent", "LFS"])
def test_config_that_is_no_text_file_is_refused_in_one_line(trunk: Path, kind: str) -> None:
    path = trunk / "config.json"
    path.unlink()
    if kind == "large":
        path.write_text(json.dumps({"model_type": "vit", "more": "a" * (5 << 20)}))
    elif kind == "pipe":
        os.mkfifo(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "latin-1":
        path.write_bytes(b'{"model_type": "vit\xe9"}')
    elif kind == "folder":
        path.mkdir()
    elif kind == "LFS":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n")
    message = refusal(trunk)
    assert "Git LFS pointer" in message or kind != "LFS"
    assert f"{path} cannot be read: Is a directory" in message or kind != "folder"
    assert "Set it to a folder" not in message or kind != "LFS"


def test_sides_of_a_square_are_read_as_one_number(trunk: Path) -> None:
    edit_config(trunk, image_size=[32, 32], patch_size=[8, 8])
    config = build(trunk).config
    assert (config.image_size, config.patch_size) == (32, 8)


def test_known_values_are_used_and_unknown_keys_are_not(trunk: Path) -> None:
    edit_config(
        trunk,
        **{"layer_norm_eps": 1e-3, "hidden_act": "quick_gelu", "attn_implementation": "eager"},
        **{"return_dict": False, "output_attentions": True, "id2label": {"1": "b", "0": "a"}},
    )
    config = build(trunk).config
    assert (config.layer_norm_eps, config.hidden_act) == (1e-3, "quick_gelu")
    assert config._attn_implementation == "eager"
    assert config.output_attentions is not True
    with torch.no_grad():
        assert build(trunk)(torch.zeros(1, 3, 32, 32)).logits.shape == (1, len(FINDINGS))


def test_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    labels = {"id2label": dict(enumerate("abcdefghijkl")), "label2id": {}}
    ViTForImageClassification(ViTConfig(**TINY, **labels)).save_pretrained(tmp_path)
    found = check_source(ModelSection(name=str(tmp_path)), image_size=32, layers_per_stage=[1, 1])
    assert found == list("abcdefghijkl")


# Weights


def test_sharded_weights_are_those_of_one_file(trunk: Path) -> None:
    whole = build(trunk).state_dict()
    shard(trunk)
    divided = build(trunk).state_dict()
    assert all(torch.equal(divided[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    "name",
    [
        *("../elsewhere.safetensors", "/etc/passwd", "pytorch_model-00001-of-00002.bin", ""),
        *("model-00001-of-00002.safetensors/x", "model-1.safetensors", 7, None),
    ],
)
def test_index_names_files_of_its_folder_only(trunk: Path, name: Any) -> None:
    shard(trunk)
    path = trunk / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {**places, "layernorm.weight": name}}))
    assert "weight_map must name files such as" in refusal(trunk)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_invalid_index_is_refused(trunk: Path, content: str) -> None:
    shard(trunk)
    (trunk / "model.safetensors.index.json").write_text(content)
    assert "index.json" in refusal(trunk)


def test_missing_and_repeated_shards_are_refused(trunk: Path) -> None:
    first, second = shard(trunk)
    content = second.read_bytes()
    second.unlink()
    assert "is missing or no regular file" in refusal(trunk)
    shutil.copy(str(first), str(second))
    assert "is in another file of the folder as well" in refusal(trunk)
    second.write_bytes(content)
    build(trunk)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "is a Git LFS pointer"),
        (b"", "is truncated or no safetensors file (0 bytes)"),
        (b"\x80\x02}q\x00.", "is truncated or no safetensors file"),
        (b"\xff" * 100, "is truncated or no safetensors file (100 bytes)"),
        ((99).to_bytes(8, "little") + b"{" * 99, "is truncated or damaged"),
    ],
)
def test_file_that_holds_no_tensors_says_why(trunk: Path, content: bytes, words: str) -> None:
    (trunk / "model.safetensors").write_bytes(content)
    assert words in refusal(trunk)


def test_check_looks_at_the_weights_of_a_folder(trunk: Path) -> None:
    words = ["check", f"model.name={trunk}", "data.image_size=32"]
    words += ["pipeline.layers_per_stage=[1, 1]", "model.patch_size=8"]
    assert cli.main(words) == 0
    path = trunk / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-9], content[:9], b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"truncated|LFS pointer"):
            cli.main(words)


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_truncated_weights_are_named_as_such(trunk: Path, part: float) -> None:
    path = trunk / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    assert "is truncated or" in refusal(trunk)


def test_weights_in_a_pipe_do_not_block(trunk: Path) -> None:
    (trunk / "model.safetensors").unlink()
    os.mkfifo(str(trunk / "model.safetensors"))
    assert "no regular file" in refusal(trunk)


def test_weights_that_are_no_floats_are_refused(trunk: Path) -> None:
    path = str(trunk / "model.safetensors")
    weights = load_file(path)
    save_file({**weights, "layernorm.weight": torch.ones(24, dtype=torch.int32)}, path)
    assert "layernorm.weight is of the type I32" in refusal(trunk)
    save_file({**weights, "decoder.steps": torch.ones(1, dtype=torch.int64)}, path)
    build(trunk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_fp32(trunk: Path, dtype: torch.dtype) -> None:
    path = str(trunk / "model.safetensors")
    weights = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(weights, path)
    loaded = {hub_name(name): value for name, value in build(trunk).state_dict().items()}
    assert torch.equal(loaded["vit.layernorm.weight"], weights["layernorm.weight"].float())
    assert all(value.dtype == torch.float32 for value in loaded.values())


def test_weight_under_two_names_is_refused(trunk: Path) -> None:
    path = str(trunk / "model.safetensors")
    weights = load_file(path)
    old = "encoder.layer.0.output.dense.bias"
    save_file({**weights, "layers.0.mlp.fc2.bias": weights[old].clone()}, path)
    assert f"it has the weights vit.{old} twice" in refusal(trunk)


def test_pickles_and_adapters_are_not_read(trunk: Path) -> None:
    (trunk / "adapter_config.json").write_text("{")
    (trunk / "adapter_model.bin").write_bytes(b"")
    (trunk / "generation_config.json").write_text("{")
    build(trunk)
    (trunk / "model.safetensors").unlink()
    assert "Pickles (.bin) are not read, they can run code" in refusal(trunk)


# Files


def test_only_safetensors_file_may_have_any_name(trunk: Path) -> None:
    whole = build(trunk).state_dict()
    path = trunk / "backbone.safetensors"
    (trunk / "model.safetensors").rename(path)
    for name in (trunk, path):
        assert all(torch.equal(build(name).state_dict()[key], whole[key]) for key in whole)
    path.rename(trunk / "my weights.SafeTensors")
    build(trunk)
    build(trunk / "my weights.SafeTensors")
    (trunk / "my weights.SafeTensors").rename(path)
    shutil.copy(str(path), str(trunk / "dino_head.safetensors"))
    assert "but backbone.safetensors, dino_head.safetensors: set model.name to" in refusal(trunk)
    assert torch.equal(build(path).state_dict()["classifier.weight"], whole["classifier.weight"])


def test_pickle_is_refused_with_the_command_that_converts_it(trunk: Path) -> None:
    for name in ("weights.pth", "training_args.bin", "pytorch_model.bin", "it's.pt"):
        torch.save({}, str(trunk / name))
    command = "python -m cxr_vit convert-weights"
    assert f"{command} '{trunk}/it'\"'\"'s.pt' NEW_FOLDER" in refusal(trunk / "it's.pt")
    assert command not in refusal(trunk / "config.json")
    (trunk / "model.safetensors").unlink()
    assert f"{command} {trunk}/pytorch_model.bin NEW_FOLDER" in refusal(trunk)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a b", "\u202e", "n" * 500, ""])
def test_name_of_a_tensor_that_cannot_be_shown_is_refused(trunk: Path, name: str) -> None:
    path = str(trunk / "model.safetensors")
    save_file({**load_file(path), name: torch.ones(1)}, path)
    message = refusal(trunk)
    assert "is no name of a tensor of a ViT" in message
    assert message.isprintable()


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [1 << 62, 4], [-1], [1 << 70], [True]])
def test_shape_that_the_file_does_not_hold_is_refused(trunk: Path, shape: List[int]) -> None:
    path = trunk / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["layernorm.bias"]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    assert "is truncated or damaged" in refusal(trunk)


# Preprocessing

NORMALISATION = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def preprocessor(folder: Path, file: str = "preprocessor_config.json", **content: Any) -> Any:
    (folder / file).write_text(json.dumps(content))
    return read_preprocessor(folder)


@pytest.mark.parametrize(
    ("keys", "size", "resample"),
    [
        ({"size": 224, "resample": 2}, 224, 2),
        ({"size": [224, 224]}, 224, None),
        ({"size": [224, 448]}, None, None),
        ({"size": {"height": 224, "width": 224}, "resample": 3}, 224, 3),
        ({"size": {"height": 224, "width": 448}}, None, None),
        ({"size": {"shortest_edge": 518}}, 518, None),
        ({"size": {"longest_edge": 518, "shortest_edge": None}}, None, None),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224, None),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, 256, None),
        ({"size": 256, "crop_size": 224, "do_resize": False}, 224, None),
        ({"size": 256, "do_resize": False, "do_normalize": True}, None, None),
    ],
)
def test_preprocessor_config_is_read(
    tmp_path: Path, keys: Dict[str, Any], size: Any, resample: Any
) -> None:
    found = preprocessor(tmp_path, **NORMALISATION, **keys)
    assert found[:4] == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), size, resample)


@pytest.mark.parametrize(
    ("keys", "mean", "std"),
    [
        ({"image_mean": 0.4, "image_std": 0.2}, (0.4,), (0.2,)),
        ({"do_normalize": False}, (0.0,), (1.0,)),
        ({**NORMALISATION, "rescale_factor": 0.00392156862745098}, (0.1, 0.2, 0.3), None),
        ({"image_mean": 1, "image_std": 0.5, "rescale_factor": 2 / 255}, (0.5,), (0.25,)),
        ({"image_mean": 127.5, "image_std": 51.0, "do_rescale": False}, (0.5,), (0.2,)),
    ],
)
def test_mean_and_deviation_are_of_gray_levels_of_0_to_1(
    tmp_path: Path, keys: Dict[str, Any], mean: Any, std: Any
) -> None:
    found = preprocessor(tmp_path, **keys)
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std or (0.4, 0.5, 0.6))


def test_preprocessing_that_no_file_describes_is_unknown(trunk: Path) -> None:
    assert read_preprocessor(trunk) is None
    assert read_preprocessor(trunk / "model.safetensors") is None
    assert preprocessor(trunk, size=224)[:3] == (None, None, 224)


def test_pretrained_cfg_of_timm_describes_the_preprocessing(tmp_path: Path) -> None:
    keys = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 224, 224]}
    expected = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 224, 3, "config.json", None)
    given = {"architecture": "vit_tiny", "pretrained_cfg": {**keys, "interpolation": "bicubic"}}
    assert preprocessor(tmp_path, "config.json", **given) == expected
    flat = {"architecture": "vit_tiny", **keys, "interpolation": "bicubic"}  # timm 0.6
    assert preprocessor(tmp_path, "config.json", **flat) == expected
    assert preprocessor(tmp_path, "config.json", architecture="a", pretrained_cfg={}) is None
    assert preprocessor(tmp_path, "config.json", architecture="a", pretrained_cfg=None) is None
    with pytest.raises(ValueError, match=r"pretrained_cfg=\[1\] is no JSON object"):
        preprocessor(tmp_path, "config.json", architecture="a", pretrained_cfg=[1])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"image_mean": ["a"]}, "image_mean"),
        ({"image_mean": "a"}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": [1e-30] * 3}, "image_std"),
        ({"image_mean": [0.5] * 1000}, "image_mean"),
        ({"image_mean": []}, "image_mean"),
        ({"image_std": [0.5] * 2}, "3 values of the mean, 2 of the deviation"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"do_normalize": "no"}, "do_normalize"),
    ],
)
def test_invalid_preprocessor_config_names_the_key(
    tmp_path: Path, keys: Dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        preprocessor(tmp_path, **{**NORMALISATION, **keys})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "keys",
    [{"size": -1}, {"size": {"height": "a"}}, {"crop_size": True}, {"resample": 99}],
)
def test_invalid_values_that_are_only_compared_are_absent(
    tmp_path: Path, keys: Dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = preprocessor(tmp_path, **NORMALISATION, **keys)
    assert found[:4] == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), None, None)
    assert f"preprocessor_config.json: {next(iter(keys))}=" in caplog.text


# Hub names

_COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two revisions of somebody/vit."""
    root = tmp_path / "cache"
    repository = root / "models--somebody--vit"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in _COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        model = ViTModel(ViTConfig(**TINY))
        torch.nn.init.constant_(model.layernorm.bias, float(len(revision)))
        model.save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return repository


@pytest.mark.parametrize(
    ("revision", "value"), [(None, 4.0), ("main", 4.0), ("v1", 2.0), ("b" * 40, 2.0)]
)
def test_revision_of_a_hub_name_is_loaded_from_the_cache(
    cache: Path, revision: Any, value: float
) -> None:
    model = build("somebody/vit", revision=revision)
    loaded = {hub_name(name): weight for name, weight in model.state_dict().items()}
    assert torch.equal(loaded["vit.layernorm.bias"], torch.full((24,), value))


def test_offline_hub_name_that_is_not_cached_is_one_line(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"not in the hub's cache .* HF_HUB_OFFLINE is set"):
        build("somebody/else")
    with pytest.raises(ModelError, match=r"at model\.revision=v2: it is not in the hub's cache"):
        build("somebody/vit", revision="v2")
    (cache / "snapshots" / _COMMITS["main"] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        build("somebody/vit")


@pytest.mark.parametrize("name", ["a/b/c", "../up", "a b/c", "owner/", "x/\u202ey\n"])
def test_name_that_is_neither_a_folder_nor_of_the_hub_is_one_line(name: str) -> None:
    with pytest.raises(ModelError, match="no hub name") as caught:
        build(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "weights", "first", "second"),
    [
        ({"model_type": "vit"}, "model", 1, 2),
        ({"architecture": "vit_tiny"}, "model", 2, 2),
        ({"architecture": "vit_tiny"}, "backbone", 3, 3),
        (None, "backbone", 3, 3),
    ],
)
def test_weights_of_a_hub_name_are_fetched_when_they_are_needed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    weights: str,
    first: int,
    second: int,
) -> None:
    """The shape of a model without Hugging Face's config.json is that of its tensors."""
    remote, local = tmp_path / "remote", tmp_path / "local"
    remote.mkdir()
    local.mkdir()
    (remote / f"{weights}.safetensors").write_bytes(b"")
    if config:
        (remote / "config.json").write_text(json.dumps(config))
    asked = []

    def download(name: str, *, revision: Any, allow_patterns: List[str]) -> str:
        asked.append(allow_patterns)
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                shutil.copy(str(file), str(local))
        return str(local)

    monkeypatch.setattr(source, "snapshot_download", download)
    section = ModelSection(name="somebody/vit")
    source.source_folder(section, config_only=True)
    assert len(asked) == first
    assert asked[0] == ["config.json", "preprocessor_config.json"]
    asked.clear()
    source.source_folder(section, config_only=False)
    assert len(asked) == second
    assert (local / f"{weights}.safetensors").exists()


def test_hub_name_without_safetensors_says_how_to_convert_it(
    trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trunk / "model.safetensors").unlink()
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: str(trunk))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match="the repository has no safetensors file") as caught:
        build("somebody/vit")
    message = str(caught.value)
    assert "\n" not in message and "convert-weights FOLDER/pytorch_model.bin" in message
    assert "Set it to a folder" not in message


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs, for the files of one folder."""

    asked: List[str] = []  # noqa: RUF012, shared on purpose
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        """Answer with the headers of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with the list of the files, or with a file."""
        path = self.path.partition("?")[0]
        names = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/"):
            if "/tree/" in path:
                content: Any = [
                    {"type": "file", "path": name, "size": 1, "oid": "c" * 40} for name in names
                ]
            else:
                siblings = [{"rfilename": name} for name in names]
                content = {"id": "somebody/vit", "sha": "a" * 40, "siblings": siblings}
            return self._answer(json.dumps(content).encode(), "application/json")
        name = path.rpartition("/")[2]
        self.asked.append(name)
        return self._answer((self.folder / name).read_bytes(), "application/octet-stream")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


LOAD = """
import sys
from cxr_vit.config.schema import ModelSection
from cxr_vit.model.vit import build_vit, check_source
model = ModelSection(name="somebody/vit")
print("config.json:", check_source(model, image_size=32, layers_per_stage=[1, 1]))
print("asked", flush=True)
sys.stdin.readline()
built = build_vit(model, names=["a"], image_size=32, layers_per_stage=[1, 1], seed=0)
print("weights:", built.num_parameters())
"""


def test_download_asks_for_no_more_than_is_used(
    trunk: Path, repository: Path, tmp_path: Path
) -> None:
    for name in ("pytorch_model.bin", "evil.py", "README.md", "tf_model.h5"):
        (trunk / name).write_text("not for us")
    Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, trunk))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD],
        cwd=str(repository),
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    while process.stdout.readline() not in ("asked\n", ""):
        pass
    first = set(Hub.asked)
    output, errors = process.communicate("\n", timeout=60)
    server.shutdown()
    server.server_close()
    assert process.returncode == 0, errors
    assert "weights:" in output
    assert first == {"config.json"}
    assert set(Hub.asked) == {"config.json", "model.safetensors"}
