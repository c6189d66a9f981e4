"""Whole dumps on disks that fill up, forbid, limit, fail or do half of what they are asked for."""

import errno
import os

import pytest

from reference.dumps import FORMATS

SHORT = [
    "--demo",
    "--overwrite",
    "--n-samples=10",
    "--batch-size=3",
    "--outputs=pooled,rmsnorm_gammas",
]

# 10 MB: more than the small disk and the quota hold. With direct writes where the disk has them.
LARGE = ["--demo", "--overwrite", "--n-samples=600", "--batch-size=100", "--outputs=layer_outputs"]


@pytest.fixture
def target(tmp_path):
    """Return the path of a file that is there already, and must stay as it is."""
    path = tmp_path / "out" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path


def run(server, target, arguments, **options):
    """Run a dump; return its exit code and what it printed but notes."""
    log = target.parent.parent / f"{target.name}.log"
    code, lines = server.run([*arguments, f"-o{target}"], log, **options)
    return code, [line for line in lines if not line.startswith("note: ")]


def fault(call, nth, action, target):
    return {"FAULT": f"{call}:{nth}:{action}:{target.parent}/"}


def is_refused(server, target, reason, arguments, **options):
    """Check that a dump ends in one line with the system's reason, and the old file is there."""
    code, lines = run(server, target, arguments, **options)
    assert code == 1, lines
    (line,) = lines
    assert str(target) in line
    assert reason in line
    assert target.read_bytes() == b"old"


def left(target):
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_a_full_disk(server, small_disk):
    target = small_disk / "a.npz"
    target.write_bytes(b"old")
    is_refused(server, target, "No space left", LARGE)
    assert left(target) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_disk_that_another_file_fills(suffix, server, small_disk):
    """Where space cannot be reserved, so that the dump begins; it ends when there is room again."""
    target = small_disk / f"a{suffix}"
    target.write_bytes(b"old")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2 << 20))
    arguments = [*LARGE, "--n-samples=150", "--batch-size=10"]  # 2.5 MB
    options = {"environment": fault("allocate", 0, errno.EOPNOTSUPP, target), "sync_interval": 0}
    is_refused(server, target, "No space left", arguments, **options)
    filler.unlink()
    code, lines = run(server, target, arguments, **options)
    assert code == 0, lines
    assert left(target) == []
    unbroken = small_disk.with_name(f"unbroken{suffix}")
    assert run(server, unbroken, arguments)[0] == 0
    assert target.read_bytes() == unbroken.read_bytes()


def test_a_quota_on_file_sizes(server, target):
    is_refused(server, target, "File too large", LARGE, limits={"RLIMIT_FSIZE": 4 << 20})
    assert left(target) == []


def test_a_limit_on_open_files_is_no_hang(server, target):
    code, lines = run(server, target, SHORT, limits={"RLIMIT_NOFILE": 8})
    assert code in {0, 1}
    assert code == 0 or len(lines) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(server, target):
    target.parent.chmod(0o555)
    try:
        is_refused(server, target, "cannot be written", SHORT)
    finally:
        target.parent.chmod(0o755)


@pytest.mark.parametrize(
    ("suffix", "reason"), [(".safetensors", errno.EIO), (".pt", errno.ENOSPC), (".npz", errno.EIO)]
)
def test_a_call_that_fails(suffix, reason, server, target, request):
    """Each call that changes a file fails, in a run of its own; by default, every twelfth.

    The run ends in one line, the old file is there (or the whole new one, once it has the name),
    and the same command makes the file of an unbroken run.
    """
    target.unlink()
    target = target.with_name(f"a{suffix}")
    assert run(server, target, SHORT)[0] == 0
    whole = target.read_bytes()
    step = max(12 // request.config.getoption("--faults"), 1)
    call = 1 + errno.EIO % step
    failures = 0
    while True:
        target.write_bytes(b"old")
        environment = fault("any", call, reason, target)
        code, lines = run(server, target, SHORT, environment=environment, sync_interval=0)
        if code == 0:
            assert target.read_bytes() == whole
            assert left(target) == []
            # Past the last call, or one that a dump can do without.
            if call > 60:
                break
            call += step
            continue
        failures += 1
        assert code == 1, lines
        assert len(lines) == 1, lines
        assert os.strerror(reason) in lines[0]
        assert str(target) in lines[0]
        assert target.read_bytes() in {b"old", whole}
        if left(target):
            kept, complete = "the same call again does the rest", f"{target} is complete"
            assert kept in lines[0] or complete in lines[0], (call, left(target), lines)
        code, lines = run(server, target, SHORT)
        assert code == 0, lines
        assert target.read_bytes() == whole
        assert left(target) == []
        call += step
    assert failures > 1


@pytest.mark.parametrize(
    ("call", "arguments", "suffix"),
    [
        *[("pwrite", SHORT, suffix) for suffix in FORMATS],
        ("pwrite", LARGE, ".safetensors"),
        ("write", SHORT, ".safetensors"),
    ],
    ids=[*FORMATS, "large", "journal"],
)
def test_short_writes(call, arguments, suffix, server, target):
    """Writes that do half of what they are asked for are continued."""
    target = target.with_name(f"a{suffix}")
    assert run(server, target, arguments)[0] == 0
    whole = target.read_bytes()
    target.unlink()
    code, lines = run(
        server, target, arguments, environment=fault(call, 0, "short", target), sync_interval=0
    )
    assert code == 0, lines
    assert target.read_bytes() == whole


@pytest.mark.parametrize("call", ["pwrite", "sync"])
def test_a_disk_that_stays_broken(call, server, target):
    is_refused(server, target, "Input/output error", LARGE, environment=fault(call, 0, 5, target))
