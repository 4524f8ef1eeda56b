"""The command `selftest`: right here, and what differs is found and named."""

import json
import re
import shutil
import sys
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

from cxr_vit.cli import main
from cxr_vit.commands import installation, selftest_checks
from cxr_vit.commands.selftest_checks import Environment, nearest
from cxr_vit.data.synthetic.dataset import write_sample
from cxr_vit.errors import ConfigError
from engines.processes.launch import finish, fork, needs_pipelining
from fakes import loading
from selftest_files import write_hashes

FOLDER = selftest_checks.FOLDER


@pytest.fixture
def run(capsys):
    """Run the command; return its status, and check -> its line, and all that was printed."""

    def run(*words):
        status = main(["selftest", *words])
        printed = capsys.readouterr().out
        found = re.findall(r"^(ok|differs|fails|skipped) +([^:]+): (.*)$", printed, re.MULTILINE)
        return status, {name: (word, text) for word, name, text in found}, printed

    return run


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A copy of the files, which the command reads."""
    folder = tmp_path / "selftest"
    shutil.copytree(str(FOLDER), str(folder))
    monkeypatch.setattr(selftest_checks, "FOLDER", folder)
    return folder


def failing(found):
    return {name for name, (word, _) in found.items() if word in ("differs", "fails")}


def test_nothing_differs_here(run):
    status, found, printed = run()
    assert (status, failing(found)) == (0, set()), printed
    assert printed.endswith("\nnothing differs\n")
    passed = {name for name, (word, _) in found.items() if word == "ok"}
    assert {"files", "PNG", "resized PNG", "DICOM", "DICOM, JPEG 2000"} <= passed
    assert {"configurations", "torch on CPU, fp32", "torch on CPU, bf16", "ONNX"} <= passed
    assert {"training", "saved checkpoint"} <= passed
    assert found["poptorch on IPU, fp16"][0] == "skipped"
    assert re.search(r"^torch +[\d.+a-z]+ +ok +>=2.0.1$", printed, re.MULTILINE)
    assert re.search(r"^IPU +no: PopTorch is not installed$", printed, re.MULTILINE)
    # Both environments of the tests were measured.
    assert re.search(r"^compared with torch [\d.]+, transformers [\d.]+$", printed, re.MULTILINE)


def test_files_are_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 80_000


def test_pixels_are_those_of_the_synthetic_image(tmp_path):
    write_sample(tmp_path / "sample", num_images=200, image_size=64, seed=0)
    image = Image.open(min((tmp_path / "sample").rglob("*.png")))
    with np.load(FOLDER / "pixels.npz") as pixels:
        np.testing.assert_array_equal(pixels["decoded"], np.asarray(image))
        assert pixels["resized"].shape == (32, 32) and np.ptp(pixels["resized"]) > 128


# Differences


def test_changed_decoder_is_named(run, monkeypatch):
    import kornia_rs

    decode = kornia_rs.io.decode_image_png_u8

    def other(*arguments):
        pixels = np.array(decode(*arguments))
        pixels[40, 20] ^= 4
        return pixels

    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", other)
    status, found, printed = run("--engine", "torch")
    assert status == 1
    assert failing(found) == {"PNG", "resized PNG"}
    text = r"1 of 64 x 64 pixels, by 4 at most: row 40, column 20 is (\d+), expected (\d+)"
    value, expected = map(int, re.fullmatch(text, found["PNG"][1]).groups())
    assert value ^ 4 == expected
    assert "        Install kornia-rs and pillow" in printed
    assert printed.endswith("\nnot as it should be: PNG, resized PNG\n")


DAMAGE = {
    "no folder": lambda files: shutil.rmtree(str(files)),
    "no checkpoint": lambda files: shutil.rmtree(str(files / "checkpoint")),
    "no numbers": lambda files: (files / "expected.json").unlink(),
    "empty numbers": lambda files: (files / "expected.json").write_text(""),
    "part of the numbers": lambda files: cut(files / "expected.json"),
    "no pixels": lambda files: (files / "pixels.npz").unlink(),
    "part of an image": lambda files: cut(files / "image.png"),
    "other weights": lambda files: flip(files / "checkpoint" / "model.safetensors"),
    "part of the hashes": lambda files: cut(files / "sha256.json"),
}
NAMED = {
    "no checkpoint": "missing: checkpoint/config.json, checkpoint/config.yaml, ",
    "no numbers": "missing: expected.json",
    "empty numbers": "changed: expected.json",
    "part of the numbers": "changed: expected.json",
    "no pixels": "missing: pixels.npz",
    "part of an image": "changed: image.png",
    "other weights": "changed: checkpoint/model.safetensors",
}


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_and_nothing_is_compared_with_it(run, files, damage):
    DAMAGE[damage](files)
    status, found, printed = run()
    assert status == 1
    assert list(found) == ["import", "files"] and failing(found) == {"files"}
    assert NAMED.get(damage, "Error: ") in found["files"][1]
    assert printed.endswith(
        "\n        Install the package again: files of it are missing, or have changed.\n"
    )


def test_changed_weight_is_named(run, files):
    """A weight that is changed with its hash: the numbers show it."""
    from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint

    folder = files / "checkpoint"
    state, facts = load_checkpoint(folder)
    state.weights["classifier.bias"][3] += 0.001
    names = ("config.json", "preprocessor_config.json", "config.yaml")
    texts = {name: (folder / name).read_text() for name in names}
    keys = {"format", "step", "optimizer_kind", "scalars", "sha256", "digest"}
    kept = {key: value for key, value in facts.items() if key not in keys}
    saved = CheckpointStore(files / "other").save(40, state, files=texts, trainer_state=kept)
    shutil.rmtree(str(folder))
    saved.rename(folder)
    write_hashes(files)
    status, found, _ = run("--engine", "torch")
    assert status == 1
    assert failing(found) == {"torch on CPU, fp32"}  # too little for the others
    text = (
        r"the largest difference is 0.001, and 1e-05 is allowed: logit \[\d, 3\] is .* expected .*"
    )
    assert re.fullmatch(text, found["torch on CPU, fp32"][1])


@pytest.mark.parametrize("key", ["logits", "losses"])
def test_other_expectation_is_named(run, files, key):
    environments = json.loads((files / "expected.json").read_text())
    for one in environments:
        values = one["logits"]["gelu"][1] if key == "logits" else one["losses"]
        values[2] = values[2] - 1 if key == "logits" else float("nan")
    (files / "expected.json").write_text(json.dumps(environments))
    write_hashes(files)
    status, found, _ = run("--engine", "torch")
    assert status == 1
    name = "torch on CPU, fp32" if key == "logits" else "training"
    assert name in failing(found)
    assert (": logit [1, 2] is -" if key == "logits" else ": loss [2] is 0.") in found[name][1]


def test_library_of_another_version_is_named(run, monkeypatch):
    version = metadata.version
    changed = {"numpy": "1.20.3", "kornia-rs": "0.3.1"}
    monkeypatch.setattr(metadata, "version", lambda name: changed.get(name) or version(name))
    status, _, printed = run("--engine", "pipeline")
    assert status == 1
    assert re.search(r"^numpy +1.20.3 +not as needed +>=1.24$", printed, re.MULTILINE)
    assert 'Run: pip install "numpy>=1.24" "kornia-rs<0.3,>=0.2"\n' in printed
    assert "not as it should be: numpy, kornia-rs, pipeline on 2 processes, fp32\n" in printed


def test_missing_extra_is_no_difference(run, monkeypatch):
    version = metadata.version

    def without_pydicom(name):
        if name == "pydicom":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_pydicom)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    status, found, printed = run("--engine", "torch")
    assert status == 0
    assert re.search(r"^pydicom +not installed +>=2.4 +extra dicom$", printed, re.MULTILINE)
    assert found["DICOM"][0] == "skipped"


def onnx_check():
    environment = nearest(selftest_checks.read_environments(), selftest_checks.installed_versions())
    (check,) = [one for one in selftest_checks.checks(environment, ()) if one.name == "ONNX"]
    return check.run()


def test_difference_of_the_exported_model_is_named(monkeypatch):
    from cxr_vit.prediction.onnx_export import Graph

    def transposed(self, images, view):
        return images.transpose(2, 3)

    monkeypatch.setattr(Graph, "_part", transposed)
    result = onnx_check()
    assert result.status == "differs" and "1e-05 is allowed: probability [" in result.text
    assert "cxr-vit[export]" in result.advice


def test_exported_model_needs_its_libraries(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = onnx_check()
    assert (result.status, result.text) == ("skipped", "without onnxruntime (extra export)")

    # One that is installed, and broken.
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no libc')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime")
    status, text, advice = onnx_check()
    assert (status, advice) == ("fails", "")
    assert text.startswith("onnxruntime cannot be imported (no libc). ")
    assert text.endswith('pip install "cxr-vit[export]"')


def test_torch_that_cannot_be_imported_ends_the_test(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, found, printed = run()
    assert status == 1
    assert found["import"][0] == "fails" and "PNG" not in found
    assert "Install torch and transformers again." in printed


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (["2.0.1", "4.46.3"], "2.0.1"),
        (["2.13.0", "5.23.0"], "2.13.0"),
        (["2.13.0", "5.24.0"], "2.13.0"),
        (["2.9.1", "4.56.0"], "2.0.1"),
        (["1.13.1", "4.30.0"], "2.0.1"),
        (["3.0.0", "6.0.0"], "2.13.0"),
    ],
)
def test_nearest_environment_is_used(versions, expected):
    assert nearest(selftest_checks.read_environments(), versions).versions[0] == expected


def test_environment_without_expectations_is_named(run, monkeypatch):
    monkeypatch.setattr(
        "cxr_vit.commands.selftest.installed_versions", lambda: ["2.99.0", "5.99.0"]
    )
    status, found, printed = run("--engine", "torch")
    assert (status, failing(found)) == (0, set())
    text = (
        "transformers 5.23.0, the nearest that was measured to torch 2.99.0, transformers 5.99.0\n"
    )
    assert text in printed


# Engines


@pytest.mark.parametrize(
    ("engine", "name", "advice"),
    [
        ("poptorch", "poptorch on IPU, fp16", "Enable the SDK"),
        ("pipeline", "pipeline on 2 processes, fp32", "torchrun --nproc-per-node 2 "),
    ],
)
def test_engine_that_is_asked_for_must_be_there(run, engine, name, advice):
    status, found, printed = run("--engine", engine)
    assert status == 1
    word, text = found[name]
    assert word == "fails" and advice in text
    assert f"{text}\n\nnot as it should be: {name}\n" in printed  # the only advice
    assert not any("torch on CPU" in name for name in found)


def test_unknown_engine_is_a_mistake():
    with pytest.raises(ConfigError, match="argument --engine: invalid choice: 'jax'"):
        main(["selftest", "--engine", "jax"])


def test_ipus_are_compared_with_the_tanh_form_of_gelu(run, monkeypatch):
    with loading.stand_in():
        _, found, printed = run("--engine", "poptorch")
        assert found["poptorch on IPU, fp32"][0] == "ok", printed
        assert found["poptorch on IPU, fp16"][0] == "ok", printed
        assert re.search(r"^torch .* ==2.0.1$", printed, re.MULTILINE)  # PopTorch's pin
        assert re.search(r"^IPU +yes$", printed, re.MULTILINE)
        monkeypatch.setattr(selftest_checks, "_TANH", "gelu")
        _, found, _ = run("--engine", "poptorch")
    assert found["poptorch on IPU, fp32"][0] == "differs"


@pytest.mark.exhaustive
@needs_pipelining
def test_pipeline_of_two_processes():
    done = finish(fork(2, "-m", "cxr_vit", "selftest", "--engine", "pipeline"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok      pipeline on 2 processes, fp32: the largest difference is " in done.stdout
    assert done.stdout.count("nothing differs") == 1


# The package's requirements


def test_metadata_say_what_the_files_say(monkeypatch, tmp_path):
    lines = ["torch>=2.0.1", 'pydicom>=2.4; extra == "dicom"', 'torch==2.0.1; extra == "ipu"']
    monkeypatch.setattr(installation, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    found = {extra: installation._requirements(extra) for extra in ("", "dicom", "ipu")}
    texts = {extra: [f"{one.name}{one.specifier}" for one in own] for extra, own in found.items()}
    assert texts == {"": ["torch>=2.0.1"], "dicom": ["pydicom>=2.4"], "ipu": ["torch==2.0.1"]}


def test_order_is_that_of_numbers():
    versions = ("2.13.0", "2.9.1", "2.0.1")
    environments = [Environment([version, "1"], {}, []) for version in versions]
    found = [one.versions[0] for one in sorted(environments, key=Environment.order)]
    assert found == ["2.0.1", "2.9.1", "2.13.0"]
