"""Small models and their options."""

from __future__ import annotations

from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F

INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.rand(24, 3, generator=torch.Generator().manual_seed(2)).round()


class Net(torch.nn.Module):
    """Two layers, by default on two IPUs."""

    def __init__(self, poptorch: Any, ipus: Tuple[int, ...] = (0, 1), loss: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)
        for name, ipu in zip(("first", "second"), ipus):
            poptorch.BeginBlock(getattr(self, name), name, ipu_id=ipu)
        self.loss = loss or F.binary_cross_entropy_with_logits

    def forward(self, inputs: torch.Tensor, labels: Any = None) -> Any:
        logits = self.second(torch.tanh(self.first(inputs)))
        return logits if labels is None else (logits, self.loss(logits, labels))


def make_options(
    poptorch: Any, iterations: int = 1, accumulation: int = 3, replicas: int = 1, **calls: Any
) -> Any:
    options = poptorch.Options().deviceIterations(iterations).replicationFactor(replicas)
    options.Training.gradientAccumulation(accumulation)
    for name, value in calls.items():
        getattr(options, name)(value)
    return options


def make_training(poptorch: Any, model: Any = None, **options: Any) -> Any:
    model = Net(poptorch) if model is None else model
    optimizer = poptorch.optim.AdamW(model.parameters(), lr=0.1)
    return poptorch.trainingModel(model.train(), make_options(poptorch, **options), optimizer)


def device_weights(inspection: Any, executor: Any) -> Dict[str, torch.Tensor]:
    return dict(inspection.executable(executor).model.named_parameters())


class SmallViT(torch.nn.Module):
    """A patch embedding, a class token, three encoder layers and a head, on four IPUs."""

    def __init__(self, poptorch: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = torch.nn.Conv2d(1, 8, kernel_size=4, stride=4)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.positions = torch.nn.Parameter(torch.randn(1, 5, 8))
        self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
        self.head = torch.nn.Linear(8, 3)
        self.mark = (lambda loss: loss) if poptorch is None else poptorch.identity_loss
        if poptorch is not None:
            self.mark = lambda loss: poptorch.identity_loss(loss, reduction="none")
            for ipu, module in enumerate([self.patches, *self.layers]):
                poptorch.BeginBlock(module, f"block{ipu}", ipu_id=ipu)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.patches(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.token.expand(len(hidden), -1, -1), hidden], 1) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden[:, 0])
        return logits, self.mark(F.binary_cross_entropy_with_logits(logits.float(), labels))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        # No bias: the gradient of the keys' bias is rounding noise, which AdamW scales up.
        self.query, self.out = torch.nn.Linear(8, 24, bias=False), torch.nn.Linear(8, 8)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query(self.before(hidden)).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) / 8**0.5).softmax(-1)
        hidden = hidden + self.out(scores @ value)
        return hidden + self.mlp(self.after(hidden))
