"""Figures: ROC curves and a grid of images, drawn without a display."""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.evaluation.metrics import evaluate, probabilities

_COLUMNS = 5


def roc_figure(
    logits: Tensor, labels: Tensor, names: Sequence[str], *, title: str = "validation ROC"
) -> Figure:
    """Draw the ROC curve of each label from float32 ``[N, C]``, headed by its AUROC."""
    scores = evaluate(logits, labels, names)
    probs, truth = probabilities(logits), labels.to(torch.int64)
    rows = math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(2.5 * _COLUMNS, 2.6 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for column, (axis, name) in enumerate(zip(axes, names)):
        auroc, positives = scores["auroc"][name], scores["positives"][name]
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        if auroc is not None:
            false_positives, true_positives, _ = binary_roc(probs[:, column], truth[:, column])
            axis.plot(false_positives.numpy(), true_positives.numpy(), linewidth=1.6)
        text = "undefined" if auroc is None else f"{auroc:.3f}"
        axis.set_title(f"{name}\n{text} ({positives} positive)", fontsize=9)
        axis.set_aspect("equal")
        axis.set_xticks([0, 1])
        axis.set_yticks([0, 1])
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    return figure


def image_grid(
    dataset: ChestXrayDataset, names: Sequence[str], *, num_images: int = 15, seed: int = 0
) -> Figure:
    """Draw random images as the model sees them, each with its findings as heading."""
    rows = np.random.default_rng(seed).permutation(len(dataset))[:num_images]
    lines = math.ceil(len(rows) / _COLUMNS)
    figure = Figure(figsize=(2.5 * _COLUMNS, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    batch = dataset.__getitems__(rows.tolist())
    for axis, image, labels in zip(axes, batch.images, batch.labels.tolist()):
        axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255)
        findings = [name for name, label in zip(names, labels) if label]
        axis.set_title("\n".join(findings) or "No Finding", fontsize=8)
    return figure
