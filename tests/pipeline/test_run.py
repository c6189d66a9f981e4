"""Runs of a plan: chunks on several cores of the CPU, and the first batch on a device."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from simulated.policies import greedy
from simulated_device import simulated

from dump_activations import dump, load_encoder, stream
from dump_activations.errors import DeviceError
from reference.dumps import read_dump

KEYS = "final_hidden,pooled,head_probs,layer_outputs,attn_norm,mlp_input"
N, BATCH = 700, 300
CPU = {"device": "cpu", "allow_cpu": True}
RUN = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH} | CPU


@pytest.fixture(params=[2, 3, 5])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_chunks_land_in_their_places(cores, demo_checkpoint, demo_dataset, tmp_path):
    in_chunks, whole = tmp_path / "chunks.npz", tmp_path / "whole.npz"
    dump(demo_checkpoint, demo_dataset, in_chunks, **RUN)
    assert torch.get_num_threads() == cores
    torch.set_num_threads(1)
    dump(demo_checkpoint, demo_dataset, whole, **RUN)
    found, expected = read_dump(in_chunks), read_dump(whole)
    for key in KEYS.split(","):
        scale = np.abs(expected.numpy(key)).max()
        np.testing.assert_allclose(
            found.numpy(key), expected.numpy(key), rtol=0, atol=1e-5 * scale, err_msg=key
        )
    assert np.array_equal(found.numpy("boards"), expected.numpy("boards"))


def test_chunks_use_the_memory_of_the_chunks_before(demo_checkpoint, demo_dataset):
    program = f"""
import resource
from dump_activations import stream
run = dict(n_samples=4000, tensors="device", **{CPU!r})
faults = []
for _ in range(3):
    for _ in stream({str(demo_checkpoint)!r}, {str(demo_dataset)!r}, **run):
        pass
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert int(ran.stdout) < 10_000  # Without it 95,000.


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_smaller_than_the_cores(batch, cores, demo_checkpoint, demo_dataset):
    options = {"outputs": ["pooled"], "n_samples": 9} | CPU
    batches = [*stream(demo_checkpoint, demo_dataset, batch_size=batch, **options)]
    (whole,) = stream(demo_checkpoint, demo_dataset, batch_size=9, **options)
    assert [len(each.indices) for each in batches][:-1] == [batch] * (-(-9 // batch) - 1)
    found = torch.cat([each["pooled"] for each in batches])
    torch.testing.assert_close(found, whole["pooled"], rtol=1e-5, atol=1e-5)


def threads_of_a_fresh_thread():
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(torch.get_num_threads).result()


def test_the_callers_thread_count_is_as_before(cores, demo_checkpoint, demo_dataset, tmp_path):
    dump(demo_checkpoint, demo_dataset, tmp_path / "a.pt", **RUN)
    assert threads_of_a_fresh_thread() == torch.get_num_threads() == cores
    batches = stream(demo_checkpoint, demo_dataset, **RUN)
    next(batches)
    batches.close()
    assert threads_of_a_fresh_thread() == torch.get_num_threads() == cores
    with pytest.raises(ZeroDivisionError):
        dump(demo_checkpoint, demo_dataset, write=False, progress=lambda *_: 1 / 0, **RUN)
    assert threads_of_a_fresh_thread() == torch.get_num_threads() == cores


def test_several_threads_run_the_model(cores, demo_checkpoint, demo_dataset):
    model = load_encoder(demo_checkpoint)
    threads = set()
    model.final_ln.register_forward_hook(lambda *_: threads.add(threading.current_thread()))
    assert [*stream(model, demo_dataset, n_samples=2000, **CPU)]
    assert threading.main_thread() not in threads
    assert 1 < len(threads) <= cores
    assert not any(thread.is_alive() for thread in threads)


def test_an_error_in_one_chunk_ends_the_run(cores, demo_checkpoint, demo_dataset, tmp_path):
    model = load_encoder(demo_checkpoint)
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("in a hook")

    model.blocks[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in a hook"):
        dump(model, demo_dataset, tmp_path / "a.pt", **RUN)
    assert not (tmp_path / "a.pt").exists()
    assert torch.get_num_threads() == cores


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "reason",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph",
    ],
)
def test_an_error_of_the_device_is_one_sentence_and_the_first_batchs_is_before_any_file(
    reason, after, demo_checkpoint, demo_dataset, tmp_path
):
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError(f"{reason}. And more.\nAnd more lines.")

    model = load_encoder(demo_checkpoint)
    model.blocks[0].register_forward_hook(fail)
    expected = rf"^cuda:0 cannot run the model \({re.escape(reason)}\); install a torch that"
    if after:
        expected = rf"^the device failed: {re.escape(reason)}$"
    with simulated(greedy):
        with pytest.raises(DeviceError, match=expected):
            dump(model, demo_dataset, tmp_path / "a.pt", n_samples=N)
        calls.clear()
        with pytest.raises(DeviceError, match=expected):
            [*stream(model, demo_dataset, n_samples=N)]
    if not after:
        assert list(tmp_path.iterdir()) == []


def test_the_first_batch_on_a_device_is_a_full_one(demo_checkpoint, demo_dataset):
    model = load_encoder(demo_checkpoint)
    shapes = []
    model.final_ln.register_forward_hook(lambda _module, _inputs, out: shapes.append(out.shape[0]))
    with simulated(greedy):
        batches = stream(model, demo_dataset, n_samples=N, batch_size=BATCH)
        assert shapes == [BATCH]
        assert len([*batches]) == 3
    assert shapes == [BATCH, BATCH, BATCH, N - 2 * BATCH]


def test_the_first_error_of_a_device_is_raised(demo_checkpoint, demo_dataset, monkeypatch):
    module = sys.modules["dump_activations.api.stream"]

    def fail(text):
        def failing(*_):
            raise RuntimeError(f"CUDA error: {text}")

        return failing

    monkeypatch.setattr(module._Caller, "take", fail("the first"))
    monkeypatch.setattr(module.Run, "__exit__", fail("another"))
    batches = stream(demo_checkpoint, demo_dataset, **RUN)
    with pytest.raises(DeviceError, match="the first"):
        next(batches)
