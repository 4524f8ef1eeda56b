"""The stages as modules, and the whole as one state dict under the hub's names.

A stage holds Hugging Face's own submodules under Hugging Face's own paths, so that its parameter
names are those of the uncut model: PopTorch wraps stage i in a block on IPU i, the pipeline engine
gives rank i stage i, the torch engine calls them in order, and all share one checkpoint.
"""

from __future__ import annotations

from typing import Collection, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from cxr_vit.config.plans import StagePlan
from cxr_vit.config.schema import Config
from cxr_vit.errors import CheckpointError
from cxr_vit.model.vit import VitParts, build_vit, hidden_shape, hub_files, hub_name, layer_output

__all__ = ["Normalise", "Stage", "StagedViT"]


class Normalise(nn.Module):
    """uint8 gray -> float with the given mean and deviation, copied to the model's channels.

    Runs on the device: a third of the pixels and a quarter of the bytes cross to it.
    """

    def __init__(self, *, mean: float, std: float, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        # (x / 255 - mean) / std as one multiplication and one addition. Plain numbers: a model in
        # fp16 would round buffers.
        self.scale = 1.0 / (255.0 * std)
        self.offset = -mean / std

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to float32 ``[B, num_channels, H, W]``."""
        pixels = images.float() * self.scale + self.offset
        return pixels.expand(-1, self.num_channels, -1, -1)


class Stage(nn.Module):
    """Consecutive parts of a ViT.

    The first stage takes uint8 ``[B, 1, H, W]``, the last gives logits ``[B, C]``; between them
    pass hidden states ``[B, tokens, width]``.

    Parameters
    ----------
    model
        The uncut model; its submodules are shared, not copied.
    plan
        The cut.
    index
        Which stage this is.
    mean, std
        Normalisation of the gray levels, of 0..1.

    Attributes
    ----------
    dtype
        What the hidden states are held in, whatever the weights are.
    """

    def __init__(
        self,
        model: ViTForImageClassification,
        plan: StagePlan,
        index: int,
        *,
        mean: float,
        std: float,
    ) -> None:
        super().__init__()
        whole = VitParts(model)
        self.dtype = torch.float32
        self.has_embedding = plan.has_embedding(index)
        self.has_head = plan.has_head(index)
        # Lists, not attributes: torch registers a module once, and that is at its own path.
        self._embedding: List[nn.Module] = []
        self._layers: List[nn.Module] = []
        self._head: List[nn.Module] = []
        if self.has_embedding:
            self.normalise = Normalise(mean=mean, std=std, num_channels=model.config.num_channels)
            self._embedding.append(_graft(self, *whole.embedding))
        for layer in plan.layers(index):
            self._layers.append(_graft(self, *whole.layers[layer]))
        if self.has_head:
            self._head += [_graft(self, *whole.norm), _graft(self, *whole.head)]

    @property
    def layers(self) -> List[nn.Module]:
        """The encoder layers of this stage."""
        return self._layers

    def forward(self, value: Tensor) -> Tensor:
        """Run this stage's parts on pixels or hidden states."""
        for embedding in self._embedding:
            pixels = self.normalise(value).to(self.dtype)
            # Class token and positions, where they are fp32, widen what they are added to.
            value = embedding(pixels).to(self.dtype)
        for layer in self._layers:
            value = layer_output(layer(value))
        if self._head:
            norm, classifier = self._head
            value = classifier(norm(value)[:, 0])
        return value


def _graft(stage: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Register `module` in `stage` under a dotted path, with empty modules in between."""
    *folders, name = path.split(".")
    place = stage
    for folder in folders:
        if not hasattr(place, folder):
            place.add_module(folder, nn.Module())
        place = getattr(place, folder)
    place.add_module(name, module)
    return module


class StagedViT(nn.Module):
    """A ViT as a list of stages.

    Parameters
    ----------
    model
        The uncut model; shared, not copied.
    plan
        The cut.
    mean, std
        Normalisation of the gray levels, of 0..1.
    """

    def __init__(
        self, model: ViTForImageClassification, plan: StagePlan, *, mean: float, std: float
    ) -> None:
        super().__init__()
        self.config = model.config
        self._whole = (model,)  # in a tuple: no second path to its parameters
        self.dtype = torch.float32
        self.plan = plan
        self.mean = mean
        self.std = std
        self._stages = tuple(
            Stage(model, plan, index, mean=mean, std=std) for index in range(plan.num_stages)
        )
        self.stages = nn.ModuleList(self._stages)
        self._held = list(range(plan.num_stages))

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        names: Sequence[str],
        prevalence: Optional[np.ndarray],
        for_ipu: bool = False,
    ) -> StagedViT:
        """Build the model of a configuration and cut it; see `build_vit`."""
        vit = build_vit(
            config.model,
            names=names,
            image_size=config.data.image_size,
            layers_per_stage=config.pipeline.layers_per_stage,
            seed=config.run.seed,
            prevalence=prevalence,
            for_ipu=for_ipu,
        )
        plan = StagePlan.from_list(config.pipeline.layers_per_stage)
        return cls(vit, plan, mean=config.model.image_mean, std=config.model.image_std)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to logits ``[B, C]``."""
        value = images
        for stage in self.stages:
            value = stage(value)
        return value

    @property
    def layers(self) -> List[nn.Module]:
        """The encoder layers of all stages, in order."""
        return [layer for stage in self._stages for layer in stage.layers]

    def stage(self, index: int) -> Stage:
        """Return one of the stages."""
        return self._stages[index]

    @property
    def hidden_shape(self) -> Tuple[int, int]:
        """Tokens and width of the hidden states between two stages."""
        return hidden_shape(self.config)

    def keep(self, stages: Collection[int]) -> StagedViT:
        """Let go of the weights of all other stages; their names and shapes stay known."""
        self._held = [index for index in self._held if index in stages]
        for index, stage in enumerate(self.stages):
            if index not in self._held:
                stage.to("meta")
        return self

    def place(self, device: torch.device) -> StagedViT:
        """Move the stages held here to a device."""
        for index in self._held:
            self.stages[index].to(device)
        return self

    def recut(self, plan: StagePlan) -> StagedViT:
        """Return the same parts, shared, cut otherwise."""
        other = StagedViT(self._whole[0], plan, mean=self.mean, std=self.std)
        return other.compute_in(self.dtype)

    def compute_in(self, dtype: torch.dtype) -> StagedViT:
        """Compute in `dtype`; the weights stay what they are, and are cast where they are used."""
        self.dtype = dtype
        for stage in self._stages:
            stage.dtype = dtype
        return self

    def hub_parameters(self) -> Iterator[Tuple[str, nn.Parameter]]:
        """Yield every parameter held here with the name it has in the hub's checkpoints."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                yield _uncut(name), parameter

    def weights(self) -> Dict[str, Tensor]:
        """Return copies of the weights held here on the CPU in fp32, by hub name."""
        return {
            # PopTorch's parameters have a class of their own, which copies would keep.
            name: parameter.detach().as_subclass(Tensor).cpu().float().clone()
            for name, parameter in self.hub_parameters()
        }

    def hub_files(self) -> Dict[str, str]:
        """Return the files that make a folder of the weights loadable by `from_pretrained`."""
        return hub_files(self.config, mean=self.mean, std=self.std)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in by hub name; those of stages let go of are only compared by shape.

        Raises
        ------
        CheckpointError
            If a weight is missing, unexpected or of another shape.
        """
        own = {_uncut(name): parameter for name, parameter in self.named_parameters()}
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


def _uncut(name: str) -> str:
    """Turn ``stages.<i>.<path>`` into the hub's name of the path."""
    return hub_name(name.split(".", 2)[2])
