"""Options as a run has them, and wrong ones."""

import numpy as np
import pytest
import torch

from dump_activations.errors import InvalidArgumentError
from dump_activations.pipeline.options import DumpOptions, StreamOptions


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        *(("shard_size", given, 1500) for given in (1500, "1500", "1500 B", "1.5kB", " 1.5 kB ")),
        *[("shard_size", "2MB", 2 * 10**6), ("shard_size", "4GB", 4 * 10**9)],
        *[("shard_size", "1TB", 10**12), ("shard_size", None, None)],
        *[("shards", 3, range(3, 4)), ("shards", "1-20", range(1, 21))],
        *[("shards", range(2, 4), range(2, 4)), ("steps", "5:9", slice(5, 9))],
        *(("layers", given, (-1,)) for given in (-1, [-1], "-1", np.int64(-1))),
        *(("layers", given, (0, 1)) for given in ([0, 1], (0, 1), "0,1", range(2), np.arange(2))),
        *(("layers", given, (slice(2),)) for given in (slice(2), [slice(2)], ":2")),
        *[("dtype", torch.float16, "fp16"), ("dtype", torch.bfloat16, "bf16")],
        *[("outputs", "all", ("*",)), ("outputs", "pooled,attn_*", ("pooled", "attn_*"))],
        *(("device", given, given) for given in ("cuda", "cuda:0", "cuda:12")),
        *(("labels", given, ("a", "b")) for given in ("a,b", ["a", "b"], "a, b,a")),
    ],
)
def test_values(name, given, value):
    assert getattr(DumpOptions(**{name: given}), name) == value


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("steps", given) for given in ("::-1", "5:1:-1", slice(None, None, -1), ":x", "1", 1.5)),
        *(("steps", given) for given in ("1:2:3:4", "::0", 5)),
        *(("layers", given) for given in (0.5, "", "x", [], [0.5], "0:4:0")),
        *[
            ("progress", 3),
            ("n_samples", None),
            ("dtype", ["fp32"]),
            ("dtype", torch.int8),
            ("precision", None),
        ],
        *[("outputs", [1]), ("outputs", None), ("device", "cuda:"), ("device", "cpu:0")],
        *(("shards", given) for given in (True, range(3), range(2, 2), range(1, 9, 2))),
        *(("shards", given) for given in ("1-2-3", "2x", "0-3", "3-1", "-1")),
        *(("shard_size", given) for given in (True, 0.5, "1 kilobyte", -3)),
    ],
)
def test_wrong_values(name, given):
    with pytest.raises(InvalidArgumentError, match=name):
        DumpOptions(**{name: given})


def test_where_a_streams_tensors_are():
    with pytest.raises(InvalidArgumentError, match="'mine' is not one of copy, view, device"):
        StreamOptions(tensors="mine")
