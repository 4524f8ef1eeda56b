"""The options passed to PopTorch, and the configuration keys that set them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cxr_vit.config import BatchPlan, load_config
from cxr_vit.config.popart_options import KINDS, OWN_KEYS
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.ipu.options import graph_options
from cxr_vit.errors import ConfigError

from .commands import ROOT, compiled, make_engine

POD4 = ROOT / "configs" / "vit_pod4.yaml"

#: Options of both graphs of configs/vit_pod4.yaml; docs/ipu.md, section 4, explains the values.
SHARED = {
    "anchored_tensors": {},
    "accumulation_and_replication_reduction_type": 1,  # Mean
    "auto_round_num_ipus": True,
    "available_memory_proportion": {0: 0.3, 1: 0.3, 2: 0.3, 3: 0.3},
    "broadcast_buffers": True,
    "cachePath": "cache",
    "connection_type": 0,  # Always
    "convolutionOptions": {"partialsType": "half"},
    "defaultBufferingDepth": 2,
    "device_iterations": 1,
    "distributed_process_id": 0,
    "enableEngineCaching": True,
    "enableFloatingPointChecks": False,
    "enableStochasticRounding": True,
    "engineOptions": {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"},
    "execution_mode": 0,  # pipelined
    "gradient_accumulation": 128,
    "input_cgt": 1,  # Consecutive
    "input_group_size": 1,
    "instrumentWithHardwareCycleCounter": False,
    "ipuof_configs": {},
    "log_dir": ".",
    "max_repeat_logs": 4,
    "meanAccumulationAndReplicationReductionStrategy": 1,  # Post
    "num_distributed_processes": 1,
    "output_mode": 3,  # Sum
    "output_return_period": 1,
    "partialsTypeMatMuls": "half",
    "random_seed": 1337,
    "rearrangeAnchorsOnHost": False,
    "replication_factor": 1,
    "subgraphCopyingStrategy": 1,  # just in time
    "sync_pattern": 0,  # Full
    "syntheticDataMode": 0,
}
TRAINING = {
    **SHARED,
    "accumulateOuterFragmentSettings.excludedVirtualGraphs": ["0"],
    "accumulateOuterFragmentSettings.schedule": 3,  # OverlapMemoryOptimized
    "automaticLossScalingSettings.enabled": False,
    "disableGradAccumulationTensorStreams": True,
    "location_optimizer": {"onChip": 1, "useReplicatedTensorSharding": 0},
    "scheduleNonWeightUpdateGradientConsumersEarly": True,
}
INFERENCE = {
    **SHARED,
    "device_iterations": 32,
    "gradient_accumulation": 1,
    "output_mode": 2,  # All
    "enableStochasticRounding": False,
}


def types_of(value):
    """Return the types, by which PopTorch looks options up; an enumeration is an int."""
    if isinstance(value, dict):
        return {key: types_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [types_of(item) for item in value]
    return int if isinstance(value, int) and not isinstance(value, bool) else type(value)


def plain(options):
    return {key: item for key, item in options.items() if key != "compilation_progress_bar_fn"}


def both(*overrides, offline=False, precision="fp16", cache="cache", files=(POD4,)):
    """Return the options of training and inference."""
    config = load_config([Path(file) for file in files], overrides)
    batch = BatchPlan.from_section(config.batch)
    graphs = graph_options(config, batch, precision=precision, cache=cache, offline=offline)
    return [plain(options.toDict()) for options in graphs]


def test_options_of_vit_pod4(ipu):
    training, inference = both()
    assert training == TRAINING
    assert inference == INFERENCE
    assert types_of(training) == types_of(TRAINING)
    assert types_of(inference) == types_of(INFERENCE)


def test_options_of_vit_pod4_reach_the_compiler(ipu, commands):
    """The dictionary that PopTorch passes to its compiler, with a small model."""
    _, inspection = ipu
    config = load_config(
        [POD4],
        [
            f"data.root={commands.data}",
            "data.image_size=32",
            "model.name=vit-tiny",
            f"engine.executable_cache={commands.folder / 'cache'}",
        ],
    )
    with make_engine(config) as engine:
        engine.compile(Batch.zeros(128, image_size=32, num_classes=14))
        inference, training = compiled(inspection)
        for executable, expected in ((training, TRAINING), (inference, INFERENCE)):
            given = plain(executable.options)
            path = Path(given.pop("cachePath"))
            assert path.parent == commands.folder / "cache"
            assert given == {key: item for key, item in expected.items() if key != "cachePath"}


#: Override -> changed options of vit_pod4, in training and in inference.
BOTH, ONLY_TRAINING, ONLY_INFERENCE = (True, True), (True, False), (False, True)
CHANGES = [
    ("batch.device_iterations=4", ONLY_TRAINING, {"device_iterations": 4, "output_mode": 2}),
    ("batch.eval_device_iterations=9", ONLY_INFERENCE, {"device_iterations": 9}),
    ("batch.gradient_accumulation=16", ONLY_TRAINING, {"gradient_accumulation": 16}),
    ("batch.global_batch_size=64", ONLY_TRAINING, {"gradient_accumulation": 64}),
    ("batch.replicas=2", BOTH, {"replication_factor": 2}),
    ("batch.eval_replicas=2", ONLY_INFERENCE, {"replication_factor": 2}),
    ("batch.micro_batch_size=2", (False, False), {}),
    ("run.seed=0", BOTH, {"random_seed": 0}),
    ("pipeline.execution=sharded", ONLY_TRAINING, {"execution_mode": 1}),
    ("pipeline.eval_execution=sharded", ONLY_INFERENCE, {"execution_mode": 1}),
    (
        "pipeline.available_memory_proportion=[0.1, 0.2, 0.3, 1]",
        BOTH,
        {"available_memory_proportion": {0: 0.1, 1: 0.2, 2: 0.3, 3: 1.0}},
    ),
    ("pipeline.available_memory_proportion=null", BOTH, {"available_memory_proportion": {}}),
    (
        "pipeline.eval_available_memory_proportion=0.6",
        ONLY_INFERENCE,
        {"available_memory_proportion": {0: 0.6, 1: 0.6, 2: 0.6, 3: 0.6}},
    ),
    (
        "pipeline.eval_available_memory_proportion=[0.1, 0.2, 0.3, 1]",
        ONLY_INFERENCE,
        {"available_memory_proportion": {0: 0.1, 1: 0.2, 2: 0.3, 3: 1.0}},
    ),
    ("pipeline.recompute=none", ONLY_TRAINING, {"autoRecomputation": 0}),
    ("pipeline.recompute=attention_mlp", (False, False), {}),
    (
        "pipeline.eval_layers_per_stage=[6, 6]",
        ONLY_INFERENCE,
        {"available_memory_proportion": {0: 0.3, 1: 0.3}},
    ),
    (
        "engine.partials=fp32",
        BOTH,
        {"partialsTypeMatMuls": "float", "convolutionOptions": {"partialsType": "float"}},
    ),
    ("engine.stochastic_rounding=false", ONLY_TRAINING, {"enableStochasticRounding": False}),
    ("engine.floating_point_exceptions=true", BOTH, {"enableFloatingPointChecks": True}),
    (
        "engine.optimizer_state_on_chip=false",
        ONLY_TRAINING,
        {"location_optimizer": {"onChip": 0, "useReplicatedTensorSharding": 0}},
    ),
    ("engine.prefetch_depth=5", BOTH, {"defaultBufferingDepth": 5}),
    ("engine.synthetic_data=true", BOTH, {"syntheticDataMode": 2}),
    ("engine.log_cycles=true", BOTH, {"instrumentWithHardwareCycleCounter": True}),
    ("engine.loader_mode=sync", (False, False), {}),
    ("optim.loss_scaling=auto", ONLY_TRAINING, {"automaticLossScalingSettings.enabled": True}),
    ("engine.popart_options.numIOTiles=64", BOTH, {"numIOTiles": 64}),
    ("engine.popart_options.timeLimitScheduler=2", BOTH, {"timeLimitScheduler": 2.0}),
    (
        "engine.popart_options.accumulateOuterFragmentSettings.schedule=1",
        BOTH,
        {"accumulateOuterFragmentSettings.schedule": 1},
    ),
]


def changed(before, after):
    assert before.keys() <= after.keys(), "a setting must not take another away"
    return {
        key: value
        for key, value in after.items()
        if key not in before or before[key] != value or type(before[key]) is not type(value)
    }


@pytest.mark.parametrize(("override", "where", "expected"), CHANGES, ids=[c[0] for c in CHANGES])
def test_key_changes_only_its_own_entries(ipu, override, where, expected):
    name, _, value = override.partition("=")
    if name.startswith("engine.popart_options."):
        option = name.split(".", 2)[2]
        override = f"engine.popart_options={{{option}: {value}}}"
    before, after = both(), both(override)
    for one, other, is_there in zip(before, after, where):
        given = changed(one, other)
        assert given == (expected if is_there else {})
        assert types_of(given) == types_of(expected if is_there else {})


def test_replicas_can_shard_the_moments(ipu):
    before = both("batch.replicas=2")
    after = both("batch.replicas=2", "engine.replicated_tensor_sharding=true")
    expected = {"location_optimizer": {"onChip": 1, "useReplicatedTensorSharding": 1}}
    assert [changed(*pair) for pair in zip(before, after)] == [expected, {}]


def test_fp32_has_no_stochastic_rounding_and_fp32_partials(ipu):
    training, inference = both(precision="fp32")
    for options in (training, inference):
        assert options["enableStochasticRounding"] is False
        assert options["partialsTypeMatMuls"] == "float"
        assert options["convolutionOptions"] == {"partialsType": "float"}


def test_without_a_cache_none_is_set(ipu):
    for options in both(cache=None):
        assert "cachePath" not in options
        assert not options.get("enableEngineCaching")


def test_disabled_cache_overrides_the_environment(ipu, monkeypatch):
    monkeypatch.setenv("POPTORCH_CACHE_DIR", "elsewhere")
    assert [options["enableEngineCaching"] for options in both(cache=None)] == [False, False]
    assert [options["cachePath"] for options in both(cache="cache")] == ["cache", "cache"]


def test_with_clipping_poptorch_selects_the_schedule(ipu):
    clipped, inference = both("optim.max_grad_norm=1.0")
    schedule = "accumulateOuterFragmentSettings."
    assert {key for key in TRAINING if key not in clipped} == {
        f"{schedule}schedule",
        f"{schedule}excludedVirtualGraphs",
    }
    assert all(clipped[key] == TRAINING[key] for key in clipped)
    assert inference == INFERENCE


def test_offline_options_name_the_target(ipu):
    online = both()
    for version, number in (("mk2", 2), ("c600", 21)):
        offline = both(f"engine.ipu_version={version}", offline=True)
        for one, other in zip(online, offline):
            assert changed(one, other) == {"connection_type": 2, "ipu_version": number}


def test_profiling_popart_options_and_defaults_are_merged(ipu):
    for options in both(
        "engine.profile_dir=/tmp/profile",
        "engine.popart_options={engineOptions: {debug.instrument: true},"
        " convolutionOptions: {availableMemoryProportion: 0.2}}",
    ):
        assert options["engineOptions"] == {
            "opt.useAutoloader": "true",
            "target.syncReplicasIndependently": "true",
            "debug.allowOutOfMemory": "true",
            "autoReport.directory": "/tmp/profile",
            "autoReport.all": "true",
            "debug.instrument": "true",
        }
        assert options["convolutionOptions"] == {
            "partialsType": "half",
            "availableMemoryProportion": "0.2",
        }


def test_users_entry_of_a_mapping_wins(ipu):
    for options in both("engine.popart_options={engineOptions: {opt.useAutoloader: false}}"):
        assert options["engineOptions"]["opt.useAutoloader"] == "false"
        assert options["engineOptions"]["target.syncReplicasIndependently"] == "true"


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        ("decomposeGradSum: true", True),
        ("autoRecomputation: 3", 3),
        ("outlineThreshold: 2", 2.0),
        ("kahnTieBreaker: fifo", "fifo"),
        ("hardwareInstrumentations: [outer]", ["outer"]),
        ("matmulOptions: {a: 1, b: true}", {"a": "1", "b": "true"}),
    ],
)
def test_popart_options_have_the_types_that_poptorch_looks_up(ipu, given, typed):
    for options in both(f"engine.popart_options={{{given}}}"):
        name = given.split(":")[0]
        assert options[name] == typed
        assert type(options[name]) is type(typed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("decomposeGradSum: 1", "decomposeGradSum=1 must be true or false"),
        ("autoRecomputation: true", "autoRecomputation=true must be an integer >= 0"),
        ("autoRecomputation: -1", "autoRecomputation=-1 must be an integer >= 0"),
        ("autoRecomputation: 1.5", "autoRecomputation=1.5 must be an integer >= 0"),
        ("hardwareInstrumentations: outer", "hardwareInstrumentations=outer must be a list"),
        ("engineOptions: [a]", r"engineOptions=\['a'\] must be a mapping"),
        ("kahnTieBreaker: [fifo]", r"kahnTieBreaker=\['fifo'\] must be text"),
        ("decomposeGradsum: true", "Did you mean 'decomposeGradSum'"),
        ("enableStochasticRounding: true", "is set by engine.stochastic_rounding"),
        ("cachePath: x", "is set by engine.executable_cache"),
    ],
)
def test_invalid_popart_options_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        both(f"engine.popart_options={{{given}}}")


def test_known_popart_options_are_those_poptorch_registers():
    """The stand-in's table is recorded from SessionOptions.cpp (conformance/record_api.py)."""
    text = (ROOT / "tests" / "fakes" / "poptorch" / "session_options.json").read_text()
    recorded = json.loads(text)
    tables = {
        "true or false": "bool",
        "an integer >= 0": "uint64",
        "a number": "double",
        "text": "string",
        "a list": "container",
        "a mapping": "container",
    }
    for name, kind in KINDS.items():
        assert tables[kind] in recorded[name], name
    assert not set(OWN_KEYS) & set(KINDS)


def optimizer_dictionary(ipu, commands, *overrides):
    poptorch, inspection = ipu
    inspection.log().clear()
    with make_engine(commands.config(*overrides)) as engine:
        size = engine.local_batch.host_batch_size
        engine.compile(Batch.zeros(size, image_size=32, num_classes=14))
        executable = compiled(inspection)[1]
        strategy = executable.options["meanAccumulationAndReplicationReductionStrategy"]
        return executable.optimizer.dict, strategy == poptorch.MeanReductionStrategy.Running


def test_values_of_adamw_are_variable(ipu, commands):
    given, _ = optimizer_dictionary(
        ipu,
        commands,
        "optim.lr=0.002",
        "optim.weight_decay=0.03",
        "optim.beta1=0.8",
        "optim.beta2=0.99",
        "optim.eps=1e-6",
        "optim.loss_scaling=64",
        "optim.max_grad_norm=2",
        "optim.first_moment=fp16",
    )
    group = {
        "learningRate": (0.002, False),
        "weightDecay": (0.03, False),
        "beta1": (0.8, False),
        "beta2": (0.99, False),
        "eps": (1e-6, False),
    }
    assert given["groups"] == [group, {**group, "weightDecay": (0.0, False)}]
    assert given["defaults"] == {**group, "lossScaling": (64.0, False)}
    assert given["maxGradNorm"] == 2.0
    assert given["optimizer_type"].name == "ADAMW"


@pytest.mark.parametrize(
    ("key", "entry", "runs"),
    [
        ("accumulator", "accumType", True),
        ("first_moment", "firstOrderMomentumAccumType", False),
        ("second_moment", "secondOrderMomentumAccumType", False),
    ],
)
def test_each_dtype_of_the_optimizer_has_a_key(ipu, commands, key, entry, runs):
    types = {"accumType", "firstOrderMomentumAccumType", "secondOrderMomentumAccumType"}
    given, running = optimizer_dictionary(ipu, commands, f"optim.{key}=fp16", "optim.eps=1e-3")
    assert {name for name in types if given[name]} == {entry}
    assert running == runs, "an fp16 accumulator holds a running mean, so that it does not overflow"


def test_values_of_lamb_and_sgd_are_variable(ipu, commands):
    lamb, _ = optimizer_dictionary(
        ipu, commands, "optim.name=lamb", "optim.second_moment=fp16", "optim.eps=1e-3"
    )
    assert lamb["optimizer_type"].name == "LAMB"
    assert lamb["secondOrderMomentumAccumType"]
    sgd, _ = optimizer_dictionary(
        ipu, commands, "optim.name=sgd", "optim.max_grad_norm=null", "optim.first_moment=fp16"
    )
    assert sgd["optimizer_type"].name == "SGD2", "the moment apart from the accumulator"
    assert sgd["velocityAccumType"]
    for given, names in (
        (lamb, {"learningRate", "weightDecay", "beta1", "beta2", "eps"}),
        (sgd, {"learningRate", "weightDecay", "momentum"}),
    ):
        for group in given["groups"]:
            assert {name for name, (_, constant) in group.items() if not constant} == names
        assert given["defaults"]["lossScaling"] == (1.0, False)


def test_lambs_bias_correction_and_largest_norm(ipu, commands):
    given, _ = optimizer_dictionary(
        ipu,
        commands,
        *("optim.name=lamb", "optim.bias_correction=false", "optim.max_weight_norm=5"),
    )
    assert given["optimizer_type"].name == "LAMB_NO_BIAS"
    assert [group["maxWeightNorm"] for group in given["groups"]] == [(5.0, False)] * 2
    given, _ = optimizer_dictionary(ipu, commands, "optim.name=lamb")
    assert given["optimizer_type"].name == "LAMB"
    assert [group["maxWeightNorm"] for group in given["groups"]] == [(65500.0, True)] * 2


def test_combined_accumulator_of_sgd(ipu, commands):
    given, _ = optimizer_dictionary(
        ipu, commands, "optim.name=sgd", "optim.use_combined_accum=true"
    )
    assert given["optimizer_type"].name == "SGD1"


def test_no_clipping_is_an_infinite_norm(ipu, commands):
    given, _ = optimizer_dictionary(ipu, commands, "optim.max_grad_norm=null")
    assert given["maxGradNorm"] == float("inf")


def test_automatic_loss_scaling_starts_at_one(ipu, commands):
    given, _ = optimizer_dictionary(
        ipu,
        commands,
        *("optim.loss_scaling=auto", "optim.accumulator=fp16", "engine.precision=fp16"),
    )
    assert given["defaults"]["lossScaling"] == (1.0, False)
