"""Names and types of PopART session options."""

import pytest

from cxr_vit.config import dump_config, read_config
from cxr_vit.config.popart_options import KINDS, OWN_KEYS, typed_options
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("enableOutlining", "true", True),
        ("enableOutlining", "False", False),
        ("autoRecomputation", "1", 1),
        ("outlineThreshold", "10", 10.0),
        ("kahnTieBreaker", "FIFO", "FIFO"),
        ("dotChecks", "[Fwd0, Final]", ["Fwd0", "Final"]),
        ("engineOptions", "{opt.useAutoloader: false}", {"opt.useAutoloader": "false"}),
    ],
)
def test_values_are_converted_to_the_type_poptorch_expects(name, text, value):
    config = read_config([], [f"engine.popart_options={{{name}: {text}}}"])
    found = config.engine.popart_options[name]
    assert found == value
    assert type(found) is type(value)


def test_options_are_unchanged_after_dump_and_load(tmp_path):
    options = "{enableOutlining: true, outlineThreshold: 10, engineOptions: {a.b: 'true'}}"
    config = read_config([], [f"engine.popart_options={options}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert read_config([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enableOutlining", "1"),
        ("autoRecomputation", "true"),
        ("autoRecomputation", "-1"),
        ("autoRecomputation", "2.0"),
        ("outlineThreshold", "much"),
        ("dotChecks", "Fwd0"),
        ("engineOptions", ["a"]),
        ("engineOptions", {"a": ["b"]}),
        ("kahnTieBreaker", ["FIFO"]),
    ],
)
def test_value_of_a_wrong_type_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* must be {KINDS[name]}"):
        typed_options({name: value})


def test_misspelt_option_suggests_the_nearest():
    with pytest.raises(ConfigError) as caught:
        read_config([], ["engine.popart_options={outlineThreshod: 10}"])
    assert "Did you mean 'outlineThreshold'?" in str(caught.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match=r"foo.*; enableOutlining"):
        typed_options({"foo": "1", "enableOutlining": "2"})


@pytest.mark.parametrize("name", sorted(OWN_KEYS))
def test_option_with_its_own_key_names_that_key(name):
    assert name not in KINDS
    with pytest.raises(ValueError, match=f"{name} is set by"):
        typed_options({name: "1"})


def test_named_keys_exist():
    named = [key for key in OWN_KEYS.values() if "." in key]
    assert len(named) > 5
    for key in named:
        section, field = key.split(".")
        assert field in SECTIONS[section].model_fields
