"""A finished file read by rows: every read as the ordinary reader of its format has it."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, random_split

from dump_activations import ActivationsFile, InvalidArgumentError, OutputError, RowIndexError, dump
from dump_activations.model.activations import ACTIVATIONS
from dump_activations.storage.reading import dump_files
from dump_activations.storage.reading.dump_files import inspect_dump
from reference.dumps import read_dump

N = 40
FORMATS = (".safetensors", ".pt", ".npz")
LAYERS = (1, 3)
STACKED = "layer_outputs"
GAMMA = "rmsnorm_gammas/final_ln"
OUTPUTS = [STACKED, "attn_q", "final_hidden", "head_logits", "rmsnorm_gammas"]


@pytest.fixture(scope="module")
def make(tmp_path_factory, demo_checkpoint, demo_dataset):
    """Return what makes dumps of the demo, once each."""
    made = {}
    directory = tmp_path_factory.mktemp("dumps")

    def make(suffix=".safetensors", *, split=False, seed=0, dtype="fp16"):
        name = f"{split}-{seed}-{dtype}{suffix}"
        if name not in made:
            made[name] = directory / name
            kept = {"outputs": OUTPUTS, "layers": LAYERS, "labels": ["move_dir", "legal_moves"]}
            run = {"n_samples": N, "seed": seed, "device": "cpu", "allow_cpu": True}
            options = {**kept, **run, "split_layers": split, "dtype": dtype}
            dump(demo_checkpoint, demo_dataset, made[name], **options)
        return made[name]

    return make


@pytest.fixture(params=FORMATS)
def path(request, make):
    return make(request.param)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def test_every_tensor_is_as_the_ordinary_reader_has_it(path):
    acts, expected = ActivationsFile(path), read_dump(path)
    assert acts.tensor_names() == [name for name in acts.tensor_names() if name in expected.tensors]
    assert len(acts.tensor_names()) == len(expected.tensors)
    assert acts.metadata == expected.metadata
    assert len(acts) == N
    assert set(acts.keys()) == {STACKED, "attn_q", "final_hidden", "head_logits"}
    for name, tensor in expected.tensors.items():
        same(acts.read(name), tensor)
        same(acts.read(name, verify=True), tensor)
        assert acts.shape(name) == tensor.shape
        np.testing.assert_array_equal(acts.read_numpy(name), tensor.numpy())
    np.testing.assert_array_equal(acts.indices, expected.tensors["indices"])
    assert set(acts.labels) == {"move_dir", "legal_moves"}
    for name, values in acts.labels.items():
        np.testing.assert_array_equal(values, expected.tensors[f"labels/{name}"])


@settings(max_examples=60)
@given(
    st.sampled_from([STACKED, "attn_q", "final_hidden", "boards", "labels/legal_moves"]),
    st.tuples(st.sampled_from(FORMATS), st.booleans()),
    st.lists(st.integers(-N, N - 1), max_size=60),
    st.sampled_from([None, *LAYERS]),
)
def test_rows_in_any_order(make, key, form, rows, layer):
    suffix, split = form
    acts, stacked = ActivationsFile(make(suffix, split=split)), read_dump(make(suffix))
    expected = stacked.tensors[key]
    if key in (STACKED, "attn_q"):
        assert acts.layers(key) == LAYERS
        assert acts.shape(key) == expected.shape
        expected = expected if layer is None else expected[:, LAYERS.index(layer)]
    else:
        layer = None
    expected = expected[torch.tensor(rows, dtype=torch.int64)]
    same(acts.read(key, rows, layer=layer), expected)
    out = torch.empty_like(expected)
    assert acts.read(key, torch.tensor(rows), layer=layer, out=out) is out
    same(out, expected)


NUMBERS = st.integers(-N, N - 1)
SLICES = st.builds(slice, *[st.none() | NUMBERS] * 2, st.sampled_from([None, 1, 3, -2]))
MASKS = st.lists(st.booleans(), min_size=N, max_size=N).map(np.array)
ARRAYS = lambda rows: st.sampled_from([rows, np.array(rows), torch.tensor(rows)])  # noqa: E731
OTHERS = st.integers(-2, 1) | st.builds(slice, *[st.none() | st.integers(-3, 3)] * 2)


@settings(max_examples=100)
@given(
    st.sampled_from([STACKED, "attn_q", "boards", "labels/legal_moves"]),
    st.tuples(st.sampled_from(FORMATS), st.booleans()),
    NUMBERS | SLICES | MASKS | st.lists(NUMBERS, min_size=1).flatmap(ARRAYS),
    st.lists(OTHERS, max_size=3) | OTHERS.map(lambda last: [..., last]),
)
def test_an_index_gives_what_it_gives_of_the_whole_tensor(make, key, form, rows, others):
    suffix, split = form
    expected = read_dump(make(suffix)).tensors[key].numpy()
    array = ActivationsFile(make(suffix, split=split))[key]
    assert (array.shape, len(array)) == (expected.shape, N)
    others = others[: expected.ndim - 1]
    index = rows.numpy() if isinstance(rows, torch.Tensor) else rows
    expected = expected[index][(*[slice(None)] * (not isinstance(rows, int)), *others)]
    same(array[(rows, *others)], torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("split", [False, True])
def test_layers_are_numbers_of_the_model_and_places_on_the_axis(make, split):
    acts, expected = ActivationsFile(make(split=split)), read_dump(make()).tensors[STACKED]
    assert acts[STACKED].layers == LAYERS
    same(acts[STACKED].layer(-1)[[0, -1]], expected[[0, -1], 1])  # of four; 1 and 3 are kept
    same(acts.read(STACKED, layer=-3), expected[:, 0])
    assert acts[STACKED].layer(1).layers == ()
    for wrong in (2, -2, -5, 4):
        with pytest.raises(InvalidArgumentError, match=f"layer={wrong}: .* has layers 1, 3"):
            acts[STACKED].layer(wrong)


def test_every_name_that_outputs_takes(tmp_path):
    layered = {each.key: each.alias for each in ACTIVATIONS if each.alias}
    values = {key: torch.rand(3, 2, 5) for key in layered} | {"indices": torch.arange(3)}
    save_file(values, tmp_path / "a.safetensors", {"layers": "0,2"})
    acts = ActivationsFile(tmp_path / "a.safetensors")
    assert set(acts) == set(acts.keys()) == layered.keys()
    for key, alias in layered.items():
        assert alias in acts
        same(acts[alias][:], values[key])
        same(acts.read(f"blocks.2.{alias}", [1]), values[key][[1], 1])
        assert f"blocks.1.{alias}" not in acts
    same(acts["hook_embed"][:], values["resid_pre"][:, 0])
    assert "indices" in acts
    for missing in ("hook", "blocks.0.hook", "pooled", 3, None):
        assert missing not in acts
    with pytest.raises(KeyError, match=r"^.*a.safetensors: no 'pooled' in it, only "):
        acts["pooled"]
    with pytest.raises(InvalidArgumentError, match=r"layer=-1: .* does not say how many layers"):
        acts["resid_pre"].layer(-1)


def test_numpy_takes_an_array_but_no_bfloat16(make):
    expected = read_dump(make()).tensors
    acts = ActivationsFile(make())
    found = np.asarray(acts["final_hidden"])
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, expected["final_hidden"])
    np.testing.assert_array_equal(np.array(acts["boards"], float), expected["boards"].double())
    assert acts["final_hidden"].dtype == torch.float16
    assert acts["final_hidden"].nbytes == found.nbytes
    for split in (False, True):
        acts = ActivationsFile(make(split=split, dtype="bf16"))
        expected = read_dump(make(dtype="bf16")).tensors[STACKED]
        same(acts.read(STACKED, [3, 1], layer=3), expected[[3, 1], 1])
        with pytest.raises(InvalidArgumentError, match=r"NumPy has no bfloat16; .* call \.float"):
            np.asarray(acts["final_hidden"])


def test_facts_of_the_run(make, demo_checkpoint, demo_dataset):
    acts = ActivationsFile(make(seed=1))
    assert (acts.n_samples, acts.seed, acts.num_layers, acts.hidden_size) == (N, 1, 4, 64)
    assert (acts.checkpoint, acts.dataset) == (str(demo_checkpoint), str(demo_dataset))


def test_representations_are_short_and_have_no_addresses(make, tmp_path):
    acts = ActivationsFile(make(split=True))
    values = {f"key{i}": torch.zeros(3, 2) for i in range(60)}
    values |= {f"labels/l{i}": torch.zeros(3) for i in range(60)}
    values["<b>\x1b"] = torch.zeros(3, dtype=torch.complex64)
    values |= {name: torch.zeros(3) for name in ("labels/\x1b", "a\x1b")}
    save_file(values, tmp_path / "a.safetensors")
    large = ActivationsFile(tmp_path / "a.safetensors")
    assert large.seed is None
    assert large.checkpoint is None
    boards, cells = acts.boards(STACKED, 1, labels="move_dir"), acts.cells("final_hidden")
    each = (acts, acts.labels, acts[STACKED], large, large.labels, large["a\x1b"], boards, cells)
    for text in map(repr, each):
        assert len(text.splitlines()) <= 20
        assert "0x" not in text
        assert "\x1b" not in text
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in repr(acts).splitlines()[1:]}
    assert rows[STACKED] == "(40, 2, 16, 64) float16, 164 kB, layers 1, 3"
    assert rows["(labels)"] == "legal_moves, move_dir"
    assert repr(acts[STACKED]) == f"ActivationArray({STACKED}: {rows[STACKED]})"
    assert repr(acts.labels) == "2 labels\n  legal_moves: (40, 4) uint8, 160 B\n" + (
        "  move_dir: (40) uint8, 40 B"
    )
    assert repr(ActivationsFile(make(), make(seed=1))).startswith(
        f"ActivationsFile({make().name}, {make(seed=1).name}): 80 boards, "
    )
    assert "<td>&lt;b&gt;\\x1b</td><td>(3) C64, which cannot be read</td>" in large._repr_html_()


def test_headers_are_read_without_torch(make):
    """NumPy arrays too; and nothing is kept open."""
    program = """
        import os, sys
        from dump_activations import ActivationsFile
        acts = ActivationsFile(sys.argv[1])
        open_files = len(os.listdir("/proc/self/fd"))
        assert acts.shape("final_hidden") == (40, 16, 64), acts.shape("final_hidden")
        assert acts.labels["legal_moves"].shape == (40, 4)
        assert acts.read_numpy("layer_outputs", [3], layer=1).shape == (1, 16, 64)
        assert acts.dtype("final_hidden") == "float16"
        assert len(os.listdir("/proc/self/fd")) == open_files
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), make()], check=True)


def test_in_threads_and_after_a_fork(make):
    acts = ActivationsFile(make(), make())
    expected = acts.read_numpy("final_hidden", [5, 0])

    def read(_):
        np.testing.assert_array_equal(acts.read_numpy("final_hidden", [5, 0]), expected)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(100)))
    process = multiprocessing.get_context("fork").Process(target=read, args=(None,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_pickle_holds_headers_alone(make):
    acts = ActivationsFile(make())
    small = len(pickle.dumps(acts))
    nbytes = acts.labels["move_dir"].nbytes + acts.indices.nbytes  # which stay here
    assert len(pickle.dumps(acts)) - small < nbytes // 2


def test_the_boards_of_a_loader(make):
    expected = read_dump(make()).tensors
    boards = ActivationsFile(make()).boards(STACKED, layer=3, labels=["move_dir", "legal_moves"])
    value, labels = boards[7]
    same(value, expected[STACKED][7, 1])
    assert labels["move_dir"] == expected["labels/move_dir"][7]
    train, test = random_split(boards, [30, 10], torch.Generator().manual_seed(1))
    for part, workers, context in ((train, 0, None), (test, 2, "fork"), (boards, 1, "spawn")):
        rows = torch.tensor(part.indices) if part is not boards else torch.arange(N)
        loader = DataLoader(part, 7, num_workers=workers, multiprocessing_context=context)
        values, labels = zip(*loader, strict=True)
        same(torch.cat(values), expected[STACKED][rows, 1])
        for name in ("move_dir", "legal_moves"):
            found = torch.cat([of_batch[name] for of_batch in labels])
            same(found, expected[f"labels/{name}"][rows])
    loader = DataLoader(ActivationsFile(make()).boards("head_logits"), sampler=[4, 4, 2])
    same(torch.cat([values for values, _ in loader]), expected["head_logits"][[4, 4, 2]])


def test_batches_of_boards(make):
    expected = read_dump(make()).tensors
    boards = ActivationsFile(make()).boards("final_hidden", labels="move_dir")
    sampler = BatchSampler(SequentialSampler(boards), 16, drop_last=False)
    loader = DataLoader(boards, sampler=sampler, batch_size=None)
    values, labels = zip(*loader, strict=True)
    assert [len(batch) for batch in values] == [16, 16, 8]
    same(torch.cat(values), expected["final_hidden"])
    same(torch.cat([of_batch["move_dir"] for of_batch in labels]), expected["labels/move_dir"])
    mask = torch.arange(N) % 3 == 0
    for rows in (slice(30, None, -3), slice(-4, None), [5, -1, 0], torch.tensor([2]), mask, -1):
        values, labels = boards[rows]
        numbers = np.arange(N)[rows if isinstance(rows, slice | int) else np.asarray(rows)]
        same(values, expected["final_hidden"][numbers.copy()])
        assert (labels["move_dir"] == expected["labels/move_dir"][numbers.copy()].numpy()).all()
    for row in (N, -N - 1):
        with pytest.raises(RowIndexError, match=f"row {row} at position 0 is not in"):
            boards[row]


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda acts: acts.read("nothing"), r"a.safetensors: no 'nothing' in it, only .*, boards"),
        (lambda acts: acts.shape("nothing"), "no 'nothing' in it"),
        (lambda acts: acts.read(STACKED, layer=2), "layer=2: layer_outputs has layers 1, 3"),
        (lambda acts: acts.read("boards", layer=1), "layer=1: boards has no layers"),
        (
            lambda acts: acts.read("boards", [0.5]),
            "rows must be a 1-D integer array or .* of length 40; got float64",
        ),
        (lambda acts: acts.read("boards", [[1]]), "rows must be .*; got int64"),
        (lambda acts: acts.read("boards", [True]), "rows must be .*; got bool"),
        (lambda acts: acts.read("boards", 3), "rows must be .*; got a scalar, 3"),
        (lambda acts: acts.read(GAMMA, [0]), "rows must be left out: .* has no axis of boards"),
        (lambda acts: acts.read("boards", out=torch.empty(N, 16)), "must .*; got torch.float32"),
        (
            lambda acts: acts.read("boards", out=torch.empty(16, N, dtype=torch.uint8).T),
            r"out must be a contiguous tensor of torch.uint8 \(40, 16\) on the host; got",
        ),
        (lambda acts: acts.read("boards", [0], verify=True), "verify=True: .* leave out rows"),
        (lambda acts: acts.read(STACKED, layer=1, verify=True), "verify=True: .* leave out layer"),
        (lambda acts: acts["boards"][:, [0]], r"numbers, or slices .*; got \[0\]; read the rows"),
        (lambda acts: acts[STACKED][:, ::-1], "positive step; got slice"),
        (lambda acts: acts[STACKED][:, ::0], "positive step; got slice"),
        (lambda acts: acts.labels["x"], "no label 'x'; the labels are .*move_dir"),
        (lambda acts: acts.boards(STACKED, 0), "layer=0: layer_outputs has layers 1, 3"),
        (lambda acts: acts.boards(GAMMA), "has no axis of boards"),
        (
            lambda acts: acts.boards(STACKED, labels="x"),
            "labels must be labels of the file, legal_moves, move_dir; got 'x'",
        ),
    ],
)
def test_wrong_calls(make, tmp_path, read, error):
    (tmp_path / "a.safetensors").hardlink_to(make())
    with pytest.raises(InvalidArgumentError, match=error):
        read(ActivationsFile(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("row", [-N - 1, N, 2**62])
def test_rows_outside_the_file(make, row):
    for index in (row, [row], (slice(None), 0, row)):
        with pytest.raises(IndexError, match=rf"row {row} |index {row} is out of bounds"):
            ActivationsFile(make())[STACKED][index]
    with pytest.raises(RowIndexError, match=rf"row {row} at position 1 is not in .*, which has 40"):
        ActivationsFile(make()).read(STACKED, [3, row])


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_that_cannot_be_opened(make, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(OutputError, match=r"cannot read .*: No such file"):
        ActivationsFile(path)
    whole = make(suffix).read_bytes()
    for content in (whole[: len(whole) // 2], b"no dump at all", b""):
        path.write_bytes(content)
        with pytest.raises(OutputError, match="is not a whole"):
            ActivationsFile(path)
    with pytest.raises(InvalidArgumentError, match="the suffix has to be"):
        ActivationsFile(__file__)


DTYPES = ("int32", "int16", "int8", "uint64", "uint32", "uint16", "bool", "float64")


def test_files_of_other_programs(tmp_path):
    path = tmp_path / "a.safetensors"
    values = {"a": torch.randn(9, 3)}
    values |= {name: torch.arange(27).view(9, 3).to(getattr(torch, name)) for name in DTYPES}
    save_file(values | {"b": torch.zeros(9, dtype=torch.complex64)}, path)
    acts = ActivationsFile(path)
    assert set(acts.keys()) == {"a", "b", *DTYPES}
    for name, tensor in values.items():
        same(acts.read(name, [8, 2]), tensor[[8, 2]])
        np.testing.assert_array_equal(acts.read_numpy(name), tensor.numpy())
    with pytest.raises(InvalidArgumentError, match="b is of C64"):
        acts.read("b")
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in values.items()})
    saved = {name: values[name] for name in ("a", "int32", "int8", "bool")}
    torch.save({**saved, "metadata": {}}, tmp_path / "a.pt")
    for other in (ActivationsFile(tmp_path / "a.npz"), ActivationsFile(tmp_path / "a.pt")):
        for name, tensor in saved.items():
            same(other.read(name, [8, 2]), tensor[[8, 2]])
    save_file({"a": torch.zeros(9, 3), "b": torch.zeros(8)}, path)
    with pytest.raises(OutputError, match=r"a.safetensors is not a dump: .* different first axes"):
        ActivationsFile(path)


def test_tensors_that_are_not_layers_of_one_key(tmp_path):
    """Other programs write other shapes or dtypes, or a tensor next to a stacked one."""
    values = {
        "x.0": torch.rand(3, 2),
        "x.1": torch.rand(3, 4),
        "x.2": torch.rand(3, 2).half(),
        "x.3": torch.rand(3, 2),
        "x.03": torch.rand(3, 2),
        "y": torch.rand(3, 4, 2),
        "y.1": torch.rand(3, 2),
        "z.7": torch.rand(3, 2),  # of no layer of the model
    }
    save_file(values, tmp_path / "a.safetensors", {"layers": "0,1,2,3"})
    acts = ActivationsFile(tmp_path / "a.safetensors")
    assert set(acts.keys()) == {"x", "x.1", "x.2", "x.03", "y", "y.1", "z.7"}
    same(acts.read("x"), torch.stack([values["x.0"], values["x.3"]], 1))
    same(acts.read("y", layer=1), values["y"][:, 1])
    for name, expected in values.items():
        same(acts.read(name), expected)


@pytest.mark.parametrize(("layers", "key"), [("9999", "x"), ("10000", "x.0"), ("-1", "x.0")])
def test_a_model_of_too_many_layers_has_none(tmp_path, layers, key):
    """They are numbered one by one, and a file may claim any number of them."""
    save_file({"x.0": torch.rand(3, 2)}, tmp_path / "a.safetensors", {"num_layers": layers})
    assert list(ActivationsFile(tmp_path / "a.safetensors")) == [key]


def test_numpy_arrays_that_are_not_stored_by_rows(tmp_path):
    array = np.arange(12).reshape(3, 4)
    np.savez(tmp_path / "a.npz", values=np.asfortranarray(array))
    np.savez_compressed(tmp_path / "b.npz", values=array)
    for name in ("a.npz", "b.npz"):
        with pytest.raises(OutputError, match="values is compressed or not in C order"):
            ActivationsFile(tmp_path / name).read("values")


@pytest.mark.parametrize("suffix", FORMATS)
def test_damage_is_found_where_whole_tensors_are_read(make, tmp_path, suffix):
    def damaged(whole, name):
        content, tensor = bytearray(whole.read_bytes()), inspect_dump(whole).tensors[name]
        content[tensor.offset + tensor.nbytes - 1] ^= 1
        (tmp_path / f"a{suffix}").write_bytes(content)
        return ActivationsFile(tmp_path / f"a{suffix}")

    acts = damaged(make(suffix), STACKED)
    acts.read(STACKED)
    acts.read("final_hidden", verify=True)
    with pytest.raises(OutputError, match=rf"a{suffix}: layer_outputs is damaged"):
        acts.read(STACKED, verify=True)
    acts = damaged(make(suffix, split=True), f"{STACKED}.3")
    acts.read(STACKED, layer=1, verify=True)
    for layer in (3, None):
        with pytest.raises(OutputError, match=r"layer_outputs.3 is damaged"):
            acts.read(STACKED, layer=layer, verify=True)


def test_digests_of_several_files_or_none(make, tmp_path):
    acts = ActivationsFile(make(seed=1), make())
    assert len(acts.read(STACKED, verify=True)) == 2 * N
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(OutputError, match=r"x.safetensors carries no digest to verify x by"):
        ActivationsFile(tmp_path / "x.safetensors").read("x", verify=True)


def renewed_time(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def renewed_inode(path):
    shutil.copy2(path, path.with_name("copy")).replace(path)


def copied_again(path):
    renewed_inode(path)
    renewed_time(path)


def replaced_by_other_values(path, other):
    path.with_name("copy").write_bytes(other.read_bytes())
    path.with_name("copy").replace(path)


@pytest.fixture
def copied(make, tmp_path):
    return Path(shutil.copy(make(), tmp_path / "a.safetensors"))


@pytest.mark.parametrize("renew", [renewed_time, renewed_inode, copied_again])
def test_a_file_that_was_only_touched_is_read_on(copied, renew):
    acts = ActivationsFile(copied)
    expected = acts.read("boards")
    renew(copied)
    for read in (acts.read, pickle.loads(pickle.dumps(acts)).read):
        same(read("boards"), expected)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_file_that_was_changed(make, copied, is_cut):
    acts = ActivationsFile(copied)
    acts.read("boards")
    if is_cut:
        os.truncate(copied, copied.stat().st_size - 1)
    else:
        replaced_by_other_values(copied, make(seed=1))
    for read in (acts.read, pickle.loads(pickle.dumps(acts)).read):
        with pytest.raises(OutputError, match=r"a.safetensors was replaced or changed since"):
            read("boards")
    copied.unlink()
    with pytest.raises(OutputError, match=r"cannot read .*a.safetensors: No such file"):
        acts.read("boards")


def test_a_change_is_noticed_in_the_file_of_a_row(make, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path in paths:
        path.write_bytes(make().read_bytes())
    acts = ActivationsFile(*paths)
    paths[1].write_bytes(make(seed=1).read_bytes())
    assert len(acts.read("boards", [N - 1, 2 * N])) == 2
    for row in (N, 2 * N - 1):
        with pytest.raises(OutputError, match=r"b.safetensors was replaced or changed since"):
            acts.read("boards", [row])


def test_a_file_that_is_replaced_during_a_read(make, copied, monkeypatch):
    def read(_numbers, _out, **_options):
        replaced_by_other_values(copied, make(seed=1))

    monkeypatch.setattr(dump_files._rust, "StoredTensor", lambda *_: SimpleNamespace(read=read))
    with pytest.raises(OutputError, match="was replaced or changed since"):
        ActivationsFile(copied).read("boards")


OTHER_LABELS = [torch.zeros(4), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), None]


@pytest.mark.parametrize("other", OTHER_LABELS)
def test_tensors_that_differ_between_files(tmp_path, other):
    for name, label in {"a": torch.zeros(3), "b": other}.items():
        values = {"indices": torch.arange(3), "x": torch.zeros(3, 2), "labels/y": label}
        values = {key: value for key, value in values.items() if value is not None}
        save_file(values, tmp_path / f"{name}.safetensors")
    acts = ActivationsFile(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert len(acts.read("x")) == 6
    with pytest.raises(InvalidArgumentError, match=r"b.safetensors has no labels/y like .*a\."):
        acts.labels["y"]


@pytest.mark.parametrize("name", ["precision", "weights_sha256", "layers"])
def test_files_of_other_models_are_not_one_dump(tmp_path, name):
    metadata = ({}, {name: "1"}, {name: "2"})
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, of_file in zip(paths, metadata, strict=True):
        save_file({"x": torch.zeros(3, 2)}, path, of_file)
    for both in (paths[:2], paths[1::-1]):  # One of them does not name it.
        assert len(ActivationsFile(*both)) == 6
    with pytest.raises(InvalidArgumentError, match=f"its {name} is 2, not 1"):
        ActivationsFile(*paths)
    save_file({"x": torch.zeros(3, 4)}, paths[2])
    with pytest.raises(InvalidArgumentError, match=r"as one with .*: its keys differ"):
        ActivationsFile(*paths)


def test_a_replaced_file_without_digests_is_a_change(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(9, 3)}, path)
    acts = ActivationsFile(path)
    for renew in (renewed_time, renewed_inode):
        renew(path)
        acts.read("x")
    save_file({"x": torch.ones(9, 3)}, tmp_path / "b.safetensors")
    replaced_by_other_values(path, tmp_path / "b.safetensors")
    renewed_time(path)
    with pytest.raises(OutputError, match="was replaced or changed"):
        acts.read("x")


def test_relative_names_after_a_change_of_directory(make, tmp_path, monkeypatch):
    monkeypatch.chdir(make().parent)
    acts = ActivationsFile(make().name)
    monkeypatch.chdir(tmp_path)
    assert len(acts.read("boards")) == N
    assert acts.paths == (make(),)
