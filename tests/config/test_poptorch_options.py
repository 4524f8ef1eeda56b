"""The mapping of PopTorch's options: names, kinds of arguments, graphs, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import pytest
import yaml

from cxr_vit.config import dump_config, load_config, read_config
from cxr_vit.config.poptorch_options import SCOPES, TABLES, options_of, typed_options
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError

TESTS = Path(__file__).parents[1]
VALID = ("batch.gradient_accumulation=7", "batch.eval_device_iterations=4")


def read(options: Any, key: str = "poptorch_options") -> Dict[str, Any]:
    """Return the options of a configuration that gives them as YAML."""
    text = yaml.safe_dump(options, default_flow_style=True, width=10**6).strip()
    return read_config([], [f"engine.{key}={text}"]).engine.poptorch_options


def refusal(options: Any, key: str = "poptorch_options") -> str:
    with pytest.raises(ConfigError) as caught:
        read(options, key)
    return str(caught.value)


def contradiction(options: Any, *overrides: str) -> str:
    """Return what the rules say of options that are valid by themselves."""
    text = yaml.safe_dump(options, default_flow_style=True, width=10**6).strip()
    given = [*VALID, "engine.name=poptorch", f"engine.poptorch_options={text}", *overrides]
    with pytest.raises(ConfigError) as caught:
        load_config([], given)
    return str(caught.value)


def recorded() -> Dict[str, str]:
    """Return the setters of PopTorch's options, recorded from its sources."""
    text = (TESTS / "fakes" / "conformance" / "api.json").read_text(encoding="utf-8")
    return json.loads(text)["setters"]


def test_every_setter_of_poptorch_is_allowed_or_refused():
    names, location = set(recorded()), "TensorLocationSettings."
    for setter, table in TABLES.items():
        assert not set(table.allowed) & set(table.refused)
        if setter.endswith("Location"):
            given = {f"{location}{name}" for name in (*table.allowed, *table.refused)}
            assert given == {name for name in names if name.startswith(location)}, setter
    top = TABLES[""]
    assert {*top.allowed, *top.refused} == {n for n in names if not n.startswith(location)}


def test_every_option_of_popart_is_allowed_or_refused():
    """Those that PopTorch registers for itself, in snake_case, have setters."""
    file = TESTS / "fakes" / "poptorch" / "session_options.json"
    registered = json.loads(file.read_text(encoding="utf-8"))
    table = TABLES["_Popart.set"]
    own = {name for name in registered if "_" in name}
    assert {*table.allowed, *table.refused} == set(registered) - own
    kinds = {"true or false": "bool", "a number": "double"}
    for name, kind in table.allowed.items():
        is_text = kind in ("text", "greedy, fifo or random")
        is_container = kind.startswith(("a list", "a mapping"))
        default = "string" if is_text else "container" if is_container else "uint64"
        assert kinds.get(kind, default) in registered[name], name


def test_refusals_name_keys_that_exist():
    words = [
        word
        for table in TABLES.values()
        for text in table.refused.values()
        for word in text.split()
    ]
    keys = [key for key in (word.partition("=")[0] for word in words) if "." in key]
    named = [key.split(".") for key in keys if key.split(".")[0] in SECTIONS and key != "train.py"]
    assert len(named) > 30
    for section, field in named:
        assert field in SECTIONS[section].model_fields


@pytest.mark.parametrize("setter", sorted(TABLES))
def test_everything_refused_is_refused_with_its_reason(setter):
    for name, reason in TABLES[setter].refused.items():
        options = {setter: {name: "1"}} if setter else {name: "1"}
        with pytest.raises(ValueError, match=name) as caught:
            typed_options({"training": options})
        assert str(caught.value).endswith(f"{name} {reason}")


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("_Popart.set", {"enableOutlining": True}, {"enableOutlining": True}),
        ("_Popart.set", {"enableOutlining": "False"}, {"enableOutlining": False}),
        ("_Popart.set", {"mergeVarUpdate": 1}, {"mergeVarUpdate": 1}),
        ("_Popart.set", {"outlineThreshold": 10}, {"outlineThreshold": 10.0}),
        ("_Popart.set", {"kahnTieBreaker": "FIFO"}, {"kahnTieBreaker": "fifo"}),
        ("_Popart.set", {"dotChecks": ["Fwd0"]}, {"dotChecks": ["Fwd0"]}),
        ("_Popart.set", {"hardwareInstrumentations": [1]}, {"hardwareInstrumentations": ["1"]}),
        ("_Popart.set", {"engineOptions": {"a.b": False}}, {"engineOptions": {"a.b": "false"}}),
        ("_Popart.setPatterns", {"TiedGather": True, "level": 3}, {"TiedGather": True, "level": 3}),
        ("syncPattern", "replicaandladder", "ReplicaAndLadder"),
        ("syncPattern", "poptorch.SyncPattern.Full", "Full"),
        ("maxRepeatLogs", None, None),
        ("useIpuId", 3, 3),
        (
            "TensorLocations.setWeightLocation",
            {"useOnChipStorage": False},
            {"useOnChipStorage": False},
        ),
    ],
)
def test_arguments_are_converted_to_the_type_poptorch_expects(name, given, value):
    found = read({"training": {name: given}})["training"][name]
    assert found == value
    pairs = zip(found.values(), value.values()) if isinstance(value, dict) else [(found, value)]
    assert all(type(one) is type(other) for one, other in pairs)


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("_Popart.set", {"enableOutlining": 1}, "true or false"),
        ("_Popart.set", {"finalDotOp": True}, "an integer >= 0"),
        ("_Popart.set", {"finalDotOp": -1}, "an integer >= 0"),
        ("_Popart.set", {"finalDotOp": 2.0}, "an integer >= 0"),
        ("_Popart.set", {"finalDotOp": 2**64}, "an integer >= 0"),
        ("_Popart.set", {"mergeVarUpdate": 4}, "an integer from 0 to 3"),
        ("_Popart.set", {"outlineThreshold": "much"}, "a number"),
        ("_Popart.set", {"outlineThreshold": "nan"}, "a number"),
        ("_Popart.set", {"dotChecks": "Fwd0"}, "a list of text"),
        ("_Popart.set", {"hardwareInstrumentations": ["outer"]}, "a list of 0 and 1"),
        ("_Popart.set", {"engineOptions": ["a"]}, "a mapping of text"),
        ("_Popart.set", {"engineOptions": {"a": ["b"]}}, "a mapping of text"),
        ("_Popart.set", {"kahnTieBreaker": ["fifo"]}, "greedy, fifo or random"),
        ("_Popart.setPatterns", {"TiedGather": 2}, "true or false"),
        ("_Popart.setPatterns", {"level": 0}, "an integer from 1 to 3"),
        ("syncPattern", "Fast", "Full, SinglePipeline or ReplicaAndLadder"),
        ("connectionType", "Never", "Always or OnDemand"),
        ("TensorLocations.numIOTiles", 33, "an even integer from 32 to 192"),
        ("TensorLocations.numIOTiles", 200, "an even integer from 32 to 192"),
        ("TensorLocations.setWeightLocation", {"useOnChipStorage": "chip"}, "true or false"),
        ("VariableAttributes.markAsConstant", ["lr"], "weight_decay \\(the schedule changes lr\\)"),
        ("useIpuId", "first", "an integer >= 0"),
        ("modelName", ["a"], "a name without /"),
        ("logDir", ["a"], "text"),
    ],
)
def test_argument_of_a_wrong_kind_is_refused(name, given, kind):
    with pytest.raises(ValueError, match=f"training.{name}.* must be .*{kind}$"):
        typed_options({"training": {name: given}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"both": {"_Popart.set": {"outlineThreshod": 1}}}, "Did you mean 'outlineThreshold'?"),
        ({"both": {"syncpattern": "Full"}}, "no option 'syncpattern'. Did you mean 'syncPattern'?"),
        ({"both": {"outlineThreshold": 1}}, "It belongs into _Popart.set: {outlineThreshold: ...}"),
        ({"both": {"useOnChipStorage": True}}, "It belongs into TensorLocations.set"),
        (
            {"both": {"TensorLocations.setWeightLocation": {"onChip": True}}},
            "TensorLocationSettings 'onChip'",
        ),
        ({"training": {"_Popart.setPatterns": {"TiedGathr": True}}}, "Did you mean 'TiedGather'?"),
        ({"syncPattern": "Full"}, "'syncPattern' is not one of both, training, inference"),
        ({"both": {"syncPattern": ["Full"]}}, "must be Full, SinglePipeline or ReplicaAndLadder"),
        (
            {"both": {"_Popart.set": 1}},
            "both._Popart.set=1 must be a mapping, PopART option: value",
        ),
        ({"both": 1}, "both=1 must be a mapping, option: value"),
        (1, "must be a mapping of both, training, inference"),
    ],
)
def test_unknown_names_and_shapes_are_refused(options, message):
    assert message in refusal(options)


def test_all_problems_are_reported_at_once():
    text = refusal({"both": {"foo": 1, "_Popart.set": {"bar": 1}}, "inference": {"syncPattern": 1}})
    assert all(part in text for part in ("'foo'", "'bar'", "inference.syncPattern=1"))


@pytest.mark.parametrize("scope", ["both", "inference"])
@pytest.mark.parametrize(
    "options",
    [
        {"_Popart.set": {"automaticLossScalingSettings.updatePeriod": 2}},
        {"_Popart.set": {"accumulateOuterFragmentSettings.schedule": 2}},
        {"_Popart.set": {"mergeVarUpdate": 2}},
        {"_Popart.setPatterns": {"TiedGather": True}},
        {"TensorLocations.setAccumulatorLocation": {"useOnChipStorage": True}},
        {"Training.setConvolutionDithering": True},
        {"VariableAttributes.markAsConstant": ["betas"]},
    ],
)
def test_what_acts_on_training_only_is_given_there(scope, options):
    read({"training": options})
    assert refusal({scope: options}).endswith("Give it under training")


@pytest.mark.parametrize("scope", ["both", "training"])
def test_explicit_ir_is_for_inference_that_is_not_pipelined(scope):
    options = {"_Popart.set": {"enableExplicitIR": True}}
    assert refusal({scope: options}).endswith("Give it under inference")
    text = "engine.poptorch_options={inference: {_Popart.set: {enableExplicitIR: true}}}"
    given = [*VALID, "engine.name=poptorch", text]
    load_config([], [*given, "pipeline.eval_execution=sharded"])
    with pytest.raises(ConfigError, match=r"enableExplicitIR=true makes .*eval_execution=sharded"):
        load_config([], given)


def test_what_names_one_graph_is_not_given_for_both():
    options = {"modelName": "a"}
    for scope in ("training", "inference"):
        read({scope: options})
    assert refusal({"both": options}).endswith("Give it under training or inference")


def test_options_are_unchanged_after_dump_and_load(tmp_path):
    text = (
        "{both: {maxRepeatLogs: null, _Popart.set: {outlineThreshold: 10,"
        " engineOptions: {a.b: 'true'}}},"
        " training: {TensorLocations.setWeightLocation: {minElementsForOffChip: 4}}}"
    )
    config = read_config([], [f"engine.poptorch_options={text}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config([tmp_path / "config.yaml"]) == config


def test_options_of_a_graph_are_merged_and_its_own_win():
    options = (
        "{both: {syncPattern: Full, _Popart.set: {firstDotOp: 1, finalDotOp: 2}},"
        " training: {_Popart.set: {finalDotOp: 3}, useIpuId: 1}}"
    )
    config = read_config([], [f"engine.poptorch_options={options}"])
    assert options_of(config.engine.poptorch_options, "inference") == {
        "syncPattern": "Full",
        "_Popart.set": {"firstDotOp": 1, "finalDotOp": 2},
    }
    assert options_of(config.engine.poptorch_options, "training") == {
        "syncPattern": "Full",
        "_Popart.set": {"firstDotOp": 1, "finalDotOp": 3},
        "useIpuId": 1,
    }


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        (None, {}),
        ({"outlineThreshold": 10}, {"both": {"_Popart.set": {"outlineThreshold": 10.0}}}),
        ({"numIOTiles": 64}, {"both": {"TensorLocations.numIOTiles": 64}}),
        ({"numIOTiles": 0}, {}),
        (
            {"enableExplicitIR": True},
            {"inference": {"_Popart.set": {"enableExplicitIR": True}}},
        ),
        (
            {"automaticLossScalingSettings.updatePeriod": 2, "enableOutlining": False},
            {
                "both": {"_Popart.set": {"enableOutlining": False}},
                "training": {"_Popart.set": {"automaticLossScalingSettings.updatePeriod": 2}},
            },
        ),
    ],
)
def test_former_key_is_read(given, options):
    assert read(given, "popart_options") == {scope: options.get(scope, {}) for scope in SCOPES}


def test_former_key_yields_and_is_not_written(tmp_path):
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("engine: {popart_options: {firstDotOp: 1, finalDotOp: 2}}")
    new.write_text("engine: {poptorch_options: {both: {_Popart.set: {firstDotOp: 3}}}}")
    for files in ([old, new], [new, old]):
        config = read_config(files)
        found = config.engine.poptorch_options["both"]["_Popart.set"]
        assert found == {"firstDotOp": 3, "finalDotOp": 2}
    assert "popart_options" not in dump_config(config)


@pytest.mark.parametrize(
    "given", [1, "a", ["a"], {"foo": 1}, {"disableOptimizerStateTensorStreams": True}]
)
def test_former_key_is_checked_like_its_successor(given):
    assert "engine.poptorch_options" in refusal(given, "popart_options")


@pytest.mark.parametrize(
    ("options", "overrides", "parts"),
    [
        (
            {"VariableAttributes.markAsConstant": ["loss_scaling"]},
            ["optim.loss_scaling=auto", "optim.accumulator=fp16"],
            ["markAsConstant: loss_scaling cannot be constant with optim.loss_scaling=auto"],
        ),
        (
            {"VariableAttributes.markAsConstant": ["momentum"]},
            [],
            [
                "is no value of optim.name=adamw.",
                "Legal values: betas, eps, loss_scaling, weight_decay.",
            ],
        ),
        (
            {"VariableAttributes.markAsConstant": ["betas"]},
            ["optim.name=sgd"],
            ["is no value of optim.name=sgd. Legal values: loss_scaling, momentum, weight_decay."],
        ),
        (
            {"Training.setMeanAccumulationAndReplicationReductionStrategy": "Post"},
            ["optim.accumulator=fp16"],
            ["Strategy=Post has no effect with optim.accumulator=fp16"],
        ),
        (
            {"_Popart.set": {"accumulateOuterFragmentSettings.schedule": 1}},
            ["optim.max_grad_norm=1"],
            ["schedule=1 (Serial) cannot clip gradients, optim.max_grad_norm=1.0", "0, 2, 3."],
        ),
        (
            {
                "_Popart.set": {
                    "accumulateOuterFragmentSettings.schedule": 1,
                    "replicatedCollectivesSettings.prepareScheduleForMergingCollectives": True,
                }
            },
            [],
            [
                "cannot have the Serial schedule",
                "Set accumulateOuterFragmentSettings.schedule to 0",
            ],
        ),
        (
            {"_Popart.set": {"batchSerializationSettings.method": 2}},
            [],
            ["method=2 (Loop) needs the backward pass", "transformContext=1."],
        ),
        (
            {"TensorLocations.setWeightLocation": {"useIOTilesToLoad": True}},
            [],
            ["training.TensorLocations.setWeightLocation: useIOTilesToLoad", "numIOTiles"],
        ),
    ],
)
def test_options_that_contradict_other_keys_are_refused(options, overrides, parts):
    message = contradiction({"training": options}, *overrides)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({"VariableAttributes.markAsConstant": ["loss_scaling", "betas"]}, []),
        ({"VariableAttributes.markAsConstant": ["max_weight_norm"]}, ["optim.name=lamb"]),
        ({"VariableAttributes.markAsConstant": ["momentum"]}, ["optim.name=sgd"]),
        ({"_Popart.set": {"accumulateOuterFragmentSettings.schedule": 1}}, []),
        (
            {
                "TensorLocations.numIOTiles": 64,
                "TensorLocations.setWeightLocation": {"useIOTilesToLoad": True},
            },
            [],
        ),
    ],
)
def test_options_that_contradict_nothing_pass(options, overrides):
    text = yaml.safe_dump({"training": options}, default_flow_style=True, width=10**6).strip()
    given = ["engine.name=poptorch", f"engine.poptorch_options={text}", *overrides]
    load_config([], [*VALID, *given])


@pytest.mark.parametrize(
    ("name", "entries", "key"),
    [
        ("convolutionOptions", {"partialsType": "float"}, "engine.partials"),
        ("matmulOptions", {"partialsType": "float"}, "engine.partials"),
        ("engineOptions", {"autoReport.directory": "/etc"}, "engine.profile_dir"),
    ],
)
def test_entry_of_a_mapping_that_another_key_sets(name, entries, key):
    message = refusal({"inference": {"_Popart.set": {name: entries}}})
    assert message.endswith(f"inference._Popart.set.{name}.{next(iter(entries))} is set by {key}")


@pytest.mark.parametrize("name", ["../../x", "/etc", "", ".."])
def test_name_of_a_model_is_no_path(name):
    assert "must be a name without /" in refusal({"training": {"modelName": name}})


def test_empty_scope_keeps_the_former_keys_entries():
    text = "engine={popart_options: {outlineThreshold: 10}, poptorch_options: {both: null}}"
    options = read_config([], [text]).engine.poptorch_options
    assert options["both"] == {"_Popart.set": {"outlineThreshold": 10.0}}


def test_engine_options_have_one_folder_of_reports():
    message = refusal({"both": {"_Popart.setEngineOptions": {"autoReport.directory": "/etc"}}})
    assert message.endswith(
        "_Popart.setEngineOptions.autoReport.directory is set by engine.profile_dir"
    )
