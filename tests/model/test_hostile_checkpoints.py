"""Damaged and malicious checkpoints load, or end in an error of the package.

This command runs ten thousand of them:

    uv run --locked pytest tests/model/test_hostile_checkpoints.py --faults 67
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from reference.checkpoints import BASE, bundle, config_json, random_state_dict, save_checkpoint

CASES = 150
"""Checkpoints for each `--faults`."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    state_dict = random_state_dict(BASE)
    save_checkpoint(root / "config", state_dict, config_json(BASE))
    torch.save(bundle(state_dict, config_json(BASE)), root / "bundle.pt")
    return root


def test_mutated_checkpoints(checkpoints, request):
    count = CASES * request.config.getoption("--faults")
    worker = Path(__file__).parents[1] / "faults" / "hostile.py"
    outcomes, failures, first = Counter(), [], 0
    while first < count:
        ended = subprocess.run(
            [sys.executable, worker, checkpoints, str(first), str(count)],
            capture_output=True,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"),
            check=False,
        )
        for line in ended.stdout.splitlines():
            case, end = json.JSONDecoder().raw_decode(line)
            outcome = json.loads(line[end:]) if line[end:].strip() else ended.stderr[-3000:]
            outcomes[outcome if outcome in {"loaded", "refused"} else "failed"] += 1
            if outcome not in {"loaded", "refused"}:
                failures.append(f"{case}: {outcome}")
            first = case["seed"] + 1
        if not ended.stdout:
            failures.append(ended.stderr)
        if not ended.stdout or len(failures) > 20:
            break
    print(dict(outcomes))
    assert not failures, "\n".join(failures)
    assert not (checkpoints / "canary").exists(), "code in a checkpoint was run"
    assert min(outcomes["loaded"], outcomes["refused"]) > count / 20
