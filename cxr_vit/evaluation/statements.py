"""What the numbers of metrics.json say, in sentences: how good, how sure, for whom, where not.

A sentence is a sequence of texts. Those that name a label or a group of patients are `Name`, so
that each kind of page escapes them in its own way.
"""

from __future__ import annotations

from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)

from cxr_vit.config.columns import is_no_finding
from cxr_vit.evaluation.bootstrap import LEAST_PATIENTS

Metrics = Mapping[str, Any]
Sentence = Tuple[str, ...]

#: An AUROC with a wider interval says little; one of fewer positives mostly has such an interval.
WIDE, FEW_POSITIVES = 0.1, 50
#: Findings, or gaps, that a sentence lists.
_LISTED = 5
_CHANCE = 0.5

#: The means over the findings, in words.
MEAN_WORDS = {
    "macro": "mean of the findings",
    "weighted": "weighted by positives",
    "micro": "all decisions together",
}
#: The scores of a gap between groups, in words.
GAP_WORDS = {"auroc": "AUROC", "false_negative_rate": "false negative rate"}

#: What no number of the report shows.
LIMITS = (
    "Research use only. The model is not a medical device: no decision on a patient may rest on"
    " it.",
    "The scores hold for images like those of this data set. Hospitals, scanners, patients and the"
    " prevalence of findings differ, and scores are mostly lower elsewhere.",
    "Labels from reports are wrong for some images; a score compares the model with these labels,"
    " not with the truth.",
    "Intervals describe how the scores vary over patients drawn from the same source. They say"
    " nothing of wrong labels, of the choice of a checkpoint, or of another training.",
    "Comparisons of several findings and groups are not independent; some intervals exclude 0 by"
    " chance.",
)


class Name(str):
    """A name that the data set gives: of a label, or of a group."""

    is_name = True  # for templates


class Answer(NamedTuple):
    """A question with the sentences that answer it."""

    question: str
    sentences: List[Sentence]


class Gap(NamedTuple):
    """A difference between two groups of an attribute, of a finding or `macro`."""

    attribute: str
    name: str
    score: str
    statistic: Mapping[str, Any]

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval has no 0; without an interval it may have."""
        low, high = self.statistic["low"], self.statistic["high"]
        return low is not None and (low > 0 or high < 0)


def answers(metrics: Metrics) -> List[Answer]:
    """Return the four questions, each with its sentences."""
    return [
        Answer("How good?", list(_how_good(metrics))),
        Answer("How sure?", list(_how_sure(metrics))),
        Answer("For whom?", list(_for_whom(metrics))),
        Answer("Where not?", list(_where_not(metrics))),
    ]


def scored(metrics: Metrics) -> Dict[str, Mapping[str, Any]]:
    """Return the findings with an AUROC, the highest first; `No Finding` is none."""
    found = {
        name: each
        for name, each in metrics["findings"].items()
        if each["auroc"] is not None and not is_no_finding(name)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["auroc"]["value"]))


def gaps(metrics: Metrics) -> List[Gap]:
    """Return the gaps between groups that have a value, those of `macro` first."""
    found = [
        Gap(attribute, name, score, statistic)
        for attribute, section in (metrics.get("subgroups") or {}).items()
        for name, scores in section["gaps"].items()
        for score, statistic in scores.items()
        if statistic is not None
    ]
    return sorted(found, key=lambda gap: gap.name != "macro")


def number(value: Optional[float], digits: int = 3) -> str:
    """Format a score: ``"0.842"``, ``"-"`` for None."""
    # Without the sign of a zero.
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def interval(statistic: Optional[Mapping[str, Any]], digits: int = 3) -> str:
    """Format the limits of a score: ``"0.835 to 0.849"``, ``""`` where there is no interval."""
    if statistic is None or statistic["low"] is None:
        return ""
    return f"{number(statistic['low'], digits)} to {number(statistic['high'], digits)}"


def with_interval(statistic: Optional[Mapping[str, Any]], digits: int = 3) -> str:
    """Format a score with its limits: ``"0.842 (0.835 to 0.849)"``."""
    if statistic is None:
        return "-"
    limits = interval(statistic, digits)
    return number(statistic["value"], digits) + (f" ({limits})" if limits else "")


def listed(items: Iterable[Sentence], most: Optional[int] = _LISTED) -> Sentence:
    """Join items with commas; of more than `most`, the last ones are counted."""
    items = list(items)
    shown = items if most is None else items[:most]
    parts: List[str] = []
    for position, item in enumerate(shown):
        parts += [", "] if position else []
        parts += item
    if len(shown) < len(items):
        parts.append(f" and {len(items) - len(shown)} more")
    return tuple(parts)


def _how_good(metrics: Metrics) -> Iterator[Sentence]:
    macro, by_score = metrics["means"]["macro"], scored(metrics)
    total = metrics["num_findings"]
    if not by_score:
        yield (f"No AUROC is defined for any of {total} findings.",)
        return
    yield (
        f"Macro AUROC {with_interval(macro['auroc'])}, over {len(by_score)} of {total} findings,"
        f" on {metrics['num_samples']:,} {metrics['split']} images.",
    )
    names = list(by_score)
    count = min(3, len(names) // 2)
    if count:
        each = [(Name(name), f" {with_interval(by_score[name]['auroc'])}") for name in names]
        yield ("Highest AUROC: ", *listed(each[:count]), ".")
        yield ("Lowest AUROC: ", *listed(each[: -count - 1 : -1]), ".")
    rate = sum(each["prevalence"] for each in by_score.values()) / len(by_score)
    yield (
        f"Macro average precision {with_interval(macro['average_precision'])}; scores without"
        f" information have {number(rate)}, the mean prevalence.",
    )


def _how_sure(metrics: Metrics) -> Iterator[Sentence]:
    facts, by_score = metrics["intervals"], scored(metrics)
    if facts["resamples"] == 0:
        yield ("No intervals were computed.",)
    elif facts["patients"] < LEAST_PATIENTS:
        yield (f"No intervals: fewer than {LEAST_PATIENTS} patients.",)
    else:
        yield (
            f"Intervals are {100 * facts['level']:.0f} % {facts['method']}: {facts['patients']:,}"
            f" patients, {facts['resamples']:,} resamples, seed {facts['seed']}.",
        )
        yield from _with_names(
            f"No AUROC interval, because less than {LEAST_PATIENTS} patients have a positive or a"
            " negative image, or because all resamples have the same AUROC: ",
            by_score,
            lambda each: each["auroc"]["low"] is None,
        )
        widths = {
            name: each["auroc"]["high"] - each["auroc"]["low"]
            for name, each in by_score.items()
            if each["auroc"]["low"] is not None
        }
        wide = [
            (Name(name), f" ({interval(by_score[name]['auroc'])})")
            for name in sorted(widths, key=lambda name: -widths[name])
            if widths[name] > WIDE
        ]
        if wide:
            yield (f"An AUROC interval wider than {WIDE}: ", *listed(wide), ".")
        elif widths:
            yield (f"No AUROC interval is wider than {WIDE}.",)
    yield from _with_names(
        f"Fewer than {FEW_POSITIVES} positive images: ",
        dict(sorted(by_score.items(), key=lambda item: item[1]["positives"])),
        lambda each: each["positives"] < FEW_POSITIVES,
        lambda each: f" ({each['positives']})",
    )
    yield from _with_names(
        "DeLong's interval, which takes images for independent, disagrees for: ",
        by_score,
        lambda each: each["delong"] is not None and not each["delong"]["agrees"],
    )
    error = metrics["means"]["macro"]["expected_calibration_error"]
    if error is not None:
        yield (
            "Probabilities differ from the observed rates by"
            f" {number(error)} on average (expected calibration error).",
        )


def _for_whom(metrics: Metrics) -> Iterator[Sentence]:
    subgroups = metrics.get("subgroups") or {}
    if not subgroups:
        yield ("No sex, age or view of the patients is known: no group is scored on its own.",)
        return
    every = gaps(metrics)
    clear = [gap for gap in every if gap.excludes_zero]
    attributes = ", ".join(subgroups)
    if not clear:
        count = sum(gap.statistic["low"] is not None for gap in every)
        if count:
            yield (f"Of {count} gaps between groups ({attributes}), no interval excludes 0.",)
        else:
            yield (f"No gap between groups ({attributes}) has an interval.",)
    for gap in [gap for gap in clear if gap.name == "macro"]:
        chosen = subgroups[gap.attribute].get("macro_of")
        over = "" if chosen is None else f", over {len(chosen)} findings"
        yield (f"Macro {GAP_WORDS[gap.score]} by {gap.attribute}{over}: ", *_gap(gap), ".")
    for score, words in GAP_WORDS.items():
        of_score = [gap for gap in clear if gap.score == score and gap.name != "macro"]
        of_score.sort(key=lambda gap: -gap.statistic["value"])
        if of_score:
            compared = sum(gap.score == score and gap.name != "macro" for gap in every)
            each = [(Name(gap.name), f" by {gap.attribute}: ", *_gap(gap)) for gap in of_score]
            yield (
                f"Gaps in {words} by finding whose interval excludes 0 ({len(of_score)} of"
                f" {compared}): ",
                *listed(each, 3),
                ".",
            )
    if clear:
        yield (
            "The two groups of a gap were chosen for it, and no interval is corrected for the"
            " number of gaps: expect smaller ones on other patients.",
        )


def _gap(gap: Gap) -> Sentence:
    highest, lowest = gap.statistic["of"]
    return (Name(highest), " over ", Name(lowest), f" by {with_interval(gap.statistic)}")


def _where_not(metrics: Metrics) -> Iterator[Sentence]:
    findings = {name: each for name, each in metrics["findings"].items() if not is_no_finding(name)}
    for what in ("positives", "negatives"):
        unseen = {name: each for name, each in findings.items() if each[what] == 0}
        yield from _with_names(
            f"Not scored, because no image is known to be {what[:-1]}: ",
            unseen,
            lambda each: each["auroc"] is None,
        )
    yield from _with_names(
        f"The AUROC interval is not above {_CHANCE}, which is chance: ",
        findings,
        lambda each: _may_be_chance(each["auroc"]),
    )
    yield from _with_names(
        "Labels are unknown for some images of: ",
        findings,
        lambda each: each["unknown"] > 0,
        lambda each: f" ({each['unknown']:,})",
    )
    if fitted_on_these(metrics):
        yield ("The operating points were fitted on these images: their ratios are too good.",)
    members = metrics.get("members") or [metrics]
    shared = max((each.get("data") or {}).get("images_of_training") or 0 for each in members)
    if shared:
        yield (
            f"{shared:,} images have the names of images of the training or its validation: the"
            " scores are too high.",
        )
    changed = dict.fromkeys(
        key for each in members for key in each.get("changed_since_training") or []
    )
    if changed:
        yield (f"Changed since the training: {', '.join(map(str, changed))}.",)
    yield (
        "Other hospitals, scanners and patients than those of this data set: no number here holds"
        " for them. No use on patients.",
    )


def fitted_on_these(metrics: Metrics) -> bool:
    """Whether the operating points were fitted on the images that are scored."""
    points = metrics.get("operating_points") or {"fitted_on": {"split": None}}
    is_other = any("data" in each for each in metrics.get("members") or [metrics])
    return not is_other and points["fitted_on"]["split"] == metrics["split"]


def _may_be_chance(statistic: Optional[Mapping[str, Any]]) -> bool:
    return statistic is not None and statistic["low"] is not None and statistic["low"] <= _CHANCE


def _with_names(
    beginning: str,
    findings: Mapping[str, Any],
    chosen: Callable[[Any], bool],
    text: Callable[[Any], str] = lambda _: "",
) -> Iterator[Sentence]:
    """Yield one sentence that names the chosen findings, if there are any."""
    names = [(Name(name), text(each)) for name, each in findings.items() if chosen(each)]
    if names:
        yield (beginning, *listed(names), ".")
