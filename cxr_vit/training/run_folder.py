"""A run's folder: where it is and what it was run with."""

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
from typing import IO, TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence

from cxr_vit.config import Config, check, dump_config, load_config
from cxr_vit.config.schema import RunSection
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "OpenedRun",
    "RunFolder",
    "git_commit",
    "open_run",
    "run_of_checkpoint",
    "with_weights_of",
]


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
        """Write skipped.csv, the images left out and why, if there are any."""
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


#: Settings that may differ from host to host: where things are.
_OF_THE_HOST = {
    *("run.name", "run.root", "run.dir", "data.root", "data.csv", "data.images", "data.boxes"),
    *("data.relabels", "data.train_list", "data.val_list", "data.test_list", "data.cache_dir"),
    *("data.cache_workers", "data.num_workers", "model.name"),
}

#: Where torchrun's own table says which run its processes began.
_RUN_KEY = "run"


class OpenedRun(NamedTuple):
    """A run's folder, its configuration, and whether it goes on from its last checkpoint."""

    folder: RunFolder
    config: Config
    resumes: bool


def open_run(files: Sequence[Path], overrides: Sequence[str], resume: Optional[str]) -> OpenedRun:
    """Make a new run's folder, or find the one to go on with.

    Processes that torchrun has started anew (`--max-restarts`) go on with the run they began.

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
    launch = Launch.from_environment()
    if not launch.is_connected:
        return _open(files, overrides, resume, makes=launch.is_main)
    return _open_together(launch, files, overrides, resume)


def _open(
    files: Sequence[Path], overrides: Sequence[str], resume: Optional[str], *, makes: bool
) -> OpenedRun:
    if resume is None:
        config = check(load_config(files, overrides))
        if makes:
            return OpenedRun(RunFolder.create(config.run), config, False)
        return OpenedRun(RunFolder(Path(config.run.dir or config.run.root)), config, False)
    if resume and files:
        raise ConfigError(
            f"--resume {resume} goes on with that run's own config.yaml: leave --config out"
            " (overrides may stay), or leave the folder out to resume the newest run of --config."
        )
    path = Path(resume) if resume else _newest_run(load_config(files, overrides).run)
    if not _has_checkpoint(path):
        raise CheckpointError(
            f"nothing to resume: {path} has no checkpoints/last. Name a run's folder"
            " (--resume runs/<name>), or start a new run without --resume."
        )
    folder = RunFolder(path)
    return OpenedRun(folder, check(load_config([folder.config], overrides)), True)


def _open_together(
    launch: Launch, files: Sequence[Path], overrides: Sequence[str], resume: Optional[str]
) -> OpenedRun:
    """Let the first process open the run and the others follow it."""
    if files:
        check(load_config(files, overrides))  # a mistake needs no other process
    from cxr_vit.engines.process_group import call_once, holds, launch_store, put

    opened: Optional[OpenedRun] = None

    def open_first() -> Dict[str, Any]:
        nonlocal opened
        store = launch_store()
        begun = Path(store.get(_RUN_KEY).decode()) if holds(store, _RUN_KEY) else None
        if begun is not None and begun.exists():  # not one that failed before it wrote anything
            opened = _go_on(begun, files, overrides)
        else:
            opened = _open(files, overrides, resume, makes=True)
        path = str(opened.folder.path.resolve())  # the others may stand elsewhere
        put(store, _RUN_KEY, path)
        settings = {key: str(value) for key, value in opened.config.flat().items()}
        return {"path": path, "resumes": opened.resumes, "settings": settings}

    first = call_once("run", open_first)
    if opened is None:
        folder = RunFolder(Path(first["path"]))
        sources = [folder.config] if first["resumes"] else files
        opened = OpenedRun(folder, check(load_config(sources, overrides)), first["resumes"])
        _refuse_differences(opened.config, first["settings"])
    return opened


def _go_on(path: Path, files: Sequence[Path], overrides: Sequence[str]) -> OpenedRun:
    """Go on with the run that these processes began before they were started anew."""
    if not _has_checkpoint(path):
        return OpenedRun(RunFolder(path), check(load_config(files, overrides)), False)
    folder = RunFolder(path)
    config = check(load_config([folder.config], overrides))
    # That was asked for when the run was resumed; its own checkpoints are whole.
    train = config.train.model_copy(update={"resume_weights_only": False})
    return OpenedRun(folder, config.model_copy(update={"train": train}), True)


def _refuse_differences(config: Config, first: Dict[str, str]) -> None:
    """Raise if this host was given another configuration than the first process."""
    differing = [
        f"{key}={value} here, {first.get(key)} there"
        for key, value in config.flat().items()
        if str(value) != first.get(key) and key not in _OF_THE_HOST
    ]
    if differing:
        raise ConfigError(
            f"this host's configuration is not the first process's: {'; '.join(differing)}. Give"
            " every host the same files and overrides."
        )


def _has_checkpoint(run: Path) -> bool:
    return (run / "checkpoints" / "last").exists()


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
