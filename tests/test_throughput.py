"""benchmarks/throughput.py: the protocol of the ways, their figures, and the operations counted."""

import json
import os
import socket
import time
from typing import ClassVar

import numpy as np
import pytest
import torch

from benchmarks import compilation, throughput, throughput_scale, throughput_worker
from benchmarks.throughput import MODELS, WAYS, Failed, Process, Round, Settings
from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.engines.torch_engine import TorchEngine


@pytest.fixture
def benchmark(tmp_path):
    """The benchmark's side: returns a task, and what the way answers to the commands."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    listener.settimeout(10)
    task = {"socket": str(tmp_path / "s"), "began": time.time(), "warm": 2, "settle": 1, "steps": 2}

    def answers(work, *commands):
        """Run a way that finds all commands waiting."""

        class Waiting(throughput_worker.Pace):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                Waiting.other = listener.accept()[0]
                Waiting.other.sendall("".join(f"{command}\n" for command in commands).encode())

            def report(self, *arguments):
                is_over = super().report(*arguments)
                Waiting.steps = self._done
                return is_over

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(throughput_worker, "Pace", Waiting)
            work()
        with Waiting.other, Waiting.other.makefile("r") as stream:
            return [json.loads(stream.readline()) for _ in commands], Waiting.steps

    yield task, answers
    listener.close()


def test_run_of_train_py_is_paced(benchmark, make_config, tmp_path, monkeypatch):
    task, answers = benchmark
    (tmp_path / "task.json").write_text(json.dumps(task))
    never = ["train.steps=1000", "train.eval_every_steps=1000", "train.checkpoint_every_steps=1000"]
    config = make_config(f"run.dir={tmp_path / 'run'}", "loggers=[]", *never)
    data = ChestXrayDataModule(config)
    trainer = Trainer(config, callbacks=[throughput_worker.Paced(str(tmp_path / "task.json"))])
    # As slow as compiling is: not a part of the evaluation's seconds.
    prepared, now = [], time.perf_counter
    monkeypatch.setattr(TorchEngine, "prepare_scoring", lambda self, data: prepared.append(data))
    monkeypatch.setattr(time, "perf_counter", lambda: now() + 1000 * len(prepared))
    found, steps = answers(
        lambda: trainer.fit(ViTModule(config, data), data), "go", "evaluate", "stop"
    )
    ready, trained, evaluated = found
    assert {"start_s", "compile_s"} <= set(ready)
    assert trained["steps"] == 2 and trained["seconds"] > 0
    assert evaluated["images"] == len(trainer.val_data)
    assert 0 < evaluated["seconds"] < 1000 and prepared == [trainer.val_data]
    assert steps == trainer.global_step == 2 + 1 + 2


def test_plain_loop_is_paced(benchmark, tmp_path):
    task, answers = benchmark
    np.zeros((8, 16, 16), np.uint8).tofile(tmp_path / "pixels")
    task.update(way="limit", pixels=str(tmp_path / "pixels"), image_size=16, patch_size=8)
    task.update(hidden_size=8, num_layers=1, num_heads=1, mlp_size=8, threads=1)
    task.update(micro_batch=3, device="cpu", precision="fp32", compile=False)
    (ready, trained), steps = answers(lambda: throughput_worker.main(task), "go", "stop")
    assert ready["start_s"] > 0 and ready["first_step_s"] > 0
    assert (trained["steps"], steps) == (2, 5)
    image = throughput_worker.Images(task)[0]["pixel_values"]
    assert torch.equal(image, torch.full((3, 16, 16), -1.0))


def test_operations_are_those_that_torch_counts():
    counter = pytest.importorskip("torch.utils.flop_counter", reason="needs a newer torch")
    name, patch_size, image_size = MODELS["micro-32"]
    settings = Settings(
        *(name, patch_size, image_size, None, 2, "cpu", "fp32", 1, 0, 2, 1, 1),
    )
    model = throughput_worker.hugging_face_model(settings.shape._asdict())
    with counter.FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    ):
        model(torch.zeros(2, 3, image_size, image_size)).logits.sum().backward()
    assert 2 * throughput.training_flops(settings.shape) == counted.get_total_flops()


def test_figures_of_a_way_are_medians_and_ratios_of_the_same_round():
    rounds = {
        "ours": [Round(20, 60), Round(44, 88), Round(36, 144)],
        "trainer": [Round(10, None), Round(40, None), Round(30, None)],
    }
    ready = {"ours": {"peak_memory_mb": 1}, "trainer": {"peak_memory_mb": 2}}
    figures = throughput.summarise(ready, rounds, peaks=[100.0, 100.0, 100.0], flops=2)
    assert figures["ours"] == {
        "images_per_s": 36,
        "images_per_s_by_round": [20, 44, 36],
        "share_of_peak": 0.72,
        "ratio_to_trainer": {"median": 1.2, "lowest": 1.1, "highest": 2.0},
        "evaluated_images_per_s": 88,
        "evaluation_to_training": {"median": 3.0, "lowest": 2.0, "highest": 4.0},
        "peak_memory_mb": 1,
    }
    assert "ratio_to_trainer" not in figures["trainer"]


def test_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert throughput.unavailable(WAYS["lightning"]) == "lightning is not installed"
    assert throughput.unavailable(WAYS["limit"]) is None


def test_process_that_ends_says_why(tmp_path):
    process = Process("way", tmp_path, threads=1)
    with pytest.raises(throughput.Failed, match="no such peer"):
        process.start(["-c", "raise SystemExit('no such peer')"], {})
    process.stop()


def test_gpu_memory_is_free_while_a_way_waits(benchmark, monkeypatch):
    task, answers = benchmark
    freed = []
    for name, act in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "max_memory_allocated": lambda: 2e6,
        "empty_cache": lambda: freed.append(1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, act)

    def work():
        pace = throughput_worker.Pace(task)
        while not pace.step_done():
            pass

    found, _ = answers(work, "go", "stop")
    assert [answer["gpu_peak_mb"] for answer in found] == [2, 2]
    assert len(freed) == 2


class Fake:
    """A process that starts at once; `fails` is the number of its round, 0 its start."""

    fails: ClassVar = {}
    threads: ClassVar = {}

    def __init__(self, name, folder, threads):
        self.name, self.asked, self.ready, self.peak_mb = name, 0, {"start_s": 1.0}, 1.0
        Fake.threads[name] = threads

    def start(self, words, task):
        self._fail_when_due()

    def ask(self, command):
        self.asked += command == "go"
        self._fail_when_due()
        return {"steps": 4, "images": 4, "seconds": 2}

    def _fail_when_due(self):
        if Fake.fails.get(self.name) == self.asked:
            raise Failed("no memory")

    def stop(self):
        pass


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "Process", Fake)
    monkeypatch.setattr(throughput_scale, "Process", Fake)
    for module in (throughput, throughput_scale):
        monkeypatch.setattr(module, "write_images", lambda *arguments: tmp_path)
    monkeypatch.setattr(Settings, "start", lambda self, process, *rest: process.start([], {}))
    monkeypatch.setattr(Fake, "fails", {})
    monkeypatch.setattr(Fake, "threads", {})
    monkeypatch.chdir(tmp_path)
    return Fake


def test_way_that_fails_leaves_the_others_their_results(fakes, tmp_path, capsys):
    fakes.fails = {"limit": 0, "limit-compiled": 2, "peak": 1}
    words = [
        "--ways",
        "ours,limit,limit-compiled",
        "--rounds",
        "2",
        "--micro-batch",
        "8",
        "--threads",
        "3",
    ]
    assert throughput.main(words) == 1
    ways = json.loads((tmp_path / "throughput.json").read_text())["results"]["ways"]
    assert ways["ours"]["images_per_s_by_round"] == [16, 16]
    assert ways["limit"]["status"] == ways["limit-compiled"]["status"] == "failed: no memory"
    assert ways["limit-compiled"]["images_per_s_by_round"] == [16]
    assert "images_per_s" not in ways["limit"]
    assert "failed: no memory" in capsys.readouterr().out


def test_case_that_fails_leaves_the_others_their_results(fakes, tmp_path, monkeypatch, capsys):
    fakes.fails = {"1000": 1, "256": 0}
    monkeypatch.setattr(throughput_scale, "PROCESSES", (1, 2, 4))
    words = ["--scale", "--rounds", "2", "--micro-batch", "8", "--threads", "3"]
    assert throughput.main(words) == 1
    results = json.loads((tmp_path / "scale.json").read_text())["results"]
    assert results["images"]["1000"] == {"status": "failed: no memory"}
    assert results["images"]["10000"]["images_per_s"] == 16
    assert results["tokens"]["256"] == {"status": "failed: no memory"}
    assert results["tokens"]["1024"]["time_to_that_of_the_first"]["median"] == 1
    assert results["processes"]["4"]["images_per_s"] == 64
    assert [fakes.threads[name] for name in ("1", "2", "4")] == [3, 1, 1]  # cores are shared
    assert "failed: no memory" in capsys.readouterr().out
    settings = throughput_scale.settings_of(throughput.parse(["--scale"]), tmp_path, 9, 64)
    assert settings.steps == 25  # of 100: it has four times the tokens


def test_more_processes_than_gpus_are_left_out(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = throughput.Settings(
        *("vit-micro", 8, 32, tmp_path, 8, "cuda", "bf16", 4, 0, 2, 1, 1),
    )
    cases = {count: throughput_scale.Case(settings, count) for count in (1, 2)}
    found = throughput_scale.interleaved(cases, 1, tmp_path / "group")
    assert found["2"] == {"status": "needs 2 GPUs, and this machine has 1"}
    assert found["1"]["images_per_s"] == 16


def test_compilation_has_a_cache_for_each_value(monkeypatch, tmp_path, capsys):
    caches = []

    def first_pass(how, threads):
        caches.append((how, os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        return float(len(caches))

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(compilation, "compile_seconds", first_pass)
    monkeypatch.setattr(
        compilation, "step_seconds", lambda *rest: {"off": [4], "layers": [2], "whole": [1]}
    )
    out = tmp_path / "out.json"
    threads = str(torch.get_num_threads())
    assert compilation.main(["--threads", threads, "--rounds", "1", "--out", str(out)]) == 0
    assert len(set(caches)) == 3 and len(caches) == 6
    written = json.loads(out.read_text())
    assert written["command"] == f"python -m benchmarks.compilation --threads {threads} --rounds 1"
    assert written["results"]["layers"]["first_pass_again_s"] == 4
    assert written["results"]["whole"]["speed_to_that_of_off"]["median"] == 4
    assert "whole  first pass   5.0 s, again   6.0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ways", "ours,fast"], "no fast"),
        (["--scale", "--images", "9"], "leave out --images"),
        (["--warm", "1"], "two warm steps"),
    ],
)
def test_mistake_on_the_command_line_is_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        throughput.parse(words)
    assert message in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_whole_benchmark_compares_train_py_with_the_limit(tmp_path):
    words = ["--model", "micro-32", "--ways", "ours,limit,ours-layers", "--rounds", "1"]
    words += ["--steps", "2", "--warm", "2", "--images", "80", "--threads", "1"]
    words += ["--micro-batch", "8", "--out", str(tmp_path / "out.json")]
    assert throughput.main(words) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    results = written["results"]
    assert results["ways"]["ours"]["ratio_to_limit"]["median"] > 0
    assert results["ways"]["ours"]["evaluated_images_per_s"] > 0
    assert 0 < results["ways"]["limit"]["share_of_peak"] < 1


def test_command_in_the_result_is_without_its_file():
    found = throughput.command_of(["--scale", "--out", "scale.json", "--rounds", "2"])
    assert found == "python -m benchmarks.throughput --scale --rounds 2"
