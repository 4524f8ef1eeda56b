import pytest
from example_metrics import example_metrics, random_predictions

from cxr_vit.evaluation.statements import Name, answers, listed, number, scored, with_interval

NAMES = ["Mass", "Nodule", "Edema", "Hernia", "No Finding"]


@pytest.fixture
def metrics():
    return example_metrics(random_predictions(NAMES))


def texts(metrics):
    """Question -> its sentences."""
    return {each.question: ["".join(one) for one in each.sentences] for each in answers(metrics)}


def sentence(metrics, question, beginning):
    """Return the only sentence that begins so, or None."""
    found = [text for text in texts(metrics)[question] if text.startswith(beginning)]
    assert len(found) <= 1
    return found[0] if found else None


def test_questions_are_answered(metrics):
    found = texts(metrics)
    assert list(found) == ["How good?", "How sure?", "For whom?", "Where not?"]
    assert all(found.values())


def test_macro_score_has_its_interval_and_what_it_is_over(metrics):
    macro = metrics["means"]["macro"]["auroc"]
    expected = f"{macro['value']:.3f} ({macro['low']:.3f} to {macro['high']:.3f})"
    text = sentence(metrics, "How good?", "Macro AUROC")
    assert text == f"Macro AUROC {expected}, over 4 of 4 findings, on 400 test images."


def test_best_and_worst_findings_are_named(metrics):
    aurocs = {name: metrics["findings"][name]["auroc"]["value"] for name in NAMES[:4]}
    best, *_, worst = sorted(aurocs, key=aurocs.__getitem__, reverse=True)
    assert sentence(metrics, "How good?", "Highest AUROC").startswith(f"Highest AUROC: {best} ")
    assert sentence(metrics, "How good?", "Lowest AUROC").startswith(f"Lowest AUROC: {worst} ")
    assert list(scored(metrics)) == sorted(aurocs, key=aurocs.__getitem__, reverse=True)


def test_wide_and_missing_intervals_are_named(metrics):
    for name, low in (("Mass", 0.75), ("Nodule", 0.65), ("Edema", None), ("Hernia", 0.79)):
        high = None if low is None else 0.8
        metrics["findings"][name]["auroc"] = {"value": 0.8, "low": low, "high": high}
    text = sentence(metrics, "How sure?", "No AUROC interval, because less than 10 patients")
    assert text.endswith(": Edema.")
    text = sentence(metrics, "How sure?", "An AUROC interval wider than 0.1")
    assert text.endswith(": Nodule (0.650 to 0.800).")


def test_findings_with_few_positives_are_named(metrics):
    for positives, name in zip((49, 50, 120, 3), NAMES):
        metrics["findings"][name]["positives"] = positives
    text = sentence(metrics, "How sure?", "Fewer than 50 positive images")
    assert text.endswith(": Hernia (3), Mass (49).")


def test_disagreement_with_delong_is_said(metrics):
    assert sentence(metrics, "How sure?", "DeLong").endswith(": Nodule.")
    metrics["findings"]["Nodule"]["delong"] = None
    assert sentence(metrics, "How sure?", "DeLong") is None


def test_without_resamples_no_interval_is_described(metrics):
    metrics["intervals"]["resamples"] = 0
    assert "No intervals were computed." in texts(metrics)["How sure?"]
    assert sentence(metrics, "How sure?", "Intervals") is None


def gap(low, high, of=("M", "F")):
    return {"value": (low + high) / 2, "low": low, "high": high, "of": list(of)}


def test_gaps_whose_interval_excludes_zero_are_named(metrics):
    gaps = {
        "macro": {"auroc": gap(0.01, 0.03)},
        "Mass": {"auroc": gap(-0.1, 0.3), "false_negative_rate": gap(0.1, 0.2)},
        "Edema": {"auroc": gap(0.2, 0.4, ("F", "M")), "false_negative_rate": None},
        "Hernia": {"auroc": {"value": 0.5, "low": None, "high": None, "of": ["M", "F"]}},
    }
    metrics["subgroups"] = {"sex": {"groups": {}, "gaps": gaps, "macro_of": NAMES[:3]}}
    found = texts(metrics)["For whom?"]
    assert found[0] == "Macro AUROC by sex, over 3 findings: M over F by 0.020 (0.010 to 0.030)."
    assert found[1] == (
        "Gaps in AUROC by finding whose interval excludes 0 (1 of 3): Edema by sex: F over M by"
        " 0.300 (0.200 to 0.400)."
    )
    assert "(1 of 1): Mass by sex: M over F by 0.150" in found[2]
    assert len(found) == 4 and "chosen" in found[3]


def test_without_a_clear_gap_their_number_is_said(metrics):
    gaps = {"macro": {"auroc": gap(-0.01, 0.03)}, "Mass": {"auroc": gap(-0.1, 0.3)}}
    metrics["subgroups"] = {"sex": {"groups": {}, "gaps": gaps}}
    expected = "Of 2 gaps between groups (sex), no interval excludes 0."
    assert texts(metrics)["For whom?"] == [expected]
    for statistic in (gaps["macro"]["auroc"], gaps["Mass"]["auroc"]):
        statistic.update(low=None, high=None)
    assert texts(metrics)["For whom?"] == ["No gap between groups (sex) has an interval."]


@pytest.mark.parametrize("value", [None, {}])
def test_without_groups_that_is_said(metrics, value):
    metrics["subgroups"] = value
    assert "no group is scored" in texts(metrics)["For whom?"][0]


def test_undefined_findings_are_named_with_the_reason(metrics):
    metrics["findings"]["Mass"].update(auroc=None, positives=0)
    metrics["findings"]["Edema"].update(auroc=None, negatives=0)
    begin = "Not scored, because no image is known to be"
    assert sentence(metrics, "Where not?", f"{begin} positive") == f"{begin} positive: Mass."
    assert sentence(metrics, "Where not?", f"{begin} negative") == f"{begin} negative: Edema."
    assert "over 2 of 4 findings" in texts(metrics)["How good?"][0]


def test_findings_that_may_be_chance_are_named(metrics):
    for name, low, high in (("Mass", 0.51, 0.7), ("Edema", 0.45, 0.7), ("Hernia", 0.2, 0.4)):
        metrics["findings"][name]["auroc"] = {"value": 0.5, "low": low, "high": high}
    text = sentence(metrics, "Where not?", "The AUROC interval is not above 0.5")
    assert text.endswith(": Edema, Hernia.")


def test_images_of_the_training_and_changes_are_said(metrics):
    metrics.update(data={"images_of_training": 1200}, changed_since_training=["csv_sha256"])
    found = " ".join(texts(metrics)["Where not?"])
    assert "1,200 images have the names of images of the training" in found
    assert "Changed since the training: csv_sha256." in found
    of_member = {key: metrics.pop(key) for key in ("data", "changed_since_training")}
    metrics["members"] = [{"changed_since_training": ["read_size"]}, of_member]
    found = " ".join(texts(metrics)["Where not?"])
    assert "1,200 images have the names of images of the training" in found
    assert "Changed since the training: read_size, csv_sha256." in found


def test_operating_points_of_the_same_images_are_said_to_be_too_good(metrics):
    assert sentence(metrics, "Where not?", "The operating points") is None
    metrics["operating_points"]["fitted_on"]["split"] = metrics["split"]
    assert sentence(metrics, "Where not?", "The operating points").endswith("too good.")
    metrics["data"] = {"images_of_training": 0}
    assert sentence(metrics, "Where not?", "The operating points") is None, "a split of other data"


def test_unknown_labels_are_counted(metrics):
    metrics["findings"]["Mass"]["unknown"] = 1234
    assert sentence(metrics, "Where not?", "Labels are unknown").endswith("Mass (1,234).")


def test_without_a_score_nothing_is_ranked(metrics):
    for each in metrics["findings"].values():
        each["auroc"] = each["average_precision"] = None
    assert texts(metrics)["How good?"] == [
        "No AUROC is defined for any of 4 findings.",
    ]


def test_names_are_marked(metrics):
    parts = {part for each in answers(metrics) for one in each.sentences for part in one}
    assert {part for part in parts if isinstance(part, Name)} >= {"Mass", "Hernia"}
    assert {part for part in parts if "Mass" in part} == {"Mass"}


def test_long_lists_are_cut():
    assert "".join(listed([(letter,) for letter in "abcdefg"])) == "a, b, c, d, e and 2 more"
    assert "".join(listed([("a",), ("b", " (1)")], most=None)) == "a, b (1)"


def test_numbers_without_a_value_are_dashes():
    assert (number(None), with_interval(None)) == ("-", "-")
    assert with_interval({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert with_interval({"value": 0.1, "low": -1e-5, "high": 0.2}) == "0.100 (0.000 to 0.200)"
