"""Read pretrained weights of others: a local folder, or a copy of one from the model hub.

A folder is data. Its config.json is checked before transformers sees a value of it, of its other
files only safetensors files are read, and nothing that it names is imported or executed.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from huggingface_hub import constants, snapshot_download
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import Annotated, Literal

from cxr_vit.config.architectures import CONFIG_LIMIT
from cxr_vit.config.schema import ModelSection
from cxr_vit.errors import ModelError
from cxr_vit.regular_files import read_json

CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: What is fetched of a hub name.
_FETCHED = (CONFIG, _WEIGHTS, _INDEX, "model-*.safetensors")
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

#: Keys of config.json that name code, or a way to load that needs code.
_CODE = ("auto_map", "custom_pipelines", "quantization_config")
_MAX_PARAMETERS = 3e9
_INDEX_LIMIT = 16 << 20
#: Size limit of a safetensors file's header, bytes; an entry has about 150.
_HEADER_LIMIT = 16 << 20
_LFS_POINTER = b"version https://git-lfs"
_FLOATS = ("F64", "F32", "F16", "BF16")

_Width = Annotated[int, Field(ge=1, le=1 << 16)]
_Side = Annotated[int, Field(ge=1, le=1 << 14)]
_Attention = Literal["eager", "sdpa"]
_FloatName = Literal["float32", "float16", "bfloat16"]
_LabelNumber = Annotated[str, Field(pattern=r"^\d{1,6}$")]


class SavedConfig(BaseModel):
    """The keys of a ViT's config.json that are used, with Hugging Face's defaults.

    Other keys are ignored, except those that name code.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )

    architectures: Optional[List[str]] = None
    hidden_size: _Width = 768
    num_hidden_layers: Annotated[int, Field(ge=1, le=100)] = 12
    num_attention_heads: _Width = 12
    intermediate_size: _Width = 3072
    image_size: _Side = 224
    patch_size: _Side = 16
    num_channels: Annotated[int, Field(ge=1, le=64)] = 3
    qkv_bias: bool = True
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0, le=1)] = 0.02
    hidden_act: Literal[
        "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "selu", "silu",
        "swish",
    ] = "gelu"  # fmt: skip
    attn_implementation: Optional[_Attention] = None
    saved_attention: Optional[_Attention] = Field(None, alias="_attn_implementation")
    dtype: Optional[_FloatName] = None
    torch_dtype: Optional[_FloatName] = None
    num_labels: Annotated[int, Field(ge=0, le=100_000)] = 2
    id2label: Optional[
        Annotated[
            Dict[_LabelNumber, Annotated[str, Field(max_length=1000)]], Field(max_length=100_000)
        ]
    ] = None

    @field_validator("image_size", "patch_size", mode="before")
    @classmethod
    def _side_of_a_square(cls, value: Any) -> Any:
        is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
        return value[0] if is_square else value

    @model_validator(mode="after")
    def _fits_together(self) -> SavedConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of"
                f" num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is less than patch_size={self.patch_size}"
            )
        width, patches = self.hidden_size, (self.image_size // self.patch_size) ** 2
        layer = 4 * width**2 + 2 * width * self.intermediate_size
        embedding = width * (self.num_channels * self.patch_size**2 + patches)
        if self.num_hidden_layers * layer + embedding > _MAX_PARAMETERS:
            raise ValueError(f"the model has more than {_MAX_PARAMETERS:.0e} parameters")
        return self

    @property
    def labels(self) -> List[str]:
        """Labels in the order of the logits; ``LABEL_<i>`` where they have no names."""
        if self.id2label is None:
            return [f"LABEL_{index}" for index in range(self.num_labels)]
        return [self.id2label[key] for key in sorted(self.id2label, key=int)]

    def shape(self) -> Dict[str, Any]:
        """Return the arguments of `ViTConfig` that the weights depend on."""
        attention = self.attn_implementation or self.saved_attention
        return {
            **self.model_dump(
                include={
                    *("hidden_size", "num_hidden_layers", "num_attention_heads"),
                    *("intermediate_size", "image_size", "patch_size", "num_channels"),
                    *("qkv_bias", "layer_norm_eps", "initializer_range"),
                }
            ),
            **({"attn_implementation": attention} if attention else {}),
        }


def source_folder(model: ModelSection, *, config_only: bool) -> Path:
    """Return the folder of `model.name`; of a hub name fetch what is used, or config.json alone.

    Without a network, or with HF_HUB_OFFLINE=1, what was fetched before is used. Raises ValueError
    with the reason if there is no such folder and no such hub name.
    """
    if Path(model.name).is_dir():
        return Path(model.name)
    if not _HUB_NAME.fullmatch(model.name):
        raise ValueError("it is no folder of this machine and no hub name (owner/model).")
    try:
        return Path(
            snapshot_download(
                model.name,
                revision=model.revision,
                allow_patterns=[CONFIG] if config_only else list(_FETCHED),
            )
        )
    except Exception as error:  # of requests or of httpx, by its version
        at = "" if model.revision is None else f" at model.revision={model.revision}"
        reason = str(error).strip().split("\n")[0]
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set."
        raise ValueError(f"it is no folder, and as a hub name{at}: {reason}") from error


def read_config(folder: Path) -> SavedConfig:
    """Read and check a folder's config.json; raise ValueError with the reason, or OSError."""
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"{folder} has no {CONFIG}.")
    content = _read_json(path, CONFIG_LIMIT)
    kind = content.get("model_type")
    if kind != "vit":
        what = f"is of a {str(kind)[:60]!r} model" if kind is not None else "has no model_type"
        raise ModelError(f"{path} {what}; only 'vit' is supported.")
    for key in _CODE:
        if content.get(key) is not None:
            raise ValueError(
                f"{path} names code to run ({key}). It is not run; remove {key} if the weights are"
                " those of a plain ViT."
            )
    try:
        return SavedConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(_words(error))}.") from None


def _words(error: ValidationError) -> Iterator[str]:
    for detail in error.errors()[:3]:
        if detail["type"] == "value_error":
            yield str(detail["ctx"]["error"])
        else:
            key = ".".join(str(part) for part in detail["loc"])
            yield f"{key}={repr(detail['input'])[:60]}: {detail['msg']}"


def _read_json(path: Path, limit: int) -> Dict[str, Any]:
    try:
        return read_json(path, limit=limit)
    except ValueError as error:
        _refuse_pointer(path)
        raise ValueError(f"{path} cannot be read: {error}.") from error


class SavedTensor(NamedTuple):
    """A tensor in a safetensors file, read when needed."""

    file: Any
    name: str
    shape: Tuple[int, ...]

    def read(self) -> Tensor:
        """Read it from the file."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Dict[str, SavedTensor]]:
    """Open the safetensors files of a folder; yield name -> tensor.

    Raises ValueError with the reason if there are none, or if one is incomplete, damaged or of
    another type than floating point.
    """
    with contextlib.ExitStack() as stack:
        tensors: Dict[str, SavedTensor] = {}
        for path in _weight_files(folder):
            _check_start(path)
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or damaged ({error}).") from error
            for name in file.keys():  # noqa: SIM118, not a dict
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _FLOATS:
                    raise ValueError(
                        f"{path}: {name} is of the type {tensor.get_dtype()}; weights are of"
                        f" {', '.join(_FLOATS)}."
                    )
                if name in tensors:
                    raise ValueError(f"{path}: {name} is in another file of the folder as well.")
                tensors[name] = SavedTensor(file, name, tuple(tensor.get_shape()))
        yield tensors


def _weight_files(folder: Path) -> List[Path]:
    """Return the safetensors files of a folder: one, or those that its index names."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        pickles = "; pickles (.bin) are not read, they can run code" * any(folder.glob("*.bin"))
        raise ValueError(f"{folder} has no {_WEIGHTS} and no {_INDEX}{pickles}.")
    places = _read_json(folder / _INDEX, _INDEX_LIMIT).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not names or not all(map(_SHARD.fullmatch, names)):
        raise ValueError(
            f"{folder / _INDEX}: its weight_map must name files such as"
            " model-00001-of-00002.safetensors."
        )
    return [folder / name for name in sorted(names)]


def _check_start(path: Path) -> None:
    """Raise ValueError if a file cannot be a complete safetensors file."""
    if not path.is_file():  # a pipe would block
        raise ValueError(f"{path} is missing or no regular file.")
    _refuse_pointer(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if size < 8 + header or header > _HEADER_LIMIT:
        raise ValueError(f"{path} is truncated or no safetensors file ({size:,} bytes).")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull there."
            )
