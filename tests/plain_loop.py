"""Train with transformers and torch only, to compare the engines with; and unknown labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from conftest import module_of
from cxr_vit.config import BatchPlan, Config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.model.schedule import LearningRate
from cxr_vit.model.vit import hub_name

#: For the table that `write_unknown` writes, in the root of the data.
UNKNOWN = (
    "data.format=table",
    "data.csv=unknown.csv",
    "data.columns={image: image, patient: patient}",
    f"data.labels=[{', '.join(FINDINGS)}]",
)

#: Poolings and losses of published recipes; every engine computes them alike.
RECIPES = (
    ("model.pooling=mean", "loss.name=asymmetric", "model.head_std=1e-3"),
    ("model.pooling=both", "loss.name=weighted_bce"),
    ("loss.name=focal",),
)


def write_unknown(root: Path, table: Path) -> None:
    """Write the labels of a synthetic data set as a table, in which two of five are unknown."""
    with (root / "Data_Entry_2017_v2020.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random = np.random.RandomState(0)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient", *FINDINGS])
        for row in rows:
            found = row["Finding Labels"].split("|")
            cells = [str(int(name in found)) for name in FINDINGS]
            for column in np.flatnonzero(random.rand(len(cells)) < 0.4):
                cells[column] = random.choice(["", "-1"])
            writer.writerow([row["Image Index"], row["Patient ID"], *cells])


def masked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropies of the known labels one by one; divide by the number of all."""
    total = torch.zeros(())
    for sample in range(len(labels)):
        for column, label in enumerate(labels[sample].tolist()):
            assert label in (0.0, 1.0, -1.0)
            if label >= 0:
                sign = -1.0 if label else 1.0
                total = total + torch.logaddexp(sign * logits[sample, column], torch.zeros(()))
    return total / labels.numel()


class Result(NamedTuple):
    """Loss of each update; AdamW's mean gradients at the end, by name; norms of the gradients."""

    losses: Tensor
    gradients: Dict[str, Tensor]
    norms: Optional[Tensor] = None  # IPUs do not report them


def host_batches(config: Config, data: ChestXrayDataModule) -> TrainingSampler:
    """Return the rows of each host batch."""
    batch = BatchPlan.from_section(config.batch)
    return TrainingSampler(
        len(data.splits.train),
        global_batch_size=batch.global_batch_size,
        device_iterations=batch.device_iterations,
        seed=config.run.seed,
        start_step=0,
        total_steps=int(config.train.steps or 0),
    )


def _updates(config: Config, data: ChestXrayDataModule) -> Iterator[Any]:
    """Yield the rows of each update and the step whose learning rate it has."""
    batch, step = BatchPlan.from_section(config.batch), 0
    for rows in host_batches(config, data):
        for start in range(0, len(rows), batch.global_batch_size):
            yield rows[start : start + batch.global_batch_size], step
        step += batch.device_iterations


def plain_loop(config: Config, loss: Callable[[Tensor, Tensor], Tensor]) -> Result:
    """Make the updates of a configuration, each on its whole global batch at once."""
    data = ChestXrayDataModule(config)
    start = module_of(config, data).model
    model = ViTForImageClassification(ViTConfig(**start.config.to_dict()))
    weights = start.weights()
    model.load_state_dict({name: weights[hub_name(name)] for name in model.state_dict()})
    model.train()
    no_decay = [
        p for n, p in model.named_parameters() if p.dim() < 2 or "token" in n or "position" in n
    ]
    kept = {id(parameter) for parameter in no_decay}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) not in kept]},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
    )
    schedule = LearningRate.from_config(config, int(config.train.steps or 0))
    most = math.inf if config.optim.max_grad_norm is None else config.optim.max_grad_norm
    dataset: Any = data.dataset("train")
    losses, norms = [], []
    for rows, step in _updates(config, data):
        samples = [dataset[row] for row in rows]
        pixels = torch.stack([sample.image for sample in samples]).float() / 255
        pixels = ((pixels - 0.5) / 0.5).repeat(1, 3, 1, 1)
        labels = torch.stack([sample.labels for sample in samples])
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        optimizer.zero_grad()
        value = loss(model(pixel_values=pixels).logits, labels)
        value.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), most))
        optimizer.step()
        losses.append(value.detach())
    gradients = {
        hub_name(name): optimizer.state[parameter]["exp_avg"]
        for name, parameter in model.named_parameters()
    }
    return Result(torch.stack(losses), gradients, torch.stack(norms))


def assert_same_result(ours: Result, expected: Result, tolerance: float = 1e-6) -> None:
    """Compare losses, norms and gradients.

    The bias of a key adds the same to all scores of a query: its gradient is rounding errors.
    """
    assert len(ours.losses) == len(expected.losses) > 1
    assert float((ours.losses - expected.losses).abs().max()) <= tolerance, "losses"
    if ours.norms is not None:
        assert float((ours.norms - expected.norms).abs().max()) <= tolerance, "norms"
    assert ours.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        difference = float((ours.gradients[name] - value).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference:.2g}"
