"""Words that the code and its documents do not use, and references that lead nowhere."""

import re
import subprocess
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Literary or private words; the plain ones are in CONTRIBUTING.md.
WORDS = re.compile(
    r"\b(anew|lest|mend|mends|mended|befell|aside|of no use|so many|told by|for ever|films?)\b",
    re.IGNORECASE,
)
#: Documents and issue numbers outside the repository.
OUTSIDE = re.compile(r"\b(design|poptorch|house|peers)\.md\b|\bissue \d+\b")
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".cff", ".sh", ""}
#: Holds the words themselves.
EXCEPT = {"tests/test_language.py", "LICENSE"}


def texts() -> Iterator[Tuple[str, int, str]]:
    """Yield path, line number and line of every text file that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=str(ROOT), encoding="utf-8").splitlines():
        path = ROOT / name
        if path.suffix in TEXT and name not in EXCEPT and path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                yield name, number, line


def forbidden(name: str, line: str) -> List[str]:
    """Return the forbidden words of a line.

    The changelog names what was renamed, in backquotes.
    """
    if name == "CHANGELOG.md":
        line = re.sub(r"`[^`]*`", "", line)
    # A test's name has underscores between its words.
    words = WORDS.findall(line) + WORDS.findall(
        " ".join(re.findall(r"test_\w+", line)).replace("_", " ")
    )
    return words + [match.group() for match in OUTSIDE.finditer(line)]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_uses_a_forbidden_word():
    found = [
        f"{name}:{number}: {', '.join(words)}: {line.strip()[:100]}"
        for name, number, line in texts()
        for words in [forbidden(name, line)]
        if words
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "# Begin anew.",
        "def test_a_film_is_read():",
        '"""How many FILMS there are."""',
        "see design.md, section 1",
        "as issue 12 says",
    ],
)
def test_forbidden_word_is_found(line):
    assert len(forbidden("cxr_vit/bad.py", line)) == 1


@pytest.mark.parametrize(
    "line", ["cxr_vit_cache/films_64.u8", "amend, renewed, filmstrip", "docs/planner.md"]
)
def test_other_word_is_allowed(line):
    assert forbidden("cxr_vit/good.py", line) == []
