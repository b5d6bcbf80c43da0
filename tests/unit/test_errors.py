"""Exceptions of users' code, described in one line."""

import pytest

from syncnorm.errors import in_one_line


class _Silent(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (KeyError("a"), "KeyError: 'a'"),
        (AssertionError(), "AssertionError"),
        (_Silent(), "_Silent: without a message that can be read"),
    ],
)
def test_one_line(error, line):
    assert in_one_line(error) == line
