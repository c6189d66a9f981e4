"""The first inputs of the fuzz targets, and every input that ever broke one, break none."""

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz" / "python"
CORPUS = sorted((FUZZ / "corpus").iterdir())


@pytest.fixture(scope="module")
def targets():
    sys.path.append(str(FUZZ))
    import targets

    return targets


@pytest.mark.parametrize("inputs", CORPUS, ids=[inputs.name for inputs in CORPUS])
def test_corpus(targets, inputs):
    run = targets.TARGETS[inputs.name]
    for path in sorted(inputs.iterdir()):
        run(path.read_bytes())
