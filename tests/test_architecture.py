"""The rooms of the package and the arrows between them: docs/architecture.md where it can fail."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "dump_activations"

OUTSIDE = [
    path
    for directory in ("tests/benchmarks", "fuzz/python", "docs")
    for path in sorted((PACKAGE.parents[1] / directory).glob("*.py"))
]

LEAVES = ("dtypes", "errors", "interrupts", "progress")

# Room -> the rooms and modules that its modules may import, in addition to one another.
ARROWS = {
    "__main__": ("commands",),
    "commands": (
        *LEAVES,
        *("_rust", "api", "demo", "model", "pipeline", "dataset", "remote", "report", "storage"),
    ),
    "__init__": (
        *(*LEAVES, "_rust", "api", "demo", "model", "pipeline", "dataset", "report"),
        "storage.reading",
    ),
    "api": (*LEAVES, "model", "pipeline", "dataset", "remote", "storage"),
    "pipeline": (*LEAVES, "_rust", "model", "dataset", "storage.statistics"),
    "model": LEAVES,
    "dataset": (*LEAVES, "_rust", "remote"),
    "remote": LEAVES,
    "storage.writing": (
        *(*LEAVES, "_rust", "storage.digests", "storage.formats"),
        *("remote", "storage.reading", "storage.shards", "storage.statistics"),
    ),
    "storage.reading": (
        *(*LEAVES, "_rust", "model.activations", "storage.digests", "storage.formats"),
        *("remote", "storage.shards", "storage.statistics"),
    ),
    "storage.statistics": (*LEAVES, "_rust"),
    "storage.shards": LEAVES,
    "storage.digests": (*LEAVES, "_rust", "storage.formats"),
    "storage.formats": (*LEAVES, "_rust"),
    "report": (
        *(*LEAVES, "dataset.game", "remote"),
        *("storage.digests", "storage.reading", "storage.statistics"),
    ),
    "demo": ("api", "model", "pipeline"),
    **dict.fromkeys(LEAVES, LEAVES),
}

# Rooms or modules -> what they alone may touch.
OWNED = {
    "commands": (
        *("click", "print", "sys.argv", "sys.stdin", "sys.exit", "os._exit"),
        "SystemExit",
    ),
    "commands progress": ("rich", "sys.stderr", "sys.stdout"),
    "interrupts": ("signal",),
}


def _module_name(path: Path) -> str:
    *parents, name = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parents if parents and name == "__init__" else [*parents, name])


TREES = {_module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def is_in(name: str, place: str) -> bool:
    return f"{name}.".startswith(f"{place}.")


def imports(module: str) -> Iterator[str]:
    """Name all that a module imports anywhere, for type checkers too: modules or names in them."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Name the package's own modules that a module imports; "" is its public face."""
    prefix = f"{PACKAGE.name}."
    names = [name.removeprefix(prefix) for name in imports(module) if name.startswith(prefix)]
    return {name if name in {*TREES, "_rust"} else name.rpartition(".")[0] for name in names}


def uses(module: str) -> Iterator[str]:
    """Name what a module imports, and what it uses by a name or as `name.attribute`."""
    yield from imports(module)
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def room_of(module: str) -> str:
    return next((room for room in ARROWS if is_in(module, room)), "")


def test_every_module_is_in_a_room():
    """Only the `__init__` of a room of rooms is outside, and imports nothing."""
    assert {module: own_imports(module) for module in TREES if not room_of(module)} == {
        "storage": set()
    }


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_point_down(room):
    open_to = (room, *ARROWS[room])
    strays = {
        (module, name)
        for module in TREES
        if room_of(module) == room
        for name in own_imports(module)
        if not any(is_in(name, place) for place in open_to)
    }
    assert strays == set()


def test_no_import_leads_back_to_its_module():
    TopologicalSorter({module: own_imports(module) for module in TREES}).prepare()


@pytest.mark.parametrize(("owner", "thing"), [(o, thing) for o in OWNED for thing in OWNED[o]])
def test_what_only_one_room_may_touch(owner, thing):
    users = {module for module in TREES if any(is_in(use, thing) for use in uses(module))}
    owners = owner.split()
    assert {module for module in users if not any(is_in(module, one) for one in owners)} == set()


def test_names_of_the_extension_say_where_they_are_from():
    own = f"{PACKAGE.name}._rust."
    strays = {
        (module, name) for module in TREES for name in imports(module) if name.startswith(own)
    }
    assert strays == set(), "import _rust itself"


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.stem)
def test_benchmarks_and_fuzzers_import_names_that_exist(path):
    """No other test runs them, so a name that moves would break them unnoticed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            module = import_module(node.module)
            submodules = {each.stem for each in Path(module.__file__).parent.glob("*")}
            missing = {each.name for each in node.names if not hasattr(module, each.name)}
            assert missing <= submodules, (node.module, missing)
