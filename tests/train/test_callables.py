"""Callables that a configuration names: imported only from packages that are allowed."""

import functools
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from syncnorm.errors import ConfigError
from syncnorm.train.config.callables import check_arguments, check_callables, resolve
from syncnorm.train.config.schema import Config

# What it does as it is imported leaves a trace.
SOURCE = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def build(**options): return options
LIMIT = 3
_hidden = build
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """Folder of the package `mine` with a module `nets`; beside it lies `mineevil`."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "mine/nets", "mineevil"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(SOURCE)
    (tmp_path / "mine" / "broken.py").write_text(
        "import mine.nets\nraise OSError('no such disk\\n\\x1b[31m')"
    )
    (tmp_path / "mine" / "leaving.py").write_text("import sys\nsys.exit(0)")
    (tmp_path / "mine" / "wrong.py").write_text("def (")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("mine", "mineevil")]:
        del sys.modules[name]


def imported(package: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(package)) for path in package.rglob("imported"))


@pytest.mark.parametrize(
    ("reference", "allowed", "modules"),
    [
        ("mine:build", ["mine"], ["mine"]),
        ("mine.nets:build", ["mine"], ["mine", "mine/nets"]),
        ("mine.nets:build", ["other", "mine.nets"], ["mine", "mine/nets"]),
        ("mineevil:build", ["mine", "mineevil"], ["mineevil"]),
    ],
)
def test_what_is_allowed_is_imported(reference, allowed, modules, package):
    assert resolve(reference, allowed, "model.name")(width=3) == {"width": 3}
    assert imported(package) == modules


def test_arguments_are_those_of_a_callable_itself():
    def data(root):
        return root

    @functools.wraps(data)
    def limited(root, *, limit):
        return data(root)[:limit]

    check_arguments("data.options", "mine:limited", limited, "x", limit=2)
    with pytest.raises(ConfigError, match=r"`data.options` must fit 'mine:data': got an unexp"):
        check_arguments("data.options", "mine:data", data, "x", limit=2)
    check_arguments("data.options", "builtins:dict", dict, limit=2)
    # What hands everything on takes what it wraps.
    for handed_on in (torch.no_grad()(data), functools.lru_cache(data)):
        check_arguments("data.options", "mine:data", handed_on, "x")
        with pytest.raises(ConfigError, match=r"must fit 'mine:data': got an unexp"):
            check_arguments("data.options", "mine:data", handed_on, "x", limit=2)


def test_a_class_is_a_callable():
    assert resolve("collections:OrderedDict", ["collections"], "model.name") is OrderedDict


@pytest.mark.parametrize(
    ("reference", "allowed", "remedy"),
    [
        ("mine:build", [], "--allow mine."),
        ("mine.nets:build", ["mine.ne", "nets", "mine.nets.deep"], "--allow mine."),
        ("mineevil:build", ["mine"], "--allow mineevil."),
        ("mine:build", ["mineevil", "min", "m"], "--allow mine."),
        ("builtins:eval", ["mine"], "--allow builtins."),
    ],
)
def test_what_is_not_allowed_is_not_imported(reference, allowed, remedy, package):
    message = f"`data.name` must name a callable of a package that is allowed, got '{reference}'."
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        resolve(reference, allowed, "data.name")
    assert remedy in str(caught.value)
    assert imported(package) == []


@pytest.mark.parametrize(
    "reference",
    [
        "mine:_hidden",
        "mine:__builtins__",
        "mine.__init__:build",
        "__main__:build",
        "mine:build.__globals__",
        "mine:build:build",
        "mine",
        "mine:",
        ":build",
        "mine/nets:build",
        "mine..nets:build",
        ".mine:build",
        "mine:build\n",
        "mine: build",
        "mine:build()",
        "miné:build",
    ],
)
def test_what_is_no_reference_is_not_imported(reference, package):
    with pytest.raises(
        ConfigError, match=r"`model.name` must be package.module:callable, with no part"
    ) as caught:
        resolve(reference, ["mine", "__main__"], "model.name")
    assert repr(reference) in str(caught.value)
    assert imported(package) == []


@pytest.mark.parametrize("allowed", ["", "mine.", "mine*", "mine:build", "a b", ".mine"])
def test_what_is_no_package_allows_nothing(allowed, package):
    with pytest.raises(
        ConfigError,
        match=rf"`--allow` must be the dotted name of a package, got '{re.escape(allowed)}'",
    ):
        resolve("mine:build", ["mine", allowed], "model.name")
    assert imported(package) == []


@pytest.mark.parametrize(
    ("reference", "cause"),
    [
        ("mine.missing:build", "ModuleNotFoundError: No module named 'mine.missing'"),
        ("mine:missing", "AttributeError: module 'mine' has no attribute 'missing'"),
        ("mine.broken:build", r"OSError: no such disk \x1b[31m"),
        ("mine.leaving:build", "SystemExit: 0"),
        ("mine.wrong:build", "SyntaxError: "),
    ],
)
def test_what_cannot_be_imported_says_why_in_one_line(reference, cause, package):
    with pytest.raises(ConfigError) as caught:
        resolve(reference, ["mine"], "data.name")
    message = str(caught.value)
    assert message.startswith(
        f"`data.name` must name what can be imported, got '{reference}': {cause}"
    )
    assert message.isprintable()


def test_what_is_not_callable(package):
    with pytest.raises(
        ConfigError, match=r"`model.name` must name a callable, got 'mine:LIMIT', which is 3"
    ):
        resolve("mine:LIMIT", ["mine"], "model.name")


@pytest.mark.parametrize("key", ["model", "data"])
def test_a_configuration_is_checked_without_an_import(key, package):
    names = {"model": "digits_resnet", "data": "digits"} | {key: "mine:build"}
    train = {"epochs": 1, "global_batch": 8, "lr": 0.1}
    config = Config.model_validate(
        {k: {"name": name} for k, name in names.items()} | {"train": train}
    )
    check_callables(config, ["mine"])
    with pytest.raises(
        ConfigError, match=rf"`{key}.name` must name a callable of a package that is allowed"
    ):
        check_callables(config, ["mineevil"])
    assert imported(package) == []
