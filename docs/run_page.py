"""Runs the code of a page: its `bash` and `python` blocks in their order, in an empty directory.

    python docs/run_page.py docs/guide/first-dump.md [--pictures docs/guide/pictures]

The Python blocks of a page are one program. Blocks in another language (`text`, `console`) are
only shown. What the code draws is copied to the directory of pictures, if one is given.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return a page's runnable blocks, (language, code) each."""
    return _BLOCK.findall(page.read_text())


def program(page: Path) -> str:
    """Put a page's blocks together to one Python program, bash blocks as calls of a shell."""
    parts = [
        f"subprocess.run(['bash', '-euc', {code!r}], check=True)" if language == "bash" else code
        for language, code in blocks(page)
    ]
    return "\n".join(["import subprocess", *parts])


def run(page: Path, directory: Path) -> None:
    """Run a page in a directory; CalledProcessError if any of it fails."""
    bin_directory = os.path.dirname(sys.executable)  # noqa: PTH120 -- links stay as they are
    environment = {
        **os.environ,
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "MPLBACKEND": "agg",
    }
    (directory / "page.py").write_text(program(page))
    subprocess.run([sys.executable, "page.py"], check=True, cwd=directory, env=environment)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    for page in arguments.pages:
        with tempfile.TemporaryDirectory() as directory:
            run(page, Path(directory))
            if arguments.pictures:
                for picture in [*Path(directory).glob("*.svg"), *Path(directory).glob("*.png")]:
                    shutil.copy(picture, arguments.pictures)


if __name__ == "__main__":
    _main()
