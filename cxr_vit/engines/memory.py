"""Explain a lack of memory by the batch sizes that need less of it."""

from __future__ import annotations

import contextlib
import re
from typing import Iterator, Optional

import torch

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.errors import OutOfMemory

#: CUDA reports a lack of memory as a plain RuntimeError where it is not its own allocator that
#: fails: in a kernel's launch, or when cuBLAS or cuDNN allocate their working memory.
_CUDA_TEXT = re.compile(r"CUDA.*out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED")
_CPU_TEXT = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")


@contextlib.contextmanager
def explaining_out_of_memory(config: Config, *, training: bool) -> Iterator[None]:
    """Raise OutOfMemory, with a smaller batch to try, where CPU or GPU run out of memory.

    `training` is False in evaluation and prediction. Other errors pass.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        device = _exhausted_device(error)
        if device is None:
            raise
        message = _training_message if training else _evaluation_message
        raise OutOfMemory(message(config, device)) from error


def _exhausted_device(error: Exception) -> Optional[str]:
    """Return the device without memory, or None if the error is another one."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or _CUDA_TEXT.search(text):
        return "cuda"
    if isinstance(error, MemoryError) or _CPU_TEXT.search(text):  # numpy's is a MemoryError
        return "cpu"
    return None


def _training_message(config: Config, device: str) -> str:
    batch = BatchPlan.from_section(config.batch)
    tried = f"out of memory with batch.micro_batch_size={batch.micro_batch_size} on {device}."
    recomputes = config.pipeline.recompute not in (None, "none")
    if batch.micro_batch_size == 1:
        first = [] if recomputes else ["pipeline.recompute=every_layer"]
        return f"{tried} {_smaller_model(config, *first)}"
    samples = batch.micro_batch_size * batch.gradient_accumulation
    smaller = _largest_divisor(samples, at_most=batch.micro_batch_size // 2)
    accumulation = samples // smaller
    follows = (
        f" batch.gradient_accumulation={accumulation}"
        if config.batch.global_batch_size is None
        else f" (an accumulation of {accumulation})"
    )
    return (
        f"{tried} Keep the global batch of {batch.global_batch_size} with"
        f" batch.micro_batch_size={smaller}{follows}."
        f"{'' if recomputes else ' Or hold less: pipeline.recompute=every_layer.'}"
    )


def _evaluation_message(config: Config, device: str) -> str:
    size = config.batch.eval_micro_batch_size
    tried = f"out of memory in evaluation with batch.eval_micro_batch_size={size} on {device}."
    if size == 1:
        return f"{tried} {_smaller_model(config)}"
    return f"{tried} Use batch.eval_micro_batch_size={size // 2}: the scores do not depend on it."


def _largest_divisor(number: int, *, at_most: int) -> int:
    return next(size for size in range(at_most, 0, -1) if number % size == 0)


def _smaller_model(config: Config, *first: str) -> str:
    """Return the advice for a micro-batch that cannot be divided further."""
    ways = [*first, "a smaller data.image_size", "a smaller model.name"]
    if config.engine.precision in ("auto", "fp32"):
        ways.append("engine.precision=bf16")
    if config.engine.name == "pipeline":
        ways.append("more stages in pipeline.layers_per_stage")
    else:
        ways.append("the model's stages on several devices (engine.name=pipeline)")
    return f"Use {', '.join(ways[:-1])} or {ways[-1]}."
