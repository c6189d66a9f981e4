"""The extension's own interface, which trusts no caller: wrong arguments are exceptions."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dump_activations import _rust
from dump_activations.dataset.shards import read_layout
from reference.datasets import make_dataset

ROWS = 10
STEPS = np.array([0, 1, 2])
DATA = np.zeros(1 << 20, np.uint8)


def u8(*shape):
    return np.empty(shape, np.uint8)


def shared(dtype, count):
    """Return unaligned integers."""
    return np.frombuffer(bytearray(count * np.dtype(dtype).itemsize + 1), dtype, count, 1)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """Return the names that calls use."""
    path, mixed = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("mixed")
    make_dataset(path, "packed_46", n=ROWS)
    for number, layout in enumerate(["packed_46", "aligned_48"]):
        rows = make_dataset(mixed / layout, layout, n=3).rows
        np.save(mixed / f"steps-{number}.npy", rows)
    dataset = _rust.Dataset(path, ["steps.npy"], read_layout)
    names = {
        "path": path,
        "fd": os.open(path / "span", os.O_RDWR | os.O_CREAT),
        "others": [os.open(path, os.O_RDONLY), *os.pipe(), -1, -(2**31), 2**31 - 1],
        "dataset": dataset,
        "mixed": _rust.Dataset(mixed, ["steps-0.npy", "steps-1.npy"], read_layout),
        "selection": _rust.Selection(dataset, [[(0, 4), (25, 1)]]),
        "open_with": lambda *layout: _rust.Dataset(path, ["steps.npy"], lambda *_: layout),
    }
    return {**globals(), **names}


def scan(rows="(0, 3)", scratch="u8(46)", boards="u8(3, 16)", out="[u8(3, 4), u8(3, 1)]"):
    return f"selection.scan({rows}, {scratch}, {boards}, {out})"


CALLS = [
    *(f"_rust.Dataset({each}, ['steps.npy'], read_layout)" for each in ("None", "'a\\0b'", "'no'")),
    *(f"_rust.Dataset(path, {each}, read_layout)" for each in ("'a'", "[]", "[1]", "['a\\0b']")),
    *(
        f"open_with({layout})"
        for layout in [
            *("46, 8, 20", "46, None, None, None", "46, 39, None, None", "46, None, None, 31"),
            *("46, 8, 45, None", "-1, 8, 20, None", "2**63, 8, 20, None", "46, 2**32, None, None"),
        ]
    ),
    *(
        f"dataset.read_{what}({arguments})"
        for what, width in [("boards", 16), ("rows", 46)]
        for arguments in [
            *(
                f"{steps}, u8(3, {width})"
                for steps in [
                    *("STEPS.astype(np.int32)", "STEPS.astype('>i8')", "STEPS[:, None]"),
                    *("np.arange(6)[::2]", "shared(np.int64, 3)", "np.array([0, -1, 2])"),
                    *("np.array([0, ROWS, 2])", "np.array([0, 2**63 - 1, -(2**63)])"),
                ]
            ),
            *(
                f"STEPS, {out}"
                for out in [
                    *(f"np.empty((3, {width}), np.int8)", f"u8(4, {width})", f"u8(3, {width - 1})"),
                    *("u8(3, 0)", f"u8({3 * width})", f"u8(6, {width})[::2]", f"u8({width}, 3).T"),
                    f"read_only(u8(3, {width}))",
                ]
            ),
            f"DATA[:24].view(np.int64), DATA[: 3 * {width}].reshape(3, {width})",
        ]
    ),
    "selection.read(STEPS, u8(3, 20))",
    *(
        f"_rust.Selection({fields})"
        for fields in [
            *("dataset, []", "dataset, [[], []]", "dataset, [[(0, 47)]]", "dataset, [[(46, 1)]]"),
            *("dataset, [[(-1, 2)]]", "dataset, [[(0, 2**32)]]", "mixed, [[(0, 4)]]"),
            *("mixed, [[(0, 4)], []]", "mixed, [[(0, 4)], [(0, 2)]]"),
            "mixed, [[(44, 4)], [(0, 4)]]",
        ]
    ),
    *(scan(rows) for rows in ("(8, 11)", "(2**64 - 2, 2**64 - 1)", "(-1, 2)", "(0, 2)")),
    scan("(3, 0)", boards="u8(0, 16)", out="[u8(0, 4), u8(0, 1)]"),
    scan(boards="u8(3, 15)"),
    *(
        scan(out=f"[{out}]")
        for out in [
            *("u8(3, 4)", "u8(3, 4), u8(3, 1), u8(3, 1)", "u8(3, 1), u8(3, 4)", "u8(12), u8(3, 1)"),
            *("u8(4, 3).T, u8(3, 1)", "u8(3, 8)[:, ::2], u8(3, 1)"),
            "DATA[:12].reshape(3, 4), DATA[9:12, None]",
        ]
    ),
    *(
        scan("(0, 3)", scratch)
        for scratch in ("u8(45)", "np.empty(99, np.int8)", "u8(99)[::2]", "read_only(u8(99))")
    ),
    *(
        f"_rust.shuffle_tail({numbers}, np.empty({n}, np.int64))"
        for numbers, n in [
            *[("4, 1, 1", 5), ("0, 1, 1", 1), ("2**63, 1, 1", 1), ("2**64 - 1, 1, 1", 1)],
            *[("10**12, 1, 1", 5), ("9, -1, 1", 3), ("9, 1, 2**128", 3)],
        ]
    ),
    *(
        f"_rust.shuffle_tail(9, 1, 1, {out})"
        for out in [
            *("np.empty(2)", "np.empty((2, 1), np.int64)", "np.empty(2, '>i8')"),
            *("np.empty(4, np.int64)[::2]", "read_only(np.empty(2, np.int64))"),
            "shared(np.int64, 2)",
        ]
    ),
    *(
        f"_rust.write_span(fd, None, 0, {data})"
        for data in [
            *["b'bytes', 'uint8'", "np.empty(4, np.int8), 'uint8'", "u8(2, 2), 'uint8'"],
            *["u8(4)[::2], 'uint8'", "u8(4), 'float128'", "u8(4), '<f4'"],
        ]
    ),
    *(
        call.format(offset)
        for offset in (-1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 0.0)
        for call in [
            "_rust.write_span(fd, None, {}, DATA[:4], 'uint8')",
            "_rust.write_span(fd, fd, {}, DATA, 'uint8')",
            "_rust.digest_span(fd, {}, 4, 'uint8')",
            "_rust.digest_span(fd, 4, {}, 'uint8')",
        ]
    ),
    *(f"_rust.reserve(fd, {size})" for size in (-1, 2**63, 2**64, 0.0)),
    *(
        call.format(at)
        for at in range(6)
        for call in [
            "_rust.digest_span(others[{}], 0, 4, 'uint8')",
            "_rust.write_span(others[{}], None, 0, DATA[:4], 'uint8')",
            "_rust.reserve(others[{}], 4)",
        ]
    ),
    *(f"_rust.write_span(fd, others[{at}], 0, DATA, 'uint8')" for at in (3, 4, 5)),
]


@pytest.mark.parametrize("call", CALLS)
def test_wrong_calls(call, scope):
    with pytest.raises((TypeError, ValueError, IndexError, OverflowError, OSError)):
        eval(call, scope)


def test_what_wrong_calls_are_told(scope):
    for call, text in {
        scan(out="[DATA[:12].reshape(3, 4), DATA[9:12, None]]"): "borrowed",
        "_rust.digest_span(-1, 0, 4, 'uint8')": "Bad file descriptor",
        "dataset.read_boards(STEPS, u8(4, 16))": r"shape \[3, 16\]; got shape \[4, 16\]",
    }.items():
        with pytest.raises((ValueError, OSError), match=text):
            eval(call, scope)
    _rust.Selection(scope["mixed"], [[(0, 4)], [(44, 4)]])


LITTLE_MEMORY = """
    import resource
    import sys
    from pathlib import Path

    import numpy as np
    from dump_activations import _rust
    from dump_activations.dataset.shards import read_layout
    from dump_activations.errors import DatasetError

    def leave(megabytes):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (megabytes << 20),) * 2)

    indices, out = np.zeros(1 << 24, np.int64), np.empty((1 << 24, 16), np.uint8)
    sample = np.empty(30_000_000, np.int64)
    dataset = _rust.Dataset(sys.argv[1], ["steps.npy"], read_layout)
    leave(int(sys.argv[2]))
    try:
        {call}
    except (MemoryError, DatasetError) as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("call", "megabytes", "text"),
    [
        ("_rust.shuffle_tail(10**9, 1, 1, sample)", 64, "cannot sample: "),
        ("dataset.read_boards(indices, out)", 64, "{path}: its rows cannot be read: "),
        ("dataset.read_boards(indices, out)", 160, "{path}: its rows cannot be read: "),
    ],
)
def test_too_little_memory(call, megabytes, text, tmp_path):
    make_dataset(tmp_path, "packed_46", n=ROWS)
    code = textwrap.dedent(LITTLE_MEMORY).format(call=call)
    command = [sys.executable, "-c", code, os.fspath(tmp_path), str(megabytes)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text.format(path=tmp_path) + "not enough memory for ")
    assert done.stdout.count("\n") == 1
