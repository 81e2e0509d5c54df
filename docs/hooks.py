"""What MkDocs does not do by itself for pages that are read on GitHub too.

Pages from outside `docs/`, a place in the navigation for pages that nobody listed, formulas that need no script, and
lists and tables that follow a paragraph without an empty line, which Python-Markdown takes for more of the paragraph.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

from mathml import mathml
from mkdocs.structure.files import File

OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "studies.md",
    "experiments/README.md": "experiments.md",
}
"""Pages from outside `docs/`, and what they are called in the site."""
REST = "In depth"
"""The section of pages that nobody listed and that are in no folder."""
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
_FENCE = re.compile(r"^ *(```|~~~)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_INLINE = re.compile(r"\\\((.*?)\\\)")
_BLOCK = re.compile(r"^(?:(?P<list>[-*] |\d+\. )|(?P<table>\|))")


def on_config(config: Any) -> Any:
    """Give every page a place in the navigation."""
    listed = {*_pages(config.nav), *OUTSIDE.values()}
    docs = Path(config.docs_dir)
    for path in sorted(docs.rglob("*.md")):
        page = path.relative_to(docs)
        if page.as_posix() not in listed:
            name = page.parts[0].capitalize() if len(page.parts) > 1 else REST
            section = next((item[name] for item in config.nav if isinstance(item, dict) and name in item), None)
            if section is None:
                section = []
                config.nav.insert(-1, {name: section})  # the last one is about the project
            section.append(page.as_posix())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside, and the examples as they are."""
    root = Path(config.config_file_path).parent
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(root / name).read_text(encoding="utf-8")))
    for path in sorted((root / "examples").glob("*.*")):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to where the pages are in the site, and set blocks apart."""
    uri = page.file.src_uri
    source = next((name for name, inside in OUTSIDE.items() if inside == uri), f"docs/{uri}")
    here = posixpath.dirname(source)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[1]))
        inside = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(inside, posixpath.dirname(uri) or '.')}"

    return "\n".join(_lines(markdown, moved)) + "\n"


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Draw formulas, those of headings in the table of contents too."""
    headings = list(page.toc)
    while headings:
        heading = headings.pop()
        heading.title = _INLINE.sub(lambda found: mathml(unescape(found[1])), heading.title)
        headings += heading.children
    return _FORMULA.sub(lambda found: mathml(unescape(found[3]), display=found[2] == "["), html)


def _lines(markdown: str, moved: Callable[[re.Match[str]], str]) -> Iterator[str]:
    """The document's lines; outside fenced blocks with links moved, and empty lines before lists and tables."""
    fenced, before = False, ""
    for line in markdown.splitlines():
        fenced ^= bool(_FENCE.match(line))
        found, earlier = _BLOCK.match(line), _BLOCK.match(before)
        same = found and earlier and found.lastgroup == earlier.lastgroup
        if not fenced and found and before and not same and not (found["list"] and before.startswith(" ")):
            yield ""
        yield line if fenced else _LINK.sub(moved, line)
        before = line


def _pages(nav: Any) -> Iterator[str]:
    """Every page named in a navigation."""
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages(item)
