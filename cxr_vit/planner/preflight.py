"""Says before a run starts that its memory is predicted not to hold the model. Imports no torch."""

from __future__ import annotations

import logging
from typing import List, Optional, Tuple

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import Plan, make_plan

__all__ = ["describe_memory", "plan_of_run", "preflight"]

logger = logging.getLogger(__name__)


def preflight(config: Config, engine: str, local_replicas: Optional[int] = None) -> None:
    """Plan a run on IPUs; where it is not predicted to fit, warn, or with `planner.strict` stop.

    Parameters
    ----------
    config
        The configuration.
    engine
        The engine that was chosen; nothing is done for another than ``"poptorch"``.
    local_replicas
        Those of this process, which share the optimizer's state out; None for all.

    Raises
    ------
    ConfigError
        If it is predicted not to fit, and `planner.strict` asks to stop.
    """
    if engine != "poptorch":
        return
    config = _on_ipus(config)
    try:
        plan = make_plan(config, engine=engine, local_replicas=local_replicas)
    except ConfigError as error:  # a model that must be loaded to know its shape
        if config.planner.strict:
            logger.warning("memory is not predicted: %s", error)
        return
    if plan.fits:
        return
    words = _describe(config, plan, local_replicas)
    if config.planner.strict:
        raise ConfigError(f"{words} (planner.strict=true stops here.)")
    logger.warning("%s", words)


def describe_memory(config: Config) -> str:
    """Say in a line how full the fullest IPU is predicted to be, and what would help."""
    config = _on_ipus(config)
    try:
        return _describe(config, make_plan(config, engine="poptorch"), None)
    except ConfigError as error:
        return f"memory is not predicted: {error}"


def plan_of_run(config: Config, engine: str) -> Optional[Tuple[Plan, str]]:
    """Plan a run for its pictures, and say what is to be said of them.

    Processes are planned as a stage a GPU; any other engine's stages as a pipeline of IPUs, which
    is what they are cut for, unless `planner.hardware` names another device.

    Parameters
    ----------
    config
        The configuration.
    engine
        The engine that was chosen.

    Returns
    -------
    tuple or None
        The plan and the note; None where the model must be loaded to know its shape.
    """
    hardware = config.planner.hardware
    if engine == "poptorch" or (engine == "torch" and hardware == "auto"):
        config = _on_ipus(config)
    try:
        plan = make_plan(config, engine=engine)
    except ConfigError as error:
        logger.info("no plan is drawn: %s", error)
        return None
    refused = plan.hardware.is_ipu and ipu_problems(config, replicas=1)
    return plan, "; PopTorch would refuse it" if refused else ""


def _on_ipus(config: Config) -> Config:
    """Return the configuration planned for IPUs, the Mk2 where it names none."""
    ipu = "bow" if config.planner.hardware == "bow" else "mk2"
    return config.changed(planner={"hardware": ipu})


def _describe(config: Config, plan: Plan, local_replicas: Optional[int]) -> str:
    fullest = plan.fullest
    memory, place = fullest.memory, f"{plan.place} {fullest.stage}"
    text = (
        f"predicted memory of {place}, the fullest: {memory.total / 1e6:,.0f} of"
        f" {memory.limit / 1e6:,.0f} MB, {100 * memory.share:.0f} %: {memory.verdict}."
    )
    if memory.fits:
        return text
    enough, less = _remedies(config, plan, local_replicas)
    if enough:
        return f"{text} Predicted to fit: {', or '.join(enough)}."
    helps = f" Each of these helps: {', '.join(less)}." if less else ""
    return f"{text}{helps} python -m cxr_vit plan --search tries other cuts."


def _remedies(
    config: Config, plan: Plan, local_replicas: Optional[int]
) -> Tuple[List[str], List[str]]:
    """Return single changes that make it fit, and those that only lower it."""
    changes: List[Tuple[str, Config]] = []
    smaller = _largest_that_fits(config, local_replicas)
    if smaller is not None:
        changes.append(smaller)
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
        other = make_plan(changed, engine="poptorch", local_replicas=local_replicas)
        if other.fits:
            enough.append(text)
        elif other.fullest.memory.share < plan.fullest.memory.share - 0.005:
            less.append(text)
    return enough, less


def _largest_that_fits(
    config: Config, local_replicas: Optional[int]
) -> Optional[Tuple[str, Config]]:
    """Return the next smaller micro-batch of the same global batch that fits, told and set."""
    batch = BatchPlan.from_section(config.batch)
    films = batch.micro_batch_size * batch.gradient_accumulation
    for size in range(batch.micro_batch_size - 1, 0, -1):
        if films % size:
            continue
        keys = {"micro_batch_size": size, "gradient_accumulation": films // size}
        changed = config.changed(batch={**keys, "global_batch_size": None})
        if make_plan(changed, engine="poptorch", local_replicas=local_replicas).fits:
            if config.batch.global_batch_size is not None:
                del keys["gradient_accumulation"]
            return " ".join(f"batch.{key}={value}" for key, value in keys.items()), changed
    return None
