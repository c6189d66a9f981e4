"""Dumps and streams with labels, filters and ranges, in all formats and resumed."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from dump_activations import StepsDataset, dump, load_encoder, stream
from dump_activations.errors import DumpActivationsNote, IndicesError, OutputError
from reference.datasets import read_dataset
from reference.dumps import FORMATS, read_dump

pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

on_cpu = {"device": "cpu", "allow_cpu": True, "outputs": ["pooled"], "batch_size": 64}
cpu_dump = partial(dump, **on_cpu)
cpu_stream = partial(stream, **on_cpu)

NAMES = ["move_dir", "branch_evs", "run_id", "merges", "run_seed"]


@pytest.fixture(scope="module")
def model(demo_checkpoint):
    return load_encoder(demo_checkpoint)


@pytest.fixture(scope="module")
def rows(demo_dataset):
    return read_dataset(demo_dataset)


def assert_labelled(result, ds, indices):
    """Compare the labels of fields with NumPy's reading, and derived ones with the dataset's."""
    np.testing.assert_array_equal(result.numpy("indices"), indices)
    np.testing.assert_array_equal(result.numpy("boards"), ds.read_boards(indices))
    rows = read_dataset(ds.path)[indices]
    dtypes = {"move_dir": torch.uint8, "branch_evs": torch.float32, "run_id": torch.int64}
    for name, dtype in dtypes.items():
        assert result.tensors[f"labels/{name}"].dtype == dtype
        np.testing.assert_array_equal(result.numpy(f"labels/{name}"), rows[name])
    for name, values in ds.read_labels(indices, "merges,run_seed").items():
        np.testing.assert_array_equal(result.numpy(f"labels/{name}"), values)


@pytest.mark.parametrize("suffix", FORMATS)
def test_labels_lie_next_to_the_boards(suffix, model, demo_dataset, rows, tmp_path):
    path = tmp_path / f"a{suffix}"
    where = "max_rank >= 10 and run_id % 3 != 0"
    cpu_dump(model, demo_dataset, path, n_samples=300, seed=5, labels=",".join(NAMES), where=where)
    result = read_dump(path)
    matches = np.flatnonzero((rows["max_rank"] >= 10) & (rows["run_id"] % 3 != 0))
    expected = np.random.default_rng(5).choice(matches, 300, replace=False)
    assert_labelled(result, StepsDataset(demo_dataset), expected)
    labels = {f"labels/{name}" for name in NAMES}
    assert set(result.tensors) == {"pooled", "indices", "boards", *labels}
    metadata = result.metadata
    assert (metadata["labels"], metadata["where"]) == (",".join(NAMES), where)
    assert (metadata["sampling"], "steps" in metadata) == ("without replacement", False)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "selection",
    [
        {"steps": "100:900:3"},
        {"steps": slice(None, 700), "where": "step_index % 2 == 1"},
        {"n_samples": 400, "where": "max_rank < 8"},
    ],
)
def test_a_resumed_dump_is_that_of_an_unbroken_run(
    suffix, selection, model, demo_dataset, tmp_path
):
    class StopError(Exception):
        pass

    def stop(done, _of):
        if done >= 128:
            raise StopError

    whole, broken = tmp_path / f"whole{suffix}", tmp_path / f"broken{suffix}"
    cpu_dump(model, demo_dataset, whole, labels=NAMES, **selection)
    with pytest.raises(StopError):
        cpu_dump(model, demo_dataset, broken, labels=NAMES, progress=stop, **selection)
    with pytest.raises(OutputError, match="labels"):
        cpu_dump(model, demo_dataset, broken, labels=NAMES[1:], **selection)
    summary = cpu_dump(model, demo_dataset, broken, labels=NAMES, **selection)
    assert summary.resumed_boards >= 64
    assert broken.read_bytes() == whole.read_bytes()
    assert_labelled(read_dump(whole), StepsDataset(demo_dataset), read_dump(whole).numpy("indices"))


@pytest.mark.parametrize("changed", ["move_dir", "boards"])
def test_a_dataset_that_changed_is_not_resumed_from(changed, model, rows, tmp_path):
    def stop(done, _of):
        if done >= 128:
            raise KeyboardInterrupt

    (tmp_path / "dataset").mkdir()
    np.save(tmp_path / "dataset" / "steps.npy", rows)
    run = partial(cpu_dump, model, tmp_path / "dataset", tmp_path / "a.pt", n_samples=300)
    with pytest.raises(KeyboardInterrupt):
        run(labels="move_dir", progress=stop)
    others = rows[::-1].copy()
    if changed == "move_dir":
        others = rows.copy()
        others["move_dir"] += 1
    np.save(tmp_path / "dataset" / "steps.npy", others)
    with pytest.raises(OutputError, match="holds other boards"):
        run(labels="move_dir")
    np.save(tmp_path / "dataset" / "steps.npy", rows)
    assert run(labels="move_dir").resumed_boards > 0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (":", range(14138)),
        ("14000:", range(14000, 14138)),
        ("-7::2", range(14131, 14138, 2)),
        (slice(3, 10**12, 5000), range(3, 14138, 5000)),
    ],
)
def test_ranges_come_in_their_order(steps, expected, model, demo_dataset, tmp_path):
    options = on_cpu | {"batch_size": 1024, "outputs": "rmsnorm_gammas", "n_samples": 3}
    dump(model, demo_dataset, tmp_path / "a.npz", steps=steps, **options)
    result = read_dump(tmp_path / "a.npz")
    np.testing.assert_array_equal(result.numpy("indices"), expected)
    text = f"{expected.start}:{expected.stop}:{expected.step}"
    assert result.metadata["sampling"] == f"steps {text}"
    assert result.metadata["steps"] == text
    assert result.metadata["n_samples"] == str(len(expected))


def test_where_the_indices_come_from(model, demo_dataset, tmp_path):
    ds = StepsDataset(demo_dataset)

    def source(**options):
        cpu_dump(model, ds, tmp_path / "a.pt", overwrite=True, **options)
        return read_dump(tmp_path / "a.pt").metadata["sampling"]

    assert source(indices=[3, 4.0]) == "given"
    assert source(steps="1:4", where="max_rank > 0") == "steps 1:4:1"
    with pytest.warns(UserWarning, match="9 rows that match the filter, .* sampled with"):
        assert source(n_samples=10, where="max_rank < 2") == "with replacement"


def test_streamed_batches_have_labels(model, demo_dataset, rows):
    batches = list(cpu_stream(model, demo_dataset, steps="5:300:2", labels=NAMES))
    assert [len(batch.boards) for batch in batches] == [64, 64, 20]
    indices = np.concatenate([batch.indices for batch in batches])
    np.testing.assert_array_equal(indices, range(5, 300, 2))
    for name in ("move_dir", "branch_evs"):
        values = np.concatenate([batch.labels[name] for batch in batches])
        np.testing.assert_array_equal(values, rows[name][indices])
    assert list(batches[0].labels) == NAMES
    assert next(cpu_stream(model, demo_dataset, n_samples=2)).labels == {}


def test_scans_report_rows_apart_from_boards(model, demo_dataset):
    reports = []
    options = {"n_samples": 5, "scan_progress": lambda done, of: reports.append((done, of))}
    cpu_dump(model, demo_dataset, write=False, where="max_rank > 3", **options)
    assert reports[-1] == (14138, 14138)


def test_wrong_selections(model, demo_dataset, tmp_path):
    for options in ({"steps": ":", "where": "max_rank > 99"}, {"where": "max_rank > 99"}):
        with pytest.raises(IndicesError, match="no row of"):
            cpu_dump(model, demo_dataset, tmp_path / "a.pt", **options)
    assert list(tmp_path.iterdir()) == []


def test_not_finite_labels_are_counted_and_no_cause_for_a_warning(
    model, demo_dataset, rows, tmp_path, recwarn
):
    rows = rows[:40].copy()
    rows["branch_evs"][7] = [np.nan, np.inf, -np.inf, 0]
    np.save(tmp_path / "steps.npy", rows)
    options = {"steps": ":", "labels": "branch_evs"}
    made = cpu_dump(model, tmp_path, tmp_path / "a.pt", **options)
    again = cpu_dump(model, tmp_path, tmp_path / "a.pt", **options)
    assert made.nonfinite == again.nonfinite == {}
    counts = json.loads(read_dump(tmp_path / "a.pt").metadata["integrity"])["labels/branch_evs"]
    assert (counts["nan"], counts["inf"]) == (1, 2)
    assert not [each for each in recwarn if each.category is not DumpActivationsNote]
