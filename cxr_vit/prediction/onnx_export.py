"""A model with its preprocessing as an ONNX graph: gray images in, probabilities out."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_vit.data.views import VIEWS, View
from cxr_vit.errors import ModelError
from cxr_vit.model.module import ViTModule
from cxr_vit.prediction.onnx_model import INPUT, LARGEST_ONNX, OUTPUTS, optional_module

#: The first with LayerNormalization as one operator; torch 2.0.1 writes no later one.
_OPSET = 17
#: Room for the graph beside the weights, bytes.
_GRAPH_BYTES = 2**24


class Graph(nn.Module):
    """What is exported: the views of `evaluation.views`, normalised, scored and averaged."""

    def __init__(self, module: ViTModule) -> None:
        super().__init__()
        self.model, data = module.model, module.config.data
        self._views = VIEWS[module.config.evaluation.views]
        self._side, self._size = data.read_size, data.image_size

    def forward(self, images: Tensor) -> Any:
        """Map uint8 ``[B, 1, S, S]`` to probabilities and logits, float32 ``[B, C]``."""
        # As one batch: the graph has one copy of the model, however many views there are.
        logits = self.model(torch.cat([self._part(images, view) for view in self._views]))
        if len(self._views) == 1:
            return torch.sigmoid(logits), logits
        logits = logits.reshape(len(self._views), -1, logits.shape[1])
        # The logits of the mean, without a probability that rounds to 0 or 1.
        log_p, log_q = ((-F.softplus(sign * logits)).logsumexp(dim=0) for sign in (-1, 1))
        return torch.sigmoid(logits).mean(dim=0), log_p - log_q

    def _part(self, images: Tensor, view: View) -> Tensor:
        top, left = (int(place * (self._side - self._size)) for place in (view.y, view.x))
        whole = images.flip(3) if view.is_mirrored else images
        return whole[:, :, top : top + self._size, left : left + self._size]


def onnx_graph(module: ViTModule) -> Any:
    """Return a module that is set up as an `onnx.ModelProto`, which `onnx.checker` accepts.

    The number of images is free. Raises EngineUnavailable without onnx, and ModelError if the
    weights are larger than one file of ONNX can be.
    """
    onnx = optional_module("onnx")
    size = sum(weight.numel() * 4 for weight in module.parameters())
    if size > LARGEST_ONNX - _GRAPH_BYTES:
        raise ModelError(
            f"the weights have {size / 1e9:.1f} GB, and one ONNX file has at most 2. Export with"
            " --to hf."
        )
    graph, side = Graph(module).eval(), module.config.data.read_size
    example = torch.zeros(2, 1, side, side, dtype=torch.uint8)
    file, names = io.BytesIO(), [INPUT, *OUTPUTS]
    # The exporter of torch 2.0.1 is the only one there, and is still in today's torch.
    has_choice = "dynamo" in inspect.signature(torch.onnx.export).parameters
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            graph,
            (example,),
            file,  # type: ignore[arg-type]
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "batch"} for name in names},
            opset_version=_OPSET,
            **({"dynamo": False} if has_choice else {}),  # type: ignore[arg-type]
        )
    content = file.getvalue()
    onnx.checker.check_model(content, full_check=True)
    return onnx.load_model_from_string(content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter always says, which asks nothing of the user."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # 2.0.1: diagnostics
        # transformers asks for shapes, which are fixed but for the number of images.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript")
        warnings.filterwarnings("ignore", message="The feature will be removed")
        yield
