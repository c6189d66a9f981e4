"""Loads damaged and malicious checkpoints, in a process of bounded memory.

A script: `hostile.py DIRECTORY FIRST STOP` loads one checkpoint for each seed, and prints a line of
JSON for each: its seed, what was done to it, how the load ended. The directory holds good
checkpoints, `config` (a directory with safetensors) and `bundle.pt`.
"""

import faulthandler
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from dump_activations import load_encoder
from dump_activations.errors import DumpActivationsError

MEMORY = 1 << 30
"""Bytes of address space that loading a checkpoint of some kilobytes may take."""

SECONDS = 20

NASTY_VALUES = [
    *[0, -1, 1, 3, 2**31, 2**40, 2**63, 2**64, 10**30, 1e308, -0.5, float("nan"), float("inf")],
    *[None, True, "", "16", "binned_ev", "\n\x1b[31m", "a" * 100_000, [], [16], {}, {"a": 1}],
]


class Payload:
    """Runs a command where a pickle is loaded without care."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._canary}",)


def main() -> None:
    directory, (first, stop) = Path(sys.argv[1]), map(int, sys.argv[2:])
    load_encoder(directory / "config")  # what is imported and allocated once
    load_encoder(directory / "bundle.pt")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for seed in range(first, stop):
        draw = random.Random(seed)
        mutate = draw.choice(MUTATIONS)
        place = directory / f"case-{first}"
        checkpoint = mutate(draw, directory, place)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        print(json.dumps({"seed": seed, "mutation": mutate.__name__}), end=" ", flush=True)
        outcome = load(checkpoint)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(outcome), flush=True)
        shutil.rmtree(place)


def load(checkpoint: Path) -> str:
    """Say how loading ends: 'loaded', 'refused', or the traceback of any other error."""
    try:
        model = load_encoder(checkpoint)
    except DumpActivationsError as error:
        text = str(error)
        # One line that names the file, and does no more to a terminal than to show in it.
        if not text.isprintable() or str(checkpoint.parent) not in text or len(text) > 2000:
            return f"a bad message: {text[:500]!r}"
        return "refused"
    except BaseException:
        return traceback.format_exc()
    hidden, logits = model(torch.zeros((2, 16), dtype=torch.int64))
    return "loaded" if hidden.shape[:2] == (2, 16) and len(logits) == 2 else "loaded wrongly"


def copy(directory: Path, place: Path, weights: str) -> Path:
    """Copy a good checkpoint with weights of a format; return the file of the weights."""
    if weights == "bundle":
        place.mkdir()
        return Path(shutil.copy(directory / "bundle.pt", place / "model.pt"))
    shutil.copytree(directory / "config", place)
    return place / "model.safetensors"


def flip(draw: random.Random, data: bytes, stop: int | None = None) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8, 40])):
        damaged[draw.randrange(min(stop or len(data), len(data)))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def config_bytes(draw: random.Random, directory: Path, place: Path) -> Path:
    copy(directory, place, "config")
    path = place / "config.json"
    path.write_bytes(flip(draw, path.read_bytes()))
    return place


def config_values(draw: random.Random, directory: Path, place: Path) -> Path:
    copy(directory, place, "config")
    path = place / "config.json"
    config = json.loads(path.read_text())
    for field in draw.sample(sorted(config), draw.choice([1, 1, 1, 2, 4])):
        config[field] = draw.choice(NASTY_VALUES)
    path.write_text(json.dumps(config))
    return place


def weights_bytes(draw: random.Random, directory: Path, place: Path) -> Path:
    path = copy(directory, place, draw.choice(["config", "bundle"]))
    # Headers are where damage matters most.
    path.write_bytes(flip(draw, path.read_bytes(), draw.choice([9, 600, 4000, None])))
    return place


def weights_cut(draw: random.Random, directory: Path, place: Path) -> Path:
    path = copy(directory, place, draw.choice(["config", "bundle"]))
    os.truncate(path, draw.choice([0, 7, 8, 9, draw.randrange(path.stat().st_size)]))
    return place


def weights_spliced(draw: random.Random, directory: Path, place: Path) -> Path:
    path = copy(directory, place, draw.choice(["config", "bundle"]))
    data = path.read_bytes()
    i, j, k = (draw.randrange(len(data)) for _ in range(3))
    path.write_bytes(data[:i] + data[j : j + draw.choice([1, 8, 100, 5000])] + data[k:])
    return place


def safetensors_header(draw: random.Random, directory: Path, place: Path) -> Path:
    path = copy(directory, place, "config")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header[draw.choice(sorted(header.keys() - {"__metadata__"}))]
    field = draw.choice(["dtype", "shape", "data_offsets"])
    nasty = [draw.choice(NASTY_VALUES) for _ in range(draw.randrange(4))]
    entry[field] = draw.choice([*NASTY_VALUES, nasty, "F64", "F8_E4M3", "BOOL"])
    text = json.dumps(header).encode()
    claimed = draw.choice([len(text), len(text), len(text), 2**63, 2**64 - 1, len(data) * 2])
    path.write_bytes(struct.pack("<Q", claimed) + text + data[8 + length :])
    return place


def rebuild(path: Path, change: Callable[[str, bytes], bytes], compression: int) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


def bundle_pickle(draw: random.Random, directory: Path, place: Path) -> Path:
    path = copy(directory, place, "bundle")
    payload = pickle.dumps(Payload(directory / "canary"), protocol=2)
    ways: list[Callable[[bytes], bytes]] = [
        lambda data: flip(draw, data),
        lambda data: data[: draw.randrange(len(data))],
        lambda data: payload,
        lambda data: payload[:-1] + b"0" + data[2:],  # run, drop the result, go on
        lambda data: data[:-1] + b"0" + payload[2:],
        lambda data: b"\x80\x02" + b"(" * 100_000 + b".",
        lambda data: b"\x80\x02" + b"]" + b"\x85" * 100_000 + b".",
        lambda data: b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + data,
        lambda data: b"\x80\x02K\x01r" + struct.pack("<I", 2**32 - 1) + b".",
        lambda data: data[: (cut := draw.randrange(len(data)))] + payload + data[cut:],
    ]
    way = draw.choice(ways)
    rebuild(path, lambda name, data: way(data) if name.endswith("data.pkl") else data, 0)
    return place


def bundle_inflates(draw: random.Random, directory: Path, place: Path) -> Path:
    """Compress the members, and let one of them inflate to far more than the file's size."""
    path = copy(directory, place, "bundle")
    size = draw.choice([0, 1 << 20, 1 << 27])
    part = draw.choice(["data.pkl", "data/0", "version", "byteorder"])
    rebuild(
        path,
        lambda name, data: data + bytes(size) if name.endswith(part) else data,
        zipfile.ZIP_DEFLATED,
    )
    return place


def bundle_sizes(draw: random.Random, directory: Path, place: Path) -> Path:
    """Put another number where a record of the zip directory has a size or an offset."""
    path = copy(directory, place, "bundle")
    data = bytearray(path.read_bytes())
    records = [i for i in range(len(data) - 46) if data[i : i + 4] in (b"PK\1\2", b"PK\3\4")]
    record = draw.choice(records)
    field = draw.choice([18, 20, 22, 24, 26, 28, 42])
    number = draw.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, draw.randrange(2**32)])
    data[record + field : record + field + 4] = struct.pack("<I", number)
    path.write_bytes(data)
    return place


def bundle_objects(draw: random.Random, directory: Path, place: Path) -> Path:
    """Save a bundle of honest pickles but of other types than it should have."""
    path = copy(directory, place, "bundle")
    bundle = torch.load(path, weights_only=True)
    nasty = [
        *NASTY_VALUES,
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(1).expand(1 << 40),
        torch.empty(3, 3, device="meta"),
        torch.eye(4).to_sparse(),
        torch.zeros(4, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
    ]
    where = draw.choice([bundle, bundle["model"], bundle["model"], bundle["encoder_config"]])
    where[draw.choice(sorted(where))] = draw.choice(nasty)
    torch.save(bundle, path)
    return place


def not_a_file(draw: random.Random, directory: Path, place: Path) -> Path:
    path = copy(directory, place, draw.choice(["config", "bundle"]))
    if path.suffix == ".safetensors":
        path = draw.choice([path, place / "config.json"])
    path.unlink()
    kinds: list[Callable[[], object]] = [
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: path.symlink_to(place),
        lambda: path.symlink_to("nowhere"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ]
    draw.choice(kinds)()
    return place


MUTATIONS = [
    config_bytes,
    config_values,
    weights_bytes,
    weights_bytes,
    weights_cut,
    weights_spliced,
    safetensors_header,
    bundle_pickle,
    bundle_inflates,
    bundle_sizes,
    bundle_objects,
    not_a_file,
]

if __name__ == "__main__":
    main()
