"""Files that other users plant or own in the output's directory."""

import faulthandler
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dump_activations.errors import DumpActivationsError, OutputError
from dump_activations.storage.writing.paths import (
    check_output,
    journal_path,
    partial_path,
    replacement_path,
)
from output_support import interrupt, no_new_descriptors, open_file, small_dump, write_dump

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


PLANTED = {
    link: "is a link",
    hard_link: "has a second name",
    pipe: "is not an ordinary file",
    of_another: "belongs to another user",
}
plants = pytest.mark.parametrize(
    "plant",
    [pytest.param(each, marks=needs_root if each is of_another else ()) for each in PLANTED],
    ids=lambda plant: plant.__name__,
)


@plants
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path_of", [partial_path, journal_path])
def test_planted_files_are_refused_and_left_as_they_are(tmp_path, path_of, overwrite, plant):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP, DUMP.first_rows[:9])
    path = path_of(target)
    plant(path)
    before = path.lstat()
    with no_new_descriptors(), pytest.raises(OutputError) as caught:
        open_file(target, DUMP, overwrite=overwrite)
    assert f"{path.name} {PLANTED[plant]}" in str(caught.value)
    assert os.path.samestat(before, path.lstat())
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("path_of", [journal_path, replacement_path])
def test_a_directory_in_place_of_a_journal_is_named(tmp_path, path_of):
    path = path_of(tmp_path / "x.pt")
    path.mkdir()
    with no_new_descriptors(), pytest.raises(OutputError, match=path.name):
        open_file(tmp_path / "x.pt", DUMP)
    assert path.is_dir()


@plants
def test_a_planted_replacement_of_the_journal_is_not_followed(tmp_path, plant):
    target = tmp_path / "x.pt"
    plant(replacement_path(target))
    interrupt(target, DUMP, DUMP.first_rows[:9])
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 9 * DUMP.batch_rows
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "precious"


@needs_root
def test_an_unfinished_dump_of_another_user_is_refused(shared):
    target = shared / "x.pt"
    assert as_other(lambda: interrupt(target, DUMP, DUMP.first_rows[:9])) == ""
    before = partial_path(target).read_bytes()
    with pytest.raises(OutputError, match=r"x\.pt\.partial.* belongs to another user"):
        open_file(target, DUMP)
    assert partial_path(target).read_bytes() == before


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
        assert as_other(lambda: write_dump(target, DUMP, overwrite=True)) == ""
        assert (target.stat().st_uid, target.stat().st_mode & 0o777) == (OTHER, mode)


@needs_root
def test_a_directory_that_cannot_be_reached(shared):
    (shared / "closed").mkdir(0o700)
    for target in (shared / "closed" / "x.pt", shared / "closed" / "deep" / "x.pt"):
        error = as_other(lambda target=target: check_output(target, ["uint8"]))
        assert str(shared) in error
        assert "\n" not in error
