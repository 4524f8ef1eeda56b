"""Find and verify checkpoint folders, without torch.

``checkpoints/`` of a run holds ``step_<8 digits>`` folders; `last` and `best` name two of them, as
links, or as small text files where a file system has no links. `trainer_state.json` holds the
SHA-256 of the other files of its folder, and a digest over itself. Nothing else is read before both
are right.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Annotated

from cxr_vit.errors import CheckpointError
from cxr_vit.regular_files import read_bytes

logger = logging.getLogger(__name__)

#: File that makes a folder a checkpoint.
STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
CONFIG = "config.yaml"
#: Folder of a run that holds its checkpoints.
CHECKPOINTS = "checkpoints"
#: The newest format. Older ones have no digest; 1 names callback states differently.
FORMAT = 3
#: Suffixes of a hidden step folder: being written, and replaced by one of the same step.
WRITING, REPLACED = ".writing", ".replaced"

_STEP_NAME = re.compile(r"step_(\d{8})")
_REPLACED_NAME = re.compile(rf"\.(step_\d{{8}}){re.escape(REPLACED)}")
_DIGEST = re.compile(rb',\n  "digest": "([0-9a-f]{64})"\n\}\Z')
_FILES = {WEIGHTS, OPTIMIZER, CONFIG, "config.json", "preprocessor_config.json"}
_LARGEST_STATE = 2**26  # bytes
#: Errors of reading that mean that a file is not there or is no file.
_DAMAGE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG,
}  # fmt: skip
#: Files whose SHA-256 this process has computed: identity and hash.
_verified: Set[Tuple[object, ...]] = set()


class _State(BaseModel):
    """The keys of `trainer_state.json` that have a meaning of their own; callbacks add others."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: int
    step: int = Field(ge=0, lt=10**8)
    evaluated_step: int = Field(0, ge=0, lt=10**8)
    best_score: Optional[float] = Field(None, allow_inf_nan=False)
    best_step: Optional[int] = Field(None, ge=0, lt=10**8)
    optimizer_kind: str = Field("", max_length=1000)
    scalars: Dict[str, Annotated[float, Field(ge=0, le=2**53, allow_inf_nan=False)]] = {}
    callbacks: Dict[str, Dict[str, Any]] = {}
    sha256: Dict[str, str]


class CannotVerify(CheckpointError):
    """A checkpoint cannot be judged: it cannot be read now, or is of a newer version."""


class Newest(NamedTuple):
    """The newest whole checkpoint, or None, and why newer ones are passed over."""

    checkpoint: Optional[Path]
    reasons: List[str]


def state_text(content: Mapping[str, Any]) -> str:
    """Return the text of `trainer_state.json`, with the digest over everything before it."""
    body = json.dumps(content, indent=2)[:-2]
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body},\n  "digest": "{digest}"\n}}'


def read_state(checkpoint: Path) -> Dict[str, Any]:
    """Return the content of `trainer_state.json`.

    Raises CheckpointError if it is missing, damaged or of another form.
    """
    path = checkpoint / STATE
    try:
        raw = read_bytes(path, limit=_LARGEST_STATE)
        state: Dict[str, Any] = _State.model_validate(_content(path, raw)).model_dump()
        if not {WEIGHTS, OPTIMIZER} <= state["sha256"].keys() <= _FILES:
            raise ValueError("it does not list a checkpoint's files")
        if step_of(checkpoint) not in (None, state["step"]):
            raise ValueError(f"it is of step {state['step']}")
        if state["evaluated_step"] > state["step"]:
            raise ValueError("it was validated after its step")
    except OSError as error:
        raise _read_error(path, error) from error
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(map(str, detail["loc"]))
        raise _not_readable(path, f"{where}: {detail['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _not_readable(path, error) from error
    return state


def _content(path: Path, raw: bytes) -> Dict[str, Any]:
    """Check the digest and the format; return the content. Raises ValueError with the reason."""
    digest = _DIGEST.search(raw)
    if digest and hashlib.sha256(raw[: digest.start()]).hexdigest() != digest[1].decode():
        raise ValueError("it has changed since it was written")
    content = json.loads(raw)
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise ValueError("it is not the state of a checkpoint")
    if version > FORMAT:
        raise CannotVerify(
            f"{path}: checkpoint format {version} is of a newer version; this one reads up to"
            f" {FORMAT}. Install the version that wrote it."
        )
    if version < 1 or (digest is None) != (version < FORMAT):
        raise ValueError("it has changed since it was written")
    return dict(content)


def _read_error(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that is missing, no file, or cannot be read at the moment."""
    if error.errno in _DAMAGE:
        return _not_readable(path, error.strerror or error)
    return CannotVerify(
        f"{path} cannot be read: {error.strerror or error}. Nothing was changed: make it readable,"
        " and try again."
    )


def _not_readable(path: Path, reason: object) -> CheckpointError:
    first_line = str(reason).strip().split("\n")[0]
    return CheckpointError(f"{path}: not readable ({first_line}). Use another checkpoint.")


def verify_checkpoint(checkpoint: Path, *, needs_optimizer: bool = True) -> Dict[str, Any]:
    """Check the SHA-256 of each file and return the content of `trainer_state.json`.

    Scoring does not need the optimizer's state. Raises CheckpointError if the checkpoint is
    missing, incomplete or damaged.
    """
    state = read_state(checkpoint)
    for name, expected in state["sha256"].items():
        path = checkpoint / name
        if name == OPTIMIZER and not needs_optimizer:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. Use another checkpoint.")
        if not _has_hash(path, expected):
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 has changed since it was written. Use another"
                " checkpoint."
            )
    return state


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _has_hash(path: Path, expected: str) -> bool:
    """Whether a file has this SHA-256, which is computed once while the file stays the same."""
    try:
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, expected)
        if key not in _verified and sha256(path) == expected:
            _verified.add(key)
    except OSError as error:
        raise _read_error(path, error) from error
    return key in _verified


# The checkpoints of a run


def step_of(checkpoint: Path) -> Optional[int]:
    """Return the step in the name of a step folder, or None for another path."""
    match = _STEP_NAME.fullmatch(checkpoint.name)
    return None if match is None else int(match[1])


def step_folders(folder: Path) -> List[Path]:
    """Return the ``step_*`` folders of a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if step_of(path) is not None and path.is_dir())
    return sorted(paths)


def replaced_folders(folder: Path) -> Dict[Path, Path]:
    """Return hidden folder -> step folder, where a kill came between the renames of a swap."""
    found = {path: _REPLACED_NAME.fullmatch(path.name) for path in folder.glob(f".*{REPLACED}")}
    targets = {path: folder / match[1] for path, match in found.items() if match}
    return {path: target for path, target in targets.items() if not target.exists()}


def linked(folder: Path, name: str) -> Optional[Path]:
    """Return the checkpoint that `last` or `best` names, or None.

    It is a link, a text file, or a folder: a copy of the run in which links were followed.
    """
    path = folder / name
    try:
        if path.is_file():
            text = read_bytes(path, limit=64).decode(errors="replace").strip()
            if not _STEP_NAME.fullmatch(text):
                return None
            path = folder / text
        target = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return None
    return target if (target / STATE).is_file() else None


def _candidates(folder: Path) -> List[Path]:
    """Return all folders that may be checkpoints, the newest by their steps first."""
    copies = [folder / name for name in ("last", "best")]
    copies = [path for path in copies if path.is_dir() and not path.is_symlink()]
    found: List[Tuple[int, Path]] = []
    for path in [*step_folders(folder), *replaced_folders(folder), *copies]:
        match = _STEP_NAME.search(path.name)
        try:
            step = int(match[1]) if match else int(read_state(path)["step"])
        except CheckpointError:
            step = -1
        found.append((step, path))
    return [path for _, path in sorted(found, key=lambda pair: -pair[0])]


def has_checkpoints(run: Path) -> bool:
    """Whether a run's folder has a checkpoint, whole or not."""
    return bool(_candidates(run / CHECKPOINTS))


def newest_whole(run: Path) -> Newest:
    """Verify the checkpoints of a run, the newest first, and return the first whole one.

    The step decides, not the time of a file. Raises CannotVerify.
    """
    reasons: List[str] = []
    for path in _candidates(run / CHECKPOINTS):
        problem = _problem(path)
        if problem is None:
            return Newest(path, reasons)
        reasons.append(problem)
    return Newest(None, reasons)


def _problem(checkpoint: Path) -> Optional[str]:
    """Return why a checkpoint is not whole, or None."""
    try:
        verify_checkpoint(checkpoint)
    except CannotVerify:
        raise
    except CheckpointError as error:
        return str(error)
    return None


def checkpoint_of(path: Path) -> Path:
    """Return a checkpoint's folder: the path itself, or the best (else the last) one of a run.

    Raises CheckpointError if it is neither.
    """
    if (path / STATE).is_file():
        return path
    if path.name in ("last", "best") and path.parent.name == CHECKPOINTS:
        found = linked(path.parent, path.name) or _unlinked(path.parent.parent, path.name)
    else:
        found = _best_of(path)
    if found is not None:
        return found
    if path.is_file():
        problem = "it is a file, and a checkpoint is a folder"
        if (path.parent / STATE).is_file():
            raise CheckpointError(f"{path} is not a checkpoint: {problem}. Use {path.parent}.")
    elif (path / CONFIG).is_file():
        problem = "this run has saved none yet"
    else:
        problem = f"it has no {STATE}" if path.is_dir() else "there is no such folder"
    raise CheckpointError(
        f"{path} is not a checkpoint: {problem}. Use a run's folder or a folder such as"
        " runs/<name>/checkpoints/best."
    )


def _best_of(run: Path) -> Optional[Path]:
    """Return the best checkpoint of a run, else the last one, by its link if it has one.

    The newest state knows the best step. The link may be older: a run can be killed between saving
    a checkpoint and linking it.
    """
    folder = run / CHECKPOINTS
    best = _unlinked(run, "best")
    for name in ("best", "last"):
        target = linked(folder, name)
        if target is not None and (name == "last" or best in (None, target)):
            return folder / name if (folder / name / STATE).is_file() else target
        if name == "best" and best is not None:
            return best
    return _unlinked(run, "last")


def _unlinked(run: Path, name: str) -> Optional[Path]:
    """Return the last or best checkpoint by what the checkpoints hold, or None."""
    for path in _candidates(run / CHECKPOINTS):
        try:
            state = read_state(path)
        except CannotVerify:
            raise
        except CheckpointError:
            continue
        if name == "last":
            return path
        best = state["best_step"]
        target = run / CHECKPOINTS / f"step_{best or 0:08d}"
        return target.resolve() if best is not None and (target / STATE).is_file() else None
    return None


def run_of_checkpoint(checkpoint: Path) -> Optional[Path]:
    """Return the folder of the run that a checkpoint belongs to; None if it was copied alone."""
    # By the text of the path, so that messages show the path as given although `best` is a link.
    by_text, by_link = Path(os.path.normpath(checkpoint / ".." / "..")), _real(checkpoint)
    for folder in (by_text, by_link.parent.parent):
        if (folder / CONFIG).is_file():
            return folder
    return None


def _real(path: Path) -> Path:
    """Return a path without links, unless they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path


def config_of(checkpoint: Path) -> Path:
    """Return the configuration file of a checkpoint: its own, else that of its run.

    Raises CheckpointError if there is neither.
    """
    if (checkpoint / CONFIG).is_file():
        return checkpoint / CONFIG
    run = run_of_checkpoint(checkpoint)
    if run is None:
        raise CheckpointError(
            f"{checkpoint} has no {CONFIG} and is not in a run's folder. Use a folder such as"
            " runs/<name>/checkpoints/best."
        )
    return run / CONFIG
