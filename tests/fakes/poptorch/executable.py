"""The result of a compilation: a private copy of the model that runs micro-batch by micro-batch."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from . import device
from .cache import read_or_write
from .device_optimizer import DeviceOptimizer
from .enums import MeanReductionStrategy, OutputMode, ReductionType
from .errors import compiler_error
from .inspection import log
from .session_options import check_options
from .structure import tensors_of
from .tracing import ForwardMode, HalfMode, Trace

_PIPELINED = 0


class Executable:
    """A compiled model.

    Parameters
    ----------
    model
        The device's copy of the model.
    trace
        Which operation ran where.
    inputs
        The `Arguments` of a whole call, for their structure.
    options
        The dictionary of all options.
    training
        Whether it updates the weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        trace: Trace,
        inputs: Any,
        options: Dict[str, Any],
        training: bool,
    ) -> None:
        self.options = {k: v for k, v in options.items() if k != "compilation_progress_bar_fn"}
        self.model, self.training, self.inputs = model, training, inputs
        self.blocks, self.placements, self.ops = trace.blocks, trace.placements, trace.ops
        self.parameters_used, self.checkpoints = trace.parameters_used, trace.checkpoints
        self.forced_to_ipu = trace.forced_to_ipu
        self.used_ipus = sorted(trace.used_ipus)
        # Module name -> whether it was in training mode when it was traced.
        self.modes = {name or "<root>": part.training for name, part in model.named_modules()}
        self.anchors = list(options["anchored_tensors"].values())
        self.D = options["device_iterations"]
        self.A = options["gradient_accumulation"]
        self.R = options["replication_factor"]
        self.forward_stages = trace.switches + 1
        self.pipeline_stages = 2 * self.forward_stages - 1 if training else self.forward_stages
        self.optimizer: Any = None
        self.attached = False
        self.runs, self.cycles = 0, 0
        self.micro_batch_rows: List[Tuple[int, int, int, int]] = []
        self.seed = options.get("random_seed", 0)
        self.rng = torch.Generator().manual_seed(self.seed).get_state()
        self._check()
        self.cache_file, self.cache_hit = read_or_write(self)
        if options["connection_type"] == 0:
            self.attach()
        elif options["connection_type"] == 1:
            device.check_present(self.num_ipus, self.options)

    def _check(self) -> None:
        check_options(self.options)
        if not self.used_ipus:
            raise compiler_error(
                "Your compiled model is empty (All the operations have been optimised out)"
            )
        used = max(len(self.used_ipus), self.used_ipus[-1] + 1) * self.R
        self.num_ipus = device.number_of_ipus(used, self.options)
        if self.options["execution_mode"] == _PIPELINED:
            self._check_pipeline()
        every_n = self.options["output_mode"] == OutputMode.EveryN
        if every_n and self.D % self.options["output_return_period"]:
            raise compiler_error("Return period must be a factor of the number of batches per step")

    def _check_pipeline(self) -> None:
        stages = self.pipeline_stages
        if self.training and stages > self.A:
            raise compiler_error(
                "poptorch.Options().Training.gradientAccumulation must be greater than or equal to"
                f" the number of pipeline stages ({stages}) when using"
                " poptorch.PipelinedExecution. Please note that a model with"
                f" {self.forward_stages} pipeline stages in PopTorch will have an additional"
                f" {self.forward_stages - 1} stages when training."
            )
        if not self.training and stages > self.D:
            raise compiler_error(
                "poptorch.Options().deviceIterations must be greater than or equal to the number"
                f" of pipeline stages ({stages}) when using PopTorch.PipelinedExecution."
            )
        for name, places in self.parameters_used.items():
            if len({ipu for _, ipu in places}) > 1:
                log().record("warning", f"parameter {name} used on several IPUs {sorted(places)}")

    def attach(self) -> None:
        if self.attached:
            raise compiler_error("Already attached to a device")
        device.acquire(self, self.num_ipus, self.options)
        self.attached = True

    def detach(self) -> None:
        if not self.attached:
            raise compiler_error("The device has already been detached")
        device.release(self)
        self.attached = False

    def free(self) -> None:
        device.release(self)
        self.attached = False

    def weights(self) -> Dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def read_weights(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._copy(names, tensors, to_device=False)

    def write_weights(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._copy(names, tensors, to_device=True)

    def _copy(self, names: Sequence[str], tensors: Sequence[Tensor], to_device: bool) -> None:
        own = self.weights()
        with torch.no_grad():
            for name, tensor in zip(names, tensors):
                # Integer buffers are constants of the compiled graph.
                if name in own and own[name].is_floating_point():
                    if to_device:
                        own[name].data.copy_(tensor.data)
                    else:
                        tensor.data.copy_(own[name].data)

    def set_rng(self, seed: int, state: Sequence[int]) -> None:
        self.seed = seed
        if state:
            self.rng = torch.tensor(list(state), dtype=torch.uint8)
        else:
            self.rng = torch.Generator().manual_seed(seed).get_state()

    def set_optimizer(self, dictionary: Dict[str, Any], groups: Sequence[Sequence[str]]) -> None:
        own = dict(self.model.named_parameters())
        self.optimizer = DeviceOptimizer(
            dictionary, [{name: own[name] for name in group} for group in groups]
        )

    def run(self, inputs: Sequence[Tensor]) -> List[Tensor]:
        """Run [device iteration][accumulation][replica]; return the tensors of the outputs."""
        host = torch.get_rng_state()
        torch.set_rng_state(self.rng)
        try:
            with HalfMode():
                results = self._run(_on_device(inputs))
        finally:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(host)
        self.runs += 1
        self.cycles = 1000 * len(results)
        return [self._output([one[k] for one in results]) for k in range(len(results[0]))]

    def _run(self, inputs: Sequence[Tensor]) -> List[List[Tensor]]:
        total = self.D * self.A * self.R
        results: List[List[Tensor]] = []
        self.micro_batch_rows = []
        for iteration in range(self.D):
            gradients = _Accumulator(self)
            for accumulation in range(self.A):
                for replica in range(self.R):
                    number = len(results)
                    self.micro_batch_rows.append((iteration, accumulation, replica, number))
                    rows = [_rows(tensor, number, total) for tensor in inputs]
                    results.append(self._micro_batch(rows))
                    if self.training:
                        gradients.take()
            if self.training:
                with torch.no_grad():
                    self.optimizer.step(gradients.reduced())
        return results

    def _micro_batch(self, tensors: List[Tensor]) -> List[Tensor]:
        args, kwargs = self.inputs.with_tensors(tensors)
        with torch.set_grad_enabled(self.training), ForwardMode() as forward:
            output = self.model(*args, **kwargs)
            if self.training:
                loss = forward.loss().sum() * self.optimizer.loss_scaling
        if self.training:
            loss.backward()
        return [_to_host(tensor) for tensor in tensors_of(output)]

    def _output(self, sequence: List[Tensor]) -> Tensor:
        """Select from one tensor per micro-batch what the output mode returns."""
        mode, replicas = self.options["output_mode"], self.R
        if mode == OutputMode.All:
            chosen = sequence
        elif mode == OutputMode.Final:
            chosen = sequence[-replicas:]
        elif mode == OutputMode.Sum:
            chosen = [
                torch.stack(sequence[replica::replicas]).sum(0).to(sequence[0].dtype)
                for replica in range(replicas)
            ]
        else:
            size, period = self.A * replicas, self.options["output_return_period"]
            chosen = [
                tensor
                for iteration in range(period - 1, self.D, period)
                for tensor in sequence[iteration * size : (iteration + 1) * size]
            ]
        if len(chosen) == 1:
            return chosen[0]
        return torch.cat([tensor.reshape(1) if tensor.dim() == 0 else tensor for tensor in chosen])


class _Accumulator:
    """Accumulates the gradients of one update, summed or averaged, in the accumulator's dtype."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        options = executable.options
        self._mean = options["accumulation_and_replication_reduction_type"] == ReductionType.Mean
        strategy = options["meanAccumulationAndReplicationReductionStrategy"]
        self._running = self._mean and strategy == MeanReductionStrategy.Running
        self._count = 0
        self._sums: Dict[str, Tensor] = {}

    def take(self) -> None:
        """Add the gradients of the last micro-batch."""
        self._count += 1
        dtype = self._executable.optimizer.accumulator_dtype
        for name, weight in self._executable.model.named_parameters():
            if weight.grad is None:
                continue
            gradient, weight.grad = weight.grad.to(dtype), None
            if name not in self._sums:
                gradient = gradient / self._count if self._running else gradient
                self._sums[name] = gradient
            elif self._running:
                self._sums[name] += (gradient - self._sums[name]) / self._count
            else:
                self._sums[name] += gradient

    def reduced(self) -> Dict[str, Tensor]:
        """Return name -> gradient in fp32, without the loss scaling."""
        divisor = self._executable.optimizer.loss_scaling
        if self._mean and not self._running:
            divisor *= self._count
        return {name: total.float() / divisor for name, total in self._sums.items()}


def _on_device(inputs: Sequence[Tensor]) -> List[Tensor]:
    wide = (torch.float64, torch.bfloat16)
    return [tensor.float() if tensor.dtype in wide else tensor for tensor in inputs]


def _rows(tensor: Tensor, number: int, total: int) -> Tensor:
    """Return the rows of micro-batch `number`."""
    if tensor.dim() == 0:
        return tensor
    size = len(tensor) // total
    return tensor.narrow(0, number * size, size)


def _to_host(tensor: Tensor) -> Tensor:
    narrower = {torch.int64: torch.int32, torch.float64: torch.float32}
    return tensor.detach().clone().to(narrower.get(tensor.dtype, tensor.dtype))
