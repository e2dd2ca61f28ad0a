"""docs/cli.md against the parser: every command, every flag of it, every exit status, and none that is not there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdctl import cli

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
SECTIONS = dict(re.findall(r"^## `pdctl (\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
ALL = PAGE.split("## What holds for all")[1].split("\n## ")[0]


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags(inner)
        elif action.help != argparse.SUPPRESS:
            yield from (option for option in action.option_strings if option.startswith("--") and option != "--help")


def test_the_page_has_a_section_for_every_command_and_no_other() -> None:
    assert SECTIONS.keys() == commands(cli.parser()).keys()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_names_every_flag_of_its_command(name: str) -> None:
    told = set(re.findall(r"--[a-z][a-z-]*", SECTIONS[name] + ALL))
    assert {flag for flag in flags(commands(cli.parser())[name]) if flag not in told} == set()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_names_no_flag_that_its_command_does_not_have(name: str) -> None:
    own = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", SECTIONS[name]))
    known = {flag for parser in commands(cli.parser()).values() for flag in flags(parser)}
    assert own <= known


def test_the_page_and_the_code_name_the_same_exit_statuses() -> None:
    in_code = set(re.findall(r"^    (\d+) ", str(cli.__doc__), re.MULTILINE))
    in_page = set(re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE))
    assert in_page == in_code
    assert {"0", "1", "2", "69", "130", "141", "143"} <= in_page
