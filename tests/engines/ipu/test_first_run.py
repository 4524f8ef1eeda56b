"""benchmarks.ipu_first_run, which a person with IPUs runs once, without IPUs.

Its workers run in this process. The commands themselves: python -m benchmarks.ipu_first_run with
PYTHONPATH=tests/fakes, marked exhaustive.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from benchmarks import ipu_first_run, ipu_first_run_worker
from cxr_vit.engines.ipu.options import on_hardware
from cxr_vit.errors import ConfigError, DeviceError
from cxr_vit.planner.calibrate import calibrate
from fakes import loading

from .commands import ROOT

#: Settings of a model that takes a moment. A micro-batch of 4 leaves an accumulation of 4.
TINY = (
    "model.name=vit-micro",
    "model.patch_size=8",
    "data.image_size=32",
    "data.sample_images=80",
    "pipeline.layers_per_stage=[1,1,1,1]",
    "pipeline.recompute=every_layer",
    "batch.gradient_accumulation=16",
    "engine.loader_mode=sync",
    "data.num_workers=0",
    "engine.precision=fp32",  # the front end's harness takes minutes for fp16
)
TINY_EQUALITY = ("data.sample_images=80", "data.image_size=32", "train.steps=8")


@pytest.fixture
def stand_in():
    with loading.stand_in():
        yield


@pytest.fixture
def first_run(tmp_path, monkeypatch):
    """The script with workers in this process; returns the JSON file and the kinds it started."""
    monkeypatch.setenv("POPLAR_ENGINE_OPTIONS", "")  # the worker for memory changes it
    monkeypatch.setattr(
        ipu_first_run, "EQUALITY", (*ipu_first_run.EQUALITY, *TINY_EQUALITY, "train.epochs=null")
    )
    out = tmp_path / "first.json"

    def start(only, *arguments):
        kinds = []

        def in_this_process(command, log, limit_s):
            job = json.loads(Path(command[-1]).read_text())
            kinds.append(job["kind"])
            log.write_text("")
            try:
                return "failed" if ipu_first_run_worker.main(command[-1:]) else None
            except ImportError:  # a traceback in the log
                return "failed"

        monkeypatch.setattr(ipu_first_run, "run_limited", in_this_process)
        words = ["--out", str(out), "--only", only, "--steps", "3", *arguments]
        status = ipu_first_run.main([*words, *TINY])
        return status, json.loads(out.read_text()), kinds

    return start


def test_losses_are_those_of_the_cpu(ipu, first_run, tmp_path):
    status, content, _ = first_run("equality_fp32")
    assert status == 0
    exact = content["items"]["equality_fp32"]["result"]
    assert exact["equal"] and exact["tolerance"] == 1e-5
    assert len(exact["train_loss"]["ipu"]) == len(exact["train_loss"]["cpu"]) == 8
    assert len(set(exact["train_loss"]["ipu"])) == 8
    assert len(exact["validations"]["ipu"]) == 1
    assert max(exact["difference"].values()) <= 1e-5
    exact["equal"] = False
    (tmp_path / "first.json").write_text(json.dumps(content))
    assert first_run("equality_fp32")[0] == 1


def test_differences_in_fp16_are_reported_and_not_judged(stand_in, first_run):
    status, content, _ = first_run("equality_fp16")
    half = content["items"]["equality_fp16"]["result"]
    assert status == 0 and "equal" not in half
    assert 1e-6 < half["difference"]["train_loss"] < 0.1


def test_settings_are_measured_beside_the_prediction(ipu, first_run, capsys):
    status, content, kinds = first_run("base,eval_4x32")
    assert status == 0 and kinds == ["facts", "training", "evaluation", "memory"]
    facts, items = content["facts"], content["items"]
    assert facts["numbers_of_ipus_that_answer"] == [1, 2, 4, 8, 16]
    assert {"poptorch", "ipu_hardware_version", "environment", "versions"} <= set(facts)
    base = items["base"]["result"]
    assert len(base["losses"]) == len(base["calls"]) == 3
    assert base["calls"][0]["samples"] == 16
    later = base["calls"][1:]
    seconds = sum(call["seconds"] + call["wait_s"] for call in later)
    assert math.isclose(base["samples_per_s"], 32 / seconds)
    assert base["compile_s"] > 0 and base["eval_samples_per_s"] > 0
    assert base["peak_host_memory_gib"] > 0.1
    for name, kinds in (("base", ["evaluation", "training"]), ("eval_4x32", ["evaluation"])):
        assert sorted(items[name]["predicted"]) == kinds
        for predicted in items[name]["predicted"].values():
            assert predicted["samples_per_s"] > 0 and len(predicted["stages"]) == 4
    scored = items["eval_4x32"]["result"]
    assert (scored["eval_images"], scored["eval_images_with_padding"]) == (18, 128)
    assert scored["compile_s"] > 0 and scored["eval_samples_per_s"] > 0
    # Nothing is invented: neither cycles nor memory, and all is marked.
    assert base["cycles_per_call"] is None
    assert "error" not in items["base/memory"]["result"]
    for graph in ("training", "inference"):
        assert "no profile.pop" in items["base/memory"]["result"][graph]["not_measured"]
    assert content["from_hardware"] is base["from_hardware"] is facts["from_hardware"] is False
    assert "NOT ON HARDWARE" in capsys.readouterr().out


def test_failure_is_recorded_and_nothing_is_repeated(stand_in, first_run, tmp_path, capsys):
    status, content, kinds = first_run("micro4,eval_1x4", "--no-memory")
    assert status == 0 and kinds == ["facts", "training", "evaluation"]
    failed = content["items"]["micro4"]["result"]
    assert "batch.gradient_accumulation=4" in failed["error"] and "\n" not in failed["error"]
    assert "error" not in content["items"]["eval_1x4"]["result"]
    assert not (tmp_path / "first" / "runs").exists()  # --calibrate would stop at it
    assert first_run("micro4,eval_1x4", "--no-memory")[2] == ["facts"]
    assert first_run("micro4,eval_1x4", "--no-memory", "--retry-failed")[2] == ["facts", "training"]
    # Other settings are another measurement.
    more = ("--no-memory", "data.val_fraction=0.2")
    assert first_run("eval_1x4", *more)[2] == ["facts", "evaluation"]


def test_runs_calibrate_the_planner_but_not_those_of_a_stand_in(
    stand_in, first_run, tmp_path, capsys
):
    first_run("base", "--no-memory")
    run = tmp_path / "first" / "runs" / "base"
    assert not (run / "checkpoints").exists()
    with pytest.raises(ConfigError, match="was not on IPUs"):
        calibrate([run])
    # The same run as if on IPUs, with the wall clock for the stand-in's cycles.
    environment = json.loads((run / "environment.json").read_text())
    environment["engine"]["hardware"] = True
    (run / "environment.json").write_text(json.dumps(environment))
    text = (run / "metrics.jsonl").read_text().replace("perf/ipu_cycles", "no_cycles")
    (run / "metrics.jsonl").write_text(text)
    content = json.loads((tmp_path / "first.json").read_text())
    files = {name: (run / name).read_text() for name in ipu_first_run.RUN_FILES}
    content["items"]["base"]["result"]["run"] = files
    (tmp_path / "sent.json").write_text(json.dumps(content))
    assert ipu_first_run.main(["--unpack", str(tmp_path / "sent.json")]) == 0
    copy = tmp_path / "sent_runs" / "base"
    assert f"plan --calibrate {copy.parent}/*" in capsys.readouterr().out
    assert calibrate([copy]).after == calibrate([run]).after


@pytest.mark.parametrize(
    "content", ["", "[]", '{"items": 1}', '{"items": {"../x": {"result": {"run": {}}}}}']
)
def test_files_of_others_are_not_unpacked(tmp_path, content):
    (tmp_path / "sent.json").write_text(content)
    with pytest.raises(ConfigError, match="--unpack"):
        ipu_first_run.main(["--unpack", str(tmp_path / "sent.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["sent.json"]


@pytest.mark.parametrize(
    ("code", "limit_s", "ending"),
    [
        ("pass", 60, None),
        ("import sys; print('the last words'); sys.exit(3)", 60, "exit status 3: the last words"),
        ("import os; os.abort()", 60, "ended with SIGABRT: no output"),
        ("import time; time.sleep(60)", 0.2, "not finished within"),
    ],
)
def test_end_of_a_process_is_told_in_a_line(tmp_path, code, limit_s, ending):
    told = ipu_first_run.run_limited([sys.executable, "-c", code], tmp_path / "log", limit_s)
    assert told is None if ending is None else ending in told


def test_memory_is_read_from_poplars_report(tmp_path, monkeypatch):
    """With the names of PopVision's library as Graphcore's own code uses them."""

    def tile(used, gaps):
        total = SimpleNamespace(includingGaps=used + gaps, excludingGaps=used)
        return SimpleNamespace(memory=SimpleNamespace(total=total))

    ipus = [
        SimpleNamespace(tiles=[tile(100, 5), tile(300, 0)]),
        SimpleNamespace(tiles=[tile(7, 1)]),
    ]
    target = SimpleNamespace(clockFrequency=1.85e9, bytesPerTile=638976)
    library = ModuleType("pva")
    library.openReport = lambda path: SimpleNamespace(
        compilation=SimpleNamespace(ipus=ipus, target=target),
        poplarVersion=SimpleNamespace(string="3.4.0"),
    )
    monkeypatch.setitem(sys.modules, "pva", library)
    path = tmp_path / "profile.pop"
    path.write_bytes(b"")
    found = ipu_first_run_worker.read_report(path)
    assert (found["clock_hz"], found["bytes_per_tile"]) == (1.85e9, 638976)
    assert [ipu["total_bytes"] for ipu in found["ipus"]] == [400, 7]
    assert [ipu["fullest_tile_bytes_with_gaps"] for ipu in found["ipus"]] == [300, 8]
    monkeypatch.setitem(sys.modules, "pva", None)
    assert "pva is missing" in ipu_first_run_worker.read_report(path)["not_measured"]


def test_hardware_is_a_compiled_core_with_ipus(ipu):
    assert not on_hardware()
    compiled = ModuleType("poptorch")
    compiled.poptorch_core = SimpleNamespace(__file__="/sdk/poptorch/poptorch_core.so")
    # Undone before `ipu` is, which keeps what it finds for the next test.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "poptorch", compiled)
        for has_ipus in (True, False):  # False: the IPU Model
            compiled.ipuHardwareIsAvailable = lambda size, answer=has_ipus: answer
            assert on_hardware() is has_ipus


def test_without_poptorch_it_says_what_to_do(tmp_path, first_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "poptorch", None)
    with pytest.raises(DeviceError, match=r"cannot be used: .*Enable the Poplar SDK"):
        first_run("base")
    assert "error" in json.loads((tmp_path / "first.json").read_text())["facts"]


@pytest.mark.exhaustive
def test_command_runs_on_the_stand_in(tmp_path):
    command = [sys.executable, "-m", "benchmarks.ipu_first_run", "--out", tmp_path / "first.json"]
    done = subprocess.run(
        [*map(str, command), "--only", "base,micro4", "--steps", "3", *TINY],
        cwd=str(ROOT),
        env={**os.environ, "PYTHONPATH": "tests/fakes"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "images/s" in done.stdout and "failed: batch.gradient_accumulation=4" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_the_worker(tmp_path, number):
    """It would keep the IPUs otherwise."""
    program = (
        "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    script = (
        "import sys; from pathlib import Path; from benchmarks.ipu_first_run import run_limited;"
        f"run_limited([sys.executable, '-c', {program!r}], Path('log'), 60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=str(tmp_path),
        env=environment,
        preexec_fn=reset_signals,
    )
    worker = int(wait_for(tmp_path / "pid"))
    process.send_signal(number)
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker goes on")


def reset_signals():
    """Undo what a shell does to background jobs, and nohup to its command."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(path):
    for _ in range(600):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.1)
    pytest.fail(f"{path} was not written")


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("name", ["results", "results.txt", ""])
def test_out_is_a_json_file(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ipu_first_run.main(["--out", str(tmp_path / name)])
    assert "name a file that ends in .json" in capsys.readouterr().err
