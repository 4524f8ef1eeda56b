"""Rules that involve several sections, and rules for the number of processes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Iterator, Optional, Sequence

from cxr_vit.config.architectures import SIZES, known_architecture, known_depth
from cxr_vit.config.columns import repeated_name
from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.fields import LARGEST_IMAGE, SMALLEST_IMAGE
from cxr_vit.config.help import one_line
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.plans import (
    REST,
    BatchPlan,
    StagePlan,
    empty_stage_problem,
    fill_rest,
    given_accumulation,
)
from cxr_vit.config.schema import Config, LossSection, PipelineSection
from cxr_vit.errors import ConfigError, Problem, suggestion

_NEEDED = {
    "csv": "the file of the labels",
    "columns": "the names of its columns, e.g. {image: path, patient: patient_id}",
    "labels": "a list of labels, or a pattern that matches their columns",
}
#: Keys of the data that only a table has, and only NIH's CSV: what to do instead.
_TABLE_ONLY = (
    "join", "columns", "labels", "label_separator", "uncertain", "blank", "repeated_images",
)  # fmt: skip
_NIH_ONLY = {
    "include_no_finding": "List 'No Finding' in data.labels, if the table has it.",
    "boxes": "Leave it out.",
    "relabels": "Leave it out; configs/data/google2019.yaml has these labels as a table.",
    "sample_images": "Leave it out: the sample is in NIH's format.",
}


def check(config: Config) -> Config:
    """Return the configuration with every -1 in its cuts filled in.

    Raises ConfigError with every broken rule.
    """
    config = _filled(config)
    problems = [
        *_model_problems(config),
        *_recompute_problems(config.pipeline),
        *_engine_problems(config),
        *_optimizer_problems(config),
        *_schedule_problems(config),
        *_loss_problems(config.loss),
        *_data_problems(config.data),
        *_augment_problems(config),
        *_multiple_problems(config),
    ]
    if config.engine.name == "poptorch" and not problems:  # its rules presuppose the others
        # poprun may divide the replicas among processes: how many each has is known at the start.
        problems = ipu_problems(config, replicas=1)
    if problems:
        raise ConfigError("\n".join(one_line(str(problem)) for problem in problems))
    return config


def _filled(config: Config) -> Config:
    """Replace -1 in the lists of layers, which needs the model's depth."""
    given = {
        key: layers
        for key in ("layers_per_stage", "eval_layers_per_stage")
        for layers in [getattr(config.pipeline, key)]
        if layers and REST in layers
    }
    if not given:
        return config
    depth = known_depth(config.model.name)
    if depth is None:
        key, layers = next(iter(given.items()))
        raise ConfigError(
            f"pipeline.{key}={layers}: model.name={config.model.name!r} does not imply how many"
            " layers are left. Write the numbers."
        )
    filled = {key: fill_rest(layers, depth) for key, layers in given.items()}
    return config.changed(pipeline=filled)


def depth_problem(layers_per_stage: Sequence[int], depth: int) -> Optional[Problem]:
    """Return the problem of stages that do not add up to the model's layers, or None."""
    placed = sum(layers_per_stage)
    if placed == depth:
        return None
    return Problem(
        f"pipeline.layers_per_stage={list(layers_per_stage)}",
        f"places {placed} layers; the model has {depth}.",
        f"Make the list add up to {depth}.",
    )


def image_size_problem(image_size: int, patch_size: int, patches: str) -> Optional[Problem]:
    """Return the problem of images that are not whole patches, or None; `patches` names them."""
    if image_size % patch_size == 0:
        return None
    legal = _nearest_multiples(image_size, patch_size, lowest=SMALLEST_IMAGE, highest=LARGEST_IMAGE)
    return Problem(
        f"data.image_size={image_size}",
        f"is not a multiple of {patches}.",
        f"Nearest legal image sizes: {legal}.",
    )


def _model_problems(config: Config) -> Iterator[Problem]:
    name, depth = config.model.name, known_depth(config.model.name)
    layers, eval_layers = config.pipeline.layers_per_stage, config.pipeline.eval_layers_per_stage
    if not (name in SIZES or "/" in name or Path(name).exists()):
        yield Problem(
            f"model.name={name!r}",
            "is no known size, no local folder and no hub name (owner/model)."
            + suggestion(name, SIZES),
            f"Sizes: {', '.join(SIZES)}.",
        )
    revision = config.model.revision
    if revision is not None and (name in SIZES or Path(name).exists()):
        yield Problem(
            f"model.revision={revision}",
            f"is for a hub name; model.name={name} is a {'size' if name in SIZES else 'folder'}.",
            "Leave it out.",
        )
    problem = depth_problem(layers, depth) if depth is not None else None
    if problem:
        yield problem
    freeze, depth = config.model.freeze, depth or sum(layers)
    if isinstance(freeze, int) and freeze > depth:
        yield Problem(
            f"model.freeze={freeze}",
            f"freezes {freeze} layers; the model has {depth}.",
            f"Set {depth} or fewer, or trunk for all but the head.",
        )
    if eval_layers is not None and sum(eval_layers) != sum(layers):
        yield Problem(
            f"pipeline.eval_layers_per_stage={eval_layers}",
            f"places {sum(eval_layers)} layers, pipeline.layers_per_stage={layers} {sum(layers)}.",
            "Make both add up to the same number.",
        )


def _recompute_problems(pipeline: PipelineSection) -> Iterator[Problem]:
    recompute, plan = pipeline.recompute, StagePlan.from_list(pipeline.layers_per_stage)
    if recompute is None or isinstance(recompute, str):
        return
    if len(recompute) != plan.num_stages:
        yield Problem(
            f"pipeline.recompute={recompute}",
            f"has {len(recompute)} items; there are {plan.num_stages} stages.",
            "Give one item per stage, or a single word for all.",
        )
        return
    for stage, choice in enumerate(recompute):
        there = list(plan.layers(stage))
        if not isinstance(choice, str) and not set(choice) <= set(there):
            yield Problem(
                f"pipeline.recompute={recompute}:",
                f"item {stage} names layers {choice}, but stage {stage} has the layers {there}.",
            )
            return


def _engine_problems(config: Config) -> Iterator[Problem]:
    engine = config.engine.name
    if config.optim.name == "lamb" and engine in ("torch", "pipeline"):
        yield Problem(
            "optim.name=lamb",
            f"needs PopTorch; engine.name={engine} has adamw and sgd.",
            "Set optim.name, or engine.name=poptorch.",
        )
    empty = empty_stage_problem(config.pipeline.layers_per_stage)
    if engine == "pipeline" and empty:
        yield empty


def _optimizer_problems(config: Config) -> Iterator[Problem]:
    """Yield settings of another optimizer, which would be ignored."""
    optim = config.optim
    default = type(optim).model_fields
    for key, name in (
        ("bias_correction", "lamb"),
        ("max_weight_norm", "lamb"),
        ("use_combined_accum", "sgd"),
        ("nesterov", "sgd"),
    ):
        value = getattr(optim, key)
        if value == default[key].default or optim.name == name:
            continue
        rule = f"is for {name}."
        if key == "bias_correction" and optim.name == "adamw":
            rule = (
                "is for lamb: torch's AdamW always corrects it, and PopTorch's corrects it whatever"
                " it is passed (CompilerImpl.cpp, getPopartOptimizer)."
            )
        given = str(value).lower() if isinstance(value, bool) else value
        yield Problem(
            f"optim.{key}={given} with optim.name={optim.name}",
            rule,
            advice=f"Leave it out, or set optim.name={name}.",
        )
    if optim.nesterov and optim.name == "sgd" and not optim.momentum:
        yield Problem(
            "optim.nesterov=true with optim.momentum=0:",
            "there is no momentum to have its form.",
            "Set optim.momentum, 0.9 for example, or leave optim.nesterov out.",
        )


def _schedule_problems(config: Config) -> Iterator[Problem]:
    schedule, peak = config.schedule, config.peak_lr
    if schedule.min_lr and schedule.name == "constant":
        yield Problem(
            f"schedule.min_lr={schedule.min_lr:g} with schedule.name=constant:",
            "the rate never falls.",
            "Leave it out, or set schedule.name=cosine or linear.",
        )
    elif schedule.min_lr >= peak:
        given = "optim.lr" if config.optim.lr is not None else "optim.base_lr"
        yield Problem(
            f"schedule.min_lr={schedule.min_lr:g}",
            f"is not below the peak rate, {peak:g}.",
            f"Lower it, or raise {given}.",
        )
    if schedule.warmup_epochs is not None and config.train.epochs is None:
        yield Problem(
            f"schedule.warmup_epochs={schedule.warmup_epochs:g}",
            f"needs train.epochs, and train.steps={config.train.steps} is given.",
            "Set schedule.warmup_steps or schedule.warmup_ratio, or train.epochs.",
        )
    for unit in ("epochs", "steps"):
        warmup, length = getattr(schedule, f"warmup_{unit}"), getattr(config.train, unit)
        if warmup is not None and length is not None and warmup >= length:
            yield Problem(
                f"schedule.warmup_{unit}={warmup:g}",
                f"is not below train.{unit}={length:g}: the rate would not reach its peak.",
                f"Lower it, or raise train.{unit}.",
            )


#: Key of the loss -> the loss it is for, and its smallest value above 0.
_LOSS_KEYS = {
    "max_positive_weight": ("weighted_bce", 1.0),
    "gamma": ("focal", 1.0),
    "negative_gamma": ("asymmetric", 1.0),
    "positive_gamma": ("asymmetric", 1.0),
    "clip": ("asymmetric", 1e-6),
}


def _loss_problems(loss: LossSection) -> Iterator[Problem]:
    """Yield settings of another loss, which would be ignored, and those without a finite slope."""
    for key, (name, least) in _LOSS_KEYS.items():
        value = getattr(loss, key)
        if value != type(loss).model_fields[key].default and loss.name != name:
            advice = f"Leave it out, or set loss.name={name}."
            yield Problem(
                f"loss.{key}={value} with loss.name={loss.name}", f"is for {name}.", advice=advice
            )
        elif 0 < value < least:
            yield Problem(
                f"loss.{key}={value}",
                f"is between 0 and {least:g}, where gradients are beyond the range of fp32.",
                advice=f"Set 0, or {least:g} or more.",
            )


def _data_problems(data: DataSection) -> Iterator[Problem]:
    """Yield the keys that a table needs, and those that its format ignores."""
    is_table, default = data.format == "table", type(data).model_fields
    for key in ("csv", "columns", "labels") if is_table else ():
        if not getattr(data, key):
            yield Problem("data.format=table", f"needs data.{key}: {_NEEDED[key]}.")
    for key in _NIH_ONLY if is_table else _TABLE_ONLY:
        value = getattr(data, key)
        if value != default[key].default and not (key in ("boxes", "relabels") and value == "none"):
            advice = _NIH_ONLY.get(key, "Set data.format=table, or leave it out.")
            yield Problem(f"data.{key}", f"is not for data.format={data.format}.", advice=advice)
    yield from _table_problems(data) if is_table else _nih_problems(data)


def _augment_problems(config: Config) -> Iterator[Problem]:
    """Yield settings of what is switched off, which would be ignored."""
    augment, default = config.augment, type(config.augment).model_fields
    for key, switch in augment.needs.items():
        value, off = getattr(augment, key), default[switch].default
        if value != default[key].default and getattr(augment, switch) == off:
            given = f"augment.{key}={value} with augment.{switch}={off:g}"
            yield Problem(given, "changes nothing.", f"Leave it out, or set augment.{switch}.")
    is_resampled = config.data.read_size > config.data.image_size
    if augment.interpolation != default["interpolation"].default and not (
        augment.moves or augment.rand_augment or is_resampled
    ):
        yield Problem(
            f"augment.interpolation={augment.interpolation}",
            "changes nothing, as nothing moves the pixels.",
            "Leave it out, or set augment.crop or another augmentation.",
        )


def _nih_problems(data: DataSection) -> Iterator[Problem]:
    if isinstance(data.csv, dict):
        yield Problem(
            "data.csv",
            "has a file per split, which is not for data.format=nih.",
            advice="Set data.format=table, or give one file.",
        )
    if data.split == "table":
        yield Problem("data.split=table", "needs data.format=table.", advice="Set data.split.")


def _table_problems(data: DataSection) -> Iterator[Problem]:
    columns, by_split = data.columns, isinstance(data.csv, dict)
    if columns is None:
        return
    if by_split and columns.split is not None:
        yield Problem(
            f"data.columns.split={columns.split}",
            "with a file per split in data.csv: an image would have two splits.",
            advice="Leave one of them out.",
        )
    if data.split == "table" and not by_split and columns.split is None:
        yield Problem(
            "data.split=table",
            "needs data.columns.split, or a file per split in data.csv.",
            advice="Give one of them, or set data.split=patient.",
        )
    for key, needs_list in (("label_separator", True), ("uncertain", False)):
        value = getattr(data, key)
        if value != type(data).model_fields[key].default and needs_list == (columns.labels is None):
            what = "one column of all labels" if needs_list else "a column per label"
            advice = "Set data.columns.labels" if needs_list else "Leave out data.columns.labels"
            yield Problem(f"data.{key}={value}", f"is for {what}.", advice=f"{advice}, or this.")
    if not isinstance(data.labels, list):
        return
    repeated = repeated_name(data.labels)
    if repeated:
        yield Problem("data.labels:", f"{repeated}.", advice="Rename a column of the table.")
    for label in data.label_map:
        if label not in data.labels:
            yield Problem(
                f"data.label_map: {label!r}",
                f"is none of data.labels.{suggestion(label, data.labels)}",
            )


def _multiple_problems(config: Config) -> Iterator[Problem]:
    """Yield the values that are not a multiple of another, and fractions that add up to 1."""
    data, batch, steps = config.data, config.batch, config.train.steps
    known, name = known_architecture(config.model.name), config.model.name
    if known is not None and (name in SIZES or Path(name).exists()):  # others are a guess
        patch = known.patch_size or config.model.patch_size
        patches = f"model.patch_size={patch}"
        if known.patch_size:
            patches = f"{patch}, the patch size of model.name={config.model.name}"
        problem = image_size_problem(data.image_size, patch, patches)
        if problem:
            yield problem
    unit, iterations = batch.micro_batch_size * batch.replicas, batch.device_iterations
    if batch.global_batch_size is not None and batch.global_batch_size % unit:
        yield Problem(
            f"batch.global_batch_size={batch.global_batch_size}",
            f"is not a multiple of {unit} = {batch.micro_batch_size} micro-batch x"
            f" {batch.replicas} replicas.",
            f"Nearest legal values: {_nearest_multiples(batch.global_batch_size, unit)}.",
        )
    yield from _resize_problems(config)
    if data.split in ("patient", "random") and data.val_fraction + data.test_fraction >= 1:
        yield Problem(
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction}",
            "leave nothing to train on.",
            "Their sum must be below 1.",
        )
    if steps is not None and steps % iterations:
        yield Problem(
            f"train.steps={steps}",
            f"is not a multiple of batch.device_iterations={iterations}: a host call makes"
            f" {iterations} weight updates.",
            f"Nearest legal values: {_nearest_multiples(steps, iterations)}.",
        )


def _resize_problems(config: Config) -> Iterator[Problem]:
    data, views = config.data, config.evaluation.views
    size, larger = data.image_size, data.read_size - data.image_size
    if larger < 0:
        yield Problem(
            f"data.resize={data.resize}",
            f"is less than data.image_size={size}, the part that is cut out.",
            "Give a larger one, or data.resize=null: then nothing is cut off.",
        )
    elif larger % 2:
        yield Problem(
            f"data.resize={data.resize}",
            f"less data.image_size={size} is odd: the center would begin at half a pixel.",
            f"Nearest legal values: {size + larger - 1} or {size + larger + 1}.",
        )
    if views == "ten_crop" and larger == 0:
        yield Problem(
            "evaluation.views=ten_crop",
            f"cuts corners out of images larger than data.image_size={size}.",
            f"Set data.resize, e.g. {size + size // 7 // 2 * 2}, or evaluation.views=flip.",
        )


def _nearest_multiples(value: int, unit: int, *, lowest: int = 1, highest: float = math.inf) -> str:
    """Return the multiples of `unit` on either side of `value` that are in the range."""
    below = value // unit * unit
    legal = [str(number) for number in (below, below + unit) if lowest <= number <= highest]
    return " or ".join(legal) if legal else f"none (the range is {lowest} to {highest})"


def check_processes(config: Config, engine: str, world_size: int) -> None:
    """Raise ConfigError unless `world_size` processes can run the configuration.

    `engine` is ``"pipeline"`` or ``"torch"``.
    """
    if engine == "pipeline":
        problem = _world_problem(config, world_size) or schedule_problem(
            config, world_size // config.batch.replicas
        )
    else:
        problem = _replicas_problem(config, world_size)
    if problem:
        raise ConfigError(str(problem))


def describe_processes(config: Config) -> str:
    """Return a line: how to start the pipeline engine, or why it refuses the configuration."""
    stages, replicas = len(config.pipeline.layers_per_stage), config.batch.replicas
    if stages * replicas == 1:
        return "on processes one stage and one replica: nothing to distribute"
    problem = schedule_problem(config, stages)
    if problem:
        return f"on processes engine.name=pipeline is refused: {problem}"
    return (
        f"on processes torchrun --nproc-per-node {stages * replicas} train.py ..."
        f" engine.name=pipeline ({stages} stages x {replicas} replicas,"
        f" {config.pipeline.schedule})"
    )


def _replicas_problem(config: Config, world_size: int) -> Optional[Problem]:
    replicas = config.batch.replicas
    if replicas % world_size == 0:
        return None
    return Problem(
        f"batch.replicas={replicas},",
        f"but torchrun started {world_size} processes; the torch engine needs the same number of"
        " replicas, one or more, in each process.",
        advice=f"Set batch.replicas={world_size} (and divide batch.gradient_accumulation to keep"
        " the global batch), start one process per replica (torchrun --nproc-per-node"
        f" {replicas}), or cut the model into stages: engine.name=pipeline.",
    )


def _world_problem(config: Config, world_size: int) -> Optional[Problem]:
    stages, replicas = len(config.pipeline.layers_per_stage), config.batch.replicas
    legal = [stages * replicas]
    if config.pipeline.schedule == "interleaved_1f1b":
        legal += [stages // n * replicas for n in range(2, stages) if stages % n == 0]
    if legal[0] == 1:
        return Problem(
            "engine.name=pipeline",
            "with one stage and one replica is a single process.",
            advice="Set engine.name=torch.",
        )
    if world_size in legal:
        return None
    if world_size == 1:
        instead = "compute in one process: engine.name=torch"
    else:
        instead = "change pipeline.layers_per_stage or batch.replicas"
    also = f" (or {', '.join(map(str, legal[1:]))}, several stages each)" if legal[1:] else ""
    return Problem(
        "engine.name=pipeline",
        f"needs {legal[0]} processes = {stages} stages x {replicas} replicas{also}, and there"
        f" {'is' if world_size == 1 else 'are'} {world_size}.",
        advice=f"Start it with torchrun --nproc-per-node {legal[0]}, or {instead}.",
    )


def schedule_problem(config: Config, processes: int) -> Optional[Problem]:
    """Return why torch's schedule cannot run on `processes` processes per replica, or None."""
    schedule, stages = config.pipeline.schedule, len(config.pipeline.layers_per_stage)
    count = BatchPlan.from_section(config.batch).gradient_accumulation
    given = given_accumulation(config.batch, count)
    if schedule == "1f1b" and count < stages:
        return Problem(
            given,
            f"is less than the {stages} stages, and pipeline.schedule=1f1b must fill them.",
            f"Smallest legal value: {stages}.",
            "(Or pipeline.schedule=gpipe.)",
        )
    if schedule == "interleaved_1f1b" and not _has_whole_rounds(count, processes):
        below = next(n for n in range(count, 0, -1) if _has_whole_rounds(n, processes))
        above = next(n for n in itertools.count(count) if _has_whole_rounds(n, processes))
        return Problem(
            given,
            f"does not go round {processes} processes: pipeline.schedule=interleaved_1f1b divides"
            f" the micro-batches evenly into {max(1, count // processes)} rounds.",
            f"Nearest legal values: {below} or {above}.",
        )
    return None


def _has_whole_rounds(count: int, processes: int) -> bool:
    """Whether torch's ScheduleInterleaved1F1B accepts this number of micro-batches."""
    return count % max(1, count // processes) == 0
