"""Broken runs of the whole tool: what is left, what resumes it, and how failing stages end."""

import gc
import re
import signal
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dump_activations import dump, load_encoder
from dump_activations.commands.dump import main
from dump_activations.errors import DumpActivationsNote
from dump_activations.model.checkpoint import WEIGHT_NAMES
from dump_activations.storage.writing.output import OutputFile
from reference.checkpoints import BASE, bundle, config_json, random_state_dict, save_checkpoint
from reference.datasets import make_dataset, write_shards
from reference.dumps import FORMATS, read_dump

pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

N, BATCH = 400, 8
DONE = 23  # batches of 50 before a run breaks
KEYS = ["layer_outputs", "final_hidden", "head_logits", "rmsnorm_gammas"]
cpu_dump = partial(dump, device="cpu", allow_cpu=True)


class BrokenError(Exception):
    """Stands for an error of any kind in the middle of a run."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_checkpoint(root / "checkpoint", random_state_dict(BASE), config_json(BASE))
    make_dataset(root / "dataset", "packed_46", n=5000, shards=3)
    return root


@pytest.fixture
def model(inputs):
    return load_encoder(inputs / "checkpoint")


@pytest.fixture
def command(inputs, capsys):
    """Return what runs the command, here; it gives the exit code and what stderr has to say.

    That does not count what every run is going to write.
    """

    def run(*flags):
        arguments = [
            f"--init={inputs / 'checkpoint'}",
            f"--dataset={inputs / 'dataset'}",
            f"--n-samples={N}",
            f"--batch-size={BATCH}",
            f"--outputs={','.join(KEYS)}",
            "--device=cpu",
            "--allow-cpu",
            *flags,
        ]
        capsys.readouterr()
        code = main(arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        return code, [line for line in lines if not line.startswith(f"note: {N:,} boards of ")]

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
        noted = pytest.warns(DumpActivationsNote, match="is replaced") if before else nullcontext()
        with noted, pytest.raises(BrokenError) as caught:
            cpu_dump(model, inputs / "dataset", target, overwrite=bool(before), **options)
        assert any("the same call again does the rest" in n for n in caught.value.__notes__)
        assert target.exists() == bool(before)
        return target

    return run


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["again", "overwrite"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_call_does_only_the_rest_and_says_so(suffix, more, broken, command, unbroken):
    """Also with --overwrite, which never discards the same work."""
    target = broken(suffix)
    code, lines = command(f"--output={target}", *more)
    assert code == 0, lines
    (line,) = lines
    resuming = re.fullmatch(
        rf"note: resuming {target}\.partial, which has (\d+) of {N} boards", line
    )
    # Batches that were under way are lost. Written ones are not.
    assert resuming, line
    assert 0 < int(resuming[1]) <= DONE * BATCH
    assert contents(target.parent) == {target.name: unbroken(suffix)}


def test_a_partial_file_of_no_use_is_started_over_with_a_note(broken, command, unbroken):
    target = broken(".pt")
    Path(f"{target}.partial.journal").write_bytes(b"nonsense")
    code, lines = command(f"--output={target}")
    assert (code, lines) == (0, [f"note: {target}.partial is started over: its journal is damaged"])
    assert contents(target.parent) == {target.name: unbroken(".pt")}


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_forward_is_run_twice_and_progress_ends_at_the_total(
    suffix, broken, model, inputs, unbroken
):
    target = broken(suffix)
    forwards = break_after(model, N)
    progress = []
    options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH}
    with pytest.warns(DumpActivationsNote, match="resuming"):
        summary = cpu_dump(
            model, inputs / "dataset", target, progress=lambda *at: progress.append(at), **options
        )
    assert contents(target.parent) == {target.name: unbroken(suffix)}
    assert summary.boards == N - summary.resumed_boards < N
    assert len(forwards) == summary.boards // BATCH
    steps = range(summary.resumed_boards, N + 1, BATCH)
    assert progress == [(boards, N) for boards in steps]


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["again", "overwrite"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_complete_dump_is_left_as_it_is(suffix, more, command, unbroken, tmp_path):
    target = tmp_path / f"a{suffix}"
    target.write_bytes(unbroken(suffix))
    before = target.stat()
    # A run that is killed as soon as its file has its name leaves this.
    Path(f"{target}.partial.journal").write_text("left")
    done = [f"note: {target} is already complete"]
    assert command(f"--output={target}", *more) == (0, done)
    after = target.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert contents(target.parent) == {target.name: unbroken(suffix)}


def test_a_partial_file_next_to_a_complete_dump_stays(command, unbroken, tmp_path):
    target = tmp_path / "a.pt"
    target.write_bytes(unbroken(".pt"))
    Path(f"{target}.partial").write_text("other")
    before = contents(tmp_path)
    assert command(f"--output={target}")[0] == 0
    assert contents(tmp_path) == before


def test_a_complete_dump_of_other_work_is_replaced_only_where_asked(command, unbroken, tmp_path):
    target = tmp_path / "a.npz"
    assert command(f"--output={target}", "--seed=1") == (0, [])
    other = target.read_bytes()
    code, (line,) = command(f"--output={target}")
    assert code == 1
    assert f"{target} is of other work, which differs in --seed (1 there, 0 here);" in line
    assert "--overwrite" in line
    assert contents(tmp_path) == {target.name: other}
    code, lines = command(f"--output={target}", "--overwrite")
    size = f"{len(unbroken('.npz')) / 1e6:.2f} MB"
    replaced = f"note: {target} ({size}, {N} boards) is replaced when the new file is whole"
    assert (code, lines) == (0, [replaced])
    assert target.read_bytes() == unbroken(".npz")


OTHER_WORK = {
    "seed": (["--seed=1"], "--seed (0 there, 1 here);"),
    "keys": (["--outputs=attn_norm"], f"--outputs ({','.join(sorted(KEYS))} there,"),
    "layers": (["--layers=1:"], "--layers (0,1 there, 1 here);"),
    "split layers": (["--split-layers"], "the tensors (--split-layers);"),
    "weights": ([], "the weights;"),
    "dataset": ([], "the dataset's shards or the layout of their rows;"),
    "indices": ([], "sampling (without replacement there, given here);"),
}


@pytest.mark.parametrize("case", OTHER_WORK)
def test_other_work_is_not_resumed_and_named(case, broken, inputs, command):
    target = broken(".safetensors")
    before = contents(target.parent)
    other = inputs / f"other-{case}"
    changes, named = OTHER_WORK[case]
    if case == "weights":
        state_dict = random_state_dict(BASE)
        state_dict["blocks.1.mlp.w_up.weight"][3, 3] += 1e-3
        save_checkpoint(other, state_dict, config_json(BASE))
        changes = [f"--init={other}"]
    elif case == "dataset":
        make_dataset(other, "packed_46", n=5001, shards=3)
        changes = [f"--dataset={other}"]
    elif case == "indices":
        other.mkdir()
        np.save(other / "indices.npy", np.arange(N))
        changes = [f"--indices={other / 'indices.npy'}"]
    code, (line,) = command(*changes, f"--output={target}")
    assert code == 1
    assert f"{target}.partial is of other work, which differs in" in line
    assert named in line
    assert contents(target.parent) == before


def test_overwrite_drops_a_partial_file_of_other_work(broken, command, unbroken):
    target = broken(".pt")
    code, lines = command(f"--output={target}", "--seed=1", "--overwrite")
    assert code == 0, lines
    assert command(f"--output={target}")[0] == 1
    assert command(f"--output={target}", "--overwrite")[0] == 0
    assert contents(target.parent) == {target.name: unbroken(".pt")}


def test_a_second_run_to_the_same_target_is_refused(model, inputs, command, unbroken, tmp_path):
    target = tmp_path / "a.safetensors"
    refused = []

    def run_another(*_):
        if not refused:
            another = partial(command, f"--output={target}")
            refused.extend([another(), another("--overwrite")])

    model.blocks[0].register_forward_hook(run_another)
    options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH}
    cpu_dump(model, inputs / "dataset", target, **options)
    for code, lines in refused:
        assert code == 1
        assert len(lines) == 1
        assert str(target) in lines[0]
    assert contents(tmp_path) == {target.name: unbroken(".safetensors")}


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_existing_target_lasts_until_the_new_file_is_whole(suffix, broken, command, unbroken):
    target = broken(suffix, before=b"old")
    assert target.read_bytes() == b"old"
    code, (line,) = command(f"--output={target}")
    assert code == 1
    assert f"{target} exists and is not a dump of this package" in line
    assert target.read_bytes() == b"old"
    code, lines = command(f"--output={target}", "--overwrite")
    assert code == 0, lines
    assert f"note: {target} (3 B) is replaced when the new file is whole" in lines
    assert contents(target.parent) == {target.name: unbroken(suffix)}


def test_a_partial_file_removed_under_a_run_is_an_error(model, inputs, tmp_path):
    target = tmp_path / "a.pt"

    def remove(done, _of):
        if done == N // 2:
            target.with_name("a.pt.partial").unlink()

    options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH, "progress": remove}
    with pytest.raises(OSError, match=r"a\.pt\.partial was removed .* nothing is kept") as caught:
        cpu_dump(model, inputs / "dataset", target, **options)
    assert not hasattr(caught.value, "__notes__")
    assert contents(tmp_path) == {}


def test_a_second_interruption_does_not_cost_what_is_done(model, inputs, tmp_path, monkeypatch):
    suspend = OutputFile.suspend

    def interrupted_suspend(file, **options):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        return suspend(file, **options)

    monkeypatch.setattr(OutputFile, "suspend", interrupted_suspend)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not ignored"))

    def interrupt(done, _of):
        if done == N // 2:
            signal.raise_signal(signal.SIGINT)

    options = {"outputs": KEYS, "n_samples": N, "batch_size": BATCH, "progress": interrupt}
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            cpu_dump(model, inputs / "dataset", tmp_path / "a.pt", **options)
    finally:
        signal.signal(signal.SIGTERM, before)
    (note,) = caught.value.__notes__
    assert "are kept" in note
    assert contents(tmp_path).keys() == {"a.pt.partial", "a.pt.partial.journal"}


# --- What a run reads is not what it writes.


@pytest.fixture
def bundle_path(tmp_path):
    path = tmp_path / "checkpoint" / "run.pt"
    path.parent.mkdir()
    torch.save(bundle(random_state_dict(BASE), config_json(BASE)), path)
    return path


def is_refused(command, output, **inputs):
    before = contents(output.parent)
    flags = [f"--{name}={path}" for name, path in inputs.items()]
    code, (line,) = command(*flags, f"--output={output}")
    assert code == 2
    assert f"this run reads {output.resolve()}, or would read it next time" in line
    assert contents(output.parent) == before


def test_a_checkpoint_is_not_written_over(command, bundle_path):
    is_refused(command, bundle_path, init=bundle_path)
    code, lines = command(f"--init={bundle_path}", f"--output={bundle_path.with_name('model.pt')}")
    assert (code, lines) == (0, [])


@pytest.mark.parametrize("own", ["model.safetensors", "model.pt", None])
def test_a_checkpoints_directory_would_not_take_the_dump_for_its_weights(own, command, tmp_path):
    state_dict, init = random_state_dict(BASE), tmp_path / "checkpoint"
    save_checkpoint(init, state_dict, config_json(BASE))
    (init / "model.safetensors").rename(tmp_path / "weights")
    if own == "model.pt":
        torch.save(bundle(state_dict, config_json(BASE)), init / own)
    elif own:
        (tmp_path / "weights").rename(init / own)
    names = [name for name in WEIGHT_NAMES if not name.endswith(".json")]  # of no format
    rank = names.index(own) if own else len(names)
    flags = ["--random-init"] if own is None else []
    for name in names[: rank + 1]:
        code, (line,) = command(*flags, f"--init={init}", f"--output={init / name}")
        assert code == 2, name
        assert f"this run reads {init / name}, or would" in line
    code, lines = command(*flags, f"--init={init}", f"--output={init / 'model-step-1.pt'}")
    assert code == 0, lines
    for name in names[rank + 1 :][:1]:
        assert command(f"--init={init}", f"--output={init / name}") == (0, [])


@pytest.fixture
def moved(inputs, tmp_path):
    """Return a function that moves a shard of the dataset to a file with a name of a dump."""
    shard = next((inputs / "dataset").iterdir())

    def move(name):
        shard.rename(tmp_path / name)
        shard.symlink_to(tmp_path / name)
        return tmp_path / name

    yield move
    shard.resolve().rename(shard)


def test_a_shard_and_the_indices_are_not_written_over(command, moved, tmp_path):
    is_refused(command, moved("rows.pt"))
    with (tmp_path / "indices.npz").open("wb") as file:
        np.save(file, np.arange(5))
    is_refused(command, tmp_path / "indices.npz", indices=tmp_path / "indices.npz")


def test_shards_replace_nothing_that_the_run_reads(command, moved, tmp_path):
    shard = moved("a-00001-of-00001.pt")
    before = shard.read_bytes()
    code, (line,) = command(f"--output={tmp_path / 'a.pt'}", "--shard-size=1GB", "--overwrite")
    assert code == 2
    assert f"this run reads {shard}" in line
    assert shard.read_bytes() == before


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
@pytest.mark.parametrize("fault", ["cut", "emptied"])
@pytest.mark.parametrize("layout", ["packed_46", "aligned_48", "selfplay_v1"])
def test_a_shard_cut_short_in_the_middle_of_a_run(layout, fault, model, tmp_path, monkeypatch):
    """An error that names the file, and no signal."""
    monkeypatch.setattr("dump_activations.pipeline.feed._LARGEST_WINDOW", 1000)
    dataset = make_dataset(tmp_path / "dataset", layout, n=20_000)
    for shard in (tmp_path / "dataset").iterdir():
        shard.unlink()
    write_shards(tmp_path / "dataset", dataset.rows, [5000] * 4)
    victim = tmp_path / "dataset" / "steps-00003.npy"
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
        cpu_dump(model, tmp_path / "dataset", tmp_path / "a.pt", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.pt").exists()


def test_counts_of_values_that_are_not_finite(tmp_path, inputs):
    """Overflow of fp16 is counted; the values of fp32 are finite."""
    state_dict = random_state_dict(BASE)
    state_dict["final_ln.weight"] = torch.full((32,), 3e5)
    save_checkpoint(tmp_path / "large", state_dict, config_json(BASE))
    run = partial(cpu_dump, tmp_path / "large", inputs / "dataset", n_samples=50, batch_size=16)
    assert run(tmp_path / "wide.npz").nonfinite == {}
    with pytest.warns(UserWarning, match=r"final_hidden"):
        run(tmp_path / "narrow.npz", dtype="fp16")
    result = read_dump(tmp_path / "narrow.npz")
    count = int((~np.isfinite(result.numpy("final_hidden"))).sum())
    assert count
    assert any(str(count) in text for text in result.metadata.values())


def test_nan_without_infinities_is_warned_of(tmp_path, inputs):
    state_dict = random_state_dict(BASE)
    state_dict["final_ln.weight"][3] = float("nan")
    save_checkpoint(tmp_path / "broken", state_dict, config_json(BASE))
    options = {"outputs": ["final_hidden"], "n_samples": 50, "batch_size": 16}
    with (
        pytest.warns(UserWarning, match=r"final_hidden: 800 NaN and 0 infinite values"),
        pytest.warns(UserWarning, match=r"weights that are not finite: final_ln.weight"),
    ):
        summary = cpu_dump(tmp_path / "broken", inputs / "dataset", tmp_path / "a.pt", **options)
    assert summary.nonfinite == {"final_hidden": {"nan": 800, "inf": 0}}
