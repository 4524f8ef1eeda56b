"""Which operation runs where, which loss counts, and fp16 on a CPU: torch modes around a model."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Set, Tuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .errors import compiler_error
from .inspection import config

#: Losses that PopTorch marks itself.
_LOSSES = frozenset(
    [
        torch.binary_cross_entropy_with_logits,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cosine_embedding_loss,
        F.cross_entropy,
        F.ctc_loss,
        F.hinge_embedding_loss,
        F.kl_div,
        F.l1_loss,
        F.margin_ranking_loss,
        F.mse_loss,
        F.nll_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
        F.triplet_margin_loss,
    ]
)

#: Without a device argument, PopTorch places the result on the IPU.
_FACTORIES = frozenset(
    [
        torch.arange,
        torch.empty,
        torch.full,
        torch.full_like,
        torch.linspace,
        torch.logspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.range,
        torch.tensor,
        torch.zeros,
        torch.zeros_like,
    ]
)

_current: Optional[Trace] = None
_marking: Optional[ForwardMode] = None
_on_ipu = False


def current() -> Any:
    """Return the trace in progress, or None outside compilation."""
    return _current


def is_running_on_ipu() -> bool:
    return _on_ipu


def mark_loss(loss: torch.Tensor) -> None:
    if _marking is not None:
        _marking.marks.append(loss)


class Trace:
    """One compilation: its blocks in order, and their operations."""

    def __init__(self, parameters: Dict[str, torch.Tensor]) -> None:
        self.blocks: List[Tuple[int, int, int]] = []
        self.stage, self.ipu = 0, 0
        self.switches = 0
        self.used_ipus: Set[int] = set()
        self.ops: List[Tuple[str, int, int]] = []
        self.placements: Dict[str, List[Tuple[int, int]]] = {}
        self.parameters_used: Dict[str, Set[Tuple[int, int]]] = {}
        self.forced_to_ipu: List[str] = []
        self.checkpoints = 0
        self.pipelined = True
        self._last_ipu = 0
        self._names = {tensor.data_ptr(): name for name, tensor in parameters.items()}

    def begin_block(self, stage: int, phase: int, ipu: int) -> None:
        if config().check_blocks and self.pipelined and self.blocks and stage < self.stage:
            raise compiler_error(
                f"pipeline stage ids must not decrease: stage {stage} (IPU {ipu}) begins after "
                f"stage {self.stage} (PopART would fail to schedule this pipeline)"
            )
        self.blocks.append((stage, phase, ipu))
        self.stage, self.ipu = stage, ipu
        self.switches += ipu != self._last_ipu
        self._last_ipu = ipu

    def end_block(self) -> None:
        self.ipu = -1

    def place(self, module_name: str) -> None:
        places = self.placements.setdefault(module_name, [])
        if (self.stage, self.ipu) not in places:
            places.append((self.stage, self.ipu))

    def operation(self, name: str, args: Any) -> None:
        if name == "_local_scalar_dense":
            raise compiler_error(
                "aten::item is only supported in eager mode, but you're compiling a model: its"
                " value is not known yet"
            )
        tensors = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, torch.Tensor)]
        if self.ipu < 0:
            if config().check_blocks and tensors and name != "detach":
                raise compiler_error("No active Block, all the ops must belong to a Block")
            return
        self.used_ipus.add(self.ipu)
        self.ops.append((name, self.stage, self.ipu))
        for tensor in tensors:
            parameter = self._names.get(tensor.data_ptr())
            if parameter is not None and name != "detach":
                self.parameters_used.setdefault(parameter, set()).add((self.stage, self.ipu))


class ForwardMode(TorchFunctionMode):
    """Collects the marked losses.

    Weights are not cast to the type of their input: PopTorch does so for some layers only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks: List[torch.Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _current is not None:
            if function is torch.Tensor.cpu:
                raise compiler_error('Illegal move to CPU (via .to("cpu") or .cpu())')
            if function in _FACTORIES and "device" not in kwargs:
                _current.forced_to_ipu.append(function.__name__)
        result = function(*args, **kwargs)
        if function in _LOSSES and isinstance(result, torch.Tensor):
            self.marks.append(result)
        return result

    def __enter__(self) -> ForwardMode:
        global _marking, _on_ipu
        _marking, _on_ipu = self, True
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        global _marking, _on_ipu
        _marking, _on_ipu = None, False
        return super().__exit__(*exception)

    def loss(self) -> torch.Tensor:
        """Return the one marked loss that is no input of another marked loss."""
        if not self.marks:
            raise compiler_error("Couldn't find a loss in graph!")
        final = [mark for mark in self.marks if not any(_feeds(mark, o) for o in self.marks)]
        if len(final) != 1:
            raise compiler_error(
                "Multiple independent losses found in graph. Graph must have one final loss. Wrap"
                " final graph loss in poptorch.identity_loss."
            )
        return final[0]


def _feeds(loss: torch.Tensor, other: torch.Tensor) -> bool:
    if other is loss or loss.grad_fn is None or loss.grad_fn is other.grad_fn:
        return False
    seen: Set[Any] = set()
    todo = [other.grad_fn]
    while todo:
        node = todo.pop()
        if node is loss.grad_fn:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return False


# Kept, because torch takes ten milliseconds to make the error.
_missing_in_half: Set[Any] = set()


class HalfMode(TorchDispatchMode):
    """Runs fp16 operations that torch lacks on the CPU in fp32."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.before(function, args)
        known = config().half_fallback and function in _missing_in_half
        if not known or not _has_half(args):
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if not config().half_fallback or "not implemented for 'Half'" not in str(error):
                    raise
                _missing_in_half.add(function)
        result = tree_map(_down, function(*tree_map(_up, args), **tree_map(_up, kwargs)))
        if function._schema.is_mutable:
            # In-place operation: the result was written to a copy.
            return args[0].copy_(result)
        return result

    def before(self, function: Any, args: Any) -> None:
        pass


class TraceMode(HalfMode):
    """Records each operation in the trace in progress."""

    def before(self, function: Any, args: Any) -> None:
        if _current is not None:
            _current.operation(getattr(function, "_overloadpacket", function).__name__, args)


def _has_half(args: Any) -> bool:
    return any(
        isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float16
        for leaf in tree_flatten(args)[0]
    )


def _up(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float16:
        return leaf.float()
    return torch.float32 if leaf is torch.float16 else leaf


def _down(leaf: Any) -> Any:
    return leaf.half() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 else leaf


class Tracing:
    """Sets the trace in progress; preserves the state of the host's random generator."""

    def __init__(self, trace: Trace, strategy: Any) -> None:
        self._trace, self._strategy = trace, strategy
        self._random = torch.random.fork_rng(devices=[])
        # Also under no_grad on the host: losses are distinguished by their graph.
        self._grad = torch.enable_grad()
        self.forward, self._dispatch = ForwardMode(), TraceMode()

    def __enter__(self) -> ForwardMode:
        global _current
        self._random.__enter__()
        self._grad.__enter__()
        self._trace.pipelined = self._strategy.backendOptions()["execution_mode"] == 0
        self._strategy.onStartTracing()
        self.forward.__enter__()
        self._dispatch.__enter__()
        _current = self._trace
        return self.forward

    def __exit__(self, *exception: Any) -> None:
        global _current
        _current = None
        self._dispatch.__exit__(*exception)
        self.forward.__exit__(*exception)
        self._strategy.onEndTracing()
        self._grad.__exit__(*exception)
        self._random.__exit__(*exception)
