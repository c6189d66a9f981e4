"""The README is also the package's page on an index, where no file lies beside it."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
TARGET = re.compile(
    r"""
    \]\(\s*<?([^)\s>]*)                                    # [text](target), ![text](target)
    | ^\s*\[[^\]]+\]:\s*<?(\S+?)>?\s*$                     # [text]: target
    | \b(?:href|src|srcset)\s*=\s*["']?([^"'\s>]*)         # <a href="target">
    """,
    re.VERBOSE | re.MULTILINE,
)


def link_targets(markdown: str) -> list[str]:
    prose = CODE.sub("", markdown)
    return ["".join(match.groups(default="")) for match in TARGET.finditer(prose)]


def test_links_are_found():
    text = """[a](one), ![b](<two> "title"), <img alt="c" src="three">, `[d](code)`
[e]: four
```
[f](code)
```
"""
    assert link_targets(text) == ["one", "two", "three", "four"]


def test_links_and_pictures_are_absolute():
    assert [target for target in link_targets(README.read_text()) if "://" not in target] == []
