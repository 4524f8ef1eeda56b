"""The package: its public names, the content of sdist and wheel, and use outside the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import List, NamedTuple, Set

import pytest

import cxr_vit
from conftest import SMALL

ROOT = Path(__file__).resolve().parents[1]
#: What a checkout holds besides the repository's files.
IGNORED = {".git", ".cache", "build", "data", "dist", "runs", "shared", "site"}


def python(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], cwd=str(ROOT), encoding="utf-8")


# Public names


def test_import_of_the_package_imports_no_library():
    heavy = "{'torch', 'pandas', 'numpy', 'transformers', 'pydantic', 'yaml'}"
    assert python(f"import sys, cxr_vit; print({heavy} & set(sys.modules))") == "set()\n"


def test_import_of_torch_is_found():
    assert python("import sys, cxr_vit; cxr_vit.Engine; print('torch' in sys.modules)") == "True\n"


def test_configuration_is_loaded_without_torch():
    code = "import sys, cxr_vit; cxr_vit.load_config('vit_demo'); print('torch' in sys.modules)"
    assert python(code) == "False\n"


@pytest.mark.parametrize("name", cxr_vit.__all__)
def test_public_name_resolves(name):
    value = getattr(cxr_vit, name)
    assert isinstance(value, str) or value.__name__ == name


def test_every_public_name_is_in_dir():
    assert set(cxr_vit.__all__) <= set(dir(cxr_vit))
    assert set(cxr_vit.__all__) == {*cxr_vit._MODULES, "__version__"} - {"PipelineEngine"}


def test_star_import_works_with_every_torch():
    names = set(python("from cxr_vit import *; print(*dir())").split())
    assert set(cxr_vit.__all__) <= names


@pytest.mark.parametrize("version", ["2.0.1", "2.9.1+cpu"])
def test_pipeline_engine_names_the_torch_that_it_needs(monkeypatch, version):
    monkeypatch.setattr("torch.__version__", version)
    monkeypatch.delitem(vars(cxr_vit), "PipelineEngine", raising=False)
    message = rf"^cxr_vit\.PipelineEngine needs torch 2\.10 or later; .* {re.escape(version)}\."
    with pytest.raises(ImportError, match=message):
        from cxr_vit import PipelineEngine  # noqa: F401


def test_pipeline_engine_is_public():
    pytest.importorskip("torch.distributed.device_mesh", reason="needs a newer torch")
    assert cxr_vit.PipelineEngine.name == "pipeline"


def test_misspelt_name_suggests_the_nearest():
    message = "module 'cxr_vit' has no attribute 'Trianer'. Did you mean 'Trainer'?"
    with pytest.raises(AttributeError) as caught:
        cxr_vit.Trianer  # noqa: B018
    assert str(caught.value) == message
    assert not hasattr(cxr_vit, "__wrapped__")


# Sdist and wheel


class Built(NamedTuple):
    """The paths in sdist and wheel, and the wheel installed in a folder of its own."""

    sdist: Set[str]
    wheel: Set[str]
    metadata: str
    installed: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    source, site, out = folder / "source", folder / "site", folder / "dist"

    def ignored(path: str, names: List[str]) -> Set[str]:
        found = {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}
        if Path(path) == ROOT:
            found |= {name for name in names if name in IGNORED or name.startswith(".venv")}
        return found

    shutil.copytree(str(ROOT), str(source), ignore=ignored, symlinks=True)
    # The wheel is made from the sdist, so the sdist is complete.
    _run("-m", "build", "--no-isolation", "--outdir", str(out), str(source))
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    _run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    with tarfile.open(str(sdist)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(str(wheel)) as file:
        files = set(file.namelist())
        (metadata,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        return Built(packed, files, file.read(metadata).decode(), site)


def _run(*words: object) -> None:
    process = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, encoding="utf-8", timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr


def python_files(folder: Path) -> Set[str]:
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}


def files_below(folder: Path) -> List[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_wheel_has_every_module_and_nothing_else(built):
    modules = {name for name in built.wheel if name.endswith(".py")}
    assert modules == python_files(ROOT / "cxr_vit")
    assert {name.partition("/")[0].partition("-")[0] for name in built.wheel} == {"cxr_vit"}


@pytest.mark.slow
def test_wheel_has_the_files_that_are_no_modules(built):
    data = {name for name in built.wheel if not name.endswith(".py") and ".dist-info/" not in name}
    folder = ROOT / "configs"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}
    configs = {f"cxr_vit/configs/{name}" for name in names}
    assert {"vit_demo.yaml", "data/chexpert.yaml"} <= names
    pages = {
        path.relative_to(ROOT).as_posix()
        for ending in ("html", "css", "js", "json")
        for path in (ROOT / "cxr_vit").rglob(f"*.{ending}")
    }
    assert {"cxr_vit/web_page.html", "cxr_vit/dataset_report/page.css"} <= pages
    assert {"cxr_vit/evaluation/page.js", "cxr_vit/evaluation/metrics.schema.json"} <= pages
    files = {path.relative_to(ROOT).as_posix() for path in files_below(ROOT / "cxr_vit/selftest")}
    assert {"cxr_vit/selftest/image.png", "cxr_vit/selftest/checkpoint/model.safetensors"} <= files
    assert data == {"cxr_vit/py.typed", *pages, *configs, *files}


@pytest.mark.slow
def test_sdist_has_what_builds_the_package_and_no_tests(built):
    required = {"LICENSE", "README.md", "CHANGELOG.md", "requirements.txt", "train.py"}
    assert required | python_files(ROOT / "cxr_vit") <= built.sdist
    assert {"configs/vit_demo.yaml", "cxr_vit/py.typed"} <= built.sdist
    tops = {name.partition("/")[0] for name in built.sdist}
    assert not tops & {"tests", "docs", "benchmarks", "notebooks"}


@pytest.mark.slow
def test_metadata_has_version_dependencies_and_extras(built):
    metadata = Parser().parsestr(built.metadata)
    assert (metadata["Name"], metadata["Version"]) == ("cxr-vit", cxr_vit.__version__)
    assert metadata["Requires-Python"] == ">=3.8"
    # Old setuptools write typing-extensions for typing_extensions.
    required = [text.replace("_", "-") for text in metadata.get_all("Requires-Dist")]
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name = line.partition("#")[0].partition(">=")[0].strip().replace("_", "-")
        assert not name or any(text.startswith(name) and "extra" not in text for text in required)
    assert set(metadata.get_all("Provides-Extra")) == {
        *("ipu", "dicom", "export", "parquet", "loggers", "docs", "dev", "benchmarks"),
    }
    assert any(text.startswith("torch==2.0.1") and "ipu" in text for text in required)


# Outside the checkout


@pytest.fixture
def outside(built, tmp_path):
    """Run a program of the installed wheel in an empty folder; return its output."""

    def call(*words: str) -> str:
        program = [str(built.installed / "bin" / "cxr-vit"), *words]
        if words[0] == "-c":
            program = [sys.executable, *words]
        process = subprocess.run(
            program,
            cwd=str(tmp_path),
            env={**os.environ, "PYTHONPATH": str(built.installed)},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return call


@pytest.mark.slow
def test_installed_package_is_the_one_that_is_run(built, outside):
    where = outside("-c", "import cxr_vit; print(cxr_vit.__file__)").strip()
    assert Path(where).parent == built.installed / "cxr_vit"


@pytest.mark.slow
def test_installed_command_prints_the_version(outside):
    assert outside("--version") == f"cxr-vit {cxr_vit.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_demo", "vit_demo.yaml", "configs/vit_demo.yaml"])
def test_installed_command_finds_a_packaged_configuration(outside, name):
    printed = outside("check", "--config", name, "configs/data/chexpert.yaml")
    assert "name: vit_demo" in printed and "Pleural Effusion" in printed


@pytest.mark.slow
def test_installed_command_advises_itself(outside):
    assert outside("plan", "--help").startswith("usage: cxr-vit plan ")
    assert outside("train", "--help").startswith("usage: cxr-vit train ")


@pytest.mark.slow
def test_installed_package_checks_itself(outside):
    printed = outside("selftest", "--engine", "torch")
    assert printed.endswith("\nnothing differs\n")
    assert re.search(r"^torch +\S+ +ok +>=2.0.1$", printed, re.MULTILINE)  # by the metadata
    assert re.search(r"^pydicom +\S+.* extra dicom$", printed, re.MULTILINE)


@pytest.mark.slow
def test_installed_package_loads_a_packaged_configuration(outside):
    code = "import cxr_vit; print(cxr_vit.load_config('configs/vit_demo.yaml').run.name)"
    assert outside("-c", code) == "vit_demo\n"


@pytest.mark.slow
def test_installed_command_writes_and_describes_a_data_set(outside, tmp_path):
    outside("sample", "--out", "sample", "--images", "60", "--size", "32")
    outside("data-report", "data.root=sample", "data.image_size=32", "data.val_fraction=0.2")
    assert "<html" in (tmp_path / "data_report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ten_lines_run_outside_the_checkout(outside, tmp_path):
    """The program of tests/test_api.py, from a folder that is not beside the package."""
    (tmp_path / "mine").mkdir()
    program = tmp_path / "mine" / "ten_lines.py"
    shutil.copy(str(ROOT / "tests" / "ten_lines.py"), str(program))
    outside("sample", "--out", "sample", "--images", "60", "--size", "32")
    overrides = ["data.root=sample", *SMALL, "train.steps=3", "engine.name=torch"]
    words = ["ten_lines.py", ".", json.dumps({"out": []}), *overrides]
    where = f"import runpy, sys; sys.argv = {words}"
    code = f"{where}; runpy.run_path({str(program)!r}, run_name='__main__'); import cxr_vit"
    printed = outside("-c", f"import os; os.mkdir('out'); {code}; print(cxr_vit.__file__)")
    assert ROOT not in Path(printed.splitlines()[-1]).parents
    saw = json.loads((tmp_path / "out" / "0.json").read_text(encoding="utf-8"))
    assert len(saw["losses"]) == 3 and all(0 < loss < 2 for loss in saw["losses"])
    assert saw["tested"]["test/loss"] > 0
    assert len(saw["predicted"]) == len((tmp_path / "sample" / "test_list.txt").read_text().split())
    environment = json.loads((tmp_path / "out" / "run" / "environment.json").read_text())
    assert environment["versions"]["cxr-vit"] == cxr_vit.__version__
    assert environment["git_commit"] is None


@pytest.mark.slow
def test_installed_command_trains_and_evaluates(outside, tmp_path):
    overrides = ["data.sample_images=60", "batch.gradient_accumulation=2"]
    overrides += ["train.steps=1", "run.dir=run"]
    outside("train", "--config", "vit_demo", *overrides)
    outside("evaluate", "--checkpoint", "run")
    assert (tmp_path / "run" / "report" / "metrics.json").is_file()
