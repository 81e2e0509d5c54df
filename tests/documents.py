"""What is in a Markdown document: code blocks, command lines, links and anchors, as GitHub reads them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("experiments/*.md"),
    )
    if path.name != "LICENSE.md"
)
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
_FENCE = re.compile(r"^```(\w*)$")
_COMMAND = re.compile(r"^(?:.*\s-m |\S*/)?loract (?P<arguments>.+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line's number, and the line that stands before it."""

    language: str
    text: str
    line: int
    before: str

    @property
    def runs(self):
        return NOT_RUN.fullmatch(self.before) is None


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path, language=None):
    """Fenced blocks in order, of one language or all."""
    found, start, before = [], None, ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence and start is None:
            start, kind = number, fence[1]
            before = lines[number - 1].strip() if number else ""
        elif fence:
            found.append(Block(kind, "\n".join(lines[start + 1 : number]) + "\n", start + 2, before))
            start = None
    assert start is None, f"{name(path)}: the block of line {start} does not end"
    return [block for block in found if language in (None, block.language)]


def prose(path):
    """The document without fenced blocks, their lines left empty."""
    out, fenced = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = bool(_FENCE.match(line))
        out.append("" if fence or fenced else line)
        fenced ^= fence
    return "\n".join(out)


def commands(path):
    """Arguments of every `loract` command line of a block, as lists of words."""
    shell = [line for block in blocks(path) if block.language in ("sh", "bash") for line in block.text.splitlines()]
    indented = [line for line in prose(path).splitlines() if line.startswith("    ")]
    for line in (*shell, *indented):
        if found := _COMMAND.match(line.split(" #")[0].strip()):
            yield shlex.split(found["arguments"])


def mentions(path):
    """The same for commands in running text, which may be incomplete."""
    for code in re.findall(r"`([^`]+)`", "\n".join(line for line in prose(path).splitlines() if line[:4] != "    ")):
        if found := _COMMAND.match(" ".join(code.split())):
            yield shlex.split(found["arguments"])


def links(path):
    """Targets of links that lead to no other site."""
    return re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(path))


def anchors(path):
    """What GitHub lets one link to: headings in lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
