"""Builds ViTForImageClassification; the only file that knows Hugging Face's attribute names.

transformers 4.x has `vit.encoder.layer.<i>.attention.attention.query`, layers that return tuples;
5.x has `vit.layers.<i>.attention.q_proj`, layers that return tensors. The hub's checkpoints spell
the former, and so does everything this project stores or logs ("hub names").
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, ViTConfig, ViTForImageClassification

from cxr_vit.config.architectures import SIZES
from cxr_vit.config.rules import depth_problem
from cxr_vit.config.schema import ModelSection
from cxr_vit.errors import ModelError

__all__ = [
    "VitParts",
    "build_vit",
    "hidden_shape",
    "hub_files",
    "hub_name",
    "layer_output",
]

logger = logging.getLogger(__name__)

#: Memory names of transformers 5.x -> hub names. In order: `mlp.fc2` has no prefix to tell it by.
_RENAMES: Tuple[Tuple[str, str], ...] = (
    (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_HEAD = "classifier."
#: In the hub's in21k checkpoint, used by no classifier.
_POOLER = re.compile(r"^(vit\.)?pooler\.")


def hub_name(name: str) -> str:
    """Return the name a parameter has in the hub's checkpoints, whatever transformers calls it."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


class VitParts:
    """Hugging Face's submodules with their paths, in the order of the forward pass.

    Attributes
    ----------
    embedding, norm, head
        ``(path, module)``, e.g. ``("vit.embeddings", ViTEmbeddings)``.
    layers
        The same, one an encoder layer.
    """

    def __init__(self, model: ViTForImageClassification) -> None:
        trunk = model.vit
        if hasattr(trunk, "encoder"):  # transformers 4.x
            prefix, layers = "vit.encoder.layer", trunk.encoder.layer
        else:
            prefix, layers = "vit.layers", trunk.layers
        self.embedding: Tuple[str, nn.Module] = ("vit.embeddings", trunk.embeddings)
        self.layers: List[Tuple[str, nn.Module]] = [
            (f"{prefix}.{index}", layer) for index, layer in enumerate(layers)
        ]
        self.norm: Tuple[str, nn.Module] = ("vit.layernorm", trunk.layernorm)
        self.head: Tuple[str, nn.Module] = ("classifier", model.classifier)


def layer_output(output: Any) -> Tensor:
    """Return the hidden states of an encoder layer's output, a tuple in 4.x and a tensor in 5.x."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def hidden_shape(config: ViTConfig) -> Tuple[int, int]:
    """Return tokens and width of the hidden states between two layers."""
    patches: int = (config.image_size // config.patch_size) ** 2
    return patches + 1, config.hidden_size


def build_vit(
    model: ModelSection,
    *,
    names: Sequence[str],
    image_size: int,
    layers_per_stage: Sequence[int],
    seed: int,
    prevalence: Optional[np.ndarray] = None,
    for_ipu: bool = False,
) -> ViTForImageClassification:
    """Build the model: random weights of a named size, a local folder's, or the hub's.

    Parameters
    ----------
    model
        The `model` section.
    names
        The label names, in the order of the logits.
    image_size
        Side of the images, pixels.
    layers_per_stage
        The cut; must place every layer.
    seed
        Seed of random weights and of a new head.
    prevalence
        float64 ``[C]``, the part of the training images with each label, for a new head's bias;
        None where no new head may be made (evaluation).
    for_ipu
        Build what PopTorch can run: attention in its plain form, and GELU in its tanh form, which
        is the one an IPU has; the model's config then says so.

    Raises
    ------
    ModelError
        If the weights cannot be had, are missing or unexpected, or are of another image size.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.name in SIZES:
            vit, head_is_new = _from_size(model, names, image_size, for_ipu), True
        else:
            vit, head_is_new = _from_pretrained(model, names, image_size, for_ipu)
    problem = depth_problem(list(layers_per_stage), vit.config.num_hidden_layers)
    if problem:
        raise ModelError(problem)
    if head_is_new:
        if prevalence is None:
            raise ModelError(
                f"{model.name} has no trained head for the labels {', '.join(names)};"
                " give the checkpoint of a finished run."
            )
        if model.head_bias == "prior":
            _start_at_prior(vit.classifier, prevalence)
    vit.config.architectures = ["ViTForImageClassification"]
    return vit.float()


def _settings(
    model: ModelSection, names: Sequence[str], for_ipu: bool, hidden_act: str
) -> Dict[str, Any]:
    """Settings that hold whatever the weights come from; `hidden_act` is what they were made with.

    On an IPU every GELU is the tanh form (poptorch.md, rule 9): to say so keeps the weights and
    what computes with them together wherever they go.
    """
    hidden_act = model.hidden_act or hidden_act
    if for_ipu and hidden_act == "gelu":
        logger.info("GELU in its tanh form, as the IPU computes it; the checkpoints will say so")
        hidden_act = "gelu_pytorch_tanh"
    return {
        **({"attn_implementation": "eager"} if for_ipu else {}),
        "hidden_act": hidden_act,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "multi_label_classification",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
    }


def _from_size(
    model: ModelSection, names: Sequence[str], image_size: int, for_ipu: bool
) -> ViTForImageClassification:
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
    return ViTForImageClassification(config)


def _from_pretrained(
    model: ModelSection, names: Sequence[str], image_size: int, for_ipu: bool
) -> Tuple[ViTForImageClassification, bool]:
    """Load weights; return the model and whether its head is new."""
    try:
        theirs = AutoConfig.from_pretrained(model.name)
        _check_kind(model, theirs, image_size)
        vit, info = ViTForImageClassification.from_pretrained(
            model.name,
            config=ViTConfig.from_pretrained(
                model.name, **_settings(model, names, for_ipu, theirs.hidden_act)
            ),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by us below, all at once
            use_safetensors=True,  # a pickle can run code
        )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(
            f"cannot load model.name={model.name!r}: {first_line} Give a folder with"
            " config.json and model.safetensors, a hub name this machine can reach, or a size:"
            f" {', '.join(SIZES)}."
        ) from error
    head_is_new = _check_weights(model.name, info)
    their_names = [str(name) for _, name in sorted(theirs.id2label.items())]
    if not head_is_new and their_names != list(names):
        logger.warning("%s has other labels (%s): its head is replaced", model.name, their_names)
        torch.nn.init.normal_(vit.classifier.weight, std=vit.config.initializer_range)
        torch.nn.init.zeros_(vit.classifier.bias)
        head_is_new = True
    return vit, head_is_new


def _check_kind(model: ModelSection, theirs: Any, image_size: int) -> None:
    if theirs.model_type != "vit":
        raise ModelError(
            f"model.name={model.name!r} is a {theirs.model_type!r} model; only 'vit' is known."
        )
    if theirs.image_size != image_size:
        raise ModelError(
            f"model.name={model.name!r} takes images of {theirs.image_size} pixels, but"
            f" data.image_size={image_size}. Set data.image_size={theirs.image_size}."
        )


def _check_weights(name: str, info: Dict[str, Any]) -> bool:
    """Refuse weights that do not fit but for the head's; return whether the head is new."""
    missing = _hub_names(info["missing_keys"])
    mismatched = _hub_names(
        key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]
    )
    unexpected = {key for key in _hub_names(info["unexpected_keys"]) if not _POOLER.match(key)}
    head = {key for key in missing | mismatched if key.startswith(_HEAD)}
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:10])}{', ...' if len(keys) > 10 else ''}"
        for what, keys in (
            ("missing", missing - head),
            ("unexpected", unexpected - {f"{_HEAD}weight", f"{_HEAD}bias"}),
            ("of another shape", mismatched - head),
        )
        if keys
    ]
    if problems:
        raise ModelError(
            f"the weights of {name} do not fit ViTForImageClassification: {'; '.join(problems)}."
            " Only the head (classifier.*) may be new."
        )
    if head:
        logger.info("%s: new head (%s)", name, ", ".join(sorted(head)))
    return bool(head)


def _hub_names(keys: Iterable[str]) -> Set[str]:
    return {hub_name(key) for key in keys}


def _start_at_prior(head: nn.Linear, prevalence: np.ndarray) -> None:
    """Make the head predict the prevalence: bias log-odds, weights a tenth of Hugging Face's.

    The first loss is then the prior's cross-entropy (0.164 on NIH) and not log 2 = 0.693, and the
    first steps need not be spent on learning that most findings are rare. Full weights would add
    up to 0.01 to it in a wide model; weights of zero would give the trunk no gradient at first, and
    AdamW then scales rounding noise up to whole steps.
    """
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.copy_(torch.from_numpy(np.log(prevalence / (1.0 - prevalence))))


def hub_files(config: ViTConfig, *, mean: float, std: float) -> Dict[str, str]:
    """Return config.json and preprocessor_config.json as transformers writes them.

    The latter by hand: 5.x writes it only where torchvision is installed, and both versions read
    these keys.
    """
    size = config.image_size
    preprocessor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [mean] * config.num_channels,
        "image_processor_type": "ViTImageProcessor",
        "image_std": [std] * config.num_channels,
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    return {
        "config.json": config.to_json_string(),
        "preprocessor_config.json": json.dumps(preprocessor, indent=2) + "\n",
    }
