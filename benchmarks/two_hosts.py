"""Run over two network namespaces, kill a process, and compare with an uninterrupted run.

    python -m benchmarks.two_hosts [--data DIR] [--kill RANK ...] [--cut] [--out FILE]

A pair of virtual network cards joins the namespaces. Each runs two of four stages, started by its
own torchrun: once without interruption, once with SIGKILL for processes of one host. That run must
restart by itself, resume from the last checkpoint and end with the numbers of the uninterrupted
one. With --cut the wire is cut in a third run, whose processes must end by themselves and name what
is missing. Without root and iproute2 the exit status is 2; it is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

from safetensors.numpy import load_file

from benchmarks.machine import describe_machine
from cxr_vit.data.synthetic.dataset import write_sample

REPOSITORY = Path(__file__).resolve().parents[1]
CARD, PORT = "eth0", 29500
STEPS, CHECKPOINT_EVERY, FAIL_AT = 30, 5, 12
MICRO_BATCH, ACCUMULATION, TIMEOUT_S = 4, 8, 15
COMMAND = (
    *("train.py", "--config", "configs/vit_demo.yaml", "engine.name=pipeline"),
    *("model.pooling=class", "augment.horizontal_flip=0", "optim.lr=1e-3"),
    *(f"batch.micro_batch_size={MICRO_BATCH}", f"batch.gradient_accumulation={ACCUMULATION}"),
    *(f"train.steps={STEPS}", "train.log_every_steps=1", f"train.eval_every_steps={STEPS}"),
    *(f"train.checkpoint_every_steps={CHECKPOINT_EVERY}", f"engine.timeout_s={TIMEOUT_S}"),
)
#: Sent over the wire each way: hidden states or gradients of 64 patches and a class token.
PAYLOAD_MB = STEPS * ACCUMULATION * MICRO_BATCH * (64 + 1) * 96 * 4 / 1e6
TOLERANCE, LONGEST_RUN_S, LONGEST_END_S = 1e-5, 240.0, TIMEOUT_S + 30.0
#: torchrun's environment variable with the rank of a process.
RANK = re.compile(rb"(?:^|\0)RANK=(\d+)")
#: An error that train.py prints, and signs of an uncaught one.
REPORTED = re.compile(r"^(?:\w+Error|ProcessLost): .*", re.MULTILINE)
UNCAUGHT = re.compile(r"^(?:\[E\d|.*Traceback \(|.*exitcode: -(?!9\b)).*", re.MULTILINE)


class NoNamespaces(Exception):
    """Network namespaces are not available here."""


class Stuck(Exception):
    """A run does not reach the expected state in time."""


class Host(NamedTuple):
    """A network namespace and its address."""

    name: str
    namespace: str
    address: str

    def processes(self) -> List[int]:
        """Return the ids of all processes in the namespace."""
        return sorted(map(int, ip("netns", "pids", self.namespace).split()))

    def workers(self) -> Dict[int, int]:
        """Return rank -> id of the processes that torchrun has started here."""
        found: Dict[int, int] = {}
        for number in self.processes():
            with contextlib.suppress(OSError):  # it has ended
                rank = RANK.search(Path(f"/proc/{number}/environ").read_bytes())
                if rank:
                    found.setdefault(int(rank.group(1)), number)
        return found

    def traffic_mb(self) -> Dict[str, float]:
        """Return the MB that the network card has sent and received."""
        card = json.loads(ip("-n", self.namespace, "-s", "-j", "link", "show", CARD))[0]
        ways = {"sent": "tx", "received": "rx"}
        return {name: card["stats64"][way]["bytes"] / 1e6 for name, way in ways.items()}


def ip(*arguments: str) -> str:
    """Run iproute2's `ip`; return its output."""
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise NoNamespaces("the `ip` command is missing (package iproute2)") from error
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"`ip {' '.join(arguments)}`: {error.stderr.strip()}") from error
    return done.stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[List[Host]]:
    """Make two namespaces joined by a wire; at the end remove them and their processes."""
    prefix = f"cxr_vit-{os.getpid()}"
    hosts = [Host("A", f"{prefix}-A", "10.77.0.1"), Host("B", f"{prefix}-B", "10.77.0.2")]
    made: List[Host] = []
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
            made.append(host)
            ip("netns", "exec", host.namespace, "true")
        first, second = (host.namespace for host in hosts)
        ip(*f"link add {CARD} netns {first} type veth peer name {CARD} netns {second}".split())
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", host.namespace, "link", "set", card, "up")
        yield hosts
    finally:
        for host in made:
            for number in host.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            ip("netns", "delete", host.namespace)


class Job:
    """A run on both hosts, each with its own torchrun; `faults` lists what is wrong.

    Parameters
    ----------
    hosts
        The first one holds the rendezvous.
    run, data
        Folders of the run and of the data set, visible to both hosts.
    restarts
        torchrun's `--max-restarts`.
    """

    def __init__(self, hosts: Sequence[Host], run: Path, data: Path, *, restarts: int = 0) -> None:
        self.hosts, self.run = hosts, run
        self.faults: List[str] = []
        self._logs = {host: run.with_name(f"{run.name}-{host.name}.log") for host in hosts}
        self._before = {host: host.traffic_mb() for host in hosts}
        self._start = time.monotonic()
        self._torchruns = []
        for host in hosts:
            command = [
                *("ip", "netns", "exec", host.namespace, sys.executable),
                *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{PORT}"),
                # torchrun would decide by the machine's name, which is the same for both.
                *("--rdzv-conf", f"is_host={int(host is hosts[0])}", "--rdzv-id", run.name),
                *("--local-addr", host.address, "--max-restarts", str(restarts)),
                *(*COMMAND, f"data.root={data}", f"run.dir={run}"),
            ]
            with self._logs[host].open("w") as log:
                torchrun = subprocess.Popen(
                    command,
                    cwd=str(REPOSITORY),
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CARD},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C reaches only this process, which then removes the hosts.
                    start_new_session=True,
                )
            self._torchruns.append(torchrun)

    def wait(self, what: str, holds: Callable[[], bool], longest_s: float = LONGEST_RUN_S) -> float:
        """Wait until a condition holds; return the seconds that took."""
        start = time.monotonic()
        while not holds():
            if self.has_ended() or time.monotonic() - start > longest_s:
                raise Stuck(f"{self.run.name}: timed out waiting for {what}\n{self.text()}")
            time.sleep(0.02)
        return time.monotonic() - start

    def has_ended(self) -> bool:
        """Whether both torchruns have ended."""
        return None not in [torchrun.poll() for torchrun in self._torchruns]

    def wait_for_step(self) -> int:
        """Wait for the step of the failure; return the last step logged."""
        self.wait(f"step {FAIL_AT}", lambda: self.last_step() >= FAIL_AT)
        self.expect_one_writer()
        return self.last_step()

    def events(self, tag: str) -> List[Dict[str, Any]]:
        """Return the logged events that have a tag."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if tag in event]

    def starts(self) -> List[int]:
        """Return the step of each start of the processes."""
        return [event["step"] for event in self.events("perf/compile_s")]

    def last_step(self) -> int:
        """Return the last step logged."""
        return max((event["step"] for event in self.events("step")), default=-1)

    def text(self, *hosts: Host) -> str:
        """Return the output of the processes of these hosts, or of both."""
        return "".join(self._logs[host].read_text(errors="replace") for host in hosts or self.hosts)

    def expect(self, holds: bool, fault: str) -> None:
        """Record a fault unless a condition holds."""
        if not holds:
            self.faults.append(f"{self.run.name}: {fault}")

    def expect_one_writer(self) -> None:
        """Check that only rank 0 has files of the run open."""
        writers = set()
        for host in self.hosts:
            for rank, number in host.workers().items():
                files = [os.readlink(link) for link in Path(f"/proc/{number}/fd").iterdir()]
                writers |= {rank for file in files if file.startswith(f"{self.run}/")}
        self.expect(writers == {0}, f"files of the run are open in processes {writers or None}")

    def finish(self, *, starts: int) -> Dict[str, Any]:
        """Wait for a successful end after `starts` starts, check the traces, return figures."""
        self.wait("the end", self.has_ended)
        seconds = time.monotonic() - self._start
        statuses = [torchrun.returncode for torchrun in self._torchruns]
        self.expect(statuses == [0, 0], f"torchrun's exit statuses are {statuses}")
        time.sleep(2)  # by then every other process must have ended
        left = [number for host in self.hosts for number in host.processes()]
        self.expect(not left, f"still running: {left}")
        errors, uncaught = REPORTED.findall(self.text()), UNCAUGHT.findall(self.text())
        self.expect(len(errors) == starts - 1, f"{len(errors)} errors reported: {errors}")
        self.expect(not uncaught, f"uncaught: {uncaught}")
        self.expect(len(self.starts()) == starts, f"it started at the steps {self.starts()}")
        steps = [event["step"] for event in self.events("train/loss")]
        self.expect(steps == list(range(1, STEPS + 1)), f"the steps logged are {steps}")
        print(f"    {seconds:.1f} s", *(f"reported: {error}" for error in errors), sep="\n    ")
        traffic = {}
        for host in self.hosts:
            before, now = self._before[host], host.traffic_mb()
            traffic[host.name] = {way: now[way] - before[way] for way in now}
            sent = ", ".join(f"{mb:.1f} MB {way}" for way, mb in traffic[host.name].items())
            print(f"    host {host.name}, {host.address}, over the wire: {sent}")
            self.expect(min(traffic[host.name].values()) > PAYLOAD_MB, f"only {sent} by {host}")
        if self.faults:
            print(self.text())
        return {
            "seconds": seconds,
            "traffic_mb": traffic,
            "reported": errors,
            "starts": self.starts(),
        }


def run_killed(job: Job, ranks: Sequence[int]) -> Dict[str, Any]:
    """Kill processes of one host; the run must resume by itself."""
    killed_at = job.wait_for_step()
    workers = {rank: number for host in job.hosts for rank, number in host.workers().items()}
    for rank in ranks:
        os.kill(workers[rank], signal.SIGKILL)
    recovery_s = job.wait(
        "a step after the kill", lambda: len(job.starts()) > 1 and job.last_step() > job.starts()[1]
    )
    job.expect_one_writer()
    figures = job.finish(starts=2)
    resumed_from = figures["starts"][1]
    job.expect(0 < resumed_from <= killed_at, f"it resumed from step {resumed_from}")
    print(
        f"    SIGKILL for process {' and '.join(map(str, ranks))} at step {killed_at}; resumed"
        f" from step {resumed_from}, next step {recovery_s:.1f} s after the kill"
    )
    return {**figures, "ranks": ranks, "killed_at": killed_at, "recovery_s": recovery_s}


def run_cut(job: Job) -> Dict[str, Any]:
    """Cut the wire; the processes of both hosts must end by themselves and name what is missing."""
    cut_at = job.wait_for_step()
    ip("-n", job.hosts[0].namespace, "link", "set", CARD, "down")
    # Not torchrun: on the second host it polls until the system gives up the connection.
    seconds = job.wait("the end", lambda: not any(map(Host.workers, job.hosts)), LONGEST_END_S)
    print(f"    all processes of train.py ended {seconds:.1f} s after the cut at step {cut_at}")
    reported: Dict[str, List[str]] = {}
    for host, missing, most in zip(job.hosts, ("stage 2", "stage 1"), (1, 2)):
        reported[host.name] = errors = REPORTED.findall(job.text(host))
        job.expect(any(missing in error for error in errors), f"no {missing} in {errors}")
        # Without the first host, which holds the store, both processes may report.
        job.expect(len(errors) <= most, f"host {host.name} reported {errors}")
        print(*(f"    host {host.name} reported: {error}" for error in errors), sep="\n")
    return {"cut_at": cut_at, "seconds": seconds, "reported": reported}


def differences(job: Job, reference: Job) -> Dict[str, float]:
    """Return the largest differences of two runs."""
    found = {}
    for name, tag in (("loss", "train/loss"), ("gradient norm", "train/grad_norm")):
        pairs = zip(job.events(tag), reference.events(tag))
        found[name] = max(abs(here[tag] - there[tag]) for here, there in pairs)
    last = "checkpoints/last/model.safetensors"
    here, there = load_file(job.run / last), load_file(reference.run / last)
    found["final weight"] = max(float(abs(here[name] - there[name]).max()) for name in there)
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> Dict[str, Any]:
    """Make all runs and print their figures; return the content of the JSON file."""
    data = arguments.data or folder / "data"
    result = {**describe_machine("torch", "transformers"), "steps": STEPS, "payload_mb": PAYLOAD_MB}
    with two_hosts() as hosts:
        if arguments.data is None:
            write_sample(data, num_images=400, image_size=64, seed=0)
        print(f"uninterrupted; hidden states and gradients are {PAYLOAD_MB:.1f} MB each way")
        whole = Job(hosts, folder / "uninterrupted", data)
        whole.wait_for_step()
        result["uninterrupted"] = whole.finish(starts=1)
        print("killed")
        killed = Job(hosts, folder / "killed", data, restarts=3)
        result["killed"] = run_killed(killed, arguments.kill)
        result["differences"] = differences(killed, whole)
        for name, difference in result["differences"].items():
            print(f"    largest difference of a {name} from the uninterrupted run: {difference:g}")
            killed.expect(difference <= TOLERANCE, f"a {name} differs by {difference:g}")
        result["faults"] = [*whole.faults, *killed.faults]
        if arguments.cut:
            print("cut")
            cut = Job(hosts, folder / "cut", data)
            result.update(cut=run_cut(cut), faults=[*result["faults"], *cut.faults])
    return result


def main(argv: Sequence[str]) -> int:
    """Run, compare, write the JSON file; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: 400 synthetic images")
    parser.add_argument("--kill", type=int, nargs="+", default=[3], choices=range(4))
    parser.add_argument("--cut", action="store_true", help="cut the wire as well")
    parser.add_argument("--out", type=Path, default=Path("two_hosts.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the hosts are removed
    try:
        with tempfile.TemporaryDirectory(prefix="two_hosts-") as folder:
            result = measure(arguments, Path(folder))
    except NoNamespaces as error:
        print(f"network namespaces are not available: {error}. Run as root.", file=sys.stderr)
        return 2
    except Stuck as error:
        print(f"FAULT: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(["FAULTS:", *result["faults"]]) if result["faults"] else "no fault")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
