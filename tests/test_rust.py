"""The extension's own interface, which trusts no caller."""

import numpy as np

from dump_activations._rust import Pool
from reference.pools import make_pool


def test_every_shard_says_what_its_rows_are(tmp_path):
    packed = make_pool(tmp_path / "packed", "packed_46", n=10).rows
    aligned = make_pool(tmp_path / "aligned", "aligned_48", n=10).rows
    for name, rows in [("steps-0", packed), ("steps-1", aligned), ("steps-2", packed)]:
        np.save(tmp_path / f"{name}.npy", rows)
    pool = Pool(tmp_path)
    assert pool.descrs == [str(rows.dtype.descr) for rows in (packed, aligned, packed)]
    assert pool.descrs[0] == pool.descr
