"""The plan of a configuration: memory of each device, time of a weight update, speed."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.ipu_rules import reserved_ipus
from cxr_vit.data.text_files import find_lists, read_list
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.planner.costs import StageCost, StageMemory
from cxr_vit.planner.hardware import Target, find_target
from cxr_vit.planner.speed import (
    RELATIVE,
    SpeedModel,
    Workload,
    inference_workload,
    published_model,
    workload,
)
from cxr_vit.planner.timeline import StageTime, Timeline, simulate

logger = logging.getLogger(__name__)

#: NIH's official lists; validation images are drawn from that of training.
_NIH_TRAINING, _NIH_TEST = 86_524, 25_596
FREEZE = "model.freeze is not taken into account: training needs less memory."
#: Share of test images in the synthetic sample (cxr_vit/data/synthetic/dataset.py).
_SAMPLE_TEST_SHARE = 0.25


class StagePrediction(NamedTuple):
    """Prediction for one stage and its device; `depth` micro-batches are held at once."""

    stage: int
    cost: StageCost
    depth: int
    memory: StageMemory
    time: StageTime


class Plan(NamedTuple):
    """Prediction for a configuration: `seconds` per weight update and `images` per epoch.

    Without `has_time` the seconds are operations, and only their ratios mean something.
    """

    work: Workload
    stages: Tuple[StagePrediction, ...]
    model: SpeedModel
    seconds: float
    images: int
    images_source: str

    @property
    def target(self) -> Target:
        """Engine, device and precision."""
        return self.work.target

    @property
    def has_time(self) -> bool:
        """Whether times are seconds."""
        return self.model is not RELATIVE

    @property
    def devices(self) -> int:
        """Number of devices, replicas included; IPUs are reserved in powers of two."""
        stages, replicas = len(self.stages), self.work.batch.replicas
        return reserved_ipus(stages, replicas) if self.target.ipu else stages * replicas

    @property
    def samples_per_s(self) -> float:
        """Training images per second."""
        return self.work.batch.global_batch_size / self.seconds

    @property
    def speed_range(self) -> Tuple[float, float]:
        """Lowest and highest speed within the error of the constants."""
        shortest_s, longest_s = self.model.range_s(self.work)
        images = self.work.batch.global_batch_size
        return images / longest_s, images / shortest_s

    @property
    def epoch_minutes(self) -> float:
        """Minutes per epoch, without validation and compilation."""
        return self.images / self.samples_per_s / 60

    @property
    def host_bytes_per_s(self) -> float:
        """Bytes per second from the host: images and labels."""
        shape = self.work.shape
        return self.samples_per_s * (shape.image_bytes + 4 * shape.num_labels)

    @property
    def bubble(self) -> float:
        """Share of an update in which the pipeline fills and drains."""
        return self.work.bubble(self.model.constants)

    @property
    def timeline(self) -> Timeline:
        """One weight update, or host call of evaluation, laid out in time."""
        work, times = self.work, [stage.time for stage in self.stages]
        accumulation = work.batch.gradient_accumulation
        return simulate(work.schedule, times, accumulation, work.is_training)

    @property
    def fullest(self) -> StagePrediction:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def fits(self) -> bool:
        """Whether every device is predicted to hold its stage; true if its memory is unknown."""
        return self.fullest.memory.fits

    def by_speed(self) -> List[StagePrediction]:
        """Return the stages, the slowest first."""
        return sorted(self.stages, key=lambda stage: -stage.time.micro_batch_s)


class Evaluation(NamedTuple):
    """Prediction for the inference graph, whose "update" is a host call, and the splits it scores.

    `plan.images` are those of the validation split.
    """

    plan: Plan
    test_images: int

    @property
    def images_per_call(self) -> int:
        """Images of a host call."""
        return self.plan.work.batch.global_batch_size

    def calls(self, images: int) -> int:
        """Return the host calls of a split; the last is filled up."""
        return -(-images // self.images_per_call)

    @property
    def longest_call_s(self) -> float:
        """Seconds of a host call at the lower end of the speed's range."""
        return self.plan.model.range_s(self.plan.work)[1]

    @property
    def splits_s(self) -> float:
        """Seconds to score both splits once."""
        calls = self.calls(self.plan.images) + self.calls(self.test_images)
        return calls * self.plan.seconds


def speed_of(target: Target) -> SpeedModel:
    """Return the constants of a device: the published ones of an IPU, none of another."""
    return published_model(target.ipu, target.precision) if target.ipu else RELATIVE


def make_plan(
    config: Config,
    *,
    target: Optional[Target] = None,
    local_replicas: Optional[int] = None,
    model: Optional[SpeedModel] = None,
    images: Optional[int] = None,
    image_bytes: Optional[int] = None,
) -> Plan:
    """Predict memory and speed of a configuration; ConfigError as in `workload`.

    Parameters
    ----------
    target
        What to plan for; None for `find_target`.
    local_replicas
        Replicas of one process, which share the optimizer state; None for all.
    model
        Constants of the speed; None for `speed_of`.
    images
        Training images per epoch; None to count the lists' images, or without lists NIH's.
    image_bytes
        Bytes that cross to the device per image; None for one gray byte per pixel.
    """
    target = target or find_target(config)
    work = workload(config, target, local_replicas)
    if image_bytes is not None:
        work = work._replace(shape=work.shape._replace(image_bytes=image_bytes))
    model = model or speed_of(target)
    splits = split_images(config.data)
    number, source = (images, "--images") if images else (splits.training, splits.source)
    return _plan_of(work, model, number, source)


def _plan_of(work: Workload, model: SpeedModel, images: int, source: str) -> Plan:
    stages = []
    for stage, (cost, depth) in enumerate(zip(work.costs, work.depths)):
        memory, time = work.memory(stage, cost, depth), work.stage_time(cost, model.constants)
        stages.append(StagePrediction(stage, cost, depth, memory, time))
    return Plan(work, tuple(stages), model, work.seconds(model.constants), images, source)


def plan_evaluation(
    config: Config,
    *,
    target: Optional[Target] = None,
    model: Optional[SpeedModel] = None,
    splits: Optional[Splits] = None,
) -> Optional[Evaluation]:
    """Predict memory and speed of the inference graph on IPUs; None for other devices.

    `model` holds the constants of training; None for `speed_of`. Without `splits` their images are
    counted. Raises ConfigError as `make_plan`.
    """
    target = target or find_target(config)
    if target.ipu is None:
        return None
    work, splits = inference_workload(config, target), splits or split_images(config.data)
    own = (model or speed_of(target)).of_inference()
    plan = _plan_of(work, own, splits.validation, splits.source)
    return Evaluation(plan, splits.test)


class Splits(NamedTuple):
    """Images of each split, and where the numbers are from."""

    training: int
    validation: int
    test: int
    source: str


def split_images(data: DataSection) -> Splits:
    """Count the images of the splits from the lists; without them assume NIH's.

    A table is not read.
    """
    splits = _listed_images(data)
    return splits._replace(training=math.ceil(splits.training * data.train_fraction))


def _listed_images(data: DataSection) -> Splits:
    if data.format == "table":
        source = "assumed, as many as NIH's; --images N for those of the table"
        return _drawn(data, _NIH_TRAINING, _NIH_TEST, source)
    if data.sample_images and not Path(data.root).exists():
        test = math.ceil(data.sample_images * _SAMPLE_TEST_SHARE)
        return _drawn(data, data.sample_images - test, test, "of the synthetic sample")
    if data.split not in ("auto", "official"):
        every = _NIH_TRAINING + _NIH_TEST
        training = math.floor(every * (1 - data.val_fraction - data.test_fraction))
        validation = math.ceil(every * data.val_fraction)
        return Splits(training, validation, max(0, every - training - validation), "of NIH's")
    nih = _drawn(data, _NIH_TRAINING, _NIH_TEST, "NIH's official list")
    try:
        lists = find_lists(Path(data.root), data)
        if not {"train_list", "test_list"} <= set(lists):
            return nih
        names, test = read_list(lists["train_list"]), len(read_list(lists["test_list"]))
        source = f"of {lists['train_list']}"
        if "val_list" in lists:
            held_out = read_list(lists["val_list"])
            return Splits(len(names - held_out), len(held_out), test, source)
    except DataError:  # training reports it
        return nih
    return _drawn(data, len(names), test, source)


def _drawn(data: DataSection, images: int, test: int, source: str) -> Splits:
    """Return the splits if the validation images are drawn from the training list."""
    training = math.floor(images * (1 - data.val_fraction))
    return Splits(training, images - training, test, source)


def preflight(config: Config, engine: str, local_replicas: Optional[int] = None) -> None:
    """Warn before a run on IPUs that is not predicted to fit; with `planner.strict` stop it.

    Frozen weights need less than is predicted, so training with them is not stopped. Nothing is
    done unless the chosen engine is ``"poptorch"``. `local_replicas` of this process
    share the optimizer state; None for all. Stops with a ConfigError.
    """
    if engine != "poptorch":
        return
    try:
        plan = _plan_on_ipus(config, local_replicas)
    except ConfigError as error:  # the shape is unknown before the model is loaded
        if config.planner.strict:
            logger.warning("memory is not predicted: %s", error)
        return
    training = [] if plan.fits else [_describe(config, plan, local_replicas)]
    evaluation = _describe_evaluation(config)
    messages = [*training, *evaluation]
    certain = messages if config.model.freeze == "none" else evaluation
    if certain and config.planner.strict:
        raise ConfigError("\n".join(messages) + " (planner.strict=true stops here.)")
    for message in messages:
        logger.warning("%s", message)


def describe_memory(config: Config) -> List[str]:
    """Describe in a line how full the fullest IPU is predicted to be, and what would help.

    A second line follows if the inference graph is not predicted to fit.
    """
    try:
        return [_describe(config, _plan_on_ipus(config), None), *_describe_evaluation(config)]
    except ConfigError as error:
        return [f"memory is not predicted: {error}"]


def plan_of_run(config: Config) -> Optional[Plan]:
    """Plan a run on IPUs for its pictures; None if the model must be loaded to know its shape."""
    try:
        return _plan_on_ipus(config)
    except ConfigError as error:
        logger.info("no plan is drawn: %s", error)
        return None


def _plan_on_ipus(config: Config, local_replicas: Optional[int] = None) -> Plan:
    target = find_target(config, "poptorch")
    return make_plan(config, target=target, local_replicas=local_replicas)


def _describe_fullest(plan: Plan) -> str:
    memory, place = plan.fullest.memory, f"{plan.target.place} {plan.fullest.stage}"
    return (
        f"predicted memory of {place}, the fullest: {memory.total / 1e6:,.0f} of"
        f" {memory.limit / 1e6:,.0f} MB, {100 * memory.share:.0f} %: {memory.verdict}."
    )


def _describe_evaluation(config: Config) -> List[str]:
    """Describe an inference graph that is not predicted to fit, and the micro-batch that would."""
    target, splits = find_target(config, "poptorch"), split_images(config.data)

    def plan_of(size: int) -> Plan:
        changed = config.changed(batch={"eval_micro_batch_size": size})
        found = plan_evaluation(changed, target=target, splits=splits)
        assert found is not None, "the target is an IPU"
        return found.plan

    given = plan_of(config.batch.eval_micro_batch_size)
    if given.fits:
        return []
    enough, too_many = 0, config.batch.eval_micro_batch_size
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        if plan_of(middle).fits:
            enough = middle
        else:
            too_many = middle
    advice = "Cut the model into more stages (pipeline.eval_layers_per_stage)."
    if enough:
        advice = f"Predicted to fit: batch.eval_micro_batch_size={enough}."
    return [f"evaluation: {_describe_fullest(given)} {advice}"]


def _describe(config: Config, plan: Plan, local_replicas: Optional[int]) -> str:
    text = _describe_fullest(plan)
    if plan.fits:
        return text
    if config.model.freeze != "none":
        text += f" {FREEZE}"
    enough, less = _remedies(config, plan, local_replicas)
    if enough:
        return f"{text} Predicted to fit: {', or '.join(enough)}."
    helps = f" Each of these helps: {', '.join(less)}." if less else ""
    return f"{text}{helps} python -m cxr_vit plan --search tries other cuts."


def _remedies(
    config: Config, plan: Plan, local_replicas: Optional[int]
) -> Tuple[List[str], List[str]]:
    """Return single changes that make the run fit, and changes that only lower its memory."""
    smaller = _largest_that_fits(config, plan.work.batch, local_replicas)
    changes = [smaller] if smaller is not None else []
    changes += [
        (f"{section}.{key}={value}", config.changed(**{section: {key: value}}))
        for section, key, value in (
            ("pipeline", "recompute", "every_layer"),
            ("optim", "accumulator", "fp16"),
            ("engine", "weights", "fp16"),
        )
        if getattr(getattr(config, section), key) != value and config.engine.precision != "fp32"
    ]
    if config.engine.optimizer_state_on_chip:
        changed = config.changed(engine={"optimizer_state_on_chip": False})
        changes.append(("engine.optimizer_state_on_chip=false", changed))
    enough, less = [], []
    for text, changed in changes:
        other = _plan_on_ipus(changed, local_replicas)
        if other.fits:
            enough.append(text)
        elif other.fullest.memory.share < plan.fullest.memory.share - 0.005:
            less.append(text)
    return enough, less


def _largest_that_fits(
    config: Config, batch: BatchPlan, local_replicas: Optional[int]
) -> Optional[Tuple[str, Config]]:
    """Return the next smaller micro-batch of the same global batch that fits, as text and set."""
    images = batch.micro_batch_size * batch.gradient_accumulation
    for size in range(batch.micro_batch_size - 1, 0, -1):
        if images % size:
            continue
        keys = {"micro_batch_size": size, "gradient_accumulation": images // size}
        changed = config.changed(batch={**keys, "global_batch_size": None})
        if _plan_on_ipus(changed, local_replicas).fits:
            if config.batch.global_batch_size is not None:
                del keys["gradient_accumulation"]
            return " ".join(f"batch.{key}={value}" for key, value in keys.items()), changed
    return None
