"""Rules that involve several sections, and rules for the number of processes."""

import json
import re
from typing import List

import pytest

from cxr_vit.config import check, dump_config, load_config, read_config
from cxr_vit.config.columns import PatternColumn, searchable_length
from cxr_vit.config.rules import check_processes
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError

VALID = ["model.name=vit-micro", "model.patch_size=8", "data.image_size=64"]
VALID += ["pipeline.layers_per_stage=[1, 1, 1, 1]"]


def broken(*overrides: str) -> List[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([], [*VALID, *overrides])
    return str(caught.value).split("\n")


def only_problem(*overrides: str) -> str:
    problems = broken(*overrides)
    assert len(problems) == 1, problems
    return problems[0]


def test_valid_config_is_returned():
    config = read_config([], VALID)
    assert check(config) is config


def test_defaults_are_valid():
    config = read_config([])
    assert check(config) is config


def test_stages_with_too_few_layers():
    message = only_problem(
        "model.name=vit-tiny", "model.patch_size=16", "pipeline.layers_per_stage=[3, 3, 3, 2]"
    )
    assert message.startswith(
        "pipeline.layers_per_stage=[3, 3, 3, 2] places 11 layers; the model has 12."
    )


def test_stages_with_too_many_layers():
    message = only_problem("pipeline.layers_per_stage=[5]")
    assert message.startswith("pipeline.layers_per_stage=[5] places 5 layers; the model has 4.")


def test_depth_of_a_hub_name_follows_from_its_size():
    message = only_problem("model.name=google/vit-large-patch16-224-in21k")
    assert "the model has 24." in message


def test_depth_of_a_local_folder_is_read_from_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 7}), encoding="utf-8")
    assert "the model has 7." in only_problem(f"model.name={tmp_path}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_hidden_layers": "many"}', "[" * 100_000])
def test_local_folder_with_an_invalid_config_is_not_checked(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    config = read_config([], [*VALID, f"model.name={tmp_path}"])
    assert check(config) is config


def test_depth_is_that_of_the_config_beside_a_file(tmp_path):
    folder = tmp_path / "vit-base-patch16"
    folder.mkdir()
    file = folder / "weights.safetensors"
    file.write_bytes(b"")
    for name in (folder, file):  # not the depth of a vit-base
        config = read_config([], [*VALID, f"model.name={name}"])
        assert check(config) is config
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 7}), encoding="utf-8")
    for name in (folder, file):
        assert "the model has 7." in only_problem(f"model.name={name}")


def test_hub_name_without_a_size_is_not_checked():
    config = read_config([], [*VALID, "model.name=someone/chest-model"])
    assert check(config) is config


def test_revision_is_for_a_hub_name(tmp_path):
    message = only_problem("model.revision=v1")
    assert message.startswith("model.revision=v1 is for a hub name; model.name=vit-micro is a size")
    message = only_problem(f"model.name={tmp_path}", "model.revision=v1")
    assert f"model.name={tmp_path} is a folder" in message
    config = read_config([], [*VALID, "model.name=a/b", "model.revision=refs/pr/1"])
    assert check(config).model.revision == "refs/pr/1"
    for value in ("../../etc", "/etc", "a b", ""):
        assert "model.revision=" in only_problem("model.name=a/b", f"model.revision='{value}'")


def test_unknown_size_suggests_the_nearest_and_lists_all():
    message = only_problem("model.name=vit-smal")
    assert "model.name='vit-smal'" in message
    assert "Did you mean 'vit-small'?" in message
    assert "vit-micro, vit-tiny, vit-small, vit-base" in message


def test_image_size_that_is_not_a_multiple_of_the_patch():
    message = only_problem("data.image_size=60")
    assert message == (
        "data.image_size=60 is not a multiple of model.patch_size=8."
        " Nearest legal image sizes: 56 or 64."
    )


def test_patch_size_of_a_hub_name_is_a_guess_and_refuses_no_image_size(tmp_path):
    hub = ["model.name=facebook/dinov2-base", "pipeline.layers_per_stage=[12]"]
    assert load_config([], [*hub, "data.image_size=225"]).data.image_size == 225
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    message = only_problem(f"model.name={tmp_path}", *hub[1:], "data.image_size=225")
    assert "is not a multiple of 14, the patch size of model.name=" in message


def test_image_smaller_than_a_patch():
    message = only_problem("data.image_size=12", "model.patch_size=16")
    assert message.endswith("Nearest legal image sizes: 16.")


@pytest.mark.parametrize(("size", "patch"), [(8, 3), (2040, 100)])
def test_suggested_image_sizes_are_in_the_field_range(size, patch):
    message = only_problem(f"data.image_size={size}", f"model.patch_size={patch}")
    for legal in re.findall(r"\d+", message.partition("Nearest legal image sizes:")[2]):
        assert read_config([], [f"data.image_size={legal}"]).data.image_size % patch == 0


def test_patch_size_of_pretrained_weights_is_not_checked():
    overrides = ["model.name=google/vit-base-patch16-224-in21k", "model.patch_size=9"]
    config = read_config([], overrides)
    assert check(config) is config


def test_global_batch_that_is_not_a_multiple_of_the_micro_batch():
    message = only_problem("batch.micro_batch_size=16", "batch.global_batch_size=100")
    assert message.startswith("batch.global_batch_size=100 is not a multiple of 16")
    assert message.endswith("Nearest legal values: 96 or 112.")


def test_evaluation_stages_must_have_the_same_layers():
    message = only_problem("pipeline.eval_layers_per_stage=[2, 1]")
    assert message.startswith("pipeline.eval_layers_per_stage=[2, 1] places 3 layers")
    assert "pipeline.layers_per_stage=[1, 1, 1, 1] 4" in message


def test_recompute_needs_one_item_per_stage():
    message = only_problem("pipeline.recompute=[every_layer, stage_inputs]")
    assert "has 2 items; there are 4 stages" in message


def test_recompute_layers_must_be_on_their_stage():
    choices = "pipeline.recompute=[[0], [1], [3], every_layer]"
    message = only_problem(choices)
    assert "item 2 names layers [3], but stage 2 has the layers [2]" in message
    load_config([], [*VALID, choices.replace("[3]", "[2]")])


def test_lamb_needs_poptorch():
    message = only_problem("optim.name=lamb", "engine.name=torch")
    assert message.startswith("optim.name=lamb")
    assert "engine.name=poptorch" in message
    load_config([], [*VALID, "optim.name=lamb"])  # engine.name=auto may find IPUs


def test_ipu_rules_apply_only_to_the_poptorch_engine():
    refused = ["engine.name=poptorch", "batch.gradient_accumulation=4"]
    assert len(broken(*refused, "batch.eval_device_iterations=1")) == 2
    load_config([], [*VALID, "batch.gradient_accumulation=4"])


@pytest.mark.parametrize("split", ["patient", "random"])
def test_fractions_that_leave_no_training_images(split):
    message = only_problem(f"data.split={split}", "data.val_fraction=0.5", "data.test_fraction=0.5")
    assert message.startswith("data.val_fraction=0.5 and data.test_fraction=0.5 leave nothing")
    assert "below 1" in message


def test_test_fraction_does_not_count_in_the_official_split():
    overrides = ["data.split=official", "data.val_fraction=0.5", "data.test_fraction=0.5"]
    config = read_config([], [*VALID, *overrides])
    assert check(config) is config


def test_steps_must_be_a_multiple_of_device_iterations():
    message = only_problem("train.steps=10", "batch.device_iterations=4")
    assert message.startswith("train.steps=10 is not a multiple of batch.device_iterations=4")
    assert message.endswith("Nearest legal values: 8 or 12.")


def test_fewer_steps_than_one_host_call():
    message = only_problem("train.steps=3", "batch.device_iterations=4")
    assert message.endswith("Nearest legal values: 4.")


def test_two_broken_rules_are_reported_at_once():
    problems = broken("pipeline.layers_per_stage=[3]", "data.image_size=60")
    assert len(problems) == 2
    assert any("places 3 layers" in line for line in problems)
    assert any("data.image_size=60" in line for line in problems)


def test_every_broken_rule_is_reported():
    problems = broken(
        "pipeline.layers_per_stage=[3]",
        "data.image_size=60",
        "batch.micro_batch_size=16",
        "batch.global_batch_size=100",
        "pipeline.eval_layers_per_stage=[4]",
        "data.split=random",
        "data.val_fraction=0.5",
        "data.test_fraction=0.6",
        "train.steps=3",
        "batch.device_iterations=2",
    )
    expected = [
        "pipeline.layers_per_stage=",
        "data.image_size=",
        "batch.global_batch_size=",
        "pipeline.eval_layers_per_stage=",
        "data.val_fraction=",
        "train.steps=",
    ]
    assert [
        start for start in expected if not any(line.startswith(start) for line in problems)
    ] == []


def test_every_problem_names_a_key():
    problems = broken(
        "pipeline.layers_per_stage=[3]", "data.image_size=60", "pipeline.eval_layers_per_stage=[4]"
    )
    for line in problems:
        section, key = re.match(r"(\w+)\.(\w+)=", line).groups()
        assert key in SECTIONS[section].model_fields


# Processes


def config_of(*overrides):
    valid = ["model.name=vit-micro", "pipeline.layers_per_stage=[1,1,1,1]", "engine.name=pipeline"]
    return load_config([], [*valid, "batch.gradient_accumulation=8", *overrides])


def process_problem(*overrides, engine="pipeline", world=4):
    with pytest.raises(ConfigError) as caught:
        check_processes(config_of(*overrides), engine, world)
    return str(caught.value)


@pytest.mark.parametrize(("replicas", "world"), [(1, 4), (2, 8), (3, 12)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_stages_times_replicas_processes_pass(replicas, world, schedule):
    config = config_of(f"batch.replicas={replicas}", f"pipeline.schedule={schedule}")
    check_processes(config, "pipeline", world)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_other_number_of_processes_is_refused(world):
    text = process_problem(world=world)
    assert "needs 4 processes = 4 stages x 1 replicas" in text
    assert f"there {'is' if world == 1 else 'are'} {world}." in text
    assert "torchrun --nproc-per-node 4, or" in text
    assert ("engine.name=torch" in text) == (world == 1)


def test_processes_include_replicas():
    assert "8 processes = 4 stages x 2 replicas" in process_problem("batch.replicas=2", world=4)


def test_interleaved_stages_may_share_a_process():
    config = config_of("pipeline.schedule=interleaved_1f1b", "batch.replicas=2")
    check_processes(config, "pipeline", 4)  # two processes of two stages each, twice
    text = process_problem("pipeline.schedule=interleaved_1f1b", world=3)
    assert (
        "4 processes = 4 stages x 1 replicas (or 2, several stages each), and there are 3" in text
    )


def test_only_interleaved_stages_may_share_a_process():
    assert "(or" not in process_problem("pipeline.schedule=1f1b", world=2)


def test_one_stage_and_one_replica_suggest_the_torch_engine():
    assert "engine.name=torch" in process_problem("pipeline.layers_per_stage=[4]", world=1)


def test_1f1b_needs_one_micro_batch_per_stage():
    text = process_problem("batch.gradient_accumulation=3")
    assert "batch.gradient_accumulation=3 is less than the 4 stages" in text
    assert "Smallest legal value: 4" in text
    config = config_of("batch.gradient_accumulation=3", "pipeline.schedule=gpipe")
    check_processes(config, "pipeline", 4)


def test_problem_names_the_global_batch_if_given():
    text = process_problem("batch.gradient_accumulation=null", "batch.global_batch_size=2")
    assert "batch.global_batch_size=2, an accumulation of 2, is less than" in text


@pytest.mark.parametrize(("count", "legal"), [(9, "8 or 10"), (13, "12 or 15")])
def test_interleaving_needs_whole_rounds(count, legal):
    overrides = ("pipeline.schedule=interleaved_1f1b", f"batch.gradient_accumulation={count}")
    assert f"Nearest legal values: {legal}." in process_problem(*overrides)
    for value in legal.split(" or "):
        config = config_of(overrides[0], f"batch.gradient_accumulation={value}")
        check_processes(config, "pipeline", 4)


@pytest.mark.parametrize(("replicas", "world"), [(1, 1), (4, 4), (4, 2), (6, 3)])
def test_torch_engine_accepts_equal_replicas_per_process(replicas, world):
    check_processes(config_of(f"batch.replicas={replicas}"), "torch", world)


def test_torch_engine_refuses_processes_without_a_replica():
    text = process_problem("batch.replicas=2", engine="torch", world=4)
    assert "batch.replicas=2, but torchrun started 4 processes" in text
    assert "Set batch.replicas=4" in text and "--nproc-per-node 2" in text


def test_inner_stage_without_layers_is_refused():
    with pytest.raises(ConfigError, match="leaves stage 1 without work"):
        config_of("pipeline.layers_per_stage=[2, 0, 2]")
    config_of("pipeline.layers_per_stage=[0, 4, 0]")


def test_pipeline_engine_refuses_lamb():
    with pytest.raises(ConfigError, match=r"engine\.name=pipeline has adamw and sgd"):
        config_of("optim.name=lamb")


def test_rest_of_the_layers_is_filled_in():
    cuts = ["pipeline.layers_per_stage=[1, -1, -1]", "pipeline.eval_layers_per_stage=[-1]"]
    config = load_config([], [*VALID, *cuts])
    assert config.pipeline.layers_per_stage == [1, 1, 2]
    assert config.pipeline.eval_layers_per_stage == [4]


def test_rest_needs_a_known_depth():
    problem = only_problem("model.name=someone/model", "pipeline.layers_per_stage=[3, -1]")
    assert problem == (
        "pipeline.layers_per_stage=[3, -1]: model.name='someone/model' does not imply how many"
        " layers are left. Write the numbers."
    )


def test_no_layers_left():
    problem = only_problem("pipeline.layers_per_stage=[3, -1, 3]")
    assert problem.startswith("pipeline.layers_per_stage=[3, 0, 3] places 6 layers")


@pytest.mark.parametrize(
    ("name", "setting", "rule"),
    [
        ("adamw", "bias_correction=false", "is for lamb: torch's AdamW always corrects it"),
        ("sgd", "bias_correction=false", "is for lamb. Leave it out, or set optim.name=lamb."),
        ("adamw", "max_weight_norm=5", "is for lamb."),
        ("adamw", "use_combined_accum=true", "is for sgd."),
        ("adamw", "nesterov=true", "is for sgd."),
        ("lamb", "nesterov=true", "is for sgd."),
    ],
)
def test_setting_of_another_optimizer(name, setting, rule):
    problem = only_problem(f"optim.name={name}", f"optim.{setting}")
    assert problem.startswith(f"optim.{setting}")
    assert f"with optim.name={name} {rule}" in problem


def test_nesterov_needs_a_momentum():
    settings = ("optim.name=sgd", "optim.nesterov=true")
    assert only_problem(*settings, "optim.momentum=0") == (
        "optim.nesterov=true with optim.momentum=0: there is no momentum to have its form. Set"
        " optim.momentum, 0.9 for example, or leave optim.nesterov out."
    )
    assert load_config([], [*VALID, *settings]).optim.nesterov


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["min_lr=2e-4"],
            "schedule.min_lr=0.0002 is not below the peak rate, 0.0002. Lower it, or raise"
            " optim.lr.",
        ),
        (
            ["min_lr=1e-5", "name=constant"],
            "schedule.min_lr=1e-05 with schedule.name=constant: the rate never falls. Leave it"
            " out, or set schedule.name=cosine or linear.",
        ),
        (
            ["warmup_epochs=5"],
            "schedule.warmup_epochs=5 needs train.epochs, and train.steps=7 is given. Set"
            " schedule.warmup_steps or schedule.warmup_ratio, or train.epochs.",
        ),
        (
            ["warmup_steps=7"],
            "schedule.warmup_steps=7 is not below train.steps=7: the rate would not reach its peak."
            " Lower it, or raise train.steps.",
        ),
    ],
)
def test_schedules_that_have_no_meaning(settings, message):
    overrides = [f"schedule.{setting}" for setting in settings]
    assert only_problem(*overrides, "train.steps=7") == message


def test_warm_up_in_epochs_is_shorter_than_the_training():
    settings = ("train.epochs=1.5", "schedule.warmup_epochs=1.5")
    assert only_problem(*settings) == (
        "schedule.warmup_epochs=1.5 is not below train.epochs=1.5: the rate would not reach its"
        " peak. Lower it, or raise train.epochs."
    )
    load_config([], [*VALID, *settings, "schedule.warmup_epochs=1.4"])


def test_floor_is_compared_with_the_rate_of_the_global_batch():
    """1e-3 for 256 images is 1e-3 / 32 for 8."""
    settings = ("optim.base_lr=1e-3", "batch.gradient_accumulation=8")
    message = only_problem(*settings, "schedule.min_lr=1e-4")
    assert message.startswith("schedule.min_lr=0.0001 is not below the peak rate, 3.125e-05. Lower")
    assert message.endswith("or raise optim.base_lr.")
    assert load_config([], [*VALID, *settings, "schedule.min_lr=1e-5"]).peak_lr == 3.125e-5


def test_rate_for_256_images_replaces_the_rate_and_the_other_way_round(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {base_lr: 0.5}\nbatch: {global_batch_size: 64}", encoding="utf-8")
    config = load_config([recipe], VALID)
    assert (config.optim.lr, config.peak_lr) == (None, 0.125)
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config([tmp_path / "run.yaml"]) == config
    config = load_config([recipe], [*VALID, "optim.lr=0.3"])
    assert (config.optim.base_lr, config.peak_lr) == (None, 0.3)
    with pytest.raises(ConfigError, match="give 'lr' or 'base_lr', not both"):
        load_config([], [*VALID, "optim={lr: 0.1, base_lr: 0.2}"])


def test_more_frozen_layers_than_there_are():
    assert only_problem("model.freeze=5") == (
        "model.freeze=5 freezes 5 layers; the model has 4. Set 4 or fewer, or trunk for all but the"
        " head."
    )
    for value in ("4", "trunk", "none"):
        load_config([], [*VALID, f"model.freeze={value}"])
    unknown = [*VALID, "model.name=someone/chest-model", "model.freeze=5"]
    with pytest.raises(ConfigError, match="the model has 4"):  # as pipeline.layers_per_stage says
        load_config([], unknown)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{gamma: 1}", "loss.gamma=1.0 with loss.name=bce is for focal. Leave it out, or set"),
        ("{name: focal, clip: 0}", "loss.clip=0.0 with loss.name=focal is for asymmetric."),
        ("{name: asymmetric, gamma: 3}", "loss.gamma=3.0 with loss.name=asymmetric is for focal."),
        ("{name: focal, max_positive_weight: 3}", "is for weighted_bce."),
        ("{name: focal, gamma: 0.5}", "loss.gamma=0.5 is between 0 and 1, where gradients"),
        ("{name: asymmetric, positive_gamma: 0.9}", "Set 0, or 1 or more."),
        ("{name: asymmetric, clip: 1e-9}", "loss.clip=1e-09 is between 0 and 1e-06"),
    ],
)
def test_setting_of_another_loss_or_without_a_finite_slope(settings, words):
    assert words in only_problem(f"loss={settings}")


def test_losses_accept_their_own_settings():
    for settings in (
        "{name: weighted_bce, max_positive_weight: 5}",
        "{name: focal, gamma: 0}",
        "{name: asymmetric, negative_gamma: 2, positive_gamma: 0, clip: 0}",
    ):
        load_config([], [*VALID, f"loss={settings}"])


# Augmentation


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "rand_magnitude=3",
            "augment.rand_magnitude=3.0 with augment.rand_augment=0 changes nothing. Leave it out,"
            " or set augment.rand_augment.",
        ),
        (
            "rand_operations=[rotate]",
            "augment.rand_operations=['rotate'] with augment.rand_augment=0 changes nothing. Leave"
            " it out, or set augment.rand_augment.",
        ),
        (
            "crop_ratio=1.5",
            "augment.crop_ratio=1.5 with augment.crop=1 changes nothing. Leave it out, or set"
            " augment.crop.",
        ),
        (
            "interpolation=bicubic",
            "augment.interpolation=bicubic changes nothing, as nothing moves the pixels. Leave it"
            " out, or set augment.crop or another augmentation.",
        ),
    ],
)
def test_settings_of_an_augmentation_that_is_off(setting, message):
    assert only_problem(f"augment.{setting}") == message


def test_an_augmentation_that_is_switched_off_takes_its_settings_with_it(tmp_path):
    augment = "{rand_augment: 2, rand_magnitude: 3, crop: 0.5, crop_ratio: 1.5}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"augment: {augment}")
    weaker = load_config([recipe], [*VALID, "augment.rand_augment=1", "augment.crop=0.8"]).augment
    assert (weaker.rand_magnitude, weaker.crop_ratio) == (3, 1.5)
    for crop in ("1", "1.0"):
        off = load_config([recipe], [*VALID, "augment.rand_augment=0", f"augment.crop={crop}"])
        assert not off.augment.is_on
        assert (off.augment.rand_magnitude, off.augment.crop_ratio) == (6, 1.1)


def test_interpolation_is_for_all_that_moves_pixels():
    for own in (["augment.shift=0.1"], ["augment.rand_augment=1"], ["data.resize=256"]):
        load_config([], [*VALID, "augment.interpolation=bicubic", *own])


# Tables

COLUMNS = "{image: path, patient: who}"
TABLE = [
    "data.format=table", "data.csv=t.csv", f"data.columns={COLUMNS}", "data.labels=[Mass, Nodule]",
]  # fmt: skip


def test_a_table_needs_files_columns_and_labels():
    messages = broken("data.format=table")
    assert [message.partition(":")[0] for message in messages] == [
        f"data.format=table needs data.{key}" for key in ("csv", "columns", "labels")
    ]
    config = read_config([], [*VALID, *TABLE])
    assert check(config) is config
    assert config.data.has_unknown
    assert not config.changed(data={"uncertain": "positive", "blank": "negative"}).data.has_unknown


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"data.columns={COLUMNS}", "data.columns is not for data.format=nih. Set data.format=tab"),
        ("data.labels=[Mass]", "data.labels is not for data.format=nih."),
        ("data.join=[t.csv]", "data.join is not for data.format=nih."),
        ("data.blank=negative", "data.blank is not for data.format=nih."),
        ("data.csv={train: t.csv}", "data.csv has a file per split, which is not for data.format"),
        ("data.split=table", "data.split=table needs data.format=table."),
    ],
)
def test_keys_of_a_table_need_its_format(override, message):
    assert only_problem(override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.include_no_finding=true",
            "data.include_no_finding is not for data.format=table. Li",
        ),
        ("data.boxes=b.csv", "data.boxes is not for data.format=table."),
        ("data.relabels=b.csv", "data.relabels is not for data.format=table. Leave it out; config"),
        ("data.sample_images=20", "data.sample_images is not for data.format=table."),
        ("data.split=table", "data.split=table needs data.columns.split, or a file per split"),
        ("data.label_separator=;", "data.label_separator=; is for one column of all labels."),
        ("data.labels=[Mass, mass]", "data.labels: the labels 'Mass' and 'mass' differ in case"),
        ("data.labels=[Mass, Mass]", "data.labels: the label 'Mass' is listed twice"),
        (
            "data.label_map={Mas: Mass}",
            "data.label_map: 'Mas' is none of data.labels. Did you mean",
        ),
    ],
)
def test_keys_that_do_not_fit_a_table(override, message):
    assert only_problem(*TABLE, override).startswith(message)


def test_a_table_has_one_kind_of_split():
    columns = "data.columns={image: path, patient: who, split: part}"
    assert only_problem(*TABLE, columns, "data.csv={train: a, val: b}").startswith(
        "data.columns.split=part with a file per split in data.csv"
    )
    for overrides in ([columns], ["data.csv={train: a, val: b}"]):
        load_config([], [*VALID, *TABLE, *overrides, "data.split=table", "data.boxes=none"])


def test_one_column_of_all_labels_has_no_uncertain_ones():
    columns = "data.columns={image: path, patient: who, labels: found}"
    load_config([], [*VALID, *TABLE, columns, "data.label_separator=;", "data.labels='*'"])
    message = only_problem(*TABLE, columns, "data.uncertain=positive")
    assert message.startswith("data.uncertain=positive is for a column per label.")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.columns={image: path, patient: null}",
            "command line: data.columns.patient=null: must be the name of a column, or {",
        ),
        ("data.columns=[image]", "data.columns=['image']: must be a mapping of image, patient (bo"),
        (
            "data.columns.viewed=AP",
            "unknown key 'data.columns.viewed'. Did you mean 'data.columns.view'?",
        ),
        ("data.columns.sex={column: b}", "data.columns.sex={'column': 'b'}: must be the name of"),
        ("data.labels=[image]", "the label 'image' has the name of another column of predictions"),
        ("data.labels=[Mass, mass_probability]", "'mass_probability' has the name of another col"),
        ('data.labels=["Mass\\tA"]', "must be a list of names"),
        ('data.labels=["A\u202ebc"]', "must be a list of names"),
        ("data.columns={image: a, patient: b, pth: c}", "unknown key 'data.columns.pth'."),
        (
            "data.columns={image: a, patient: {column: b, pattern: '('}}",
            "data.columns.patient=(: '(' is no regular expression: missing )",
        ),
        ("data.csv={training: a}", "must be a path, or train, val, test: a path each"),
        ("data.labels=[]", "must be a list of names, or a pattern such as finding_*"),
        ("data.labels=[' Mass']", "must be a list of names, or a pattern such as finding_*"),
        ("data.label_map={Mass: []}", "must be a mapping of a label to a label of the model"),
        ("data.blank=0", "must be one of negative, positive, unknown"),
    ],
)
def test_a_wrong_description_of_a_table_is_refused(override, message):
    assert message in only_problem(*TABLE, override)


def test_missing_columns_are_named(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("data:\n  format: table\n  csv: t.csv\n  labels: a*\n  columns: {view: v}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    words = "data.columns is a mapping of image, patient (both needed)"
    assert [line.partition(", split")[0] for line in lines] == [
        f"{file}:5: data.columns.{key} is missing: {words}" for key in ("image", "patient")
    ]


def test_columns_are_merged_key_by_key_until_another_format(tmp_path):
    file = tmp_path / "view.yaml"
    file.write_text("data: {columns: {view: V, sex: S}}\n")
    table = tmp_path / "table.yaml"
    table.write_text(f"data: {{format: table, csv: t, labels: [Mass], columns: {COLUMNS}}}\n")
    columns = read_config(
        [table, file], ["data.columns.sex=null", "data.columns.view=W"]
    ).data.columns
    assert (columns.image, columns.view, columns.sex) == ("path", "W", None)
    columns = read_config([], ["data.columns.age=a", f"data.columns={COLUMNS}"]).data.columns
    assert (columns.image, columns.age) == ("path", "a")
    columns = read_config([table, file, table]).data.columns
    assert columns.view is None, "data.format begins with no column"


@pytest.mark.parametrize(
    "pattern",
    [
        *("^(a+)+$", "(a|aa)+$", "(a?a?)*b", "a?" * 30 + "a" * 30, "(ba|b)" * 30),
        *(r"\w+\w+\w+\w+\w+b", "(?:){99999999}", "(?=(a+)+)b", r"(.+)(\1)*b", "((a{9})?){9}"),
    ],
)
def test_a_pattern_that_may_take_very_long_is_refused(pattern):
    with pytest.raises(ValueError, match=r"may take very long|more than 1,000 times") as caught:
        PatternColumn(column="a", pattern=pattern)
    assert "Write a simpler one" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        *((r"patient\d+", 1000), ("(train|valid)/", 1000), (r"^p\d+/(p\d+)/", 1000)),
        *((r"(\w+)_\d+\.png", 493), (r"patient(\d+)/study(\d+)/view(\d+)", 148)),
    ],
)
def test_patterns_of_names_and_paths_are_legal(pattern, length):
    assert PatternColumn(column="a", pattern=pattern).pattern == pattern
    assert searchable_length(pattern) == length


def test_files_of_a_table_stay_with_another_root(tmp_path):
    """The names of a layout's files are relative to the root; those of NIH's belong to one root."""
    config = load_config([], [*VALID, *TABLE, "data.join=[u.csv]", "data.root=a"])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(config))
    assert load_config(saved) == config
    moved = load_config(saved, ["data.root=b"]).data
    assert (moved.csv, moved.join, moved.columns) == ("t.csv", ["u.csv"], config.data.columns)
    back = load_config(saved, ["data.format=nih", "data.root=b"]).data
    assert (back.csv, back.join, back.columns, back.labels) == (None, [], None, None)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["data.resize=56"],
            "data.resize=56 is less than data.image_size=64, the part that is cut out. Give a"
            " larger one, or data.resize=null: then nothing is cut off.",
        ),
        (
            ["data.resize=73"],
            "data.resize=73 less data.image_size=64 is odd: the center would begin at half a pixel."
            " Nearest legal values: 72 or 74.",
        ),
        (
            ["evaluation.views=ten_crop"],
            "evaluation.views=ten_crop cuts corners out of images larger than data.image_size=64."
            " Set data.resize, e.g. 72, or evaluation.views=flip.",
        ),
    ],
)
def test_images_are_cut_out_of_larger_ones(overrides, problem):
    assert only_problem(*overrides) == problem
    load_config([], [*VALID, "data.resize=72", "evaluation.views=ten_crop"])
