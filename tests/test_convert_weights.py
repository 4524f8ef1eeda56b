"""The command `convert-weights`: pickles of weights become a model folder, and run nothing."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cxr_vit.cli import main
from cxr_vit.errors import ModelError

SAFE = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 10)
needs_safe_torch = pytest.mark.skipif(not SAFE, reason="this torch can run code of a pickle")

WEIGHTS = {"cls_token": torch.ones(1, 1, 4), "norm.weight": torch.arange(6.0).view(2, 3).t()}
OTHERS = {"cls_token": torch.zeros(1, 1, 4)}


def convert(file: Path, *words: str) -> Dict[str, torch.Tensor]:
    out = file.parent / "out"
    assert main(["convert-weights", str(file), str(out), *words]) == 0
    weights: Dict[str, torch.Tensor] = load_file(str(out / "model.safetensors"))
    return weights


def saved(folder: Path, content: Any, **options: Any) -> Path:
    file = folder / "weights.pth"
    torch.save(content, str(file), **options)
    return file


def refusal(file: Path, *words: str) -> str:
    with pytest.raises(ModelError) as caught:
        convert(file, *words)
    message = str(caught.value)
    assert message.isprintable()
    assert str(file) in message
    assert len(message) < 700
    assert not (file.parent / "out").exists()
    return message


ARGUMENTS = argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), blr=None, model="mae_vit", resume="")


@needs_safe_torch
@pytest.mark.parametrize(
    ("content", "place"),
    [
        (WEIGHTS, ""),
        ({"state_dict": WEIGHTS, "epoch": 3}, " of 'state_dict'"),
        ({"model": WEIGHTS, "optimizer": {"state": {}}, "args": ARGUMENTS}, " of 'model'"),
        ({"student": OTHERS, "teacher": {"backbone": WEIGHTS}}, " of 'teacher.backbone'"),
        ({"encoder": OTHERS, "target_encoder": WEIGHTS, "lr": 0.1}, " of 'target_encoder'"),
        ({"module": {"model": WEIGHTS}}, " of 'module.model'"),
        ({key: torch.nn.Parameter(value) for key, value in WEIGHTS.items()}, ""),
    ],
)
def test_state_dict_is_found(tmp_path: Path, content: Any, place: str, capsys: Any) -> None:
    found = convert(saved(tmp_path, content))
    assert set(found) == set(WEIGHTS)
    assert all(torch.equal(found[name], value) for name, value in WEIGHTS.items())
    out = tmp_path / "out"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"2 tensors{place} in {out / 'model.safetensors'}; use them with model.name={out}"
    )


@needs_safe_torch
def test_key_names_another_state_dict(tmp_path: Path, capsys: Any) -> None:
    file = saved(tmp_path, {"teacher": WEIGHTS, "student": {"net": OTHERS}})
    assert "no dictionary 'nobody' but the keys ['teacher', 'student']" in refusal(
        file, "--key", "nobody"
    )
    assert "has no tensors in 'student'" in refusal(file, "--key", "student")
    assert "no dictionary '' but the keys ['net']" in refusal(file, "--key", "student..net")
    for key in (".", "..", "student.", "student.net."):
        assert "has no dictionary" in refusal(file, "--key", key)
    assert torch.equal(convert(file, "--key", "student.net")["cls_token"], OTHERS["cls_token"])
    assert "not taken: teacher; --key NAME chooses" in capsys.readouterr().out


@needs_safe_torch
def test_key_may_have_dots(tmp_path: Path) -> None:
    file = saved(tmp_path, {"student": {"a.b": WEIGHTS, "a": {"c": OTHERS}}})
    assert torch.equal(convert(file, "--key", "student.a.b")["cls_token"], WEIGHTS["cls_token"])
    shutil.rmtree(str(tmp_path / "out"))
    assert torch.equal(convert(file, "--key", "student.a.c")["cls_token"], OTHERS["cls_token"])


@needs_safe_torch
def test_tied_tensors_are_written_each(tmp_path: Path) -> None:
    tied = torch.arange(5000.0).view(50, 100)
    found = convert(saved(tmp_path, {"a": tied, "b": tied, "c": tied.t()}))
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied)
    assert torch.equal(found["c"], tied.t())


@needs_safe_torch
def test_names_that_share_a_storage_are_limited(tmp_path: Path) -> None:
    tied = torch.arange(5000.0)
    many = {str(index): tied for index in range(50)}
    assert "its tensors have more bytes than the file" in refusal(saved(tmp_path, many))


@needs_safe_torch
def test_errors_of_the_file_system_name_the_file(tmp_path: Path) -> None:
    file = saved(tmp_path, WEIGHTS)
    os.mkfifo(str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match=r"config\.json: a named pipe"):
        convert(file)
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"weights\.pth.*: Not a directory"):
        main(["convert-weights", str(file), str(file / "below")])


@needs_safe_torch
def test_file_of_an_older_torch_and_views_are_read(tmp_path: Path) -> None:
    fused = torch.arange(12.0).view(6, 2)
    views = {"q": fused[:2], "k": fused[2:4], "twice": fused[:2], "more": torch.ones(9)}
    found = convert(saved(tmp_path, views, _use_new_zipfile_serialization=False))
    assert all(torch.equal(found[name], value) for name, value in views.items())


@needs_safe_torch
def test_what_is_no_float_is_left_out_and_named(tmp_path: Path, capsys: Any) -> None:
    more = {"steps": torch.ones(2, dtype=torch.int64), "sparse": torch.ones(2).to_sparse()}
    assert set(convert(saved(tmp_path, {**WEIGHTS, **more, 7: torch.ones(1)}))) == set(WEIGHTS)
    text = "left out, as they hold no floating-point numbers: steps, sparse"
    assert text in capsys.readouterr().out


@needs_safe_torch
def test_config_files_beside_the_file_are_copied(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "evil.py").write_text("")
    file = saved(tmp_path, WEIGHTS)
    convert(file)
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "vit"}
    with pytest.raises(ModelError, match=r"model\.safetensors exists\. Name another folder"):
        convert(file)


# Nothing is executed


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@needs_safe_torch
@pytest.mark.parametrize("place", ["value", "args", "whole", "older format", "plain pickle"])
def test_pickle_that_would_run_code_is_refused(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "executed"
    evil, file = Evil(marker), tmp_path / "weights.pth"
    if place == "value":
        saved(tmp_path, {"model": WEIGHTS, "more": evil})
    elif place == "args":
        saved(tmp_path, {"model": WEIGHTS, "args": argparse.Namespace(lr=evil)})
    elif place == "whole":
        saved(tmp_path, evil)
    elif place == "older format":
        saved(tmp_path, {"model": evil}, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(evil))
    message = refusal(file)
    assert "mkdir, which is no tensor" in message or place == "plain pickle"
    assert not marker.exists()
    with file.open("rb") as opened:  # the file does run code where that is allowed
        torch.load(opened, weights_only=False) if place != "plain pickle" else pickle.load(opened)
    assert marker.exists()


@needs_safe_torch
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"model": WEIGHTS, "best": np.float64(1)},
            "scalar, which is no tensor but a number of NumPy",
        ),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear, which is no tensor"),
        ({}, "has no tensors, but the keys []"),
        ([torch.ones(1)], "has no tensors, but a list"),
        ({"x": torch.ones(1).expand(10**13)}, "its tensors have more bytes than the file"),
        ({"a\x1b[2J\n": torch.ones(1)}, "is no name of a tensor"),
        ({"\ud800": torch.ones(1)}, "is no name of a tensor"),
    ],
    ids=["numpy", "module", "empty", "list", "expanded", "control", "surrogate"],
)
def test_file_without_a_state_dict_says_what_it_has(
    tmp_path: Path, content: Any, words: str
) -> None:
    assert words in refusal(saved(tmp_path, content))


@needs_safe_torch
def test_dictionary_in_itself_ends(tmp_path: Path) -> None:
    content: Dict[str, Any] = {}
    content["model"] = content
    assert "has no tensors in 'model.model" in refusal(saved(tmp_path, content))


def compressed(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", 8) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item.filename))
    return out.getvalue()


@needs_safe_torch
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (compressed, "is compressed, or a TorchScript archive"),
        (lambda data: data[: len(data) // 2], "is truncated or damaged"),
        (lambda data: b"", "is no file of torch.save, or damaged"),
        (lambda data: b"\x80\x02" + bytes(range(256)), "is no file of torch.save, or damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
    ids=["compressed", "truncated", "empty", "noise", "LFS"],
)
def test_damaged_file_is_one_line(
    tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    file = saved(tmp_path, WEIGHTS)
    file.write_bytes(change(file.read_bytes()))
    assert words in refusal(file)


def test_paths_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        convert(tmp_path / "nowhere.pth")
    os.mkfifo(str(tmp_path / "pipe.pth"))
    with pytest.raises(ModelError, match="no regular file"):
        convert(tmp_path / "pipe.pth")
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    assert "is a safetensors file already. Set model.name to it" in refusal(file)
    shutil.copy(str(file), str(tmp_path / "a.pth"))
    (tmp_path / "out").write_text("")
    with pytest.raises(ModelError, match="is no folder"):
        convert(tmp_path / "a.pth")


@pytest.mark.parametrize("version", ["2.0.1", "2.5.1+cu124", "2.9.1"])
def test_torch_that_can_be_made_to_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    file = saved(tmp_path, WEIGHTS)
    monkeypatch.setattr(torch, "__version__", version)
    message = refusal(file)
    assert f"torch {version} can be made to run code" in message
    assert "CVE-2025-32434, CVE-2026-24747" in message
    assert "where torch is 2.10 or newer" in message
