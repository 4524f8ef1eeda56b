"""The command `selftest`: whether this installation computes what it should."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import List, Sequence

from cxr_vit import __version__
from cxr_vit.cli import COMMANDS, EXIT_FAILURE, Parser, importing
from cxr_vit.commands.installation import Package, devices, packages, system
from cxr_vit.commands.selftest_checks import (
    Check,
    Environment,
    Result,
    checks,
    file_check,
    installed_versions,
    nearest,
    read_environments,
)
from cxr_vit.console import columns

_ENGINES = ("torch", "pipeline", "poptorch")
_WIDTH = max(len(word) for word in ("ok", "differs", "fails", "skipped"))


def selftest(argv: Sequence[str]) -> int:
    """Run the command line; return 0 if nothing differs, else 1."""
    parser = Parser("selftest", description=COMMANDS["selftest"].summary)
    text = (
        "check this engine, which must be there, in place of all that are; may be given several"
        " times"
    )
    parser.add_argument("--engine", action="append", default=[], choices=_ENGINES, help=text)
    engines = parser.parse(argv).engine
    logging.getLogger("cxr_vit").setLevel(logging.WARNING)  # the engines' own lines

    print(f"cxr-vit {__version__}, {system()}")
    wrong = _print_packages(packages())
    if not _passes(Check("import", _import_torch, "Install torch and transformers again.")):
        return EXIT_FAILURE
    print(*devices(), sep="\n")
    if not _passes(file_check()):
        return EXIT_FAILURE
    environment = nearest(read_environments(), installed_versions())
    print(f"compared with {_origin(environment)}\n", flush=True)
    bad = [check.name for check in checks(environment, engines) if not _passes(check)]
    print()
    if wrong or bad:
        print(f"not as it should be: {', '.join([*wrong, *bad])}")
        return EXIT_FAILURE
    print("nothing differs")
    return 0


def _import_torch() -> Result:
    with importing():
        import torch
        import transformers
    places = [Path(str(module.__file__)).parent for module in (torch, transformers)]
    return Result("ok", f"torch from {places[0]}, transformers from {places[1]}")


def _print_packages(found: Sequence[Package]) -> List[str]:
    """Print versions; return the names of the libraries that are not as they are needed."""
    rows = []
    for package in found:
        extra = f"extra {package.extra}" if package.extra else ""
        verdict = "ok" if package.is_right else "not as needed"
        version = package.version or "not installed"
        rows.append(
            (
                package.name,
                version,
                verdict if package.version or not extra else "",
                f"{package.needed}",
                extra,
            )
        )
    print(*columns(rows, left=5), sep="\n")
    wrong = [package for package in found if not package.is_right]
    if wrong:
        needed = " ".join(f'"{package.name}{package.needed}"' for package in wrong)
        print(f"Run: pip install {needed}")
    return [package.name for package in wrong]


def _origin(environment: Environment) -> str:
    """Say where the expected numbers were measured, and whether that is like here."""
    here, there = (
        "torch {}, transformers {}".format(*versions)
        for versions in (installed_versions(), environment.versions)
    )
    return there if here == there else f"{there}, the nearest that was measured to {here}"


def _passes(check: Check) -> bool:
    """Run a check and print a line for it; whether it is ok or was skipped."""
    result = check.run()
    print(f"{result.status:{_WIDTH}} {check.name}: {result.text}", flush=True)
    if result.status in ("ok", "skipped"):
        return True
    if result.advice:
        print(f"{'':{_WIDTH}} {result.advice}", flush=True)
    return False
