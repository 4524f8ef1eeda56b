"""Errors of a lack of memory, raised by the libraries themselves where no GPU is needed."""

import numpy as np
import pytest
import torch

from cxr_vit.config.schema import Config
from cxr_vit.engines.memory import explaining_out_of_memory
from cxr_vit.errors import DataError, OutOfMemory

#: More than any machine has, and less than the size at which the libraries refuse the shape.
PETABYTES = 10**15


def message(fail, *, training=True, engine=None, **batch):
    config = Config(batch=batch, engine=engine or {})
    with pytest.raises(OutOfMemory) as caught, explaining_out_of_memory(config, training=training):
        fail()
    return str(caught.value)


def fail_in_torch():
    torch.empty(PETABYTES)


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [fail_in_torch, lambda: np.empty(PETABYTES), lambda: bytearray(PETABYTES)],
    ids=["torch", "numpy", "python"],
)
def test_every_librarys_error_is_explained(fail):
    assert message(fail, micro_batch_size=64, gradient_accumulation=2) == (
        "out of memory with batch.micro_batch_size=64 on cpu. Keep the global batch of 128 with"
        " batch.micro_batch_size=32 batch.gradient_accumulation=4. Or hold less:"
        " pipeline.recompute=every_layer."
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("Allocation on device 0 would exceed allowed memory."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 23.69 GiB total"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["type", "allocator", "kernel", "cublas"],
)
def test_errors_of_cuda_are_explained(error):
    assert " on cuda. " in message(failing(error), micro_batch_size=8)


def test_error_of_windows_is_explained():
    text = "[enforce fail at alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you"
    assert " on cpu. " in message(failing(RuntimeError(text)), micro_batch_size=8)


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "advice"),
    [
        (64, 1, "batch.micro_batch_size=32 batch.gradient_accumulation=2"),
        (9, 1, "batch.micro_batch_size=3 batch.gradient_accumulation=3"),
        (9, 4, "batch.micro_batch_size=4 batch.gradient_accumulation=9"),
        (7, 3, "batch.micro_batch_size=3 batch.gradient_accumulation=7"),
        (7, 1, "batch.micro_batch_size=1 batch.gradient_accumulation=7"),
        (2, 1, "batch.micro_batch_size=1 batch.gradient_accumulation=2"),
    ],
)
def test_advice_keeps_the_global_batch(micro_batch, accumulation, advice):
    batch = {"micro_batch_size": micro_batch, "gradient_accumulation": accumulation, "replicas": 2}
    expected = f"Keep the global batch of {2 * micro_batch * accumulation} with {advice}."
    assert expected in message(fail_in_torch, **batch)


def test_given_global_batch_needs_no_accumulation():
    text = message(fail_in_torch, micro_batch_size=16, global_batch_size=192, replicas=4)
    assert "batch of 192 with batch.micro_batch_size=8 (an accumulation of 6)." in text
    assert "batch.gradient_accumulation" not in text


def test_micro_batch_of_1_needs_a_smaller_model():
    assert message(fail_in_torch, micro_batch_size=1, gradient_accumulation=8) == (
        "out of memory with batch.micro_batch_size=1 on cpu. Use"
        " pipeline.recompute=every_layer, a smaller data.image_size, a smaller model.name,"
        " engine.precision=bf16 or the model's stages on several devices (engine.name=pipeline)."
    )


def test_recomputation_is_not_advised_twice():
    for size in (1, 4):
        config = Config(batch={"micro_batch_size": size}, pipeline={"recompute": "every_layer"})
        with pytest.raises(OutOfMemory) as caught, explaining_out_of_memory(config, training=True):
            fail_in_torch()
        assert "recompute" not in str(caught.value)


def test_advice_omits_what_is_set_already():
    engine = {"name": "pipeline", "precision": "bf16"}
    text = message(fail_in_torch, engine=engine, micro_batch_size=1)
    assert "more stages in pipeline.layers_per_stage" in text
    assert "engine." not in text


def test_evaluation_names_its_own_micro_batch():
    text = message(fail_in_torch, training=False, micro_batch_size=64, eval_micro_batch_size=33)
    assert text == (
        "out of memory in evaluation with batch.eval_micro_batch_size=33 on cpu. Use"
        " batch.eval_micro_batch_size=16: the scores do not depend on it."
    )
    smallest = message(fail_in_torch, training=False, eval_micro_batch_size=1)
    assert "Use a smaller data.image_size" in smallest


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("CUDA out of memory"),
        DataError("a.png: the image is not there."),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explaining_out_of_memory(Config(), training=True):
        raise error
    assert caught.value is error


def test_advice_of_an_evaluation_within_a_training_stays():
    def evaluate():
        with explaining_out_of_memory(Config(batch={"eval_micro_batch_size": 8}), training=False):
            fail_in_torch()

    assert "Use batch.eval_micro_batch_size=4:" in message(evaluate, eval_micro_batch_size=2)
