"""benchmarks/throughput.py: the protocol of the ways, their figures, and the operations counted."""

import json
import socket
import time

import numpy as np
import pytest
import torch

from benchmarks import throughput, throughput_worker
from benchmarks.throughput import MODELS, WAYS, Process, Round, Settings
from cxr_vit import ChestXrayDataModule, Trainer, ViTModule


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


def test_run_of_train_py_is_paced(benchmark, make_config, tmp_path):
    task, answers = benchmark
    (tmp_path / "task.json").write_text(json.dumps(task))
    never = ["train.steps=1000", "train.eval_every_steps=1000", "train.checkpoint_every_steps=1000"]
    config = make_config(f"run.dir={tmp_path / 'run'}", "loggers=[]", *never)
    data = ChestXrayDataModule(config)
    trainer = Trainer(config, callbacks=[throughput_worker.Paced(str(tmp_path / "task.json"))])
    found, steps = answers(
        lambda: trainer.fit(ViTModule(config, data), data), "go", "evaluate", "stop"
    )
    ready, trained, evaluated = found
    assert {"start_s", "compile_s"} <= set(ready)
    assert trained["steps"] == 2 and trained["seconds"] > 0
    assert evaluated["images"] == len(trainer.val_data)
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
