"""Atomic checkpoint directories: safetensors and JSON, never a pickle.

A directory is written aside and renamed; `trainer_state.json` is written last and holds the SHA-256
of the other files. So a checkpoint that is there is whole, and one that was tampered with is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CheckpointError

__all__ = ["CheckpointStore", "load_checkpoint", "verify_checkpoint"]

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
_STEP_NAME = re.compile(r"^step_(\d{8})$")
_FORMAT = 1
#: Between a parameter's name and its optimizer slot; no parameter name has a slash.
_SLOT = "/"
#: The device's random generator, beside the slots; hundreds of thousands of numbers on IPUs.
_RNG = "rng_state"


class CheckpointStore:
    """The `checkpoints` folder of a run.

    Parameters
    ----------
    folder
        ``<run>/checkpoints``; made when first needed.
    writes
        Whether this process writes there; of several only one does, the others go through the
        motions.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes

    def save(
        self,
        step: int,
        state: EngineState,
        *,
        model_files: Dict[str, str],
        trainer_state: Dict[str, Any],
    ) -> Path:
        """Write the checkpoint of a step and point `last` at it.

        Parameters
        ----------
        step
            Updates made.
        state
            The engine's state.
        model_files
            File name -> text: config.json and preprocessor_config.json.
        trainer_state
            JSON-able; `step`, `optimizer_kind`, `scalars` and `sha256` are added.

        Returns
        -------
        Path
            ``checkpoints/step_<8 digits>``.
        """
        final = self.folder / f"step_{step:08d}"
        if not self.writes:
            return final
        aside = self.folder / f".{final.name}.writing"
        _remove(aside)
        aside.mkdir(parents=True)
        save_file(state.weights, str(aside / WEIGHTS), metadata={"format": "pt"})
        save_file(_flatten(state), str(aside / OPTIMIZER))
        for name, text in model_files.items():
            (aside / name).write_text(text, encoding="utf-8")
        whole = {
            "format": _FORMAT,
            "step": step,
            "optimizer_kind": state.optimizer_kind,
            "scalars": state.scalars,
            **trainer_state,
            "sha256": {path.name: _sha256(path) for path in sorted(aside.iterdir())},
        }
        (aside / STATE).write_text(json.dumps(whole, indent=2), encoding="utf-8")
        _sync(aside)
        if final.exists():  # a resumed run comes by again: the new one is as good, swap it in
            old = self.folder / f".{final.name}.replaced"
            _remove(old)
            os.replace(final, old)
            os.replace(aside, final)
            _remove(old)
        else:
            os.replace(aside, final)
        self.link("last", final)
        return final

    def link(self, name: str, target: Path) -> None:
        """Point ``checkpoints/<name>`` at a checkpoint, in one move."""
        if not self.writes:
            return
        temporary = self.folder / f".{name}.writing"
        _remove(temporary)
        temporary.symlink_to(target.name)
        place = self.folder / name
        if place.is_dir() and not place.is_symlink():  # a copy of the run that followed the links
            os.replace(place, self.folder / f"{name}_copied_{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(temporary, place)

    def linked(self, name: str) -> Optional[Path]:
        """Return the checkpoint a link points at, or None."""
        path = self.folder / name
        return path.resolve() if path.exists() else None

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints and those `best` and `last` point at."""
        if not self.writes:
            return
        kept = {path for path in (self.linked("best"), self.linked("last")) if path}
        for path in self.steps()[:-keep]:
            if path.resolve() not in kept:
                _remove(path)
        for path in self.folder.glob(".step_*"):  # left by a process that was killed
            _remove(path)

    def steps(self) -> List[Path]:
        """Return the checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _STEP_NAME.match(path.name))


def _read_trainer_state(checkpoint: Path) -> Dict[str, Any]:
    path = checkpoint / STATE
    try:
        state: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}). Use another checkpoint.") from error
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state.get('format')!r}; this version reads {_FORMAT}."
        )
    return state


def verify_checkpoint(checkpoint: Path, *, needs_optimizer: bool = True) -> Dict[str, Any]:
    """Check every file's SHA-256 and return the content of `trainer_state.json`.

    Parameters
    ----------
    checkpoint
        The folder.
    needs_optimizer
        Whether the optimizer's state must be there; scoring does without.

    Raises
    ------
    CheckpointError
        If it is missing, incomplete or damaged.
    """
    trainer_state = _read_trainer_state(checkpoint)
    for name, expected in trainer_state["sha256"].items():
        path = checkpoint / name
        if name == OPTIMIZER and not needs_optimizer:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. Use another checkpoint.")
        if _sha256(path) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the one noted when it was written."
                " Use another checkpoint."
            )
    return trainer_state


def load_checkpoint(checkpoint: Path) -> Tuple[EngineState, Dict[str, Any]]:
    """Read a checkpoint after verifying it.

    Returns
    -------
    tuple
        The engine's state and the content of `trainer_state.json`.

    Raises
    ------
    CheckpointError
        If it is missing, incomplete or damaged.
    """
    trainer_state = verify_checkpoint(checkpoint)
    try:
        weights = load_file(str(checkpoint / WEIGHTS))
        flat = load_file(str(checkpoint / OPTIMIZER))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint}: {error}. Use another checkpoint.") from error
    rng = flat.pop(_RNG, None)
    kind, scalars = trainer_state["optimizer_kind"], trainer_state["scalars"]
    return EngineState(weights, _unflatten(flat), kind, scalars, rng), trainer_state


def _flatten(state: EngineState) -> Dict[str, Tensor]:
    flat = {
        f"{name}{_SLOT}{slot}": value.contiguous()
        for name, slots in state.optimizer.items()
        for slot, value in slots.items()
    }
    return flat if state.rng is None else {**flat, _RNG: state.rng}


def _unflatten(flat: Dict[str, Tensor]) -> Dict[str, Dict[str, Tensor]]:
    optimizer: Dict[str, Dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, slot = key.split(_SLOT)
        optimizer.setdefault(name, {})[slot] = value
    return optimizer


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Bring the files to the disk before the rename makes them a checkpoint."""
    for path in folder.iterdir():
        # safetensors 0.8 lets only the owner read; colleagues may read what the umask lets them.
        shutil.copymode(folder / STATE, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
