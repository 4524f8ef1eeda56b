"""A run's folder: where it is, what it was run with, and how to find it again."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

from cxr_vit.config import Config, check, dump_config, load_config
from cxr_vit.config.schema import RunSection
from cxr_vit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "RunFolder",
    "git_commit",
    "is_main_process",
    "open_run",
    "run_of_checkpoint",
    "with_weights_of",
]

logger = logging.getLogger(__name__)

#: Held while a process writes the run.
_LOCK = ".lock"
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
        self.writes = is_main_process() if writes is None else writes
        self._lock: IO[str]

    @classmethod
    def create(cls, run: RunSection) -> RunFolder:
        """Make a new folder: `run.dir`, or ``<root>/<name>-<time>``.

        Raises
        ------
        ConfigError
            If `run.dir` holds something already: a run is never written over.
        """
        if not is_main_process():
            return cls(Path(run.dir or run.root))
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
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(
                f"another process is writing the run in {self.path}. Wait for it, or choose another"
                " run.dir."
            ) from error
        except OSError:
            logger.warning("%s: this file system has no locks; run nothing else there", self.path)
        return self

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


def is_main_process() -> bool:
    """Whether this process is the only one, or the first of those `poprun` (mpirun) started."""
    return os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0"


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


def open_run(
    files: Sequence[Path], overrides: Sequence[str], resume: Optional[str]
) -> Tuple[RunFolder, Config]:
    """Make a new run's folder, or find the one to go on with; return it with its configuration.

    Parameters
    ----------
    files, overrides
        As for `load_config`. A resumed run is trained with its own config.yaml and the overrides;
        the files then only tell which run is meant.
    resume
        None for a new run; a run's folder; or ``""`` for `run.dir`, else the newest run of
        `run.name`.

    Raises
    ------
    ConfigError
        If the configuration is wrong, or `run.dir` is in use.
    CheckpointError
        If there is nothing to resume.
    """
    if resume is None:
        config = check(load_config(files, overrides))
        return RunFolder.create(config.run), config
    if resume and files:
        raise ConfigError(
            f"--resume {resume} goes on with that run's own config.yaml: leave --config out"
            " (overrides may stay), or leave the folder out to resume the newest run of --config."
        )
    path = Path(resume) if resume else _newest_run(load_config(files, overrides).run)
    if not (path / "checkpoints" / "last").exists():
        raise CheckpointError(
            f"nothing to resume: {path} has no checkpoints/last. Name a run's folder"
            " (--resume runs/<name>), or start a new run without --resume."
        )
    folder = RunFolder(path)
    return folder, check(load_config([folder.config], overrides))


def _newest_run(run: RunSection) -> Path:
    """Return `run.dir`, else the run of that name that began last and has a checkpoint."""
    if run.dir is not None:
        return Path(run.dir)
    stamped = re.compile(re.escape(run.name) + r"-\d{8}-\d{6}(-\d+)?")
    runs: List[Path] = [
        path.parent.parent
        for path in Path(run.root).glob(f"{run.name}-*/checkpoints/last")
        if stamped.fullmatch(path.parent.parent.name)
    ]
    if not runs:
        raise CheckpointError(
            f"nothing to resume: no {run.root}/{run.name}-* has a checkpoint. Name a run's folder"
            " (--resume runs/<name>), or start a new run without --resume."
        )
    return max(runs, key=lambda path: path.name)


def run_of_checkpoint(checkpoint: Path) -> Path:
    """Return the run folder a checkpoint lies in.

    Raises
    ------
    CheckpointError
        If it is no checkpoint, or there is no config.yaml two folders above it.
    """
    if not (checkpoint / "trainer_state.json").is_file():
        what = "it has no trainer_state.json" if checkpoint.is_dir() else "there is no such folder"
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: {what}. Give a folder such as"
            " runs/<name>/checkpoints/best."
        )
    # By the path's text: `best` is a link, and the folder above its target would do as well, but a
    # person reads the path that was given.
    folder = Path(os.path.normpath(checkpoint / ".." / ".."))
    if not (folder / "config.yaml").is_file():
        folder = checkpoint.resolve().parent.parent  # a link from elsewhere
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{checkpoint} does not lie in a run's folder: no {folder / 'config.yaml'}. Give a"
            " folder such as runs/<name>/checkpoints/best."
        )
    return folder


def with_weights_of(config: Config, checkpoint: Path) -> Config:
    """Return the configuration with a checkpoint as the model: what it came from may be gone."""
    model = config.model.model_copy(update={"name": str(checkpoint)})
    return config.model_copy(update={"model": model})
