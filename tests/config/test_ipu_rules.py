"""Rules of PopTorch and of the IPU."""

import re
from pathlib import Path
from typing import List

import pytest

from cxr_vit.config import load_config, read_config
from cxr_vit.config.ipu_rules import check_ipu, ipu_problems, ipu_warnings, reserved_ipus
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
VALID = ("batch.gradient_accumulation=7", "batch.eval_device_iterations=4")


def option(text):
    """Return an override with an option of PopTorch for the training graph."""
    return f"engine.poptorch_options={{training: {{{text}}}}}"


def problems(*overrides: str) -> List[str]:
    return [str(problem) for problem in ipu_problems(read_config([], [*VALID, *overrides]))]


def only_problem(*overrides: str) -> str:
    (message,) = problems(*overrides)
    return message


def test_valid_configuration_passes():
    assert problems() == []
    check_ipu(read_config([], VALID))


@pytest.mark.parametrize("name", ["vit_demo_ipu.yaml", "vit_pod4.yaml", "vit_pod16.yaml"])
def test_ipu_configurations_pass(name):
    assert ipu_problems(read_config([CONFIGS / name])) == []


def test_accumulation_message():
    assert only_problem("batch.gradient_accumulation=4").startswith(
        "batch.gradient_accumulation=4 is less than the 7 pipeline stages (2 x 4 IPUs - 1) that"
        " training over 4 IPUs has; PopTorch refuses it. Smallest legal value: 7."
    )


@pytest.mark.parametrize(("cut", "least"), [("[12]", 1), ("[6, 6]", 3), ("[4, 4, 4]", 5)])
def test_accumulation_limit_follows_the_number_of_ipus(cut, least):
    layers = f"pipeline.layers_per_stage={cut}"
    assert problems(layers, f"batch.gradient_accumulation={least}") == []
    if least > 1:
        message = only_problem(layers, f"batch.gradient_accumulation={least - 1}")
        assert f"Smallest legal value: {least}." in message


def test_problem_of_a_global_batch_suggests_a_global_batch():
    batch = ["batch.global_batch_size=32", "batch.micro_batch_size=4", "batch.replicas=2"]
    (problem,) = ipu_problems(read_config([], [VALID[1], *batch]))
    message = str(problem)
    assert message.startswith("batch.global_batch_size=32, an accumulation of 4,")
    assert "Smallest legal value: 56." in message  # 7 x 4 x 2


def test_sharded_execution_needs_no_minimum():
    assert problems("batch.gradient_accumulation=1", "pipeline.execution=sharded") == []
    assert problems("batch.eval_device_iterations=1", "pipeline.eval_execution=sharded") == []


def test_evaluation_needs_one_iteration_per_stage():
    message = only_problem("batch.eval_device_iterations=3")
    assert message.startswith("batch.eval_device_iterations=3 is less than the 4 pipeline stages")
    assert "Smallest legal value: 4." in message
    assert problems("batch.eval_device_iterations=2", "pipeline.eval_layers_per_stage=[6, 6]") == []


@pytest.mark.parametrize("key", ["layers_per_stage", "eval_layers_per_stage"])
def test_inner_stage_without_layers_is_refused(key):
    message = only_problem(f"pipeline.{key}=[4, 4, 0, 4]")
    assert message.startswith(f"pipeline.{key}=[4, 4, 0, 4] leaves IPU 2 without work")
    assert problems(f"pipeline.{key}=[0, 6, 6, 0]") == []


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["engine.replicated_tensor_sharding=true"], "engine.replicated_tensor_sharding=true"),
        (["engine.device=cpu"], "engine.device=cpu"),
        (["engine.precision=bf16"], "engine.precision=bf16"),
        (["engine.compile=layers"], "engine.compile=layers is torch.compile, which torch's"),
        (["engine.precision=fp32", "engine.weights=fp16"], "engine.weights=fp16"),
        (
            ["pipeline.available_memory_proportion=[0.1, 0.2]"],
            "pipeline.available_memory_proportion=[0.1, 0.2] has 2 numbers; there are 4 stages",
        ),
        (
            [
                "pipeline.layers_per_stage=[6, 6]",
                "pipeline.eval_layers_per_stage=[3, 3, 3, 3]",
                "pipeline.available_memory_proportion=[0.1, 0.2]",
            ],
            "pipeline.available_memory_proportion=[0.1, 0.2] has one number",
        ),
        (["model.hidden_act=gelu"], "model.hidden_act=gelu"),
        (["optim.name=lamb", "optim.max_grad_norm=1"], "optim.max_grad_norm=1.0"),
        (["optim.name=sgd", "optim.max_grad_norm=1"], "optim.max_grad_norm=1.0"),
        (
            ["optim.loss_scaling=auto", "optim.accumulator=fp16", "engine.precision=fp32"],
            "optim.loss_scaling=auto watches fp16 gradients",
        ),
        (
            ["optim.loss_scaling=auto"],
            "optim.loss_scaling=auto with optim.accumulator=fp32: automatic loss scaling expects",
        ),
        (["optim.second_moment=fp16"], "optim.second_moment=fp16 with optim.eps=1e-08: PopART"),
        (
            ["optim.name=lamb", "optim.second_moment=fp16", "optim.eps=1e-7"],
            "optim.second_moment=fp16 with optim.eps=1e-07: PopART",
        ),
        (
            ["optim.name=sgd", "optim.use_combined_accum=true", "engine.weights=fp16"],
            "optim.use_combined_accum=true with optim.accumulator=fp32 and optim.first_moment=fp32",
        ),
        (
            ["optim.name=sgd", "optim.nesterov=true"],
            "optim.nesterov=true with optim.use_combined_accum=false: PopART may clear the",
        ),
        (
            [
                "optim.name=sgd",
                "optim.use_combined_accum=true",
                "engine.optimizer_state_on_chip=false",
            ],
            "engine.optimizer_state_on_chip=false with optim.use_combined_accum=true: the tensor",
        ),
        (
            [
                "optim.name=sgd",
                "optim.use_combined_accum=true",
                "batch.replicas=2",
                "engine.replicated_tensor_sharding=true",
            ],
            "engine.replicated_tensor_sharding=true with optim.use_combined_accum=true: the tensor",
        ),
        (
            [option("TensorLocations.setWeightLocation: {useReplicatedTensorSharding: true}")],
            "engine.poptorch_options.training.TensorLocations.setWeightLocation:"
            " useReplicatedTensorSharding=true divides",
        ),
        (
            [option("TensorLocations.setWeightLocation: {useIOTilesToLoad: true}")],
            "engine.poptorch_options.training.TensorLocations.setWeightLocation: useIOTilesToLoad",
        ),
        (
            [
                "engine.loader_mode=async_rebatched",
                "engine.rebatched_worker_size=8",
                "batch.gradient_accumulation=7",
            ],
            "engine.rebatched_worker_size=8 is more than the 7 samples of a host batch.",
        ),
        (
            ["pipeline.eval_available_memory_proportion=[0.1, 0.2]"],
            "pipeline.eval_available_memory_proportion=[0.1, 0.2] has 2 numbers; there are 4",
        ),
    ],
)
def test_rule(overrides, start):
    assert only_problem(*overrides).startswith(start)


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.replicated_tensor_sharding=true", "batch.replicas=2"],
        ["engine.weights=fp16"],
        ["model.hidden_act=gelu_pytorch_tanh"],
        ["optim.max_grad_norm=1"],
        ["optim.loss_scaling=auto", "optim.accumulator=fp16"],
        ["pipeline.available_memory_proportion=[0.1, 0.2, 0.3, 1]"],
        ["optim.second_moment=fp16", "optim.eps=1e-3"],
        [option("TensorLocations.setWeightLocation: {useIOTilesToLoad: false}")],
        [
            option("TensorLocations.setWeightLocation: {useReplicatedTensorSharding: true}"),
            "batch.replicas=2",
        ],
        ["optim.name=sgd", "optim.second_moment=fp16"],
        ["optim.name=sgd", "optim.use_combined_accum=true", "optim.nesterov=true"],
        ["engine.loader_mode=async", "engine.rebatched_worker_size=8"],
        [
            "pipeline.eval_layers_per_stage=[6, 6]",
            "pipeline.eval_available_memory_proportion=[0.1, 0.2]",
        ],
    ],
)
def test_allowed_values(overrides):
    assert problems(*overrides) == []


def test_all_broken_rules_are_reported_at_once():
    config = read_config([], ["batch.gradient_accumulation=4", "engine.precision=bf16"])
    with pytest.raises(ConfigError) as caught:
        check_ipu(config)
    assert len(str(caught.value).split("\n")) == 3


def test_every_message_begins_with_a_key():
    refused = ["batch.gradient_accumulation=1", "engine.device=cpu", "model.hidden_act=gelu"]
    found = problems(*refused)
    assert len(found) == 3
    keys = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    for line in found:
        assert re.search(r"\w+\.\w+(?==)", line).group() in keys


@pytest.mark.parametrize(("ipus", "reserved"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (12, 16)])
def test_ipus_are_reserved_in_powers_of_two(ipus, reserved):
    assert reserved_ipus(ipus, 1) == reserved


def test_process_has_at_most_64_ipus():
    many = ["batch.replicas=17"]
    message = only_problem(*many)
    assert "4 stages x 17 replicas are 68 IPUs, and one process has at most 64." in message
    assert "Start 2 or more with poprun" in message
    assert message.endswith("or set batch.replicas=16 or fewer.")
    config = read_config([], [*VALID, *many])
    assert ipu_problems(config, replicas=9) == [], "poprun divides the replicas"
    load_config([], [*VALID, *many, "engine.name=poptorch"])


def test_replica_must_fit_one_process():
    message = only_problem(
        f"pipeline.layers_per_stage={[1] * 65}",
        *("batch.gradient_accumulation=200", "batch.eval_device_iterations=65"),
    )
    assert message.endswith("Cut the model into 64 stages or fewer.")


def warnings(*overrides):
    return [str(problem) for problem in ipu_warnings(read_config([], [*VALID, *overrides]))]


FP16_MOMENTS = ("optim.accumulator=fp16", "optim.first_moment=fp16")


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (
            [*FP16_MOMENTS, "optim.loss_scaling=1024"],
            "optim.accumulator=fp16 with optim.first_moment=fp16:",
        ),
        (
            [*FP16_MOMENTS, "optim.loss_scaling=auto"],
            "optim.accumulator=fp16 with optim.first_moment=fp16:",
        ),
        (
            ["engine.weights=fp16", "engine.stochastic_rounding=false"],
            "engine.weights=fp16 with engine.stochastic_rounding=false:",
        ),
        (
            [option("_Popart.set: {automaticLossScalingSettings.updatePeriod: 2}")],
            "engine.poptorch_options.training._Popart.set: automaticLossScalingSettings."
            "updatePeriod has no effect with optim.loss_scaling=1.0.",
        ),
        (
            [option("TensorLocations.numIOTiles: 32")],
            "engine.poptorch_options.training.TensorLocations.numIOTiles=32 takes these tiles",
        ),
        (
            [
                option(
                    "TensorLocations.numIOTiles: 32,"
                    " TensorLocations.setActivationLocation: {useOnChipStorage: false}"
                )
            ],
            "engine.poptorch_options.training.TensorLocations.numIOTiles=32 takes these tiles",
        ),
        (
            ["engine.poptorch_options={both: {useIpuId: 0}}", "batch.eval_replicas=2"],
            "engine.poptorch_options: useIpuId=0: training needs 4 IPUs and evaluation 8",
        ),
    ],
)
def test_warning(overrides, start):
    (found,) = warnings(*overrides)
    assert found.startswith(start)
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    "overrides",
    [
        FP16_MOMENTS,
        ["optim.accumulator=fp16", "optim.loss_scaling=1024"],
        [*FP16_MOMENTS, "optim.loss_scaling=1024", "engine.precision=fp32"],
        ["engine.weights=fp16"],
    ],
)
def test_no_warning(overrides):
    assert warnings(*overrides) == []


def test_largest_pipeline_counts():
    """Evaluation may use more IPUs than training."""
    message = only_problem("batch.eval_replicas=17")
    assert message.startswith("4 stages x 17 replicas are 68 IPUs")
    assert message.endswith("Set batch.eval_replicas=16 or fewer.")
