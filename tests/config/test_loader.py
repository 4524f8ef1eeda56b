"""Loading of configurations: merging, types, error messages, environment variables."""

import os
from pathlib import Path
from typing import Callable, List, Sequence

import pytest

from cxr_vit.config import Config, dump_config, load_config, read_config
from cxr_vit.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_dataset_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATASET_DIR", raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def problems(files: Sequence[Path], overrides: Sequence[str] = ()) -> List[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(files, overrides)
    return str(caught.value).split("\n")


def problem(files: Sequence[Path], overrides: Sequence[str] = ()) -> str:
    found = problems(files, overrides)
    assert len(found) == 1, found
    return found[0]


# Merging


def test_no_files_means_the_defaults():
    assert read_config([]) == Config()


def test_later_file_wins(write):
    first = write("optim: {lr: 0.1}", "first.yaml")
    second = write("optim: {lr: 0.2}", "second.yaml")
    assert read_config([first, second]).optim.lr == 0.2
    assert read_config([second, first]).optim.lr == 0.1


def test_later_file_keeps_other_keys(write):
    first = write("optim: {lr: 0.1, eps: 0.5}\nrun: {seed: 7}", "first.yaml")
    second = write("optim: {lr: 0.2}", "second.yaml")
    config = read_config([first, second])
    assert (config.optim.lr, config.optim.eps, config.run.seed) == (0.2, 0.5, 7)


def test_lists_are_replaced_not_merged(write):
    first = write("pipeline: {layers_per_stage: [3, 3, 3, 3]}", "first.yaml")
    second = write("pipeline: {layers_per_stage: [6, 6]}", "second.yaml")
    assert read_config([first, second]).pipeline.layers_per_stage == [6, 6]


def test_override_wins_over_every_file(write):
    first = write("optim: {lr: 0.1}", "first.yaml")
    second = write("optim: {lr: 0.2}", "second.yaml")
    assert read_config([first, second], ["optim.lr=0.3"]).optim.lr == 0.3


def test_override_replaces_one_key_of_its_section(write):
    config = read_config([write("optim: {lr: 0.1, eps: 0.5}")], ["optim.lr=0.3"])
    assert (config.optim.lr, config.optim.eps) == (0.3, 0.5)


def test_later_override_wins():
    assert read_config([], ["optim.lr=0.3", "optim.lr=0.4"]).optim.lr == 0.4


def test_override_of_a_whole_section(write):
    config = read_config([write("optim: {lr: 0.1, eps: 0.5}")], ["optim={lr: 0.3}"])
    assert (config.optim.lr, config.optim.eps) == (0.3, 0.5)


def test_override_of_a_section_keeps_an_earlier_override_of_its_key():
    config = read_config([], ["optim.lr=0.3", "optim={eps: 0.5}"])
    assert (config.optim.lr, config.optim.eps) == (0.3, 0.5)


def test_override_with_a_list():
    config = read_config([], ["pipeline.layers_per_stage=[2, 4, 6]"])
    assert config.pipeline.layers_per_stage == [2, 4, 6]


def test_override_value_with_equal_signs():
    assert read_config([], ["data.root=/images/size=64/a=b"]).data.root == "/images/size=64/a=b"


def test_file_value_with_equal_signs(write):
    assert read_config([write("data: {root: /images/a=b}")]).data.root == "/images/a=b"


def test_empty_file_means_the_defaults(write):
    assert read_config([write("")]) == Config()


def test_file_with_comments_only_means_the_defaults(write):
    assert read_config([write("# nothing\n\n# here\n")]) == Config()


def test_empty_section_keeps_values_of_earlier_files(write):
    first = write("train: {epochs: 7}", "first.yaml")
    second = write("train:\n  # epochs: 9\noptim: {lr: 0.5}\n", "second.yaml")
    config = read_config([first, second])
    assert (config.train.epochs, config.optim.lr) == (7, 0.5)


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("0.001", 1e-3),
        (".001", 1e-3),
        ("2e0", 2.0),
        ("1", 1.0),
        ("'1e-3'", 1e-3),
        ('"1e-3"', 1e-3),
    ],
)
def test_number_means_the_same_in_a_file_and_as_an_override(write, text, value):
    assert read_config([write(f"optim:\n  lr: {text}\n")]).optim.lr == value
    assert read_config([], [f"optim.lr={text}"]).optim.lr == value


def test_leading_zero_is_decimal(write):
    assert read_config([write("train: {steps: 010}")]).train.steps == 10


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "'yes'"])
def test_words_for_true(write, text):
    assert read_config([write(f"optim: {{decay_all: {text}}}")]).optim.decay_all is True
    assert read_config([], [f"optim.decay_all={text}"]).optim.decay_all is True


@pytest.mark.parametrize("text", ["false", "False", "no", "off", "'no'"])
def test_words_for_false(write, text):
    below = write("optim: {decay_all: true}", "below.yaml")
    assert read_config([below, write(f"optim: {{decay_all: {text}}}")]).optim.decay_all is False
    assert read_config([below], [f"optim.decay_all={text}"]).optim.decay_all is False


@pytest.mark.parametrize("text", ["no", "'null'", "007", "1e-3", "true"])
def test_text_field_keeps_the_characters(write, text):
    expected = text.strip("'")
    assert read_config([write(f"run: {{name: {text}}}")]).run.name == expected
    assert read_config([], [f"run.name={text}"]).run.name == expected


@pytest.mark.parametrize("text", ["null", "~", "Null", "NULL", ""])
def test_null_unsets_an_optional_field(write, text):
    below = write("optim: {max_grad_norm: 2.0}", "below.yaml")
    file = write(f"optim:\n  max_grad_norm: {text}\n")
    assert read_config([below, file]).optim.max_grad_norm is None
    assert read_config([below], [f"optim.max_grad_norm={text}"]).optim.max_grad_norm is None


def test_null_of_a_required_value_is_an_error(write):
    message = problem([write("optim:\n  eps: null\n")])
    assert "my.yaml:2: optim.eps=null: must be number > 0" in message


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.max_grad_norm=1.5", "optim.lr=1e-5", "optim.eps=3.3e-17", "optim.decay_all=yes"],
        ["train.steps=10", "schedule.warmup_steps=3", "batch.global_batch_size=64"],
        ["train.epochs=0.1", "schedule.warmup_ratio=0.3333333333333333"],
        ["run.name=1e-3", "run.root='null'", "data.root='a: b #c'", "model.name=a=b"],
        ["run.name='007'", "run.root='no'", "run.dir=' x '", "data.root=images/ü"],
        ["pipeline.layers_per_stage=[0, 12]", "data.sample_images=20"],
    ],
)
def test_dumped_config_loads_unchanged(write, overrides):
    config = read_config([], overrides)
    assert read_config([write(dump_config(config))]) == config


def test_default_data_root_is_under_the_working_directory():
    assert read_config([]).data.root == "./chest-xray-nihcc"


def test_default_data_root_follows_dataset_dir(monkeypatch):
    monkeypatch.setenv("DATASET_DIR", "/images")
    assert read_config([]).data.root == "/images/chest-xray-nihcc"


# Errors


def test_unknown_key_names_file_and_line(write):
    file = write("run: {name: a}\noptim:\n  lr: 0.1\n  lrr: 0.2\n")
    assert problem([file]).startswith(f"{file}:4: unknown key 'optim.lrr'.")


def test_unknown_key_suggests_nearest(write):
    assert "Did you mean 'optim.weight_decay'?" in problem([write("optim: {weigth_decay: 0.1}")])


def test_unknown_key_suggests_our_name_for_it(write):
    assert "Did you mean 'optim.lr'?" in problem([write("optim: {learning_rate: 0.1}")])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("optim.blr", "optim.base_lr"),
        ("model.drop_path_rate", "model.drop_path"),
        ("model.global_pool", "model.pooling"),
        ("augment.aa", "augment.rand_augment"),
        ("evaluation.tta", "evaluation.views"),
        ("batch.batch_size", "batch.micro_batch_size"),
    ],
)
def test_names_of_published_code_suggest_ours(theirs, ours):
    assert problem([], [f"{theirs}=1"]).endswith(f"Did you mean '{ours}'?")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("loss.name=asl", "asymmetric"),
        ("model.pooling=avg", "mean"),
        ("model.pooling=cls", "class"),
    ],
)
def test_values_of_published_code_suggest_ours(theirs, ours):
    assert problem([], [theirs]).endswith(f" Did you mean '{ours}'?")


def test_key_in_the_wrong_section_suggests_the_right_one(write):
    assert "Did you mean 'optim.lr'?" in problem([write("train: {lr: 0.1}")])


def test_key_without_a_section_suggests_its_section(write):
    message = problem([write("\nlr: 0.1\n")])
    assert message.endswith("my.yaml:2: unknown key 'lr'. Did you mean 'optim.lr'?")


def test_unknown_key_without_a_near_one_refers_to_help(write):
    message = problem([write("optim: {zzzzzz: 1}")])
    assert "Did you mean" not in message
    assert "train.py --help" in message


def test_unknown_section_suggests_nearest(write):
    file = write("run: {name: a}\noptimm: {lr: 0.1}\n")
    assert problem([file]) == f"{file}:2: unknown key 'optimm'. Did you mean 'optim'?"


def test_unknown_key_of_an_override_names_the_command_line():
    message = problem([], ["optim.lrr=1"])
    assert message == "command line: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"


def test_unknown_section_of_an_override_names_the_command_line():
    message = problem([], ["optimm.lr=1"])
    assert message.startswith("command line: unknown key 'optimm")
    assert "Did you mean 'optim" in message


def test_key_nested_in_a_key_is_unknown():
    assert "unknown key 'optim.lr.peak'" in problem([], ["optim.lr.peak=1"])


def test_duplicate_key_names_both_lines(write):
    file = write("optim:\n  lr: 0.1\n  eps: 0.1\n  lr: 0.2\n")
    message = problem([file])
    assert message.startswith(f"{file}:4: duplicate key 'optim.lr'")
    assert f"{file}:2" in message


def test_duplicate_section_names_both_lines(write):
    file = write("optim:\n  lr: 0.1\nrun:\n  name: a\noptim:\n  eps: 0.1\n")
    message = problem([file])
    assert message.startswith(f"{file}:5: duplicate key 'optim'")
    assert f"{file}:1" in message


def test_same_key_in_two_files_is_not_a_duplicate(write):
    files = [write("optim: {lr: 0.1}", "a.yaml"), write("optim: {lr: 0.2}", "b.yaml")]
    assert read_config(files).optim.lr == 0.2


def test_wrong_type_names_place_value_and_type(write):
    file = write("train:\n  log_every_steps: often\n")
    assert problem([file]).startswith(f"{file}:2: train.log_every_steps=")
    assert "often" in problem([file])
    assert "must be integer >= 1" in problem([file])


def test_fraction_is_refused_for_an_integer(write):
    assert "must be integer >= 1" in problem([write("batch: {micro_batch_size: 1.5}")])


def test_word_is_refused_for_a_boolean(write):
    assert "must be true or false" in problem([write("optim: {decay_all: maybe}")])


@pytest.mark.parametrize("text", ["-1", "0", "nan", "inf"])
def test_learning_rate_out_of_range_is_refused(write, text):
    file = write(f"run: {{name: a}}\noptim:\n  lr: {text}\n")
    message = problem([file])
    assert message.startswith(f"{file}:3: optim.lr=")
    assert text in message
    assert "must be number > 0" in message


def test_range_error_names_both_bounds():
    message = problem([], ["data.val_fraction=1"])
    assert "command line: data.val_fraction=" in message
    assert "> 0" in message
    assert "< 1" in message


def test_wrong_choice_lists_all_and_suggests_the_nearest(write):
    message = problem([write("data: {split: patients}")])
    assert "one of auto, table, official, patient, random, all" in message
    assert "Did you mean 'patient'?" in message


def test_section_that_is_not_a_mapping_is_refused(write):
    file = write("run: {name: a}\noptim: 3\n")
    assert problem([file]).startswith(f"{file}:2: 'optim' is a section with keys (name, lr")


def test_section_that_is_not_a_mapping_is_refused_despite_a_later_layer(write):
    file = write("optim: 3\n")
    assert f"{file}:1: 'optim' is a section" in problem([file], ["optim.lr=1e-4"])


def test_list_with_a_wrong_item_is_refused(write):
    message = problem([write("pipeline:\n  layers_per_stage: [3, x]\n")])
    assert "my.yaml:2: pipeline.layers_per_stage=" in message
    assert "list of integers" in message


def test_list_with_an_item_out_of_range_names_the_range(write):
    message = problem([write("pipeline:\n  layers_per_stage: [3, -3]\n")])
    assert "my.yaml:2: pipeline.layers_per_stage=" in message
    assert ">= -1" in message


def test_empty_list_error_names_the_length(write):
    message = problem([write("pipeline:\n  layers_per_stage: []\n")])
    allowed = message.partition("must be ")[2]
    assert allowed not in ("", "a list of integers."), "an empty list is a list of integers"


def test_empty_text_error_names_the_length():
    message = problem([], ["run.root=''"])
    assert message.partition("must be ")[2] not in ("", "text."), "'' is text"


def test_seed_beyond_64_bits_is_refused():
    # torch.manual_seed raises a RuntimeError on it
    assert "run.seed" in problem([], [f"run.seed={2**64}"])


def test_all_problems_are_reported_at_once(write):
    first = write("optim:\n  lrr: 1\n  lr: -1\n", "first.yaml")
    second = write("run:\n  seed: 1\n  seed: 2\nmodell: {name: a}\n", "second.yaml")
    found = problems([first, second], ["train.epochs=soon", "nonsense"])
    expected = [
        f"{first}:2: unknown key 'optim.lrr'",
        f"{first}:3: optim.lr=",
        f"{second}:3: duplicate key 'run.seed'",
        f"{second}:4: unknown key 'modell'",
        "command line: train.epochs=",
        "command line: 'nonsense' is not an override",
    ]
    assert len(found) == len(expected)
    assert [start for start in expected if not any(line.startswith(start) for line in found)] == []


def test_invalid_value_replaced_by_a_later_layer_is_accepted(write):
    assert read_config([write("optim: {lr: -1}")], ["optim.lr=1"]).optim.lr == 1


def test_error_names_the_layer_of_the_wrong_value(write):
    first = write("optim: {lr: 1}", "first.yaml")
    second = write("\n\noptim: {lr: -1}", "second.yaml")
    assert problem([first, second]).startswith(f"{second}:3: ")
    assert problem([first], ["optim.lr=-1"]).startswith("command line: ")


def test_error_in_a_section_override_names_the_command_line(write):
    message = problem([write("optim: {lr: 1}")], ["optim={lr: -1}"])
    assert message.startswith("command line")


def test_invalid_yaml_names_file_and_line(write):
    file = write("optim:\n  lr: [1\nrun: 2\n")
    message = problem([file])
    assert message.startswith(f"{file}:3: not valid YAML")


def test_character_forbidden_in_yaml_names_the_file(write):
    file = write("run: {name: a\x00b}")
    assert problem([file]).startswith(f"{file}:1: not valid YAML: the character")


def test_alias_that_contains_itself_is_refused(write):
    assert "my.yaml" in problem([write("optim: &again\n  lr: *again\n")])


def test_list_at_top_level_is_refused(write):
    file = write("- optim\n- run\n")
    message = problem([file])
    assert message.startswith(f"{file}: ")
    assert "sections with keys" in message


def test_text_at_top_level_is_refused(write):
    assert "sections with keys" in problem([write("hello")])


def test_missing_file_is_named(tmp_path):
    file = tmp_path / "absent.yaml"
    message = problem([file])
    assert message.startswith(f"{file}: ")
    assert "no such file" in message


def test_folder_instead_of_a_file_is_named(tmp_path):
    assert problem([tmp_path]).startswith(f"{tmp_path}: is a folder, not a file. The")


def test_file_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("run: {name: M\xfcller}".encode("latin-1"))
    message = problem([file])
    assert message.startswith(f"{file}: ")
    assert "utf-8" in message


@pytest.mark.parametrize("text", ["optim.lr", "=1", ""])
def test_override_without_key_and_equal_sign_is_refused(text):
    assert problem([], [text]) == (
        f"command line: {text!r} is not an override; write section.key=value"
    )


def test_override_with_invalid_yaml_is_refused():
    message = problem([], ["pipeline.layers_per_stage=[3, 3"])
    assert message.startswith("command line: 'pipeline.layers_per_stage=[3, 3'")


# Exclusive pairs of keys

PAIRS = [
    ("batch", "gradient_accumulation", "global_batch_size"),
    ("schedule", "warmup_ratio", "warmup_steps"),
    ("train", "epochs", "steps"),
    ("train", "eval_every_epochs", "eval_every_steps"),
    ("train", "checkpoint_every_epochs", "checkpoint_every_steps"),
]


@pytest.mark.parametrize(("section", "first", "second"), PAIRS)
def test_both_keys_of_a_pair_in_one_file_is_an_error(write, section, first, second):
    message = problem([write(f"{section}:\n  {first}: 1\n  {second}: 1\n")])
    assert f"my.yaml:3: {section}: give '{first}' or '{second}', not both" in message


@pytest.mark.parametrize(("section", "first", "second"), PAIRS)
def test_second_key_of_a_pair_replaces_the_default_of_the_first(section, first, second):
    values = read_config([], [f"{section}.{second}=1"]).model_dump()[section]
    assert (values[first], values[second]) == (None, 1)


@pytest.mark.parametrize(("section", "first", "second"), PAIRS)
@pytest.mark.parametrize("swap", [False, True])
def test_later_key_of_a_pair_replaces_the_earlier(write, section, first, second, swap):
    early, late = (second, first) if swap else (first, second)
    file = write(f"{section}: {{{early}: 1}}")
    by_override = read_config([file], [f"{section}.{late}=1"]).model_dump()[section]
    by_file = read_config([file, write(f"{section}: {{{late}: 1}}", "late.yaml")])
    assert (by_override[early], by_override[late]) == (None, 1)
    assert by_file.model_dump()[section] == by_override


def test_null_for_one_key_of_a_pair_keeps_the_other(write):
    file = write("train: {epochs: null, steps: 10}")
    assert (read_config([file]).train.epochs, read_config([file]).train.steps) == (None, 10)


def test_null_restores_the_default_of_a_pair(write):
    config = read_config([write("train: {steps: 10}")], ["train.steps=null"])
    assert (config.train.epochs, config.train.steps) == (3, None)


@pytest.mark.parametrize("text", ["{epochs: null}", "{epochs: null, steps: null}"])
def test_null_for_a_whole_pair_means_the_default(write, text):
    config = read_config([write(f"train: {text}")])
    assert (config.train.epochs, config.train.steps) == (3, None)


def test_null_for_one_key_keeps_an_earlier_value_of_the_other(write):
    config = read_config([write("train: {steps: 10}")], ["train.epochs=null"])
    assert (config.train.epochs, config.train.steps) == (None, 10)


def test_two_broken_pairs_of_a_section_are_reported_at_once(write):
    text = "train: {epochs: 1, steps: 1, eval_every_epochs: 1, eval_every_steps: 1}"
    message = "\n".join(problems([write(text)]))
    assert "'epochs' or 'steps'" in message
    assert "'eval_every_epochs' or 'eval_every_steps'" in message


def test_broken_pair_does_not_hide_other_errors_of_its_section(write):
    message = "\n".join(problems([write("train: {epochs: 1, steps: 1, log_every_step: 5}")]))
    assert "'epochs' or 'steps'" in message
    assert "'train.log_every_steps'" in message


def test_broken_pair_names_the_layer_that_gave_both(write):
    broken = write("train: {epochs: 1, steps: 1}", "broken.yaml")
    sound = write("\n\ntrain: {log_every_steps: 5}", "sound.yaml")
    assert problem([broken, sound]).startswith(f"{broken}:1: ")


def test_pair_broken_by_overrides_names_the_command_line(write):
    file = write("train: {log_every_steps: 5}")
    assert problem([file], ["train.epochs=1", "train.steps=1"]).startswith("command line")


# Environment variables


@pytest.mark.parametrize(
    ("value", "expected"), [("/disk", "/disk/x"), (None, "/images/x"), ("", "/images/x")]
)
def test_variable_with_default(write, monkeypatch, value, expected):
    monkeypatch.delenv("CXR_TEST", raising=False)
    if value is not None:
        monkeypatch.setenv("CXR_TEST", value)
    assert read_config([write("data:\n  root: ${CXR_TEST:-/images}/x\n")]).data.root == expected


def test_variable_in_an_override(monkeypatch):
    monkeypatch.setenv("CXR_TEST", "/disk")
    assert read_config([], ["run.root=${CXR_TEST}/runs"]).run.root == "/disk/runs"


def test_two_variables_in_one_path(monkeypatch):
    monkeypatch.setenv("CXR_TEST", "/disk")
    config = read_config([], ["run.root=${CXR_TEST}/${CXR_UNSET:-b}/c"])
    assert config.run.root == "/disk/b/c"


def test_unset_variable_without_default_names_file_and_line(write, monkeypatch):
    monkeypatch.delenv("CXR_TEST", raising=False)
    file = write("run: {name: a}\ndata:\n  root: ${CXR_TEST}/x\n")
    message = problem([file])
    assert message.startswith(f"{file}:3: data.root=${{CXR_TEST}}/x")
    assert "CXR_TEST is not set" in message
    assert "${CXR_TEST:-default}" in message


def test_tilde_is_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert read_config([write("data: {root: ~/images}")]).data.root == "/home/ada/images"


def test_tilde_in_a_variable_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("DATASET_DIR", "~/disk")
    assert read_config([]).data.root == "/home/ada/disk/chest-xray-nihcc"


def test_text_that_is_not_a_path_is_not_expanded(write):
    assert "run.name=" in problem([write("run: {name: '${HOME}'}")])


def test_later_root_resets_sample_images(write):
    file = write("data: {root: data/sample, sample_images: 60}\n")
    assert read_config([file]).data.sample_images == 60
    assert read_config([file], ["data.root=/data/typo"]).data.sample_images is None
    both = ["data.root=elsewhere", "data.sample_images=80"]
    assert read_config([file], both).data.sample_images == 80


# Arguments of callbacks and loggers

ARGUMENTS = [
    ("True", True),
    ("false", False),
    ("yes", True),
    ("Off", False),
    ("3", 3),
    ("0x10", 16),
    ("2.5", 2.5),
    ("1e-3", 0.001),
    ("-2E5", -200000.0),
    (".inf", float("inf")),
    ("null", None),
    ("[1, 1e-3, no]", [1, 0.001, False]),
    ("{a: {b: on}}", {"a": {"b": True}}),
    ("word", "word"),
    ("inf", "inf"),
    ("2024-01-02", "2024-01-02"),
    ("!!int a", "a"),
    ("'2024'", "2024"),
    ('"true"', "true"),
    ("'1e-3'", "1e-3"),
    ("'null'", "null"),
    ("'2024-01-02'", "2024-01-02"),
]


@pytest.mark.parametrize("key", ["callbacks", "loggers"])
@pytest.mark.parametrize(("text", "value"), ARGUMENTS)
def test_argument_of_a_class_has_the_type_of_yaml(write, key, text, value):
    item = f"[{{class: a.B, args: {{x: {text}}}}}]"
    config = read_config([write(f"{key}: {item}")])
    (extension,) = getattr(config, key)
    assert extension.args == {"x": value}
    assert type(extension.args["x"]) is type(value)
    assert read_config([], [f"{key}={item}"]) == config
    dumped = read_config([write(dump_config(config))])
    assert dumped == config
    assert type(getattr(dumped, key)[0].args["x"]) is type(value)


def test_other_settings_still_take_quoted_numbers(write):
    config = read_config([write("optim: {lr: '1e-3'}\nrun: {name: 010}")])
    assert (config.optim.lr, config.run.name) == (0.001, "010")


def test_misspelt_name_of_another_code_base_leads_to_ours():
    assert "Did you mean 'optim.lr'?" in problem([], ["optim.learnig_rate=1"])


# Hostile files

#: 479 bytes that are ten to the power of nine values.
ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi")
)
HOSTILE = {
    "alias bomb": ALIAS_BOMB,
    "long text, many times": f"x: &x {'a' * 100_000}\noptim: [{'*x, ' * 900}]\n",
    "chain of aliases": "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 99)),
    "alias that contains itself": "run: &a {name: [*a]}\n",
    "nested lists": "[" * 100_000,
    "nested mappings": "{a: " * 100_000,
    "nested blocks": "- " * 100_000,
    "nested keys": "? " * 100_000,
    "escape beyond Unicode": r'run: {name: "\U00110000"}',
    "escape beyond integers": r'run: {name: "\UFFFFFFFF"}',
    "surrogate": r'run: {name: "\uD800"}',
    "surrogate in a key": r'run: {"\uD800": 1}',
    "zero byte": r'data: {root: "a\0b"}',
    "terminal codes": r'run: {"\e[31m": 1}',
    "key that is a list": "? [a, b]\n: 1\n",
    "key that is a mapping": "run:\n  ? {a: b}\n  : 1\n",
    "merge key": "run: &a {seed: 1}\noptim:\n  <<: *a\n",
    "very long number": f"train: {{steps: {'9' * 10_000}}}",
    "very long number of a class": f"callbacks: [{{class: 1, args: {{x: {'9' * 10_000}}}}}]",
    "constructor": "callbacks: !!python/object/apply:os.abort []\nrun: !!python/name:os.abort x",
    "no boolean": "callbacks: [{class: 1, args: {x: !!bool maybe}}]",
    "no number": "callbacks: [{class: 1, args: {x: !!int '', y: !!float ''}}]",
    "text that repeats": "run: {name: ${HOME:-" + "${HOME:-" * 10_000 + "}",
    "path beyond limits": f"data: {{root: {'/a' * 3000}}}",
    "many unknown keys": "".join(f"optim{number}: 1\n" for number in range(200)),
    "many duplicate keys": "a: 1\n" * 200,
    "long key of many": f"{'a' * 100_000}: {{{', '.join(f'a{n}: 1' for n in range(99))}}}",
    "many values": "[" + "1," * 20_000 + "]",
    "too large": "# " + "x" * 300_000,
    "value with line breaks": "optim:\n  lr: |\n    a\n    b\n",
    "UTF-16": "run: {}".encode("utf-16"),
    "garbage": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_in_short_lines(tmp_path, content):
    file = tmp_path / "my.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    lines = problems([file])
    assert all(line.isprintable() and len(line) < 1200 for line in lines)
    assert len(lines) <= 51


@pytest.mark.parametrize(
    "name",
    ["alias bomb", "nested keys", "escape beyond integers", "surrogate", "too large", "garbled"],
)
def test_hostile_override_is_refused_in_a_short_line(name):
    message = problem([], [f"callbacks={HOSTILE.get(name, chr(7))}"])
    assert message.isprintable()
    assert len(message) < 1500


def test_broken_rule_of_a_long_value_is_a_short_line():
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"pipeline.layers_per_stage={[1] * 4000}"])
    assert all(len(line) < 1200 for line in str(caught.value).split("\n"))


@pytest.mark.parametrize(
    "text", ["run.name=\udc80", "\udc80.lr=1", "run.\0=1", "data.root=/a\udcff", "data.root=\0"]
)
def test_override_that_is_no_text_is_refused(text):
    assert problem([], [text]).isprintable()


def test_variable_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setenv("MY_ROOT", "/data/\udcff")
    assert "a path must be UTF-8 text" in problem([], ["data.root=${MY_ROOT}"])


@pytest.mark.parametrize("target", ["/dev/zero", None], ids=["device", "pipe"])
def test_file_without_an_end_is_refused(tmp_path, target):
    file = tmp_path / "my.yaml"
    if target is None:
        os.mkfifo(str(file))
    else:
        file.symlink_to(target)
    assert "not a regular file" in problem([file])


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udcff"])
def test_name_that_no_file_can_have_is_one_line(name):
    assert "\n" not in problem([Path(name)])


def test_anchors_of_ordinary_size_are_allowed(write):
    file = write("pipeline:\n  layers_per_stage: &a [3, 3]\n  eval_layers_per_stage: *a\n")
    config = read_config([file])
    assert config.pipeline.layers_per_stage == config.pipeline.eval_layers_per_stage == [3, 3]


def test_large_configuration_is_read(write):
    values = [float(number) for number in range(500)]
    config = read_config([write(f"callbacks: [{{class: a.B, args: {{x: {values}}}}}]")])
    assert config.callbacks[0].args["x"] == values
    assert read_config([write(dump_config(config))]) == config


def test_a_split_of_nih_is_not_that_of_a_table(write: Write):
    own = write("data: {format: table, csv: a.csv, labels: [A]}", "own.yaml")
    nih = write("data: {split: official}", "nih.yaml")
    assert read_config([nih, own]).data.split == "auto"
    assert read_config([nih, own], ["data.split=patient"]).data.split == "patient"
    assert read_config([own, nih]).data.split == "official"
