"""Nothing but the download of a hub name uses the network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, SMALL

#: Runs each command line in the same process, which may not open a connection.
PROGRAM = """
import json, sys
sys.path.insert(0, ".")

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("uses the network:", event, arguments)
        raise RuntimeError(f"uses the network: {event} {arguments}")

sys.addaudithook(refuse)
import evaluate, train
from cxr_vit import cli

for line in json.loads(sys.stdin.read()):
    sys.argv = line
    try:
        cli.run({"train": train, "evaluate": evaluate}[line[0]].main)
    except SystemExit as end:
        print("status", end.code)
"""


def run(*lines: list) -> str:
    variables = {name: os.environ[name] for name in os.environ if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=str(ROOT),
        env=variables,
        input=json.dumps([[str(word) for word in line] for line in lines]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_only_the_download_of_a_hub_name_uses_the_network(
    sample_root: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train = ["train", "--config", "configs/vit_demo.yaml", *SMALL, f"data.root={sample_root}"]
    output = run(
        [*train, f"run.dir={first}"],
        ["evaluate", "--checkpoint", first],
        [*train, f"run.dir={second}", f"model.name={first / 'checkpoints' / 'best'}"],
        ["evaluate", "--checkpoint", second],
        [*train, f"run.dir={third}", "model.name=nobody/vit"],
    )
    *local, (of_hub, last) = re.findall(r"(?s)(.*?)status (\d+)\n", output)
    assert [status for _, status in local] == ["0"] * 4, output
    assert not any("uses the network" in text for text, _ in local), output
    assert "uses the network" in of_hub
    assert last == "2"
