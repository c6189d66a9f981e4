"""Files made to hurt: each ends in one line, within a second of the processor and 200 MB."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from faults.commands import CommandServer

LIMITS = {"RLIMIT_CPU": 1, "RLIMIT_DATA": 200 << 20}

HUGE = 99_000_000
"""Bytes of what should have some thousand."""


@pytest.fixture(scope="module")
def server():
    with CommandServer() as server:
        yield server


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def tensor(key: str, numel: int, shape: bytes) -> bytes:
    """Return the opcodes of a tensor of bytes; `shape` is the opcodes of a tuple."""
    storage = pickle.MARK + text("storage") + b"ctorch\nByteStorage\n" + text(key) + text("cpu")
    storage += pickle.BININT + struct.pack("<i", numel) + pickle.TUPLE + pickle.BINPERSID
    arguments = pickle.MARK + storage + b"K\0" + shape + b"K\1" + pickle.TUPLE1
    arguments += pickle.NEWFALSE + b"ccollections\nOrderedDict\n)R" + pickle.TUPLE
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + pickle.REDUCE


def dictionary(items: bytes) -> bytes:
    return b"\x80\x02}(" + items + b"u."


def write_pt(path: Path, data: bytes, storage_nbytes: int = 0) -> None:
    """Write an archive around a pickle; its one storage is of zeros, and sparse."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", b"")
    content = path.read_bytes()
    start = content.index(b"PK\1\2")
    directory = bytearray(content[start:])
    last = directory.rindex(b"PK\1\2")
    struct.pack_into("<2I", directory, last + 20, storage_nbytes, storage_nbytes)
    struct.pack_into("<I", directory, len(directory) - 6, start + storage_nbytes)
    with path.open("r+b") as file:
        file.seek(start + storage_nbytes)
        file.write(directory)


def write_safetensors(path: Path, header: Mapping[str, object] | bytes, nbytes: int = 0) -> None:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(file.tell() + nbytes)


def npy(shape: str, content: bytes, dtype: str = "|u1") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + content


def write_npz(path: Path, *members: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            archive.writestr(f"{name}.npy", content)


def digests(names: list[str]) -> str:
    return json.dumps({name: {"crc32": "0" * 8, "nan": 0, "inf": 0} for name in names})


def case(suffix: str) -> Callable[[Callable[[Path], None]], None]:
    return lambda make: CASES.append(pytest.param(suffix, make, id=make.__name__))


CASES: list = []


@case(".pt")
def keys_that_take_the_whole_stack_to_hash(path: Path) -> None:
    write_pt(path, dictionary(b")" + b"\x85" * 900_000 + b"N"))


@case(".pt")
def a_tensor_that_is_altered(path: Path) -> None:
    altered = tensor("0", 1, b"K\1\x85") + b"}(" + text("shape") + b"Nub"
    write_pt(path, dictionary(text("hidden") + altered), 1)


@case(".pt")
def a_pickle_of_empty_lists(path: Path) -> None:
    write_pt(path, b"\x80\x02" + b"]" * HUGE + b".")


@case(".pt")
def a_tensor_of_a_million_axes(path: Path) -> None:
    shape = b"(" + b"K\x09" * 400_000 + b"t"
    write_pt(path, dictionary(text("hidden") + tensor("0", 1, shape)), 1)


@case(".pt")
def tensors_in_one_storage(path: Path) -> None:
    names = [f"t{i}" for i in range(400)]
    nbytes = 1 << 30
    shape = pickle.BININT + struct.pack("<i", nbytes) + pickle.TUPLE1
    items = [text(name) + tensor("0", nbytes, shape) for name in names]
    items.append(text("metadata") + b"}" + text("integrity") + text(digests(names)) + b"s")
    write_pt(path, dictionary(b"".join(items)), nbytes)


@case(".safetensors")
def a_header_of_lists(path: Path) -> None:
    write_safetensors(path, b'{"a":[' + b"[]," * (HUGE // 3) + b"0]}")


@case(".safetensors")
def a_header_of_the_largest_size(path: Path) -> None:
    write_safetensors(path, b'{"a":[' + b'{"":[]},' * 262_000 + b"0]}")


@case(".safetensors")
def a_header_larger_than_the_file(path: Path) -> None:
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}


@case(".safetensors")
def a_shape_of_huge_axes(path: Path) -> None:
    write_safetensors(path, {"hidden": entry([10**4000] * 400, 0, 8)}, 8)


@case(".safetensors")
def a_tensor_before_the_data(path: Path) -> None:
    write_safetensors(path, {"hidden": entry([8], -8, 0)}, 8)


@case(".safetensors")
def overlapping_tensors(path: Path) -> None:
    names = [f"t{i}" for i in range(8000)]
    metadata = {"integrity": digests(names)}
    nbytes = 1 << 20
    entries = {name: entry([nbytes], 0, nbytes) for name in names}
    write_safetensors(path, {"__metadata__": metadata, **entries}, nbytes)


@case(".safetensors")
def a_digest_of_infinitely_many(path: Path) -> None:
    table = '{"hidden": {"crc32": "-1", "nan": Infinity, "inf": 1e999}}'
    metadata = {"integrity": table}
    write_safetensors(path, {"__metadata__": metadata, "hidden": entry([8], 0, 8)}, 8)


@case(".npz")
def repeated_members(path: Path) -> None:
    write_npz(path, *[("hidden", npy("8,", bytes(8)))] * 2)


@case(".npz")
def overlapping_members(path: Path) -> None:
    """Name one member 9,000 times in the directory."""
    write_npz(path, ("hidden", npy("8,", bytes(8))))
    content = path.read_bytes()
    start, count = content.index(b"PK\1\2"), 9000
    record, end = content[start:-22], bytearray(content[-22:])
    records = [record.replace(b"hidden", b"%06d" % i) for i in range(count)]
    struct.pack_into("<2H2I", end, 8, count, count, len(record) * count, start)
    path.write_bytes(content[:start] + b"".join(records) + end)


@case(".npz")
def a_member_that_holds_the_directory(path: Path) -> None:
    """Let the data of the only array reach into the directory behind it."""
    write_npz(path, ("hidden", npy("28,", bytes(8))))
    content = path.read_bytes()
    nbytes = len(npy("28,", bytes(8)))
    honest, grown = (struct.pack("<2I", size, size) for size in (nbytes, nbytes + 20))
    path.write_bytes(content.replace(honest, grown))


@case(".npz")
def a_directory_of_many_members(path: Path) -> None:
    record, count = b"PK\1\2".ljust(46, b"\0"), HUGE // 46
    nbytes = 46 * count
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, nbytes, 0)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, nbytes, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(record * count + end)


@case(".npz")
def metadata_that_inflates(path: Path) -> None:
    count = 24_000_000  # characters
    content = npy("", b"[\0\0\0]\0\0\0,\0\0\0" * (count // 3), f"<U{count}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.npy", content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("suffix", "make"), CASES)
def test_it_ends_soon_and_in_little_memory(server, tmp_path, suffix, make):
    path = tmp_path / f"x{suffix}"
    make(path)
    code, lines = server.run(
        [str(path), "--verify"], tmp_path / "log", command="inspect-activations", limits=LIMITS
    )
    assert code == 1, lines
    assert lines[-1].startswith((f"error: {path} is not a whole ", f"error: {path} is damaged"))
    # The limit of memory, where it is what ends it, shows as an error without a reason.
    assert not lines[-1].endswith(": ")
    assert "MemoryError" not in lines[-1]
    assert len(lines[-1]) < 500
