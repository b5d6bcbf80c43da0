"""The YAML subset of configuration files."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from syncnorm.errors import ConfigError
from syncnorm.train.config.strict_yaml import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E+2", 500.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("1.0e-5", 1e-5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("off", "off"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ('"1"', "1"),
        ("[1, 1.5, a]", [1, 1.5, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("{<<: 1}", {"<<": 1}),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    parsed = parse(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan():
    assert math.isnan(parse(".nan", "here"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"here: key 'a' is given twice \(line 3, column 1\)"),
        ("a: {b: 1, b: 1}", r"here: key 'b' is given twice \(line 1, column 11\)"),
        ("1: a", r"here: key 1 must be a string \(line 1, column 1\)"),
        ("? [a]\n: b", r"here: key \['a'\] must be a string"),
        ("a: &x 1\nb: *x", r"here: alias \*x is not allowed \(line 2, column 4\)"),
        (
            "a: !!python/object/apply:os.system ['true']",
            r"tag tag:yaml.org,2002:python/object/apply:os.system is not",
        ),
        ("a: !!int 3", r"here: tag tag:yaml.org,2002:int is not allowed \(line 1, column 4\)"),
        ("a: !mine 3", r"here: tag !mine is not allowed"),
        ("a: [1, 2", r"here: .* \(line 1, column 9\)"),
        ("a: b: c", r"here: mapping values are not allowed here \(line 1, column 5\)"),
        ("a: 1\n---\nb: 2", r"here: but found another document \(line 2, column 1\)"),
        ("a: \x07", r"here: not text that YAML allows: special characters are not allowed"),
        ("a: " + "9" * 5000, r"here: integer of 5000 digits is too long \(line 1, column 4\)"),
        ("[" * 100_000, r"here: nested too deeply"),
    ],
)
def test_what_surprises_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text, "here")


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
_STRINGS_THAT_LOOK_LIKE_OTHERS = st.sampled_from(
    ["1e-3", "off", "010", "0o7", "1:30", "null", "=", "<<", "2024-01-01"]
)


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"])), _SCALARS | _STRINGS_THAT_LOOK_LIKE_OTHERS
    )
)
def test_what_is_dumped_reads_back_equal_in_both_versions_of_yaml(values):
    text = dump(values)
    assert parse(text, "here") == values
    assert yaml.safe_load(text) == values


def test_equal_values_are_written_out_again():
    shared = {"b": 1}
    assert parse(dump({"a": shared, "c": shared}), "here") == {"a": shared, "c": shared}
