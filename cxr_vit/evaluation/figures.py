"""Figures: ROC curves and a grid of images, drawn without a display.

TensorBoard shows an image in a card about 370 pixels wide and 220 high, and leaves out pixels to
scale it down. The figures for it have that shape, few things, and text of at least 7.5 points.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import List, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.records import UNKNOWN
from cxr_vit.evaluation.metrics import evaluate, scorable

_COLUMNS = 5
#: Inches and dots per inch of a figure for TensorBoard's card; the least size of its text, points.
_CARD = (4.0, 2.4)
_CARD_DPI = 200
_CARD_TEXT = 7.5
#: Curves that the legend of a card has room for; images side by side, and lines over an image.
_CARD_CURVES = 15
_CARD_COLUMNS = 4
_CARD_LINES = 2
#: Letters of the name of a label in a legend, and over an image.
_CURVE_LETTERS, _IMAGE_LETTERS = 26, 18
#: Labels whose curves are drawn; a figure of more takes long and cannot be read.
_MOST_CURVES = 40
#: Colours and styles of up to 20 curves.
_STYLES = [(f"C{color}", style) for style in ("-", "--") for color in range(10)]


def roc_figure(
    logits: Tensor, labels: Tensor, names: Sequence[str], *, title: str = "validation ROC"
) -> Figure:
    """Draw the ROC curve of each label from float32 ``[N, C]``, headed by its AUROC.

    Of more than 40 labels, those with the most positive images are drawn; the title says so.
    """
    if len(names) > _MOST_CURVES:
        title += f"; the {_MOST_CURVES} most frequent of {len(names)} labels"
        logits, labels, names = _most_frequent(logits, labels, names)
    scores, known = evaluate(logits, labels, names), scorable(logits, labels)
    rows = math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(2.5 * _COLUMNS, 2.6 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axis, name, (probs, truth) in zip(axes, names, known):
        auroc, positives = scores["auroc"][name], scores["positives"][name]
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        if auroc is not None:
            false_positives, true_positives, _ = binary_roc(probs, truth)
            axis.plot(false_positives.numpy(), true_positives.numpy(), linewidth=1.6)
        text = "undefined" if auroc is None else f"{auroc:.3f}"
        axis.set_title(f"{name}\n{text} ({positives} positive)", fontsize=9, parse_math=False)
        axis.set_aspect("equal")
        axis.set_xticks([0, 1])
        axis.set_yticks([0, 1])
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    return figure


def roc_overview(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Figure:
    """Draw the ROC curves of float32 ``[N, C]`` into one chart for TensorBoard's card.

    The legend has the AUROC of each label, the highest first. Of more than 40 labels, those with
    the most positive images are drawn.
    """
    macro = evaluate(logits, labels, names)["auroc_macro"]
    heading = "AUROC undefined" if macro is None else f"macro AUROC {macro:.3f}"
    if len(names) > _MOST_CURVES:
        heading += f"\n{_MOST_CURVES} most frequent of {len(names)}"
        logits, labels, names = _most_frequent(logits, labels, names)
    scores, known = evaluate(logits, labels, names), scorable(logits, labels)
    figure = Figure(figsize=_CARD, dpi=_CARD_DPI, layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
    defined = [name for name in names if scores["auroc"][name] is not None]
    by_score = sorted(defined, key=lambda name: -scores["auroc"][name])
    for name, (color, style) in zip(by_score, cycle(_STYLES)):
        false_positives, true_positives, _ = binary_roc(*known[list(names).index(name)])
        axis.plot(
            false_positives.numpy(),
            true_positives.numpy(),
            color=color,
            linestyle=style,
            linewidth=1,
            label=f"{scores['auroc'][name]:.2f} {_cut(name, _CURVE_LETTERS)}",
        )
    axis.set_box_aspect(1)
    axis.set_xticks([0, 1])
    axis.set_yticks([0, 1])
    axis.tick_params(labelsize=_CARD_TEXT)
    axis.set_xlabel("false positive rate", fontsize=_CARD_TEXT, labelpad=-6)
    axis.set_ylabel("true positive rate", fontsize=_CARD_TEXT, labelpad=-6)
    lines, texts = axis.get_legend_handles_labels()
    legend = figure.legend(
        lines[:_CARD_CURVES],
        texts[:_CARD_CURVES],
        loc="outside right center",
        title=heading,
        title_fontsize=_CARD_TEXT,
        fontsize=_CARD_TEXT,
        alignment="left",
        frameon=False,
        handlelength=1.2,
        labelspacing=0.05,
        borderpad=0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _most_frequent(
    logits: Tensor, labels: Tensor, names: Sequence[str]
) -> Tuple[Tensor, Tensor, List[str]]:
    """Return the columns of the labels with the most positive images, in their order."""
    counts = (labels == 1).sum(dim=0).numpy()
    columns = np.sort(np.argsort(-counts, kind="stable")[:_MOST_CURVES]).tolist()
    return logits[:, columns], labels[:, columns], [names[column] for column in columns]


def image_grid(
    dataset: ChestXrayDataset, names: Sequence[str], *, num_images: int = 8, seed: int = 0
) -> Figure:
    """Draw random images as the model sees them, each under its findings, for a card."""
    rows = np.random.default_rng(seed).permutation(len(dataset))[:num_images]
    lines = math.ceil(len(rows) / _CARD_COLUMNS)
    # Each image is square, under a heading.
    height = lines * (_CARD[0] / _CARD_COLUMNS + _CARD_LINES * 1.5 * _CARD_TEXT / 72)
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(figsize=(_CARD[0], height), dpi=_CARD_DPI, layout=layout)
    axes = figure.subplots(lines, _CARD_COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    batch = dataset.__getitems__(rows.tolist())
    for axis, image, labels in zip(axes, batch.images, batch.labels.tolist()):
        axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255)
        findings = [_cut(name, _IMAGE_LETTERS) for name, label in zip(names, labels) if label == 1]
        none = "none known" if UNKNOWN in labels else dataset.records.without_finding
        heading = "\n".join(_shortened(findings) or [none])
        axis.set_title(heading, fontsize=_CARD_TEXT, pad=2, parse_math=False)
    return figure


def _cut(name: str, letters: int) -> str:
    """Return the name of a label, or the beginning of a long one."""
    return name if len(name) <= letters else f"{name[: letters - 3]}..."


def _shortened(findings: Sequence[str]) -> List[str]:
    """Return the lines over an image: its findings, or the first ones and how many there are."""
    if len(findings) <= _CARD_LINES:
        return list(findings)
    shown = findings[: _CARD_LINES - 1]
    return [*shown, f"and {len(findings) - len(shown)} more"]
