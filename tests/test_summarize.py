"""The command `summarize`: groups of runs, means, and folders that are left out."""

import csv
import json
import os
import statistics

import pytest

from cxr_vit.cli import main
from cxr_vit.config import dump_config, load_config
from cxr_vit.errors import DataError
from cxr_vit.evaluation.summary import Spread, read_run

LABELS = ("Mass", "Hernia")


@pytest.fixture
def write(tmp_path):
    """Write a run's folder with given validations and test scores."""

    def write(name, *overrides, val=((3, 0.6), (6, 0.7)), test=None, labels=LABELS, facts=None):
        folder = tmp_path / "runs" / name
        (folder / "report").mkdir(parents=True)
        words = ["model.name=vit-micro", "pipeline.layers_per_stage=[4]", *overrides]
        config = load_config([], [*words, "batch.micro_batch_size=8"])
        (folder / "config.yaml").write_text(dump_config(config))
        events = [{"step": 0, "perf/compile_s": 1.5}]
        for step, score in val:
            events.append({"step": step, "train/loss": 0.2, "perf/samples_per_s": 4.0})
            each = {f"val/auroc/{label}": score for label in labels}
            events.append({"step": step, "val/auroc_macro": score, "val/loss": 0.2, **each})
        text = "".join(json.dumps(event) + "\n" for event in events)
        (folder / "metrics.jsonl").write_text(text)
        if test is not None:
            macro, *each = test
            step = max(val, key=lambda pair: pair[1] or 0)[0]
            report = {"split": "test", "step": step, "auroc_macro": macro}
            report["auroc"] = dict(zip(labels, each))
            (folder / "report" / "metrics.json").write_text(json.dumps(report))
        found = facts or {"csv_sha256": "a", "split_sha256": "b"}
        (folder / "environment.json").write_text(json.dumps(found))
        return folder

    return write


def summarise(*words, out=None):
    assert main(["summarize", *map(str, words)]) == 0


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_seeds_of_one_recipe(write, tmp_path, capsys):
    tests = [(0.70, 0.8, 0.6), (0.72, 0.84, 0.60), (0.77, 0.84, 0.70)]
    runs = [
        write(f"s{seed}", f"run.seed={seed}", f"run.name=s{seed}", test=test)
        for seed, test in enumerate(tests)
    ]
    summarise(*runs)
    (group,) = summary(tmp_path / "runs" / "summary")["groups"]
    macro = [test[0] for test in tests]
    assert group["test_auroc"] == {
        "num_defined": 3,
        "num_undefined": 0,
        "mean": pytest.approx(0.73),
        "sd": pytest.approx(statistics.stdev(macro)),
        "smallest": 0.70,
        "largest": 0.77,
    }
    assert group["val_auroc"]["mean"] == pytest.approx(0.7)
    assert group["split_of_labels"] == "test"
    assert group["labels"]["Hernia"]["mean"] == pytest.approx((0.6 + 0.6 + 0.7) / 3)
    # Six steps of 8 images each, at 4 images/s.
    assert group["minutes"]["mean"] == pytest.approx(6 * 8 / 4 / 60)
    assert group["images_per_s"]["mean"] == 4.0
    assert [run["best_step"] for run in group["runs"]] == [6, 6, 6]
    with (tmp_path / "runs" / "summary" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["test_auroc/Mass"] for row in rows] == ["0.8", "0.84", "0.84"]
    assert (tmp_path / "runs" / "summary" / "summary.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "differ in seed, name and folders only" in out
    assert "0.6333 ± 0.0577" in out


def test_two_recipes_are_compared(write, tmp_path, capsys):
    for seed, score in enumerate((0.70, 0.72)):
        write(f"a{seed}", f"run.seed={seed}", val=[(6, score)])
        write(f"b{seed}", f"run.seed={seed}", "optim.lr=0.01", val=[(6, score + 0.05)])
    runs = sorted((tmp_path / "runs").iterdir())
    summarise(*runs, "--out", tmp_path / "out")
    found = summary(tmp_path / "out")
    assert [group["settings"] for group in found["groups"]] == [
        {"optim.lr": "0.0002"},
        {"optim.lr": "0.01"},
    ]
    (difference,) = found["differences"]
    error = (2 * statistics.variance((0.70, 0.72)) / 2) ** 0.5
    assert difference["val_auroc"]["mean"] == pytest.approx(0.05)
    assert difference["val_auroc"]["standard_error"] == pytest.approx(error)
    assert difference["test_auroc"] is None  # there are no reports
    assert found["groups"][0]["split_of_labels"] == "val"
    assert "B - A, val AUROC: +0.0500, standard error 0.0141" in capsys.readouterr().out


def test_undefined_scores_stay_undefined_and_are_counted(write, tmp_path):
    runs = [
        write("s0", "run.seed=0", val=[(6, None)], test=(None, 0.8, None)),
        write("s1", "run.seed=1", test=(0.7, 0.7, None)),
    ]
    summarise(*runs, "--out", tmp_path)
    (group,) = summary(tmp_path)["groups"]
    assert (group["test_auroc"]["num_defined"], group["test_auroc"]["num_undefined"]) == (1, 1)
    assert group["test_auroc"]["sd"] is None
    assert group["labels"]["Hernia"]["mean"] is None
    assert group["labels"]["Hernia"]["num_undefined"] == 2
    assert group["val_auroc"]["num_undefined"] == 1


def test_runs_without_a_report_are_not_undefined(write, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    tests = (None, (0.7, 0.7, 0.7), (None, 0.6, None))
    runs = [write(f"s{i}", f"run.seed={i}", test=test) for i, test in enumerate(tests)]
    summarise(*runs, "--out", tmp_path)
    (group,) = summary(tmp_path)["groups"]
    assert (group["test_auroc"]["num_defined"], group["test_auroc"]["num_undefined"]) == (1, 1)
    assert "1 (1 undefined, 1 without a report)" in " ".join(capsys.readouterr().out.split())
    summarise(runs[0], "--out", tmp_path)
    out = capsys.readouterr().out
    assert "0 (1 without a report)" in out
    assert "differ in seed" not in out  # of one run


def test_best_step_is_the_first_of_equal_ones(write):
    run = read_run(write("s", val=[(3, 0.7), (6, 0.7), (9, 0.6)]))
    assert (run.best_step, run.last_step, run.val_auroc) == (3, 9, 0.7)


def test_spread_of_one_value_has_no_deviation():
    assert Spread.of([0.5]) == (1, 0, 0.5, None, 0.5, 0.5)
    assert Spread.of([None]) == (0, 1, None, None, None, None)


def damage(folder, name, content):
    path = folder / name
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metrics.jsonl", b'{"step": 3}\n', "has no validation"),
        (
            "metrics.jsonl",
            b'{"step": 3}\nnonsense\n{"step": 4}\n',
            "metrics.jsonl, line 2: damaged",
        ),
        ("metrics.jsonl", b'{"step": 3, "val/auroc_macro": "x"}\n{}\n', "line 1: damaged"),
        ("metrics.jsonl", b'{"step": 3, "val/auroc_macro": NaN}\n{}\n', "line 1: damaged"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n{}\n", "line 1: damaged"),
        ("config.yaml", b"nonsense: 3\n", "nonsense"),
        ("report/metrics.json", b"{", "report/metrics.json"),
        ("report/metrics.json", b'{"split": "test", "auroc": 3, "step": 1}', "is damaged"),
    ],
)
def test_damaged_run_is_left_out(write, tmp_path, caplog, name, content, reason):
    good, bad = write("good", test=(0.7, 0.7, 0.7)), write("bad", test=(0.7, 0.7, 0.7))
    damage(bad, name, content)
    summarise(good, bad, "--out", tmp_path)
    assert len(summary(tmp_path)["groups"][0]["runs"]) == 1
    assert f"{bad} is left out: " in caplog.text
    assert reason in caplog.text


def test_other_folders_and_pipes_are_left_out(write, tmp_path, caplog):
    good, bad = write("good"), write("bad")
    (bad / "metrics.jsonl").unlink()
    os.mkfifo(bad / "metrics.jsonl")
    summarise(good, good, bad, tmp_path / "runs", tmp_path / "none", "--out", tmp_path)
    assert "a named pipe, not a regular file" in caplog.text
    assert caplog.text.count("it is no run's folder") == 2
    assert len(summary(tmp_path)["groups"][0]["runs"]) == 1  # it was given twice


def test_incomplete_last_line_is_passed_over(write):
    folder = write("s")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "val/auroc_ma')
    assert read_run(folder).last_step == 6


def test_no_usable_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no run is left to summarise"):
        main(["summarize", str(tmp_path)])


def test_runs_of_other_labels_are_refused(write, tmp_path):
    one, other = write("one"), write("other", labels=("Mass", "Nodule"))
    with pytest.raises(DataError, match=r"have different labels \(Hernia, Nodule\)"):
        main(["summarize", str(one), str(other)])
    assert not (tmp_path / "runs" / "summary").exists()


def test_doubtful_comparisons_are_named(write, tmp_path, capsys):
    runs = [
        write("s0", "run.seed=0"),
        write("s1", "run.seed=0", val=[(3, 0.5)], facts={"csv_sha256": "c", "split_sha256": "d"}),
    ]
    report = {"split": "test", "step": 3, "auroc_macro": 0.5, "auroc": {"Mass": 0.5, "Hernia": 0.5}}
    (runs[0] / "report" / "metrics.json").write_text(json.dumps(report))
    summarise(*runs, "--out", tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "not all runs have the same labels" in out
    assert "the runs of A ended at different steps: 6, 3" in out
    assert "have the same run.seed: [0, 0]" in out
    assert "its report is of step 3, not of the best one" in out


def test_report_of_many_labels_is_read(write, tmp_path):
    run = write("s0", test=(0.7, 0.7, 0.7))
    path = run / "report" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "subgroups": "x" * 5_000_000}))
    summarise(run, "--out", tmp_path)
    assert summary(tmp_path)["warnings"] == []


def test_reports_of_other_views_or_data_are_named(write, tmp_path, capsys):
    runs = [
        write(f"s{seed}", f"run.seed={seed}", *views, test=(0.7, 0.7, 0.7))
        for seed, views in enumerate(([], [], ["evaluation.views=flip"]))
    ]
    for run, facts in zip(runs, ({"views": "flip"}, {"changed_since_training": ["csv_sha256"]})):
        path = run / "report" / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    summarise(*runs, "--out", tmp_path)
    capsys.readouterr()
    reasons = [line.partition(": ")[2] for line in summary(tmp_path)["warnings"]]
    assert reasons == [
        "its report has evaluation.views=flip, its configuration another",
        "its report is of other data than the training: csv_sha256 changed",
        "its report has evaluation.views=center, its configuration another",
    ]


def test_run_of_the_trainer_is_read(make, caplog):
    run = make(scores=[0.4, 0.6], loggers=None)
    run.fit()
    found = read_run(run.trainer.run.path)
    assert (found.best_step, found.last_step, found.val_auroc) == (6, 6, 0.6)
    assert found.images_per_s > 0
    assert found.minutes > 0
    assert set(found.facts) == {"csv_sha256", "split_sha256"}
    assert all(found.facts.values())
