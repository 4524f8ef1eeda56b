"""The sections that lay a run on devices: the pipeline's cut and the engine.

A field marked (IPU) is read by the poptorch engine alone, one marked (pipeline engine) by that one.
Types are read at run time, also by Python 3.8. Imports no torch.
"""

from typing import Any, Dict, List, Optional, Union

from pydantic import AfterValidator, Field
from typing_extensions import Annotated, Literal

from cxr_vit.config.popart import typed_options
from cxr_vit.config.section import PathText, Section, Words

__all__ = ["EngineSection", "PipelineSection"]

LayerCounts = List[Annotated[int, Field(ge=0)]]
Proportion = Annotated[float, Field(gt=0, le=1)]
#: What is kept of a stage's forward pass for its backward pass.
RecomputeWord = Literal["every_layer", "stage_inputs"]
RecomputeChoice = Union[RecomputeWord, List[Annotated[int, Field(ge=0)]]]
RecomputeText = Words(
    "every_layer, stage_inputs, or a list with an item a stage: one of these words, or a list of"
    " layers, integers >= 0"
)


class PipelineSection(Section):
    """How the layers are cut into stages."""

    layers_per_stage: LayerCounts = Field(
        [3, 3, 3, 3],
        min_length=1,
        description="encoder layers of each stage; embedding on the first, head on the last",
    )
    eval_layers_per_stage: Optional[LayerCounts] = Field(
        None, min_length=1, description="the cut in evaluation; null: as in training (IPU)"
    )
    execution: Literal["pipelined", "sharded"] = Field(
        "pipelined",
        description="training: stages at work on different micro-batches, or one after another"
        " (IPU)",
    )
    eval_execution: Literal["pipelined", "sharded"] = Field(
        "pipelined", description="the same in evaluation (IPU)"
    )
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = Field(
        "1f1b",
        description="the order of the stages' work in training: all forward passes before all"
        " backward passes, one forward and one backward in turn (which holds fewer activations),"
        " or that with several stages in each process (pipeline engine)",
    )
    recompute: Annotated[Union[RecomputeWord, List[RecomputeChoice]], RecomputeText] = Field(
        "every_layer",
        description="pipelined: layers whose output is kept for the backward pass, the rest is"
        " computed again from there; a stage's inputs are always kept (IPU)",
    )
    available_memory_proportion: Optional[Union[Proportion, List[Proportion]]] = Field(
        None,
        description="part of an IPU's memory that one matrix product may take for its working"
        " data, or one number a stage; null: PopLibs' own (IPU)",
    )


class EngineSection(Section):
    """What computes, and in which arithmetic."""

    name: Literal["auto", "poptorch", "torch", "pipeline"] = Field(
        "auto",
        description="the back end: IPUs; one torch device (a process under torchrun); a stage a"
        " process under torchrun; auto: IPUs where they answer, else a GPU, else the CPU",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="the device of the torch and pipeline engines"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="arithmetic of the forward pass; auto: bf16 where the processor has it,"
        " else fp32 (fp16 on older GPUs and on IPUs)",
    )
    timeout_s: float = Field(
        600,
        gt=0,
        description="under torchrun: a process that waits longer for another ends the run, seconds",
    )
    weights: Literal["fp32", "fp16"] = Field(
        "fp32", description="dtype the weights are held and updated in (IPU)"
    )
    partials: Literal["fp32", "fp16"] = Field(
        "fp16", description="dtype of partial sums; fp32 arithmetic always has fp32 ones (IPU)"
    )
    stochastic_rounding: bool = Field(
        True, description="round fp16 up or down by chance in training, never in evaluation (IPU)"
    )
    floating_point_exceptions: bool = Field(
        False, description="stop at the first NaN or overflow on the device (IPU)"
    )
    optimizer_state_on_chip: bool = Field(
        True, description="hold the moments in the IPU's own memory, not in Streaming Memory (IPU)"
    )
    replicated_tensor_sharding: bool = Field(
        False, description="each replica holds its share of the moments only (IPU)"
    )
    loader_mode: Literal["sync", "async", "async_rebatched"] = Field(
        "sync",
        description="where host batches of training are put together: in the main process, ahead"
        " of time in another one, or there from smaller pieces (IPU)",
    )
    prefetch_depth: int = Field(
        1, ge=1, description="host batches streamed to the device ahead of need (IPU)"
    )
    executable_cache: Optional[PathText] = Field(
        "${POPTORCH_CACHE_DIR:-exe_cache}",
        validate_default=True,
        description="folder of compiled graphs, a subfolder a configuration; null: none (IPU)",
    )
    ipu_version: Literal["mk2", "c600"] = Field(
        "mk2", description="the IPU that --compile-only compiles for; Bow counts as mk2 (IPU)"
    )
    profile_dir: Optional[PathText] = Field(
        None, description="write PopVision's reports there (IPU)"
    )
    log_cycles: bool = Field(
        False, description="count the device's clock cycles: perf/ipu_cycles (IPU)"
    )
    synthetic_data: bool = Field(
        False,
        description="the device makes up its own input, to time it without the host: losses and"
        " scores then mean nothing (IPU)",
    )
    popart_options: Annotated[
        Dict[str, Any],
        AfterValidator(typed_options),
        Words("PopART session options, name: value"),
    ] = Field(default={}, description="set last, over what the keys above set (IPU)")
