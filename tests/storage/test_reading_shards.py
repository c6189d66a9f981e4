"""Dumps in shards, read by the name of the whole: as the one file of the same boards."""

import json
import shutil
import warnings
import zlib

import numpy as np
import pytest
import torch

from dump_activations import ActivationsFile, DumpActivationsWarning
from dump_activations.api.step_indices import read_step_indices
from dump_activations.commands.inspect import main
from dump_activations.dtypes import TensorSpec
from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest, integrity_text
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.reading.comparison import compare
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.reading.stored_statistics import compute_statistics
from dump_activations.storage.statistics import STATISTICS

N, L, H = 41, 2, 6
CUTS = (0, 14, 28, N)  # of three shards
METADATA = {"n_samples": str(N), "layers": "0,3", "num_layers": "4", "fingerprint": "f"}


def tensors(start=0, stop=N):
    """Return the boards of a range of the run, and its statistics, by NumPy."""
    generator = np.random.default_rng(5)
    hidden = generator.standard_normal((N, L, 16, H)).astype(np.float32)[start:stop]
    boards = generator.integers(0, 9, (N, 16)).astype(np.uint8)[start:stop]
    vectors = hidden.astype(np.float64).transpose(1, 0, 2, 3).reshape(L, -1, H)
    norms = np.linalg.norm(vectors, axis=2)
    statistics = {
        "count": np.full(L, vectors.shape[1], np.float64),
        "mean": vectors.mean(1),
        "variance": vectors.var(1),
        "min": vectors.min(1),
        "max": vectors.max(1),
        "norm_mean": norms.mean(1),
        "mean_squared_norm": (norms**2).mean(1),
        "count_abs_gt_6": np.zeros((L, H)),
    }
    return {
        "indices": np.arange(1000, 1000 + N)[start:stop],
        "boards": boards,
        "layer_outputs": hidden,
        "labels/move_dir": (np.arange(N) % 4)[start:stop],
        "rmsnorm_gammas/final_ln": np.arange(H, dtype=np.float32),
        **{f"stats/layer_outputs/{name}": values for name, values in statistics.items()},
    }


def write(path, arrays, metadata):
    """Write a finished file by the layout of its format."""
    specs = [TensorSpec(name, array.dtype.name, array.shape) for name, array in arrays.items()]
    data = {name: np.ascontiguousarray(array).tobytes() for name, array in arrays.items()}
    crc32s = {name: zlib.crc32(content) for name, content in data.items()}
    digests = {name: Digest(0, crc32) for name, crc32 in crc32s.items()}
    metadata = {**metadata, "integrity": integrity_text(specs, metadata, digests)}
    layout = format_of(path).layout(specs, metadata, crc32s)
    content = bytearray(layout.size)
    for name, offset in layout.offsets.items():
        content[offset : offset + len(data[name])] = data[name]
    for offset, part in layout.skeleton:
        content[offset : offset + len(part)] = part
    path.write_bytes(content)
    return path


def shard_path(whole, number, count=3):
    return whole.with_name(f"{whole.stem}-{number:05}-of-{count:05}{whole.suffix}")


def write_shards(whole, numbers=(1, 2, 3), **changes):
    for number in numbers:
        start, stop = CUTS[number - 1 : number + 1]
        of_shard = {"shard": f"{number}/3", "first_board": str(start)}
        write(shard_path(whole, number), tensors(start, stop), METADATA | of_shard | changes)
    return whole


@pytest.fixture(params=[".safetensors", ".pt", ".npz"])
def whole(request, tmp_path):
    return write_shards(tmp_path / f"a{request.param}")


@pytest.fixture
def single(tmp_path):
    return write(tmp_path / "single.safetensors", tensors(), METADATA)


def test_every_read_is_as_from_one_file(whole, single):
    with warnings.catch_warnings(action="error"):
        acts, one = ActivationsFile(whole), ActivationsFile(single)
    assert len(acts) == N
    assert acts.keys() == one.keys()
    assert acts.paths == tuple(shard_path(whole, number) for number in (1, 2, 3))
    assert acts.metadata == {k: v for k, v in one.metadata.items() if k != "integrity"}
    assert repr(acts).startswith(f"ActivationsFile({whole.name}): 41 boards, ")
    rows = [40, 0, 14, 13, 28, 27, 40]
    for name in one.tensor_names():
        if not name.startswith("stats/"):
            assert torch.equal(acts.read(name, verify=True), one.read(name)), name
            assert acts.shape(name) == one.shape(name)
    assert torch.equal(
        acts.read("layer_outputs", rows, layer=3), one.read("layer_outputs", rows, layer=3)
    )
    np.testing.assert_array_equal(acts.labels["move_dir"], one.labels["move_dir"])
    ours, theirs = (list(each.cells("layer_outputs", 3, batch_size=50)) for each in (acts, one))
    for batch, expected in zip(ours, theirs, strict=True):
        assert torch.equal(batch.values, expected.values)
        assert torch.equal(batch.rows, expected.rows)
    loaded = acts.boards("layer_outputs", 0, labels="move_dir")[12:30]
    assert torch.equal(loaded[0], one.read("layer_outputs", slice(12, 30), layer=0))


@pytest.mark.parametrize("layer", [None, 3])
def test_statistics_cover_all_boards(whole, layer):
    found = ActivationsFile(whole).stats("layer_outputs", layer)
    assert set(found) == {each.name for each in STATISTICS}
    for name, values in found.items():
        expected = tensors()[f"stats/layer_outputs/{name}"]
        np.testing.assert_allclose(values, expected if layer is None else expected[1], rtol=1e-12)


def test_one_shard_by_its_own_name(whole):
    acts = ActivationsFile(shard_path(whole, 2))
    assert len(acts) == 14
    assert acts.indices.tolist() == [*range(1014, 1028)]
    assert acts.metadata["shard"] == "2/3"
    assert main([str(shard_path(whole, 2)), "--verify"]) == 0


def test_a_missing_shard_is_named(whole):
    shard_path(whole, 2).unlink()
    message = (
        r"a-00002-of-00003.* is missing: 2 of 3 shards are finished; run the same dump command"
    )
    for read in (ActivationsFile, inspect_dump):
        with pytest.raises(OutputError, match=message):
            read(whole)


def another_dtype(whole):
    arrays = tensors(*CUTS[2:])
    arrays["boards"] = arrays["boards"].astype(np.int64)
    write(shard_path(whole, 3), arrays, METADATA | {"shard": "3/3", "first_board": str(CUTS[2])})


def copy_second(whole, *place):
    shutil.copy(shard_path(whole, 2), shard_path(whole, *place))


DIFFERENT = {
    r"a-00003-of-00003.*-00001-.* their fingerprints differ": (
        lambda whole: write_shards(whole, [3], fingerprint="another")
    ),
    r"a-00003-of-00003.* is not shard 3/3 .* its shard is 2/3": lambda whole: copy_second(whole, 3),
    r"a-00003-of-00003.* is the last shard, at board 41 of 40": (
        lambda whole: write_shards(whole, n_samples="40")
    ),
    r"a-00001-of-00003.* and .*a-00002-of-00008.* are sh": lambda whole: copy_second(whole, 2, 8),
    r"a-00003-of-00003.* has other tensors than .*a-00001-of-00003": another_dtype,
}


@pytest.mark.parametrize("error", DIFFERENT)
def test_shards_of_different_dumps(tmp_path, error):
    whole = write_shards(tmp_path / "a.safetensors")
    DIFFERENT[error](whole)
    with pytest.raises(OutputError, match=error):
        ActivationsFile(whole)


def test_a_whole_file_next_to_shards_is_read_with_a_warning(whole):
    write(whole, tensors(0, 9), METADATA)
    with pytest.warns(DumpActivationsWarning, match="a-00001-of-00003.*out of date"):
        acts = ActivationsFile(whole)
    assert acts.paths == (whole,)


def test_inspection_lists_and_verifies_the_whole(whole, capsys):
    assert main([str(whole), "--verify", "--json", "--stats"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["file"] == str(whole)
    assert listed["boards"] == N
    assert listed["damaged"] == []
    digests = inspect_dump(whole).digests
    for name in ("layer_outputs", "boards", "rmsnorm_gammas/final_ln"):
        assert digests[name].crc32 == zlib.crc32(tensors()[name].tobytes())
    found = {tensor["key"]: tensor for tensor in listed["tensors"]}
    assert found["layer_outputs"]["shape"] == [N, L, 16, H]
    assert found["layer_outputs"]["bytes"] == 4 * N * L * 16 * H
    assert found["rmsnorm_gammas/final_ln"]["shape"] == [H]
    np.testing.assert_allclose(
        listed["stats"]["layer_outputs"]["mean"], tensors()["stats/layer_outputs/mean"]
    )


def test_damage_names_the_shard(whole, capsys):
    path = shard_path(whole, 2)
    content = bytearray(path.read_bytes())
    place = content.index(tensors(14, 28)["layer_outputs"].tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert main([str(whole), "--verify"]) == 1
    out, err = capsys.readouterr()
    assert err == f"error: {path} is damaged: layer_outputs\n"
    assert any("layer_outputs" in line and "DAMAGED" in line for line in out.splitlines())


@pytest.mark.parametrize("as_json", [False, True])
def test_unfinished_shards_show_progress(whole, capsys, as_json):
    partial = shard_path(whole, 2).with_name(f"{shard_path(whole, 2).name}.partial")
    shard_path(whole, 2).rename(partial)  # without a journal as yet
    assert main([str(whole), *["--json"] * as_json]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["unfinished"] == {"shards": 3, "shards_done": 2, "boards_done": 27}
    else:
        assert "2 of 3 shards are finished, 27 of 41 boards are on disk" in out
        assert f"{partial.name} is unfinished" in out
    assert main([str(whole), "--verify"]) == 1
    assert "a-00002-of-00003" in capsys.readouterr().err


def test_shards_compare_as_one_file(whole, single, capsys):
    assert main([str(whole), str(single)]) == 0
    assert "all 5 tensors are equal" in capsys.readouterr().out
    changed = tensors()
    changed["layer_outputs"][30, 1, 2, 3] += 2
    other = write(single.with_name("other.npz"), changed, METADATA)
    pairs = compare(inspect_dump(other), inspect_dump(whole), threads=2).tensors
    (pair,) = (pair for pair in pairs if not pair.is_equal)
    assert pair.name == "layer_outputs"
    assert (pair.difference.elements, pair.difference.place) == (1, (30, 1, 2, 3))


def test_indices_of_shards(whole):
    class Dataset:
        layout_sha256 = "0"

    np.testing.assert_array_equal(read_step_indices(whole, Dataset()), np.arange(1000, 1000 + N))


def test_a_report_of_shards(whole, tmp_path):
    report = tmp_path / "report.html"
    assert main([str(whole), "--report", str(report)]) == 0
    assert f"{N} boards" in report.read_text()


def test_computed_statistics_do_not_depend_on_shards(whole, single):
    dumps = (inspect_dump(whole), inspect_dump(single))
    (ours, theirs) = (compute_statistics(each, threads=2)["layer_outputs"] for each in dumps)
    for name, values in ours.items():
        assert values.tobytes() == theirs[name].tobytes()
        np.testing.assert_allclose(values, tensors()[f"stats/layer_outputs/{name}"], rtol=1e-12)
