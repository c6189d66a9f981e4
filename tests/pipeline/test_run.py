"""Batches that several cores of the CPU take in pieces."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dump_activations import dump, load_encoder, stream
from reference.dumps import read_dump

KEYS = "final_hidden,pooled,head_probs,layer_outputs,attn_norm,mlp_input"
N, BATCH = 700, 300
CPU = {"device": "cpu", "allow_cpu": True}


@pytest.fixture(params=[2, 3, 5])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pieces_land_in_their_places(cores, demo_checkpoint, demo_dataset, tmp_path):
    in_pieces, whole = tmp_path / "pieces.npz", tmp_path / "whole.npz"
    dump(
        demo_checkpoint, demo_dataset, in_pieces, outputs=KEYS, n_samples=N, batch_size=BATCH, **CPU
    )
    assert torch.get_num_threads() == cores
    torch.set_num_threads(1)
    dump(demo_checkpoint, demo_dataset, whole, outputs=KEYS, n_samples=N, batch_size=BATCH, **CPU)
    found, expected = read_dump(in_pieces), read_dump(whole)
    for key in KEYS.split(","):
        scale = np.abs(expected.numpy(key)).max()
        np.testing.assert_allclose(
            found.numpy(key), expected.numpy(key), rtol=0, atol=1e-5 * scale, err_msg=key
        )
    assert np.array_equal(found.numpy("boards"), expected.numpy("boards"))


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
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    dump(demo_checkpoint, demo_dataset, tmp_path / "a.pt", n_samples=N, **CPU)
    assert threads_of_a_fresh_thread() == torch.get_num_threads() == cores
    batches = stream(demo_checkpoint, demo_dataset, n_samples=N, batch_size=BATCH, **CPU)
    next(batches)
    batches.close()
    assert threads_of_a_fresh_thread() == torch.get_num_threads() == cores
    with pytest.raises(KeyboardInterrupt):
        dump(demo_checkpoint, demo_dataset, write=False, n_samples=N, progress=fail, **CPU)
    assert threads_of_a_fresh_thread() == torch.get_num_threads() == cores


def test_several_threads_run_the_model(cores, demo_checkpoint, demo_dataset):
    model = load_encoder(demo_checkpoint)
    threads = set()
    model.final_ln.register_forward_hook(lambda *_: threads.add(threading.current_thread()))
    for _ in stream(model, demo_dataset, n_samples=2000, **CPU):
        pass
    assert threading.main_thread() not in threads
    assert 1 < len(threads) <= cores
    assert not any(thread.is_alive() for thread in threads)


def test_an_error_in_one_piece_ends_the_run(cores, demo_checkpoint, demo_dataset, tmp_path):
    model = load_encoder(demo_checkpoint)
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("in a hook")

    model.blocks[1].register_forward_hook(fail)
    target = tmp_path / "a.pt"
    with pytest.raises(ZeroDivisionError, match="in a hook"):
        dump(model, demo_dataset, target, outputs=KEYS, n_samples=N, batch_size=BATCH, **CPU)
    assert not target.exists()
    assert torch.get_num_threads() == cores


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_pieces_compute_in_fp32_and_the_setting_is_as_before(
    setting, cores, demo_checkpoint, demo_dataset, tmp_path
):
    model = load_encoder(demo_checkpoint)
    found = set()
    model.final_ln.register_forward_hook(lambda *_: found.add(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        dump(model, demo_dataset, tmp_path / "a.pt", n_samples=N, batch_size=BATCH, **CPU)
        assert torch.get_float32_matmul_precision() == setting
        for _ in stream(model, demo_dataset, n_samples=N, batch_size=BATCH, **CPU):
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == {"highest"}


def test_a_setting_of_one_backend_is_as_before(cores, demo_checkpoint, demo_dataset):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one setting for all backends")
    matmul.fp32_precision = "tf32"
    try:
        for _ in stream(demo_checkpoint, demo_dataset, n_samples=N, **CPU):
            assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_interruption_leaves_out_the_pieces_that_have_not_begun(
    cores, demo_checkpoint, demo_dataset, tmp_path
):
    model = load_encoder(demo_checkpoint)
    begun = []

    def slow(*_: object) -> None:
        begun.append(1)
        time.sleep(0.05)

    def interrupt(_done: int, _of: int) -> None:
        raise KeyboardInterrupt

    model.blocks[0].register_forward_hook(slow)
    pieces_a_batch = 40
    rows = 128 * pieces_a_batch
    with pytest.raises(KeyboardInterrupt):
        dump(
            model,
            demo_dataset,
            tmp_path / "a.pt",
            n_samples=2 * rows,
            batch_size=rows,
            progress=interrupt,
            **CPU,
        )
    # Of the second batch nothing was queued when the first had but a piece a core to go.
    assert pieces_a_batch - cores <= len(begun) <= pieces_a_batch
