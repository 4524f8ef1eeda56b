"""Find or make the run a command line means; of several processes the first does it for all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from cxr_vit.config import Config, check, load_config
from cxr_vit.config.schema import RunSection
from cxr_vit.errors import CheckpointError, ConfigError
from cxr_vit.launch import Launch
from cxr_vit.training.run_folder import RunFolder

__all__ = ["OpenedRun", "open_run", "run_of_checkpoint", "with_weights_of"]

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
    from cxr_vit.engines.shared_store import call_once, holds, launch_store, put

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
