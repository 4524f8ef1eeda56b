"""IPUs: the stages as blocks of one PopTorch graph, stage i on IPU i.

Written from PopTorch's sources (../shared/reference/poptorch.md is the digest) and run on its real
Python front end; docs/ipu.md says what has been verified and what only hardware can tell.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor

from cxr_vit.config.ipu_rules import eval_layers, reserved_ipus
from cxr_vit.config.plans import BatchPlan, StagePlan
from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch, ChestXrayDataset, collate
from cxr_vit.data.sampler import EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.engines.base import (
    Engine,
    EngineState,
    StepOutput,
    check_batch,
    leave_the_process_group,
    process_peak_gib,
    with_user_errors,
)
from cxr_vit.engines.ipu.graphs import (
    ExecutableCache,
    IpuGraphs,
    cast_weights_to_input,
    graph_shape,
)
from cxr_vit.engines.ipu.loader import LoaderProcessDataset, RowSampler, start_fork_server
from cxr_vit.engines.ipu.optimizer import from_poptorch, to_poptorch
from cxr_vit.engines.ipu.options import (
    inference_options,
    moment_dtypes,
    poptorch_optimizer,
    training_options,
)
from cxr_vit.engines.optim import check_kind
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.model.stages import StagedViT

__all__ = ["PopTorchEngine"]


logger = logging.getLogger(__name__)

#: How many IPUs a stored random generator is of.
_RNG_IPUS = "rng_ipus"


class PopTorchEngine(Engine):
    """Train and score on IPUs.

    Parameters
    ----------
    model
        The staged model, built `for_ipu`.
    config
        The configuration; `check_ipu` must have passed.
    reason
        Why this engine was chosen, in words.
    offline
        Only compile, for `engine.ipu_version`, without an IPU.
    """

    def __init__(
        self,
        model: StagedViT,
        config: Config,
        batch: BatchPlan,
        launch: Launch,
        *,
        reason: str,
        offline: bool = False,
    ) -> None:
        super().__init__(batch)
        self.config = config
        self.reason = reason
        self.place = "IPU"
        self.precision = "fp16" if config.engine.precision == "auto" else config.engine.precision
        # popdist connects the processes of poprun; without it this process computes all replicas.
        self.by_poprun = launch.local_replicas is not None
        self.launch = launch if self.by_poprun else Launch()
        self.is_main = self.launch.is_main
        self.own = self.launch.own(batch.replicas)
        self.local_batch = replace(batch, replicas=len(self.own))
        self.model = model.half() if config.engine.weights == "fp16" else model
        dtype = torch.float16 if self.precision == "fp16" else torch.float32
        if any(parameter.dtype != dtype for parameter in self.model.parameters()):
            cast_weights_to_input(self.model)
        self.model.compute_in(dtype)
        self.optimizer = poptorch_optimizer(self.model.hub_parameters(), config)
        self.optimizer_kind = f"poptorch.{type(self.optimizer).__name__}"
        scaling = config.optim.loss_scaling
        if scaling == "auto" or config.optim.name == "sgd":
            # An automatic scale has a state of its own; SGD's velocity carries a fixed one.
            self.optimizer_kind += f" with loss scaling {scaling}"
        self.updates = 0
        self.graphs = self._build_graphs(offline)
        self._rng: Optional[Tensor] = None
        self._loaders: List[Any] = []

    def _build_graphs(self, offline: bool) -> IpuGraphs:
        """Make both graphs' options and hand all to PopTorch."""
        config = self.config
        cache = ExecutableCache(config.engine.executable_cache, graph_shape(config, self.model))
        path = None if cache.path is None else str(cache.path)
        settings: Dict[str, Any] = {
            "precision": self.precision,
            "cache": path,
            "offline": offline,
            "by_poprun": self.by_poprun,
        }
        return IpuGraphs(
            self.model,
            self.model.recut(StagePlan.from_list(eval_layers(config))),
            self.optimizer,
            training_options=training_options(config, **settings),
            inference_options=inference_options(config, **settings),
            keep=self._kept_layers(),
            cache=cache,
            offline=offline,
        )

    def describe(self) -> str:
        """Say in a line what computes, in which arithmetic, and why."""
        replicas = self.batch.replicas
        stages = max(self.model.plan.num_stages, len(eval_layers(self.config)))
        reserved = reserved_ipus(stages, replicas)
        weights = f"{self.precision} with {self.config.engine.weights} weights"
        count = self.launch.world_size
        processes = f" by {count} processes" if count > 1 else ""
        return (
            f"poptorch engine on {stages * replicas} IPUs ({replicas} x {stages} stages"
            f"{processes}, {reserved} reserved) in {weights} ({self.reason}; choose with"
            " engine.name=torch|poptorch, engine.precision=fp16|fp32, engine.weights=fp32|fp16)"
        )

    def facts(self) -> Dict[str, Any]:
        """Return what `describe` tells as fields."""
        return {
            "name": "poptorch",
            "device": "IPU",
            "precision": self.precision,
            "processes": self.launch.world_size,
            "replicas": self.batch.replicas,
            "stages": self.model.plan.num_stages,
        }

    # Data

    def loader(
        self,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        training: bool,
    ) -> Iterable[Batch]:
        """Return PopTorch's loader of the host batches, all of them full.

        Raises
        ------
        ConfigError
            If the steps left are no whole number of host calls.
        """
        import poptorch

        if isinstance(sampler, TrainingSampler):
            self._check_whole_calls(sampler)
        batch, local = self.batch, self.local_batch
        host_batch = local.host_batch_size if training else local.eval_host_batch_size
        micro_batch = batch.micro_batch_size if training else batch.eval_micro_batch_size
        draws = ReplicaSampler(
            sampler,
            host_batch_size=batch.host_batch_size if training else batch.eval_host_batch_size,
            micro_batch_size=micro_batch,
            replicas=batch.replicas,
            own=self.own,
        )
        workers = self.config.data.num_workers
        # A validation is over sooner than an asynchronous loader's process has started.
        mode = self.config.engine.loader_mode if training else "sync"
        more: Dict[str, Any] = {}
        if mode != "sync":
            start_fork_server()
            # Else the process would go round once more at the end, for nobody.
            more["async_options"] = {"load_indefinitely": False}
            if workers > 0:
                # Else they would be another server's children, and outlive the loader's process.
                more["multiprocessing_context"] = "fork"
        if mode == "async_rebatched":
            more["rebatched_worker_size"] = -(-host_batch // max(1, workers))
        make_loader = partial(
            poptorch.DataLoader,
            self.graphs.training_options if training else self.graphs.inference_options,
            LoaderProcessDataset(dataset),
            batch_size=micro_batch,
            sampler=RowSampler(draws, batch_size=host_batch),
            num_workers=workers,
            persistent_workers=False,  # the samples come by once
            collate_fn=collate,
            worker_init_fn=leave_the_process_group,
            auto_distributed_partitioning=False,
            mode=_loader_mode(mode),
            **more,
        )
        loader = self.graphs.guarded("starting the loader", make_loader)
        self._loaders.append(loader)
        return with_user_errors(self._batches(loader, mode))

    def _check_whole_calls(self, sampler: TrainingSampler) -> None:
        left, iterations = sampler.total_steps - sampler.start_step, sampler.device_iterations
        if left % iterations:
            raise ConfigError(
                f"{left} steps are left of {sampler.total_steps}, no multiple of"
                f" batch.device_iterations={iterations}: a graph has one shape. Set"
                " batch.device_iterations to what the run began with, or to 1."
            )

    def _batches(self, loader: Any, mode: str) -> Iterator[Batch]:
        """Pass batches on (an asynchronous loader gives lists); end its process in any case."""
        try:
            for images, labels, indices in loader:
                # The buffers are used again for the next batch; the images are not kept.
                yield Batch(images, labels.clone(), indices.clone())
        except AssertionError as error:
            if mode == "sync":
                raise
            # All that PopTorch says when its loader's process ends.
            raise DataError(
                "the loader's own process ended; what it said stands above."
                " engine.loader_mode=sync reads in this process and says it in a line."
            ) from error
        finally:
            loader.terminate()
            self._loaders.remove(loader)

    # Computation

    def compile(self, example: Batch) -> float:
        """Compile both graphs, inference first: training then keeps the device."""
        check_batch(example, self.local_batch.global_batch_size)
        start = time.perf_counter()
        size = self.local_batch.eval_host_batch_size
        self.graphs.inference(example.images.new_zeros(size, *example.images.shape[1:]))
        self._training(example)
        return time.perf_counter() - start

    def _training(self, batch: Batch) -> Any:
        """Return the training graph, attached; a restored random generator goes in once."""
        fresh = self.graphs.trained is None
        executor = self.graphs.training(batch.images, batch.labels)
        if fresh:
            self._restore_rng()
        return executor

    def _kept_layers(self) -> List[int]:
        pipeline, plan = self.config.pipeline, self.model.plan
        if pipeline.execution == "sharded":
            return []
        return [layer for kept in plan.kept_layers(pipeline.recompute) for layer in kept]

    def train_step(self, batch: Batch, *, lr: float) -> StepOutput:
        """Make the weight updates of one host batch."""
        check_batch(batch, self.local_batch.global_batch_size)
        executor = self._training(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        executor.setOptimizer(self.optimizer)
        losses = self.graphs.guarded("training", executor, batch.images, batch.labels)
        iterations = self.local_batch.device_iterations
        self.updates += iterations
        # [device iteration][accumulation][replica], one loss a micro-batch
        means = losses.float().reshape(iterations, -1).mean(dim=1)
        num_samples = len(batch.images) * self.launch.world_size
        (every,) = self.gather(means.unsqueeze(0))
        return StepOutput(every.mean(dim=0), None, num_samples)

    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a host batch."""
        check_batch(batch, self.batch.eval_micro_batch_size)
        executor = self.graphs.inference(batch.images)
        logits: Tensor = self.graphs.guarded("scoring", executor, batch.images)
        return logits.float()

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        (flags,) = self.gather(torch.tensor([float(flag)]))
        return bool(flags.any())

    def gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Concatenate the rows of all processes; they may have unequal numbers of them."""
        if not self.launch.has_others:
            return parts
        import horovod.torch as horovod

        horovod.init()
        return tuple(horovod.allgather(part) for part in parts)

    # State

    def state_dict(self) -> EngineState:
        """Return copies of weights, optimizer state and random generator, on the CPU."""
        if self.graphs.trained is not None:
            self._rng = torch.tensor(self.graphs.trained.rng_state, dtype=torch.int64)
        weights = self.model.weights()  # brings them to the host if the device has newer ones
        slots = from_poptorch(self.optimizer.state_dict(), self._hub_names(), self.optimizer_kind)
        scalars = {"updates": float(self.updates), _RNG_IPUS: float(self._num_ipus())}
        return EngineState(weights, slots, self.optimizer_kind, scalars, self._rng)

    def load_state_dict(self, state: EngineState) -> None:
        """Take up weights, optimizer state and random generator, before or after compiling."""
        check_kind(state.optimizer_kind, self.optimizer_kind)
        self.graphs.detach()  # to attach is to send what is loaded here
        self.model.load_weights(state.weights)
        self.updates = int(state.scalars.get("updates", 0))
        self._rng = state.rng
        if state.rng is not None and state.scalars.get(_RNG_IPUS) != self._num_ipus():
            logger.warning("the random generator is of another number of IPUs: it starts anew")
            self._rng = None
        if state.optimizer:
            names = {hub: name for name, hub in self._hub_names().items()}
            theirs = to_poptorch(state.optimizer, names, moment_dtypes(self.config))
            groups = torch.optim.Optimizer.state_dict(self.optimizer)
            self.optimizer.load_state_dict({**theirs, **groups})
        self._restore_rng()

    def _restore_rng(self) -> None:
        if self.graphs.trained is not None and self._rng is not None:
            self.graphs.trained.rng_state = self._rng.tolist()

    def _num_ipus(self) -> int:
        """Return how many IPUs this process trains on: each has random generators of its own."""
        return self.model.plan.num_stages * self.local_batch.replicas

    def _hub_names(self) -> Dict[str, str]:
        """Return the wrapped model's parameter names -> hub names."""
        return {
            f"model.{name}": hub
            for (name, _), (hub, _) in zip(
                self.model.named_parameters(), self.model.hub_parameters()
            )
        }

    def device_stats(self) -> Dict[str, float]:
        """Return the host's peak memory, and the clock cycles of the last call if counted."""
        stats = {"perf/peak_memory_gib": process_peak_gib()}
        if self.config.engine.log_cycles and self.graphs.trained is not None:
            stats["perf/ipu_cycles"] = float(self.graphs.trained.cycleCount())
        return stats

    def close(self) -> None:
        """End loader processes and give the IPUs back; the model is a plain one again."""
        for loader in list(self._loaders):
            loader.terminate()
        self.graphs.close()


def _loader_mode(mode: str) -> Any:
    import poptorch

    return {
        "sync": poptorch.DataLoaderMode.Sync,
        "async": poptorch.DataLoaderMode.Async,
        "async_rebatched": poptorch.DataLoaderMode.AsyncRebatched,
    }[mode]
