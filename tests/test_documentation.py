"""The pages list what the code has, and their recipes for digests give the stored digests."""

import ast
import json
import re
import shlex
import zlib
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

import dump_activations as package
from dump_activations import dump
from dump_activations.commands.dump import dump_activations
from dump_activations.commands.inspect import inspect_activations
from dump_activations.model.activations import ACTIVATIONS
from dump_activations.storage.statistics import STATISTICS
from test_architecture import ARROWS, LEAVES, PACKAGE

ROOT = Path(__file__).parents[1]
SHELL = {"|", ">", "||", "&", "&&", "2>&1"}
CALL = re.compile(r"(?:^|\s)(dump-activations|-m dump_activations|inspect-activations)\s+(.*)")
API, COMMAND, KEYS, ARCHITECTURE, FORMAT = (
    (ROOT / "docs" / name).read_text()
    for name in ("api.md", "command.md", "keys.md", "architecture.md", "file-format.md")
)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading, without their marks."""
    _, _, rest = page.partition(f"\n| {heading} |")
    assert rest, heading
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines]


def column(page: str, heading: str) -> set[str]:
    return {name for row in table(page, heading) for name in row[0].split(", ")}


def default_of(flag: click.Parameter) -> str:
    if "[required" in (getattr(flag, "help", None) or ""):
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


def test_the_public_names():
    described = re.findall(r"^\.\. (?:auto\w+|py:type|py:module):: ([\w.]+)", API, re.MULTILINE)
    names = {name.rpartition(".")[2] for name in described}
    assert names - {package.__name__} == {
        *package.__all__,
        "Cells",
        "StreamedCells",
        "Rows",
        "Layers",
        "ArrayLike",
    }


def test_the_statistics():
    assert [row[0] for row in table(FORMAT, "Statistic")] == [each.name for each in STATISTICS]


def test_the_rooms():
    rows = table(ARCHITECTURE, "Room")
    assert {row[0] for row in rows} - {"leaves"} == ARROWS.keys() - {*LEAVES}
    (leaves,) = (row[1] for row in rows if row[0] == "leaves")
    assert set(leaves.split(", ")) == {*LEAVES}


@pytest.mark.parametrize("page", [ARCHITECTURE, CONTRIBUTING], ids=["architecture", "contributing"])
def test_files_that_the_pages_name_exist(page):
    _, _, page = page.partition("\n## ")
    named = re.findall(r"`([\w*./-]+(?:\.(?:py|rs|md|j2)|/))`", page)
    assert named
    places = (PACKAGE, PACKAGE / "storage" / "reading", PACKAGE / "storage" / "formats", ROOT)
    places += (ROOT / "tests" / "storage", ROOT / "rust")
    missing = {name for name in named if not any([*place.glob(name)] for place in places)}
    assert missing == set()


# 5 batches, of which at most 3 fit into a shard: 2 shards.
N, BATCH_SIZE = 20, 4


@pytest.fixture(scope="module")
def written(tmp_path_factory, demo_checkpoint, demo_dataset):
    """Dump to one file and to two shards, and return the metadata and the tensors of each file."""
    directory = tmp_path_factory.mktemp("documented")
    whole = directory / "a.safetensors"
    write(whole, demo_checkpoint, demo_dataset)
    tensors = load_file(whole).values()
    batch_nbytes = BATCH_SIZE * sum(each.nbytes // N for each in tensors if len(each) == N)
    other_nbytes = sum(each.nbytes for each in tensors if len(each) != N)
    size = 3 * batch_nbytes + other_nbytes
    write(directory / "b.safetensors", demo_checkpoint, demo_dataset, shard_size=size)
    return [(metadata_of(path), load_file(path)) for path in sorted(directory.iterdir())]


def write(path: Path, checkpoint: Path, dataset: Path, **options: int) -> None:
    dump(
        checkpoint,
        dataset,
        path,
        outputs=["pooled", "rmsnorm_gammas"],
        n_samples=N,
        batch_size=BATCH_SIZE,
        stats=True,
        device="cpu",
        allow_cpu=True,
        **options,
    )


def metadata_of(path: Path) -> dict[str, str]:
    """Read the metadata in the order of the file, which its digest covers."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def keys_in_the_code() -> set[str]:
    """Name the keys of a run's metadata, written or not."""
    tree = ast.parse((PACKAGE / "pipeline" / "plan.py").read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "metadata"]
    dicts = [n for function in functions for n in ast.walk(function) if isinstance(n, ast.Dict)]
    return {key.value for each in dicts for key in each.keys if isinstance(key, ast.Constant)}


def test_the_metadata(written):
    documented = table(FORMAT, "Key")
    added_later = {"stats", "shard", "first_board", "fingerprint", "computed_by", "integrity"}
    assert {row[0] for row in documented} == keys_in_the_code() | added_later
    (version,) = re.findall(r"normative for `format_version` (\d+)", FORMAT.replace("\n", " "))
    for metadata, _ in written:
        assert {row[0] for row in documented if row[1] == "always"} <= metadata.keys()
        assert metadata.keys() <= {row[0] for row in documented}
        assert metadata["format_version"] == version
        assert len(metadata["computed_by"]) == 1024
        assert json.loads(metadata["computed_by"])[0].keys() == {"device", "threads"}


def test_shards_are_what_the_page_says(written):
    (whole, tensors), *shards = written
    batches, count = -(-N // BATCH_SIZE), len(shards)
    assert count == 2
    starts = [i * batches // count * BATCH_SIZE for i in range(count + 1)]
    assert [metadata["shard"] for metadata, _ in shards] == ["1/2", "2/2"]
    assert [metadata["first_board"] for metadata, _ in shards] == [str(at) for at in starts[:-1]]
    assert {metadata["fingerprint"] for metadata, _ in shards} == {whole["fingerprint"]}
    assert {metadata["n_samples"] for metadata, _ in shards} == {str(N)}
    for name in tensors:
        parts = [each[name] for _, each in shards]
        if name.startswith("rmsnorm_gammas"):
            assert all(part.tobytes() == tensors[name].tobytes() for part in parts)
        elif not name.startswith("stats/"):
            assert np.concatenate(parts).tobytes() == tensors[name].tobytes()

    (a, b) = (
        {name: each[f"stats/pooled/{name}"] for name in ("count", "mean", "variance")}
        for _, each in shards
    )
    n, d = a["count"] + b["count"], b["mean"] - a["mean"]
    m2 = (
        sum(each["variance"] * each["count"] for each in (a, b))
        + d * d * a["count"] * b["count"] / n
    )
    np.testing.assert_allclose(tensors["stats/pooled/variance"], m2 / n, rtol=1e-12)
    mean = a["mean"] + d * b["count"] / n
    np.testing.assert_allclose(tensors["stats/pooled/mean"], mean, rtol=1e-12, atol=1e-12)


def test_digests_are_what_the_page_says(written, demo_checkpoint, demo_dataset):
    metadata, tensors = dict(written[0][0]), written[0][1]

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
    """Return each call of a command in the pages' code blocks: its name and arguments."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"^```(?:ba)?sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.M)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    called = [CALL.search(line) for line in lines]
    words = [(call[1], shlex.split(call[2])) for call in called if call]
    return [(name, [*takewhile(lambda word: word not in SHELL, line)]) for name, line in words]


def test_commands_in_the_pages_parse():
    commands = {
        "dump-activations": dump_activations,
        "-m dump_activations": dump_activations,
        "inspect-activations": inspect_activations,
    }
    shown = commands_shown()
    assert {name for name, _ in shown} == commands.keys()
    for name, arguments in shown:
        commands[name].make_context(name, [*arguments])
