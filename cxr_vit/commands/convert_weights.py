"""The command `convert-weights`: the tensors of a pickle (.bin, .pth) as a model folder."""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

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
#: The output has at most this many times the bytes of the file, where names share a storage.
_TIED = 4
#: What NumPy's scalars are made of in a pickle.
_NUMPY = re.compile(r"numpy\._?core\.multiarray\.scalar|numpy\.dtype")
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
    copied = _configs(file.parent, out)

    from safetensors.torch import save_file

    with _naming(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in copied.items():
            with replacing(out / name) as temporary:
                temporary.write_bytes(content)
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
    with _naming(file), file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{file} is a Git LFS pointer, not the file. Run git lfs pull there.")
    if file.suffix.lower() == ".safetensors":
        raise ModelError(f"{file} is a safetensors file already. Set model.name to it.")
    if out.exists() and not out.is_dir():
        raise ModelError(f"{out} is no folder. Name a new one.")
    if (out / _WEIGHTS).exists():
        raise ModelError(f"{out / _WEIGHTS} exists. Name another folder.")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise ModelError with the name of the file for an OSError."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or path}: {error.strerror or error}.") from error


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
        name = (unsafe.group(1) or unsafe.group(2))[:100]
        what = "and may run code; nothing of it was run. If you trust its author, save"
        what = "but a number of NumPy. Save" if _NUMPY.fullmatch(name) else what
        return (
            f"holds {name}, which is no tensor {what} its state dict alone where it was made:"
            " torch.save(model.state_dict(), ...)."
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
    parts = key.split(".") if key else None
    for _ in range(_DEPTH if parts is None else len(parts)):
        if not isinstance(content, dict) or parts == []:
            break
        found = [name for name in _PLACES if isinstance(content.get(name), dict)]
        if parts is None and not found:
            break
        name = found[0] if parts is None else _first_key(content, parts)
        if not isinstance(content.get(name), dict):
            raise ModelError(f"{file} has no dictionary {name!r} but {_keys(content)}.")
        parts = parts and parts[name.count(".") + 1 :]
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


def _first_key(content: Dict[Any, Any], parts: List[str]) -> str:
    """Return the longest beginning of a dotted key that names a dictionary, else its first part."""
    beginnings = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    there = [name for name in beginnings if isinstance(content.get(name), dict)]
    return [*there, parts[0]][0]


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
    # A view may repeat an element as often as it likes, and many names may share a storage. Each of
    # the tied ones is written.
    sizes = {name: value.numel() * value.element_size() for name, value in kept.items()}
    repeats = any(size > kept[name].untyped_storage().nbytes() for name, size in sizes.items())
    if repeats or sum(sizes.values()) > _TIED * file.stat().st_size:
        raise ModelError(f"{file}: its tensors have more bytes than the file.")
    copies = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in kept.items()
    }
    return copies, left_out


def _configs(folder: Path, out: Path) -> Dict[str, bytes]:
    """Read the configs that lie beside the file, except those that the output has already."""
    found = {}
    for name in _CONFIGS:
        source = folder / name
        if source.exists() and not (out / name).exists():
            with _naming(source):
                found[name] = read_bytes(source, limit=_CONFIG_LIMIT)
    return found
