# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: jupytext,kernelspec,-jupytext.text_representation
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From the CSV to scores
#
# This notebook goes from the CSV of NIH ChestX-ray14 to a table of scores: images and labels, the
# split, the model and its four stages, the batch, the plan of the pipeline, training, ROC curves.
# At the end it changes the cut and the batch by hand and shows what moves.
#
# It needs no GPU, no IPU, no network and no real images: it draws a synthetic sample. It takes
# about two minutes on two cores, and writes into `runs/notebook` below the current folder.
#
# **For research only. Not a medical device.**

# %%
ROOT = None  # folder of NIH's CSV and images, such as "/data/chest-xray-nihcc"; None: synthetic
IMAGES = 2000  # size of the synthetic sample; the length of the training is in proportion to it

# %%
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from IPython.display import Image, display
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as Pixels

sys.path += [str(Path.cwd()), str(Path.cwd().parent)]  # for a checkout that is not installed
warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, which is not used here

import cxr_vit
from cxr_vit.config import BatchPlan
from cxr_vit.evaluation.figures import roc_figure
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.figures import memory_figure, timeline_figure
from cxr_vit.planner.report import plan_lines

WORK = Path("runs", "notebook")
FIGURES = WORK / "figures"
FIGURES.mkdir(parents=True, exist_ok=True)


def png(figure, name):
    """Write a figure as PNG, and return the picture to display."""
    path = FIGURES / f"{name}.png"
    figure.savefig(path)
    return Image(filename=str(path))


# %% [markdown]
# ## 1. The configuration
#
# A configuration is one or more YAML files and overrides on top of them. `vit_demo` comes with the
# package: a ViT of four layers for images of 64 x 64 pixels. The overrides say where the data are
# and where to write, and halve the images per update, for more updates in few epochs. An unknown
# key, a wrong type or a broken rule is an error here, before anything runs.

# %%
if ROOT is None:
    root = WORK / f"sample_{IMAGES}"
    overrides = [f"data.root={root}", f"data.sample_images={IMAGES}"]
else:
    root = Path(ROOT)
    overrides = [f"data.root={root}", f"data.cache_dir={WORK / 'cache'}", "data.split=auto"]
overrides += [f"run.root={WORK}", "batch.gradient_accumulation=2"]

config = cxr_vit.load_config("vit_demo", overrides)
given = config.model_dump(exclude_unset=True)  # without the defaults
print(yaml.safe_dump(given, sort_keys=False, default_flow_style=None))

# %% [markdown]
# ## 2. The data
#
# `ChestXrayDataModule` reads the CSV, splits it, and decodes the images once into a cache. A
# synthetic sample is written first, in NIH's own layout. Not medical data: a program draws the
# shapes.

# %%
data = cxr_vit.ChestXrayDataModule(config)
data.setup()
print(data.describe())

table = data.records.table
display(table[["image", "patient", "findings", "age", "sex", "view"]].head())

# %% [markdown]
# Eight images from their files, under their findings. Radiologists drew boxes around some findings
# of the test images (`BBox_List_2017.csv`; the synthetic sample has such a file, too). Training
# does not use the boxes. They show what a label refers to.

# %%
FULL_SIZE = 1024  # pixels; boxes are in pixels of the images as NIH published them
files = {path.name: path for path in root.rglob("*.*")}


def read_image(row):
    """Return the image of a row of the CSV, uint8 [height, width]."""
    return np.asarray(Pixels.open(files[table["image"][row]]).convert("L"))


def findings_of(row):
    """Return the findings of an image as short lines."""
    return textwrap.fill(table["findings"][row].replace("|", ", "), 28)


def image_grid(rows, height=2.9, columns=4):
    """Draw images of the CSV under their findings; return the figure and its axes."""
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(10, height * lines), dpi=100, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, row in zip(axes, rows):
        axis.imshow(read_image(row), cmap="gray", vmin=0, vmax=255)
        axis.set_title(findings_of(row), fontsize=9)
    return figure, axes


def draw_boxes(axis, row):
    """Draw the boxes of an image, each with its finding."""
    scale = len(read_image(row)) / FULL_SIZE
    boxes = data.records.boxes
    for number, box in enumerate(boxes[boxes["row"] == row].itertuples()):
        x, y, width, height = (scale * side for side in (box.x, box.y, box.width, box.height))
        color = f"C{data.names.index(box.finding)}"
        axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=2))
        below = number % 2  # so that the names of two boxes do not overlap
        place = {"y": y + height, "va": "top"} if below else {"y": y, "va": "bottom"}
        back = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1}
        axis.text(x, s=box.finding, color="white", fontsize=8, bbox=back, **place)


rng = np.random.default_rng(0)
with_boxes = rng.permutation(data.records.boxes["row"].unique())
chosen = [*with_boxes[:6], *rng.permutation(data.splits.train)][:8]
figure, axes = image_grid(chosen)
for axis, row in zip(axes, chosen):
    draw_boxes(axis, row)
display(png(figure, "images"))

# %% [markdown]
# ### Labels are N-hot
#
# An image may have several findings, or none. Its label is 14 zeros and ones, one per finding;
# `No Finding` is 14 zeros. The table has an image per column. Each finding is a question of its
# own, so the model has a sigmoid per finding, and the loss is the binary cross entropy. A softmax
# would let the findings compete.

# %%
number = data.records.labels.sum(axis=1)
several = table[number > 1].drop_duplicates("findings").index[:4]
some = [*several, np.flatnonzero(number == 0)[0]]
texts = table["findings"][some].str.replace("|", ", ", regex=False)
n_hot = pd.DataFrame(data.records.labels[some].T, index=data.names, columns=texts)
display(n_hot.rename_axis(columns=None))

# %% [markdown]
# Findings are rare, some much more than others. "Never" would be the right answer to more than
# nine of ten questions, so accuracy says little. This project scores with the AUROC per finding:
# the probability that a positive image gets a higher score than a negative one. 0.5 is chance.

# %%
splits = {name: getattr(data.splits, name) for name in ("train", "val", "test")}
splits = {name: rows for name, rows in splits.items() if len(rows)}
shares = pd.DataFrame(
    {name: 100 * data.records.labels[rows].mean(axis=0) for name, rows in splits.items()},
    index=data.names,
).sort_values("train")

figure = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
axis = figure.subplots()
height = 0.8 / len(splits)
for place, name in enumerate(shares):
    middles = np.arange(len(shares)) + 0.4 - height * (place + 0.5)
    axis.barh(middles, shares[name], height, label=f"{name}: {len(splits[name]):,} images")
axis.set_yticks(range(len(shares)), shares.index)
axis.set_xlabel("images with the finding, %")
axis.legend(loc="lower right")
display(png(figure, "prevalence"))

# %% [markdown]
# ### Batches
#
# A loader yields host batches: images as bytes with one channel, labels as floats. Normalising and
# the copies to three channels are the model's first operations, on the device, so that a sixth of
# the bytes of an fp16 RGB image are sent.

# %%
batch = next(iter(data.train_dataloader()))
for name, tensor in zip(batch._fields, batch):
    print(f"{name:8} {tensor.dtype!s:14} {list(tensor.shape)}")

# %% [markdown]
# ## 3. The split, and what leaks otherwise
#
# Most patients with a finding have several images, which look alike and share findings. A split by
# image puts the same patient on both sides. The table compares it with a split by patient:
#
# - the share of the validation images whose patient is in training as well;
# - the AUROC of a guess **that looks at no image**: the mean of the training labels of the same
#   patient (and of all patients, if that one is not in training).


# %%
def patient_guess(data):
    """Guess the validation labels from the patients; return the guess and the shared images."""
    patients = data.records.table["patient"].to_numpy()
    train, val = data.splits.train, data.splits.val
    labels = pd.DataFrame(data.records.labels[train].astype(float))
    by_patient = labels.groupby(patients[train]).mean()
    guess = by_patient.reindex(patients[val]).fillna(labels.mean())
    return guess.to_numpy(), np.isin(patients[val], patients[train])


rows = {}
for kind in ("random", "patient"):
    other = cxr_vit.ChestXrayDataModule(
        cxr_vit.load_config("vit_demo", [*overrides, f"data.split={kind}"])
    )
    guess, shared = patient_guess(other)
    labels = torch.tensor(other.records.labels[other.splits.val])
    scores = cxr_vit.evaluate(torch.tensor(guess), labels, other.names)
    rows[f"data.split={kind}"] = {
        "validation images": len(labels),
        "patient in training, %": f"{100 * shared.mean():.1f}",
        "AUROC without looking": f"{scores['auroc_macro']:.3f}",
    }
leaks = pd.DataFrame.from_dict(rows, orient="index")
display(leaks)

# %% [markdown]
# With the random split, scores would reward a model for recognizing patients, and the log warns of
# it. Graphcore's tutorial for this data set splits at random; 84 % of its validation images share
# a patient with training. The configurations here use NIH's official lists, or a split by patient.

# %% [markdown]
# ## 4. The model and its four stages
#
# `pipeline.layers_per_stage` cuts the model. On IPUs each stage is on a chip of its own; here one
# process runs them in order. `ViTModule` builds the model when the trainer needs it; `setup` builds
# it now, to look at it.

# %%
module = cxr_vit.ViTModule(config, data)
module.setup()
model = module.model
print(*model.plan.describe(), sep="\n")

# %% [markdown]
# A batch goes through the stages one after another. Between two stages there are hidden states
# `[images, tokens, width]`; the last stage returns a logit per finding.

# %%
rows, value = [], batch.images
with torch.no_grad():
    for stage in model.stages:
        inputs, value = value, stage(value)
        parameters = sum(parameter.numel() for parameter in stage.parameters())
        rows.append([len(stage.layers), parameters, list(inputs.shape), list(value.shape)])
columns = ["encoder layers", "parameters", "input", "output"]
stages = pd.DataFrame(rows, columns=columns).rename_axis("stage")
display(stages)

prevalence = torch.tensor(data.prevalence(), dtype=torch.float32)
always = torch.logit(prevalence).expand_as(batch.labels)
print(f"loss before training:         {float(module.loss(value, batch.labels)):.3f}")
print(f"loss of the prevalence alone: {float(module.loss(always, batch.labels)):.3f}")

# %% [markdown]
# With `model.head_bias=prior` the bias of the head is the log-odds of the training prevalence. The
# first loss is then near that of a model that knows the prevalence and nothing else; with a bias of
# zero it would be near 0.69, and the first updates would learn that findings are rare.

# %% [markdown]
# ## 5. The batch
#
# A weight update is one step. It sums up several micro-batches, because a pipeline is only busy
# when several are under way. `BatchPlan` does the arithmetic, first for this run, then for the
# recipe for four IPUs, `vit_pod4`.

# %%
pod4 = cxr_vit.load_config("vit_pod4", ["planner.hardware=mk2"])
for name, section in (("vit_demo", config.batch), ("vit_pod4", pod4.batch)):
    print(name, *BatchPlan.from_section(section).describe(), "", sep="\n")

# %% [markdown]
# ## 6. The plan of a pipeline
#
# Before anything is compiled, the planner predicts memory and time of each IPU from the sizes of
# the model. The numbers below are predictions for ViT-B/16 on four Mk2 IPUs. They have not been
# compared with a run of this code on IPUs.

# %%
plan = make_plan(pod4)
print(*plan_lines(pod4, plan), sep="\n")

# %% [markdown]
# One weight update in time. Each row is an IPU, each block a micro-batch with its number. A cycle
# ends for all IPUs when the slowest is done. At the beginning the pipeline fills, at the end it
# drains: these cycles are the bubble.

# %%
display(png(timeline_figure(plan), "plan_timeline"))

# %% [markdown]
# The memory of each IPU by what needs it. Earlier stages hold more micro-batches at a time, the
# stash, because their backward pass comes later.

# %%
display(png(memory_figure(plan), "plan_memory"))

# %% [markdown]
# ## 7. Training, with a live curve
#
# A callback observes the run. Its hooks have Lightning's names. This one redraws a figure: on the
# left the loss of each weight update, on the right the AUROC of the validation images.


# %%
class LiveCurve(cxr_vit.Callback):
    """Redraw the loss and the validation's AUROC while the model trains."""

    def __init__(self, draws=15):
        self.draws = draws
        self.losses = []
        self.validations = []
        self.handle = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses += outputs.losses.tolist()
        every = max(1, trainer.estimated_stepping_batches // self.draws)
        if trainer.is_due(outputs.first_step, every):
            self.draw(trainer)

    def on_validation_end(self, trainer, module):
        metrics = trainer.callback_metrics
        point = trainer.global_step, metrics["val/loss"], metrics["val/auroc_macro"]
        self.validations.append(point)
        self.draw(trainer)

    def draw(self, trainer):
        figure = Figure(figsize=(10, 3.2), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = range(1, len(self.losses) + 1)
        left.plot(steps, self.losses, color="0.75", linewidth=0.8, label="training, each step")
        smooth = pd.Series(self.losses).ewm(span=20).mean()
        left.plot(steps, smooth, color="#0072B2", label="training, smoothed")
        if self.validations:
            at, loss, auroc = np.array(self.validations, dtype=float).T
            left.plot(at, loss, "o-", color="#D55E00", label="validation")
            right.plot(at, auroc, "o-", color="#D55E00")
        left.set_ylabel("loss")
        left.legend()
        right.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
        right.set_ylabel("validation, macro AUROC")
        right.set_ylim(0.4, 1.0)
        for axis in (left, right):
            axis.set_xlim(0, 1.02 * trainer.estimated_stepping_batches)
            axis.set_xlabel("step (weight update)")
        picture = png(figure, "training")
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)


# %% [markdown]
# The number of epochs follows from the number of images. The first line is the run's folder. Then
# come the data, the engine, the stages and the batch, and a line per 20 steps.

# %%
seen = IMAGES * (4 if ROOT is None else 20)  # training images, repetitions included
epochs = max(1, round(seen / len(data.splits.train)))
length = [f"train.epochs={epochs}", "train.eval_every_epochs=1"]
config = cxr_vit.load_config("vit_demo", [*overrides, *length])

curve = LiveCurve()
trainer = cxr_vit.Trainer(config, callbacks=[curve])
trainer.fit(module, data)

# %% [markdown]
# ## 8. Scores
#
# `test` scores each image of a split once, with the weights of the best checkpoint. `evaluate`
# gives the scores per finding from logits and labels.

# %%
split = data.default_split()
scores = trainer.test(module, data, ckpt_path="best", split=split)
outputs = trainer.test_outputs
report = cxr_vit.evaluate(outputs.logits, outputs.labels, module.names)
title = f"ROC on {split}, {len(outputs.labels):,} images, macro AUROC {report['auroc_macro']:.3f}"
display(png(roc_figure(outputs.logits, outputs.labels, module.names, title=title), "roc"))

# %%
findings = pd.DataFrame(
    {
        "positive images": report["positives"],
        "prevalence": {n: k / len(outputs.labels) for n, k in report["positives"].items()},
        "average precision": report["average_precision"],
        "AUROC": report["auroc"],
    }
).astype(float)
findings["positive images"] = findings["positive images"].astype(int)
display(findings.sort_values("AUROC", ascending=False).round(3))
print(f"macro AUROC on {split}: {report['auroc_macro']:.3f}")

# %% [markdown]
# Read each AUROC with its number of positive images: from ten of them, it may be off by a tenth. A
# finding without positives has no AUROC and is left out of the mean. On the synthetic sample the
# mean is far above chance after six epochs, and `vit_demo` as it is trains for 28. On real images
# a model this small, trained this briefly on 64 x 64 pixels, stays far below published scores.

# %% [markdown]
# ## 9. Single files
#
# `predict` reads image files (PNG, JPEG, DICOM) and returns a probability per finding. Four images
# of the scored split, with their findings above and the three highest probabilities below. Compare
# a probability with the finding's prevalence, in brackets, not with 0.5: the findings are rare.

# %%
rows = getattr(data.splits, split)
sick = rows[data.records.labels[rows].any(axis=1)]
chosen = rng.permutation(sick)[:4]
paths = [files[table["image"][row]] for row in chosen]
probabilities = trainer.predict(module, paths, ckpt_path="best")

figure, axes = image_grid(chosen, height=3.5)
for axis, path, chances in zip(axes, paths, probabilities):
    highest = [
        f"{chances[k]:.2f} ({prevalence[k]:.2f}) {module.names[k]}"
        for k in chances.argsort(descending=True)[:3].tolist()
    ]
    axis.set_xlabel("\n".join([path.name, *highest]), fontsize=9)
display(png(figure, "predictions"))

# %% [markdown]
# ## 10. Change the cut and the batch
#
# ### What must not move: the losses
#
# Where the model is cut, and into how many micro-batches a global batch is divided, changes where
# and when the work is done, not what is computed. The cell below trains the first steps in a loop
# written by hand, with other cuts and micro-batches, and compares each loss with the run above.


# %%
def train_by_hand(layers_per_stage, micro_batch, steps=8):
    """Train a new model for some steps; return the losses."""
    module = cxr_vit.ViTModule(
        config.changed(pipeline={"layers_per_stage": layers_per_stage}), data
    )
    module.setup()
    optimizer = module.configure_optimizers()
    losses = []
    for step, batch in zip(range(steps), data.train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = module.learning_rate(step, trainer.estimated_stepping_batches)
        pairs = list(zip(batch.images.split(micro_batch), batch.labels.split(micro_batch)))
        optimizer.zero_grad()
        losses.append(0.0)
        for images, labels in pairs:
            loss = module.loss(module(images), labels) / len(pairs)
            loss.backward()
            losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.max_grad_norm)
        optimizer.step()
    return np.array(losses)


rows = {}
for cut, micro_batch in (
    ([1, 1, 1, 1], 16),
    ([4], 16),
    ([0, 3, 1], 16),
    ([1, 1, 1, 1], 4),
    ([2, 2], 32),
):
    losses = train_by_hand(cut, micro_batch)
    difference = np.abs(losses - curve.losses[: len(losses)]).max()
    name = f"{cut}, {micro_batch} x {len(batch.images) // micro_batch}"
    rows[name] = [losses[0].round(5), losses[-1].round(5), f"{difference:.0e}"]
heads = ["first step", f"step {len(losses)}", "largest difference from the run"]
same = pd.DataFrame.from_dict(rows, orient="index", columns=heads)
display(same.rename_axis("layers per stage, micro-batch x accumulation"))

# %% [markdown]
# The losses agree to rounding: sums in another order differ in their last digits.
#
# ### What moves: memory, bubble and speed
#
# First the cut of ViT-B/16, with the batch of `vit_pod4`. The slowest stage sets the pace of all,
# and the fullest decides whether the model fits. The bubble stays: it depends on the number of
# stages and of micro-batches. The embedding and the head are small, so the even cut is best here.


# %%
def planned(*changes):
    """Plan the recipe for four IPUs with some changes."""
    base = ["planner.hardware=mk2", "pipeline.recompute=every_layer"]
    return make_plan(cxr_vit.load_config("vit_pod4", [*base, *changes]))


def summary(plan):
    """Return the figures of a plan that a cut or a batch changes."""
    return {
        "images/s": round(plan.samples_per_s),
        "bubble, %": round(100 * plan.bubble, 1),
        "slowest": f"IPU {plan.by_speed()[0].stage}",
        "fullest": f"IPU {plan.fullest.stage}",
        "of its memory, %": round(100 * plan.fullest.memory.share),
        "verdict": plan.fullest.memory.verdict,
    }


cuts = ([3, 3, 3, 3], [2, 3, 3, 4], [4, 3, 3, 2], [6, 2, 2, 2], [1, 1, 4, 6])
by_cut = {str(cut): planned(f"pipeline.layers_per_stage={cut}") for cut in cuts}
cut_table = pd.DataFrame({name: summary(plan) for name, plan in by_cut.items()}).T
display(cut_table.rename_axis("layers per stage"))

# %% [markdown]
# Then the batch, with the even cut. On the left, more micro-batches per update make the bubble
# smaller, whatever their size: four IPUs need 6 cycles to fill and 6 to drain. In the middle,
# larger micro-batches are faster per image, because each has a fixed overhead. On the right, they
# need more memory. The global batch is the product of both: it decides how many updates an epoch
# has.

# %%
accumulations = [8, 16, 32, 64, 128, 256]
figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
bubble, speed, memory = figure.subplots(1, 3)
for size, color in zip((1, 2, 4, 8), ("#0072B2", "#56B4E9", "#009E73", "#D55E00")):
    batches = [
        [f"batch.micro_batch_size={size}", f"batch.gradient_accumulation={count}"]
        for count in accumulations
    ]
    plans = [planned(*changes) for changes in batches]
    speed.plot(accumulations, [plan.samples_per_s for plan in plans], "o-", color=color)
    shares = [100 * stage.memory.share for stage in plans[-1].stages]
    memory.plot(range(4), shares, "o-", color=color, label=str(size))
bubble.plot(accumulations, [100 * plan.bubble for plan in plans], "o-", color="black")
memory.axhline(100, color="black", linewidth=1)
memory.set_xticks(range(4))
for axis, label, title in (
    (bubble, "accumulation", "bubble, % of an update"),
    (speed, "accumulation", "images/s, predicted"),
    (memory, "IPU", "memory, % of an IPU"),
):
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(bottom=0)
for axis in (bubble, speed):
    axis.set_xscale("log", base=2)
    axis.set_xticks(accumulations, accumulations)
figure.legend(title="micro-batch", loc="outside right upper")
display(png(figure, "batches"))

# %% [markdown]
# `python -m cxr_vit plan --config configs/vit_pod4.yaml --search` tries all cuts and batches.

# %% [markdown]
# ## 11. Where to look next

# %%
print(f"the run:          {trainer.run.path}")
print(f"the same curves:  tensorboard --logdir {WORK}")
print(f"score it again:   python -m cxr_vit evaluate --checkpoint {trainer.run.path}")
print(f"resume it longer: python -m cxr_vit train --resume {trainer.run.path} train.epochs=20")

# %% [markdown]
# - `docs/tutorials/extend.md`: your own callback, logger, loss and head.
# - `docs/data.md`: the real data, the splits and the cache.
# - `docs/batch.md`, `docs/pipeline.md`, `docs/planner.md`: what sections 5, 6 and 10 are about.
# - `docs/tutorials/pod4.md`: the recipe for four IPUs.
