"""Training and scoring on IPUs: the stages are blocks of one PopTorch graph, stage i on IPU i.

Written from PopTorch's public sources and run on its real Python front end; docs/ipu.md, section 1,
lists what has been verified and what only hardware can show.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple, Union

import torch
from torch import Tensor

from cxr_vit.config.ipu_rules import eval_layers, pipelines, reserved_ipus
from cxr_vit.config.plans import BatchPlan, StagePlan
from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler
from cxr_vit.engines.base import Engine, EngineState, StepOutput, check_batch, process_peak_gib
from cxr_vit.engines.ipu.graphs import (
    ExecutableCache,
    IpuGraphs,
    compute_on_host,
    graph_shape,
    guarded,
    set_compute_dtype,
)
from cxr_vit.engines.ipu.loader import HostBatchLoader
from cxr_vit.engines.ipu.optimizer import (
    from_poptorch,
    mark_constants,
    module_optimizer,
    moment_dtypes,
    optimizer_kind,
    to_poptorch,
)
from cxr_vit.engines.ipu.options import (
    DTYPES,
    PROTOBUF_LIMIT,
    graph_options,
    on_hardware,
    save_weights_apart,
)
from cxr_vit.engines.optim import check_kind, check_trained
from cxr_vit.engines.processes import Launch
from cxr_vit.model.drop_path import DropPath
from cxr_vit.model.module import ViTModule
from cxr_vit.model.optim import freeze_others, learning_rate_ratios

logger = logging.getLogger(__name__)

#: Key of `EngineState.scalars`: number of IPUs that the random state belongs to.
_RNG_IPUS = "rng_ipus"


class PopTorchEngine(Engine):
    """Train and score on IPUs.

    Parameters
    ----------
    module
        Set up `for_ipu`.
    config
        Must have passed `check_ipu`.
    reason
        Why this engine was chosen.
    offline
        Compile only, for `engine.ipu_version`, without an IPU.
    """

    def __init__(
        self,
        module: ViTModule,
        config: Config,
        batch: BatchPlan,
        launch: Launch,
        *,
        reason: str,
        offline: bool = False,
    ) -> None:
        super().__init__(module, batch)
        self.config = config
        self.reason = reason
        self.place = "IPU"
        self.precision = "fp16" if config.engine.precision == "auto" else config.engine.precision
        # popdist connects the processes of poprun; without it this process computes all replicas.
        by_poprun = launch.local_replicas is not None
        self.launch = launch if by_poprun else Launch()
        self.is_main = self.launch.is_main
        self.own_replicas = self.launch.own(batch.replicas)
        self.own_eval_replicas = self.launch.own(batch.eval_replicas)
        self.local_batch = replace(
            batch, replicas=len(self.own_replicas), eval_replicas=len(self.own_eval_replicas)
        )
        self.model = module.model
        if config.engine.weights == "fp16":
            self.model.half()
        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        set_compute_dtype(self.model, dtype)
        self.optimizer = module_optimizer(module, config)
        mark_constants(self.optimizer, config.engine.poptorch_options["training"])
        self.lr_ratios = learning_rate_ratios(self.optimizer, config.peak_lr)
        freeze_others(self.model, self.optimizer)
        self.optimizer_kind = optimizer_kind(self.optimizer, config.optim)
        self.updates = 0
        depth = sum(self.model.plan.layers_per_stage)
        self.drop_path = DropPath(config.model.drop_path, depth, config.run.seed)
        #: For files of PopART, until the engine is closed.
        self._scratch: Optional[tempfile.TemporaryDirectory[str]] = None
        self.graphs = self._build_graphs(by_poprun, offline)
        self._loaders: List[HostBatchLoader] = []

    def _build_graphs(self, by_poprun: bool, offline: bool) -> IpuGraphs:
        config, pipeline, plan = self.config, self.config.pipeline, self.model.plan
        shape = graph_shape(config, self.batch, self.model)
        cache = ExecutableCache(config.engine.executable_cache, shape)
        training_options, inference_options = graph_options(
            config,
            self.batch,
            precision=self.precision,
            cache=None if cache.path is None else str(cache.path),
            offline=offline,
            by_poprun=by_poprun,
        )
        size = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        if size > PROTOBUF_LIMIT:
            self._scratch = tempfile.TemporaryDirectory(prefix="cxr_vit_")
            for name, options in (("training", training_options), ("inference", inference_options)):
                save_weights_apart(options, Path(self._scratch.name) / name)
        kept = plan.kept_outputs(pipeline.recompute, on_ipus=True) or []
        if pipeline.execution == "sharded":
            kept = []
        layers = [self.model.layers[i] for stage in kept for i in stage.layers]
        attentions = [self.model.attentions[i] for stage in kept for i in stage.attentions]
        return IpuGraphs(
            module=self.module,
            eval_model=self.model.recut(StagePlan.from_list(eval_layers(config))),
            optimizer=self.optimizer,
            training_options=training_options,
            inference_options=inference_options,
            kept=[*layers, *attentions],
            eval_output=DTYPES[config.engine.eval_output],
            cache=cache,
            offline=offline,
        )

    def describe(self) -> str:
        """Return a line about the IPUs, the precision and the reason for both."""
        processes = self.launch.world_size
        stages, replicas = max(pipelines(self.config), key=math.prod)
        return (
            f"poptorch engine on {stages * replicas} IPUs ({replicas} x {stages} stages"
            f"{f' by {processes} processes' if processes > 1 else ''},"
            f" {reserved_ipus(stages, replicas)} reserved) in {self.precision} with"
            f" {self.config.engine.weights} weights ({self.reason}; choose with"
            " engine.name=torch|poptorch, engine.precision=fp16|fp32, engine.weights=fp32|fp16)"
        )

    def facts(self) -> Dict[str, Any]:
        """Return what `describe` tells as fields."""
        return {
            "name": "poptorch",
            "device": "IPU",
            "hardware": on_hardware(),
            "precision": self.precision,
            "processes": self.launch.world_size,
            "replicas": self.batch.replicas,
            "stages": self.model.plan.num_stages,
        }

    def loader(
        self,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        training: bool,
    ) -> Iterable[Batch]:
        """Return a loader of full host batches; see `HostBatchLoader`."""
        self._loaders = [loader for loader in self._loaders if loader.is_open]
        loader = HostBatchLoader(
            self.graphs.training_options if training else self.graphs.inference_options,
            dataset,
            sampler,
            self.batch,
            self.own_replicas if training else self.own_eval_replicas,
            num_workers=self.config.data.num_workers,
            engine=self.config.engine,
            watch=self.watch,
            timeout_s=self.config.data.worker_timeout_s,
        )
        self._loaders.append(loader)
        return loader

    def compile(self, example: Batch) -> float:
        """Compile both graphs, the training graph last, so that it stays attached."""
        check_batch(example, self.local_batch.global_batch_size)
        start = time.perf_counter()
        size = self.local_batch.eval_host_batch_size
        self.graphs.inference(example.images.new_zeros(size, *example.images.shape[1:]))
        self.graphs.training(*self._inputs(example))
        return time.perf_counter() - start

    def train_step(self, batch: Batch, *, lr: float) -> StepOutput:
        """Make the weight updates of one host batch."""
        check_batch(batch, self.local_batch.global_batch_size)
        inputs = self._inputs(batch)
        executor = self.graphs.training(*inputs)
        for group, ratio in zip(self.optimizer.param_groups, self.lr_ratios):
            group["lr"] = lr * ratio
        executor.setOptimizer(self.optimizer)
        losses = guarded("training", executor, *inputs).float()
        iterations = self.batch.device_iterations
        self.updates += iterations
        if iterations == 1:  # OutputMode.Sum: one sum over the micro-batches for each replica
            losses = losses / self.batch.gradient_accumulation
        # Otherwise one loss per micro-batch: [device iteration][accumulation][replica].
        means = losses.reshape(iterations, -1).mean(dim=1)
        (all_means,) = self.gather(means.unsqueeze(0))
        num_samples = len(batch.images) * self.launch.world_size
        return StepOutput(all_means.mean(dim=0), None, num_samples)

    def _inputs(self, batch: Batch) -> List[Tensor]:
        """Return the inputs of the training graph."""
        per_update = self.local_batch.global_batch_size
        paths = self.drop_path.factors(self.updates, batch.indices, per_update)
        return [batch.images, batch.labels, *([] if paths is None else [paths])]

    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a host batch."""
        check_batch(batch, self.batch.eval_micro_batch_size)
        executor = self.graphs.inference(batch.images)
        logits: Tensor = guarded("scoring", executor, batch.images)
        return logits.float()

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        (flags,) = self.gather(torch.tensor([float(flag)]))
        return bool(flags.any())

    def gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Concatenate the rows of all processes, whose numbers may differ."""
        if not self.launch.has_others:
            return parts
        import horovod.torch as horovod

        horovod.init()
        return tuple(horovod.allgather(part) for part in parts)

    def state_dict(self) -> EngineState:
        """Return copies of weights, optimizer state and random state on the CPU."""
        state = self.graphs.rng_state
        rng = None if state is None else torch.tensor(state, dtype=torch.int64)
        weights = self.model.weights()  # reading a weight copies newer ones from the device
        slots = from_poptorch(self.optimizer.state_dict(), self._hub_names(), self.optimizer_kind)
        scalars = {"updates": float(self.updates), _RNG_IPUS: float(self._num_ipus())}
        return EngineState(weights, slots, self.optimizer_kind, scalars, rng)

    def load_state_dict(self, state: EngineState) -> None:
        """Load weights, optimizer state and random state, before or after compilation."""
        check_kind(state.optimizer_kind, self.optimizer_kind)
        check_trained(state.optimizer, self.model.hub_parameters())
        self.graphs.detach()  # the next attach sends what is loaded here
        self.model.load_weights(state.weights)
        self.updates = int(state.scalars.get("updates", 0))
        rng = state.rng
        if rng is not None and state.scalars.get(_RNG_IPUS) != self._num_ipus():
            logger.warning("the random state belongs to another number of IPUs and is not used")
            rng = None
        if state.optimizer:
            names = {hub: name for name, hub in self._hub_names().items()}
            slots = to_poptorch(state.optimizer, names, moment_dtypes(self.optimizer))
            groups = torch.optim.Optimizer.state_dict(self.optimizer)
            self.optimizer.load_state_dict({**slots, **groups})
        self.graphs.rng_state = None if rng is None else rng.tolist()

    def _num_ipus(self) -> int:
        """Return how many IPUs this process trains on; each has its own random generators."""
        return self.model.plan.num_stages * self.local_batch.replicas

    def _hub_names(self) -> Dict[str, str]:
        """Return hub names by parameter name in the wrapped model."""
        return {
            f"model.{name}": hub
            for (name, _), (hub, _) in zip(
                self.model.named_parameters(), self.model.hub_parameters()
            )
        }

    def device_stats(self) -> Dict[str, float]:
        """Return the host's peak memory, and the clock cycles of the last call if counted."""
        stats = {"perf/peak_memory_gib": process_peak_gib()}
        executor = self.graphs.training_executor
        if self.config.engine.log_cycles and executor is not None:
            stats["perf/ipu_cycles"] = float(executor.cycleCount())
        return stats

    def close(self) -> None:
        """End the loaders' processes, release the IPUs and make the model run on the host again."""
        for loader in self._loaders:
            loader.close()
        self.graphs.close()
        if self._scratch is not None:
            self._scratch.cleanup()
        if self.config.engine.weights == "fp16":
            self.model.float()
        compute_on_host(self.model)
