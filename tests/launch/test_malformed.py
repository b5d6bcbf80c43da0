"""Hundreds of malformed configurations: each is one message that names the key or the line, status
2, and no trace.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from syncnorm.cli import main
from syncnorm.train.config.schema import Config
from syncnorm.train.config.strict_yaml import dump
from tests.launch import commands

GOOD: dict[str, Any] = {
    "model": {"name": "digits_resnet"},
    "data": {"name": "digits"},
    "train": {"epochs": 1, "global_batch": 8, "lr": 0.1, "optimizer": {"momentum": 0.9}},
    # A case that is let through by mistake ends here, and starts nothing.
    "launch": {"device": "cuda", "workers": 256},
}
TEXT = dump(GOOD)


@dataclass(frozen=True)
class Case:
    """A malformed configuration and what its message must say."""

    name: str
    content: bytes
    says: tuple[str, ...]


def _with(key: str, value: Any) -> str:
    values = copy.deepcopy(GOOD)
    section = values
    *path, last = key.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[last] = value
    return dump(values)


def _without(key: str) -> str:
    values = copy.deepcopy(GOOD)
    section = values
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    del section[last]
    return dump(values)


def _case(name: str, content: str | bytes, *says: str) -> Case:
    return Case(name, content if isinstance(content, bytes) else content.encode(), says)


ROOT = Config.model_json_schema()


def _keys(
    section: dict[str, Any] = ROOT, prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Each key of the schema, what the schema says of it, and whether it is required."""
    for name, field in section["properties"].items():
        yield prefix + name, field, name in section.get("required", [])
        if "$ref" in field:
            yield from _keys(ROOT["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.")


WRONG: dict[str, list[Any]] = {
    "section": [3, "word", [1], True],
    "integer": ["word", 1.5, True, [1], {"a": 1}, "1"],
    "number": ["word", True, [1], {"a": 1}, float("inf"), float("nan")],
    "string": [3, True, ["a"], {"a": 1}],
    "boolean": ["yes", 1, 0.0, [True]],
    "object": [3, "word", ["a"], False],
    "array": [3, "word", {"a": 1}, False],
}


def _wrong_types() -> Iterator[Case]:
    for key, field, _ in _keys():
        kinds = field.get("anyOf") or field.get("oneOf") or [field]
        kind = next((each for each in kinds if each.get("type", "null") != "null"), field)
        wrong = [
            *WRONG[kind.get("type", "section")],
            *([] if {"type": "null"} in kinds else [None]),
        ]
        for value in wrong:
            if isinstance(value, list) and any(each.get("minItems") for each in kinds):
                yield _case(
                    f"type:{key}={value}", _with(key, value), f"`{key}` must be a number or a pair"
                )
            else:
                yield _case(f"type:{key}={value}", _with(key, value), f"`{key}` must be ", ", got ")


def _impossible_values() -> Iterator[Case]:
    for key, field, _ in _keys():
        for kind in field.get("anyOf") or field.get("oneOf") or [field]:
            beyond = [kind["minimum"] - 1] if "minimum" in kind else []
            beyond += [kind["maximum"] + 1] if "maximum" in kind else []
            beyond += [
                kind[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in kind
            ]
            beyond += [""] if "minLength" in kind else []
            beyond += ["nonsense", f"{kind['enum'][0]}x"] if "enum" in kind else []
            for value in beyond:
                yield (
                    _case(
                        f"value:{key}={value}",
                        _with(key, value),
                        f"`{key}` must be",
                        f"got {value!r}",
                    )
                    if (value != "")
                    else _case(
                        f"value:{key}=''",
                        _with(key, value),
                        f"`{key}` must have at least 1 character",
                    )
                )


def _unknown_keys() -> Iterator[Case]:
    for key, field, is_required in _keys():
        if key.startswith(("train.optimizer.", "train.schedule.")):
            continue  # every key is an argument there
        typo = key[:-1] if len(key.rpartition(".")[2]) > 3 else key + "s"
        yield _case(
            f"unknown:{typo}", _with(typo, 1), f"`{typo}` is not a key. The nearest key is `{key}`."
        )
        if "$ref" in field and key not in ("train.optimizer", "train.schedule"):
            yield _case(
                f"unknown:{key}.{{}}", _with(f"{key}.zzz", {"deep": 1}), f"`{key}.zzz` is not a key"
            )
        if is_required:
            yield _case(f"missing:{key}", _without(key), f"`{key}` is missing")


def _arguments() -> Iterator[Case]:
    for key, value, says in [
        (
            "momentm",
            0.9,
            "`train.optimizer.momentm` is not an argument of SGD here. The nearest key is",
        ),
        (
            "lr",
            0.1,
            "`train.optimizer.lr` is not an argument of SGD here. The nearest key is `train.lr`.",
        ),
        ("params", [], "`train.optimizer.params` is not an argument"),
        ("momentum", "0.9", "`train.optimizer.momentum` must be a valid number, got '0.9'"),
        ("momentum", True, "`train.optimizer.momentum` must be a valid number, got True"),
        ("momentum", None, "`train.optimizer.momentum` must be a valid number, got None"),
        ("momentum", float("inf"), "`train.optimizer.momentum` must be a finite number, got inf"),
        ("momentum", {"a": 1}, "`train.optimizer.momentum` must be a valid number"),
        ("momentum", -1, "`train.optimizer`: SGD refuses"),
        ("nesterov", "no", "`train.optimizer.nesterov` must be a valid boolean, got 'no'"),
        ("name", "sgd", "`train.optimizer.name` must be one of "),
        ("name", "LBFGS", "`train.optimizer.name` must be one of "),
        ("name", "AdamW", "`train.optimizer.momentum` is not an argument of AdamW here"),
    ]:
        yield _case(f"optimizer:{key}={value}", _with(f"train.optimizer.{key}", value), says)
    for options, says in [
        (
            {"name": "cosine", "gamma": 1},
            "`train.schedule.gamma` is not an argument of cosine here. It takes none.",
        ),
        ({"name": "StepLR"}, "`train.schedule.step_size` is missing, which StepLR needs"),
        ({"name": "StepLR", "step_size": 0}, "`train.schedule`: StepLR refuses {'step_size': 0}"),
        (
            {"name": "StepLR", "step_size": 1.5},
            "`train.schedule.step_size` must be a valid integer, got 1.5",
        ),
        ({"name": "StepLR", "step_sise": 1}, "The nearest key is `train.schedule.step_size`"),
        (
            {"name": "MultiStepLR", "milestones": 3},
            "`train.schedule.milestones` must be a list, got 3",
        ),
        (
            {"name": "MultiStepLR", "milestones": ["a"]},
            "`train.schedule.milestones.0` must be a valid integer",
        ),
        ({"name": "LambdaLR"}, "`train.schedule.name` must be one of "),
        (
            {"name": "CyclicLR", "base_lr": 0, "max_lr": 1, "scale_fn": "os.system"},
            "`train.schedule.scale_fn` must be",
        ),
        (
            {"name": "CosineAnnealingLR", "T_max": 3, "optimizer": 1},
            "`train.schedule.optimizer` is not an argument",
        ),
    ]:
        yield _case(f"schedule:{options}", _with("train.schedule", options), says)
    together = _with("train.schedule", {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1}).replace(
        "momentum: 0.9", "name: Adagrad"
    )
    yield _case(
        "schedule and optimizer", together, "`train`: schedule CyclicLR must fit optimizer Adagrad"
    )


def _rules() -> Iterator[Case]:
    for key, value, says in [
        (
            "norm.rules",
            {"a(": "frozen"},
            "`norm.rules` must have regular expressions as keys, got 'a('",
        ),
        (
            "norm.rules",
            {"*": "frozen"},
            "`norm.rules` must have regular expressions as keys, got '*'",
        ),
        (
            "norm.rules",
            {"[[a]": "frozen"},
            "`norm.rules` must have regular expressions as keys, got '[[a]'",
        ),
        (
            "norm.rules",
            {"a{4294967296}": "frozen"},
            "`norm.rules` must have regular expressions as keys",
        ),
        ("norm.rules", {"(" * 400: "frozen"}, "`norm.rules` must have regular expressions as keys"),
        ("norm.rules", {"bn1.*": "frosen"}, "`norm.rules.bn1.*` must be 'batch_norm'"),
        ("norm.rules", {"bn1": {"name": "frozen"}}, "`norm.rules.bn1` must be 'batch_norm'"),
        (
            "norm",
            {"name": "batch_norm", "sync": "batch"},
            "`norm`: sync must be none with name batch_norm",
        ),
        (
            "norm",
            {"name": "frozen", "renorm": {"r_max": 2}},
            "`norm`: renorm must be left out with name frozen",
        ),
        (
            "norm",
            {"name": "sync_batch_renorm", "renorm": {"r_steps": 5}},
            "`norm.renorm`: warmup_steps, r_steps and",
        ),
        ("train.norm_batch", 5, "`train`: norm_batch must be a divisor of global_batch = 8, got 5"),
        (
            "model.options",
            {"width": 3},
            "`model`: options must be left out with name digits_resnet",
        ),
        (
            "data.options",
            {"width": 3},
            "`data`: options must be left out with name digits. They belong to folder, ",
        ),
        (
            "model",
            {"name": "mine:build", "options": {"not a name": 3}},
            "`model.options` must have names of arguments",
        ),
        ("run_dir", "a\0b", r"`run_dir` must be a path, got 'a\x00b'"),
        ("data.root", "\0", r"`data.root` must be a path, got '\x00'"),
        ("train.epochs", 10**400, "`train.epochs` must be less than or equal to"),
        ("train.lr", 10**400, "`train.lr` must be a valid number"),
        ("train.seed", 2**63, "`train.seed` must be less than"),
        ("model.name", "x" * 50_000, "`model.name` must be one of "),
        ("model.name", "mine:__builtins__", "`model.name` must be one of "),
        ("data.name", "mine.__main__:build", "`data.name` must be one of "),
        ("data.name", "../mine:build", "`data.name` must be one of "),
        ("model.name", "digits_resnet\x1b[31m\n", "`model.name` must be one of "),
        ("model.options", 3, "`model.options` must be a mapping, got 3"),
        ("train\n.lr", 3, r"`train\n` is not a key"),
        ("\x1b[31mtrain", 3, r"`\x1b[31mtrain` is not a key"),
        ("x" * 450, 3, f"`{'x' * 97}...` is not a key"),
        ("<<", {"epochs": 3}, "`<<` is not a key"),
        ("train.<<", {"epochs": 3}, "`train.<<` is not a key"),
    ]:
        yield _case(f"rule:{key[:40]}={str(value)[:40]}", _with(key, value), says)
    pooled = _with("train.norm_batch", 4) + "norm: {sync: running}\n"
    yield _case(
        "rule between sections",
        pooled,
        ": `train.norm_batch` must be null with norm.sync running, got 4",
    )
    for count in (2, 20, 21, 1500):
        many = TEXT + "".join(f"unknown{index}: 1\n" for index in range(count))
        yield _case(f"rule:{count} keys", many, f"{count} problems\n", "`unknown0` is not a key")


def _callables() -> Iterator[Case]:
    for key in ("model.name", "data.name"):
        for reference in ("mine:build", "os:system", "torch.hub:load", "builtins:eval"):
            says = f"`{key}` must name a callable of a package that is allowed, got '{reference}'. To run its code, add"
            yield _case(
                f"callable:{key}={reference}",
                _with(key, reference),
                says,
                f"--allow {reference[:2]}",
            )


# The first line behind a whole configuration.
LINE = TEXT.count("\n") + 1


def _yaml() -> Iterator[Case]:
    bomb = "a: &a [x, x]\n" + "".join(
        f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9)
    )
    for name, text, says in [
        (
            "tag python",
            "a: !!python/object/apply:os.system ['touch hacked']",
            "os.system is not allowed (line",
        ),
        ("tag python name", "a: !!python/name:os.system", "os.system is not allowed (line"),
        (
            "tag int",
            "a: !!int 3",
            f"tag tag:yaml.org,2002:int is not allowed (line {LINE}, column 4)",
        ),
        ("tag own", "a: !mine {b: 1}", f"tag !mine is not allowed (line {LINE}"),
        ("tag with a line break", "a: !a%0Ab 3", rf"tag !a\nb is not allowed (line {LINE}"),
        ("tag at the root of a section", "norm: !!set {}", f"is not allowed (line {LINE}"),
        ("alias", "a: &x 1\nb: *x", f"alias *x is not allowed (line {LINE + 1}"),
        ("alias of nothing", "a: *nothing", f"alias *nothing is not allowed (line {LINE}"),
        ("alias of itself", "a: &x [*x]", f"alias *x is not allowed (line {LINE}"),
        ("merge key", "a: &x {b: 1}\nnorm:\n  <<: *x", f"alias *x is not allowed (line {LINE + 2}"),
        ("billion laughs", bomb, f"alias *a is not allowed (line {LINE + 1}"),
        ("deep flow", "a: " + "[" * 5000, f"nested too deeply (line {LINE}, column "),
        ("deep mappings", "a: " + "{a: " * 2000, f"nested too deeply (line {LINE}, column "),
        (
            "deep block",
            "".join("  " * depth + "a:\n" for depth in range(200)),
            "nested too deeply (line ",
        ),
        (
            "deep options",
            "norm: " + "{b: " * 40 + "1" + "}" * 40,
            f"nested too deeply (line {LINE}",
        ),
        (
            "huge integer",
            "a: " + "9" * 5000,
            f"integer of 5000 digits is too long (line {LINE}, column 4)",
        ),
        (
            "duplicate section",
            "data: {name: digits}",
            f"key 'data' is given twice (line {LINE}, column 1)",
        ),
        (
            "duplicate key",
            "norm: {eps: 1, eps: 2}",
            f"key 'eps' is given twice (line {LINE}, column 16)",
        ),
        (
            "duplicate quoted key",
            "norm: {eps: 1, 'eps': 2}",
            f"key 'eps' is given twice (line {LINE}",
        ),
        ("integer key", "3: a", f"key 3 must be a string (line {LINE}, column 1)"),
        ("boolean key", "true: a", f"key True must be a string (line {LINE}"),
        ("null key", "~: a", f"key None must be a string (line {LINE}"),
        ("float key", "1e999: a", f"key inf must be a string (line {LINE}"),
        ("list key", "? [a]\n: b", f"key ['a'] must be a string (line {LINE}"),
        ("mapping key", "{a: 1}: b", f"key {{'a': 1}} must be a string (line {LINE}"),
        (
            "nested integer key",
            "norm: {rules: {1: frozen}}",
            f"key 1 must be a string (line {LINE}",
        ),
        (
            "long key",
            "x" * 900 + ": 1",
            f"key of 900 characters is too long (line {LINE}, column 1)",
        ),
        (
            "longer key",
            "? " + "x" * 50_000 + "\n: 1",
            f"key of 50000 characters is too long (line {LINE}",
        ),
        ("longest key", "x" * 2000 + ": 1", f"(line {LINE}, column "),
        ("tab", "norm:\n\teps: 1", f"(line {LINE + 1}, column 1)"),
        ("tab between", "norm:\n  eps: 1\n \tsync: none", f"(line {LINE + 2}, column "),
        ("control character", "a: \x07", f"special characters are not allowed (line {LINE})"),
        ("null byte", "a: \x00", f"special characters are not allowed (line {LINE})"),
        ("escape sequence", "\x1b[31m: a", f"special characters are not allowed (line {LINE})"),
        ("delete", "a: \x7f", f"special characters are not allowed (line {LINE})"),
        (
            "half a surrogate pair",
            'a: "\\ud800"',
            f"half of a surrogate pair is no character (line {LINE}, column 4)",
        ),
        ("byte order mark within", "\ufeffnorm: {}", "`\\ufeffnorm` is not a key"),
        ("two documents", "---\nb: 2", f"but found another document (line {LINE}"),
        ("end of document", "...\nb: 2", f"(line {LINE + 1}"),
        ("directive", "%YAML 9.9\n---\n", f"(line {LINE}"),
        ("open list", "a: [1, 2", f"(line {LINE + 1}, column 1)"),
        ("open string", 'a: "b', f"(line {LINE + 1}, column 1)"),
        ("open mapping", "norm: {eps: 1", f"(line {LINE + 1}, column 1)"),
        ("two colons", "a: b: c", f"mapping values are not allowed here (line {LINE}, column 5)"),
        ("no colon", "norm", f"(line {LINE + 1}, column 1)"),
        ("indented", " norm: {}", f"(line {LINE}"),
        ("percent", "a: %b", f"(line {LINE}"),
        ("at sign", "a: @b", f"(line {LINE}"),
        ("backquote", "a: `b`", f"(line {LINE}"),
        ("dash", "- a", f"(line {LINE}"),
        ("escape that is none", 'a: "\\q"', f"(line {LINE}"),
        ("anchor twice", "a: [&x 1, &x 2]", f"(line {LINE}"),
        ("question mark", "? a\n? b\n", "`a` is not a key"),
        (
            "dotted key",
            "train.lr: 3",
            "`train.lr` must be written as sections in a file: `train: {lr: ...`",
        ),
        ("word for a boolean", "train: 1\n", f"key 'train' is given twice (line {LINE}"),
        ("off", "norm: off", "`norm` must be a section of `key: value` lines, got 'off'"),
        ("empty section", "norm:", "`norm` must be a section of `key: value` lines, got None"),
        ("infinity", "norm: {eps: 1e999}", "`norm.eps` must be a finite number, got inf"),
        ("base 60", "norm: {eps: 1:30}", "`norm.eps` must be a valid number, got '1:30'"),
        ("underscores", "norm: {eps: 1_000}", "`norm.eps` must be a valid number, got '1_000'"),
        ("date", "norm: {eps: 2024-01-01}", "`norm.eps` must be a valid number, got '2024-01-01'"),
        (
            "octal",
            "follow: {every: 0o0}",
            "`follow.every` must be greater than or equal to 1, got 0",
        ),
        (
            "negative zero",
            "follow: {every: -0}",
            "`follow.every` must be greater than or equal to 1, got 0",
        ),
    ]:
        yield _case(f"yaml:{name}", f"{TEXT}{text}\n", says)
    for name, content, says in [
        ("empty", b"", "must be a mapping of sections, got None"),
        ("comment", b"# nothing\n", "must be a mapping of sections, got None"),
        ("list", b"[1, 2]", "must be a mapping of sections, got [1, 2]"),
        ("word", b"just words", "must be a mapping of sections, got 'just words'"),
        ("number", b"9" * 400, "must be a mapping of sections, got 9999"),
        ("braces", b"{}", "`model` is missing"),
        ("latin 1", b"model: \xe9", "not UTF-8 text (byte 7)"),
        ("overlong", b"model: \xc0\xaf", "not UTF-8 text (byte 7)"),
        ("surrogate in UTF-8", b"model: \xed\xa0\x80", "not UTF-8 text (byte 7)"),
        ("UTF-16", TEXT.encode("utf-16"), "not UTF-8 text (byte 0)"),
        ("UTF-32", TEXT.encode("utf-32"), "not UTF-8 text (byte 0)"),
        (
            "UTF-16 without a mark",
            TEXT.encode("utf-16-le"),
            "special characters are not allowed (line 1)",
        ),
        ("null bytes", b"\0" * 1000, "special characters are not allowed (line 1)"),
        ("compressed", b"\x1f\x8b\x08\x00", "not UTF-8 text (byte 1)"),
        ("zip", b"PK\x03\x04\x00\x00", "special characters are not allowed (line 1)"),
        ("checkpoint", b"\x80\x02}q\x00.", "not UTF-8 text (byte 0)"),
        ("large", b"a: 1\n" * 30_000, "larger than 100000 bytes"),
        ("many equal keys", b"a: 1\n" * 10_000, "key 'a' is given twice (line 2"),
        ("many keys", "".join(f"a{i}: 1\n" for i in range(5000)).encode(), "5003 problems"),
        (
            "JSON twice",
            b'{"model": 1, "model": 2}',
            "key 'model' is given twice (line 1, column 14)",
        ),
        (
            "byte order mark",
            b"\xef\xbb\xbf" + TEXT.replace("lr:", "lrr:").encode(),
            "`train.lr` is missing",
        ),
    ]:
        yield _case(f"file:{name}", content, says)


CASES = [
    *_wrong_types(),
    *_impossible_values(),
    *_unknown_keys(),
    *_arguments(),
    *_rules(),
    *_callables(),
    *_yaml(),
]


def test_there_are_hundreds_of_different_ones():
    assert len(CASES) >= 200
    assert len({case.content for case in CASES}) > 0.99 * len(CASES)


def test_but_for_what_is_wrong_the_configuration_is_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(TEXT)
    with pytest.raises(SystemExit):
        main(["train", "mine.yaml"])
    assert "`launch.device` must be auto or cpu where 256 workers share" in capsys.readouterr().err


def check(case: Case, folder: Path, code: object, out: str, err: str) -> None:
    assert code == 2
    assert out == ""
    assert err.startswith("syncnorm: ")
    assert err.count("syncnorm: ") == 1
    for say in case.says:
        assert say in err
    first, *others = err.removesuffix("\n").split("\n")
    assert all(line.startswith("  ") for line in others)
    assert all(line.isprintable() and len(line) < 600 for line in [first, *others])
    assert len(others) <= 21
    assert "Traceback" not in err
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case.name.encode("unicode_escape").decode()
)
def test_malformed(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(case.content)
    with pytest.raises(SystemExit) as caught:
        main(["train", "mine.yaml"])
    check(case, tmp_path, caught.value.code, *capsys.readouterr())


def test_malformed_for_the_real_command(tmp_path):
    (case,) = [case for case in CASES if case.name == "yaml:tag python"]
    (tmp_path / "mine.yaml").write_bytes(case.content)
    done = commands.run([*commands.SYNCNORM, "train", "mine.yaml"], tmp_path)
    check(case, tmp_path, done.returncode, done.stdout, done.stderr)
