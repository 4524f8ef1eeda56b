"""The command `import-ipu-config`: Graphcore's files in our terms."""

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import yaml

from cxr_vit.cli import main
from cxr_vit.commands.import_ipu_config import import_file
from cxr_vit.config import load_config
from cxr_vit.config.graphcore_keys import IPU_CONFIG
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError

FILES = Path(__file__).parent / "fixtures" / "graphcore"
POD4 = Path(__file__).parents[1] / "configs" / "vit_pod4.yaml"


def overlay_of(path: Path, entry: Any = None) -> Dict[str, Any]:
    """Return the keys of an overlay, with dots."""
    overlay = import_file(path, entry).overlay
    return {f"{name}.{key}": value for name in overlay for key, value in overlay[name].items()}


def ipu_config(folder: Path, **values: Any) -> Path:
    """Write an IPUConfig that fits ViT-B on four IPUs, with some values changed."""
    base = {"layers_per_ipu": [3, 3, 3, 3], "gradient_accumulation_steps": 64}
    path = folder / "ipu_config.json"
    path.write_text(json.dumps({**base, "inference_device_iterations": 4, **values}))
    return path


def example(folder: Path, text: str, **values: Any) -> Path:
    """Write a configs.yml with an entry `a`, and `text` before it."""
    entry = {"layers_per_ipu": [3, 3, 3, 3], "gradient_accumulation": 64, **values}
    path = folder / "configs.yml"
    path.write_text(f"{text}\n{yaml.safe_dump({'a': entry})}")
    return path


# What every overlay is


ENTRIES = [("ipu_config.json", None), ("older_ipu_config.json", "pod16")]
ENTRIES += [("configs.yml", name) for name in ("finetune", "automatic", "pretrain")]


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_overlay_is_written_and_trains_over_the_pod4_recipe(name, entry, tmp_path, capsys):
    words = [str(FILES / name), *(["--entry", entry] if entry else [])]
    path = tmp_path / "my.yaml"
    assert main(["import-ipu-config", *words, "--write", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"\nwritten: {path}\n")
    text = path.read_text()
    assert text.startswith(f"# python train.py --config configs/vit_pod4.yaml {path}\n#\n# From ")
    assert name in text.splitlines()[2] and (entry is None or entry in text.splitlines()[2])
    config = load_config([POD4, path])
    assert ipu_problems(config) == []
    for key, value in overlay_of(FILES / name, entry).items():
        section, _, field = key.partition(".")
        if key != "pipeline.layers_per_stage":
            assert getattr(getattr(config, section), field) == value, key


def test_every_key_of_ours_in_the_tables_exists():
    for name, entry in ENTRIES:
        for key in overlay_of(FILES / name, entry):
            section, _, field = key.partition(".")
            assert field in SECTIONS[section].model_fields


def test_documented_keys_of_ipu_config_have_rules():
    """Those of optimum-graphcore's documentation of IPUConfig."""
    split = ["embedding_serialization_factor", "serialized_embedding_splits_per_ipu"]
    split += ["projection_serialization_factor", "serialized_projection_splits_per_ipu"]
    both = ["replication_factor", "layers_per_ipu", "ipus_per_replica", "matmul_proportion"]
    both += ["device_iterations", "parallelize_kwargs", *split]
    once = ["seed", "auto_loss_scaling", "executable_cache_dir", "gradient_accumulation_steps"]
    once += ["optimizer_state_offchip", "replicated_tensor_sharding", "enable_half_partials"]
    once += ["recompute_checkpoint_every_layer", "explicit_ir_inference", "output_mode"]
    assert {*both, *once, *(f"inference_{key}" for key in both)} <= set(IPU_CONFIG)


# IPUConfig


def test_ipu_config_becomes_our_keys():
    assert overlay_of(FILES / "ipu_config.json") == {
        "run.seed": 42,
        "pipeline.layers_per_stage": [2, 3, 3, 4],
        "pipeline.eval_layers_per_stage": [6, 6],
        "pipeline.eval_execution": "pipelined",
        "pipeline.recompute": "every_layer",
        "pipeline.available_memory_proportion": [0.25, 0.3, 0.3, 0.2],
        "pipeline.eval_available_memory_proportion": 0.2,  # theirs for another number of IPUs
        "batch.gradient_accumulation": 64,
        "batch.replicas": 1,
        "batch.device_iterations": 2,
        "batch.eval_device_iterations": 4,
        "batch.eval_replicas": None,
        "engine.optimizer_state_on_chip": False,
        "engine.replicated_tensor_sharding": False,  # one replica
        "engine.partials": "fp16",
        "engine.executable_cache": "./exe_cache",
    }


def test_folder_means_the_file_in_it(tmp_path):
    path = ipu_config(tmp_path)
    assert import_file(tmp_path).overlay == import_file(path).overlay


@pytest.mark.parametrize(
    ("layers", "ipus", "expected"),
    [
        ([-1], 4, [-1, -1, -1, -1]),
        (None, 4, [-1, -1, -1, -1]),
        ([1, -1, -1], 3, [1, -1, -1]),
        ([3, 3, 3, 3], 1, [-1]),  # one IPU takes all
        ([12], 1, [12]),
        ([3, 3, 3, 3], None, [3, 3, 3, 3]),
    ],
)
def test_layers_are_spread_as_optimum_graphcore_does(layers, ipus, expected, tmp_path):
    path = ipu_config(tmp_path, layers_per_ipu=layers, ipus_per_replica=ipus)
    assert overlay_of(path)["pipeline.layers_per_stage"] == expected


def test_wildcards_are_filled_in_by_our_configuration(tmp_path):
    path = ipu_config(tmp_path, layers_per_ipu=[-1], ipus_per_replica=4)
    out = tmp_path / "my.yaml"
    assert main(["import-ipu-config", str(path), "--write", str(out)]) == 0
    assert load_config([POD4, out]).pipeline.layers_per_stage == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"inference_layers_per_ipu": [6, 6]}, [6, 6]),
        ({"inference_layers_per_ipu": [3, 3, 3, 3]}, None),
        ({"inference_layers_per_ipu": [-1], "inference_ipus_per_replica": 2}, [-1, -1]),
        ({"inference_ipus_per_replica": 1}, [-1]),
    ],
)
def test_layers_of_inference(values, expected, tmp_path):
    path = ipu_config(tmp_path, **values)
    assert overlay_of(path)["pipeline.eval_layers_per_stage"] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"replicated_tensor_sharding": True}, {"engine.replicated_tensor_sharding": False}),
        (
            {"replicated_tensor_sharding": True, "replication_factor": 2},
            {"engine.replicated_tensor_sharding": True, "batch.replicas": 2},
        ),
        ({"replication_factor": 2}, {"batch.eval_replicas": 1}),
        (
            {"replication_factor": 2, "inference_replication_factor": 2},
            {"batch.eval_replicas": None},
        ),
        ({"recompute_checkpoint_every_layer": False}, {"pipeline.recompute": "stage_inputs"}),
        ({"enable_half_partials": False}, {"engine.partials": "fp32"}),
        ({"inference_device_iterations": 3}, {"pipeline.eval_execution": "sharded"}),
        ({"inference_device_iterations": 4}, {"pipeline.eval_execution": "pipelined"}),
        ({"sharded_execution_for_inference": True}, {"pipeline.eval_execution": "sharded"}),
        (
            {"auto_loss_scaling": True},
            {"optim.loss_scaling": "auto", "optim.accumulator": "fp16"},
        ),
        ({"enable_half_first_order_momentum": True}, {"optim.first_moment": "fp16"}),
        ({"executable_cache_dir": "disabled"}, {"engine.executable_cache": None}),
        ({"matmul_proportion": [0.4]}, {"pipeline.available_memory_proportion": 0.4}),
        (
            {"matmul_proportion": 0.3, "inference_matmul_proportion": 0.6},
            {"pipeline.eval_available_memory_proportion": 0.6},
        ),
        (
            {"explicit_ir_inference": True, "decompose_grad_sum": True},
            {
                "engine.poptorch_options": {
                    "inference": {"_Popart.set": {"enableExplicitIR": True}},
                    "training": {"_Popart.set": {"decomposeGradSum": True}},
                }
            },
        ),
    ],
)
def test_value_of_ipu_config(values, expected, tmp_path):
    overlay = overlay_of(ipu_config(tmp_path, **values))
    assert {key: overlay[key] for key in expected} == expected


def test_session_options_are_accepted_for_their_graph(tmp_path):
    path, out = ipu_config(tmp_path, explicit_ir_inference=True), tmp_path / "my.yaml"
    assert main(["import-ipu-config", str(path), "--write", str(out)]) == 0
    options = load_config([POD4, out]).engine.model_dump()["poptorch_options"]
    assert options["inference"] == {"_Popart.set": {"enableExplicitIR": True}}
    assert load_config([POD4, out]).pipeline.eval_execution == "sharded"
    assert not options.get("training") and not options.get("both")


@pytest.mark.parametrize("key", ["seed", "auto_loss_scaling", "explicit_ir_inference"])
def test_value_that_sets_nothing_there_sets_nothing_here(key, tmp_path):
    off = {"seed": 0}.get(key, False)
    path = ipu_config(tmp_path)
    before = import_file(path).overlay
    assert import_file(ipu_config(tmp_path, **{key: off})).overlay == before


@pytest.mark.parametrize(
    ("entry", "expected"), [(None, (1, 64)), ("pod4", (1, 64)), ("pod16", (4, 16))]
)
def test_older_file_has_values_for_each_pod(entry, expected):
    overlay = overlay_of(FILES / "older_ipu_config.json", entry)
    assert (overlay["batch.replicas"], overlay["batch.gradient_accumulation"]) == expected


# configs.yml


def test_entry_of_the_example_becomes_our_keys():
    assert overlay_of(FILES / "configs.yml", "finetune") == {
        "run.seed": 7,
        "data.num_workers": 8,
        "model.name": "google/vit-base-patch16-224-in21k",
        "model.hidden_dropout": 0.1,
        "model.attention_dropout": 0.0,
        "model.layer_norm_eps": 1e-6,
        "pipeline.layers_per_stage": [3, 3, 3, 3],
        "pipeline.recompute": "every_layer",  # marks within layers are read by pretrain.py
        "pipeline.available_memory_proportion": [0.3, 0.3, 0.3, 0.3],
        "batch.micro_batch_size": 4,
        "batch.gradient_accumulation": 32,
        "batch.replicas": 2,
        "batch.device_iterations": 4,
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.weight_decay": 0.0,
        "optim.momentum": 0.85,
        "optim.loss_scaling": 8.0,
        "optim.accumulator": "fp16",
        "optim.first_moment": "fp16",
        "optim.second_moment": "fp32",
        "schedule.name": "cosine",
        "schedule.warmup_steps": 40,  # four updates in a host call
        "train.steps": 400,
        "train.checkpoint_every_steps": 200,
        "engine.precision": "fp16",
        "engine.weights": "fp16",
        "engine.partials": "fp16",
        "engine.stochastic_rounding": True,
        "engine.optimizer_state_on_chip": True,
        "engine.replicated_tensor_sharding": True,
        "engine.loader_mode": "async_rebatched",
        "engine.loader_buffer_size": 8,
        "engine.loader_early_preload": True,
        "engine.rebatched_worker_size": 256,  # as there, at most a global batch
        "engine.prefetch_depth": 2,
    }


def test_pre_training_entry():
    overlay = overlay_of(FILES / "configs.yml", "pretrain")
    assert overlay["model.name"] == "vit-base"
    assert overlay["model.patch_size"] == 16
    assert overlay["pipeline.recompute"] == [
        *("every_layer", "attention_mlp", "every_layer", "attention_mlp")
    ]
    assert overlay["train.epochs"] == 5 and "train.steps" not in overlay
    optim = {key[6:]: value for key, value in overlay.items() if key.startswith("optim.")}
    assert optim == {
        "name": "lamb",
        "lr": 0.03,
        "weight_decay": 0.0,
        "loss_scaling": 8.0,
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-6,
        "bias_correction": False,
        "max_weight_norm": 100.0,
        "accumulator": "fp16",
        "first_moment": "fp32",
        "second_moment": "fp32",
    }


def test_automatic_loss_scaling_wins_over_a_number():
    overlay = overlay_of(FILES / "configs.yml", "automatic")
    assert overlay["optim.loss_scaling"] == "auto"
    assert overlay["optim.accumulator"] == "fp16"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"precision": "32.32"}, {"engine.precision": "fp32", "engine.weights": "fp32"}),
        ({"precision": "16.32"}, {"engine.precision": "fp16", "engine.weights": "fp16"}),
        ({}, {"engine.optimizer_state_on_chip": False, "pipeline.recompute": "stage_inputs"}),
        (
            {"lr_schedule": "constant", "warmup_steps": 9},
            {"schedule.name": "constant", "schedule.warmup_steps": 0},
        ),
        ({"optimizer": "Adam", "epochs": 7}, {"optim.name": "adamw", "train.epochs": 7}),
    ],
)
def test_value_of_the_example(values, expected, tmp_path):
    overlay = overlay_of(example(tmp_path, "", **values), "a")
    assert {key: overlay[key] for key in expected} == expected


def test_values_that_only_other_optimizers_read_are_left_out(tmp_path):
    values = {"momentum": 0.5, "bias_correction": False, "use_combined_accum": True}
    overlay = overlay_of(example(tmp_path, "", optimizer="Adam", **values), "a")
    assert not {"optim.momentum", "optim.bias_correction", "optim.use_combined_accum"} & set(
        overlay
    )


def test_entries_are_listed(capsys):
    assert main(["import-ipu-config", str(FILES)]) == 0  # an IPUConfig goes first
    assert "IPUConfig" in capsys.readouterr().out
    assert main(["import-ipu-config", str(FILES / "configs.yml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[1:]] == [
        *("defaults", "finetune", "automatic", "pretrain", "one_step")
    ]


def test_nearer_value_wins_in_a_merge(tmp_path):
    text = "x: &x {random_seed: 1, prefetch_depth: 1}\ny: &y {random_seed: 2, micro_batch_size: 2}"
    path = tmp_path / "configs.yml"
    path.write_text(f"{text}\na:\n  <<: [*x, *y]\n  prefetch_depth: 9\n")
    overlay = overlay_of(path, "a")
    assert overlay["run.seed"] == 1  # the first of several
    assert (overlay["engine.prefetch_depth"], overlay["batch.micro_batch_size"]) == (9, 2)


# What is printed


def printed(words: List[str], capsys: Any) -> Tuple[str, str]:
    """Return the report, without repeated spaces, and the overlay that the command prints."""
    assert main(["import-ipu-config", *words]) == 0
    report, _, overlay = capsys.readouterr().out.partition("\noverlay:\n\n")
    return re.sub(" +", " ", report), overlay


def test_every_key_of_the_file_has_a_line(capsys):
    report, _ = printed([str(FILES / "ipu_config.json")], capsys)
    given = json.loads((FILES / "ipu_config.json").read_text())
    known, _, rest = report.partition("\nnot in the file")
    for key in set(given) - {"layers_on_host"}:
        assert len(re.findall(rf"^{key} = .+ -> .+ \(.+\)$", known, re.M)) == 1
    assert rest.endswith("unknown, and left out:\nlayers_on_host\n")


@pytest.mark.parametrize(
    "line",
    [
        "layers_per_ipu = [2, 3, 3, 4] -> pipeline.layers_per_stage = [2, 3, 3, 4] (the same",
        "output_mode = all -> nothing here (fixed by the engine",
        "embedding_serialization_factor = 1 -> nothing here (not for a ViT",
        "optimizer_state_offchip = true -> engine.optimizer_state_on_chip = false (the opposite)",
        "inference_replication_factor = 1 -> batch.eval_replicas = null (the same default)",
    ],
)
def test_line_says_what_a_key_becomes_and_why(line, capsys):
    assert line in printed([str(FILES / "ipu_config.json")], capsys)[0]


def test_default_that_differs_is_named(tmp_path, capsys):
    report, overlay = printed([str(ipu_config(tmp_path))], capsys)
    line = "matmul_proportion = 0.2 -> pipeline.available_memory_proportion = 0.2"
    assert f"{line} (the default differs: ours is null)" in report
    assert yaml.safe_load(overlay)["pipeline"]["available_memory_proportion"] == 0.2


def test_warning_of_check_is_printed(tmp_path, capsys):
    # The recipe below has a loss scaling of 1024.
    values = {"enable_half_first_order_momentum": True, "auto_loss_scaling": True}
    report, _ = printed([str(ipu_config(tmp_path, **values))], capsys)
    assert "\nwarning: optim.accumulator=fp16 with optim.first_moment=fp16:" in report


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"gradient_accumulation_steps": 1},
            "batch.gradient_accumulation=1 is less than the 7 pipeline stages",
        ),
        ({"layers_per_ipu": [3, 3, 3]}, "places 9 layers; the model has 12. Make the list add up"),
        (
            {"layers_per_ipu": [6, 6], "ipus_per_replica": 4},
            "layers_per_ipu=[6, 6] with ipus_per_replica=4: they disagree",
        ),
        ({"matmul_proportion": 0}, "pipeline.available_memory_proportion=0: must be number > 0"),
        ({"matmul_proportion": [0.1, 0.2]}, "has 2 numbers; there are 4 stages"),
    ],
)
def test_what_remains_to_correct_is_an_error_and_in_the_overlay(values, problem, tmp_path, capsys):
    out = tmp_path / "my.yaml"
    with pytest.raises(ConfigError) as error:
        main(["import-ipu-config", str(ipu_config(tmp_path, **values)), "--write", str(out)])
    assert problem in str(error.value)
    assert "command line" not in str(error.value)
    comment = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert any(problem in line for line in comment)


def test_shape_that_no_size_has(tmp_path, capsys):
    path = example(tmp_path, "", pretrained_checkpoint="", hidden_size=100, num_hidden_layers=2)
    with pytest.raises(ConfigError, match=r"hidden_size=100, .* none of our sizes. Set model.name"):
        main(["import-ipu-config", str(path), "--entry", "a"])


def test_weights_of_another_machine(tmp_path):
    path = example(tmp_path, "", pretrained_checkpoint="./output/step_500")
    with pytest.raises(ConfigError, match=r"pretrained_checkpoint=./output/step_500 is no folder"):
        main(["import-ipu-config", str(path), "--entry", "a"])


# What is refused


def refused(words: List[str]) -> str:
    with pytest.raises(ConfigError) as error:
        main(["import-ipu-config", *map(str, words)])
    message = str(error.value)
    assert message.isprintable() or "\n" in message
    return message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replication_factor": [1]}, "replication_factor=[1] must be an integer of 1 or more."),
        ({"replication_factor": True}, "replication_factor=true must be an integer of 1 or more."),
        ({"replication_factor": 2**70}, "must be an integer of 1 or more."),
        ({"replication_factor": {"pod4": 1, "else": 2}}, "must be an integer of 1 or more."),
        ({"layers_per_ipu": 3}, "layers_per_ipu=3 must be a list of integers of 0 or more, or -1."),
        ({"layers_per_ipu": []}, "layers_per_ipu=[] must be a list"),
        ({"layers_per_ipu": [1] * 2000}, "must be a list of integers"),
        ({"ipus_per_replica": 2**40}, "must be an integer, 1 to 1024."),
        ({"seed": -1}, "seed=-1 must be an integer of 0 or more."),
        ({"executable_cache_dir": ["\x1b[2J"]}, "must be a path"),
        ({"executable_cache_dir": "a/" + "b" * 300}, "names of up to 255 characters."),
    ],
)
def test_value_of_a_wrong_type(values, message, tmp_path):
    text = refused([ipu_config(tmp_path, **values)])
    assert message in text and str(tmp_path) in text


def test_every_wrong_value_is_listed(tmp_path):
    path = ipu_config(tmp_path, seed="x", replication_factor=0)
    assert len(refused([path]).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read an IPUConfig"),
        ("[1]", "it holds no JSON object"),
        ("{" * 50, "cannot read an IPUConfig"),
        ('{"a": ' + "[" * 30000 + "]" * 30000 + "}", "it is nested too deeply"),
        ('{"seed": NaN}', "NaN is no finite number"),
        ('{"a": "' + "x" * 70000 + '"}', "more than the limit of 65,536"),
        ('{"model_type": "vit"}', "none of its keys is known"),
        ('{"seed": {"pod4": 1}}', "seed has no value for default. Choose with --entry: pod4."),
    ],
)
def test_file_that_is_no_ipu_config(text, message, tmp_path):
    path = tmp_path / "ipu_config.json"
    path.write_text(text)
    assert message in refused([path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no entries"),
        ("a: 1", "has no entries"),
        ("a: [", "not valid YAML"),
        ("a: {<<: 1}", "'<<' merges"),
        ("a: &a {<<: *a}", "'<<' merges"),
        ("a: {[1]: 2}", "a key is a word"),
        ("a: {x: !!python/object/apply:os.system [ls]}", "none of its keys is known"),
        ("a: {micro_batch_size: [1]}", "micro_batch_size=[1] must be an integer of 1 or more."),
        ("a: {micro_batch_size: {b: 1}}", "micro_batch_size={} must be"),
        ("a: {layer_norm_eps: .inf}", "must be a number."),
        ("a: [" + "1, " * 9000 + "]", "over 5000 values"),
    ],
)
def test_file_that_is_no_example(text, message, tmp_path):
    path = tmp_path / "configs.yml"
    path.write_text(text)
    assert message in refused([path, "--entry", "a"])


def test_merges_that_triple_the_keys_are_read_at_once(tmp_path):
    lines = ["b0: &b0 {random_seed: 3}"]
    lines += [f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 3)}]}}" for n in range(1, 30)]
    path = tmp_path / "configs.yml"
    path.write_text("\n".join(lines))
    assert overlay_of(path, "b15")["run.seed"] == 3
    assert "'<<' merges" in refused([path, "--entry", "b29"])


def test_named_pipe_and_missing_file(tmp_path):
    os.mkfifo(str(tmp_path / "ipu_config.json"))
    assert "a named pipe" in refused([tmp_path])
    assert "there is no such file" in refused([tmp_path / "other.json"])
    (tmp_path / "empty").mkdir()
    assert "has neither ipu_config.json nor configs.yml" in refused([tmp_path / "empty"])


def test_unknown_entry_has_a_suggestion():
    words = [FILES / "configs.yml", "--entry"]
    assert "Did you mean 'finetune'?" in refused([*words, "fintune"])
    assert "it has default, pod16, pod4, pod8" in refused(
        [FILES / "older_ipu_config.json", "--entry", "pod5"]
    )
    assert "no values by POD" in refused([FILES / "ipu_config.json", "--entry", "pod4"])


def test_existing_file_is_not_replaced(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    assert "exists. Name a new file" in refused([FILES / "ipu_config.json", "--write", path])
    assert path.read_text() == "mine"
    folder = tmp_path / "none" / "my.yaml"
    assert "cannot be written" in refused([FILES / "ipu_config.json", "--write", folder])
    text = refused([FILES / "configs.yml", "--write", tmp_path / "new.yaml"])
    assert text.startswith("--write needs --entry NAME, one of defaults, finetune")


def test_control_characters_are_escaped(tmp_path, capsys):
    path = ipu_config(tmp_path, **{"un\x1b[2Jknown": 1, "executable_cache_dir": "a\nb"})
    main(["import-ipu-config", str(path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "un\\x1b[2Jknown" in out
