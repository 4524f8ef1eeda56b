"""What the command localize prints: scores beside the baselines, and the check of the weights."""

from __future__ import annotations

from typing import Any, List, Mapping, Optional

from cxr_vit.console import columns, count
from cxr_vit.evaluation.bootstrap import LEAST_PATIENTS
from cxr_vit.evaluation.localization import ALL, MACRO, MAPS

#: The scores with columns in the table.
_SCORES = {"pointing_game": "pointing game", "iou": "IoU"}
_GROUPS = {ALL: "all pairs", MACRO: "mean of findings"}


def score_lines(found: Mapping[str, Any]) -> List[str]:
    """Return lines from the content of localization.json: scores, differences, what is missing."""
    counts = found["counts"]
    return [
        f"maps of {found['method']} and boxes: {count(counts['pairs'], 'pair')} of finding and"
        f" image, {count(counts['images'], 'image')}, {count(counts['patients'], 'patient')}",
        *_scores(found),
        *_differences(found["differences"]),
        *_remarks(found),
    ]


def _scores(found: Mapping[str, Any]) -> List[str]:
    counts, baselines = found["counts"], list(found["differences"])
    pairs = {name: each["pairs"] for name, each in counts["findings"].items()}
    heading = ["", "pairs"]
    for title in _SCORES.values():
        heading += [title, *baselines]
    rows = [heading]
    for group, number in {**pairs, ALL: counts["pairs"], MACRO: ""}.items():
        rows.append([_GROUPS.get(group, group), str(number)])
        for score in _SCORES:
            values = {name: each[score][group] for name, each in found["scores"].items()}
            rows[-1].append(_text(values[MAPS]))
            rows[-1] += [f"{values[name]['value']:.2f}" for name in baselines]
    return columns(rows)


def _differences(found: Mapping[str, Any]) -> List[str]:
    rows = [["difference to", *_SCORES.values()]]
    for name, scores in found.items():
        rows.append([f"  {name}", *(_text(scores[score][ALL], sign="+") for score in _SCORES)])
    return columns(rows)


def _remarks(found: Mapping[str, Any]) -> List[str]:
    lines, counts = [], found["counts"]
    if counts["patients"] < LEAST_PATIENTS:
        lines.append(f"no intervals: they need {LEAST_PATIENTS} patients")
    elif found["intervals"]["resamples"]:
        lines += _without_interval(found["scores"][MAPS])
    for key, text in {
        "flat_maps": "maps with one value everywhere, as good as a point at random",
        "pairs_outside": "pairs left out, with boxes where the model does not look",
        "pairs_not_chosen": "pairs left out by --images",
    }.items():
        if counts[key]:
            lines.append(f"{text}: {counts[key]}")
    return lines


def _without_interval(scores: Mapping[str, Any]) -> List[str]:
    groups = [
        _GROUPS.get(group, group)
        for group in scores["iou"]
        if any(scores[score][group]["low"] is None for score in _SCORES)
    ]
    if not groups:
        return []
    return [
        f"no interval of a score (less than {LEAST_PATIENTS} patients, or the same value in every"
        f" resample): {', '.join(groups)}"
    ]


def sanity_lines(found: Optional[Mapping[str, Any]]) -> List[str]:
    """Return lines: how similar the maps of randomised weights are; none without the check."""
    if found is None:
        return []
    rows = [["weights randomised from the head to", "rank correlation"]]
    for step in found["steps"]:
        value = step["correlation"]
        rows.append([f"  {step['randomised']}", "undefined" if value is None else _text(value)])
    return [*columns(rows), f"  with the maps of the weights, {count(found['images'], 'image')}"]


def _text(value: Mapping[str, Any], *, sign: str = "") -> str:
    """Return a value with its interval: ``"0.52 [0.44, 0.60]"``."""
    text = format(value["value"], f"{sign}.2f")
    if value["low"] is None:
        return text
    return f"{text} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"
