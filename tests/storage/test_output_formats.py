"""Files of every format, opened by their ordinary readers and tools."""

import io
import json
import pickle
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.errors import InvalidArgumentError
from dump_activations.storage.digests import Digest, integrity_text, parse_integrity
from dump_activations.storage.formats.pt import dump_pickle
from dump_activations.storage.formats.registry import FORMATS, format_of
from output_support import SUFFIXES, dumps, make_dump, small_dump, write_dump
from reference.dumps import read_dump

NUMPY_DTYPES = [dtype for dtype in DTYPES if dtype != "bfloat16"]
SUFFIX_AND_DUMP = st.sampled_from(SUFFIXES).flatmap(
    lambda suffix: st.tuples(st.just(suffix), dumps(NUMPY_DTYPES) if suffix == ".npz" else dumps())
)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


@given(SUFFIX_AND_DUMP, st.randoms(), st.integers(1, 4))
def test_the_ordinary_reader_finds_every_tensor(drawn, random, threads):
    suffix, dump = drawn
    order = list(dump.first_rows)
    random.shuffle(order)
    with tempfile.TemporaryDirectory() as directory:
        path = write_dump(Path(directory) / f"x{suffix}", dump, order=order, threads=threads)
        found = read_dump(path)
        tensors, metadata = found.tensors, dict(found.metadata)
        mapped = torch.load(path, weights_only=True, mmap=True) if suffix == ".pt" else tensors
        assert tensors.keys() == dump.data.keys()
        for spec in dump.specs:
            values = torch.from_numpy(dump.data[spec.name]).view(getattr(torch, spec.dtype))
            for each in (tensors, mapped):
                assert same_bits(each[spec.name], values.reshape(spec.shape)), spec
        integrity = json.loads(metadata.pop("integrity"))
        assert len(metadata.pop("fingerprint")) == 64
        assert metadata.pop("computed_by")
        assert metadata == dump.metadata
        for name, data in dump.data.items():
            counts = {"nan": tensors[name].isnan().sum(), "inf": tensors[name].isinf().sum()}
            assert integrity[name] == {"crc32": f"{zlib.crc32(data):08x}", **counts}
        if suffix != ".safetensors":
            assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_content_gives_equal_bytes(tmp_path, suffix):
    dump = small_dump()
    one = write_dump(tmp_path / f"one{suffix}", dump, threads=1)
    order = list(reversed(dump.first_rows))
    other = write_dump(tmp_path / f"other{suffix}", dump, order=order, threads=3)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.skipif(shutil.which("unzip") is None, reason="no unzip here")
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_unzip_accepts_the_archive(tmp_path, suffix):
    path = write_dump(tmp_path / f"x{suffix}", small_dump())
    subprocess.run(["unzip", "-tq", path], check=True, capture_output=True)


@given(SUFFIX_AND_DUMP)
def test_data_is_aligned_and_nothing_overlaps(drawn):
    suffix, dump = drawn
    layout = FORMATS[suffix].layout(dump.specs, dump.metadata, None)
    for spec in dump.specs:
        width = DTYPES[spec.dtype].nbytes if suffix == ".safetensors" else 4096
        assert layout.offsets[spec.name] % width == 0
    assert min(layout.offsets.values()) % 4096 == 0
    regions = [(layout.offsets[spec.name], spec.nbytes) for spec in dump.specs]
    regions += [(offset, len(content)) for offset, content in layout.skeleton]
    end = 0
    for offset, nbytes in sorted(regions):
        assert offset == end
        end += nbytes
    assert end == layout.size


@given(SUFFIX_AND_DUMP, st.data())
def test_the_layout_does_not_depend_on_digests(drawn, data):
    suffix, dump = drawn
    digests = {}
    for spec in dump.specs:
        nan = data.draw(st.integers(0, spec.numel))
        inf = data.draw(st.integers(0, spec.numel - nan))
        crc32 = data.draw(st.integers(0, 2**32 - 1))
        digests[spec.name] = Digest(0, crc32, nan, inf)
    crc32s = {name: digest.crc32 for name, digest in digests.items()}
    final_text = integrity_text(dump.specs, dump.metadata, digests)
    assert parse_integrity(final_text) == digests
    first_text = integrity_text(dump.specs, dump.metadata, None)
    layout = FORMATS[suffix].layout
    first = layout(dump.specs, {**dump.metadata, "integrity": first_text}, None)
    final = layout(dump.specs, {**dump.metadata, "integrity": final_text}, crc32s)
    assert (first.size, first.offsets) == (final.size, final.offsets)


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40])
def test_lengths_of_31_bits_and_more_in_a_pickle(length):
    """As Python's own unpickler reads them; the four-byte integers of a pickle have a sign."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return lambda *arguments: arguments

        def persistent_load(self, pid):
            return pid

    spec = TensorSpec("hidden", "uint8", (3, length))
    (tensor, _metadata) = (
        Unpickler(io.BytesIO(dump_pickle([spec], {}, {"hidden": "0"}))).load().values()
    )
    storage, _offset, shape, strides, *_ = tensor
    assert storage[-1] == 3 * length
    assert (shape, strides) == ((3, length), (length, 1))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("nbytes", [(2 << 30) + 5000, (4 << 30) + 5000])
def test_tensors_beyond_2_and_4_gib(tmp_path, suffix, nbytes):
    """A sparse file stands for the data, whose ends and neighbours are looked at."""
    large = TensorSpec("large", "uint8", (nbytes, 1))
    before = TensorSpec("before", "float32", (3,))
    after = TensorSpec("after", "uint8", (4096,))
    values = {"before": np.arange(3, dtype=np.float32), "after": np.arange(4096).astype(np.uint8)}
    specs = [before, large, after]
    crc32s = {"large": 0} | {name: zlib.crc32(value) for name, value in values.items()}
    layout = FORMATS[suffix].layout(specs, {"a": "b"}, crc32s)
    path = tmp_path / f"x{suffix}"
    with path.open("wb") as file:
        file.truncate(layout.size)
        for name, value in values.items():
            file.seek(layout.offsets[name])
            file.write(value.tobytes())
        file.seek(layout.offsets["large"] + large.nbytes - 1)
        file.write(b"\7")
        for offset, content in layout.skeleton:
            file.seek(offset)
            file.write(content)
    if suffix == ".safetensors":
        with safe_open(path, framework="np") as opened:
            last_large = opened.get_slice("large")[large.shape[0] - 2 :]
            found = {name: opened.get_tensor(name) for name in values}
    elif suffix == ".pt":
        loaded = torch.load(path, weights_only=True, mmap=True)
        last_large = loaded["large"][-2:].numpy()
        found = {name: loaded[name].numpy() for name in values}
    else:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in values}
            assert arrays.zip.getinfo("large.npy").file_size > nbytes
        last_large = np.memmap(path, np.uint8, "r", layout.offsets["large"], large.shape)[-2:]
    assert last_large.ravel().tolist() == [0, 7]
    for name, value in values.items():
        assert np.array_equal(found[name], value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_that_is_not_utf_8(tmp_path, suffix):
    undecodable = b"caf\xe9".decode("utf-8", "surrogateescape")
    dump = make_dump(
        {"boards": ("uint8", (2, 16))},
        batched=["boards"],
        batch_rows=2,
        metadata={"checkpoint": undecodable},
    )
    metadata = read_dump(write_dump(tmp_path / f"x{suffix}", dump)).metadata
    assert metadata["checkpoint"] == "caf\\udce9"


def test_suffixes_and_dtypes_that_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"x\.npz.*bfloat16"):
        format_of(Path("x.npz"), ["float32", "bfloat16"])
    for name in ("x", "x.bin", "x.safetensor", ".pt"):
        with pytest.raises(InvalidArgumentError, match=r"\.safetensors, \.pt or \.npz"):
            format_of(Path(name))
