"""A resolved configuration with the origins of its values, and the table of keys."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from syncnorm.errors import ConfigError
from syncnorm.train.config.file import find_config, load_config
from syncnorm.train.config.norm import NormSection
from syncnorm.train.config.schema import Config
from syncnorm.train.config.show import origins, schema, show
from syncnorm.train.config.strict_yaml import dump, parse
from syncnorm.train.config.train import OptimizerSection, ScheduleSection
from syncnorm.train.optim import OPTIMIZERS

ROOT = Path(__file__).parents[2]
TEXT = """\
# a comment
model: {name: digits_resnet}
data:
  name: digits
  augment:

    flip: true
norm:
  rules:
    "layer1.*": frozen
    'bn1$': group_norm
train: {epochs: 2, global_batch: 64,
        lr: 1e-1, optimizer: {name: SGD, momentum: 0.9}}
"""


@pytest.fixture
def config_path(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return str(path)


def test_origins(config_path):
    found = {
        ".".join(key): (value, origin)
        for key, value, origin in origins(config_path, ["train.lr=3", "train.clip=null"])
    }
    assert found["model.name"] == ("digits_resnet", f"{config_path}:2")
    assert found["data.augment.flip"] == (True, f"{config_path}:7")
    assert found["data.augment.crop"] == (0, "default")
    assert found["norm.rules.layer1.*"] == ("frozen", f"{config_path}:10")
    assert found["train.epochs"] == (2, f"{config_path}:12")
    assert found["train.optimizer.momentum"] == (0.9, f"{config_path}:13")
    assert found["train.lr"] == (3.0, "command line")
    assert found["train.clip"] == (None, "command line")
    assert found["model.options"] == ({}, "default")


def test_an_argument_that_is_taken_out_is_not_shown(config_path):
    overrides = [
        "train.optimizer.name=AdamW",
        "train.optimizer.momentum=null",
        "train.optimizer.eps=1e-6",
    ]
    found = {
        ".".join(key): origin
        for key, _, origin in origins(config_path, overrides)
        if key[:2] == ("train", "optimizer")
    }
    assert found == {"train.optimizer.name": "command line", "train.optimizer.eps": "command line"}


def test_every_value_has_an_origin_in_one_column(config_path):
    lines = show(config_path, ["train.lr=3"]).splitlines()
    values = [line for line in lines if not line.endswith(":")]
    assert len(values) == len(list(origins(config_path)))
    assert len({line.index("  # ") + len(line.partition("  # ")[1]) for line in values}) == 1
    assert next(line for line in lines if line.startswith("  lr:")).split() == [
        "lr:",
        "3.0",
        "#",
        "command",
        "line",
    ]
    assert next(line for line in lines if "layer1" in line).split()[:2] == ["layer1.*:", "frozen"]


@pytest.mark.parametrize(
    "overrides", [[], ["train.lr=3", "train.optimizer.momentum=null", "norm.rules.x.y=frozen"]]
)
def test_what_is_shown_is_the_same_configuration(overrides, config_path, tmp_path):
    (tmp_path / "shown.yaml").write_text(show(config_path, overrides))
    assert load_config(str(tmp_path / "shown.yaml")) == load_config(config_path, overrides)


@pytest.mark.parametrize(
    "path", sorted(find_config("digits").parent.glob("*.yaml")), ids=lambda path: path.stem
)
@pytest.mark.parametrize("name", [*NormSection.model_json_schema()["properties"]["name"]["enum"]])
def test_packed_configurations_can_be_fed_back(name, path, tmp_path):
    overrides = [f"norm.name={name}"] + ([] if name.startswith("sync") else ["norm.sync=none"])
    (tmp_path / "shown.yaml").write_text(show(str(path), overrides))
    assert load_config(str(tmp_path / "shown.yaml")) == load_config(str(path), overrides)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    options=st.dictionaries(st.sampled_from(["a", "b", "null"]), _VALUES),
    patterns=st.lists(st.text("abz.:#'\"- \t\né{}"), unique=True, max_size=3),
    # With ~ it begins at home, which the resolved one names.
    run_dir=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda text: text[0] != "~"
    ),
)
def test_whatever_a_configuration_holds_is_shown_as_yaml(options, patterns, run_dir, tmp_path):
    values = parse(TEXT, "TEXT")
    values["model"] = {"name": "mine:build", "options": options}
    values["norm"]["rules"] = dict.fromkeys(patterns, "frozen")
    values["run_dir"] = run_dir
    (tmp_path / "mine.yaml").write_text(dump(values))
    (tmp_path / "shown.yaml").write_text(show(str(tmp_path / "mine.yaml")))
    shown = load_config(str(tmp_path / "shown.yaml"))
    assert shown == load_config(str(tmp_path / "mine.yaml"))
    assert (shown.model.options, list(shown.norm.rules), shown.run_dir) == (
        options,
        patterns,
        run_dir,
    )


def test_a_path_cannot_end_a_comment(tmp_path):
    (tmp_path / "a\nmodel: 3.yaml").write_text(TEXT)
    shown = show(str(tmp_path / "a\nmodel: 3.yaml"))
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(str(tmp_path / "shown.yaml")).model.name == "digits_resnet"


def test_a_bad_configuration_is_not_shown(config_path):
    with pytest.raises(ConfigError, match=r"`train.lr` must be greater than 0, got -1"):
        show(config_path, ["train.lr=-1"])


def _sections(section: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    found = {prefix: section}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _sections(field.annotation, f"{prefix}{name}.")
    return found


def _json_section(prefix: str) -> dict[str, Any]:
    root = json.loads(schema("json"))
    section = root
    for name in prefix.split(".")[:-1]:
        section = root["$defs"][section["properties"][name]["$ref"].rpartition("/")[2]]
    return section


@pytest.mark.parametrize("prefix", _sections(Config))
def test_json_schema_says_what_the_model_does(prefix):
    model, described = _sections(Config)[prefix], _json_section(prefix)
    assert list(described["properties"]) == list(model.model_fields)
    assert described["additionalProperties"] is (model in (OptimizerSection, ScheduleSection))
    assert described.get("required", []) == [
        n for n, field in model.model_fields.items() if field.is_required()
    ]
    for name, field in model.model_fields.items():
        if not field.is_required():
            default = (
                field.default.model_dump()
                if isinstance(field.default, BaseModel)
                else field.default
            )
            assert described["properties"][name]["default"] == default


def test_json_schema_has_the_names_that_are_taken():
    assert _json_section("train.optimizer.")["properties"]["name"]["enum"] == list(OPTIMIZERS)
    for name in _json_section("train.optimizer.")["properties"]["name"]["enum"]:
        assert OptimizerSection(name=name).name == name
    assert _json_section("data.")["properties"]["name"]["anyOf"][1] == {
        "pattern": r"^[A-Za-z]\w*(\.[A-Za-z]\w*)*:[A-Za-z]\w*$"
    }


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_every_key_is_described(form):
    text = schema(form)
    for prefix, section in _sections(Config).items():
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                (line,) = [
                    each
                    for each in text.splitlines()
                    if each.strip("| ").split()[:1] in ([f"{prefix}{name}"], [f"`{prefix}{name}`"])
                ]
                assert field.is_required() == ("required" in line), line
            assert field.description


def test_a_line_of_each_table():
    text, table = schema("text"), schema("markdown")
    assert (
        "  train.epochs          integer; required; 1 to 1000000000\n      passes over the training "
        "set\n" in text
    )
    assert "| `train.ema` | number or null | > 0, < 1 | `null` | decay of an average of " in table
    assert (
        "| `train.optimizer.ARGUMENT` | any |  | torch's | an argument of what "
        "`train.optimizer.name` names |" in table
    )
    assert max(map(len, text.splitlines())) <= 120


def test_the_document_is_up_to_date():
    document = (ROOT / "docs" / "config.md").read_text()
    assert document == schema("markdown"), "run: syncnorm config schema --markdown > docs/config.md"
