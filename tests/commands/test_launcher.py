"""`--nproc-per-node`: processes share a dump, end together, and never outlive their launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dump_activations import Summary, demo, dump
from dump_activations.commands.dump import main
from dump_activations.storage.writing.shards import Place
from faults.commands import HANG
from reference.dumps import read_dump

TWO = [sys.executable, "-m", "dump_activations", "--demo", "--nproc-per-node=2"]


@pytest.fixture
def endless(tmp_path):
    """Start two processes with hours of work; return the launcher and their process ids.

    Both are loading torch: Python itself ends in other ways where a signal meets its own start.
    """
    call = [*TWO, "--n-samples=100000000", "--batch-size=64", "--no-write"]
    launcher = subprocess.Popen(call, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    listing = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(children := listing.read_text().split()) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    while any("libtorch_cpu" not in Path(f"/proc/{child}/maps").read_text() for child in children):
        time.sleep(0.01)
    return launcher, [*map(int, children)]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name
)
def test_processes_end_with_their_launcher(number, endless):
    launcher, _ = endless
    launcher.send_signal(number)
    _, shown = launcher.communicate(timeout=HANG)  # Both streams end with the last process.
    assert launcher.returncode == -number
    assert "was ended by signal" not in shown


def test_the_first_error_ends_the_other_process_and_is_the_launchers(endless):
    launcher, children = endless
    os.kill(children[1], signal.SIGKILL)
    _, shown = launcher.communicate(timeout=HANG)
    assert launcher.returncode == -signal.SIGKILL
    assert "error: process 1 was ended by signal 9\n" in shown
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_two_processes_write_the_shards_of_one_dump(tmp_path):
    call = [*TWO, "--n-samples=60", "--batch-size=8", "--outputs=pooled", "--json", "-oa.npz"]
    done = subprocess.run(call, cwd=tmp_path, check=True, stdout=-1, stderr=-1, text=True)
    summary = json.loads(done.stdout)  # The second process prints none.
    assert summary["output"] == str(tmp_path / "a.npz")
    options = {"outputs": "pooled", "n_samples": 60, "device": "cpu", "allow_cpu": True}
    dump(demo.CHECKPOINT, demo.DATASET, tmp_path / "b.npz", **options)
    shards = [read_dump(path) for path in sorted(tmp_path.glob("a-*.npz"))]
    assert len(shards) == 8  # One per batch.
    for name, expected in read_dump(tmp_path / "b.npz").tensors.items():
        found = np.concatenate([shard.numpy(name) for shard in shards])
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("asked", "device"), [([], "cuda:1"), (["--device", "cuda:0"], "cuda:0")])
def test_a_process_takes_the_device_and_the_cores_of_its_place(
    monkeypatch, tmp_path, asked, device
):
    """Ranks count through all machines, and devices through one."""
    taken = {}

    def dumped(*arguments, place, local_processes):
        taken["device"], taken["place"] = arguments[3].device, place
        return Summary()

    monkeypatch.setattr("dump_activations.api.dump.dump_to_file", dumped)
    monkeypatch.setattr(
        "dump_activations.pipeline.device.share_cores", partial(taken.__setitem__, "cores of")
    )
    monkeypatch.chdir(tmp_path)
    places = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, number in places.items():
        monkeypatch.setenv(name, number)
    assert main(["--init", str(demo.CHECKPOINT), "--dataset", str(demo.DATASET), *asked]) == 0
    assert taken == {"device": device, "place": Place(3, 4), "cores of": 2}
