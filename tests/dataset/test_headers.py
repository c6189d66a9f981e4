"""Shard headers: NumPy's variety is read, and a hostile one is an error of one line."""

import numpy as np
import pytest

from dump_activations.dataset.dataset import StepsDataset
from dump_activations.errors import DatasetError
from reference.datasets import naive_boards


def write_shard(path, descr, *, order="False", shape="(5,)", version=1, rows=bytes(1000)):
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + rows)


@pytest.mark.parametrize(
    "descr",
    [
        "[('tile_65536_mask', '<u2'), ('', '|V3'), ('board', '<u8')]",
        "[('m', '<f4', (2, 3)), (('Board', 'board'), '<u8'), ('', '|V1')]",
        "[('n', [('x', '<u2'), ('', '|V2')], (3,)), ('u', '<U5'), ('board', '=u8')]",
        "[('t', '<M8[25us]'), ('exps', '|u1', 16), ('z', '|S0')]",
        "[(('board', 'x'), '<u4'), ('exps', 'u1', (16,))]",
        r"""[("it's", '<i2'), ('\x41\u00e9\\', 'float16'), ('board', '<u8')]""",
    ],
)
def test_variety_is_read_as_numpy_reads_it(descr, tmp_path):
    path = tmp_path / "steps.npy"
    write_shard(path, descr, rows=np.random.default_rng(0).bytes(1000))
    rows = np.load(path)
    ds = StepsDataset(tmp_path)
    assert ds.dtype == rows.dtype
    assert ds.read_rows(range(5)).tobytes() == rows.tobytes()
    np.testing.assert_array_equal(ds.read_boards(range(5)), naive_boards(rows))


@pytest.mark.parametrize(
    "variety", [{"order": "True"}, {"shape": "(5L,)"}, {"shape": "( 5 , )"}, {"version": 3}]
)
def test_harmless_headers(variety, tmp_path):
    write_shard(tmp_path / "steps.npy", "[('board', '<u8')]", **variety)
    assert len(StepsDataset(tmp_path)) == 5


@pytest.mark.parametrize(
    ("descr", "text"),
    [
        ("'<u8'", "must have named fields; got uint64"),
        ("'|O'", "pickled Python objects"),
        ("[('board', '<u8'), ('x', [('y', 'O')])]", "pickled Python objects"),
        ("[]", "must have 'board' or 'exps'; got no fields"),
        ("[('a', '<u8'), ('', '|V2'), ('b', '|u1')]", "got 'a', 'b'"),
        ("[(('board', 'x'), '<u8')]", "got 'x'"),
        (r"[('a\nb', '<u8')]", r"got 'a\\nb'"),
        (r"[('\ud800', '<u8'), ('board', '<u8')]", "NumPy refuses its dtype"),
        ("[('board', '>u8')]", "field 'board' must be little-endian uint64; got >u8"),
        ("[('board', '<i8')]", "field 'board' must be .* got int64"),
        ("[('board', '<u8', (2,))]", "field 'board' must be"),
        ("[('board', [('x', '<u8')])]", "field 'board' must be"),
        ("[('board', '<u8'), ('tile_65536_mask', '>u2')]", "field 'tile_65536_mask' must be"),
        ("[('exps', '|u1', (4, 4))]", "field 'exps' must be"),
        ("[('board', '<u8'), ('board', '<u8')]", "NumPy refuses its dtype"),
        ("[('board', '<u8'), ('x', '<u3')]", "NumPy refuses its dtype"),
        ("[('board', '<u8'), ('x', '|u1', (4294967296, 4294967296))]", "NumPy refuses its dtype"),
        ("[('board',)]", "NumPy refuses its dtype"),
        ("[('board', 8)]", "NumPy refuses its dtype"),
        ("['board']", "NumPy refuses its dtype"),
        ("[('board', '<u8'), ('x', '|u1', (1048569,))]", "at most 1048576 bytes; got 1048577"),
        (f"[('board', '<u8'), ('x', '|u1', ({'9' * 5000},))]", "NumPy refuses its dtype"),
        (f"'{'(' * 30000}u1'", "NumPy refuses its dtype"),
        (f"[{'(' * 30000}]", "must be a dict of descr"),
        ("__import__('os')", "must be a dict of descr"),
        (f"-{'-' * 30000}1", "must be a dict of descr"),
    ],
)
def test_refused_dtypes(descr, text, tmp_path):
    write_shard(tmp_path / "steps.npy", descr)
    with pytest.raises(DatasetError, match=rf"steps\.npy: .*{text}") as caught:
        StepsDataset(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("rows", [126, 2**63, 2**64 - 1])
def test_shapes_larger_than_the_file(rows, tmp_path):
    write_shard(tmp_path / "steps.npy", "[('board', '<u8')]", shape=f"({rows},)")
    with pytest.raises(DatasetError, match=rf"steps\.npy: truncated: .* promises {rows} rows"):
        StepsDataset(tmp_path)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ("[('exps', '|u1', (16,))]", "'exps', but the rows of .* have 'board' without"),
        ("[('board', '<u8'), ('tile_65536_mask', '<u2')]", "'board' with 'tile_65536_mask', but"),
    ],
)
def test_shards_whose_boards_differ(other, text, tmp_path):
    write_shard(tmp_path / "steps-0.npy", "[('board', '<u8')]")
    write_shard(tmp_path / "steps-1.npy", other)
    with pytest.raises(DatasetError, match=rf"steps-1\.npy: its rows have {text}"):
        StepsDataset(tmp_path)
