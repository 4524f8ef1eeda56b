"""Commands and Python examples of README and docs/ run as they are written, on small data.

They run in a folder whose configs/ holds small copies of those that use synthetic images.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Iterator, List

import pytest
import torch
import yaml

from cxr_vit import cli
from pages import DOCS, ROOT, Command, blocks, commands

#: Replaces values of the configurations on synthetic images, if they are there.
SMALL = {
    "data": {"sample_images": 80, "image_size": 32, "val_fraction": 0.2},
    "batch": {"micro_batch_size": 2},
    "train": {"epochs": 1, "log_every_steps": 1, "eval_every_epochs": 1},
}
HAS_PIPELINING = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def make_folder(folder: Path, sample_root: Path) -> Path:
    """Fill a folder as a checkout that has written its sample data, only smaller."""
    (folder / "configs").mkdir(parents=True)
    for path in (ROOT / "configs").rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        if "sample_images" in values.get("data", {}):
            for section, keys in SMALL.items():
                values[section].update(keys)
            copy.write_text(yaml.safe_dump(values), encoding="utf-8")
        else:
            shutil.copy(path, copy)
    (folder / "data").mkdir()
    shutil.copytree(sample_root, folder / "data" / "sample")
    for name in ("train.py", "evaluate.py", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sample_root):
    return make_folder(tmp_path_factory.mktemp("docs") / "checkout", sample_root)


def runs(folder: Path, *engines: str) -> List[Path]:
    """Return the run folders of some engines, or of all, the newest first."""
    found = [
        path
        for path in (folder / "runs").glob("*")
        if (path / "checkpoints" / "last").exists()
        and (not engines or engine_of_run(path) in engines)
    ]
    return sorted(found, key=lambda path: (path / "metrics.jsonl").stat().st_mtime, reverse=True)


def engine_of_run(path: Path) -> str:
    return str(yaml.safe_load((path / "config.yaml").read_text())["engine"]["name"])


def with_runs(command: Command, folder: Path) -> List[str]:
    """Return the words, with the newest run for `<name>` and the one before it for `<other>`.

    A command without a launcher gets a run that one process can continue.
    """
    one_process = not command.launcher and "--calibrate" not in command.text
    newest = [path.name for path in runs(folder, *(["torch"] if one_process else []))] + ["", ""]
    names = {"<name>": newest[0], "<other>": newest[1]}
    return [re.sub(r"<\w+>", lambda match: names[match.group()], word) for word in command.words]


def is_run(command: Command) -> bool:
    return bool(command.arguments) and not command.needs


#: Each command once, in the order of the pages.
RUN = list({command.text: command for command in commands() if is_run(command)}.values())
#: Starting processes takes ten seconds and more, so `make test` runs the first of these only.
IN_PROCESSES = [command for command in RUN if command.launcher]


def as_case(command: Command) -> Any:
    """Return the parameter of a test."""
    is_slow = command in IN_PROCESSES[1:] or "--calibrate" in command.text  # of such runs
    marks = [pytest.mark.exhaustive] if is_slow else []
    return pytest.param(command, marks=marks, id=command.text)


def needs_pipelining(command: Command) -> bool:
    # --calibrate reads the runs of the pipeline engine that the page has just trained.
    return "configs/vit_pod4_cpu.yaml" in command.text or "--calibrate" in command.text


def run_python(page: str) -> None:
    """Run the Python blocks of a page in order, as one program."""
    text = "\n".join(block for path, block in blocks("python") if path == ROOT / page)
    exec(compile(text, page, "exec"), {"__name__": "example"})


def write_hospital(folder: Path, sample_root: Path) -> None:
    """Make the table of docs/tutorials/own_data.md, in the current folder."""
    root = folder / "data" / "hospital"
    if not root.exists():
        shutil.copytree(sample_root, root)
    if not (root / "hospital.csv").exists():
        run_python("docs/tutorials/own_data.md")


@pytest.mark.parametrize("command", [as_case(command) for command in RUN])
def test_command_runs(command, folder, sample_root, monkeypatch, capsys):
    if needs_pipelining(command) and not HAS_PIPELINING:
        pytest.skip("the pipeline engine needs torch 2.10")
    monkeypatch.chdir(folder)
    if "hospital.yaml" in command.text:
        write_hospital(folder, sample_root)
    if any("runs/" in word for word in command.arguments) and not runs(folder, "torch"):
        assert cli.main(["train", "--config", "configs/vit_demo.yaml"]) == 0
    if "compare" in command.words or "--predictions" in command.words:
        score_newest_runs(folder)
        capsys.readouterr()
    if command.launcher or command.variables:
        run_in_processes(command, folder)
        return
    try:
        status = cli.main(command._replace(words=with_runs(command, folder)).arguments)
    except SystemExit as ended:  # --help
        status = ended.code
    assert status == 0
    assert capsys.readouterr().out


def score_newest_runs(folder: Path) -> None:
    """Give the runs of `with_runs` the reports that some commands read."""
    for path in runs(folder, "torch")[:2]:
        if not (path / "report" / "metrics.json").exists():
            assert cli.main(["evaluate", "--checkpoint", str(path)]) == 0


def run_in_processes(command: Command, folder: Path) -> None:
    """Run a command with its launcher and variables, as processes."""
    words = with_runs(command, folder)[1:]
    launcher = ["-m", "torch.distributed.run", *command.launcher[1:]] if command.launcher else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.update(word.partition("=")[::2] for word in command.variables)
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        cwd=str(folder),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_losses_do_not_depend_on_the_cut_of_the_global_batch(folder, monkeypatch, capsys):
    """As docs/tutorials/tune_pipeline.md says of two runs; here with one process."""
    monkeypatch.chdir(folder)
    losses = []
    for size in (4, 2):
        words = ["train", "--config", "configs/vit_pod4_cpu.yaml", "engine.name=torch"]
        words += ["train.steps=3", f"batch.micro_batch_size={size}", f"run.dir=cut-{size}"]
        assert cli.main([*words, f"batch.gradient_accumulation={32 // size}"]) == 0
        lines = (folder / f"cut-{size}" / "metrics.jsonl").read_text().splitlines()
        losses.append(
            [event["train/loss"] for event in map(json.loads, lines) if "train/loss" in event]
        )
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def python_pages() -> Iterator[str]:
    """Yield the pages that have Python examples, but those in CONTRIBUTING, which are parts."""
    for page, _ in blocks("python"):
        if page.name != "CONTRIBUTING.md":
            yield page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", sorted(set(python_pages())))
def test_python_examples_run(page, folder, tmp_path, monkeypatch, sample_root):
    here = make_folder(tmp_path / "checkout", sample_root)
    monkeypatch.chdir(here)
    text = "\n".join(block for path, block in blocks("python") if path == ROOT / page)
    if "runs" in text and "Trainer" not in text:  # reads a run
        assert cli.main(["train", "--config", "configs/vit_demo.yaml"]) == 0
    if "data/hospital" in text:
        write_hospital(here, sample_root)
        assert (here / "data" / "hospital" / "hospital.csv").exists()
    else:
        run_python(page)


# docs/slurm/train.sbatch, with stand-ins for Slurm and torchrun

STAND_INS = {
    "scontrol": """
        echo "scontrol $*" >> "$CALLS"
        [ "$1" = show ] && printf 'node1\\nnode2\\n' || true
        """,
    # Slurm's srun passes signals on to its tasks.
    "srun": """
        echo "srun $*" >> "$CALLS"
        shift
        exec "$@"
        """,
    # As torchrun, which reports any status but 0 as 1.
    "torchrun": """
        echo "torchrun $*" >> "$CALLS"
        trap 'mkdir -p "$RUN"; touch "$RUN/config.yaml"; exit 1' TERM
        for _ in $(seq 100); do [ -e "$RUN/config.yaml" ] && exit "$STATUS"; sleep 0.1; done
        """,
}


@pytest.fixture
def slurm(tmp_path):
    """Start the batch file as Slurm does, with stand-ins for its programs."""
    for name, text in STAND_INS.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text("#!/bin/bash\n" + textwrap.dedent(text))
        script.chmod(0o755)

    def start(*arguments: str, status: int = 0) -> "subprocess.Popen[bytes]":
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "RUN": "runs/cxr_vit-7",
            "STATUS": str(status),
            "SLURM_JOB_NAME": "cxr_vit",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        script = str(DOCS / "slurm" / "train.sbatch")
        return subprocess.Popen(["bash", script, *arguments], cwd=str(tmp_path), env=environment)

    start.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return start


def wait_for(condition, seconds=10.0):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_batch_file_is_queued_again_after_a_signal_and_resumes(slurm, tmp_path):
    job = slurm("configs/vit_gpu4.yaml", "optim.lr=1e-4")
    wait_for(lambda: (tmp_path / "calls").exists() and "torchrun" in slurm.calls()[-1])
    assert slurm.calls()[-1].endswith(
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint node1:29500"
        " train.py --config configs/vit_gpu4.yaml optim.lr=1e-4 run.dir=runs/cxr_vit-7"
    )
    job.terminate()
    assert job.wait(20) == 0
    assert slurm.calls()[-1] == "scontrol requeue 7"
    assert slurm("configs/vit_gpu4.yaml", "optim.lr=1e-4").wait(20) == 0
    assert slurm.calls()[-1].endswith(" train.py --resume runs/cxr_vit-7 optim.lr=1e-4")


@pytest.mark.parametrize(("status", "is_queued"), [(75, True), (2, False)])
def test_batch_file_passes_on_an_error_and_queues_a_saved_run(slurm, tmp_path, status, is_queued):
    (tmp_path / "runs/cxr_vit-7").mkdir(parents=True)
    (tmp_path / "runs/cxr_vit-7/config.yaml").touch()
    assert slurm("configs/vit_gpu4.yaml", status=status).wait(20) == (0 if is_queued else status)
    assert ("scontrol requeue 7" in slurm.calls()) == is_queued
