"""Writing a page replaces an earlier page and nothing else."""

import os
import shutil
from pathlib import Path

import pytest

from dump_activations import OutputError, write_report
from dump_activations.commands.inspect import main
from dump_activations.report import render

EARLIER = b'<!doctype html>\n<html><meta charset="utf-8"><meta content="dump-activations report">'


@pytest.fixture(scope="module")
def dump_path(make_dump):
    return make_dump(outputs=["pooled"], n_samples=5)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_earlier_page_is_replaced_whole(dump_path, tmp_path):
    report = tmp_path / "report.html"
    write_report(dump_path, report)
    first = report.read_bytes()
    report.chmod(0o600)
    write_report(dump_path, report)
    assert report.read_bytes() == first
    assert names(tmp_path) == {"report.html"}


def test_the_mode_is_the_default_of_new_files(dump_path, tmp_path):
    write_report(dump_path, tmp_path / "report.html")
    (tmp_path / "other").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("report.html", "other")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    "content", [b"", b"mine", b"<!doctype html>\n<p>mine", b"x" * 2000 + EARLIER]
)
def test_a_file_that_is_not_a_report_stays(dump_path, tmp_path, content):
    report = tmp_path / "report.html"
    report.write_bytes(content)
    with pytest.raises(OutputError, match=r"report\.html exists and is not a report"):
        write_report(dump_path, report)
    assert report.read_bytes() == content


def test_a_file_that_came_while_the_page_was_made_stays(dump_path, tmp_path, monkeypatch):
    report, make = tmp_path / "report.html", render.render

    def make_and_disturb(*arguments, **options):
        page = make(*arguments, **options)
        report.write_bytes(b"mine")
        return page

    monkeypatch.setattr(render, "render", make_and_disturb)
    with pytest.raises(OutputError, match="is not a report"):
        write_report(dump_path, report)
    assert report.read_bytes() == b"mine"
    assert names(tmp_path) == {"report.html"}


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_dump_itself_stays(dump_path, tmp_path, link):
    path = tmp_path / "dump.safetensors"
    shutil.copy(dump_path, path)
    report = path
    if link is not None:
        report = tmp_path / "report.html"
        link(path, report)
    with pytest.raises(OutputError, match="is not a report"):
        write_report(path, report)
    assert path.read_bytes() == dump_path.read_bytes()


def test_directories_and_devices_are_refused(dump_path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OutputError, match="exists and is not a report"):
            write_report(dump_path, place)


def test_a_full_disk_leaves_the_earlier_page(dump_path, small_disk):
    report = small_disk / "report.html"
    report.write_bytes(EARLIER)
    with (small_disk / "filler").open("wb") as file:
        size = os.statvfs(small_disk)
        file.write(bytes(size.f_bavail * size.f_bsize))
    with pytest.raises(OutputError, match=r"cannot write .*No space left"):
        write_report(dump_path, report)
    assert report.read_bytes() == EARLIER
    assert names(small_disk) == {"report.html", "filler"}


def test_the_command(dump_path, tmp_path, capfd):
    report = tmp_path / "report.html"
    assert main([str(dump_path), "--report", str(report)]) == 0
    assert report.read_bytes().startswith(b"<!doctype html>")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(report) in err


@pytest.mark.parametrize("more", [["--verify"], ["--stats"], ["--json"], ["other.npz"]])
def test_the_command_takes_one_thing_at_a_time(dump_path, tmp_path, more):
    assert main([str(dump_path), "--report", str(tmp_path / "report.html"), *more]) == 2
    assert names(tmp_path) == set()
