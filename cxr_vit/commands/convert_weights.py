"""The command `convert-weights`: the tensors of a pickle (.bin, .pth) as a model folder."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from cxr_vit.cli import COMMANDS, Parser
from cxr_vit.console import count
from cxr_vit.errors import ModelError
from cxr_vit.files import replacing
from cxr_vit.regular_files import read_bytes

_WEIGHTS = "model.safetensors"
#: Copied if they lie beside the file, and their size limit, bytes.
_CONFIGS, _CONFIG_LIMIT = ("config.json", "preprocessor_config.json"), 4 << 20
#: The first torch without CVE-2025-32434 and CVE-2026-24747.
_SAFE_TORCH = (2, 10)
#: Keys under which training programs keep the weights; the first that is there is taken.
_PLACES = (
    *("state_dict", "model_state_dict", "model", "teacher", "target_encoder", "encoder"),
    *("module", "model_ema", "network", "net", "backbone", "student"),
)
#: Dictionaries in each other, at most.
_DEPTH = 5
_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"


def convert_weights(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = Parser("convert-weights", description=COMMANDS["convert-weights"].summary)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a .bin, .pth, .pt or .ckpt file of PyTorch")
    add("out", type=Path, metavar="OUT", help=f"the folder to write {_WEIGHTS} to")
    text = (
        "where the weights are in the file, e.g. teacher.backbone; default: found by common names"
    )
    add("--key", metavar="NAME", help=text)
    arguments = parser.parse(argv)
    file, out = arguments.file, arguments.out
    _check_paths(file, out)
    tensors, place, others = _state_dict(file, _load(file), arguments.key)
    kept, left_out = _floats(file, tensors)
    out.mkdir(parents=True, exist_ok=True)
    copied = [name for name in _CONFIGS if _copy(file.parent / name, out / name)]

    from safetensors.torch import save_file

    with replacing(out / _WEIGHTS) as temporary:
        save_file(kept, str(temporary), metadata={"format": "pt"})
    where = f" of {place!r}" if place else ""
    print(
        f"{count(len(kept), 'tensor')}{where} in {out / _WEIGHTS}; use them with model.name={out}"
    )
    if others:
        print(f"not taken: {', '.join(others)}; --key NAME chooses")
    if left_out:
        print(f"left out, as they hold no floating-point numbers: {', '.join(left_out[:5])}")
    print(f"copied: {', '.join(copied) or 'no config.json beside the file'}")
    return 0


def _check_paths(file: Path, out: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file}: no such file, or no regular file.")
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{file} is a Git LFS pointer, not the file. Run git lfs pull there.")
    if file.suffix == ".safetensors":
        raise ModelError(f"{file} is a safetensors file already. Set model.name to it.")
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out} is no folder. Name a new one.")
    if (out / _WEIGHTS).exists():
        raise ModelError(f"{out / _WEIGHTS} exists. Name another folder.")


def _load(file: Path) -> Any:
    """Return what a file holds; refuse what is no data, and a torch that would run code of it."""
    import torch

    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < _SAFE_TORCH:
        raise ModelError(
            f"torch {torch.__version__} can be made to run code by a file, even with"
            f" weights_only=True (CVE-2025-32434, CVE-2026-24747). Convert {file} where torch is"
            " 2.10 or newer, in an environment of its own or on another machine, and copy the"
            " folder."
        )
    is_zip = _check_archive(file)
    try:
        # Of the arguments of MAE and DeiT, which hold numbers and words.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(str(file), map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of a hostile file, any
        raise ModelError(f"{file} {_reason(error)}") from error


def _check_archive(file: Path) -> bool:
    """Return whether a file is a zip archive; refuse one that grows when it is read."""
    with file.open("rb") as opened:
        if opened.read(len(_ZIP)) != _ZIP:
            return False
    try:
        with zipfile.ZipFile(file) as archive:
            is_plain = all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({error}).") from error
    if not is_plain:
        raise ModelError(
            f"{file} is compressed, or a TorchScript archive. Save the state dict alone:"
            " torch.save(model.state_dict(), ...)."
        )
    return True


def _reason(error: Exception) -> str:
    unsafe = re.search(r"GLOBAL (\S+)|whose module (\S+) is", str(error))
    if unsafe:
        return (
            f"holds {(unsafe.group(1) or unsafe.group(2))[:100]}, which is no tensor and may run"
            " code; nothing of it was run. If you trust its author, save its state dict alone where"
            " it was made: torch.save(model.state_dict(), ...)."
        )
    lines = [line.strip() for line in str(error).split("\n") if "documentation" not in line]
    reason = next((line for line in reversed(lines) if line), "it ends early")
    return f"is no file of torch.save, or damaged ({reason[:200]})."


def _state_dict(
    file: Path, content: Any, key: Optional[str]
) -> Tuple[Dict[str, Any], str, List[str]]:
    """Return the state dict, the key under which it is, and other keys that may hold one."""
    import torch

    path: List[str] = []
    others: List[str] = []
    parts: List[Optional[str]] = [*key.split(".")] if key else [None] * _DEPTH
    for part in parts:
        if not isinstance(content, dict):
            break
        found = [name for name in _PLACES if isinstance(content.get(name), dict)]
        if part is None and not found:
            break
        name = part or found[0]
        if not isinstance(content.get(name), dict):
            raise ModelError(f"{file} has no dictionary {name!r} but {_keys(content)}.")
        others += [".".join([*path, other]) for other in found if other != name]
        path.append(name)
        content = content[name]
    tensors = {
        name: value
        for name, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        what = _keys(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ModelError(
            f"{file} has no tensors{' in ' + repr('.'.join(path)) if path else ''}, but {what}."
            " --key NAME says where they are."
        )
    return tensors, ".".join(path), others


def _keys(content: Dict[Any, Any]) -> str:
    return f"the keys [{', '.join(repr(key)[:40] for key in list(content)[:10])}]"


def _floats(file: Path, tensors: Dict[str, Any]) -> Tuple[Dict[str, Any], List[str]]:
    """Return the dense floating-point tensors as new ones, and the names of the others."""
    import torch

    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    kept, left_out = {}, []
    for name, value in tensors.items():
        if not (name.isascii() and name.isprintable()):
            raise ModelError(f"{file}: {name[:40]!a} is no name of a tensor.")
        if value.layout == torch.strided and value.dtype in dtypes and not value.is_meta:
            kept[name] = value.detach()
        else:
            left_out.append(name)
    # A view may repeat an element as often as it likes.
    if sum(value.numel() * value.element_size() for value in kept.values()) > file.stat().st_size:
        raise ModelError(f"{file}: its tensors have more bytes than the file.")
    copies = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in kept.items()
    }
    return copies, left_out


def _copy(source: Path, target: Path) -> bool:
    """Copy a file that exists, unless there is one already."""
    if not source.exists() or target.exists():
        return False
    content = read_bytes(source, limit=_CONFIG_LIMIT)
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return True
