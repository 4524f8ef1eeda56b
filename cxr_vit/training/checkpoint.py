"""Write checkpoint folders of safetensors and JSON files, and read their tensors; no pickle.

A folder is written under a hidden name and renamed, so a checkpoint that exists is complete. What
is removed is hidden first. `CheckpointStore.restore` finishes what a killed process left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_vit.checkpoint_files import (
    FORMAT,
    OPTIMIZER,
    REPLACED,
    STATE,
    WEIGHTS,
    WRITING,
    linked,
    replaced_folders,
    sha256,
    state_text,
    step_folders,
    step_of,
    verify_checkpoint,
)
from cxr_vit.engines.base import EngineState
from cxr_vit.engines.optim import WHOLE, torch_slots
from cxr_vit.errors import CheckpointError
from cxr_vit.files import remove, sync, write_text

logger = logging.getLogger(__name__)

#: Keys of trainer_state.json that belong to the file itself.
RESERVED = ("format", "step", "optimizer_kind", "scalars", "sha256", "digest")
#: Keys of callback states: format 1 used class names.
_FORMAT_1_KEYS = {"EarlyStopping": "early_stopping", "MetricsLogging": "metrics"}
#: Between a parameter's name and its optimizer slot; no parameter name has a slash.
_SLOT = "/"
#: The device's random generator, stored beside the slots: it is large on IPUs.
_RNG = "rng_state"
#: Optimizer slots that have the shape of their parameter, as torch names them.
_LIKE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_MOMENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: Kind of optimizer -> the slots that each parameter must have, and those that it may have.
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_SLOTS = {
    "torch.AdamW": (_ADAM, {"max_exp_avg_sq"}),
    "torch.Adam": (_ADAM, {"max_exp_avg_sq"}),
    "torch.SGD": (set(), {"momentum_buffer"}),
}
#: Facts of the normalisation, which older checkpoints do not have.
_IMAGES = {"image_mean", "image_std", "read_size"}
_REMOVED, _DAMAGED = ".removed", ".damaged"


@contextlib.contextmanager
def only_warning(checkpoint: Path) -> Iterator[None]:
    """Warn of an error of the file system that leaves a checkpoint as it is."""
    try:
        yield
    except OSError as error:
        logger.warning("%s is saved, but: %s", checkpoint, error)


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
        files: Mapping[str, str],
        trainer_state: Mapping[str, Any],
    ) -> Path:
        """Write the checkpoint ``step_<8 digits>``, point `last` at it, and return its path.

        `files` are name -> text of config.json, preprocessor_config.json and config.yaml. The
        JSON-able `trainer_state` is completed by the keys of `RESERVED`. Raises OSError or
        SafetensorError if a file cannot be written; the folder is then as before.
        """
        final = self.folder / f"step_{step:08d}"
        if not self.writes:
            return final
        temporary = self.folder / f".{final.name}{WRITING}"
        old = self.folder / f".{final.name}{REPLACED}"
        try:
            remove(temporary)
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync(self.folder.parent)
            temporary.mkdir()
            _write_files(temporary, step, state, files, trainer_state)
            if final.exists():  # a folder cannot be overwritten
                remove(old)
                os.replace(final, old)
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(OSError):
                if old.exists() and not final.exists():
                    os.replace(old, final)
                remove(temporary)  # it takes the space that the next one needs
            raise
        with only_warning(final):
            sync(self.folder)
            self.link("last", final)
            remove(old)
        return final

    def link(self, name: str, target: Path) -> None:
        """Point ``checkpoints/<name>`` at a checkpoint, atomically.

        On a file system without symbolic links, it becomes a text file with the target's name.
        """
        if not self.writes:
            return
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():  # the run was copied with its links followed
            kept = _unused(self.folder / f"{name}_copied")
            os.replace(path, kept)
            logger.warning("%s was a copy of a checkpoint; it is kept as %s", path, kept)
        temporary = self.folder / f".{name}{WRITING}"
        remove(temporary)
        try:
            temporary.symlink_to(target.name)
        except OSError:
            write_text(path, f"{target.name}\n")
            return
        os.replace(temporary, path)
        sync(self.folder)

    def linked(self, name: str) -> Optional[Path]:
        """Return the checkpoint that `last` or `best` names, or None."""
        return linked(self.folder, name)

    def restore(self, step: int, best_step: Optional[int]) -> bool:
        """Make the folder that of a run at `step`; return whether `best` is right.

        A process may have been killed between two renames, or between saving and linking. Newer
        checkpoints, which were damaged, are kept under another name. `best_step` is that of the
        checkpoint; None if the checkpoint does not know it.
        """
        if not self.writes:
            return True
        for hidden, target in replaced_folders(self.folder).items():
            os.replace(hidden, target)
        for path in self.steps():
            if (step_of(path) or 0) > step:
                os.replace(path, _unused(path.with_name(f"{path.name}{_DAMAGED}")))
        current = self._step_folder(step)
        if current is not None and self.linked("last") != current.resolve():
            self.link("last", current)
        best, link = self.linked("best"), self.folder / "best"
        is_copy = link.is_dir() and not link.is_symlink()  # of a run whose links were followed
        if best_step is not None and not is_copy:
            wanted = self._step_folder(best_step)
            if wanted is not None and best != wanted.resolve():
                self.link("best", wanted)
            best = wanted
        if best is None and not is_copy:
            remove(link)
        return best is not None

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints and those `best` and `last` point at."""
        if not self.writes:
            return
        kept = {path for path in (self.linked("best"), self.linked("last")) if path}
        left = set(self.folder.glob(".step_*")) - set(replaced_folders(self.folder))
        for path in self.steps()[:-keep]:
            if path.resolve() not in kept:
                hidden = self.folder / f".{path.name}{_REMOVED}"
                remove(hidden)
                os.replace(path, hidden)
                left.add(hidden)
        for path in left:
            remove(path)

    def steps(self) -> List[Path]:
        """Return the checkpoints, oldest first."""
        return step_folders(self.folder)

    def _step_folder(self, step: int) -> Optional[Path]:
        path = self.folder / f"step_{step:08d}"
        return path if (path / STATE).is_file() else None


def _write_files(
    folder: Path,
    step: int,
    state: EngineState,
    files: Mapping[str, str],
    trainer_state: Mapping[str, Any],
) -> None:
    """Write the files of a checkpoint, `trainer_state.json` last, and flush them to disk."""
    save_file(state.weights, str(folder / WEIGHTS), metadata={"format": "pt"})
    save_file(_flatten(state), str(folder / OPTIMIZER))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    content = {
        **trainer_state,
        "format": FORMAT,
        "step": step,
        "optimizer_kind": state.optimizer_kind,
        "scalars": state.scalars,
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / STATE).write_text(state_text(content), encoding="utf-8")
    for path in folder.iterdir():
        # safetensors 0.8 makes files readable by the owner only; apply the umask to them.
        shutil.copymode(folder / STATE, path)
        sync(path)
    sync(folder)


def _unused(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3, ... that does not exist."""
    paths = [path, *(path.with_name(f"{path.name}-{count}") for count in range(2, 1000))]
    return next(path for path in paths if not path.exists())


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
    changed = [
        fact
        for fact, value in own.items()
        if saved.get(fact) != value and (fact in saved or fact not in _IMAGES)
    ]
    if not changed:
        return
    consequence = "scores would not compare, and images it was trained on could be scored"
    if set(changed) <= {"seed", "global_batch_size"}:
        consequence = "the order of the samples would be another one"
    if set(changed) <= _IMAGES:
        consequence = "the weights were trained on images of other values or another part of them"
    raise CheckpointError(
        f"{checkpoint} cannot be resumed with another {', '.join(changed)}: {consequence}. Restore"
        f" the old setting, or start a new run from its weights: model.name={checkpoint}"
    )


def load_checkpoint(checkpoint: Path) -> Tuple[EngineState, Dict[str, Any]]:
    """Verify a checkpoint; return the engine's state and the content of `trainer_state.json`.

    Raises CheckpointError if the checkpoint is missing, incomplete or damaged.
    """
    state = verify_checkpoint(checkpoint)
    if state["format"] == 1:
        state = _upgrade_from_1(state)
    try:
        weights = load_file(str(checkpoint / WEIGHTS))
        flat = load_file(str(checkpoint / OPTIMIZER))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{checkpoint}: {error}. Use another checkpoint.") from error
    rng = flat.pop(_RNG, None)
    optimizer = _unflatten(flat)
    problem = next(_problems(weights, optimizer, state["optimizer_kind"]), None)
    if not (optimizer or problem) and _has_trained(state):
        problem = "the state of the optimizer is empty"
    if problem:
        raise CheckpointError(f"{checkpoint}: {problem}. Use another checkpoint.")
    return EngineState(weights, optimizer, state["optimizer_kind"], state["scalars"], rng), state


def _upgrade_from_1(state: Dict[str, Any]) -> Dict[str, Any]:
    """Rename the callback states of format 1, where a callback held the best score."""
    old = state["callbacks"]
    return {
        **state,
        "best_score": old.get("Checkpointing", {}).get("best"),
        "callbacks": {key: old[name] for name, key in _FORMAT_1_KEYS.items() if name in old},
    }


def _has_trained(state: Mapping[str, Any]) -> bool:
    """Whether a torch engine has made updates; older formats left the state of plain SGD out."""
    is_torch = state["format"] == FORMAT and state["optimizer_kind"].startswith("torch.")
    return is_torch and bool(state["scalars"].get("updates"))


def _problems(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Mapping[str, Tensor]], kind: str
) -> Iterator[str]:
    """Yield what no engine writes: the model checks names and shapes of its weights itself."""
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            yield f"the weight {name} is {weight.dtype}, not float32"
    for name, slots in optimizer.items():
        if name == WHOLE and all(slot.startswith("ipu_") for slot in slots):
            continue
        if name not in weights:
            yield f"the optimizer has state of {name}, which is no weight"
            continue
        own = torch_slots(slots).keys()
        must, may = _SLOTS.get(kind, (set(), own))
        if own and not must <= own <= must | may:
            yield f"{kind} has other slots than {', '.join(sorted(own))}, the state of {name}"
        for slot, value in slots.items():
            problem = _slot_problem(slot, value, weights[name])
            if problem:
                yield f"{slot} of {name} is {problem}"


def _slot_problem(slot: str, value: Tensor, weight: Tensor) -> Optional[str]:
    """Return what is wrong with a value of the optimizer, or None."""
    if slot in _LIKE_PARAMETER:
        if value.shape != weight.shape:
            return f"{list(value.shape)}, not {list(weight.shape)}"
        if value.dtype not in _MOMENT_DTYPES:
            return f"{value.dtype}, not a floating-point type"
    elif slot == "step":
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return f"{list(value.shape)} of {value.dtype}, not one number"
        if not 0 <= float(value) < math.inf:
            return f"{float(value)}"
    return None


def _flatten(state: EngineState) -> Dict[str, Tensor]:
    flat = {
        f"{name}{_SLOT}{slot}": value.contiguous()
        for name, slots in state.optimizer.items()
        for slot, value in slots.items()
    }
    return flat if state.rng is None else {**flat, _RNG: state.rng}


def _unflatten(flat: Mapping[str, Tensor]) -> Dict[str, Dict[str, Tensor]]:
    optimizer: Dict[str, Dict[str, Tensor]] = {}
    for key, value in flat.items():
        name, _, slot = key.partition(_SLOT)
        optimizer.setdefault(name, {})[slot] = value
    return optimizer
