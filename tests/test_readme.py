"""The README is also the package's page on an index, which has no file of the repository."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
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
    assert [target for target in link_targets(README) if "://" not in target] == []


def test_the_test_command_is_the_one_that_ci_runs():
    (command,) = [
        block
        for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if "pytest" in block
    ]
    assert f"\n{command.strip()} || exit 1\n" in (ROOT / ".ci" / "run").read_text()


def test_the_listed_pages_exist():
    pages = set(re.findall(r"`docs/((?:guide/)?[a-z-]+\.md)`", README))
    assert len(pages) > 10
    assert [page for page in pages if not (ROOT / "docs" / page).exists()] == []
    assert {f"guide/{path.name}" for path in (ROOT / "docs" / "guide").glob("*.md")} <= pages


def test_the_table_of_speeds_shows_the_results():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results" / "cpu.json").read_text())
    columns = ["boards alone", "plain forward loop", "--no-write", "write alone", "dump"]
    columns += ["baseline"]
    for section, model in (("stages_demo", "demo"), ("stages_50m", "50M")):
        speeds = {each["name"]: each["median"] for each in results[section]["figures"]}
        (shown,) = re.findall(rf"^\| {model}.*?\| (.*) \|$", README, re.MULTILINE)
        assert shown.split(" | ") == [three_digits(speeds[name]) for name in columns]
        assert results[section]["machine"]["date"] in README


def three_digits(speed: float) -> str:
    rounded = float(f"{speed:.3g}")
    return f"{rounded / 1e6:g} million" if rounded >= 1e6 else f"{rounded:,.0f}"
