"""``python -m minildm``: usage, version and unknown commands."""

import subprocess
import sys

import pytest

import minildm
from minildm.__main__ import COMMANDS, main


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_lists_every_command_with_one_line(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, function in COMMANDS.items():
        assert f"  {name:<12} {function.__doc__}" in lines


def test_version_is_the_packages():
    command = [sys.executable, "-m", "minildm", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"minildm {minildm.__version__}\n"


def test_an_unknown_command_is_answered_with_the_known_ones_and_code_2(capsys):
    assert main(["fdi"]) == 2
    error = capsys.readouterr().err
    assert "'fdi'" in error and all(name in error for name in COMMANDS) and error.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0 and f"usage: python -m minildm {name}" in capsys.readouterr().out


def test_the_usage_line_names_what_a_run_cannot_do_without(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    assert capsys.readouterr().out.splitlines()[0].endswith("audit generated --train DATA --holdout DATA [options]")


@pytest.mark.parametrize("command", [["fid", "a", "b", "--rep", "3"], ["clip-score", "a", "--prompt", "x.csv"]])
def test_flags_cannot_be_abbreviated(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and f"unrecognized arguments: {command[-2]}" in capsys.readouterr().err
