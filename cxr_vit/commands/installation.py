"""What is installed here: versions against the requirements, and devices."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Iterator, List, NamedTuple

from packaging.requirements import Requirement

#: Holds the files of requirements in a checkout; an installed package has them as metadata.
_CHECKOUT = Path(__file__).resolve().parents[2]
_NAME = "cxr-vit"
#: Extra -> suffix of its file of requirements; "" is what nothing works without.
_FILES = {"": "", "ipu": "-sdk34"}
#: Extras that add something to a run or a command.
_EXTRAS = ("dicom", "export", "parquet", "loggers")


class Package(NamedTuple):
    """A library: the version here, empty if there is none, and the versions that are needed."""

    name: str
    version: str
    needed: str
    #: The extra that it belongs to; empty if nothing works without it.
    extra: str
    is_right: bool


def packages() -> List[Package]:
    """Return the required libraries and those of the extras. PopTorch pins torch."""
    pins = [one for one in _requirements("ipu") if one.name == "torch"] if has_poptorch() else []
    names = {one.name for one in pins}
    required = [*pins, *(one for one in _requirements("") if one.name not in names)]
    return [
        *(_package(wanted, "") for wanted in required),
        *(_package(wanted, extra) for extra in _EXTRAS for wanted in _requirements(extra)),
    ]


def _package(wanted: Requirement, extra: str) -> Package:
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Package(wanted.name, "", str(wanted.specifier), extra, is_right=bool(extra))
    # A build such as 2.0.1+cpu counts as its release.
    is_right = wanted.specifier.contains(version.partition("+")[0], prereleases=True)
    return Package(wanted.name, version, str(wanted.specifier), extra, is_right)


def _requirements(extra: str) -> List[Requirement]:
    """Return the requirements of an extra, or of the package itself."""
    if (_CHECKOUT / "pyproject.toml").is_file():
        file = _CHECKOUT / f"requirements{_FILES.get(extra, f'-{extra}')}.txt"
        lines = (line.partition("#")[0] for line in file.read_text(encoding="utf-8").splitlines())
        listed = [Requirement(line) for line in lines if line.strip()]
        return [wanted for wanted in listed if _applies(wanted, extra)]
    every = [Requirement(text) for text in metadata.requires(_NAME) or ()]
    own = [wanted for wanted in every if _applies(wanted, "")]
    return own if not extra else [one for one in every if _applies(one, extra) and one not in own]


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def has_poptorch() -> bool:
    """Whether PopTorch can be found; importing it may still fail."""
    return importlib.util.find_spec("poptorch") is not None


def system() -> str:
    """Return Python's version and the system."""
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def devices() -> Iterator[str]:
    """Yield a line for the CPU, for each CUDA device and for the IPUs."""
    import torch

    from cxr_vit.engines.devices import cpu_has_bf16
    from cxr_vit.engines.ipu.options import any_ipu_answers

    kind = "with" if cpu_has_bf16() else "without"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield f"CPU    {threads}, {kind} bf16 instructions"
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield f"CUDA   {about.name}, {about.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield f"CUDA   none answers (torch is built {built})"
    if not has_poptorch():
        yield "IPU    no: PopTorch is not installed"
        return
    try:
        answers = any_ipu_answers()
    except Exception as error:  # an SDK that does not fit torch
        yield f"IPU    no: PopTorch cannot be imported ({str(error).strip().splitlines()[0]})"
        return
    yield f"IPU    {'yes' if answers else 'no: PopTorch is installed, and no IPU answers'}"
