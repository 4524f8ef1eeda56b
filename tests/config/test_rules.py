"""The rules that cross sections."""

import json
import re
from typing import List

import pytest

from cxr_vit.config import check, load_config
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError

SOUND = ["model.name=vit-micro", "model.patch_size=8", "data.image_size=64"]
SOUND += ["pipeline.layers_per_stage=[1, 1, 1, 1]"]


def broken(*overrides: str) -> List[str]:
    with pytest.raises(ConfigError) as caught:
        check(load_config([], [*SOUND, *overrides]))
    return str(caught.value).split("\n")


def only_problem(*overrides: str) -> str:
    problems = broken(*overrides)
    assert len(problems) == 1, problems
    return problems[0]


def test_sound_config_is_returned():
    config = load_config([], SOUND)
    assert check(config) is config


def test_defaults_are_sound():
    config = load_config([])
    assert check(config) is config


def test_stages_that_place_too_few_layers():
    message = only_problem(
        "model.name=vit-tiny", "model.patch_size=16", "pipeline.layers_per_stage=[3, 3, 3, 2]"
    )
    assert message.startswith(
        "pipeline.layers_per_stage=[3, 3, 3, 2] places 11 layers; the model has 12."
    )


def test_stages_that_place_too_many_layers():
    message = only_problem("pipeline.layers_per_stage=[5]")
    assert message.startswith("pipeline.layers_per_stage=[5] places 5 layers; the model has 4.")


def test_depth_of_a_hub_name_is_known_by_its_size():
    message = only_problem("model.name=google/vit-large-patch16-224-in21k")
    assert "the model has 24." in message


def test_depth_of_a_local_folder_is_read_from_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 7}), encoding="utf-8")
    assert "the model has 7." in only_problem(f"model.name={tmp_path}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_hidden_layers": "many"}'])
def test_local_folder_with_a_strange_config_is_left_to_the_loading(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    config = load_config([], [*SOUND, f"model.name={tmp_path}"])
    assert check(config) is config


def test_hub_name_without_a_size_is_left_to_the_loading():
    config = load_config([], [*SOUND, "model.name=someone/chest-model"])
    assert check(config) is config


def test_unknown_size_suggests_nearest_and_lists_all():
    message = only_problem("model.name=vit-smal")
    assert "model.name='vit-smal'" in message
    assert "Did you mean 'vit-small'?" in message
    assert "vit-micro, vit-tiny, vit-small, vit-base" in message


def test_image_that_patches_do_not_fill():
    message = only_problem("data.image_size=60")
    assert message == (
        "data.image_size=60 is not a multiple of model.patch_size=8."
        " Nearest legal image sizes: 56 or 64."
    )


def test_image_smaller_than_a_patch():
    message = only_problem("data.image_size=12", "model.patch_size=16")
    assert message.endswith("Nearest legal image sizes: 16.")


@pytest.mark.parametrize(("size", "patch"), [(8, 3), (2040, 100)])
def test_nearest_image_sizes_are_in_the_range_of_the_field(size, patch):
    message = only_problem(f"data.image_size={size}", f"model.patch_size={patch}")
    for legal in re.findall(r"\d+", message.partition("Nearest legal image sizes:")[2]):
        assert load_config([], [f"data.image_size={legal}"]).data.image_size % patch == 0


def test_patch_size_of_pretrained_weights_is_their_own():
    overrides = ["model.name=google/vit-base-patch16-224-in21k", "model.patch_size=9"]
    config = load_config([], overrides)
    assert check(config) is config


def test_global_batch_of_broken_micro_batches():
    message = only_problem("batch.micro_batch_size=16", "batch.global_batch_size=100")
    assert message.startswith("batch.global_batch_size=100 is not a multiple of 16")
    assert message.endswith("Nearest legal values: 96 or 112.")


def test_cut_of_evaluation_must_hold_the_same_layers():
    message = only_problem("pipeline.eval_layers_per_stage=[2, 1]")
    assert message.startswith("pipeline.eval_layers_per_stage=[2, 1] places 3 layers")
    assert "pipeline.layers_per_stage=[1, 1, 1, 1] 4" in message


def test_recompute_names_a_choice_for_every_stage():
    message = only_problem("pipeline.recompute=[every_layer, stage_inputs]")
    assert "has 2 items; there are 4 stages" in message


def test_recompute_names_layers_of_the_stage():
    choices = "pipeline.recompute=[[0], [1], [3], every_layer]"
    message = only_problem(choices)
    assert "item 2 names layers [3], but stage 2 has the layers [2]" in message
    check(load_config([], [*SOUND, choices.replace("[3]", "[2]")]))


def test_lamb_is_poptorchs():
    message = only_problem("optim.name=lamb", "engine.name=torch")
    assert message.startswith("optim.name=lamb")
    assert "engine.name=poptorch" in message
    check(load_config([], [*SOUND, "optim.name=lamb"]))  # engine.name=auto may find IPUs


def test_rules_of_ipus_hold_for_the_poptorch_engine_alone():
    refused = ["engine.name=poptorch", "batch.gradient_accumulation=4"]
    assert len(broken(*refused, "batch.eval_device_iterations=1")) == 2
    check(load_config([], [*SOUND, "batch.gradient_accumulation=4"]))


@pytest.mark.parametrize("split", ["patient", "random"])
def test_fractions_that_leave_nothing_to_train_on(split):
    message = only_problem(f"data.split={split}", "data.val_fraction=0.5", "data.test_fraction=0.5")
    assert message.startswith("data.val_fraction=0.5 and data.test_fraction=0.5 leave nothing")
    assert "below 1" in message


def test_test_fraction_does_not_count_in_the_official_split():
    overrides = ["data.split=official", "data.val_fraction=0.5", "data.test_fraction=0.5"]
    config = load_config([], [*SOUND, *overrides])
    assert check(config) is config


def test_steps_that_do_not_fill_host_calls():
    message = only_problem("train.steps=10", "batch.device_iterations=4")
    assert message.startswith("train.steps=10 is not a multiple of batch.device_iterations=4")
    assert message.endswith("Nearest legal values: 8 or 12.")


def test_fewer_steps_than_a_host_call_makes():
    message = only_problem("train.steps=3", "batch.device_iterations=4")
    assert message.endswith("Nearest legal values: 4.")


def test_two_broken_rules_are_reported_at_once():
    problems = broken("pipeline.layers_per_stage=[3]", "data.image_size=60")
    assert len(problems) == 2
    assert any("places 3 layers" in line for line in problems)
    assert any("data.image_size=60" in line for line in problems)


def test_every_broken_rule_speaks():
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


def test_every_problem_names_a_key_of_the_schema():
    problems = broken(
        "pipeline.layers_per_stage=[3]", "data.image_size=60", "pipeline.eval_layers_per_stage=[4]"
    )
    for line in problems:
        section, key = re.match(r"(\w+)\.(\w+)=", line).groups()
        assert key in SECTIONS[section].model_fields
