"""Train the demo with PopART's AdamW, emulated with fp16 and fp32 numbers, to see which train.

    python -m benchmarks.ipu_fp16_optimizer [--updates N] [--seeds N] [--out FILE] [KEY=VALUE ...]

The update follows PopART 3.4 operation by operation (`adamdecompose.cpp`, `accumulatex.cpp`,
`adamupdaterx.cpp`, `adamvarupdatex.cpp`), as PopTorch's AdamW calls it. Every result that PopART
holds in fp16 is rounded to fp16, to nearest or stochastically; everything else is fp32. Forward
and backward pass round the outputs of all layers, their gradients and the weights' gradients.
Products and sums inside a layer are fp32. Overflow gives inf. Prints a table and writes a JSON
file.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from benchmarks.machine import describe_machine
from cxr_vit.cli import run
from cxr_vit.config import Config, read_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.evaluation.metrics import flat_scores
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.module import ViTModule
from cxr_vit.model.optim import is_decayed
from cxr_vit.model.schedule import LearningRate

Round = Callable[[Tensor], Tensor]

#: Random numbers that stochastic rounding takes from.
_POOL = 2**22

#: fp16's smallest positive number.
SMALLEST = 2.0**-24
#: A configuration's keys for the demo's model as IPUs compute it, in small micro-batches.
DEMO = (
    "data.image_size=32",
    "model.hidden_act=gelu_pytorch_tanh",
    "batch.micro_batch_size=8",
    "batch.gradient_accumulation=4",
)


class Precision(NamedTuple):
    """The choices of `optim` and `engine`; `arithmetic` is `engine.precision`."""

    weights: str = "fp32"
    accumulator: str = "fp32"
    first_moment: str = "fp32"
    second_moment: str = "fp32"
    loss_scaling: float = 1024.0
    stochastic_rounding: bool = True
    eps: float = 1e-8
    arithmetic: str = "fp16"


class Case(NamedTuple):
    """A row of the table."""

    name: str
    precision: Precision


_OPTIMUM = Precision("fp16", "fp16", "fp16")
_HALF_SQUARES = Precision(second_moment="fp16")
CASES = (
    Case("fp32 throughout", Precision(loss_scaling=1.0, arithmetic="fp32")),
    Case("PopTorch's defaults", Precision(loss_scaling=1.0, stochastic_rounding=False)),
    Case("fp32 weights and optimizer", Precision()),
    Case("vit_pod4.yaml", Precision(first_moment="fp16")),
    Case("", Precision(accumulator="fp16")),
    Case("", Precision(accumulator="fp16", first_moment="fp16")),
    Case("fp16 weights, fp32 optimizer", Precision("fp16")),
    Case("", Precision("fp16", stochastic_rounding=False)),
    Case("vit_pod4_fp16.yaml", Precision("fp16", first_moment="fp16")),
    Case("", Precision("fp16", "fp16")),
    Case("Graphcore's and optimum's", _OPTIMUM),
    Case("", _OPTIMUM._replace(loss_scaling=1.0)),
    Case("", _OPTIMUM._replace(stochastic_rounding=False)),
    *(Case("", _HALF_SQUARES._replace(eps=eps)) for eps in (1e-8, 1e-6, 1e-5, 1e-4, 1e-3)),
    Case("fp16 throughout", _OPTIMUM._replace(second_moment="fp16")),
)


class Rounding:
    """Round to a dtype by name: fp32 unchanged, fp16 to nearest or, as an IPU, stochastically.

    Stochastic rounding adds a random number to the 13 bits that fp16 has not, and cuts them off.
    The numbers come from a pool, at random offsets: drawing them all would take most of the time.
    """

    def __init__(self, generator: Optional[torch.Generator]) -> None:
        self.generator = generator
        if generator is not None:
            pool = torch.empty(_POOL, dtype=torch.int32)
            self.pool = pool.random_(0, 2**13, generator=generator)

    def __call__(self, dtype: str) -> Round:
        """Return the function that rounds to the dtype."""
        return self._to_fp16 if dtype == "fp16" else lambda value: value

    def _to_fp16(self, value: Tensor) -> Tensor:
        if self.generator is None:
            return value.half().float()
        # Below 2^-14 fp16's steps no longer shrink: shift those values to the first normal ones,
        # which have the same steps. (Comparisons would take most of the time.)
        is_normal = value.abs().clamp_(max=2.0**-14).mul_(2.0**14).floor_()
        shift = is_normal.sub_(1.0).mul_(2.0**-14).abs_().copysign_(value)
        bits = (value + shift).view(torch.int32)
        bits += self._noise(value.numel()).view(value.shape)
        bits &= -(2**13)
        return bits.view(torch.float32).sub_(shift).half().float()

    def _noise(self, count: int) -> Tensor:
        repeats = -(-count // (_POOL // 2))
        starts = torch.randint(_POOL // 2, (repeats,), generator=self.generator).tolist()
        pieces = [self.pool[start : start + _POOL // 2] for start in starts]
        return (pieces[0] if repeats == 1 else torch.cat(pieces))[:count]


class EmulatedAdamW:
    """PopART's AdamW over one flat vector of weights, with its operations in its order.

    Scaling and dtypes: the gradients are multiplied by the loss scaling, which is divided out in
    the accumulator's dtype (`gradUnscale`), or in fp32 if both moments are fp32 (`gradCast`). An
    fp16 accumulator is a running mean; an fp32 one is a sum, divided with the loss scaling.
    """

    def __init__(
        self,
        weights: Tensor,
        decay: Tensor,
        precision: Precision,
        rounding: Rounding,
        betas: Tuple[float, float],
    ) -> None:
        self.precision = precision
        self.rounding = rounding
        self.betas = betas
        self.decay = decay
        self.weights = weights.half().float() if precision.weights == "fp16" else weights.clone()
        self.accumulator = torch.zeros_like(weights)
        self.first = torch.zeros_like(weights)
        self.second = torch.zeros_like(weights)
        self.count = 0
        self.steps = 0

    def accumulate(self, gradient: Tensor) -> None:
        """Add the scaled gradient of one micro-batch."""
        if self.precision.accumulator == "fp16":
            part = 1.0 / (self.count + 1.0)
            mean = (1.0 - part) * self.accumulator + part * gradient
            self.accumulator = self.rounding("fp16")(mean)
        else:
            self.accumulator = self.accumulator + gradient
        self.count += 1

    def unscaled(self) -> Tensor:
        """Return the mean gradient, and empty the accumulator."""
        choice = self.precision
        is_mean = choice.accumulator == "fp16"
        is_cast = choice.first_moment == choice.second_moment == "fp32"
        factor = 1.0 / (choice.loss_scaling * (1 if is_mean else self.count))
        to = self.rounding("fp32" if is_cast else choice.accumulator)
        gradient = to(self.accumulator * factor)
        self.accumulator = torch.zeros_like(gradient)
        self.count = 0
        return gradient

    def update(self, lr: float) -> Tensor:
        """Change the weights; return what was multiplied by the learning rate."""
        gradient = self.unscaled()
        self.steps += 1
        beta1, beta2 = map(torch.tensor, self.betas)
        m = self.rounding(self.precision.first_moment)
        v = self.rounding(self.precision.second_moment)
        w = self.rounding(self.precision.weights)
        into = m(gradient)
        self.first = m(m(m(beta1) * self.first) + m(m(1.0 - beta1) * into))
        into = v(gradient)
        kept = v(beta2)
        self.second = v(v(kept * self.second) + v(v(v(1.0 - kept) * into) * into))
        mean = m(self.first / m(1.0 - beta1**self.steps))
        root = v(torch.sqrt(v(self.second / v(1.0 - beta2**self.steps))))
        step = v(v(mean) / v(root + v(torch.tensor(self.precision.eps))))
        step = w(w(step) + w(w(self.decay) * self.weights))
        self.weights = w(self.weights - lr * step)
        return step


class _Rounded(torch.autograd.Function):
    """Round a value in the forward pass and its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, to: Round) -> Tensor:
        ctx.to = to
        return to(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:  # type: ignore[override]
        return ctx.to(gradient), None


class Demo:
    """Images, labels and the configuration of the demo, shared by all cases."""

    def __init__(self, config: Config) -> None:
        self.config = config
        data = ChestXrayDataModule(config)
        self.names = data.names
        self.images, self.labels = _tensors(data, "train")
        self.test_images, self.test_labels = _tensors(data, "test")

    def train(self, precision: Precision, seed: int, updates: int, lr: float) -> Dict[str, Any]:
        """Train with one choice; return the loss of the last tenth, the AUROC and the overflow."""
        generator = torch.Generator().manual_seed(seed)
        rounding = Rounding(generator if precision.stochastic_rounding else None)
        module = ViTModule(self.config.changed(run={"seed": seed}))
        module.setup()
        model, optim, batch = module.model, self.config.optim, self.config.batch
        to = rounding(precision.arithmetic)
        for layer in model.modules():
            if precision.arithmetic == "fp16" and not list(layer.children()):
                layer.register_forward_hook(lambda _, __, out: _Rounded.apply(out, to))
        named = list(model.hub_parameters())
        shares = [optim.weight_decay if is_decayed(*pair) else 0.0 for pair in named]
        parameters = [parameter for _, parameter in named]
        decay = torch.cat([torch.full((p.numel(),), s) for p, s in zip(parameters, shares)])
        compute, gradient = _flatten(parameters)
        optimizer = EmulatedAdamW(
            compute, decay, precision, rounding, (optim.beta1, optim.beta2)
        )
        sampler = TrainingSampler(
            len(self.images),
            batch.micro_batch_size * batch.gradient_accumulation,
            device_iterations=1,
            seed=seed,
            start_step=0,
            total_steps=updates,
        )
        rates = LearningRate.from_section(self.config.schedule, peak=lr, total_steps=updates)
        losses: List[float] = []
        lost: List[float] = []
        for step, draws in enumerate(sampler):
            rows = torch.tensor(draws) % len(self.images)
            loss = 0.0
            for part in rows.split(batch.micro_batch_size):
                compute.copy_(to(optimizer.weights))
                gradient.zero_()
                value = multi_label_loss(model(self.images[part]), self.labels[part])
                (value * precision.loss_scaling).backward()
                optimizer.accumulate(to(gradient))
                loss += float(value.detach()) / batch.gradient_accumulation
            change = optimizer.update(rates.at(step))
            losses.append(loss)
            lost.append(float((~change.isfinite()).float().mean()))
            if not (math.isfinite(loss) and bool(optimizer.weights.isfinite().all())):
                break
        compute.copy_(optimizer.weights)
        tail = losses[-max(1, updates // 10) :]
        return {
            "loss": sum(tail) / len(tail),
            "auroc_macro": self.score(model),
            "updates": len(losses),
            "updates_not_finite": sum(share > 0 for share in lost),
            "largest_share_not_finite": max(lost),
        }

    def score(self, model: nn.Module) -> Optional[float]:
        """Return the macro AUROC of the test images."""
        with torch.no_grad():
            logits = torch.cat([model(images) for images in self.test_images.split(100)])
        if not bool(logits.isfinite().all()):
            return None
        return flat_scores(logits, self.test_labels, self.names)["auroc_macro"]


def _tensors(data: ChestXrayDataModule, split: str) -> Tuple[Tensor, Tensor]:
    dataset = data.dataset(split)
    batch = dataset.__getitems__(range(len(dataset)))
    return batch.images, batch.labels


def _flatten(parameters: Sequence[nn.Parameter]) -> Tuple[Tensor, Tensor]:
    """Make all parameters views of one vector, and their gradients of another; return both."""
    values = torch.cat([parameter.detach().flatten() for parameter in parameters])
    gradients = torch.zeros_like(values)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = values[start:end].view_as(parameter)
        parameter.grad = gradients[start:end].view_as(parameter)
        start = end
    return values, gradients


def main(argv: List[str]) -> int:
    """Train all cases, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=200, metavar="N")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--only", type=int, nargs="*", metavar="ROW", help="rows of the table")
    parser.add_argument("--lr", type=float, metavar="RATE", help="default: the demo's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    arguments, overrides = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    root = Path(__file__).resolve().parents[1]
    config = read_config([root / "configs" / "vit_demo.yaml"], [*DEMO, *overrides])
    demo = Demo(config)
    rows: List[Dict[str, Any]] = []
    for number, case in enumerate(CASES):
        if arguments.only and number not in arguments.only:
            continue
        for seed in range(arguments.seeds):
            import time
            start = time.time()
            found = demo.train(
                case.precision, seed, arguments.updates, arguments.lr or config.optim.lr
            )
            rows.append({"case": case.name, **case.precision._asdict(), "seed": seed, **found})
            print(number, case.name, tuple(case.precision), seed, found, f"{time.time()-start:.1f}s", flush=True)
    if arguments.out is not None:
        result = {**describe_machine("torch", "transformers"), "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
