"""Broken runs of the whole tool: what is left, what resumes it, and how failing stages end."""

import gc
import resource
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import DEMO_POOL
from dump_activations import dump, load_encoder, stream
from dump_activations.commands.dump import main
from dump_activations.options import Options
from dump_activations.pipeline.plan import make_plan
from dump_activations.pipeline.provenance import fingerprint as fingerprint_of
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint
from reference.dumps import FORMATS, read_dump
from reference.pools import make_pool, write_shards

pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

N, BATCH = 400, 8
DONE = 23  # batches of 50 before a run breaks
KEYS = ["layer_outputs", "final_hidden", "head_logits", "rmsnorm_gammas"]
cpu_dump = partial(dump, device="cpu", allow_cpu=True)


class BrokenError(Exception):
    """Stands for whatever may happen in the middle of a run."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_checkpoint(root / "checkpoint", random_state_dict(BASE), config_json(BASE))
    make_pool(root / "pool", "packed_46", n=5000, shards=3)
    return root


@pytest.fixture
def model(inputs):
    return load_encoder(inputs / "checkpoint")


@pytest.fixture
def command(inputs, capsys):
    """Return what runs the command, here; it gives the exit code and the lines on stderr."""

    def run(*flags):
        arguments = [
            f"--init={inputs / 'checkpoint'}",
            f"--dataset={inputs / 'pool'}",
            f"--n-samples={N}",
            f"--batch-size={BATCH}",
            f"--outputs={','.join(KEYS)}",
            "--device=cpu",
            "--allow-cpu",
            *flags,
        ]
        capsys.readouterr()
        code = main(arguments)
        return code, capsys.readouterr().err.strip().splitlines()

    return run


@pytest.fixture
def unbroken(command, tmp_path_factory):
    """Return the bytes of a run that nothing disturbed."""

    def run(suffix):
        path = tmp_path_factory.mktemp("unbroken") / f"a{suffix}"
        code, lines = command(f"--output={path}")
        assert code == 0, lines
        return path.read_bytes()

    return run


def break_after(model, batches):
    """Let the forward pass fail once so many batches are done; return the list of forwards."""
    forwards = []

    def count(*_):
        forwards.append(1)
        if len(forwards) > batches:
            raise BrokenError

    model.blocks[0].register_forward_pre_hook(count)
    return forwards


@pytest.fixture
def broken(inputs, tmp_path):
    """Return what breaks a run of a format in its middle, and returns its target."""

    def run(suffix, before=None):
        target = tmp_path / f"a{suffix}"
        if before:
            target.write_bytes(before)
        model = load_encoder(inputs / "checkpoint")
        break_after(model, DONE)
        options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH}
        with pytest.raises(BrokenError) as caught:
            cpu_dump(model, inputs / "pool", target, **options)
        assert any("resume=True" in note for note in caught.value.__notes__)
        assert target.exists() == bool(before)
        return target

    return run


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("suffix", FORMATS)
def test_leftover_is_reported_and_kept(suffix, broken, command):
    target = broken(suffix)
    before = contents(target.parent)
    code, lines = command(f"--output={target}")
    assert code == 1
    (line,) = lines
    for word in (str(target), "--resume", "--overwrite", str(N)):
        assert word in line
    assert contents(target.parent) == before


@pytest.mark.parametrize("suffix", FORMATS)
def test_overwrite_drops_the_leftover(suffix, broken, command, unbroken):
    target = broken(suffix)
    code, lines = command(f"--output={target}", "--overwrite")
    assert code == 0, lines
    assert contents(target.parent) == {target.name: unbroken(suffix)}


@pytest.mark.parametrize("suffix", FORMATS)
def test_resume_does_only_the_rest(suffix, broken, model, inputs, unbroken):
    target = broken(suffix)
    forwards = break_after(model, N)
    options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH}
    cpu_dump(model, inputs / "pool", target, resume=True, **options)
    assert contents(target.parent) == {target.name: unbroken(suffix)}
    # Batches that were under way are lost; those that were written are not.
    assert N // BATCH - DONE <= len(forwards) < N // BATCH


def test_resume_of_nothing_is_a_whole_run(command, unbroken, tmp_path):
    target = tmp_path / "a.npz"
    code, lines = command(f"--output={target}", "--resume")
    assert code == 0, lines
    assert target.read_bytes() == unbroken(".npz")


OTHER_WORK = {
    "seed": ["--seed=1"],
    "samples": ["--n-samples=399"],
    "batch": ["--batch-size=16"],
    "keys": ["--outputs=attn_norm"],
    "dtype": ["--dtype=fp16"],
}


@pytest.mark.parametrize("case", [*OTHER_WORK, "weights", "pool", "indices"])
def test_other_work_is_not_resumed(case, broken, inputs, command, unbroken):
    target = broken(".safetensors")
    before = contents(target.parent)
    other = inputs / f"other-{case}"
    changes = OTHER_WORK.get(case, [])
    if case == "weights":
        state_dict = random_state_dict(BASE)
        state_dict["blocks.1.mlp.w_up.weight"][3, 3] += 1e-3
        save_checkpoint(other, state_dict, config_json(BASE))
        changes = [f"--init={other}"]
    elif case == "pool":
        make_pool(other, "packed_46", n=5001, shards=3)
        changes = [f"--dataset={other}"]
    elif case == "indices":
        other.mkdir()
        np.save(other / "indices.npy", np.arange(N))
        changes = [f"--indices={other / 'indices.npy'}"]
    code, lines = command(*changes, f"--output={target}", "--resume")
    assert code == 1
    assert len(lines) == 1
    assert str(target) in lines[0]
    assert contents(target.parent) == before
    code, lines = command(f"--output={target}", "--resume")
    assert code == 0, lines
    assert target.read_bytes() == unbroken(".safetensors")


@pytest.mark.parametrize("change", [{"eps": 0.5}, {"heads": 2, "kv_heads": 1}])
def test_models_of_the_same_weights_are_other_work(change, tmp_path):
    """What a config says that no weight's shape shows determines the file's bytes too."""

    def fingerprint(config):
        save_checkpoint(tmp_path, random_state_dict(BASE), config_json(config))
        options = Options(outputs=["pooled"], n_samples=3, device="cpu", allow_cpu=True)
        return fingerprint_of(make_plan(tmp_path, DEMO_POOL, options))

    assert fingerprint(BASE) == fingerprint(BASE)
    assert fingerprint(BASE) != fingerprint(replace(BASE, **change))


def test_a_second_run_to_the_same_target_is_refused(model, inputs, command, unbroken, tmp_path):
    target = tmp_path / "a.safetensors"
    refused = []

    def run_another(*_):
        if not refused:
            another = partial(command, f"--output={target}")
            refused.extend([another(), another("--resume"), another("--overwrite")])

    model.blocks[0].register_forward_hook(run_another)
    options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH}
    cpu_dump(model, inputs / "pool", target, **options)
    for code, lines in refused:
        assert code == 1
        assert len(lines) == 1
        assert str(target) in lines[0]
    assert contents(tmp_path) == {target.name: unbroken(".safetensors")}


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_existing_target_lasts_until_the_new_file_is_whole(suffix, broken, command, unbroken):
    target = broken(suffix, before=b"old")
    assert target.read_bytes() == b"old"
    code, lines = command(f"--output={target}", "--resume")
    assert code == 0, lines
    assert contents(target.parent) == {target.name: unbroken(suffix)}


# --- Failures of one stage end the others.


@pytest.fixture
def nothing_left_open():
    """Check that a test leaves no thread and no open file."""

    def count():
        gc.collect()
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    yield
    assert count() == before


@pytest.mark.usefixtures("nothing_left_open")
@pytest.mark.parametrize("use", ["dump", "stream", "no-write"])
def test_an_error_in_the_forward(use, model, inputs, tmp_path):
    forwards = break_after(model, 6)
    options = {"outputs": ["layer_outputs"], "n_samples": N, "batch_size": BATCH}
    uses = {
        "dump": partial(dump, output=tmp_path / "a.safetensors"),
        "no-write": partial(dump, write=False),
        "stream": lambda *inputs, **options: list(stream(*inputs, **options)),
    }
    with pytest.raises(BrokenError):
        uses[use](model, inputs / "pool", device="cpu", allow_cpu=True, **options)
    assert len(forwards) == 7
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.usefixtures("nothing_left_open")
@pytest.mark.parametrize("fault", ["cut", "emptied"])
@pytest.mark.parametrize("layout", ["packed_46", "aligned_48", "selfplay_v1"])
def test_a_shard_cut_short_in_the_middle_of_a_run(layout, fault, model, tmp_path, monkeypatch):
    """An error that names the file, and no signal."""
    monkeypatch.setattr("dump_activations.pipeline.board_feed._LARGEST_WINDOW", 1000)
    pool = make_pool(tmp_path / "pool", layout, n=20_000)
    for shard in (tmp_path / "pool").iterdir():
        shard.unlink()
    write_shards(tmp_path / "pool", pool.rows, [5000] * 4)
    victim = tmp_path / "pool" / "steps-00003.npy"
    keep = 0 if fault == "emptied" else victim.stat().st_size // 2
    calls = []

    def cut(*_):
        calls.append(1)
        if len(calls) == 2:
            with victim.open("r+b") as file:
                file.truncate(keep)

    model.blocks[0].register_forward_hook(cut)
    options = {"outputs": ["pooled"], "indices": np.arange(20_000), "batch_size": 16}
    with pytest.raises((ValueError, OSError), match=r"steps-00003\.npy") as caught:
        cpu_dump(model, tmp_path / "pool", tmp_path / "a.pt", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.usefixtures("nothing_left_open")
def test_thousands_of_batches_take_no_more_than_hundreds(model, inputs, tmp_path):
    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def run(batches):
        indices = np.arange(batches) % 5000
        options = {"outputs": ["final_hidden"], "indices": indices, "batch_size": 1}
        cpu_dump(model, inputs / "pool", tmp_path / "a.safetensors", **options)

    run(300)
    before = resident()
    run(3000)
    assert resident() - before < 16 * 2**20


def test_counts_of_values_that_are_not_finite(tmp_path, inputs):
    """Overflow of fp16 is counted; the values of fp32 are finite."""
    state_dict = random_state_dict(BASE)
    state_dict["final_ln.weight"] = torch.full((32,), 3e5)
    save_checkpoint(tmp_path / "large", state_dict, config_json(BASE))
    options = {"outputs": ["final_hidden", "attn_norm"], "n_samples": 50, "batch_size": 16}
    wide, narrow = tmp_path / "wide.npz", tmp_path / "narrow.npz"
    cpu_dump(tmp_path / "large", inputs / "pool", wide, **options)
    with pytest.warns(UserWarning, match=r"final_hidden"):
        cpu_dump(tmp_path / "large", inputs / "pool", narrow, dtype="fp16", **options)
    assert np.isfinite(read_dump(wide).numpy("final_hidden")).all()
    values = read_dump(narrow).numpy("final_hidden")
    assert not np.isfinite(values).all()
    count = str(int((~np.isfinite(values)).sum()))
    assert any(count in text for text in read_dump(narrow).metadata.values())
