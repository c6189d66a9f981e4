"""Fixtures of several test modules."""

import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from dump_activations import progress as display

# The models here are tiny: threads cost them more than they give. Set before torch is
# imported, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch.compile would try out each of the CPU's instruction sets, which takes longer than the rest.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# A shell's background job, and all it starts, ignores Ctrl-C. Tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The time of an example means nothing on a machine that does other things too.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

pytest_plugins = ["faults.fixtures", "terminals"]
pytest.register_assert_rewrite("reference.model", "reference.dumps")

_PACKAGE = Path(__file__).parents[1] / "python" / "dump_activations"
DEMO_CHECKPOINT = _PACKAGE / "demo" / "checkpoint"
DEMO_DATASET = _PACKAGE / "demo" / "dataset"
LAYOUTS = Path(__file__).parent / "data" / "layouts"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        type=int,
        default=1,
        help="how many times to break a run of each kind at a random moment",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread the moments of faults evenly over a run, each sampled from its own range of it."""
    if "moment_of_run" in metafunc.fixturenames:
        count = metafunc.config.getoption("--faults")
        chance = random.Random(metafunc.function.__name__)
        moments = [(i + chance.random()) / count for i in range(count)]
        metafunc.parametrize("moment_of_run", moments, ids="{:.3f}".format)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("cuda") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return DEMO_CHECKPOINT


@pytest.fixture(scope="session")
def demo_dataset() -> Path:
    return DEMO_DATASET


@pytest.fixture(scope="session")
def layouts() -> Path:
    """Return the directory of the sample rows in every layout, with what they decode to."""
    return LAYOUTS


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a run on a machine that does other things too from saying how far it is."""
    monkeypatch.setattr(display, "_FIRST_LINE", 3600.0)


@pytest.fixture
def disk_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flushes return at once: a thousand small files would wait for the disk for minutes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
