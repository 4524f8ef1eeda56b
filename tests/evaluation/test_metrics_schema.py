import copy
import json
from pathlib import Path

import jsonschema
import pytest
from example_metrics import example_metrics, random_predictions

import cxr_vit.evaluation

SCHEMA = Path(cxr_vit.evaluation.__file__).with_name("metrics.schema.json")


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def complete():
    predictions = random_predictions(["Mass", "Hernia"], images=120)
    return json.loads(json.dumps(example_metrics(predictions, count=3)))


@pytest.fixture
def metrics(complete):
    return copy.deepcopy(complete)


def test_metrics_with_every_section_are_valid(validator, metrics):
    validator.validate(metrics)


def test_sections_may_be_absent_or_null(validator, metrics):
    for key in ("calibration", "operating_points", "subgroups", "relabels"):
        metrics[key] = None
        validator.validate(metrics)
        del metrics[key]
    validator.validate(metrics)


def test_undefined_scores_are_null(validator, metrics):
    for key in ("auroc", "average_precision", "brier", "delong", "prevalence"):
        metrics["findings"]["Mass"][key] = None
    metrics["findings"]["Hernia"]["auroc"].update(low=None, high=None)
    metrics["calibration"]["Mass"] = None
    metrics["auroc_macro"] = None
    validator.validate(metrics)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 2),
        ("notice", "fit for patients"),
        ("num_samples", -1),
        ("operating_points_sha256", 3),
        ("findings/Mass/auroc", 0.8),
        ("findings/Mass/auroc/value", None),
        ("findings/Mass/auroc/p", 0.1),
        ("findings/Mass/positives", 1.5),
        ("findings/Mass/prevalence", 1.2),
        ("means/micro", None),
        ("intervals/level", 95),
        ("calibration/Mass/platt", [1.0]),
        ("calibration/Mass/before/bins", [[0.1, 0.2]]),
        ("operating_points/points/Mass/accuracy", {}),
        ("operating_points/points/Mass/youden/threshold", 1.5),
        ("operating_points/fitted_on", {}),
        ("subgroups/sex/groups/F/Mass", {}),
        ("subgroups/sex/gaps/Mass/auroc", {"value": 0.1, "low": None, "high": None, "of": ["F"]}),
        ("relabels/Fracture/auroc", {"google": None}),
    ],
)
def test_other_values_are_refused(validator, metrics, path, value):
    *parents, last = path.split("/")
    part = metrics
    for key in parents:
        part = part[key]
    part[last] = value
    assert list(validator.iter_errors(metrics)) != []


@pytest.mark.parametrize("key", ["findings", "means", "intervals", "notice", "schema_version"])
def test_needed_keys_are_asked_for(validator, metrics, key):
    del metrics[key]
    assert list(validator.iter_errors(metrics)) != []
