"""The folder of a run: creating, finding and describing it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from cxr_vit.checkpoint_files import (
    CHECKPOINTS,
    CONFIG,
    STATE,
    WEIGHTS,
    checkpoint_of,
    config_of,
    has_checkpoints,
    newest_whole,
    run_of_checkpoint,
    step_of,
    verify_checkpoint,
)
from cxr_vit.config import Config, check, dump_config, load_config, read_config
from cxr_vit.config.schema import LISTS, RunSection
from cxr_vit.data.text_files import write_csv
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CheckpointError, ConfigError
from cxr_vit.files import Locked, is_lock_file, lock, sync, write_text
from cxr_vit.regular_files import read_bytes
from cxr_vit.version import __version__

if TYPE_CHECKING:
    import pandas as pd


logger = logging.getLogger(__name__)

#: Held while a process writes the run.
_LOCK = ".lock"
#: The loader processes of a killed process keep its lock until they notice: torch's look for their
#: parent every 5 seconds.
_LOCK_TIMEOUT_S = 8.0
#: Name under which torchrun's store keeps a run's path when it restarts the processes. A script may
#: make several runs; they are counted.
_RUN_KEY = "run"
_RESUME_HINT = "Name a run's folder (--resume runs/<name>), or start a new run without --resume."
#: Settings that may differ between hosts: paths, names and numbers of processes.
_HOST_SETTINGS = {
    "run.name", "run.root", "run.dir", "data.root", "data.csv", "data.join", "data.images",
    "data.boxes", "data.relabels", "data.train_list", "data.val_list", "data.test_list",
    "data.cache_dir", "data.cache_workers", "data.num_workers", "data.worker_timeout_s",
    "model.name", "model.revision",
}  # fmt: skip
_BEGUN = "%s was begun and has no checkpoint: beginning it again"
#: How the config.yaml of a run begins.
_HEADER = "# python train.py --config "
#: Packages whose versions environment.json has.
_PACKAGES = (
    "torch", "transformers", "torchmetrics", "numpy", "pandas", "pillow", "kornia-rs",
    "opencv-python-headless", "pydantic",
)  # fmt: skip


class RunFolder:
    """The folder of one run; with `writes` false, the methods write nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.writes = writes
        self.checkpoints = path / CHECKPOINTS
        self.config = path / CONFIG

    @classmethod
    def create(cls, run: RunSection) -> RunFolder:
        """Create a new folder: `run.dir`, or ``<root>/<name>-<time>``.

        The names of runs increase, also if the clock is set back. A folder whose run was killed
        before its first checkpoint is used again. Raises ConfigError if `run.dir` has other
        content: a run is never overwritten.
        """
        cls.refuse_existing(run)
        if run.dir is not None:
            path = Path(run.dir)
            if not path.is_dir():
                _make(path, f"run.dir={run.dir}")
            return cls(path, writes=True)
        now = time.strftime("%Y%m%d-%H%M%S")
        stamp, count = max([(now, 1), *(_following(path, run.name) for path in _runs(run))])
        for number in range(count, count + 100):
            suffix = "" if number == 1 else f"-{number}"
            path = Path(run.root) / f"{run.name}-{stamp}{suffix}"
            try:
                _make(path, f"run.root={run.root}")
            except FileExistsError:  # another run began in this moment
                continue
            return cls(path, writes=True)
        raise ConfigError(f"{run.root} has 99 runs named {run.name} of this second.")

    @staticmethod
    def refuse_existing(run: RunSection) -> None:
        """Raise ConfigError if `run.dir` has content, other than that of a run to begin again."""
        path = None if run.dir is None else Path(run.dir)
        if not path or not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if is_unsaved(path):
            logger.warning(_BEGUN, path)
            return
        raise _not_empty(path)

    def refuse_saved(self) -> None:
        """Raise ConfigError if another process has saved a checkpoint before the lock was free."""
        if self.writes and has_checkpoints(self.path):
            raise _not_empty(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process; at the end, delete its folder if it is empty.

        Raises ConfigError if another process writes the run.
        """
        if not self.writes:
            yield
            return
        path = self.path / _LOCK
        with contextlib.ExitStack() as stack:
            stack.callback(self.discard_if_empty)
            try:
                stack.enter_context(
                    lock(path, timeout_s=_LOCK_TIMEOUT_S, removes=self._needs_no_mark)
                )
            except OSError as error:
                raise ConfigError(
                    f"the run in {self.path} cannot be written: {path.name}:"
                    f" {error.strerror or error}. Use the account that owns it, or make room; or"
                    " choose another run.dir."
                ) from error
            except Locked as other:
                raise ConfigError(
                    f"another process is writing the run in {self.path}: {other}. Wait for it, or"
                    f" choose another run.dir. If it has ended for certain, remove {path}."
                ) from other
            yield

    def _needs_no_mark(self) -> bool:
        """Whether the lock file may go: else it marks a run that ended before a checkpoint."""
        return has_checkpoints(self.path) or [file.name for file in self.path.iterdir()] == [_LOCK]

    def discard_if_empty(self) -> None:
        """Delete the folder of a run that failed before it wrote anything."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_config(self, config: Config) -> None:
        """Write config.yaml, with which the run can be repeated.

        It leaves out `run.dir`, as a repeated run needs a folder of its own, and
        `train.resume_weights_only`, which is meant for one resume only.
        """
        if not self.writes:
            return
        write_text(self.config, self.config_text(config))

    def config_text(self, config: Config) -> str:
        """Return the text of config.yaml."""
        config = config.changed(run={"dir": None}, train={"resume_weights_only": False})
        return f"{_HEADER}{self.config}\n{dump_config(config)}"

    def write_environment(self, device: str, engine: Dict[str, Any], data: Dict[str, str]) -> None:
        """Write environment.json: versions, device, commit, hashes of the data.

        `device` and `engine` are `describe` and `facts` of the engine, `data` is `fingerprint` of
        the data module.
        """
        if not self.writes:
            return
        environment = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device,
            "engine": engine,
            "versions": package_versions(),
            "git_commit": git_commit(),
            **data,
        }
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def write_skipped(self, skipped: pd.DataFrame) -> None:
        """Write skipped.csv, the images left out and the reasons, if there are any."""
        if self.writes and len(skipped):
            write_csv(self.path / "skipped.csv", skipped)


def package_versions() -> Dict[str, str]:
    """Return the versions of this package and of those that its results depend on."""
    return {"cxr-vit": __version__, **{name: metadata.version(name) for name in _PACKAGES}}


def _not_empty(path: Path) -> ConfigError:
    return ConfigError(
        f"run.dir={path} exists and is not empty. Choose another run.dir, or resume the run in it:"
        f" --resume {path}"
    )


def is_unsaved(path: Path) -> bool:
    """Whether a folder is that of a run that ended early: no checkpoint, and nothing to lose.

    Metrics may be there if the run left its lock file. Else their checkpoints were deleted, or are
    on a disk that is not mounted.
    """
    if not path.is_dir() or has_checkpoints(path) or (path / WEIGHTS).exists():
        return False
    checkpoints = path / CHECKPOINTS
    if step_of(path) is not None or (os.path.lexists(checkpoints) and not checkpoints.exists()):
        return False
    if is_lock_file(path / _LOCK) or [file.name for file in path.iterdir()] == [_LOCK]:
        return True
    return _begins_with_header(path / CONFIG) and not _has_trained(path / "metrics.jsonl")


def _begins_with_header(config: Path) -> bool:
    try:
        return read_bytes(config, limit=2**20).startswith(_HEADER.encode())
    except OSError:
        return False


def _has_trained(metrics: Path) -> bool:
    """Whether there are metrics of a step, or a file that cannot be read."""
    try:
        return re.search(rb'"step": *[1-9]', read_bytes(metrics, limit=2**26)) is not None
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _make(path: Path, setting: str) -> None:
    try:
        path.mkdir(parents=True)
        sync(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot create the run's folder {path}: {error.strerror}. Choose a folder"
            " that you may write to."
        ) from error


def git_commit() -> Optional[str]:
    """Return the commit of the code, with ``-dirty`` if files differ; None if git has none of it.

    An installed package may lie in a repository that does not track it.
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        process = subprocess.run(
            ["git", *words],
            cwd=str(here.parent),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return process.stdout.decode().strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


class FoundRun(NamedTuple):
    """What `find_run` finds.

    `folder` is None for a new run, `checkpoint` where there is none to resume; `restarted` says
    whether torchrun restarted the processes. `key` is the name of the run in torchrun's store.
    """

    folder: Optional[RunFolder]
    checkpoint: Optional[Path]
    restarted: bool = False
    key: str = ""


def find_run(
    run: RunSection,
    ckpt_path: Optional[Union[str, Path]],
    launch: Launch,
    stack: contextlib.ExitStack,
) -> FoundRun:
    """Find the run to continue, the same in all processes, and lock it; nothing is created.

    The lock is held by `stack`: what is found stays true. `ckpt_path` is that of `Trainer.fit`.
    Processes that torchrun restarted (`--max-restarts`) find
    the run that they began. Raises ConfigError if a new run's `run.dir` is not empty,
    CheckpointError if there is nothing to resume.
    """
    if not launch.is_connected:
        return _find(run, ckpt_path, stack, writes=launch.is_main)
    from cxr_vit.engines.process_group import coordinator

    processes = coordinator(launch)
    if launch.is_main:
        key = processes.unique(_RUN_KEY)
        begun = processes.load_across_restarts(key)
        if begun is not None and Path(begun).exists():  # else it failed before it wrote anything
            folder = RunFolder(Path(begun), writes=True)
            stack.enter_context(folder.locked())
            found = FoundRun(folder, _newest_checkpoint(folder.path), restarted=True)
        else:
            found = _find(run, ckpt_path, stack, writes=True)
        # Absolute: the working directories may differ.
        path = found.folder and str(found.folder.path.absolute())
        checkpoint = found.checkpoint and str(found.checkpoint.absolute())
        processes.call_once("found run", lambda: [path, checkpoint, found.restarted])
        if found.folder:
            processes.save_across_restarts(key, str(path))
        return found._replace(key=key)
    path, checkpoint, restarted = processes.call_once("found run", list)
    return FoundRun(
        None if path is None else RunFolder(Path(path), writes=False),
        None if checkpoint is None else Path(checkpoint),
        restarted,
    )


def _find(
    run: RunSection,
    ckpt_path: Optional[Union[str, Path]],
    stack: contextlib.ExitStack,
    *,
    writes: bool,
) -> FoundRun:
    if ckpt_path is None:
        if writes:  # another process may have begun it already
            RunFolder.refuse_existing(run)
        return FoundRun(None, None)
    path = newest_run(run) if ckpt_path == "last" else _named(Path(ckpt_path))
    if (path / STATE).is_file():
        return FoundRun(None, path)
    _check_resumable(path)
    folder = RunFolder(path, writes=writes)
    stack.enter_context(folder.locked())
    checkpoint = _newest_checkpoint(path)
    if checkpoint is None:
        logger.warning(_BEGUN, path)
    return FoundRun(folder, checkpoint)


def _named(path: Path) -> Path:
    """Return what a path names: a run's folder, also by its `checkpoints`, or a checkpoint."""
    if path.name == CHECKPOINTS and not (path / CONFIG).exists():
        return path.parent
    if path.parent.name == CHECKPOINTS and path.name in ("last", "best"):
        return checkpoint_of(path)
    return path


def _newest_checkpoint(run: Path, *, warns: bool = True) -> Optional[Path]:
    """Return the newest whole checkpoint of a run, None if it has none.

    Raises CheckpointError if all are damaged.
    """
    found = newest_whole(run)
    if found.checkpoint is None and found.reasons:
        raise CheckpointError(
            f"nothing to resume: {run} has no whole checkpoint.\n" + "\n".join(found.reasons)
        )
    for reason in found.reasons if warns else []:
        logger.warning("passing over a checkpoint: %s", reason.rpartition(" Use another")[0])
    if found.reasons and warns:
        logger.warning("resuming from %s", found.checkpoint)
    return found.checkpoint


def _check_resumable(path: Path) -> None:
    """Raise CheckpointError unless a path is a run's folder, with a checkpoint or without."""
    checkpoints = path / CHECKPOINTS
    if checkpoints.is_symlink() and (checkpoints.resolve().parent / CONFIG).exists():
        raise CheckpointError(
            f"nothing to resume: {checkpoints} is a link to those of another run,"
            f" {checkpoints.resolve().parent}. Resume that one."
        )
    if has_checkpoints(path) or is_unsaved(path):
        return
    if path.is_file():
        hint = f"it is a file. {_RESUME_HINT}"
    elif not path.exists():
        hint = f"there is no such folder. {_RESUME_HINT}"
    elif step_of(path) is not None or (path / WEIGHTS).exists():
        hint = f"this checkpoint has no {STATE}: it is damaged. Name another one, or the run."
    elif os.path.lexists(path / CHECKPOINTS) and not (path / CHECKPOINTS).exists():
        hint = f"its {CHECKPOINTS} is a link that leads nowhere. Is a disk missing?"
    elif _has_trained(path / "metrics.jsonl"):
        hint = "it has metrics and no checkpoint. Restore its checkpoints, or start a new run."
    else:
        hint = f"it has no checkpoint. {_RESUME_HINT}"
    raise CheckpointError(f"nothing to resume: {path}: {hint}")


def create_run(run: RunSection, launch: Launch, key: str = "") -> RunFolder:
    """Create the folder of a new run in the main process; return it in all.

    `key` is that of `find_run`.
    """
    if not launch.is_connected:
        if launch.is_main:
            return RunFolder.create(run)
        return RunFolder(Path(run.dir or run.root), writes=False)
    from cxr_vit.engines.process_group import coordinator

    processes = coordinator(launch)
    if not launch.is_main:
        return RunFolder(Path(processes.call_once("new run", str)), writes=False)
    folder = RunFolder.create(run)
    path = str(folder.path.absolute())
    processes.save_across_restarts(key, path)
    processes.call_once("new run", lambda: path)
    return folder


class RunConfig(NamedTuple):
    """The configuration of a command line, and what it resumes.

    `ckpt_path` is the run's folder or the checkpoint to resume, None for a new run; `checkpoint`
    is the one to load, None if there is none yet.
    """

    config: Config
    ckpt_path: Optional[Path] = None
    checkpoint: Optional[Path] = None


def read_run_config(
    files: Sequence[Path], overrides: Sequence[str], resume: Optional[str], launch: Launch
) -> RunConfig:
    """Return the configuration of the command line, and what to resume.

    `resume` is None for a new run; a run's folder or a checkpoint; or ``""`` for `run.dir`, else
    the newest run of `run.name`. A resumed run uses its own config.yaml and the overrides; the
    files then only select the run. Raises ConfigError if the configuration is wrong or differs
    between processes.
    """
    path, checkpoint = None, None
    if resume is not None:
        if resume and files:
            raise ConfigError(
                f"--resume {resume} uses that run's own config.yaml: leave --config out (overrides"
                " are allowed), or leave the folder out to resume the newest run of --config."
            )
        path, checkpoint = _resumed(files, overrides, resume, launch)
        files = [_config_file(path, checkpoint)]
    config = load_config(files, overrides)
    _check_same_settings(config, launch)
    return RunConfig(config, path, checkpoint)


def _config_file(path: Path, checkpoint: Optional[Path]) -> Path:
    """Return the configuration of what is resumed: the run's, else that of the checkpoint."""
    if (path / CONFIG).exists() and path != checkpoint:
        return path / CONFIG
    if checkpoint is None:
        raise CheckpointError(
            f"nothing to resume: {path} has no {CONFIG}. Start the run again with its --config"
            f" and run.dir={path}."
        )
    if path != checkpoint:
        logger.warning("%s is missing: using that of %s", path / CONFIG, checkpoint)
    return config_of(checkpoint)


def _resumed(
    files: Sequence[Path], overrides: Sequence[str], resume: str, launch: Launch
) -> Tuple[Path, Optional[Path]]:
    """Return the run's folder or the checkpoint that is resumed, and the checkpoint to load."""

    def find() -> List[Optional[str]]:
        path = _named(Path(resume)) if resume else newest_run(read_config(files, overrides).run)
        if (path / STATE).is_file():
            verify_checkpoint(path)
            checkpoint: Optional[Path] = path
        else:
            _check_resumable(path)
            checkpoint = _newest_checkpoint(path, warns=False)
        if launch.is_connected:  # the working directories may differ
            path, checkpoint = path.absolute(), checkpoint and checkpoint.absolute()
        return [str(path), None if checkpoint is None else str(checkpoint)]

    if launch.is_connected:
        from cxr_vit.engines.process_group import coordinator

        path, checkpoint = coordinator(launch).call_once("resumed run", find)
    else:
        path, checkpoint = find()
    return Path(path), None if checkpoint is None else Path(checkpoint)


def _check_same_settings(config: Config, launch: Launch) -> None:
    """Raise ConfigError if this host has another configuration than the main process."""
    if not launch.is_connected:
        return
    from cxr_vit.engines.process_group import coordinator

    settings = {
        key: str(value) for key, value in config.flat().items() if key not in _HOST_SETTINGS
    }
    differing = coordinator(launch).differences("settings", settings)
    if differing:
        raise ConfigError(
            "this host's configuration differs from that of the first process:"
            f" {'; '.join(differing)}. Use the same files and overrides on every host."
        )


def newest_run(run: RunSection) -> Path:
    """Return `run.dir`, else the newest run of that name with a checkpoint, else without."""
    if run.dir is not None:
        return Path(run.dir)
    runs = [path for path in _runs(run) if has_checkpoints(path)]
    runs = runs or [path for path in _runs(run) if is_unsaved(path)]
    if not runs:
        raise CheckpointError(
            f"nothing to resume: no {run.root}/{run.name}-* has a checkpoint. {_RESUME_HINT}"
        )
    return max(runs, key=lambda path: _following(path, run.name))


def _runs(run: RunSection) -> List[Path]:
    """Return the folders of the runs of a name."""
    return [path for path in Path(run.root).glob(f"{run.name}-*") if _stamp(path, run.name)]


def _stamp(path: Path, name: str) -> Optional[Tuple[str, int]]:
    """Return the time and the number in the name of a run's folder; None for another folder."""
    match = re.fullmatch(re.escape(name) + r"-(\d{8}-\d{6})(?:-(\d+))?", path.name)
    return None if match is None else (match[1], int(match[2] or 1))


def _following(path: Path, name: str) -> Tuple[str, int]:
    """Return the first time and number of a name after that of a run's folder."""
    stamp = _stamp(path, name)
    assert stamp is not None, path
    return stamp[0], stamp[1] + 1


def config_of_checkpoint(checkpoint: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration of a checkpoint's run for scoring, with the checkpoint as model.

    Scoring needs neither the initial weights nor the classes that the configuration names, and
    never writes a synthetic data set: it would score other images than were meant.
    """
    for text in overrides:
        if text.startswith(LISTS):
            raise ConfigError(f"{text}: scoring has no callbacks and no loggers. Leave it out.")
    config = read_config([config_of(checkpoint)], overrides)
    changed = config.changed(
        model={"name": str(checkpoint)}, data={"sample_images": None}, callbacks=[], loggers=[]
    )
    return check(changed)


def report_folder(checkpoint: Path, split: str, *, default: str, is_ensemble: bool = False) -> Path:
    """Return the folder of a split's report; only the default split's has no suffix.

    It is in the run, or in the folder of a checkpoint that was copied alone.
    """
    folder = run_of_checkpoint(checkpoint) or checkpoint
    name = "report-ensemble" if is_ensemble else "report"
    return folder / (name if split == default else f"{name}_{split}")
