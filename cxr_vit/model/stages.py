"""The stages of the pipeline as modules, and the whole model with its weights by hub name.

A stage holds Hugging Face's own submodules at Hugging Face's own paths, so its parameters have the
names of the undivided model. PopTorch places stage i on IPU i, the pipeline engine on rank i, and
the torch engine calls the stages in order. All of them share one checkpoint format.
"""

from __future__ import annotations

import json
from functools import partial
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
)

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cxr_vit.config.plans import Kept, StagePlan
from cxr_vit.errors import CheckpointError
from cxr_vit.model.key_names import hub_name
from cxr_vit.model.normalisation import RESAMPLE, Normalisation, Normalise, PerChannel
from cxr_vit.model.vit import (
    Pool,
    VitParts,
    check_halves,
    layer_halves,
    layer_output,
    num_tokens,
    take_factors,
    tokens_read,
)

#: A piece of a stage: maps hidden states, and the factors of drop path, to hidden states.
Piece = Callable[[Tensor, Optional[Tensor]], Tensor]
#: Returns a function that computes the same, as torch.compile does.
Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class Stage(nn.Module):
    """Consecutive parts of a model.

    The first stage takes uint8 ``[B, 1, H, W]``, the last returns logits ``[B, C]``. Between
    stages, hidden states are ``[B, tokens, width]``. The submodules of the undivided model are
    shared, not copied.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: StagePlan,
        index: int,
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        parts = VitParts(model)
        #: Converts the tokens of the last layer to the input of the head.
        self.pool = parts.pool
        self.dtype = torch.float32  # of the hidden states; the weights may have another
        self.has_embedding = plan.has_embedding(index)
        self.has_head = plan.has_head(index)
        # In lists, which torch does not search: each module is registered once, at its own path.
        self._embedding: List[nn.Module] = []
        self._head: List[nn.Module] = []
        if self.has_embedding:
            self.normalise = Normalise(
                **normalisation._asdict(), num_channels=model.config.num_channels
            )
            self._embedding.append(_register(self, *parts.embedding))
        #: The encoder layers of this stage.
        self.layers = [
            take_factors(_register(self, *parts.layers[layer])) for layer in plan.layers(index)
        ]
        self._numbers = plan.layers(index)
        self._num_tokens, self._last_layer = num_tokens(model.config), len(parts.layers) - 1
        # In a tuple, as they may be of another stage.
        self._end = (parts.layers[-1][1], parts.norm[1])
        #: What a forward pass keeps of its layers for the backward pass; None: everything.
        self.kept: Optional[Kept] = None
        # Not bound to this stage: a copy of it would compute with the weights of this one.
        self._compute_stage: Callable[..., Tensor] = Stage._compute
        self._compute_layer: Callable[..., Tensor] = _compute_layer
        self._answers: List[Optional[int]] = []  # of `tokens_read`, at most one
        if self.has_head:
            self._head += [_register(self, *parts.norm), _register(self, *parts.head)]

    def forward(self, value: Tensor, paths: Optional[Tensor] = None) -> Tensor:
        """Map images or hidden states to hidden states or logits.

        `paths` are the factors on the branches of all layers, from `DropPath.factors`.
        """
        return self._compute_stage(self, value, paths, self._tokens())

    def computed(self, output: Tensor) -> Tensor:
        """Return an output of this stage without the padding of its last layer."""
        return output if self.has_head else output[:, : self._tokens()]

    def _tokens(self) -> Optional[int]:
        """Return how many tokens of the last layer are computed, if it or the head is in here.

        A compiled stage keeps the first answer: torch ignores hooks that come later, but would
        compile again for other tokens.
        """
        if not (self.has_head or self._last_layer in self._numbers):
            return None
        answers = self._answers or [tokens_read(self.pool, *self._end)]
        if (self._compute_stage, self._compute_layer) != (Stage._compute, _compute_layer):
            self._answers = answers
        return answers[0]

    def check_layers(self, *, with_factors: bool) -> None:
        """Raise ModelError if a layer cannot be run as it will be: in halves, or with factors."""
        halved = [] if self.kept is None else self.kept.attentions
        for number, layer in zip(self._numbers, self.layers):
            if with_factors or number in halved:
                check_halves(layer, with_factors=with_factors)

    def compile_with(self, compiler: Compiler, *, whole: bool) -> None:
        """Compile the whole forward pass, or the encoder layers alone, at their first use."""
        self._compute_stage = compiler(Stage._compute) if whole else Stage._compute
        self._compute_layer = _compute_layer if whole else compiler(_compute_layer)
        self._answers = []

    def _compute(self, value: Tensor, paths: Optional[Tensor], tokens: Optional[int]) -> Tensor:
        recomputes = self.kept is not None and torch.is_grad_enabled()
        parts = self._parts(tokens)
        for number, pieces in enumerate(parts):
            is_head = self.has_head and number == len(parts) - 1 and len(pieces) == 1
            if recomputes and not is_head:  # which keeps its input only
                value = checkpoint(_run, pieces, value, paths, use_reentrant=False)
            else:
                value = _run(pieces, value, paths)
        if tokens is None or self.has_head:
            return value
        # All hidden states between stages have one shape; the head reads no others.
        return F.pad(value, (0, 0, 0, self._num_tokens - tokens))

    def _parts(self, tokens: Optional[int]) -> List[List[Piece]]:
        """Return the pieces of the stage in order, in a list for each part between kept outputs.

        The last layer computes only the first `tokens`.
        """
        parts: List[List[Piece]] = [[self._embed] if self.has_embedding else []]
        kept = self.kept or Kept([], [])
        for number, layer in zip(self._numbers, self.layers):
            first, read = 2 * number, tokens if number == self._last_layer else None
            functions: List[Tuple[Any, Any, Any]] = [(layer, slice(first, first + 2), read)]
            if number in kept.attentions:  # then so is the output of the layer
                functions = list(zip(layer_halves(layer), (first, first + 1), (read, None)))
            for function in functions:
                parts[-1].append(partial(self._run_layer, *function))
                if number in kept.layers:
                    parts.append([])
        if self.has_head:
            parts[-1].append(partial(self._classify, tokens))
        return [part for part in parts if part]

    def _run_layer(
        self, function: Any, own: Any, tokens: Optional[int], value: Tensor, paths: Optional[Tensor]
    ) -> Tensor:
        """Run a layer, or a half of it, with its own columns of `paths`."""
        factors = None if paths is None else paths[:, own]
        return self._compute_layer(function, value, factors, tokens)

    def _embed(self, images: Tensor, paths: Optional[Tensor]) -> Tensor:
        (embedding,) = self._embedding
        pixels = self.normalise(images).to(self.dtype)
        # Tokens and position embeddings in fp32 promote the sum to fp32.
        hidden: Tensor = embedding(pixels).to(self.dtype)
        return hidden

    def _classify(self, tokens: Optional[int], hidden: Tensor, paths: Optional[Tensor]) -> Tensor:
        norm, classifier = self._head
        hidden = hidden if tokens is None else hidden[:, :tokens]
        logits: Tensor = classifier(self.pool(hidden, norm))
        return logits


def _run(pieces: List[Piece], value: Tensor, paths: Optional[Tensor]) -> Tensor:
    for piece in pieces:
        value = piece(value, paths)
    return value


def _compute_layer(
    function: Callable[..., Any], value: Tensor, factors: Optional[Tensor], tokens: Optional[int]
) -> Tensor:
    # Those that are None are left out: a user may have set layer.forward.
    named = {"factors": factors, "tokens": tokens}
    return layer_output(function(value, **{k: v for k, v in named.items() if v is not None}))


def _register(stage: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Register `module` in `stage` at a dotted path, creating empty modules in between."""
    *parents, name = path.split(".")
    parent = stage
    for part in parents:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(name, module)
    return module


class StagedViT(nn.Module):
    """A model as a list of stages, which share the submodules of the undivided model.

    `mean`, `std`, `resample` and `read_size`, the side to which they are resized if a part is cut
    out, are those of the images, and saved with the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: StagePlan,
        *,
        mean: PerChannel,
        std: PerChannel,
        resample: str = "bilinear",
        read_size: Optional[int] = None,
    ) -> None:
        super().__init__()
        self.config = model.config
        # In a tuple, so that its parameters are not registered a second time.
        self._undivided = (model,)
        self.dtype = torch.float32
        self.plan = plan
        self.normalisation = Normalisation(mean, std)
        self.resample, self.read_size = resample, read_size
        self._stages = tuple(
            Stage(model, plan, i, self.normalisation) for i in range(plan.num_stages)
        )
        self.stages = nn.ModuleList(self._stages)
        #: Stages whose weights this process has.
        self._local_stages = list(range(plan.num_stages))

    def forward(self, images: Tensor, paths: Optional[Tensor] = None) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to logits ``[B, C]``; `paths` are those of a stage."""
        value = images
        for stage in self.stages:
            value = stage(value, paths)
        return value

    @property
    def layers(self) -> List[nn.Module]:
        """The encoder layers of all stages, in order."""
        return [layer for stage in self._stages for layer in stage.layers]

    def stage(self, index: int) -> Stage:
        """Return one stage."""
        return self._stages[index]

    @property
    def pool(self) -> Pool:
        """What converts the tokens of the last layer to the input of the head."""
        return self._stages[-1].pool

    @property
    def attentions(self) -> List[nn.Module]:
        """The attention of each of `layers`; a layer adds its output, scaled, to its input."""
        return [layer.get_submodule("attention") for layer in self.layers]

    @property
    def hidden_shape(self) -> Tuple[int, int]:
        """Number of tokens and width of the hidden states between two stages."""
        return num_tokens(self.config), self.config.hidden_size

    def recompute(self, kept: Optional[List[Kept]]) -> StagedViT:
        """Compute again for the backward pass, in torch, all that is not kept; None: nothing."""
        for index, stage in enumerate(self._stages):
            stage.kept = None if kept is None else kept[index]
        return self

    def check_layers(self, *, with_factors: bool) -> None:
        """Raise ModelError if a layer, of any process, cannot be run as it will be."""
        for stage in self._stages:
            stage.check_layers(with_factors=with_factors)

    def compile_with(self, compiler: Compiler, *, whole: bool) -> None:
        """Compile each stage of this process, or its encoder layers alone, at their first use."""
        for index in self._local_stages:
            self._stages[index].compile_with(compiler, whole=whole)

    def keep(self, stages: Collection[int]) -> StagedViT:
        """Drop the weights of all other stages; their names and shapes remain."""
        self._local_stages = [index for index in self._local_stages if index in stages]
        for index, stage in enumerate(self.stages):
            if index not in self._local_stages:
                stage.to("meta")
        return self

    def to_device(self, device: torch.device) -> StagedViT:
        """Move the stages of this process to a device."""
        for index in self._local_stages:
            self.stages[index].to(device)
        return self

    def recut(self, plan: StagePlan) -> StagedViT:
        """Return a model with the same weights, shared, split by another plan."""
        other = StagedViT(
            self._undivided[0],
            plan,
            **self.normalisation._asdict(),
            resample=self.resample,
            read_size=self.read_size,
        )
        return other.compute_in(self.dtype)

    def compute_in(self, dtype: torch.dtype) -> StagedViT:
        """Set the dtype of the computation; the weights keep theirs."""
        self.dtype = dtype
        for stage in self._stages:
            stage.dtype = dtype
        return self

    def hub_parameters(self) -> Iterator[Tuple[str, nn.Parameter]]:
        """Yield the parameters of this process's stages with their hub names."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                yield _without_stage(name), parameter

    def persistent_buffers(self) -> List[str]:
        """Return the hub names of the buffers that torch counts as state."""
        state = self.state_dict().keys()
        return [_without_stage(name) for name, _ in self.named_buffers() if name in state]

    def weights(self) -> Dict[str, Tensor]:
        """Return copies of the weights of this process's stages: hub name -> fp32, on the CPU."""
        return {
            # PopTorch gives parameters a class of its own, which copies would keep.
            name: parameter.detach().as_subclass(Tensor).cpu().float().clone()
            for name, parameter in self.hub_parameters()
        }

    def normalised(self) -> Dict[str, List[float]]:
        """Return mean and standard deviation of the images, per channel, by their hub names."""
        mean, std = self.normalisation.of_channels(self.config.num_channels)
        return {"image_mean": mean, "image_std": std}

    def image_facts(self) -> Dict[str, Any]:
        """Return what the model is trained on of each image; a resumed run has the same."""
        return {"read_size": self.read_size, **self.normalised()}

    def hub_files(self) -> Dict[str, str]:
        """Return the files that `from_pretrained` needs beside the weights: name -> text.

        preprocessor_config.json is written by hand: transformers 5.x writes it only if torchvision
        is installed. 4.x and 5.x read these keys. ViTImageProcessor does not crop;
        BitImageProcessor, that of DINOv2, does.
        """
        size, normalised = self.config.image_size, self.normalised()
        preprocessor = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": normalised["image_mean"],
            "image_processor_type": "ViTImageProcessor",
            "image_std": normalised["image_std"],
            "resample": RESAMPLE[self.resample],
            "rescale_factor": 1 / 255,
            "size": {"height": size, "width": size},
        }
        if self.read_size not in (None, size):
            preprocessor.update(
                image_processor_type="BitImageProcessor",
                size={"height": self.read_size, "width": self.read_size},
                do_center_crop=True,
                crop_size={"height": size, "width": size},
            )
        return {
            "config.json": self.config.to_json_string(),
            "preprocessor_config.json": json.dumps(preprocessor, indent=2) + "\n",
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in by hub name; those of dropped stages are only checked.

        Raises CheckpointError if a weight is missing, unexpected or of another shape.
        """
        own = {_without_stage(name): parameter for name, parameter in self.named_parameters()}
        problems = [f"missing {name}" for name in own if name not in weights]
        problems += [f"unexpected {name}" for name in weights if name not in own]
        problems += [
            f"{name} is {list(weights[name].shape)}, the model's {list(parameter.shape)}"
            for name, parameter in own.items()
            if name in weights and weights[name].shape != parameter.shape
        ]
        if problems:
            raise CheckpointError(
                f"the weights are of another model: {'; '.join(problems[:5])}"
                f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}."
                " Use the configuration the checkpoint was trained with."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])


def _without_stage(name: str) -> str:
    """Convert ``stages.<i>.<path>`` to the hub name of the path."""
    return hub_name(name.split(".", 2)[2])
