"""Build Hugging Face's classifier of a ViT, a DeiT or a DINOv2.

This is the only file that knows Hugging Face's attribute names. transformers 4.x has
`vit.encoder.layer.<i>.attention.attention.query`, and its layers return tuples; 5.x has
`vit.layers.<i>.attention.q_proj`, and its layers return tensors. The hub's checkpoints use the
names of 4.x. These "hub names" are used for everything that this project stores or logs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings, Dinov2LayerScale

from cxr_vit.config.architectures import KINDS, POOLINGS, SIZES
from cxr_vit.config.rules import depth_problem, image_size_problem
from cxr_vit.config.schema import ModelSection
from cxr_vit.errors import ModelError
from cxr_vit.model.key_names import hub_name
from cxr_vit.model.source import (
    SavedConfig,
    SavedTensor,
    SourceError,
    open_weights,
    opened_files,
    read_config,
    source_folder,
)

logger = logging.getLogger(__name__)

#: A factor per channel, its only parameter.
LayerScale = Dinov2LayerScale

_HEAD = "classifier."
#: The norm of the mean of the patches, in place of the trunk's last one, as in MAE and timm.
_MEAN_NORM = "fc_norm"
#: Modules of torch that compute each token by itself.
_TOKENWISE = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ReLU, nn.SiLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Hooks from here read no tokens: those that transformers leaves in its modules for good at the
#: first call with output_hidden_states or output_attentions, and those of torch's FLOP counter.
_BLIND = ("transformers.utils.output_capturing", "torch.utils.module_tracker")
#: What adds a `forward` to a layer's class: `take_factors`, and transformers for checkpointing.
_WRAPPERS = (__name__, "transformers.modeling_layers")
#: What Hugging Face names labels that nobody named.
_UNNAMED = re.compile(r"LABEL_\d+$")


class Pool(NamedTuple):
    """Converts the tokens of the last layer to the input of the head.

    `pooling` is one of `POOLINGS`; the first `extra_tokens` tokens are no patches.
    """

    pooling: str
    extra_tokens: int

    def __call__(self, tokens: Tensor, norm: nn.Module) -> Tensor:
        """Map ``[B, tokens, width]`` to ``[B, width]`` or, with both, ``[B, 2 width]``."""
        if self.pooling == "mean":
            mean: Tensor = norm(self._mean(tokens))
            return mean
        hidden = norm(tokens)
        if self.pooling == "class":
            return hidden[:, 0]
        return torch.cat([hidden[:, 0], self._mean(hidden)], dim=1)

    def _mean(self, hidden: Tensor) -> Tensor:
        # In fp32: the sum over the patches may be beyond the range of fp16.
        return hidden[:, self.extra_tokens :].float().mean(dim=1).to(hidden.dtype)


class Family(NamedTuple):
    """Hugging Face's classes for a kind of model.

    The trunk is the attribute of the classifier with the name of the kind.
    """

    model: Type[PreTrainedModel]
    config: Type[PretrainedConfig]


#: `model_type` of config.json -> family; `KINDS` has what its shape needs.
FAMILIES: Dict[str, Family] = {
    "vit": Family(ViTForImageClassification, ViTConfig),
    "deit": Family(DeiTForImageClassification, DeiTConfig),
    "dinov2": Family(Dinov2ForImageClassification, Dinov2Config),
}
#: Where their layers are defined.
_HOMES = {family.model.__module__ for family in FAMILIES.values()}


class _FixedEmbeddings(Dinov2Embeddings):
    """DINOv2's embeddings for images of one size.

    Hugging Face's interpolate the positions in every traced forward pass, and 4.x converts the
    pixels to the dtype of the weights.
    """

    def forward(self, pixel_values: Tensor, bool_masked_pos: Optional[Tensor] = None) -> Tensor:
        """Map ``[B, channels, H, W]`` to ``[B, tokens, width]``."""
        patches = self.patch_embeddings(pixel_values)
        first = self.cls_token.expand(patches.shape[0], -1, -1)
        hidden: Tensor = self.dropout(torch.cat([first, patches], dim=1) + self.position_embeddings)
        return hidden


class VitParts:
    """Hugging Face's submodules as ``(path, module)``, in the order of the forward pass.

    `pool` converts the tokens to the input of the head, with the `norm`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        kind = model.config.model_type
        trunk = getattr(model, kind)
        if hasattr(trunk, "encoder"):  # transformers 4.x, and DINOv2
            prefix, layers = f"{kind}.encoder.layer", trunk.encoder.layer
        else:
            prefix, layers = f"{kind}.layers", trunk.layers
        self.embedding: Tuple[str, nn.Module] = (f"{kind}.embeddings", trunk.embeddings)
        self.layers = [(f"{prefix}.{index}", layer) for index, layer in enumerate(layers)]
        pooling = getattr(model.config, "pooling", KINDS[kind].pooling)
        self.pool = Pool(pooling, KINDS[kind].extra_tokens)
        norm = model.fc_norm if pooling == "mean" else trunk.layernorm
        self.norm: Tuple[str, nn.Module] = (_norm_name(kind, pooling), norm)
        self.head: Tuple[str, nn.Module] = ("classifier", model.classifier)


def _norm_name(kind: str, pooling: str) -> str:
    return _MEAN_NORM if pooling == "mean" else f"{kind}.layernorm"


def layer_output(output: Any) -> Tensor:
    """Return the hidden states from the output of an encoder layer (4.x: tuple, 5.x: tensor)."""
    return output[0] if isinstance(output, tuple) else output


def layer_halves(layer: Any) -> Tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return an encoder layer as two functions: attention and MLP, each with its residual sum.

    Both take hidden states and, with drop path, `factors`, one on their branch for each image. What
    follows the scaled output, up to the sum, is linear: dropout or LayerScale. With `tokens`, which
    is only for layers of `tokens_read`, attention returns that many first tokens.
    """
    _check_forward(layer)

    def attention(
        value: Tensor, factors: Optional[Tensor] = None, tokens: Optional[int] = None
    ) -> Tensor:
        is_dino = hasattr(layer, "norm1")
        normed = layer.norm1(value) if is_dino else layer.layernorm_before(value)
        if tokens is None:
            output = layer.attention(normed)[0]
        else:
            output, value = _attend(layer.attention, normed, tokens), value[:, :tokens]
        output = _scaled(output, factors)
        if is_dino:
            return layer.drop_path(layer.layer_scale1(output)) + value
        return (layer.dropout(output) if hasattr(layer, "mlp") else output) + value

    def mlp(value: Tensor, factors: Optional[Tensor] = None) -> Tensor:
        if hasattr(layer, "norm2"):
            output = _scaled(layer.mlp(layer.norm2(value)), factors)
            return layer.drop_path(layer.layer_scale2(output)) + value
        normed = layer.layernorm_after(value)
        if hasattr(layer, "mlp"):
            return layer.dropout(_scaled(layer.mlp(normed), factors)) + value
        hidden, end = layer.intermediate(normed), layer.output  # 4.x
        if factors is None:
            return end(hidden, value)
        _check_forward(end)
        return end.dropout(_scaled(end.dense(hidden), factors)) + value

    return attention, mlp


def _attend(attention: Any, hidden: Tensor, tokens: int) -> Tensor:
    """Return the output of an attention with `q_proj` for the first tokens, which attend to all."""
    query, key, value = (
        part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for part in (
            attention.q_proj(hidden[:, :tokens]),
            attention.k_proj(hidden),
            attention.v_proj(hidden),
        )
    )
    rate = attention.attention_dropout if attention.training else 0.0
    context = F.scaled_dot_product_attention(
        query, key, value, dropout_p=rate, scale=attention.scaling
    )
    output: Tensor = attention.o_proj(context.transpose(1, 2).flatten(2))
    return output


def tokens_read(pool: Pool, layer: Any, norm: nn.Module) -> Optional[int]:
    """Return how many first tokens of the last layer the head reads, through the norm.

    Returns None if the layer has to compute all: for another pooling, another attention than
    transformers' own with `scaled_dot_product_attention`, an older layer, a part that is not
    Hugging Face's or may mix tokens, or a hook, which would see other shapes. It is asked in each
    forward pass, as hooks come and go.
    """
    home: str = type(layer).__module__
    attention: Any = getattr(layer, "attention", None)
    if pool.pooling != "class" or home not in _HOMES or not hasattr(attention, "q_proj"):
        return None
    if _has_hooks(vars(nn.modules.module), "_global"):
        return None
    for part in (*layer.modules(), *norm.modules()):
        kind: Any = type(part)
        known = kind in _TOKENWISE or kind.__module__ in (home, "transformers.activations")
        if not known or _has_other_forward(part) or _has_hooks(vars(part)):
            return None
    attend = vars(sys.modules[home])["ALL_ATTENTION_FUNCTIONS"]["sdpa"]
    is_own = _home_of(attend) == "transformers.integrations.sdpa_attention"
    return 1 if is_own and attention.config._attn_implementation == "sdpa" else None


def _has_other_forward(part: nn.Module) -> bool:
    """Whether another `forward` than its own was set on a module, or on a class of it."""
    if "forward" in vars(part):
        return True
    kinds = [kind for kind in type(part).__mro__ if "forward" in vars(kind)]
    homes = [(_home_of(vars(kind)["forward"]), kind.__module__) for kind in kinds]
    return any(home not in (own, *_WRAPPERS) for home, own in homes)


def _home_of(function: Any) -> Optional[str]:
    """Return the module in which a function is written; functools.wraps does not change it."""
    name: Optional[str] = getattr(function, "__globals__", {}).get("__name__")
    return name


def _has_hooks(owner: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether a module, or torch for all modules, has hooks that may read tokens."""
    for name in _HOOKS:
        for hook in owner[prefix + name].values():
            if getattr(hook, "__module__", None) not in _BLIND:
                return True
    return False


def _scaled(output: Tensor, factors: Optional[Tensor]) -> Tensor:
    return output if factors is None else output * factors[:, None, None].to(output.dtype)


def check_halves(layer: Any, *, with_factors: bool) -> None:
    """Raise ModelError if a layer's halves would leave out a forward pass of the user's.

    `layer_halves` checks less and later, in what torch compiles, which hides the message.
    """
    end = getattr(layer, "output", None)  # 4.x
    for part in (layer, end) if with_factors and isinstance(end, nn.Module) else (layer,):
        _check_forward(part, is_own="forward" in vars(part))


def _check_forward(part: nn.Module, *, is_own: bool = False) -> None:
    kind: Any = type(part)
    if is_own or not kind.__module__.startswith("transformers."):
        raise ModelError(
            f"{kind.__name__}, in an encoder layer, has a forward pass of its own, which"
            " model.drop_path and pipeline.recompute=attention_mlp would leave out. Set"
            " model.drop_path=0, and pipeline.recompute=every_layer or none."
        )


def take_factors(layer: nn.Module) -> nn.Module:
    """Let an encoder layer take `factors`, of drop path, ``[B, 2]``, and `tokens` by keyword.

    The layer keeps its modules, names and hooks. Without them it computes what it did.
    """
    kind: Any = type(layer)  # mypy does not know that classes are hashable
    layer.__class__ = _with_factors(kind)
    return layer


@functools.lru_cache(maxsize=None)  # layers of one class share the graph of torch.compile
def _with_factors(kind: Any) -> type:
    if hasattr(kind, "takes_factors"):
        return kind

    def forward(
        self: Any,
        value: Tensor,
        *args: Any,
        factors: Optional[Tensor] = None,
        tokens: Optional[int] = None,
        **named: Any,
    ) -> Any:
        if factors is None and tokens is None:
            return kind.forward(self, value, *args, **named)
        first, second = (None, None) if factors is None else factors.unbind(1)
        attention, mlp = layer_halves(self)
        return mlp(attention(value, first, tokens), second)

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (kind,), self.__dict__

    names = {"forward": forward, "takes_factors": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), {**names, "__reduce_ex__": reduce})


def _blank(kind: Any) -> Any:
    """Return a layer of this class without its state: pickle finds no class by itself."""
    made: Any = _with_factors(kind)
    return made.__new__(made)


def num_tokens(config: PretrainedConfig) -> int:
    """Return the tokens of an image: patches, and those of the model."""
    return (config.image_size // config.patch_size) ** 2 + KINDS[config.model_type].extra_tokens


def check_source(
    model: ModelSection,
    *,
    image_size: int,
    layers_per_stage: Sequence[int],
    may_resize: bool = True,
) -> Optional[List[str]]:
    """Check the source of the weights by its config.json alone, before work is done for them.

    Returns the labels of a trained head in the order of its logits, or None if there is no trained
    head, its labels have no names, or `model.name` is a size.

    Raises ModelError if the source cannot be read, is of another kind of model, cannot have images
    of this size, or has other layers than `layers_per_stage`. Without `may_resize` the images must
    have the size the weights were trained with.
    """
    if model.name in SIZES:
        return None
    with loading(model.name):
        saved = read_config(source_folder(model, config_only=True))
    _check_image_size(model, saved, image_size, may_resize)
    _check_depth(layers_per_stage, saved.num_hidden_layers)
    has_head = FAMILIES[saved.kind].model.__name__ in (saved.architectures or [])
    return None if not has_head or all(map(_UNNAMED.match, saved.labels)) else saved.labels


def check_files(model: ModelSection) -> None:
    """Raise ModelError if a weight file of a local folder is missing, truncated or no such file."""
    with loading(model.name), opened_files(source_folder(model, config_only=True)):
        pass


def build_vit(
    model: ModelSection,
    *,
    names: Sequence[str],
    image_size: int,
    layers_per_stage: Sequence[int],
    seed: int,
    prevalence: Optional[np.ndarray] = None,
    for_ipu: bool = False,
) -> PreTrainedModel:
    """Build the model in fp32 with random weights, or with those of a local folder or the hub.

    `names` are the labels in the order of the logits, `image_size` is in pixels, and `seed` sets
    random weights and a new head. `layers_per_stage` must hold every layer.

    `prevalence`, float64 ``[C]``, is the fraction of the training images with each label, for the
    bias of a new head. Without it a new head has a bias of zero.

    A head of other labels, or of other modules than one linear layer (``classifier.0.weight``), is
    replaced by a new one; a subclass that changes the head loads its weights afterwards.

    `for_ipu` builds what PopTorch can run: eager attention, and GELU in its tanh form, which is the
    only one an IPU has. The model's config records it.

    Position embeddings of another image size are interpolated, as transformers does it. A head of
    another `model.pooling` than that of the weights is replaced, with its norm.

    Raises ModelError if the weights cannot be loaded, or are incomplete or unexpected.
    """
    transformers.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.name in SIZES:
            vit, head_is_new = _from_size(model, names, image_size, for_ipu), True
        else:
            vit, head_is_new = _from_pretrained(model, names, image_size, for_ipu)
    _check_depth(layers_per_stage, vit.config.num_hidden_layers)
    if head_is_new and prevalence is not None and model.head_bias == "prior":
        _set_prior(vit.classifier, prevalence)
    vit.config.architectures = [type(vit).__name__]
    return vit.float()


def _settings(
    model: ModelSection, names: Sequence[str], for_ipu: bool, hidden_act: str
) -> Dict[str, Any]:
    """Return the settings that do not depend on the source of the weights.

    `hidden_act` is the activation the weights were trained with. An IPU computes every GELU in its
    tanh form (docs/ipu.md, section 6), so the config records that form: every device then computes
    the same function from the checkpoint.
    """
    hidden_act = model.hidden_act or hidden_act
    hidden, attention = model.hidden_dropout, model.attention_dropout
    if for_ipu and hidden_act == "gelu":
        logger.info("using the tanh form of GELU, as the IPU does; checkpoints record it")
        hidden_act = "gelu_pytorch_tanh"
    return {
        **({"attn_implementation": "eager"} if for_ipu else {}),
        "hidden_act": hidden_act,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "multi_label_classification",
        "hidden_dropout_prob": model.dropout if hidden is None else hidden,
        "attention_probs_dropout_prob": model.dropout if attention is None else attention,
        **({} if model.layer_norm_eps is None else {"layer_norm_eps": model.layer_norm_eps}),
    }


def _from_size(
    model: ModelSection, names: Sequence[str], image_size: int, for_ipu: bool
) -> PreTrainedModel:
    size = SIZES[model.name]
    config = ViTConfig(
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.mlp_size,
        image_size=image_size,
        patch_size=model.patch_size,
        initializer_range=size.initializer_range,
        **_settings(model, names, for_ipu, "gelu"),
    )
    vit = ViTForImageClassification(config)
    pooling = model.pooling or KINDS["vit"].pooling
    _set_pooling(vit, pooling)
    if model.head_std is not None or pooling == "both":
        _draw_head(vit.classifier, model.head_std or size.initializer_range)
    return vit


def _from_pretrained(
    model: ModelSection, names: Sequence[str], image_size: int, for_ipu: bool
) -> Tuple[PreTrainedModel, bool]:
    """Load weights; return the model and whether its head is new.

    transformers gets the checked values of config.json only, and none of the folder's files.
    """
    with loading(model.name):
        folder = source_folder(model, config_only=False)
        saved = read_config(folder)
    _check_image_size(model, saved, image_size)
    settings = {
        **saved.shape(),
        **_settings(model, names, for_ipu, saved.hidden_act),
        "image_size": image_size,
    }
    with loading(model.name), open_weights(folder) as tensors:
        before = _pooling_of(saved, tensors)
        pooling = model.pooling or before
        vit = _empty(FAMILIES[saved.kind], settings, pooling)
        weights = _at_size(model.name, tensors, saved, image_size)
        weights = _with_norm(model.name, weights, saved.kind, pooling)
        # A norm of another pooling is new, as the head is.
        norms = [_norm_name(saved.kind, other) for other in (pooling, before)]
        may_be_new = (_HEAD,) if norms[0] == norms[1] else (_HEAD, f"{norms[0]}.")
        unfit = _check_weights(model.name, vit, weights, may_be_new)
        vit.to_empty(device="cpu")
        head_is_new = bool(unfit) or pooling != before or saved.labels != list(names)
        norm = VitParts(vit).norm[1]
        assert isinstance(norm, nn.LayerNorm)
        norm.reset_parameters()
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                stored = weights.get(hub_name(name))
                if stored is not None and not (head_is_new and name.startswith(_HEAD)):
                    parameter.copy_(stored.read())
    if head_is_new:
        _draw_head(vit.classifier, model.head_std or saved.initializer_range)
        if not any(name.startswith(_HEAD) for name in unfit):
            other = f"other labels ({saved.labels})"
            other = other if pooling == before else f"another pooling ({before})"
            logger.warning("%s has %s: its head is replaced", model.name, other)
    return vit.eval(), head_is_new


def _pooling_of(saved: SavedConfig, tensors: Mapping[str, SavedTensor]) -> str:
    """Return the pooling of a model: our config.json names it, else a norm or the kind implies it.

    Only the mean has a norm of its own beside the trunk.
    """
    has_mean = any(name.startswith(f"{_MEAN_NORM}.") for name in tensors)
    return saved.pooling or ("mean" if has_mean else KINDS[saved.kind].pooling)


def _with_norm(
    name: str, weights: Mapping[str, _Stored], kind: str, pooling: str
) -> Dict[str, _Stored]:
    """Leave out the norm of another pooling."""
    other = f"{kind}.layernorm." if pooling == "mean" else f"{_MEAN_NORM}."
    left_out = sorted(key for key in weights if key.startswith(other))
    if left_out:
        logger.info("%s: left out %s (pooling: %s)", name, ", ".join(left_out), pooling)
    return {key: value for key, value in weights.items() if key not in left_out}


def _draw_head(head: nn.Linear, std: float) -> None:
    """Draw the weights as Hugging Face does."""
    torch.nn.init.trunc_normal_(head.weight, std=std)
    torch.nn.init.zeros_(head.bias)


def _set_pooling(vit: PreTrainedModel, pooling: str) -> None:
    """Replace the last norm and the head where Hugging Face's have another pooling."""
    config, kind = vit.config, KINDS[vit.config.model_type]
    if pooling == kind.pooling:
        return
    config.pooling = pooling
    if pooling == "mean":
        vit.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        getattr(vit, config.model_type).layernorm = nn.Identity()
    if POOLINGS[pooling] != POOLINGS[kind.pooling]:
        inputs = POOLINGS[pooling] * config.hidden_size
        vit.classifier = nn.Linear(inputs, vit.classifier.out_features)


def _empty(family: Family, settings: Mapping[str, Any], pooling: str) -> PreTrainedModel:
    """Build a model without weights, which are allocated once they are known to fit."""
    with torch.device("meta"):
        vit = family.model(family.config(**settings))
        _set_pooling(vit, pooling)
    embeddings = VitParts(vit).embedding[1]
    if isinstance(embeddings, Dinov2Embeddings):
        embeddings.mask_token = None  # for its pretraining; 4.x has it always
        vit.config.use_mask_token = False
        embeddings.__class__ = _FixedEmbeddings
    return vit


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Raise ModelError with the alternatives if the source cannot be loaded."""
    transformers.logging.disable_progress_bar()  # also those of downloads
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error)
        if isinstance(error, OSError):
            reason = f"{error.filename or name}: {error.strerror or error}."
        advice = (
            " Set it to a folder with config.json and model.safetensors, to a hub name this machine"
            f" can reach, or to a size: {', '.join(SIZES)}."
        )
        advice = "" if isinstance(error, SourceError) else advice
        raise ModelError(f"cannot load model.name={name!r}: {reason}{advice}") from error


def _check_depth(layers_per_stage: Sequence[int], depth: int) -> None:
    problem = depth_problem(list(layers_per_stage), depth)
    if problem:
        raise ModelError(str(problem))


def _check_image_size(
    model: ModelSection, saved: SavedConfig, image_size: int, may_resize: bool = True
) -> None:
    if not may_resize and saved.image_size != (image_size, image_size):
        size = saved.image_size[0]
        raise ModelError(
            f"model.name={model.name!r} takes images of {size} pixels, but"
            f" data.image_size={image_size}. Set data.image_size={size}."
        )
    patches = f"{saved.patch_size}, the patch size of model.name={model.name}"
    problem = image_size_problem(image_size, saved.patch_size, patches)
    if problem:
        raise ModelError(str(problem))


class _Resized(NamedTuple):
    """Position embeddings of a grid of patches, interpolated for a square one when they are read.

    The first `extra` embeddings are those of tokens that are no patches.
    """

    saved: SavedTensor
    extra: int
    grid: Tuple[int, int]
    side: int

    @property
    def shape(self) -> Tuple[int, ...]:
        """Shape of the interpolated embeddings."""
        return (1, self.extra + self.side**2, self.saved.shape[-1])

    def read(self) -> Tensor:
        """Read and interpolate them, in fp32, as transformers' interpolate_pos_encoding does."""
        first, patches = self.saved.read().float().tensor_split([self.extra], dim=1)
        plane = patches.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        size = (self.side, self.side)
        plane = F.interpolate(plane, size=size, mode="bicubic", align_corners=False)
        return torch.cat([first, plane.flatten(2).transpose(1, 2)], dim=1)


_Stored = Union[SavedTensor, _Resized]


def _at_size(
    name: str, tensors: Mapping[str, SavedTensor], saved: SavedConfig, image_size: int
) -> Dict[str, _Stored]:
    """Return the tensors with position embeddings for images of this size."""
    weights: Dict[str, _Stored] = dict(tensors)
    key, extra = f"{saved.kind}.embeddings.position_embeddings", KINDS[saved.kind].extra_tokens
    side, (rows, columns) = image_size // saved.patch_size, saved.grid
    positions = tensors.get(key)
    if positions is None or (rows, columns) == (side, side):
        return weights
    if positions.shape == (1, extra + rows * columns, saved.hidden_size):  # else it is reported
        weights[key] = _Resized(positions, extra, saved.grid, side)
        logger.info(
            "%s: position embeddings interpolated from %d x %d to %d x %d patches, as"
            " data.image_size=%d",
            *(name, rows, columns, side, side, image_size),
        )
    return weights


def _check_weights(
    name: str, vit: nn.Module, weights: Mapping[str, _Stored], may_be_new: Tuple[str, ...]
) -> Set[str]:
    """Refuse weights that do not fit, except those that may be new; return these."""
    own = {hub_name(key): tuple(value.shape) for key, value in vit.named_parameters()}
    missing = own.keys() - weights.keys()
    unexpected = weights.keys() - own.keys()
    mismatched = {key for key in own.keys() & weights.keys() if own[key] != weights[key].shape}
    head = {key for key in missing | mismatched | unexpected if key.startswith(may_be_new)}
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:10])}{', ...' if len(keys) > 10 else ''}"
        for what, keys in (
            ("missing", missing - head),
            ("unexpected", unexpected - head),
            ("of another shape", mismatched - head),
        )
        if keys
    ]
    if problems:
        raise ModelError(
            f"the weights of {name} do not fit {type(vit).__name__}: {'; '.join(problems)}."
            " Only the head (classifier.*) may be new."
        )
    if head:
        logger.info("%s: new head (%s)", name, ", ".join(sorted(head)))
    return head


def _set_prior(head: nn.Linear, prevalence: np.ndarray) -> None:
    """Set the bias to the log-odds of the prevalence; the weights stay as Hugging Face draws them.

    The first loss is then near the entropy of the labels (0.164 on NIH) instead of log 2 = 0.693,
    and no steps are spent on learning that most findings are rare. Smaller weights would bring it
    closer, but the trunk's gradients pass through them. With a tenth of these weights, the demo
    of then (class token, no flip, 588 updates of 32 images, run.seed=0) had a macro AUROC of 0.938
    instead of 0.969.
    """
    with torch.no_grad():
        head.bias.copy_(torch.from_numpy(np.log(prevalence / (1.0 - prevalence))))
