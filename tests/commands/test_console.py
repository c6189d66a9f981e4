"""What is shown where: lines that respect a live bar, colours, and pipes."""

import errno
import os
import pty
import re
import select
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from dump_activations import dump
from dump_activations.commands import console
from dump_activations.commands.dump import main as dump_main
from dump_activations.commands.inspect import main as inspect_main
from dump_activations.errors import DumpActivationsWarning, option
from dump_activations.progress import Phase, counted, shown_progress


def read_all(terminal):
    shown = b""
    while select.select([terminal], [], [], 0)[0]:
        shown += os.read(terminal, 1 << 16)
    return shown.decode()


@pytest.fixture
def terminal(monkeypatch):
    """Return what makes a terminal of a stream, which returns what reads all that it was sent."""
    primary, secondary = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(secondary, "w") as file:

        def begin(stream="stderr"):  # in the test itself: pytest sets streams anew before each
            monkeypatch.setattr(sys, stream, file)
            return lambda: read_all(primary)

        yield begin
    os.close(primary)


def visible_before(text, shown):
    """Return what else is on the line on which a text begins."""
    line = re.split(r"\n|\x1b\[2K", shown[: shown.index(text)])[-1]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", line)


def test_a_warning_leaves_the_bar_whole(terminal):
    shown_since, long = terminal(), "x" * 200
    with console.shown_warnings(), shown_progress():
        progress = counted(Phase("", "boards", of=10))
        progress(5, 10)
        warnings.warn(DumpActivationsWarning(f"[bold] {option('dtype')} {long}"), stacklevel=1)
        progress(9, 10)
    shown = shown_since()
    assert "9/10 boards" in shown
    assert f"[bold] --dtype {long}\r\n" in shown
    assert visible_before("warning: ", shown) == ""
    console.print_warning("after")
    assert "after\r\n" in shown_since()


@pytest.mark.parametrize("live", [True, False])
def test_no_colour(live, terminal, monkeypatch):
    shown_since = terminal()

    def lines():
        with shown_progress():
            if live:
                console.print_error("red")
        if not live:
            console.print_error("red")
        return shown_since()

    red = re.compile(r"\x1b\[[0-9;]*31m")
    assert red.search(lines())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not red.search(lines())


@pytest.mark.parametrize("no_colour", ["", "1"])
@pytest.mark.parametrize("width", [50, 80, 120])
def test_tables_fit_the_terminal(width, no_colour, terminal, tmp_path, monkeypatch):
    """Of two files: what they hold, and what differs."""
    monkeypatch.chdir(tmp_path)
    common = ["--demo", "--n-samples=99", "--outputs=pooled,rmsnorm_gammas", "--labels=all"]
    for name in ("a.pt", "b.pt"):
        assert dump_main([*common, f"--seed={ord(name[0])}", "-o", name]) == 0
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", no_colour)
    shown_since = terminal("stdout")
    assert inspect_main(["a.pt"]) == 0
    assert inspect_main(["a.pt", "b.pt"]) == 1
    assert dump_main(["--demo", "--list-outputs"]) == 0
    shown = shown_since()
    assert ("\x1b" in shown) != bool(no_colour)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).split("\r\n")
    assert [line for line in lines if len(line) > width and " " in line] == []  # paths stay whole
    names = {line.split()[0] for line in lines if line}
    assert names >= {"rmsnorm_gammas/blocks.3.attn_norm", "labels/tile_65536_mask", "attn_scores"}


def test_what_is_no_terminal_gets_whole_lines(demo_checkpoint, demo_dataset, tmp_path, capsys):
    target = tmp_path / ("long" * 30) / "a.safetensors"
    target.parent.mkdir()
    options = {"outputs": ["rmsnorm_gammas"], "device": "cpu", "allow_cpu": True}
    dump(demo_checkpoint, demo_dataset, target, **options)
    assert inspect_main([str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{target}: 31.0 kB ({target.stat().st_size:,} bytes), 1,024 boards, layers 0-3 of 4, "
        "all values finite"
    )
    found = [line.split() for line in lines]
    assert ["checkpoint", str(demo_checkpoint)] in found
    assert ["rmsnorm_gammas/blocks.3.mlp_norm", "float32", "(64)", "256", "B"] in found


def test_tables_in_a_pipe_have_a_line_for_each_row(capsys):
    assert dump_main(["--demo", "--list-outputs"]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "attn_scores",
        "attn.hook_attn_scores",
        "(N,",
        "4,",
        "4,",
        "16,",
        "16)",
        "16,384",
    ] in found
    keys = ["--outputs=*", "--n-samples=9", f"--output={'long' * 30}.pt"]
    assert dump_main(["--demo", "--dry-run", *keys]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert f"{'long' * 30}.pt; " in title
    assert ["rmsnorm_gammas/blocks.3.mlp_norm", "float32", "(64)", "256", "B"] in map(
        str.split, rows
    )


def test_a_run_that_did_nothing_has_no_table(tmp_path, capsys):
    target = tmp_path / "a.pt"
    arguments = ["--demo", "--n-samples=9", "--resume", f"--output={target}"]
    assert dump_main(arguments) == 0
    assert "forward" in capsys.readouterr().out
    assert dump_main(arguments) == 0
    assert capsys.readouterr().out == f"0 boards (and 9 resumed): {target}\n"


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_a_stdout_that_takes_nothing_is_named(as_json, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert dump_main(["--demo", "--list-outputs", *as_json]) == 1
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    error = f"error: cannot write to stdout: {os.strerror(errno.ENOSPC)}\n"
    assert capsys.readouterr().err == error


def test_help_shows_no_default_of_a_flag_that_takes_no_value(capsys):
    assert dump_main(["--help"]) == 0
    assert not re.search(r"\[default:\s+(True|False)\]", capsys.readouterr().out)


def test_the_same_warning_twice_is_shown_twice(capsys):
    with console.shown_warnings():
        for _ in range(2):
            warnings.warn(DumpActivationsWarning("again"), stacklevel=1)
    assert capsys.readouterr().err == "warning: again\n" * 2
