"""Pages of real dumps, in a real browser."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser

from dump_activations import dump, write_report

# More boards than examples are shown, and fewer than a group of a chart needs to count in full.
N = 48


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Return a tab of a browser that all tests of a process share."""
    if CHROMIUM is None:
        pytest.skip("no chromium: the page cannot be opened")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="session")
def make_dump(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path, demo_dataset: Path):
    """Return what dumps boards of the demo's dataset; by default all keys of its model."""

    def make(name: str = "all.safetensors", *, init: Path = demo_checkpoint, **options) -> Path:
        path = tmp_path_factory.mktemp("dump") / name
        options = {"outputs": ["*"], "n_samples": N, **options}
        dump(init, demo_dataset, path, device="cpu", allow_cpu=True, **options)
        return path

    return make


@pytest.fixture(scope="session")
def demo_dump(make_dump: Callable[..., Path]) -> Path:
    return make_dump(labels=["move_dir", "step_index"])


@pytest.fixture(scope="session")
def demo_report(demo_dump: Path) -> Path:
    report = demo_dump.with_name("report.html")
    write_report(demo_dump, report)
    return report
