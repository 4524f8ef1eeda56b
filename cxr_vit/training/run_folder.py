"""A run's folder: where it is and what it was run with."""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Dict, Optional

from cxr_vit.config import Config, dump_config
from cxr_vit.config.schema import RunSection
from cxr_vit.errors import ConfigError
from cxr_vit.launch import Launch

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RunFolder", "git_commit"]

logger = logging.getLogger(__name__)

#: Held while a process writes the run.
_LOCK = ".lock"
#: torch's loader processes look for their parent every five seconds.
_LOADERS_NOTICE_S = 8.0
_PACKAGES = (
    "torch",
    "transformers",
    "torchmetrics",
    "numpy",
    "pandas",
    "pillow",
    "kornia-rs",
    "opencv-python-headless",
    "pydantic",
)


class RunFolder:
    """The folder of one run.

    As a context manager it is this process's alone, and removed if nothing was written to it.

    Parameters
    ----------
    path
        The folder; made by `create`.
    writes
        Whether this process writes the run; of several only one does.
    """

    def __init__(self, path: Path, *, writes: Optional[bool] = None) -> None:
        self.path = path
        self.writes = Launch.from_environment().is_main if writes is None else writes
        self._lock: IO[str]

    @classmethod
    def create(cls, run: RunSection) -> RunFolder:
        """Make a new folder: `run.dir`, or ``<root>/<name>-<time>``.

        Raises
        ------
        ConfigError
            If `run.dir` holds something already: a run is never written over.
        """
        if run.dir is not None:
            path = Path(run.dir)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(
                    f"run.dir={run.dir} exists and is not empty. Choose another run.dir, or go on"
                    f" with the run in it: --resume {run.dir}"
                )
            if not path.is_dir():
                _make(path, f"run.dir={run.dir}")
            return cls(path)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for suffix in ["", *(f"-{count}" for count in range(2, 100))]:
            path = Path(run.root) / f"{run.name}-{stamp}{suffix}"
            try:
                _make(path, f"run.root={run.root}")
            except FileExistsError:  # another run began in this second
                continue
            return cls(path)
        raise ConfigError(f"{run.root} holds 99 runs named {run.name} of this second.")

    def __enter__(self) -> RunFolder:
        """Take the run for this process; the system releases it even if the process is killed."""
        if not self.writes:
            return self
        self._lock = (self.path / _LOCK).open("w")
        try:
            self._take_lock()
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(
                f"another process is writing the run in {self.path}. Wait for it, or choose another"
                " run.dir."
            ) from error
        except OSError:
            logger.warning("%s: this file system has no locks; run nothing else there", self.path)
        return self

    def _take_lock(self) -> None:
        """Take the lock; loader processes of a killed process hold it until they notice."""
        deadline = time.monotonic() + _LOADERS_NOTICE_S
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def __exit__(self, *exception: object) -> None:
        if not self.writes:
            return
        (self.path / _LOCK).unlink()
        self._lock.close()
        self.discard_if_empty()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The scalars, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    def report(self, split: str, *, is_default: bool) -> Path:
        """Where a split's report goes; that of another than the default split has its name."""
        return self.path / ("report" if is_default else f"report_{split}")

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that failed before it wrote anything."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_config(self, config: Config) -> None:
        """Write config.yaml, without the folder: to repeat a run is to make a new one.

        Nor does it say to leave the optimizer's state: that is of one resumption.
        """
        if not self.writes:
            return
        elsewhere = config.run.model_copy(update={"dir": None})
        whole = config.train.model_copy(update={"resume_weights_only": False})
        text = dump_config(config.model_copy(update={"run": elsewhere, "train": whole}))
        aside = self.config.with_name(".config.yaml.writing")
        aside.write_text(f"# python train.py --config {self.config}\n{text}", encoding="utf-8")
        aside.replace(self.config)

    def write_environment(self, *, device: str, data: Dict[str, str]) -> None:
        """Write environment.json: versions, device, commit, hashes of the data."""
        if not self.writes:
            return
        environment = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device,
            "versions": _versions(),
            "git_commit": git_commit(),
            **data,
        }
        path = self.path / "environment.json"
        path.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")

    def write_skipped(self, skipped: pd.DataFrame) -> None:
        """Write skipped.csv, the films left out and why, if there are any."""
        if self.writes and len(skipped):
            skipped.to_csv(self.path / "skipped.csv", index=False)


def _make(path: Path, setting: str) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot make the run's folder {path}: {error.strerror}. Name a place you"
            " may write to."
        ) from error


def _versions() -> Dict[str, str]:
    return {name: metadata.version(name) for name in _PACKAGES}


def git_commit() -> Optional[str]:
    """Return the code's commit, marked where the working tree differs; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=str(here),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.decode().strip()
