"""Atomic checkpoint folders of safetensors and JSON files, without pickle.

A folder is written under a temporary name and renamed, so a checkpoint that exists is complete.
`trainer_state.json` has the SHA-256 of the other files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CheckpointError
from cxr_vit.files import STATE, remove
from cxr_vit.model.module import WEIGHTS

OPTIMIZER = "optimizer.safetensors"
_STEP_NAME = re.compile(r"^step_(\d{8})$")
_FORMAT = 2
#: Keys of trainer_state.json that belong to the file itself.
RESERVED = ("format", "step", "optimizer_kind", "scalars", "sha256")
#: Keys of callback states: format 1 used class names.
_FORMAT_1_KEYS = {"EarlyStopping": "early_stopping", "MetricsLogging": "metrics"}
#: Between a parameter's name and its optimizer slot; no parameter name has a slash.
_SLOT = "/"
#: The device's random generator, stored beside the slots: it is large on IPUs.
_RNG = "rng_state"


class CheckpointStore:
    """The `checkpoints` folder of a run, created when first needed.

    With `writes` false, the methods change nothing: of several processes only one writes.
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
        """Write the checkpoint ``step_<8 digits>``, point `last` at it, and return its path.

        `model_files` are name -> text of config.json and preprocessor_config.json. The JSON-able
        `trainer_state` is completed by `format`, `step`, `optimizer_kind`, `scalars` and `sha256`.
        """
        final = self.folder / f"step_{step:08d}"
        if not self.writes:
            return final
        temporary = self.folder / f".{final.name}.writing"
        remove(temporary)
        temporary.mkdir(parents=True)
        save_file(state.weights, str(temporary / WEIGHTS), metadata={"format": "pt"})
        save_file(_flatten(state), str(temporary / OPTIMIZER))
        for name, text in model_files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        content = {
            **trainer_state,
            "format": _FORMAT,
            "step": step,
            "optimizer_kind": state.optimizer_kind,
            "scalars": state.scalars,
            "sha256": {path.name: _sha256(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / STATE).write_text(json.dumps(content, indent=2), encoding="utf-8")
        _sync(temporary)
        if final.exists():  # a resumed run saves this step again: a folder cannot be overwritten
            old = self.folder / f".{final.name}.replaced"
            remove(old)
            os.replace(final, old)
            os.replace(temporary, final)
            remove(old)
        else:
            os.replace(temporary, final)
        self.link("last", final)
        return final

    def link(self, name: str, target: Path) -> None:
        """Point ``checkpoints/<name>`` at a checkpoint, atomically."""
        if not self.writes:
            return
        temporary = self.folder / f".{name}.writing"
        remove(temporary)
        temporary.symlink_to(target.name)
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():  # the run was copied with its links followed
            os.replace(path, self.folder / f"{name}_copied_{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(temporary, path)

    def linked(self, name: str) -> Optional[Path]:
        """Return the checkpoint that a link points at, or None."""
        path = self.folder / name
        return path.resolve() if path.exists() else None

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints and those `best` and `last` point at."""
        if not self.writes:
            return
        kept = {path for path in (self.linked("best"), self.linked("last")) if path}
        for path in self.steps()[:-keep]:
            if path.resolve() not in kept:
                remove(path)
        for path in self.folder.glob(".step_*"):  # left by a process that was killed
            remove(path)

    def steps(self) -> List[Path]:
        """Return the checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _STEP_NAME.match(path.name))


def check_json(what: str, value: Any) -> None:
    """Raise CheckpointError if a value cannot be saved, before a checkpoint is begun."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} cannot be saved: {error}. Return numbers, text, lists and dictionaries"
            " (tensor.tolist())."
        ) from error


def check_facts(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a run cannot go on because facts differ from the saved ones."""
    changed = [fact for fact, value in own.items() if saved.get(fact) != value]
    if not changed:
        return
    consequence = "scores would not compare, and images it was trained on could be scored"
    if set(changed) <= {"seed", "global_batch_size"}:
        consequence = "the order of the samples would be another one"
    raise CheckpointError(
        f"{checkpoint} cannot be resumed with another {', '.join(changed)}: {consequence}. Restore"
        f" the old setting, or start a new run from its weights: model.name={checkpoint}"
    )


def verify_checkpoint(checkpoint: Path, *, needs_optimizer: bool = True) -> Dict[str, Any]:
    """Check the SHA-256 of each file and return the content of `trainer_state.json`.

    Scoring does not need the optimizer's state. Raises CheckpointError if the checkpoint is
    missing, incomplete or damaged.
    """
    trainer_state = _read_trainer_state(checkpoint / STATE)
    for name, expected in trainer_state["sha256"].items():
        path = checkpoint / name
        if name == OPTIMIZER and not needs_optimizer:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. Use another checkpoint.")
        if _sha256(path) != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 has changed since it was written. Use another"
                " checkpoint."
            )
    return trainer_state


def load_checkpoint(checkpoint: Path) -> Tuple[EngineState, Dict[str, Any]]:
    """Verify a checkpoint; return the engine's state and the content of `trainer_state.json`.

    Raises CheckpointError if the checkpoint is missing, incomplete or damaged.
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


def _read_trainer_state(path: Path) -> Dict[str, Any]:
    try:
        state: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error}). Use another checkpoint.") from error
    if state.get("format") == 1:
        return _upgrade_from_1(state)
    if state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: unknown checkpoint format {state.get('format')!r}; this version reads 1 and"
            f" {_FORMAT}."
        )
    return state


def _upgrade_from_1(state: Dict[str, Any]) -> Dict[str, Any]:
    """Rename the callback states of format 1, where a callback held the best score."""
    old = state.get("callbacks", {})
    return {
        **state,
        "format": _FORMAT,
        "best_score": old.get("Checkpointing", {}).get("best"),
        "callbacks": {key: old[name] for name, key in _FORMAT_1_KEYS.items() if name in old},
    }


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
    """Flush the files to disk before the folder is renamed."""
    for path in folder.iterdir():
        # safetensors 0.8 makes files readable by the owner only; apply the umask to them.
        shutil.copymode(folder / STATE, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
