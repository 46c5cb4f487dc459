"""Settings dataclasses as flags: one home for a flag, its default, its help and its check."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from peers import assert_says

from minildm.errors import InputError
from minildm.settings import Parser, Settings, add_flags, from_flags, setting


@dataclass(frozen=True)
class Example(Settings):
    count: int = setting(3, "how many", at_least=1)
    limit: int | None = setting(None, "at most (default: no limit)", at_least=1)
    rate: float = setting(0.5, "per second", above=0, below=2)
    name: str = setting("one", "of two", choices=("one", "two"))
    parts: tuple[str, ...] = setting(("a", "b"), "of three", choices=("a", "b", "c"))
    files: tuple[str, ...] = setting((), "files", metavar="FILE")
    place: Path = setting(Path("here"), "a folder")
    fast: bool = setting(False, "be fast")


def parse(*arguments, **defaults):
    parser = Parser(prog="example")
    add_flags(parser, Example, "example")
    parser.set_defaults(**defaults)
    return from_flags(Example, parser.parse_args(arguments))


def test_without_flags_the_settings_are_the_defaults():
    assert parse() == Example()


def test_every_field_is_a_flag():
    given = ["--count", "7", "--limit", "2", "--rate", "1.5", "--name", "two", "--parts", "c", "a", "--place", "there"]
    assert parse(*given, "--fast", "--files", "x") == Example(7, 2, 1.5, "two", ("c", "a"), ("x",), Path("there"), True)


def test_a_flag_of_several_values_may_be_given_once_or_repeatedly():
    assert parse("--files", "x", "y").files == parse("--files", "x", "--files", "y").files == ("x", "y")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 0}, "--count must be a number at least 1, got 0"),
        ({"count": None}, "--count"),
        ({"count": True}, "--count"),
        ({"count": "3"}, "--count"),
        ({"limit": 0}, "--limit"),
        ({"rate": 0}, "--rate must be a number above 0 and below 2, got 0"),
        ({"rate": 2}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"rate": float("inf")}, "--rate"),
        ({"name": "three"}, "--name must be one of one, two, got 'three'"),
        ({"parts": ("a", "d")}, "--parts must be one of a, b, c, got 'd'"),
    ],
)
def test_a_value_out_of_range_is_named_wherever_it_comes_from(changes, words):
    with pytest.raises(InputError) as error:
        Example(**changes)
    assert_says(error, words)
    if changes != {"count": "3"}:  # argparse makes 3 of that
        with pytest.raises(InputError):
            parse(**changes)


@pytest.mark.parametrize("arguments", [["--coun", "3"], ["--count"], ["--count", "x"], ["--name", "three"], ["stray"]])
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(*arguments)
    assert exit_.value.code == 2
    assert_says(capsys.readouterr().err.strip(), "error: ", "example --help")


def test_the_help_shows_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("how many (default: 3)", "at most (default: no limit)", "per second (default: 0.5)"):
        assert words in shown
    assert "default: None" not in shown and "default: False" not in shown


def test_a_prefix_gives_several_parts_of_a_program_their_own_flags():
    parser = Parser(prog="example")
    for prefix in ("first_", ""):
        add_flags(parser, Example, "example", prefix=prefix)
    args = parser.parse_args(["--first-count", "5"])
    assert (from_flags(Example, args, "first_").count, from_flags(Example, args).count) == (5, 3)


def test_settings_are_frozen_and_json_can_hold_them():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().count = 5
    assert Example().as_json() == {
        "count": 3,
        "limit": None,
        "rate": 0.5,
        "name": "one",
        "parts": ["a", "b"],
        "files": [],
        "place": "here",
        "fast": False,
    }
