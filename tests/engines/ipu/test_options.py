"""The options passed to PopTorch, and the configuration keys that set them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from cxr_vit.config import BatchPlan, load_config, read_config
from cxr_vit.config.poptorch_options import MARK_CONSTANT, TABLES
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.ipu.optimizer import mark_constants
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
    """Return the options of training and inference as dictionaries."""
    given = graphs(*overrides, offline=offline, precision=precision, cache=cache, files=files)
    return [plain(options.toDict()) for options in given]


def graphs(*overrides, offline=False, precision="fp16", cache="cache", files=(POD4,)):
    """Return the options of training and inference."""
    config = load_config([Path(file) for file in files], overrides)
    batch = BatchPlan.from_section(config.batch)
    return graph_options(config, batch, precision=precision, cache=cache, offline=offline)


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


#: Option of the user -> its argument and the entries of PopTorch's dictionary that it changes.
LOCATION = {"onChip": 0, "minElementsForOffChip": 8, "useReplicatedTensorSharding": 1}
USERS = {
    "TensorLocations.numIOTiles": ("64", {"numIOTiles": 64}),
    "TensorLocations.setAccumulatorLocation": (
        "{useOnChipStorage: false, minElementsForOffChip: 8, useReplicatedTensorSharding: true}",
        {"location_accumulator": LOCATION},
    ),
    "TensorLocations.setActivationLocation": (
        "{useOnChipStorage: false, minElementsForReplicatedTensorSharding: 9}",
        {"location_activation": {"onChip": 0, "minElementsForReplicatedTensorSharding": 9}},
    ),
    "TensorLocations.setOptimizerLocation": (
        "{minElementsForOffChip: 8}",  # beside those that keys of their own set
        {
            "location_optimizer": {
                "onChip": 1,
                "useReplicatedTensorSharding": 0,
                "minElementsForOffChip": 8,
            }
        },
    ),
    "TensorLocations.setWeightLocation": (
        "{useIOTilesToLoad: true, useIOTilesToStore: false}",
        {"location_weight": {"useIOTilesToLoad": 1, "useIOTilesToStore": 0}},
    ),
    "Training.setConvolutionDithering": (
        "true",
        {"convolutionOptions": {"partialsType": "half", "enableConvDithering": "true"}},
    ),
    "Training.setMeanAccumulationAndReplicationReductionStrategy": (
        "Running",
        {"meanAccumulationAndReplicationReductionStrategy": 0},
    ),
    "_Popart.set": (
        "{timeLimitScheduler: 2, subgraphCopyingStrategy: 0, kahnTieBreaker: FIFO}",
        {"timeLimitScheduler": 2.0, "subgraphCopyingStrategy": 0, "kahnTieBreaker": "fifo"},
    ),
    "_Popart.setEngineOptions": (
        "{opt.useAutoloader: false}",
        {
            "engineOptions": {
                "opt.useAutoloader": "false",
                "target.syncReplicasIndependently": "true",
            }
        },
    ),
    "_Popart.setPatterns": (
        "{TiedGather: true, SplitGather: false}",
        {"patterns": {"TiedGather": True, "SplitGather": False}, "patterns_level": 2},
    ),
    "broadcastBuffers": ("false", {"broadcast_buffers": False}),
    "connectionType": ("OnDemand", {"connection_type": 1}),
    "enableStableNorm": ("true", {"enableStableNorm": True}),
    "logDir": ("logs", {"log_dir": "logs"}),
    "maxRepeatLogs": ("null", {"max_repeat_logs": 2**64 - 1}),
    "modelName": ("mine", {"model_name": "mine"}),
    "syncPattern": ("ReplicaAndLadder", {"sync_pattern": 2}),
    "updatableNamedBuffers": ("[a, b]", {"updatableNamedBuffers": ["a", "b"]}),
    "useIpuId": ("5", {"ipu_id": 5}),
    # PopTorch keeps these to itself; MARKS has where.
    "VariableAttributes.markAsConstant": ("[betas]", {}),
    "appendToLocationExcludes": ("[a, b]", {}),
    "disableModuleNamescope": ("true", {}),
    "relaxOptimizerAttributesChecks": ("true", {}),
    "showCompilationProgressBar": ("false", {}),
    "sourceLocationExcludes": ("[c]", {}),
}
#: Option that is not in the dictionary -> attribute of PopTorch's options, its value before, after.
EXCLUDES = ["install/poptorch", "site-packages/torch", "site-packages/poptorch"]
MARKS = {
    "appendToLocationExcludes": ("_source_location_excludes", EXCLUDES, [*EXCLUDES, "a", "b"]),
    "disableModuleNamescope": ("_module_namescope_enabled", True, False),
    "relaxOptimizerAttributesChecks": ("_relax_optimizer_checks", False, True),
    "showCompilationProgressBar": ("_show_compilation_progress_bar", True, False),
    "sourceLocationExcludes": ("_source_location_excludes", EXCLUDES, ["c"]),
}


def users(scope, **options):
    """Return the override that gives options of the user, `__` for a dot."""
    given = ", ".join(f"{name.replace('__', '.')}: {value}" for name, value in options.items())
    return f"engine.poptorch_options={{{scope}: {{{given}}}}}"


def scopes_of(name):
    """Return the scopes that take an option, and the graphs that each of them means."""
    for scope, where in (
        ("both", BOTH),
        ("training", ONLY_TRAINING),
        ("inference", ONLY_INFERENCE),
    ):
        try:
            read_config([], [users(scope, **{name: USERS[name][0]})])
        except ConfigError:
            continue
        yield scope, where


def test_there_is_an_example_of_each_option():
    assert set(USERS) == set(TABLES[""].allowed)


@pytest.mark.parametrize("name", sorted(USERS))
def test_option_changes_only_its_own_entries_of_its_graphs(ipu, name):
    argument, expected = USERS[name]
    before = both()
    given_under = []
    for scope, where in scopes_of(name):
        given_under.append(scope)
        for one, other, is_there in zip(before, both(users(scope, **{name: argument})), where):
            assert changed(one, other) == (expected if is_there else {})
            assert types_of(changed(one, other)) == types_of(expected if is_there else {})
    assert "training" in given_under


@pytest.mark.parametrize("name", sorted(MARKS))
def test_option_that_poptorch_keeps_to_itself_is_set_in_its_graphs(ipu, name):
    attribute, before, after = MARKS[name]
    for scope, where in scopes_of(name):
        for options, is_there in zip(graphs(users(scope, **{name: USERS[name][0]})), where):
            assert getattr(options, attribute) == (after if is_there else before)


def test_users_options_reach_the_compiler(ipu, commands):
    """All that fit one machine at once."""
    _, inspection = ipu
    # Without the name of a device and of a buffer, and what the next one replaces.
    apart = {"useIpuId", "updatableNamedBuffers", "appendToLocationExcludes"}
    names = [name for name in USERS if name not in apart]
    given = ", ".join(f"{name}: {USERS[name][0]}" for name in names)
    override = f"engine.poptorch_options={{training: {{{given}}}, inference: {{logDir: mine}}}}"
    settings = (override, "engine.precision=fp16", "batch.replicas=2")
    with make_engine(commands.config(*settings)) as engine:
        batch = Batch.zeros(engine.local_batch.host_batch_size, image_size=32, num_classes=14)
        engine.compile(batch)
        inference, training = compiled(inspection)
        for name in names:
            for key, value in USERS[name][1].items():
                assert training.options[key] == value, name
                assert key == "log_dir" or inference.options.get(key) != value, name
        assert inference.options["log_dir"] == "mine"
        options = engine.graphs.training(batch.images, batch.labels).options
        for attribute, _, after in (MARKS[name] for name in names if name in MARKS):
            assert getattr(options, attribute) == after
        assert training.optimizer.dict["defaults"]["beta1"] == (0.9, True)


def test_profiling_users_options_and_defaults_are_merged(ipu):
    given = "{engineOptions: {debug.instrument: true}, convolutionOptions: {planConstraints: a}}"
    for options in both("engine.profile_dir=/tmp/profile", users("both", _Popart__set=given)):
        assert options["engineOptions"] == {
            "opt.useAutoloader": "true",
            "target.syncReplicasIndependently": "true",
            "debug.allowOutOfMemory": "true",
            "autoReport.directory": "/tmp/profile",
            "autoReport.all": "true",
            "debug.instrument": "true",
        }
        assert options["convolutionOptions"] == {"partialsType": "half", "planConstraints": "a"}


def test_options_about_a_device_do_not_reach_an_offline_target(ipu):
    online = users("both", connectionType="OnDemand", useIpuId="5", syncPattern="SinglePipeline")
    for one, other in zip(both(offline=True), both(online, offline=True)):
        assert changed(one, other) == {"sync_pattern": 1}
        assert other["connection_type"] == 2


def test_popart_options_have_the_types_that_poptorch_looks_up(ipu):
    """The stand-in's table is recorded from SessionOptions.cpp (conformance/record_api.py)."""
    examples = {
        "true or false": True,
        "a number": 2,
        "text": "a",
        "greedy, fifo or random": "random",
        "a list of text": "[a]",
        "a mapping of text": "{a: 1}",
        "a list of 0 and 1": "[1]",
        "a list of integers >= 0": "[2]",
    }
    recorded = json.loads((ROOT / "tests/fakes/poptorch/session_options.json").read_text())
    allowed = {**TABLES["_Popart.set"].allowed}
    del allowed["enableExplicitIR"]  # of inference only, and true or false as many others
    given = ", ".join(f"{name}: {examples.get(kind, 1)}" for name, kind in allowed.items())
    training, _ = both(users("training", _Popart__set=f"{{{given}}}"), "optim.max_grad_norm=null")
    kinds = {bool: "bool", int: "uint64", float: "double", str: "string"}
    for name in allowed:
        assert kinds.get(type(training[name]), "container") in recorded[name], name


def test_useipuid_is_refused_under_poprun(ipu, monkeypatch):
    """popdist gives each process its own device."""
    poptorch, _ = ipu

    def refuse(self, ipu_id):
        raise RuntimeError("Cannot call `useIpuId` with popdist.poptorch.Options")

    monkeypatch.setattr(poptorch.Options, "useIpuId", refuse)
    with pytest.raises(ConfigError, match="useIpuId=5: Cannot call `useIpuId` with popdist"):
        both(users("both", useIpuId="5"))


UNCLIPPED = ("optim.max_grad_norm=null", "optim.loss_scaling=64", "optim.weight_decay=0.1")


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
    assert [group["nesterov"] for group in given["groups"]] == [(False, True)] * 2
    combined = ("optim.use_combined_accum=true", "optim.nesterov=true", *UNCLIPPED)
    given, _ = optimizer_dictionary(ipu, commands, "optim.name=sgd", *combined)
    assert [group["nesterov"] for group in given["groups"]] == [(True, False)] * 2


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


@pytest.mark.parametrize(
    ("optimizer", "constant", "entries"),
    [
        ("adamw", "betas, eps, weight_decay, loss_scaling", "beta1 beta2 eps weightDecay"),
        ("lamb", "betas, max_weight_norm", "beta1 beta2 maxWeightNorm"),
        ("sgd", "momentum, weight_decay", "momentum weightDecay"),
    ],
)
def test_values_that_the_user_marks_are_constant(ipu, commands, optimizer, constant, entries):
    before, _ = optimizer_dictionary(ipu, commands, f"optim.name={optimizer}", *UNCLIPPED)
    marks = users("training", VariableAttributes__markAsConstant=f"[{constant}]")
    given, _ = optimizer_dictionary(ipu, commands, f"optim.name={optimizer}", marks, *UNCLIPPED)
    for one, other in zip(
        [before["defaults"], *before["groups"]], [given["defaults"], *given["groups"]]
    ):
        for name, (value, is_constant) in other.items():
            marked = name in entries.split() or (name, optimizer) == ("lossScaling", "adamw")
            assert value == one[name][0]
            assert is_constant == (marked or one[name][1]), name
        assert other["learningRate"][1] is False


def test_modules_own_optimizer_must_have_what_the_user_marks(ipu):
    poptorch, _ = ipu
    weight = torch.nn.Parameter(torch.zeros(2))
    mark_constants(poptorch.optim.AdamW([weight], lr=0.1), {MARK_CONSTANT: ["betas"]})
    with pytest.raises(ConfigError, match=r"momentum: the optimizer .*AdamW\) has no such value"):
        mark_constants(poptorch.optim.AdamW([weight], lr=0.1), {MARK_CONSTANT: ["momentum"]})


def test_run_with_users_options_has_the_same_losses_and_resumes(front_end, commands):
    """Attaching on demand, constant values, and a checkpoint from before they were constant."""
    once = ("engine.precision=fp32", "optim.weight_decay=0.1", "train.checkpoint_every_steps=2")
    given = users(
        "training",
        connectionType="OnDemand",
        syncPattern="SinglePipeline",
        VariableAttributes__markAsConstant="[betas, eps, weight_decay, loss_scaling]",
        TensorLocations__setWeightLocation="{useOnChipStorage: false}",
    )
    run = commands.train("train.eval_every_steps=2", *once, given)
    variable = commands.train("train.eval_every_steps=2", *once)
    assert run.losses == variable.losses
    assert commands.resume_at(run, 2).losses == run.losses[2:]
    for start, override in ((variable, given), (run, "engine.poptorch_options={}")):
        resumed = commands.resume_at(start, 2, override)
        assert resumed.losses == pytest.approx(run.losses[2:], abs=1e-6)


def test_run_of_an_older_version_resumes(ipu, commands):
    """Its config.yaml has the former key."""
    run = commands.train("engine.precision=fp32", "train.steps=2", "train.checkpoint_every_steps=1")
    file = run.path / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    del config["engine"]["poptorch_options"]
    name = "automaticLossScalingSettings.updatePeriod"
    config["engine"]["popart_options"] = {"outlineThreshold": 10, name: 2}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    ipu[1].log().clear()
    assert commands.resume_at(run, 1).losses == run.losses[1:]
    inference, training = compiled(ipu[1])
    for executable in (inference, training):
        assert executable.options["outlineThreshold"] == 10.0
        assert executable.options.get(name) == (2 if executable is training else None)
