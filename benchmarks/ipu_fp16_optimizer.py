"""Train the demo with PopART's AdamW, emulated with fp16 and fp32 numbers, to see which train.

    python -m benchmarks.ipu_fp16_optimizer [--updates N] [--seed N] [--out FILE]

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
from pathlib import Path
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
    Tuple,
)

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
    "model.pooling=class",
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
    """A row of the table; `lr` is the peak of the schedule."""

    name: str
    precision: Precision
    lr: float = 1e-3


_FP32 = Precision(loss_scaling=1.0, stochastic_rounding=False, arithmetic="fp32")
_FP16_WEIGHTS = Precision("fp16")
_OPTIMUM = Precision("fp16", "fp16", "fp16")
_FP16_SQUARES = Precision(second_moment="fp16")
CASES = (
    Case("fp32 throughout", _FP32),
    Case("PopTorch's defaults", Precision(loss_scaling=1.0, stochastic_rounding=False)),
    Case("vit_pod4.yaml", Precision(first_moment="fp16")),
    Case("", Precision(accumulator="fp16")),
    Case("", Precision("fp32", "fp16", "fp16")),
    Case("", _FP16_WEIGHTS),
    Case("", _FP16_WEIGHTS._replace(stochastic_rounding=False)),
    Case("", _FP16_WEIGHTS._replace(first_moment="fp16")),
    Case("vit_pod4_fp16.yaml, Graphcore's ViT", _FP16_WEIGHTS._replace(accumulator="fp16")),
    Case("optimum-graphcore", _OPTIMUM),
    Case("", _OPTIMUM._replace(loss_scaling=1.0)),
    Case("", _OPTIMUM._replace(stochastic_rounding=False)),
    *(Case("", _FP16_SQUARES._replace(eps=10.0**-n)) for n in (8, 6, 5, 4, 3)),
    *(Case("", Precision(eps=10.0**-n)) for n in (4, 3)),
    Case("fp16 throughout", _OPTIMUM._replace(second_moment="fp16")),
    Case("fp16 throughout", _OPTIMUM._replace(second_moment="fp16", eps=1e-4)),
    Case("fp32 throughout", _FP32, 1e-4),
    Case("vit_pod4.yaml", Precision(first_moment="fp16"), 1e-4),
    Case("", _FP16_WEIGHTS, 1e-4),
    Case("", _FP16_WEIGHTS._replace(stochastic_rounding=False), 1e-4),
    Case("optimum-graphcore", _OPTIMUM, 1e-4),
)
#: Of 128 micro-batches of one image.
ACCUMULATIONS = {
    "fp32 accumulator, fp16 first moment": Precision(first_moment="fp16"),
    "fp16 accumulator": Precision(accumulator="fp16"),
    "fp16 accumulator, to nearest": Precision(accumulator="fp16", stochastic_rounding=False),
    "fp16 accumulator and first moment": Precision("fp32", "fp16", "fp16"),
    "fp16 accumulator and first moment, to nearest": Precision(
        "fp32", "fp16", "fp16", stochastic_rounding=False
    ),
}
HEADER = (
    "| | weights | accumulator | moments | loss scaling | rounding | eps | lr | loss | AUROC |"
    " inf or NaN | trains |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
#: How much lower than in fp32 the AUROC may be: of what trains, and of what trains worse.
AS_GOOD, WORSE = 0.01, 0.1


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

    def train(self, case: Case, seed: int, updates: int) -> Dict[str, Any]:
        """Train with one choice; return the loss of the last tenth, the AUROC and the overflow."""
        precision, batch = case.precision, self.config.batch
        generator = torch.Generator().manual_seed(seed)
        rounding = Rounding(generator if precision.stochastic_rounding else None)
        to = rounding(precision.arithmetic)
        module = ViTModule(self.config.changed(run={"seed": seed}))
        module.setup()
        if precision.arithmetic == "fp16":
            _round_layers(module.model, to)
        compute, gradient, optimizer = self._optimizer(module, precision, rounding)
        losses: List[float] = []
        unusable: List[float] = []
        config = self.config.changed(optim={"lr": case.lr})
        rates = LearningRate.from_config(config, updates)
        for step, rows in enumerate(self._rows(seed, updates)):
            losses.append(0.0)
            for part in rows.split(batch.micro_batch_size):
                compute.copy_(to(optimizer.weights))
                gradient.zero_()
                loss = multi_label_loss(module.model(self.images[part]), self.labels[part])
                (loss * precision.loss_scaling).backward()
                optimizer.accumulate(to(gradient))
                losses[-1] += float(loss.detach()) / batch.gradient_accumulation
            change = optimizer.update(rates.at(step))
            unusable.append(float((~change.isfinite()).float().mean()))
            if not bool(optimizer.weights.isfinite().all()):
                break
        compute.copy_(optimizer.weights)
        tail = losses[-max(1, updates // 10) :]
        return {
            "updates": len(losses),
            "loss": sum(tail) / len(tail),
            "auroc_macro": self.score(module.model),
            "not_finite": max(unusable),
        }

    def _optimizer(
        self, module: ViTModule, precision: Precision, rounding: Rounding
    ) -> Tuple[Tensor, Tensor, EmulatedAdamW]:
        """Return the vectors that forward and backward pass use, and the optimizer."""
        optim = self.config.optim
        named = list(module.model.hub_parameters())
        decay = torch.cat(
            [
                torch.full((weight.numel(),), optim.weight_decay * is_decayed(name, weight))
                for name, weight in named
            ]
        )
        compute, gradient = _flatten([weight for _, weight in named])
        betas = (optim.beta1, optim.beta2)
        return compute, gradient, EmulatedAdamW(compute, decay, precision, rounding, betas)

    def _rows(self, seed: int, updates: int) -> Iterator[Tensor]:
        """Yield the rows of each update, in the order of a run."""
        batch = self.config.batch
        size = batch.micro_batch_size * batch.gradient_accumulation
        for draws in TrainingSampler(len(self.images), size, 1, seed, 0, updates):
            yield torch.tensor(draws) % len(self.images)

    def accumulation(self, precision: Precision, count: int = 128) -> Dict[str, float]:
        """Accumulate one gradient from micro-batches of one; compare with fp32's sum.

        Returns the relative error and the shares of the mean gradient that became 0 before the
        second and in the first moment.
        """
        module = ViTModule(self.config.changed(run={"seed": 0}))
        module.setup()
        generator = torch.Generator().manual_seed(0)
        rounding = Rounding(generator if precision.stochastic_rounding else None)
        _, gradient, optimizer = self._optimizer(module, precision, rounding)
        total = torch.zeros_like(gradient)
        for row in range(count):
            gradient.zero_()
            rows = slice(row, row + 1)
            loss = multi_label_loss(module.model(self.images[rows]), self.labels[rows])
            (loss * precision.loss_scaling).backward()
            half = gradient.half().float()
            total += half
            optimizer.accumulate(half)
        expected = total / (count * precision.loss_scaling)
        found = optimizer.unscaled()
        first = optimizer.rounding(precision.first_moment)(0.1 * found)
        there = expected != 0
        return {
            "relative_error": float((found - expected).norm() / expected.norm()),
            "unscaled_to_0": float((found[there] == 0).float().mean()),
            "first_moment_0": float((first[there] == 0).float().mean()),
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


def _round_layers(model: nn.Module, to: Round) -> None:
    """Round the outputs of all layers without layers of their own, and their gradients."""

    def rounded(layer: nn.Module, inputs: Any, output: Tensor) -> Any:
        return _Rounded.apply(output, to)

    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(rounded)


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


def verdict(row: Mapping[str, Any], reference: float) -> str:
    """Say whether a choice trains, by its AUROC and that of fp32 at the same learning rate."""
    auroc = row["auroc_macro"]
    if auroc is None:
        return f"no: NaN in update {row['updates']}"
    if auroc < reference - WORSE:
        return "no"
    return "yes" if auroc >= reference - AS_GOOD else "worse"


def table_row(row: Mapping[str, Any]) -> str:
    """Format a row of the JSON file as one of the Markdown table in docs/precision.md."""
    rounding = "stochastic" if row["stochastic_rounding"] else "nearest"
    auroc = row["auroc_macro"]
    cells = [
        row["case"],
        row["weights"],
        row["accumulator"],
        f"{row['first_moment']}, {row['second_moment']}",
        f"{row['loss_scaling']:g}",
        rounding if row["arithmetic"] == "fp16" else "-",
        *(f"{row[key]:.0e}".replace("e-0", "e-") for key in ("eps", "lr")),
        f"{row['loss']:.4f}",
        "-" if auroc is None else f"{auroc:.3f}",
        f"{100 * row['not_finite']:.3g} %",
        row["verdict"],
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: List[str]) -> int:
    """Train all cases, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = read_config([Path(__file__).resolve().parents[1] / "configs/vit_demo.yaml"], DEMO)
    demo = Demo(config)
    print(HEADER)
    rows: List[Dict[str, Any]] = []
    references: Dict[float, float] = {}
    for case in CASES:
        found = demo.train(case, arguments.seed, arguments.updates)
        reference = references.setdefault(case.lr, found["auroc_macro"])
        found["verdict"] = verdict(found, reference)
        rows.append({"case": case.name, **case.precision._asdict(), "lr": case.lr, **found})
        print(table_row(rows[-1]), flush=True)
    sums = {}
    for name, precision in ACCUMULATIONS.items():
        sums[name] = demo.accumulation(precision)
        print(name, ", ".join(f"{key} {value:.2g}" for key, value in sums[name].items()))
    if arguments.out is not None:
        result = {**describe_machine("torch", "transformers"), "rows": rows, "accumulation": sums}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
