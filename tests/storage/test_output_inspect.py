"""`inspect-activations`: its listings, the damage it finds, and files that are not dumps."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dump_activations.commands.inspect import main
from dump_activations.errors import OutputError
from dump_activations.storage.formats.pt import load_pickle
from dump_activations.storage.reading import damage as reading
from dump_activations.storage.reading.damage import find_damage
from dump_activations.storage.reading.dump_files import inspect_dump
from output_support import (
    SUFFIXES,
    open_file,
    small_dump,
    write_batches,
    write_dump,
)

DUMP = small_dump()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("files")
    return {suffix: write_dump(directory / f"x{suffix}", DUMP) for suffix in SUFFIXES}


def damage(path: Path) -> list[str] | OutputError:
    try:
        return find_damage(inspect_dump(path), threads=2)[path]
    except OutputError as error:
        caught = error
    assert "\n" not in str(caught)
    assert str(path) in str(caught)
    return caught


def nonfinite(data: np.ndarray, dtype: str) -> dict[str, int]:
    values = data.view(dtype)
    return {"nan": int(np.isnan(values).sum()), "inf": int(np.isinf(values).sum())}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_json_lists_tensors_and_metadata(files, capsys, suffix):
    assert main([str(files[suffix]), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["bytes"] == files[suffix].stat().st_size
    assert {tensor["key"]: tensor for tensor in listed["tensors"]} == {
        spec.name: {
            "key": spec.name,
            "group": "boards" if spec.name in ("boards", "indices") else "activations",
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "bytes": spec.nbytes,
            **nonfinite(DUMP.data[spec.name], spec.dtype),
        }
        for spec in DUMP.specs
    }
    assert listed["metadata"].items() >= {**DUMP.metadata, "seed": 0}.items()
    assert "damaged" not in listed


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("nbytes", [reading.READ_NBYTES, 40])
def test_an_undamaged_file_passes(files, capsys, monkeypatch, suffix, nbytes):
    monkeypatch.setattr(reading, "READ_NBYTES", nbytes)  # at a time, per thread
    assert main([str(files[suffix]), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []
    assert main([str(files[suffix]), "--verify"]) == 0
    table, errors = capsys.readouterr()
    assert errors == ""
    for spec in DUMP.specs:
        assert any(spec.name in line and "ok" in line for line in table.splitlines()), spec


@settings(max_examples=300)
@given(st.sampled_from(SUFFIXES), st.data())
def test_a_damaged_byte_in_a_tensor_is_found_there(files, suffix, data):
    tensor = data.draw(st.sampled_from([*inspect_dump(files[suffix]).tensors.values()]))
    content = bytearray(files[suffix].read_bytes())
    place = tensor.offset + data.draw(st.integers(0, tensor.nbytes - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    with copied(files[suffix], content) as path:
        assert damage(path) == [tensor.name]


@st.composite
def changed(draw, content: bytes) -> bytes:
    """Change a byte anywhere, or bytes where formats have their headers, or the length."""
    found = bytearray(content)
    match draw(st.sampled_from(["byte", "bytes", "length"])):
        case "byte":
            found[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
        case "bytes":
            for _ in range(draw(st.integers(1, 5))):
                place = draw(st.integers(0, 1200)) * draw(st.sampled_from([1, -1]))
                junk = draw(st.binary(max_size=9))
                found[place : place + draw(st.integers(0, 9)) or len(found)] = junk
        case "length":
            found = draw(
                st.sampled_from(
                    [content[: draw(st.integers(0, len(content) - 1))], content + b"\0"]
                )
            )
    return bytes(found)


@settings(max_examples=600)
@given(st.sampled_from(SUFFIXES), st.data())
def test_any_change_is_found(files, suffix, data):
    content = files[suffix].read_bytes()
    found = data.draw(changed(content))
    with copied(files[suffix], found) as path:
        assert (damage(path) == []) == (found == content)


@contextmanager
def copied(path: Path, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / path.name
        copy.write_bytes(content)
        yield copy


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_digests_say_nothing_of_the_tensors(files, capsys, suffix):
    encoded = "crc32".encode("utf-32-le" if suffix == ".npz" else "ascii")
    content = bytearray(files[suffix].read_bytes())
    content[content.rindex(encoded)] ^= 1
    with copied(files[suffix], content) as path:
        assert main([str(path), "--verify"]) == 1
        table, errors = capsys.readouterr()
        assert errors == f"error: {path} is damaged: integrity\n"
        rows = {line.split()[0]: line.split()[-1] for line in table.splitlines() if line}
        assert {rows[spec.name] for spec in DUMP.specs} == {"unknown"}


WRONG_CALLS = [[], ["x.pt", "y.pt"], ["x.pt", "--verfy"], ["x.bin"], ["y.npz.partial"]]
WRONG_FILES = [["missing.pt"], ["directory.npz"], ["text.safetensors", "--json"]]
WRONG_FILES += [[f"{kind}{suffix}"] for kind in ("empty", "unfinished") for suffix in SUFFIXES]


@pytest.mark.parametrize(
    ("arguments", "code"), [*((w, 2) for w in WRONG_CALLS), *((w, 1) for w in WRONG_FILES)]
)
def test_wrong_calls_and_files_end_in_one_line(tmp_path, monkeypatch, capsys, arguments, code):
    monkeypatch.chdir(tmp_path)
    Path("directory.npz").mkdir()
    for suffix in SUFFIXES:
        Path(f"empty{suffix}").touch()
        with open_file(Path(f"x{suffix}"), DUMP) as file:
            write_batches(file, DUMP, DUMP.first_rows)
        shutil.copy(f"x{suffix}.partial", f"unfinished{suffix}")
        Path(f"text{suffix}").write_text("a text is no dump\n" * 20)
    assert main(arguments) == code
    output, errors = capsys.readouterr()
    assert output == ""
    assert len(errors.splitlines()) == 1
    if len(arguments) == 1:
        assert arguments[0] in errors


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("when", ["_rust.digest_span", "integrity_text"])
def test_a_file_cut_short_while_it_is_verified(tmp_path, monkeypatch, suffix, when):
    """The cut comes before the first tensor is read, or after the last, before the skeleton."""
    path = write_dump(tmp_path / f"x{suffix}", DUMP)
    read = attrgetter(when)(reading)
    cut_then_read = lambda *arguments: (os.truncate(path, 100), read(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(f"{reading.__name__}.{when}", cut_then_read)
    result = damage(path)
    assert isinstance(result, OutputError) or "structure" in result


def test_files_of_other_writers_are_listed_but_not_verified(tmp_path, capsys):
    tensors = {"hidden": torch.randn(3, 4), "indices": torch.arange(3)}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    metadata = {"checkpoint": "there"}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    torch.save({**tensors, "metadata": metadata}, tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", **arrays, metadata=json.dumps(metadata))
    np.savez_compressed(tmp_path / "d.npz", **arrays, metadata=json.dumps(metadata))
    for name in ("a.safetensors", "b.pt", "c.npz", "d.npz"):
        path = str(tmp_path / name)
        assert main([path, "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        found = {t["key"]: (t["dtype"], t["shape"], t["bytes"]) for t in listed["tensors"]}
        assert found == {"hidden": ("float32", [3, 4], 48), "indices": ("int64", [3], 24)}
        assert listed["metadata"] == metadata
        assert main([path, "--verify"]) == 1
        assert capsys.readouterr().err == f"error: {path} carries no digests to verify it by\n"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_neither_listing_nor_verifying_imports_torch(files, suffix):
    script = f"""
import sys
from dump_activations.commands.inspect import main
assert main([{str(files[suffix])!r}, "--verify", "--json"]) == 0
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    torch.save({"hidden": Exploit(), "metadata": {}}, path)
    error = damage(path)
    assert isinstance(error, OutputError)
    assert "its data.pkl is not a dict of tensors" in str(error)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "data",
    [
        pickle.EMPTY_DICT + pickle.PUT + b"4294967295\n" + pickle.STOP,
        pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little") + pickle.STOP,
        pickle.BINUNICODE8 + (1 << 40).to_bytes(8, "little") + pickle.STOP,
        pickle.EMPTY_LIST + pickle.STOP,
        pickle.EMPTY_DICT,
        pickle.dumps({"hidden": [1, 2]}),
        b"",
    ],
)
def test_a_hostile_pickle_is_refused_within_little_memory(data):
    with pytest.raises(ValueError, match=r"data\.pkl|entry 'hidden' is not a tensor"):
        load_pickle(data)


def test_members_that_are_not_plain_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, hidden=np.array([{}], dtype=object))
    assert "holds objects" in str(damage(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hidden.npy", b"no array at all")
    assert "is not an array" in str(damage(path))
    np.savez(path, hidden=np.ones(3))
    content = zipfile.ZipFile(path).read("hidden.npy")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("hidden", content)
    assert "two arrays hidden" in str(damage(path))


def test_files_that_cannot_be_verified(files, tmp_path):
    torch.save({"hidden": torch.rand(3, 4).T}, tmp_path / "x.pt")
    assert "a tensor that is a view of another" in str(damage(tmp_path / "x.pt"))
    with np.load(files[".npz"]) as arrays:
        np.savez_compressed(tmp_path / "x.npz", **arrays)
    assert damage(tmp_path / "x.npz") == ["integrity"]
