"""Read pretrained weights of others: a local folder, or a copy of one from the model hub.

A folder is data. Its config.json is checked before transformers sees a value of it, of its other
files only preprocessor_config.json and safetensors files are read, and nothing that it names is
imported or executed.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shlex
from pathlib import Path
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)

from huggingface_hub import constants, snapshot_download
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import Annotated, Literal

from cxr_vit.config.architectures import CONFIG_LIMIT
from cxr_vit.config.schema import ModelSection
from cxr_vit.errors import ModelError
from cxr_vit.model.key_names import KeyNames, config_of, translate
from cxr_vit.regular_files import read_json

logger = logging.getLogger(__name__)

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: What is fetched of a hub name: first what describes the model, then the weights, which may have
#: any name.
_FETCHED = ((CONFIG, PREPROCESSOR), (_WEIGHTS, _INDEX, "model-*.safetensors"), ("*.safetensors",))
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: Names of tensors that can be shown in a message.
_PLAIN = re.compile(r"[\w.-]{1,200}", re.ASCII)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")

#: Keys of config.json that name code, or a way to load that needs code.
_CODE = ("auto_map", "custom_pipelines", "quantization_config")
_MAX_PARAMETERS = 3e9
_PREPROCESSOR_LIMIT = 1 << 20
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
_Activation = Literal[
    "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "selu", "silu",
    "swish",
]  # fmt: skip

#: model_type of a config.json -> kind of model, and Hugging Face's defaults that differ from ViT's.
_MODEL_TYPES = {"vit": "vit", "vit_mae": "vit", "deit": "deit", "dinov2": "dinov2"}
_SUPPORTED = "only 'vit', 'vit_mae', 'deit' and 'dinov2' are supported"
_DEFAULTS: Dict[str, Dict[str, Any]] = {"dinov2": {"patch_size": 14, "layer_norm_eps": 1e-6}}


#: Heads of the widths in use that are no multiples of 64, or have other heads than 64 wide.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
_TIMM_EPSILON = 1e-6
_TIMM_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_TIMM_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

_STRICT = ConfigDict(
    strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
)
_Schema = TypeVar("_Schema", bound=BaseModel)
_Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
_Deviation = Annotated[float, Field(ge=1e-6, le=1e3)]
_Means = Annotated[List[_Mean], Field(min_length=1, max_length=64)]
_Deviations = Annotated[List[_Deviation], Field(min_length=1, max_length=64)]
_Size = Union[
    _Side,
    Annotated[List[_Side], Field(min_length=1, max_length=2)],
    Annotated[Dict[str, Optional[_Side]], Field(max_length=10)],
    None,
]
#: What a key must be where pydantic's words would name types of Python.
_SIDES_WORDS = "a number of pixels, or a list of height and width"
_NUMBERS_WORDS = "a number, or a list of one number per channel, in a usable range"
_KEY_WORDS = {
    **{"image_mean": _NUMBERS_WORDS, "image_std": _NUMBERS_WORDS},
    **{"mean": _NUMBERS_WORDS, "std": _NUMBERS_WORDS},
    **{"image_size": _SIDES_WORDS, "img_size": _SIDES_WORDS},
    "id2label": "an object of numbers and labels",
    "architectures": "a list of names",
}


class SourceError(ValueError):
    """A source of weights that is refused with advice of its own."""


def _absent_if_unknown(
    value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
) -> Any:
    """Read a value that is only compared: one of another form is absent, with a warning."""
    try:
        return handler(value)
    except ValidationError:
        logger.warning(
            "%s: %s=%s is of an unknown form and is ignored",
            *(info.context, info.field_name, repr(value)[:60]),
        )
        return None


class SavedConfig(BaseModel):
    """The keys of a model's config.json that are used, with Hugging Face's defaults.

    Other keys are ignored, except those that name code.
    """

    model_config = _STRICT

    kind: Literal["vit", "deit", "dinov2"]
    architectures: Optional[List[str]] = None
    hidden_size: _Width = 768
    num_hidden_layers: Annotated[int, Field(ge=1, le=100)] = 12
    num_attention_heads: _Width = 12
    #: Of vit and deit; dinov2 has `mlp_ratio`.
    saved_mlp: _Width = Field(3072, alias="intermediate_size")
    mlp_ratio: Annotated[int, Field(ge=1, le=64)] = 4
    layerscale_value: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    use_swiglu_ffn: bool = False
    #: Rows and columns, pixels.
    image_size: Tuple[_Side, _Side] = (224, 224)
    patch_size: _Side = 16
    num_channels: Annotated[int, Field(ge=1, le=64)] = 3
    qkv_bias: bool = True
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0, le=1)] = 0.02
    hidden_act: _Activation = "gelu"
    attn_implementation: Optional[_Attention] = None
    saved_attention: Optional[_Attention] = Field(None, alias="_attn_implementation")
    dtype: Optional[_FloatName] = None
    torch_dtype: Optional[_FloatName] = None
    num_labels: Annotated[int, Field(ge=0, le=100_000)] = 2
    #: Of this project's own checkpoints: the head's input if it is not Hugging Face's, and the
    #: weights of the positives of each label.
    pooling: Optional[Literal["class", "mean", "both"]] = None
    positive_weight: Optional[List[Annotated[float, Field(gt=0, le=1e6)]]] = None
    id2label: Optional[
        Annotated[
            Dict[_LabelNumber, Annotated[str, Field(max_length=1000)]], Field(max_length=100_000)
        ]
    ] = None

    @field_validator("image_size", mode="before")
    @classmethod
    def _both_sides(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return (value, value) if isinstance(value, int) else value

    @field_validator("patch_size", mode="before")
    @classmethod
    def _side_of_a_square(cls, value: Any) -> Any:
        is_square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
        return value[0] if is_square else value

    @field_validator("mlp_ratio", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @model_validator(mode="after")
    def _fits_together(self) -> SavedConfig:
        if self.use_swiglu_ffn:
            raise ValueError("use_swiglu_ffn=true: SwiGLU layers are not supported")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of"
                f" num_attention_heads={self.num_attention_heads}"
            )
        if min(self.image_size) < self.patch_size:
            raise ValueError(
                f"image_size={min(self.image_size)} is less than patch_size={self.patch_size}"
            )
        width, patches = self.hidden_size, self.grid[0] * self.grid[1]
        layer = 4 * width**2 + 2 * width * self.intermediate_size
        embedding = width * (self.num_channels * self.patch_size**2 + patches)
        if self.num_hidden_layers * layer + embedding > _MAX_PARAMETERS:
            raise ValueError(f"the model has more than {_MAX_PARAMETERS:.0e} parameters")
        return self

    @property
    def grid(self) -> Tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.image_size
        return rows // self.patch_size, columns // self.patch_size

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.hidden_size * self.mlp_ratio if self.kind == "dinov2" else self.saved_mlp

    @property
    def labels(self) -> List[str]:
        """Labels in the order of the logits; ``LABEL_<i>`` where they have no names."""
        if self.id2label is None:
            return [f"LABEL_{index}" for index in range(self.num_labels)]
        return [self.id2label[key] for key in sorted(self.id2label, key=int)]

    def shape(self) -> Dict[str, Any]:
        """Return the arguments of the kind's config class that the weights depend on."""
        attention = self.attn_implementation or self.saved_attention
        rows, columns = self.image_size
        names = [
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"),
            *("num_channels", "qkv_bias", "layer_norm_eps", "initializer_range"),
            *(
                ("mlp_ratio", "layerscale_value")
                if self.kind == "dinov2"
                else ("intermediate_size",)
            ),
        ]
        return {
            **{name: getattr(self, name) for name in names},
            "image_size": rows if rows == columns else [rows, columns],
            **({"attn_implementation": attention} if attention else {}),
        }


class _TimmArguments(BaseModel):
    """What timm's model_args say of a model that its tensors do not show."""

    model_config = _STRICT

    num_heads: Optional[_Width] = None
    img_size: _Size = None
    act_layer: Literal[None, "gelu", "gelu_tanh", "quick_gelu"] = None


class _TimmPreprocessor(BaseModel):
    """How timm's pretrained_cfg prepares images."""

    model_config = _STRICT

    mean: Optional[_Means] = None
    std: Optional[_Deviations] = None
    input_size: Optional[Annotated[List[_Side], Field(min_length=3, max_length=3)]] = None
    interpolation: Optional[str] = None

    _compared = field_validator("input_size", "interpolation", mode="wrap")(_absent_if_unknown)


class _SavedPreprocessor(BaseModel):
    """The keys of a preprocessor_config.json that are used."""

    model_config = _STRICT

    do_normalize: Optional[bool] = None
    image_mean: Union[_Mean, _Means, None] = None
    image_std: Union[_Deviation, _Deviations, None] = None
    do_rescale: Optional[bool] = None
    rescale_factor: Optional[Annotated[float, Field(ge=1e-6, le=1e3)]] = None
    do_resize: Optional[bool] = None
    size: _Size = None
    do_center_crop: Optional[bool] = None
    crop_size: _Size = None
    resample: Optional[Annotated[int, Field(ge=0, le=5)]] = None

    _compared = field_validator(
        *("do_resize", "size", "do_center_crop", "crop_size", "resample"), mode="wrap"
    )(_absent_if_unknown)


class Preprocessor(NamedTuple):
    """How images are prepared for the weights."""

    #: Of gray levels of 0 to 1: one value for every channel, or one per channel; None if unknown.
    mean: Optional[Tuple[float, ...]]
    std: Optional[Tuple[float, ...]]
    #: Side of a square in pixels, if there is one.
    size: Optional[int]
    #: Pillow's number of the filter, if it is known.
    resample: Optional[int]
    file: str = PREPROCESSOR
    #: Side to which images are resized before a square of `size` is cut out; None if none is.
    read_size: Optional[int] = None


def source_folder(model: ModelSection, *, config_only: bool) -> Path:
    """Return the folder or the safetensors file that `model.name` means.

    Of a hub name fetch what is used, or only what describes the model. Without a network, or with
    HF_HUB_OFFLINE=1, what was fetched before is used. Raises ValueError with the reason if there is
    no such folder or file and no such hub name.
    """
    path = Path(model.name)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            pickles = [path] if path.suffix.lower() in _PICKLES else []
            raise _no_weights("it is no safetensors file.", pickles)
        return path
    if not _HUB_NAME.fullmatch(model.name):
        raise ValueError("it is no folder of this machine and no hub name (owner/model).")
    described, weights, any_name = _FETCHED
    folder = _fetch(model, described)
    if config_only and _kind(_config(folder)):
        return folder
    _fetch(model, (*described, *weights))
    if not (folder / _WEIGHTS).exists() and not (folder / _INDEX).exists():
        _fetch(model, (*described, *any_name))
        if not constants.HF_HUB_OFFLINE and not any(folder.glob("*.safetensors")):
            raise _no_safetensors(model)
    return folder


def _no_safetensors(model: ModelSection) -> SourceError:
    revision = "" if model.revision is None else f", revision={model.revision!r}"
    code = f"snapshot_download({model.name!r}{revision}, local_dir='FOLDER')"
    return SourceError(
        "the repository has no safetensors file. Download it with python -c"
        f' "from huggingface_hub import snapshot_download; {code}", and convert its pickle, e.g.'
        " python -m cxr_vit convert-weights FOLDER/pytorch_model.bin NEW_FOLDER."
    )


def _fetch(model: ModelSection, patterns: Sequence[str]) -> Path:
    try:
        return Path(
            snapshot_download(model.name, revision=model.revision, allow_patterns=list(patterns))
        )
    except Exception as error:  # of requests or of httpx, by its version
        at = "" if model.revision is None else f" at model.revision={model.revision}"
        reason = str(error).strip().split("\n")[0]
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set."
        raise ValueError(f"it is no folder, and as a hub name{at}: {reason}") from error


def _beside(place: Path, name: str) -> Path:
    return (place if place.is_dir() else place.parent) / name


def _config(place: Path) -> Dict[str, Any]:
    """Read config.json; return {} if there is none."""
    path = _beside(place, CONFIG)
    if not path.exists():
        return {}
    content = _read_json(path, CONFIG_LIMIT)
    kind = content.get("model_type")
    if kind is None and "architecture" not in content:
        raise ModelError(f"{path} has no model_type; {_SUPPORTED}.")
    if kind is not None and (not isinstance(kind, str) or kind not in _MODEL_TYPES):
        raise ModelError(f"{path} is of a {str(kind)[:60]!r} model; {_SUPPORTED}.")
    for key in _CODE:
        if content.get(key) is not None:
            raise SourceError(
                f"{path} names code to run ({key}). It is not run; remove {key} if the weights are"
                " those of a plain ViT."
            )
    return content


def _kind(content: Dict[str, Any]) -> Optional[str]:
    """Return the kind that Hugging Face's config.json names; None if there is none."""
    kind = content.get("model_type")
    return None if kind is None else _MODEL_TYPES[kind]


def read_config(place: Path) -> SavedConfig:
    """Return the checked config.json of a folder or of the folder of a safetensors file.

    Without one, or with timm's, the shapes of the tensors give the values. Raises ValueError with
    the reason, or OSError.
    """
    content = _config(place)
    kind = _kind(content)
    if kind is None:
        with opened_files(place) as stored:
            return _derived(place, content, *_translated(stored, kind))
    return _validated(
        SavedConfig, {**_DEFAULTS.get(kind, {}), **content, "kind": kind}, _beside(place, CONFIG)
    )


def _derived(
    place: Path, content: Dict[str, Any], names: KeyNames, tensors: Dict[str, SavedTensor]
) -> SavedConfig:
    """Make the config of a model that has none of Hugging Face's."""
    path = _beside(place, CONFIG)
    arguments = _validated(_TimmArguments, content.get("model_args") or {}, path, "model_args")
    size = _timm_preprocessor(content, path).input_size
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found = config_of(shapes, names.kind, _sides(arguments.img_size) or (size and size[1:]))
    width = found["hidden_size"]
    heads = arguments.num_heads or _HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
    if heads is None:
        raise SourceError(
            f"the number of heads of a model of the width {width} is unknown: put it into {CONFIG},"
            ' {"architecture": "vit", "model_args": {"num_heads": ...}}.'
        )
    values = {
        **_DEFAULTS.get(names.kind, {}),
        **({"layer_norm_eps": _TIMM_EPSILON} if names.is_timm else {}),
        **found,
        **{"kind": names.kind, "num_attention_heads": heads},
        "hidden_act": _TIMM_ACTIVATIONS.get(arguments.act_layer or "", "gelu"),
    }
    return _validated(SavedConfig, values, place)


def _validated(schema: Type[_Schema], content: Any, path: Path, key: str = "") -> _Schema:
    """Check a JSON object, the value of a key or a whole file."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {key}={repr(content)[:60]} is no JSON object.")
    try:
        return schema.model_validate(content, context=path)
    except ValidationError as error:
        words = list(dict.fromkeys(_words(error, content)))
        raise ValueError(f"{path}: {'; '.join(words[:3])}.") from None


def _words(error: ValidationError, content: Mapping[str, Any]) -> Iterator[str]:
    for detail in error.errors():
        if detail["type"] == "value_error":
            yield str(detail["ctx"]["error"])
        else:  # of a value in it, or of one form of several
            key = str(detail["loc"][0])
            must = _KEY_WORDS.get(key)
            words = f"must be {must}" if must else detail["msg"]
            yield f"{key}={repr(content.get(key, detail['input']))[:60]}: {words}"


def _read_json(path: Path, limit: int) -> Dict[str, Any]:
    try:
        return read_json(path, limit=limit)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        _refuse_pointer(path)
        raise ValueError(f"{path} cannot be read: {error}.") from error


def read_preprocessor(place: Path) -> Optional[Preprocessor]:
    """Return how images are prepared for the weights; None if no file says it.

    preprocessor_config.json is read, else timm's config.json. Raises ValueError with the reason, or
    OSError.
    """
    path = _beside(place, PREPROCESSOR)
    if not path.exists():
        path = _beside(place, CONFIG)
        return _of_timm(_timm_preprocessor(_config(place), path), path)
    saved = _validated(_SavedPreprocessor, _read_json(path, _PREPROCESSOR_LIMIT), path)
    # Normalisation of what a factor makes of gray levels, in terms of those of 0 to 1.
    factor = 1.0 if saved.do_rescale is False else saved.rescale_factor or 1 / 255
    scale = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-6) else 1 / (255 * factor)
    mean, std = _listed(saved.image_mean), _listed(saved.image_std)
    if saved.do_normalize is False:
        mean, std = [0.0], [1.0]
    _check_channels(path, mean, std)
    crop = _sides(saved.crop_size) if saved.do_center_crop is not False else []
    resized = _sides(saved.size) if saved.do_resize is not False else []
    sides = crop or resized
    return Preprocessor(
        None if mean is None else tuple(value * scale for value in mean),
        None if std is None else tuple(value * scale for value in std),
        sides[0] if len(set(sides)) == 1 else None,
        saved.resample,
        read_size=resized[0] if crop and len(set(resized)) == 1 else None,
    )


def _timm_preprocessor(content: Dict[str, Any], path: Path) -> _TimmPreprocessor:
    saved = content.get("pretrained_cfg")
    return _validated(
        _TimmPreprocessor, content if saved is None else saved, path, "pretrained_cfg"
    )


def _of_timm(saved: _TimmPreprocessor, path: Path) -> Optional[Preprocessor]:
    if saved.mean is None and saved.std is None:
        return None
    _check_channels(path, saved.mean, saved.std)
    sides = saved.input_size[1:] if saved.input_size else []
    size = sides[0] if len(set(sides)) == 1 else None
    resample = _TIMM_FILTERS.get(saved.interpolation or "")
    mean, std = (None if values is None else tuple(values) for values in (saved.mean, saved.std))
    return Preprocessor(mean, std, size, resample, CONFIG)


def _check_channels(path: Path, mean: Optional[List[float]], std: Optional[List[float]]) -> None:
    if mean and std and 1 < len(mean) != len(std) > 1:
        raise ValueError(f"{path}: {len(mean)} values of the mean, {len(std)} of the deviation.")


def _listed(value: Union[float, List[float], None]) -> Optional[List[float]]:
    return [value] if isinstance(value, (int, float)) else value


def _sides(size: Union[int, List[int], Dict[str, Optional[int]], None]) -> List[int]:
    """Return height and width of a size in a file; of the shortest edge a square is left."""
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = [side for side in (size.get("height") or edge, size.get("width") or edge) if side]
    if isinstance(size, int):
        size = [size]
    return size * 2 if size and len(size) == 1 else size or []


class SavedTensor(NamedTuple):
    """A tensor, or some rows of one, in a safetensors file; read when needed."""

    file: Any
    path: Path
    name: str
    shape: Tuple[int, ...]
    dtype: str
    #: The first row, if it is not the whole of the stored one.
    start: Optional[int] = None

    def read(self) -> Tensor:
        """Read it from the file."""
        tensor: Tensor
        if self.start is None:
            tensor = self.file.get_tensor(self.name)
        else:
            tensor = self.file.get_slice(self.name)[self.start : self.start + self.shape[0]]
        return tensor


@contextlib.contextmanager
def open_weights(place: Path) -> Iterator[Dict[str, SavedTensor]]:
    """Open the safetensors files of a folder, or one; yield hub name -> tensor.

    Tensors that no classifier needs are left out. Raises ValueError with the reason if there are no
    files, if one is incomplete, damaged or of another type than floating point, or if the tensors
    are not those of one ViT.
    """
    content = _config(place)
    kind = _kind(content)
    with opened_files(place) as stored:
        names, tensors = _translated(stored, kind)
        if names.prefix:
            logger.info("%s: dropped the prefix %s of all names", place, names.prefix)
        if kind is None:
            logger.info("%s: %s", place, _described(_derived(place, content, names, tensors)))
        yield tensors


def _described(saved: SavedConfig) -> str:
    return (
        f"from the tensors: a {saved.kind} of {saved.num_hidden_layers} layers, width"
        f" {saved.hidden_size}, {saved.num_attention_heads} heads, patches of {saved.patch_size}"
        f" and images of {saved.image_size[0]} x {saved.image_size[1]} pixels,"
        f" layer_norm_eps={saved.layer_norm_eps:g}"
    )


def _translated(
    stored: Dict[str, SavedTensor], kind: Optional[str]
) -> Tuple[KeyNames, Dict[str, SavedTensor]]:
    """Return the stored tensors, or parts of them, by hub name."""
    names = translate(stored, kind)
    tensors = {}
    for full, (name, third) in names.tensors.items():
        tensor = stored[name]
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{tensor.path}: {name} is of the type {tensor.dtype}; weights are of"
                f" {', '.join(_FLOATS)}."
            )
        if third is not None:
            rows = tensor.shape[0] if tensor.shape else 0
            if not rows or rows % 3:
                raise ValueError(
                    f"{name} of the shape {list(tensor.shape)} has no rows of query, key and value."
                )
            shape = (rows // 3, *tensor.shape[1:])
            tensor = tensor._replace(shape=shape, start=third * rows // 3)
        tensors[full] = tensor
    return names, tensors


@contextlib.contextmanager
def opened_files(place: Path) -> Iterator[Dict[str, SavedTensor]]:
    """Open the safetensors files; yield stored name -> tensor."""
    with contextlib.ExitStack() as stack:
        tensors: Dict[str, SavedTensor] = {}
        for path in _weight_files(place):
            _check_start(path)
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or damaged ({error}).") from error
            for name in file.keys():  # noqa: SIM118, not a dict
                if not _PLAIN.fullmatch(name):
                    raise ValueError(f"{path}: {name[:40]!a} is no name of a tensor of a ViT.")
                tensor = file.get_slice(name)
                if name in tensors:
                    raise ValueError(f"{path}: {name} is in another file of the folder as well.")
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                tensors[name] = SavedTensor(file, path, name, shape, dtype)
        yield tensors


def _weight_files(place: Path) -> List[Path]:
    """Return the safetensors files: one, or those that an index names."""
    if not place.is_dir():
        return [place]
    if (place / _WEIGHTS).exists():
        return [place / _WEIGHTS]
    if not (place / _INDEX).exists():
        return [_only_file(place)]
    places = _read_json(place / _INDEX, _INDEX_LIMIT).get("weight_map")
    names = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not names or not all(map(_SHARD.fullmatch, names)):
        raise ValueError(
            f"{place / _INDEX}: its weight_map must name files such as"
            " model-00001-of-00002.safetensors."
        )
    return [place / name for name in sorted(names)]


def _only_file(folder: Path) -> Path:
    """Return the only safetensors file of a folder."""
    files = sorted(path for path in folder.iterdir() if path.name.isprintable())
    found = [path for path in files if path.suffix.lower() == ".safetensors"]
    if not found:
        pickles = [path for path in files if path.suffix.lower() in _PICKLES]
        pickles.sort(key=lambda path: not path.name.startswith("pytorch_model"))
        raise _no_weights(f"{folder} has no {_WEIGHTS}.", pickles)
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:10])
        raise SourceError(
            f"{folder} has no {_WEIGHTS}, but {names}: set model.name to one of them."
        )
    return found[0]


def _no_weights(reason: str, pickles: List[Path]) -> ValueError:
    """Return an error with the command that converts a pickle, if there is one."""
    if not pickles:
        return ValueError(reason)
    command = f"python -m cxr_vit convert-weights {shlex.quote(str(pickles[0]))} NEW_FOLDER"
    return SourceError(
        f"{reason} Pickles ({pickles[0].suffix}) are not read, they can run code; convert it:"
        f" {command}."
    )


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
            raise SourceError(
                f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull there."
            )
