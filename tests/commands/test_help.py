"""`--help`: options in groups, choices by name, and examples that are what they say."""

import re
import shlex
from dataclasses import fields

from dump_activations.commands.dump import dump_activations, main
from dump_activations.options import PRECISIONS, DumpOptions, Group


def sections(capsys):
    assert main(["--help"]) == 0
    parts = re.split(r"^(\S.*):$", capsys.readouterr().out, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_each_option_is_in_the_group_of_its_field(capsys):
    shown = sections(capsys)
    shown.pop("Examples")
    assert {*shown} >= {*Group}
    flags = {flag.name: flag.opts[-1] for flag in dump_activations.params}
    for each in fields(DumpOptions):
        if each.name in flags:
            found = [
                t for t, text in shown.items() if re.search(rf"^  {flags[each.name]} ", text, re.M)
            ]
            assert found == [each.metadata["group"]], each.name
    assert "--dry-run" in shown["Look before you run"]


def test_choices_are_named(capsys):
    shown = sections(capsys)
    assert "--dtype [fp32|fp16|bf16]" in shown[Group.KEEP]
    assert f"--precision [{'|'.join(PRECISIONS)}]" in shown[Group.COMPUTE]


def test_the_examples_are_calls_that_can_be_made(capsys):
    text = sections(capsys)["Examples"].replace("\\\n", "")
    calls = re.findall(r"^ +dump-activations (.*)$", text, re.M)
    assert len(calls) == 2
    for call in calls:
        with dump_activations.make_context("dump-activations", shlex.split(call)) as context:
            context.params.pop("use_demo")
            known = {each.name for each in fields(DumpOptions)}
            DumpOptions(
                **{
                    name: value
                    for name, value in context.params.items()
                    if name in known and name != "allow_cpu"
                },
                allow_cpu=True,
            )


def test_lines_fit_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(len(line) for line in "".join(sections(capsys).values()).splitlines()) <= 80
