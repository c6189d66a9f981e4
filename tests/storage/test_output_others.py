"""What others may do in the output's directory: plant, exchange and own files there."""

import faulthandler
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dump_activations.errors import DumpActivationsError, OutputError
from dump_activations.storage.writing.targets import (
    check_output,
    journal_path,
    partial_path,
    replacement_path,
)
from output_support import no_new_descriptors, open_file, small_dump, write_batches, write_dump

DUMP = small_dump(rows=95)
OTHER = 1234
STICKY, OPEN = 0o1777, 0o777

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """End a test that waits for a pipe, with the place of every thread."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def as_other(run: Callable[[], object]) -> str:
    """Run something as another user; return the package's error, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = "it broke"
        try:
            os.setgroups([])
            os.setresgid(OTHER, OTHER, OTHER)
            os.setresuid(OTHER, OTHER, OTHER)
            run()
            text = ""
        except DumpActivationsError as error:
            text = str(error)
        finally:
            os.write(writer, text.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@pytest.fixture(params=[STICKY, OPEN], ids=["sticky", "open"])
def shared(request) -> Iterator[Path]:
    """Return a directory that anybody can write, which `tmp_path` never is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(request.param)
        yield Path(name)


def interrupt(target: Path) -> None:
    with open_file(target, DUMP) as file:
        write_batches(file, DUMP, DUMP.first_rows[:9])


def second_journal(target: Path) -> Path:
    return journal_path(target, 1)


def link(path: Path) -> None:
    (path.parent / "victim").write_text("precious")
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent / "victim")


def hard_link(path: Path) -> None:
    path.touch(0o600)
    path.write_text("precious")
    (path.parent / "victim").hardlink_to(path)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def of_another(path: Path) -> None:
    path.touch(0o600)
    os.chown(path, OTHER, OTHER)


def writable(path: Path) -> None:
    path.touch()
    path.chmod(0o620)


PLANTED = {
    link: "is a link",
    hard_link: "has another name too",
    pipe: "is not an ordinary file",
    writable: "may be written by others",
    of_another: "belongs to another user",
}


def planted(names):
    return pytest.mark.parametrize(
        "plant",
        [pytest.param(each, marks=needs_root if each is of_another else ()) for each in names],
        ids=lambda plant: plant.__name__,
    )


@planted(PLANTED)
@pytest.mark.parametrize("path_of", [partial_path, journal_path, second_journal])
def test_what_others_could_have_changed_is_not_gone_on_with(tmp_path, path_of, plant):
    target = tmp_path / "x.pt"
    interrupt(target)
    path = path_of(target)
    plant(path)
    before = path.lstat()
    with no_new_descriptors(), pytest.raises(OutputError) as caught:
        open_file(target, DUMP)
    assert f"{path.name} {PLANTED[plant]}" in str(caught.value)
    assert "--overwrite" in caught.value.flags_text
    assert os.path.samestat(before, path.lstat())


@pytest.mark.parametrize(
    "path_of", [journal_path, lambda at: replacement_path(journal_path(at)), second_journal]
)
def test_a_directory_in_place_of_a_journal_is_named(tmp_path, path_of):
    path = path_of(tmp_path / "x.pt")
    path.mkdir()
    with no_new_descriptors(), pytest.raises(OutputError, match=f"{path}: Is a directory"):
        open_file(tmp_path / "x.pt", DUMP)
    assert [*tmp_path.iterdir()] == [path]


@planted(PLANTED)
def test_starting_anew_leaves_what_it_finds_as_it_is(tmp_path, plant):
    """But for its name."""
    target = tmp_path / "x.pt"
    path = partial_path(target)
    plant(path)
    held = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    before = os.fstat(held)
    write_dump(target, DUMP, overwrite=True)
    after = os.fstat(held)
    os.close(held)
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    assert target.stat().st_uid == os.geteuid()
    assert target.stat().st_ino != before.st_ino
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "precious"


@planted(PLANTED)
@pytest.mark.parametrize(
    "name", ["x.pt.partial.journal", "x.pt.partial.journal.new", "x.pt.partial.journal.7"]
)
def test_a_journal_is_begun_in_the_place_of_what_was_planted(tmp_path, name, plant):
    target = tmp_path / "x.pt"
    plant(tmp_path / name)
    interrupt(target)
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 9 * DUMP.batch_rows
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "precious"


@needs_root
def test_an_unfinished_dump_of_another_is_refused(shared):
    target = shared / "x.pt"
    assert as_other(lambda: interrupt(target)) == ""
    before = partial_path(target).read_bytes()
    with pytest.raises(OutputError, match=r"x\.pt\.partial belongs to another user"):
        open_file(target, DUMP)
    assert partial_path(target).read_bytes() == before
    write_dump(target, DUMP, overwrite=True)
    assert target.stat().st_uid == os.geteuid()


@needs_root
def test_starting_anew_over_the_file_of_another(shared):
    """Where they may not remove it, they are told; where they may, the new file is theirs."""
    target = shared / "x.pt"
    interrupt(target)
    before = partial_path(target).stat()
    error = as_other(lambda: write_dump(target, DUMP, overwrite=True))
    if shared.stat().st_mode & 0o1000:
        assert error == f"cannot write {partial_path(target)}: Operation not permitted"
        assert os.path.samestat(before, partial_path(target).stat())
    else:
        assert error == ""
        assert target.stat().st_uid == OTHER


@needs_root
@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_a_target_that_another_owns_is_found_before_the_run(shared, mode):
    target = shared / "x.pt"
    target.write_text("old")
    target.chmod(mode)
    error = as_other(lambda: check_output(target, ["uint8"]))
    if mode == 0o644:
        assert "is write-protected" in error
    elif shared.stat().st_mode & 0o1000:
        assert "only its owner may replace it" in error
        assert as_other(lambda: target.rename(shared / "y.pt")) == "it broke"
    else:
        assert error == ""
        assert as_other(lambda: write_dump(target, DUMP)) == ""
        assert (target.stat().st_uid, target.stat().st_mode & 0o777) == (OTHER, mode)


@needs_root
def test_a_directory_that_cannot_be_reached(shared):
    (shared / "closed").mkdir(0o700)
    for target in (shared / "closed" / "x.pt", shared / "closed" / "deep" / "x.pt"):
        error = as_other(lambda target=target: check_output(target, ["uint8"]))
        assert str(shared) in error
        assert "\n" not in error
