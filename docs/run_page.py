"""Runs the code of a page: its `bash` and `python` blocks in their order, in an empty directory.

    python docs/run_page.py README.md docs/guide/*.md [--update] [--pictures docs/guide/pictures]

A `text` block behind a block is its output: the page fails if the words or whole numbers differ, or
decimals by more than rounding does. `...` stands for anything. `--update` rewrites the blocks that
differ. Blocks in other languages (`sh`, `console`) and blocks behind `<!-- not run -->` are only
shown.

The Python blocks of a page are one program, and each block of the README is one. Pictures of the
code are copied to the directory of pictures, if one is given.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"^(?P<skip><!-- not run -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"(-?\d+\.\d+(?:e[-+]\d+)?)")
_END_OF_OUTPUT = "\x1e"


@dataclass
class Block:
    """A runnable block of a page.

    Attributes:
        language: bash or python.
        code: its code.
        output: the output that the page shows; None if it shows none.
        span: where the output is in the page.
    """

    language: str
    code: str
    output: str | None
    span: tuple[int, int]


def blocks(page: Path) -> list[Block]:
    """Return a page's runnable blocks."""
    return [
        Block(match["language"], match["code"], match["output"], match.span("output"))
        for match in _BLOCK.finditer(page.read_text())
        if not match["skip"]
    ]


def program(page: Path) -> str:
    """Join a page's blocks to one Python program, which marks the end of each block's output."""
    lines = ["import subprocess, sys"]
    for block in blocks(page):
        if block.language == "bash":
            lines.append(f"subprocess.run(['bash', '-euc', {block.code!r}], check=True)")
        elif page.name == "README.md":
            lines.append(f"subprocess.run([sys.executable, '-c', {block.code!r}], check=True)")
        else:
            lines.append(block.code)
        lines.append(f"print({_END_OF_OUTPUT!r}, flush=True)")
    return "\n".join(lines)


def run(page: Path, directory: Path) -> list[str]:
    """Run a page in a directory and return each block's output; CalledProcessError if it fails."""
    bin_directory = os.path.dirname(sys.executable)  # noqa: PTH120 -- links stay as they are
    environment = {
        **os.environ,
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "MPLBACKEND": "agg",
        "UV_PROJECT": str(_ROOT),
    }
    (directory / "page.py").write_text(program(page))
    result = subprocess.run(
        [sys.executable, "page.py"],
        check=True,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    return [_trimmed(output) for output in result.stdout.split(f"{_END_OF_OUTPUT}\n")[:-1]]


def _trimmed(output: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in output.strip("\n").splitlines())


def same(shown: str, printed: str) -> bool:
    """Compare outputs: words and whole numbers exactly, decimals to 10 %, or to 0.05."""
    words = _NUMBER.split(" ".join(shown.split()))
    words[::2] = [re.escape(text).replace(r"\.\.\.", ".*?") for text in words[::2]]
    numbers, words[1::2] = words[1::2], [_NUMBER.pattern] * (len(words) // 2)
    found = re.fullmatch("".join(words), " ".join(printed.split()))
    return found is not None and all(
        math.isclose(float(a), float(b), rel_tol=0.1, abs_tol=0.05)
        for a, b in zip(numbers, found.groups(), strict=True)
    )


def check(page: Path, printed: list[str]) -> list[str]:
    """Describe each block of a page whose output differs from what the page shows."""
    return [
        f"{page}: this block\n{block.code}printed\n{output}the page shows\n{block.output}"
        for block, output in zip(blocks(page), printed, strict=True)
        if block.output is not None and not same(block.output, output)
    ]


def update(page: Path, printed: list[str]) -> None:
    """Write into the page what its blocks printed."""
    text = page.read_text()
    for block, output in reversed(list(zip(blocks(page), printed, strict=True))):
        if block.output is not None and not same(block.output, output):
            start, stop = block.span
            text = text[:start] + output + text[stop:]
    page.write_text(text)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    differing = []
    for page in arguments.pages:
        with tempfile.TemporaryDirectory() as directory:
            printed = run(page, Path(directory))
            if arguments.update:
                update(page, printed)
            differing += check(page, printed)
            if arguments.pictures:
                for picture in [*Path(directory).glob("*.svg"), *Path(directory).glob("*.png")]:
                    shutil.copy(picture, arguments.pictures)
    sys.exit("\n".join(differing) or None)


if __name__ == "__main__":
    _main()
