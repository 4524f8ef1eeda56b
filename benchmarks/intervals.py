"""Time the intervals of the scores, and simulate how often they hold the true value.

    python -m benchmarks.intervals [--data-sets 500] [--out FILE]

The time is that of 1,000 resamples of as many images as the official test split, 14 findings, and
of 200 resamples of a validation. For the coverage, data sets of patients with several images are
drawn from a known distribution: patients differ in how often they have the finding and in their
scores. The intervals of a bootstrap over patients are compared with those of one over images, and
with DeLong's. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any, Dict, NamedTuple, Sequence

import numpy as np

from benchmarks.machine import describe_machine
from cxr_vit.cli import run
from cxr_vit.evaluation.bootstrap import LEVEL, Resamples, intervals
from cxr_vit.evaluation.delong import delong_interval
from cxr_vit.evaluation.statistics import errors, joined, ranking

#: The official test split.
IMAGES, PATIENTS, FINDINGS = 25_596, 2_797, 14
VALIDATIONS = (1_000, 11_000)
#: Patients of the simulated data sets.
COVERED_PATIENTS = (200, 500)
#: Images of a patient on average, share of positives, and difference of their scores in deviations.
MEAN_IMAGES, PREVALENCE, SEPARATION = 5, 0.2, 1.2
#: Share of the variance that patients have: of the tendency to the finding, and of the score.
SHARE = 0.5
SCORES = ("auroc", "average_precision", "brier")


class Rows(NamedTuple):
    """Probabilities, float32 ``[N, 1]``, labels, int8 ``[N, 1]``, and patients, int64 ``[N]``."""

    probabilities: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


def main(argv: Sequence[str]) -> int:
    """Measure, simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-sets", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("intervals.json"))
    arguments = parser.parse_args(argv)
    results = {
        "report": time_report(),
        "validation": [time_validation(images) for images in VALIDATIONS],
        "coverage": [
            coverage(arguments.data_sets, patients=patients, resamples=1000)
            for patients in COVERED_PATIENTS
        ],
    }
    command = "python -m benchmarks.intervals"
    about = {"command": command, **describe_machine("numpy"), "results": results}
    arguments.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return 0


def random_scores(images: int, patients: int) -> Dict[str, Any]:
    """Return random arguments of `ranking` and `errors`."""
    generator = np.random.default_rng(0)
    names = [f"finding {column}" for column in range(FINDINGS)]
    return {
        "probabilities": generator.random((images, FINDINGS), np.float32),
        "labels": (generator.random((images, FINDINGS)) < 0.05).astype(np.int8),
        "patients": generator.integers(0, patients, images),
        "names": names,
        "findings": range(FINDINGS),
    }


def time_report() -> Dict[str, Any]:
    """Time the intervals of a report."""
    given, resamples = random_scores(IMAGES, PATIENTS), Resamples()
    start = time.perf_counter()
    intervals(joined({"ranking": ranking(**given), "errors": errors(**given)}), PATIENTS, resamples)
    seconds = round(time.perf_counter() - start, 1)
    shape = {"images": IMAGES, "patients": PATIENTS, "findings": FINDINGS}
    return {**shape, "resamples": resamples.count, "seconds": seconds}


def time_validation(images: int) -> Dict[str, Any]:
    """Time the interval of the macro AUROC of a validation."""
    patients = images // 4
    start = time.perf_counter()
    statistic = ranking(**random_scores(images, patients), means=("macro",))
    intervals(statistic, patients, Resamples(200))
    seconds = round(time.perf_counter() - start, 2)
    return {"images": images, "findings": FINDINGS, "resamples": 200, "seconds": seconds}


def draw(generator: np.random.Generator, patients: int) -> Rows:
    """Draw a data set: each patient has 1 to 9 images, and tendencies of its own."""
    patient = np.repeat(np.arange(patients), generator.integers(1, 2 * MEAN_IMAGES, patients))
    own, other = math.sqrt(SHARE), math.sqrt(1.0 - SHARE)

    def clustered() -> np.ndarray:
        of_patients = generator.standard_normal(patients)[patient]
        values: np.ndarray = own * of_patients + other * generator.standard_normal(len(patient))
        return values

    truth = clustered() > NormalDist().inv_cdf(1.0 - PREVALENCE)
    scores = SEPARATION * truth + clustered()
    probabilities = 1.0 / (1.0 + np.exp(-(SEPARATION * scores - 2.1)))
    return Rows(probabilities[:, None].astype(np.float32), truth[:, None].astype(np.int8), patient)


def statistic_of(rows: Rows) -> Any:
    """Return the scores of a data set as a function of the weights."""
    given = (*rows, ["finding"], [0])
    return joined({"": ranking(*given, means=()), "e": errors(*given)})


def true_values() -> Dict[str, float]:
    """Return the scores of the distribution, from a data set of 200,000 patients.

    The AUROC is that of the closed form.
    """
    rows = draw(np.random.default_rng(10**6), 200_000)
    found = intervals(statistic_of(rows), int(rows.patients.max()) + 1, Resamples(0))
    return {**{score: _score(found, score).value for score in SCORES}, "auroc": exact_auroc()}


def exact_auroc() -> float:
    """Return the AUROC of normal scores with the same variance: Phi(d / sqrt(2))."""
    return 0.5 * (1.0 + math.erf(SEPARATION / 2.0))


def _score(found: Dict[str, Any], score: str) -> Any:
    return found.get(f"/{score}/finding") or found[f"e/{score}/finding"]


def coverage(data_sets: int, *, patients: int, resamples: int) -> Dict[str, Any]:
    """Return the share of data sets, in percent, whose 95 % interval holds the true value."""
    truth = true_values()
    held: Dict[str, Dict[str, int]] = {
        "over patients": dict.fromkeys(SCORES, 0),
        "over images": dict.fromkeys(SCORES, 0),
        "DeLong": {"auroc": 0},
    }
    images = 0
    for index in range(data_sets):
        rows = draw(np.random.default_rng(index), patients)
        images += len(rows.patients)
        alone = rows._replace(patients=np.arange(len(rows.patients)))
        for name, each in (("over patients", rows), ("over images", alone)):
            count = int(each.patients.max()) + 1
            found = intervals(statistic_of(each), count, Resamples(resamples, seed=index))
            for score in SCORES:
                interval = _score(found, score)
                held[name][score] += interval.low <= truth[score] <= interval.high
        auroc = _score(found, "auroc").value
        limits = delong_interval(auroc, rows.probabilities[:, 0], rows.labels[:, 0])
        held["DeLong"]["auroc"] += limits is not None and limits[0] <= truth["auroc"] <= limits[1]
    percent = {
        name: {score: round(100 * count / data_sets, 1) for score, count in counts.items()}
        for name, counts in held.items()
    }
    design = {"data_sets": data_sets, "patients": patients, "resamples": resamples}
    return {
        **design,
        "level_percent": 100 * LEVEL,
        "images": round(images / data_sets),
        "prevalence": PREVALENCE,
        "share_of_patients": SHARE,
        "true": {score: round(value, 4) for score, value in truth.items()},
        "percent": percent,
    }


if __name__ == "__main__":
    run(main)
