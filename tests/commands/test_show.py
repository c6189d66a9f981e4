"""Tables of any terminal's width, one line per row in a pipe, and JSON that every reader takes."""

import html
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dump_activations import dump
from dump_activations.commands.console import Table, show
from dump_activations.commands.dump import main as dump_main
from dump_activations.commands.inspect import main
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.reading.stored_statistics import stored_statistics

STYLES = re.compile(r"\x1b\[[0-9;]*m")
WORDS = st.text(st.sampled_from("abc/._0盤\x1b"), min_size=1, max_size=40)
NUMBERS = st.integers(0, 10**12).map(lambda n: f"{n:,}")


@st.composite
def tables(draw):
    columns = draw(st.integers(2, 6))
    numbers = [i for i in range(1, columns) if draw(st.booleans())]
    cells = [NUMBERS if i in numbers else WORDS for i in range(columns)]
    rows = draw(st.lists(st.tuples(*cells) | st.tuples(WORDS), max_size=6))
    headings = [f"h{i}" for i in range(columns)]
    return Table(headings, rows, [headings[i] for i in numbers])


def escaped(cell):
    return cell.replace("\x1b", "\\x1b")


@given(tables())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_a_pipe_gets_one_whole_line_per_row(capsys, table):
    capsys.readouterr()
    show(None, [table])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line] == [
        [*map(escaped, row)] for row in (table.headings, *table.rows)
    ]
    assert all(line == line.rstrip() for line in lines)


def test_columns_are_aligned(capsys):
    rows = [("a", "1", "x"), ("title",), ("盤面!", "1,000", "y")]
    show(None, ["line", Table(("name", "size", "text"), rows, ["size"])])
    assert capsys.readouterr().out.splitlines() == [
        *("line", "", "name    size  text", "a          1  x", "", "title", "盤面!  1,000  y")
    ]


def on_terminal(terminal, monkeypatch, width, *parts):
    monkeypatch.setenv("COLUMNS", str(width))
    close = terminal("stdout")
    show(None, parts)
    return [line.rstrip() for line in STYLES.sub("", close()).split("\r\n")]


def test_a_long_text_wraps_in_its_column(terminal, monkeypatch):
    table = Table(("key", "value"), [("k", "some words of which there are more than fit")])
    assert on_terminal(terminal, monkeypatch, 30, table)[1:-1] == [
        *("key  value", "k    some words of which there", "     are more than fit")
    ]


def test_a_narrow_terminal_gets_lines_below_each_name(terminal, monkeypatch):
    table = Table(("name", "size", "text"), [("long" * 5, "1,000", "some words")], ["size"])
    path = "path/" * 5
    shown = on_terminal(terminal, monkeypatch, 14, f"a {path}", table)
    assert shown[:-1] == ["a", path, "", "long" * 5, "  size 1,000", "  text some", "  words"]


@pytest.fixture(scope="module")
def two_dumps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    common = ["--demo", "--n-samples=99", "--outputs=pooled,rmsnorm_gammas", "--labels=all"]
    for name in ("a.pt", "b.pt"):
        assert dump_main([*common, f"--seed={ord(name[0])}", "-o", str(directory / name)]) == 0
    return directory


@pytest.mark.parametrize("plain", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
@pytest.mark.parametrize("width", [40, 50, 80, 120])
def test_all_tables_fit_the_terminal(width, plain, terminal, two_dumps, monkeypatch):
    monkeypatch.chdir(two_dumps)
    monkeypatch.setenv("COLUMNS", str(width))
    close = terminal("stdout")
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    assert main(["a.pt"]) == 0
    assert main(["a.pt", "b.pt"]) == 1
    assert dump_main(["--list-outputs"]) == 0
    assert dump_main(["--demo", "--list-outputs"]) == 0
    shown = close()
    assert ("\x1b" in shown) != bool(plain)
    lines = STYLES.sub("", shown).split("\r\n")
    assert [line for line in lines if len(line) > width and " " in line] == []  # Paths stay whole.
    names = {line.split()[0] for line in lines if line}
    assert names >= {"rmsnorm_gammas/blocks.3.attn_norm", "labels/tile_65536_mask", "attn_scores"}


def test_a_pipe_gets_a_file_and_a_preview_in_whole_lines(
    demo_checkpoint, demo_dataset, tmp_path, capsys
):
    target = tmp_path / ("long" * 30) / "a.safetensors"
    target.parent.mkdir()
    options = {"outputs": ["rmsnorm_gammas"], "device": "cpu", "allow_cpu": True}
    dump(demo_checkpoint, demo_dataset, target, **options)
    row = ["rmsnorm_gammas/blocks.3.mlp_norm", "float32", "(64)", "256", "B"]
    assert main([str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{target}: 31.0 kB ({target.stat().st_size:,} bytes), 1,024 boards, all values finite"
    )
    found = [line.split() for line in lines]
    assert ["checkpoint", str(demo_checkpoint)] in found
    assert row in found
    assert dump_main(["--demo", "--dry-run", "--outputs=*", f"--output={'long' * 30}.pt"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert f"{'long' * 30}.pt; " in title
    assert row in map(str.split, rows)


def test_a_run_ends_with_one_line_and_its_stages_if_asked_for(tmp_path, capsys):
    target = tmp_path / "a.pt"
    arguments = ["--demo", "--n-samples=9", f"--output={target}"]
    nbytes = r"[\d.]+ kB in " + re.escape(str(target))
    assert dump_main(arguments) == 0
    line = rf"9 boards of final_hidden: {nbytes}; \d+\.\d s, [\d,]+ boards/s in the loop\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert dump_main([*arguments, "--verbose"]) == 0
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"0 boards of final_hidden \(and 9 resumed\): {nbytes}; \d+\.\d s", first)
    stages = {row.split("  ")[0] for row in rows}
    assert stages == {
        *("stage", "setup", "boards", "forward", "copy", "write"),
        *("waiting for boards", "whole loop", "commit"),
    }


def test_a_summary_reads_as_the_command_ends(demo_checkpoint, demo_dataset, tmp_path):
    options = {"n_samples": 9, "outputs": "pooled", "device": "cpu", "allow_cpu": True}
    summary = dump(demo_checkpoint, demo_dataset, tmp_path / "<a>.npz", **options)
    assert str(summary).startswith("9 boards of pooled: ")
    assert f"in {tmp_path / '<a>.npz'}; " in str(summary)
    page = summary._repr_html_()
    assert f"<p>{html.escape(str(summary))}</p><table>" in page
    assert "<td>whole loop</td>" in page


@pytest.fixture(scope="module", params=[True, False], ids=["stored", "computed"])
def path(request, tmp_path_factory, demo_checkpoint, demo_dataset):
    """Return a file of known activations, with statistics or without."""
    return activations(tmp_path_factory, demo_checkpoint, demo_dataset, stats=request.param)


@pytest.fixture(scope="module")
def known(tmp_path_factory, demo_checkpoint, demo_dataset):
    path = activations(tmp_path_factory, demo_checkpoint, demo_dataset, stats=True)
    return stored_statistics(inspect_dump(path))


def activations(tmp_path_factory, checkpoint, dataset, *, stats):
    path = tmp_path_factory.mktemp("dump") / "x.safetensors"
    options = {"layers": [0, 3], "n_samples": 100, "device": "cpu", "allow_cpu": True}
    dump(checkpoint, dataset, path, outputs=["layer_outputs", "pooled"], stats=stats, **options)
    return path


def shown_json(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_json_has_every_statistic_if_asked(path, known, capsys):
    assert shown_json(capsys, path, "--stats")["stats"] == {
        tensor: {name: values.tolist() for name, values in of_tensor.items()}
        for tensor, of_tensor in known.items()
    }
    assert "stats" not in shown_json(capsys, path)


def test_json_has_numbers_as_numbers_and_tables_as_tables(path, capsys):
    metadata = shown_json(capsys, path)["metadata"]
    assert metadata["n_samples"] == 100
    assert metadata["compile"] is False
    assert metadata["layers"] == "0,3"
    assert metadata["integrity"]["pooled"].keys() == {"crc32", "nan", "inf"}
    assert isinstance(metadata["torch_version"], str)


def test_json_keeps_texts_that_only_look_like_numbers(tmp_path, capsys):
    metadata = {"checkpoint": "42", "a": "007", "b": "2.10", "c": "1e5", "d": "NaN", "e": "null"}
    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors", metadata | {"f": '[NaN, "g"]'})
    shown = shown_json(capsys, tmp_path / "x.safetensors")["metadata"]
    assert shown == metadata | {"f": [None, "g"]}


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.array([[1, np.nan], [2, np.inf]], np.float32)}, path)
    assert shown_json(capsys, path, "--stats")["stats"]["x"]["mean"] == [1.5, None]


def test_a_table_has_a_row_per_layer(path, known, capsys):
    assert main([str(path), "--stats"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {tuple(line[:2]): line[2:] for line in lines if len(line) == 8}
    layer = known["layer_outputs"]
    rms = np.sqrt(layer["mean_squared_norm"][1] / 64)
    assert found["layer_outputs", "3"] == [
        "1,600",
        f"{layer['norm_mean'][1]:.5g}",
        f"{rms:.5g}",
        f"{layer['min'][1].min():.5g}",
        f"{layer['max'][1].max():.5g}",
        f"{layer['count_abs_gt_6'][1].sum():,.0f}",
    ]


@pytest.mark.parametrize("left_out", ["nothing", "stats/layer_outputs/count"])
def test_a_dump_saved_by_another_program_has_statistics(path, tmp_path, capsys, left_out):
    """Its metadata, which numbers the layers, is lost."""
    again = tmp_path / "again.safetensors"
    tensors = load_file(path)
    tensors.pop(left_out, None)
    save_file(tensors, again)
    assert shown_json(capsys, again, "--stats")["stats"].keys() >= {"pooled"}
    assert main([str(again), "--stats"]) == 0
    assert "pooled" in capsys.readouterr().out


def pair(tmp_path, first, second):
    paths = []
    for name, tensors in {"a": first, "b": second}.items():
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file(tensors, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("second", "tolerance", "code"),
    [
        (np.array([1000.0, 0.0], "f4"), "", 0),
        (np.array([1001.0, 1e-6], "f4"), "--rtol=1e-2", 1),
        (np.array([1001.0, 1e-6], "f4"), "--atol=1e-5", 1),
        (np.array([1001.0, 1e-6], "f4"), "--rtol=1e-2 --atol=1e-5", 0),
        (np.array([1001.0, 0.0], "f4"), "--atol=1", 0),
        (np.array([1001.0, 0.0], "f4"), "--atol=0.99", 1),
        (np.array([1000.0, 0.0], "f2"), "", 1),
        (np.array([1001.0, 1e-6], "f2"), "--rtol=1e-2 --atol=1e-5", 0),
        (np.array([1001, 0], "i8"), "--rtol=1 --atol=10", 1),
        (np.array([1000.0, np.nan], "f4"), "--rtol=1 --atol=10", 1),
    ],
)
def test_a_tolerance_decides_the_exit_code(second, tolerance, code, tmp_path, capsys):
    first = np.array([1000, 0], "i8" if second.dtype.kind == "i" else "f4")
    files = pair(tmp_path, {"x": first}, {"x": second})
    assert main([*files, *tolerance.split(), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["equal"] == (code == 0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a", "a", "--stats"], "--stats: takes one file at a time"),
        (["a", "a", "--verify"], "--verify: takes one file at a time"),
        (["a", "--rtol", "1"], "--rtol: takes two files to compare"),
        (["a", "a", "--atol", "-1"], "--atol"),
    ],
)
def test_options_of_one_file_or_two(arguments, reason, path, capsys):
    assert main([str(path) if each == "a" else each for each in arguments]) == 2
    assert reason in capsys.readouterr().err
