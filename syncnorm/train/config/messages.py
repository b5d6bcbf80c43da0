"""Error messages about a configuration: pydantic's findings, in words for its author."""

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from syncnorm.train import optim
from syncnorm.train.config.schema import Config
from syncnorm.train.config.section import Key, nearest
from syncnorm.train.config.strict_yaml import printable
from syncnorm.train.config.train import TrainSection

# Sections that take, beside their keys, the arguments of the class that they name.
OPEN_SECTIONS: Collection[Key] = (("train", "optimizer"), ("train", "schedule"))

_MAX_PROBLEMS = 20

# Names that other trainers have for a key: nothing here looks like them, or something else does.
OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("amp", "mixed_precision", "precision"), "train.autocast"),
    **dict.fromkeys(("batch", "batch_size"), "train.global_batch"),
    **dict.fromkeys(("early_stopping", "early_stopping_patience"), "train.patience"),
    **dict.fromkeys(("gradient_clip_val", "max_grad_norm"), "train.clip"),
    **dict.fromkeys(("devices", "gpus", "num_gpus", "num_processes"), "launch.workers"),
    **dict.fromkeys(("max_epochs", "num_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("out_dir", "output_dir", "save_dir"), "run_dir"),
    **dict.fromkeys(("logger", "mlflow", "report_to", "tensorboard", "wandb"), "follow.loggers"),
    **dict.fromkeys(("init_from", "pretrained", "pretrained_model"), "model.weights"),
    "accelerator": "launch.device",
    "gradient_accumulation_steps": "launch.micro_batch",
    "learning_rate": "train.lr",
    "momentum": "train.optimizer.momentum",
    "num_workers": "data.loader.workers",
    "weight_decay": "train.optimizer.weight_decay",
}


def describe(error: ValidationError, values: Mapping[str, Any], overridden: Collection[Key]) -> str:
    """Write one message about all problems, a line for each.

    Args:
        error: from the check of `values`.
        values: the configuration as it was written.
        overridden: keys that the command line sets.
    """
    problems = [
        _problem(detail, values, overridden)
        for detail in error.errors(include_url=False)[:_MAX_PROBLEMS]
    ]
    if error.error_count() == 1:
        return problems[0]
    if error.error_count() > _MAX_PROBLEMS:
        problems.append(f"and {error.error_count() - _MAX_PROBLEMS} more")
    return "\n  ".join([f"{error.error_count()} problems", *problems])


def _problem(
    detail: Mapping[str, Any], values: Mapping[str, Any], overridden: Collection[Key]
) -> str:
    # Without pydantic's tags of alternatives, which are in brackets.
    key = tuple(str(part) for part in detail["loc"] if not str(part).startswith("("))
    message = _message(key, detail, values)
    remedy = ""
    if (
        key[:2] in OPEN_SECTIONS
        and key[2:] not in (("name",), ("warmup",))
        and detail["type"] != "model_type"
    ):
        remedy = _open_remedy(key, detail["type"], values, overridden)
    return printable(f"{message}{remedy}{_command_line_note(key, message, overridden)}")


def _message(key: Key, detail: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    message = " ".join(detail["msg"].removeprefix("Value error, ").split())
    got = reprlib.repr(detail["input"])
    name = show_key(key)
    match detail["type"]:
        case "extra_forbidden" if key[:-1] in OPEN_SECTIONS:
            return f"{name} is not an argument of {_named(key[:-1], values)} here"
        case "extra_forbidden" if "." in key[-1] and ".".join(key) in _all_keys(Config):
            nested = key[-1].replace(".", ": {")
            return f"{name} must be written as sections in a file: `{nested}: ...`"
        case "extra_forbidden":
            known = OTHER_NAMES.get(key[-1]) or nearest(".".join(key), _all_keys(Config))
            if known is None:
                return f"{name} is not a key. All are listed by `syncnorm config schema`."
            return f"{name} is not a key. The nearest key is `{known}`."
        case "missing" if key[:-1] in OPEN_SECTIONS:
            return f"{name} is missing, which {_named(key[:-1], values)} needs"
        case "missing":
            return f"{name} is missing"
        case "model_type":
            named = isinstance(detail["input"], str) and f"{'.'.join(key)}.name" in _all_keys(
                Config
            )
            remedy = f". Its name is `{'.'.join(key)}.name`" if named else ""
            return f"{name} must be a section of `key: value` lines, got {got}{remedy}"
        case "value_error" if not key:  # a rule between sections names its keys
            return message
        case "value_error":
            # A rule between the keys of a section names them.
            return f"{name}{'' if message.startswith('must ') else ':'} {message}"
        case kind:
            # pydantic begins with "Input should", "String should" and the like, and has Python's
            # names for types
            rule = re.sub("^[A-Z][a-z]+ should", "must", message)
            rule = rule.replace("valid dictionary", "mapping").replace("valid tuple", "list")
            is_type = kind.endswith("_type") or kind == "literal_error"
            return f"{name} {rule}{' or null' if is_type and _is_nullable(key) else ''}, got {got}"


def show_key(key: Key) -> str:
    """Quote a key for a message, cut off if it is long."""
    dotted = printable(".".join(key))
    return f"`{dotted}`" if len(dotted) <= 100 else f"`{dotted[:97]}...`"


def _section(section: Key, values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values[section[0]][section[1]]


def _named(section: Key, values: Mapping[str, Any]) -> str:
    """The optimizer or schedule that an open section names, if only by default."""
    return (
        _section(section, values).get("name") or TrainSection.model_fields[section[1]].default.name
    )


def _command_line_note(key: Key, message: str, overridden: Collection[Key]) -> str:
    """List the keys that the message is about and the command line sets."""
    if key in overridden:
        return " (from the command line)"
    # A rule between keys mentions them by their last part.
    inside = [other for other in overridden if other[: len(key)] == key]
    mentioned = sorted(
        ".".join(other) for other in inside if re.search(rf"\b{re.escape(other[-1])}\b", message)
    )
    return f" ({', '.join(mentioned)} from the command line)" if mentioned else ""


def _open_remedy(
    key: Key, kind: str, values: Mapping[str, Any], overridden: Collection[Key]
) -> str:
    """Write a remedy for arguments that do not fit the class that their section names."""
    section = key[:2]
    target, dotted = _named(section, values), ".".join(section)
    # An argument may be given by a key within it.
    given = {other[:3] for other in overridden}
    if (*section, "name") in given and key[:3] not in given:
        if kind == "missing" and len(key) == 3:
            return f". Add `{'.'.join(key)}=...`."
        written = [name for name in _section(section, values) if name not in ("name", "warmup")]
        unfit = [
            name
            for name in written
            if (*section, name) not in given and name in (key[2:] or written)
        ]
        if not unfit:
            return ""
        out = ", ".join(f"`{dotted}.{name}=null`" for name in unfit)
        return f". The command line names {target}: take out what is the file's with {out}."
    if kind != "extra_forbidden":
        return ""
    known = [f"{dotted}.{argument}" for argument in optim.arguments(target).model_fields]
    if found := nearest(".".join(key), [*known, "train.lr"] if known else []):
        return f". The nearest key is `{found}`."
    return f".{_argument_of_others(key)}" if known else ". It takes none."


def _argument_of_others(key: Key) -> str:
    """Name the classes that have an argument like this one."""
    classes = optim.OPTIMIZERS if key[1] == "optimizer" else optim.SCHEDULERS
    takers = {name: list(optim.arguments(name).model_fields) for name in classes}
    found = nearest(key[2], {each for arguments in takers.values() for each in arguments})
    if found is None:
        return ""
    return f" `{found}` is one of {', '.join(name for name in takers if found in takers[name])}."


def _is_nullable(key: Key) -> bool:
    annotation: Any = Config
    for part in key:
        if not (
            isinstance(annotation, type)
            and issubclass(annotation, BaseModel)
            and part in annotation.model_fields
        ):
            return False
        annotation = annotation.model_fields[part].annotation
    return NoneType in get_args(annotation)


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
