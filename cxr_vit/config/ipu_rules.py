"""Rules of PopTorch and of the IPU, checked before any compilation (docs/ipu.md)."""

from __future__ import annotations

import math
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

from cxr_vit.config.plans import BatchPlan, empty_stage_problem, given_accumulation
from cxr_vit.config.poptorch_options import (
    CONSTANTS,
    MARK_CONSTANT,
    MEAN_STRATEGY,
    is_location,
    options_of,
)
from cxr_vit.config.schema import Config, EngineSection, OptimSection
from cxr_vit.errors import ConfigError, Problem

_IO_TILES, _SCALING = "TensorLocations.numIOTiles", "automaticLossScalingSettings."
#: Least `optim.eps` beside a second moment in fp16 with which the demo trains (docs/precision.md).
LEAST_FP16_EPS = 1e-4
#: PopTorch's limit for one process.
MOST_IPUS = 64


def ipu_problems(config: Config, *, replicas: Optional[int] = None) -> List[Problem]:
    """Return everything that PopTorch refuses in a configuration.

    `replicas` are those of one process under poprun; None means `batch.replicas` and
    `batch.eval_replicas`.
    """
    problems = [
        *_pipeline_problems(config),
        *_engine_problems(config),
        *_loader_problems(config),
        *_training_problems(config),
        *_proportion_problems(config),
        *_arithmetic_problems(config),
        *_optimizer_problems(config),
    ]
    of_process = process_problem(config, replicas)
    return [*problems, of_process] if of_process else problems


def check_ipu(config: Config, hint: str = "", *, replicas: Optional[int] = None) -> None:
    """Raise ConfigError with all of `ipu_problems`, followed by `hint`."""
    problems = ipu_problems(config, replicas=replicas)
    if problems:
        raise ConfigError("\n".join(map(str, problems)) + hint)


def process_problem(config: Config, replicas: Optional[int] = None) -> Optional[Problem]:
    """Return the problem of a process with more IPUs than PopTorch allows, or None.

    `replicas` is as for `ipu_problems`.
    """
    graphs = pipelines(config, replicas)
    stages, replicas = max(graphs, key=math.prod)
    if stages * replicas <= MOST_IPUS:
        return None
    in_training = math.prod(graphs[0]) > MOST_IPUS
    key = "replicas" if in_training or config.batch.eval_replicas is None else "eval_replicas"
    advice = f"Cut the model into {MOST_IPUS} stages or fewer."
    if stages <= MOST_IPUS:
        advice = f"Set batch.{key}={MOST_IPUS // stages} or fewer."
        if key == "replicas":  # poprun fixes those of evaluation
            count = -(-stages * replicas // MOST_IPUS)
            advice = f"Start {count} or more with poprun (docs/ipu.md), or set{advice[3:]}"
    return Problem(
        f"{stages} stages x {replicas} replicas",
        f"are {stages * replicas} IPUs, and one process has at most {MOST_IPUS}.",
        advice=advice,
    )


def pipelines(config: Config, replicas: Optional[int] = None) -> List[Tuple[int, int]]:
    """Return the stages and replicas of the training graph, then of the inference graph.

    `replicas` are those of a process under poprun, for both graphs.
    """
    batch = BatchPlan.from_section(config.batch)
    return [
        (len(config.pipeline.layers_per_stage), replicas or batch.replicas),
        (len(eval_layers(config)), replicas or batch.eval_replicas),
    ]


def reserved_ipus(stages: int, replicas: int) -> int:
    """Return how many IPUs PopTorch reserves: the next power of two (autoRoundNumIPUs)."""
    return 1 << math.ceil(math.log2(stages * replicas))


def eval_layers(config: Config) -> List[int]:
    """Return the encoder layers of each stage in evaluation."""
    return config.pipeline.eval_layers_per_stage or config.pipeline.layers_per_stage


def eval_proportion(config: Config) -> Union[float, List[float], None]:
    """Return the memory proportion, or one per stage, in evaluation."""
    own = config.pipeline.eval_available_memory_proportion
    return config.pipeline.available_memory_proportion if own is None else own


def _pipeline_problems(config: Config) -> Iterator[Problem]:
    """Yield pipelines that the micro-batches do not fill, and IPUs without work."""
    pipeline, section = config.pipeline, config.batch
    batch = BatchPlan.from_section(section)
    ipus, eval_ipus = len(pipeline.layers_per_stage), len(eval_layers(config))
    least, given = 2 * ipus - 1, batch.gradient_accumulation
    if pipeline.execution == "pipelined" and given < least:
        unit = 1 if section.global_batch_size is None else batch.micro_batch_size * batch.replicas
        yield Problem(
            given_accumulation(section, given),
            f"is less than the {least} pipeline stages (2 x {ipus} IPUs - 1) that training over"
            f" {ipus} IPUs has; PopTorch refuses it.",
            f"Smallest legal value: {least * unit}.",
            "(Or pipeline.execution=sharded.)",
        )
    if pipeline.eval_execution == "pipelined" and batch.eval_device_iterations < eval_ipus:
        yield Problem(
            f"batch.eval_device_iterations={batch.eval_device_iterations}",
            f"is less than the {eval_ipus} pipeline stages that evaluation over {eval_ipus} IPUs"
            " has; PopTorch refuses it.",
            f"Smallest legal value: {eval_ipus}.",
            "(Or pipeline.eval_execution=sharded.)",
        )
    empty = empty_stage_problem(pipeline.layers_per_stage, place="IPU") or empty_stage_problem(
        eval_layers(config), key="eval_layers_per_stage", place="IPU"
    )
    if empty:
        yield empty


def _engine_problems(config: Config) -> Iterator[Problem]:
    engine = config.engine
    yield from _option_problems(config)
    if engine.replicated_tensor_sharding and config.batch.replicas == 1:
        yield Problem(
            "engine.replicated_tensor_sharding=true",
            "divides the optimizer state among replicas, and batch.replicas=1.",
            advice="Set it to false, or batch.replicas to 2 or more.",
        )
    if engine.device != "auto":
        yield Problem(
            f"engine.device={engine.device}",
            "is a device of torch; IPUs are chosen by engine.name.",
            advice="Leave engine.device out.",
        )
    if engine.compile != "off":
        yield Problem(
            f"engine.compile={engine.compile}",
            "is torch.compile, which torch's devices use; PopTorch always compiles for an IPU.",
            advice="Leave engine.compile out.",
        )
    if engine.precision == "bf16":
        yield Problem("engine.precision=bf16:", "an IPU has no bf16.", "Set fp16 or fp32.")
    if engine.precision == "fp32" and engine.weights == "fp16":
        yield Problem(
            "engine.weights=fp16 with engine.precision=fp32:",
            "fp16 weights compute in fp16.",
            "Set engine.precision=fp16 or engine.weights=fp32.",
        )


def _option_problems(config: Config) -> Iterator[Problem]:
    """Yield options of `engine.poptorch_options` that contradict other keys, or each other."""
    key, given = "engine.poptorch_options", config.engine.poptorch_options
    options = options_of(given, "training")
    yield from _constant_problems(config.optim, options.get(MARK_CONSTANT, []))
    half = config.optim.accumulator == "fp16" and not config.optim.use_combined_accum
    if half and options.get(MEAN_STRATEGY) == "Post":
        yield Problem(
            f"{key}.training.{MEAN_STRATEGY}=Post",
            "has no effect with optim.accumulator=fp16: PopTorch then sets Running.",
            advice="Leave it out, or set optim.accumulator=fp32.",
        )
    yield from _schedule_problems(config, options.get("_Popart.set", {}))
    explicit = given["inference"].get("_Popart.set", {}).get("enableExplicitIR")
    if explicit and config.pipeline.eval_execution == "pipelined" and len(eval_layers(config)) > 1:
        yield Problem(
            f"{key}.inference._Popart.set: enableExplicitIR=true",
            "makes the pipeline explicit, which PopTorch 3.4 does not support (Compiler.cpp:715).",
            "Set pipeline.eval_execution=sharded.",
        )
    for graph in ("training", "inference"):
        of_graph = options_of(given, graph)
        tiles = _tile_users(of_graph)
        if tiles and _IO_TILES not in of_graph:
            yield Problem(
                f"{key}.{graph}.{tiles[0]}",
                "has no effect without I/O tiles.",
                "Set TensorLocations.numIOTiles to an even number from 32 to 192.",
            )
    yield from _sharding_problems(config, options)


def _sharding_problems(config: Config, options: Dict[str, Any]) -> Iterator[Problem]:
    for setter in filter(is_location, options):
        if options[setter].get("useReplicatedTensorSharding") and config.batch.replicas == 1:
            yield Problem(
                f"engine.poptorch_options.training.{setter}: useReplicatedTensorSharding=true",
                "divides a tensor among replicas, and batch.replicas=1.",
                advice="Set it to false, or batch.replicas to 2 or more.",
            )


def _constant_problems(optim: OptimSection, marked: List[str]) -> Iterator[Problem]:
    known = list(CONSTANTS[optim.name])
    if optim.loss_scaling == "auto":
        known.remove("loss_scaling")
    for name in marked:
        if name not in known:
            yield Problem(
                f"engine.poptorch_options.training.{MARK_CONSTANT}: {name}",
                "cannot be constant with optim.loss_scaling=auto, which changes it."
                if name == "loss_scaling"
                else f"is no value of optim.name={optim.name}.",
                f"Legal values: {', '.join(known)}.",
            )


def _schedule_problems(config: Config, popart: Dict[str, Any]) -> Iterator[Problem]:
    """Yield combinations of PopART's options that PopART refuses in training."""
    place, clip = "engine.poptorch_options.training._Popart.set", config.optim.max_grad_norm
    schedule, batches = "accumulateOuterFragmentSettings.schedule", "batchSerializationSettings."
    collect = "replicatedCollectivesSettings.prepareScheduleForMergingCollectives"
    # With clipping the engine sets none, and PopTorch replaces PopART's own, Serial, in a pipeline.
    pipelined = config.pipeline.execution == "pipelined"
    serial = popart.get(schedule, 1 if clip is not None and not pipelined else 0) == 1
    if serial and clip is not None and pipelined:
        yield Problem(
            f"{place}: {schedule}=1 (Serial)",
            f"cannot clip gradients, optim.max_grad_norm={clip} (PopART's"
            " clipweightgradientsbynorm.cpp:490).",
            "Legal values: 0, 2, 3.",
        )
    if serial and popart.get(collect):
        yield Problem(
            f"{place}: {collect}=true",
            "cannot have the Serial schedule (PopART's contiguatecollectivesformerging.cpp:45).",
            f"Set {schedule} to 0, 2 or 3.",
        )
    if popart.get(f"{batches}method") == 2 and not popart.get(f"{batches}transformContext"):
        yield Problem(
            f"{place}: {batches}method=2 (Loop)",
            "needs the backward pass (PopART's ir.cpp:774).",
            f"Set {batches}transformContext=1.",
        )


def _loader_problems(config: Config) -> Iterator[Problem]:
    engine, batch = config.engine, BatchPlan.from_section(config.batch)
    size, most = engine.rebatched_worker_size, batch.host_batch_size
    if engine.loader_mode == "async_rebatched" and size is not None and size > most:
        yield Problem(
            f"engine.rebatched_worker_size={size}",
            f"is more than the {most} samples of a host batch.",
            f"Nearest legal value: {most}.",
        )


def _training_problems(config: Config) -> Iterator[Problem]:
    if config.train.on_nonfinite == "skip_update":
        yield Problem(
            "train.on_nonfinite=skip_update:",
            "the update is compiled for the IPU and cannot be left out.",
            "Set stop.",
            "(A scale of optim.loss_scaling that is too large is the usual cause.)",
        )


def _proportion_problems(config: Config) -> Iterator[Problem]:
    pipeline, key = config.pipeline, "available_memory_proportion"
    stages, eval_stages = len(pipeline.layers_per_stage), len(eval_layers(config))
    given, own = pipeline.available_memory_proportion, pipeline.eval_available_memory_proportion
    for name, numbers, count in ((key, given, stages), (f"eval_{key}", own, eval_stages)):
        if isinstance(numbers, list) and len(numbers) != count:
            yield Problem(
                f"pipeline.{name}={numbers}",
                f"has {len(numbers)} numbers; there are {count} stages.",
                "Give one number per stage, or a single number for all.",
            )
            return
    if own is None and isinstance(given, list) and eval_stages > stages:
        yield Problem(
            f"pipeline.{key}={given}",
            f"has one number for each of the {stages} stages of training, but evaluation has"
            f" {eval_stages}.",
            f"Give a single number for all, or pipeline.eval_{key}.",
        )


def _arithmetic_problems(config: Config) -> Iterator[Problem]:
    optim = config.optim
    if config.model.hidden_act == "gelu":
        yield Problem(
            "model.hidden_act=gelu:",
            "an IPU computes GELU in its tanh form only.",
            "Set gelu_pytorch_tanh, or leave it null.",
        )
    if optim.loss_scaling == "auto" and config.engine.precision == "fp32":
        yield Problem(
            "optim.loss_scaling=auto",
            "watches fp16 gradients, and engine.precision=fp32 has none.",
            advice="Set optim.loss_scaling=1.0.",
        )


def _optimizer_problems(config: Config) -> Iterator[Problem]:
    """Yield what PopTorch's optimizers refuse, ignore or compute wrongly."""
    optim, weights = config.optim, config.engine.weights
    if optim.max_grad_norm is not None and optim.name != "adamw":
        what = (
            "PopTorch's LAMB has no such argument."
            if optim.name == "lamb"
            else "PopART clips the velocity there, not the gradient."
        )
        yield Problem(
            f"optim.max_grad_norm={optim.max_grad_norm} with optim.name={optim.name}:",
            what,
            advice="Set optim.max_grad_norm=null, or optim.name=adamw.",
        )
    if optim.nesterov and not optim.use_combined_accum:
        yield Problem(
            "optim.nesterov=true with optim.use_combined_accum=false:",
            "PopART may clear the accumulated gradient before Nesterov's form reads it (its"
            " sgd2decompose.cpp does not order them).",
            "Set optim.use_combined_accum=true.",
        )
    if optim.second_moment == "fp16" and optim.name != "sgd" and optim.eps < LEAST_FP16_EPS:
        yield Problem(
            f"optim.second_moment=fp16 with optim.eps={optim.eps:g}:",
            "PopART divides by sqrt(v) + eps in fp16 (adamupdaterx.cpp), where v is 0 for gradients"
            " below 0.0055: the update is the first moment over eps, or infinite.",
            "Set optim.second_moment=fp32.",
            f"(Or optim.eps={LEAST_FP16_EPS:g} or more, which makes small updates proportional to"
            " the gradient, as in SGD.)",
        )
    if optim.loss_scaling == "auto" and optim.accumulator == "fp32":
        yield Problem(
            "optim.loss_scaling=auto with optim.accumulator=fp32:",
            "automatic loss scaling expects gradients accumulated in fp16 (Graphcore's ViT example,"
            " ipu_options.py).",
            "Set optim.accumulator=fp16, or a number for optim.loss_scaling.",
        )
    if optim.use_combined_accum and {optim.accumulator, optim.first_moment} != {weights}:
        yield Problem(
            f"optim.use_combined_accum=true with optim.accumulator={optim.accumulator} and"
            f" optim.first_moment={optim.first_moment}:",
            f"the tensor has the dtype of the weights, engine.weights={weights} (CompilerImpl.cpp,"
            " getPopartOptimizer).",
            f"Set both to {weights}.",
        )
    if optim.use_combined_accum:
        yield from _combined_problems(config.engine)


def _combined_problems(engine: EngineSection) -> Iterator[Problem]:
    """Yield places of the optimizer state that a combined accumulator does not go to.

    PopART places it as an accumulator (streamingmemoryopinserter.cpp).
    """
    for key, value in (("optimizer_state_on_chip", False), ("replicated_tensor_sharding", True)):
        if getattr(engine, key) == value:
            yield Problem(
                f"engine.{key}={str(value).lower()} with optim.use_combined_accum=true:",
                "the tensor is placed as an accumulator, and this key does not move it.",
                f"Set engine.{key}={str(not value).lower()}.",
            )


def ipu_warnings(config: Config) -> List[Problem]:
    """Return what PopTorch accepts and a person should know before a run."""
    return [
        *_fp16_warnings(config),
        *_scaling_warnings(config),
        *_tile_warnings(config),
        *_device_warnings(config),
    ]


def _scaling_warnings(config: Config) -> Iterator[Problem]:
    popart = options_of(config.engine.poptorch_options, "training").get("_Popart.set", {})
    scaling = [name for name in popart if name.startswith(_SCALING)]
    if scaling and config.optim.loss_scaling != "auto":
        yield Problem(
            f"engine.poptorch_options.training._Popart.set: {scaling[0]}",
            f"has no effect with optim.loss_scaling={config.optim.loss_scaling}.",
            "Set optim.loss_scaling=auto, or leave it out.",
        )


def _device_warnings(config: Config) -> Iterator[Problem]:
    chosen = options_of(config.engine.poptorch_options, "training").get("useIpuId")
    needed = [reserved_ipus(*graph) for graph in pipelines(config)]
    if chosen is not None and len(set(needed)) > 1:
        yield Problem(
            f"engine.poptorch_options: useIpuId={chosen}:",
            f"training needs {needed[0]} IPUs and evaluation {needed[1]}; a device has one number.",
            advice="Give each graph its own useIpuId, or both the same number of IPUs.",
        )


def _tile_users(options: Dict[str, Any]) -> List[str]:
    """Return the settings of locations that use I/O tiles."""
    return [
        f"{setter}: {name}"
        for setter in filter(is_location, options)
        for name, use in options[setter].items()
        if "IOTiles" in name and use
    ]


def _tile_warnings(config: Config) -> Iterator[Problem]:
    for graph in ("training", "inference"):
        options = options_of(config.engine.poptorch_options, graph)
        tiles = options.get(_IO_TILES)
        if tiles and not _tile_users(options):
            yield Problem(
                f"engine.poptorch_options.{graph}.{_IO_TILES}={tiles}",
                "takes these tiles away from computing and memory, and nothing uses them: a"
                " pipeline has no overlapped input and output.",
                advice="Leave it out.",
            )


def _fp16_warnings(config: Config) -> Iterator[Problem]:
    optim, engine = config.optim, config.engine
    if engine.precision == "fp32":
        return
    scaled = optim.loss_scaling == "auto" or optim.loss_scaling > 1
    if optim.accumulator == optim.first_moment == "fp16" and optim.name != "sgd" and scaled:
        yield Problem(
            "optim.accumulator=fp16 with optim.first_moment=fp16:",
            "PopART then divides the loss scaling out in fp16 (adamdecompose.cpp), where small"
            " gradients become 0 again.",
            advice="optim.first_moment=fp32 keeps them.",
        )
    if engine.weights == "fp16" and not engine.stochastic_rounding:
        yield Problem(
            "engine.weights=fp16 with engine.stochastic_rounding=false:",
            "an update below 1/2048 of a weight is lost.",
            advice="Set engine.stochastic_rounding=true, or engine.weights=fp32.",
        )
