"""Help texts: types, ranges and defaults of fields."""

from typing import Any, Dict, Iterator, Set, Tuple

import pytest

from cxr_vit.config.help import allowed, help_text
from cxr_vit.config.schema import SECTIONS

FIELDS = [(section, key) for section in SECTIONS for key in SECTIONS[section].model_fields]

#: JSON schema keyword -> our sign.
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def bounds(schema: Dict[str, Any]) -> Iterator[Tuple[str, float]]:
    """Yield all bounds in pydantic's JSON schema of a field."""
    for keyword, value in schema.items():
        if keyword in BOUNDS:
            yield BOUNDS[keyword], float(value)
        elif keyword == "items":
            yield from bounds(value)
        elif keyword == "anyOf":
            for choice in value:
                yield from bounds(choice)


def bounds_in(text: str) -> Set[Tuple[str, float]]:
    words = text.replace(",", " ").split()
    signs = set(BOUNDS.values())
    return {(word, float(after)) for word, after in zip(words, words[1:]) if word in signs}


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_allowed_names_every_bound(section, key):
    schema = SECTIONS[section].model_json_schema()["properties"][key]
    assert bounds_in(allowed(SECTIONS[section].model_fields[key])) == set(bounds(schema))


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_every_field_has_a_one_line_description(section, key):
    description = SECTIONS[section].model_fields[key].description
    assert description
    assert "\n" not in description


def test_optional_field_allows_null():
    assert allowed(SECTIONS["batch"].model_fields["global_batch_size"]) == "integer >= 1 or null"


def test_choices_are_listed():
    field = SECTIONS["engine"].model_fields["precision"]
    assert allowed(field) == "one of auto, fp32, bf16, fp16"


def test_help_lists_the_defaults():
    lines = help_text().split("\n")
    assert "  optim.lr  (number > 0 or null; default 0.0002)" in lines
    assert "  optim.decay_all  (true or false; default false)" in lines
    assert "  optim.max_grad_norm  (number > 0 or null; default null)" in lines
    assert "  data.root  (text, not empty; default ${DATASET_DIR:-.}/chest-xray-nihcc)" in lines
