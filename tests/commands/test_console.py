"""Lines on stderr that leave a bar whole, and a stdout that may be full or closed."""

import errno
import io
import json
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import click
import pytest

from dump_activations.commands import console
from dump_activations.commands.dump import main as dump_main
from dump_activations.commands.inspect import main as inspect_main
from dump_activations.commands.process import run_command
from dump_activations.errors import DumpActivationsWarning, Note, OutputError, option
from dump_activations.progress import Phase, counted, shown_progress

FULL = os.strerror(errno.ENOSPC)


def visible_before(text, shown):
    """Return the rest of the line on which a text begins."""
    line = re.split(r"\n|\x1b\[2K", shown[: shown.index(text)])[-1]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", line)


def test_a_warning_leaves_the_bar_whole(terminal):
    close, long = terminal(), "x" * 200
    with console.fresh_mode(), shown_progress():
        progress = counted(Phase("", "boards", of=10))
        progress(5, 10)
        warnings.warn(DumpActivationsWarning(f"[bold] {option('dtype')} {long}"), stacklevel=1)
        progress(9, 10)
    console.print_line("warning", "after")
    shown = close()
    assert "9/10 boards" in shown
    assert f"[bold] --dtype {long}\r\n" in shown
    assert visible_before("warning: ", shown) == ""
    assert shown.endswith("after\r\n")


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("no_colour", ["", "1"])
def test_no_colour(live, no_colour, terminal, monkeypatch):
    close = terminal()
    monkeypatch.setenv("NO_COLOR", no_colour)
    with shown_progress():
        if live:
            console.print_line("error", "red")
    if not live:
        console.print_line("error", "red")
    assert bool(re.search(r"\x1b\[[0-9;]*31m", close())) != bool(no_colour)


def test_a_line_is_one_line_of_at_most_500_characters_without_control_characters(capsys):
    for length in (480, 500, 10_000):
        text = ("\x1b[2J\r\n" + "start " + "x" * length)[: length - 4] + " end"
        console.print_line("error", text)
        (line,) = capsys.readouterr().err.splitlines()
        assert len(line) <= 500
        assert line.isprintable()
        assert line.startswith("error: \\x1b[2J start x")
        assert line.endswith("x end")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_streams_of_any_encoding_get_what_they_can_show(encoding, monkeypatch):
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, name, streams[name])
    console.print_line("note", "ä盤")
    console.show(None, ["ä盤", console.Table(("a", "b"), [("盤", "ä")])])
    monkeypatch.undo()
    shown = "".join(each.buffer.getvalue().decode(encoding) for each in streams.values())
    assert {c for c in shown if not c.isascii()} == {
        c for c in "ä盤" if c.encode(encoding, "ignore")
    }
    assert shown.count("note: ") == 1


@pytest.mark.parametrize("arguments", [["--list-outputs"], ["--list-outputs", "--json"], ["-h"]])
def test_a_full_disk_at_stdout_is_one_line(arguments, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert dump_main(["--demo", *arguments]) == 1
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    text = f"cannot write to stdout: {FULL}"
    as_json = json.dumps({"error": text})
    line = as_json if "--json" in arguments else f"error: {text}"
    assert capsys.readouterr().err == f"{line}\n"


def test_the_same_warning_twice_is_shown_twice_and_of_other_packages_never(capsys):
    with console.fresh_mode():
        for _ in range(2):
            warnings.warn(DumpActivationsWarning("again"), stacklevel=1)
            warnings.warn("of another", stacklevel=1)
    assert capsys.readouterr().err == "warning: again\n" * 2


def test_the_notes_of_an_error_name_flags_too(capsys):
    @click.command()
    def fail():
        error = OutputError(f"no {option('output', 'a.pt')}")
        error.add_note(Note(f"set {option('batch_size', 4)}"))
        raise error

    assert run_command(fail, []) == 1
    assert capsys.readouterr().err == "error: no --output a.pt; set --batch-size 4\n"


def test_a_process_of_several_names_itself_and_prints_problems_only(tmp_path, capsys, monkeypatch):
    given = ["--demo", "--outputs=pooled", "--n-samples=9", "--batch-size=3", "--shard-size=1kB"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert dump_main([*given, "-o", f"{tmp_path}/a.pt"]) == 0
    assert capsys.readouterr() == ("", "")
    assert dump_main([*given, "--dtype=fp8", "-o", f"{tmp_path}/a.pt"]) == 2
    assert capsys.readouterr().err.startswith("error: rank 1: --dtype")


def test_a_quiet_command_prints_errors_and_json_only(tmp_path, capsys):
    target = str(tmp_path / "a.pt")
    given = ["--demo", "--outputs=pooled", "--n-samples=9", "-q"]
    assert dump_main([*given, "-o", target]) == 0
    assert inspect_main([target, "--quiet", "--verify"]) == 0
    assert dump_main([*given, "--seed=1", "-o", f"{tmp_path}/b.pt"]) == 0
    assert inspect_main([target, f"{tmp_path}/b.pt", "-q"]) == 1
    assert capsys.readouterr() == ("", "")
    assert inspect_main([target, "-q", "--json"]) == 0
    assert inspect_main([f"{tmp_path}/c.pt", "-q"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("{")
    assert err.startswith("error: ")
    assert inspect_main([target]) == 0
    assert "9 boards" in capsys.readouterr().out


def test_every_line_is_json_with_json(tmp_path, capsys):
    given = ["--demo", "--json", "--n-samples=9", f"--output={tmp_path}/a.pt"]
    assert dump_main(given) == 0
    assert dump_main([*given, "--outputs=pooled"]) == 1
    assert dump_main([*given, "--dtype=fp8"]) == 2
    assert dump_main(["--no-such-flag", "--json"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [key for line in lines for key in line if key != "note"] == ["error"] * 3
    assert [line["error"][:9] for line in lines if "error" in line][1:] == [
        "--dtype: ",
        "No such o",
    ]
    assert any("note" in line for line in lines)
    assert inspect_main([f"{tmp_path}/none.pt", "--json"]) == 1
    assert inspect_main([f"{tmp_path}/none.pt"]) == 1  # The mode does not outlive its command.
    first, second = capsys.readouterr().err.splitlines()
    assert json.loads(first)["error"] == second.removeprefix("error: ")
