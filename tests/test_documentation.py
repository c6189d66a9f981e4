"""What the pages list is what the code has, and what they say of a digest gives that digest."""

import ast
import json
import re
import shlex
import zlib
from hashlib import sha256
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

from dump_activations import dump
from dump_activations.commands.dump import dump_activations
from dump_activations.commands.inspect import inspect_activations
from dump_activations.model.activations import ACTIVATIONS
from dump_activations.storage.statistics import STATISTICS
from test_architecture import ARROWS, LEAVES, PACKAGE

ROOT = Path(__file__).parents[1]
CALL = re.compile(r"(?:^|\s)(dump-activations|-m dump_activations|inspect-activations)\s+(.*)")
COMMAND, KEYS, ARCHITECTURE, FORMAT = (
    (ROOT / "docs" / name).read_text()
    for name in ("command.md", "keys.md", "architecture.md", "file-format.md")
)


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading, without their marks."""
    _, _, rest = page.partition(f"\n| {heading} |")
    assert rest, heading
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines]


def column(page: str, heading: str) -> set[str]:
    return {name for row in table(page, heading) for name in row[0].split(", ")}


def default_of(flag: click.Parameter) -> str:
    if "[required]" in (getattr(flag, "help", None) or ""):
        return "required"
    value = flag.to_info_dict()["default"]
    if flag.is_flag or value in (None, ()):
        return "—"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_the_flags_and_their_defaults():
    flags = {", ".join(flag.opts): default_of(flag) for flag in dump_activations.params}
    assert {row[0]: row[1] for row in table(COMMAND, "Flag")} == flags


def test_the_activation_keys():
    keys = {activation.key for activation in ACTIVATIONS}
    assert column(KEYS, "Key") == {*keys, "attn_weights"}
    assert column(FORMAT, "Name") == {*keys, "labels", "indices", "boards"}


def test_the_statistics():
    assert [row[0] for row in table(FORMAT, "Statistic")] == [each.name for each in STATISTICS]


def test_the_rooms():
    rooms = column(ARCHITECTURE, "Room") - {"leaves"}
    assert rooms == ARROWS.keys() - {*LEAVES}


@pytest.fixture(scope="module")
def written(tmp_path_factory, demo_checkpoint, demo_dataset):
    path = tmp_path_factory.mktemp("documented") / "a.safetensors"
    keys = ["pooled", "rmsnorm_gammas"]
    dump(
        demo_checkpoint,
        demo_dataset,
        path,
        outputs=keys,
        n_samples=20,
        device="cpu",
        allow_cpu=True,
    )
    # The library gives the metadata in no order, and its digest is of the file's.
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"], load_file(path)


def keys_in_the_code() -> set[str]:
    """Name the keys of the dicts that a run's metadata is put together from, written or not."""
    tree = ast.parse((PACKAGE / "pipeline" / "provenance.py").read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name != "fingerprint"]
    dicts = [n for function in functions for n in ast.walk(function) if isinstance(n, ast.Dict)]
    return {key.value for each in dicts for key in each.keys if isinstance(key, ast.Constant)}


def test_the_metadata(written):
    metadata, _ = written
    documented = table(FORMAT, "Key")
    added_by_storage = {"fingerprint", "integrity"}
    assert {row[0] for row in documented} == keys_in_the_code() | added_by_storage
    assert {row[0] for row in documented if row[1] == "always"} <= metadata.keys()
    assert metadata.keys() <= {row[0] for row in documented}
    (version,) = re.findall(r"normative for `format_version` (\d+)", FORMAT.replace("\n", " "))
    assert metadata["format_version"] == version


def test_digests_are_what_the_page_says(written, demo_checkpoint, demo_dataset):
    metadata, tensors = dict(written[0]), written[1]

    shards = []
    for path in sorted(demo_dataset.glob("steps-*.npy")):
        header = path.read_bytes()[10:].partition(b"\n")[0].decode()
        descr = re.search(r"'descr': (.*), 'fortran_order'", header)[1]
        shards.append([path.name, len(np.load(path)), descr])
    assert metadata["dataset_layout_sha256"] == sha256(json.dumps(shards).encode()).hexdigest()

    weights = sha256()
    for name, weight in sorted(load_file(demo_checkpoint / "model.safetensors").items()):
        weights.update(json.dumps([name, "torch.float32", list(weight.shape)]).encode())
        weights.update(weight.astype("<f4").tobytes())
    assert metadata["weights_sha256"] == weights.hexdigest()

    integrity = json.loads(metadata.pop("integrity"))
    of_metadata = integrity.pop("metadata")
    assert of_metadata == {"crc32": f"{zlib.crc32(json.dumps(metadata).encode()):08x}"}
    assert integrity == {
        name: {"crc32": f"{zlib.crc32(tensor.tobytes()):08x}", "nan": 0, "inf": 0}
        for name, tensor in tensors.items()
    }


def commands_shown() -> list[tuple[str, list[str]]]:
    """Every call of a command in the pages' blocks of code: its name and arguments."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"^```(?:ba)?sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.M)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    called = [CALL.search(line) for line in lines]
    return [(call[1], shlex.split(call[2])) for call in called if call]


def test_the_pages_commands_are_ones_there_are():
    commands = {
        "dump-activations": dump_activations,
        "-m dump_activations": dump_activations,
        "inspect-activations": inspect_activations,
    }
    shown = commands_shown()
    assert {name for name, _ in shown} == commands.keys()
    for name, arguments in shown:
        commands[name].make_context(name, [*arguments])
