"""README, CONTRIBUTING and docs/ as the tests see them: pages, code blocks, commands."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

#: The words after `needs` in a comment, with what they mean in docs/index.md. A command with such a
#: comment is not run by the tests.
NEEDS = (
    "IPUs",
    "the Poplar SDK",
    "PopTorch's sources",
    "GPUs",
    "two hosts",
    "Slurm",
    "the weights",
    "root",
    "the real images",
    "the network",
    "a browser",
    "minutes",
)
#: What may precede `python`: variables, a launcher.
_PREFIX = re.compile(
    r"^((?:[A-Z_]+=\S+ )*)((?:poprun|torchrun) .*?(?=python |train\.py|evaluate\.py))?"
)


class Command(NamedTuple):
    """A line of a shell block."""

    page: str
    #: As it is written, without its comment.
    text: str
    comment: str
    #: `A=B` words before it.
    variables: List[str]
    #: `torchrun --nproc-per-node 4`, or nothing.
    launcher: List[str]
    #: `python train.py ...`, or another program.
    words: List[str]

    @property
    def needs(self) -> Optional[str]:
        """What it needs that is not there where the tests run; None: the tests run it."""
        match = re.search(r"\bneeds (.+)", self.comment)
        return match.group(1) if match else None

    @property
    def arguments(self) -> Optional[List[str]]:
        """The words of `python -m cxr_vit`, also of train.py and evaluate.py; None for others."""
        if self.words[:3] == ["python", "-m", "cxr_vit"]:
            return self.words[3:]
        if self.words[:1] == ["python"] and self.words[1] in ("train.py", "evaluate.py"):
            return [self.words[1][: -len(".py")], *self.words[2:]]
        return None


def blocks(language: str) -> Iterator[Tuple[Path, str]]:
    """Yield page and text of every code block of a language."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
            yield page, textwrap.dedent(block)


def commands() -> List[Command]:
    """Return the commands of all shell blocks, in the order of the pages."""
    return [
        command_of(page.relative_to(ROOT).as_posix(), line)
        for page, block in blocks("bash")
        for line in re.sub(r" *\\\n *", " ", block).splitlines()
        if line.strip() and not line.startswith("#")
    ]


def command_of(page: str, line: str) -> Command:
    """Parse a line of a shell block."""
    text, _, comment = line.partition(" #")
    variables, launcher = (part or "" for part in _PREFIX.match(text).groups())
    rest = text[len(variables) + len(launcher) :]
    words = shlex.split(rest)
    if words[0] in ("train.py", "evaluate.py"):  # after torchrun
        words = ["python", *words]
    elif words[0].endswith("/bin/python"):
        words[0] = "python"
    return Command(page, text.strip(), comment.strip(), variables.split(), launcher.split(), words)
