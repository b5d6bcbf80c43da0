"""Finding, reading, overriding and checking a configuration."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.same_run import describe_differences
from syncnorm.train.config.file import find_config, load_config
from syncnorm.train.config.messages import OTHER_NAMES, _all_keys
from syncnorm.train.config.schema import CHANGEABLE, Config
from syncnorm.train.config.show import origins
from syncnorm.train.config.strict_yaml import dump, parse
from syncnorm.train.metrics import json_value
from syncnorm.train.optim import OPTIMIZERS, SCHEDULERS, arguments

GOOD = """
model: {name: digits_resnet}
data: {name: digits}
train: {epochs: 2, global_batch: 64, lr: 1e-1}
"""


RENORM = "norm: {name: sync_batch_renorm, renorm: {"


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    return path


def test_other_trainers_names_lead_to_keys():
    of_optimizers = {each for name in OPTIMIZERS for each in arguments(name).model_fields}
    keys = {*_all_keys(Config), *(f"train.optimizer.{each}" for each in of_optimizers)}
    assert set(OTHER_NAMES.values()) <= keys


def test_defaults(config_path):
    config = load_config(str(config_path))
    assert config.train.lr == 0.1
    assert (config.norm.name, config.norm.sync) == ("sync_batch_norm", "batch")
    assert config.launch.workers == 1


@pytest.mark.parametrize(
    ("overrides", "seconds"),
    [
        ([], 60.0),
        (["train.compile=true"], 1800.0),
        (["launch.timeout_seconds=5"], 5.0),
        (["train.compile=true", "launch.timeout_seconds=5"], 5.0),
    ],
)
def test_a_compilation_is_given_more_time(overrides, seconds, config_path):
    config = load_config(str(config_path), overrides)
    assert config.timeout_seconds == seconds
    assert config.launch.patience_seconds == min(seconds, 60.0)


def test_a_config_is_frozen(config_path):
    with pytest.raises(ValidationError):
        load_config(str(config_path)).train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_overrides(config_path):
    config = load_config(
        str(config_path),
        ["train.lr=1e-3", "norm.sync=none", "run_dir=a=b", "train.seed=1", "train.seed=2"],
    )
    assert config.train.lr == 0.001
    assert config.norm.sync == "none"
    assert config.run_dir == "a=b"
    assert config.train.seed == 2


def test_overrides_of_nested_keys(config_path):
    overrides = [
        "train.optimizer.momentum=0.95",
        "data.augment.flip=true",
        "norm.rules.^layer1.0..*=frozen",
        "train.rates.^layer1.0=0.5",
    ]
    config = load_config(str(config_path), [*overrides, "norm.rules.x=batch_norm"])
    assert config.train.optimizer.options == {"momentum": 0.95}
    assert config.data.augment.flip is True
    assert config.norm.rules == {"^layer1.0..*": "frozen", "x": "batch_norm"}
    assert config.train.rates == {"^layer1.0": 0.5}


@pytest.mark.parametrize(
    "key", ["train.norm_batch", "train.clip", "norm.momentum", "data.root", "launch.micro_batch"]
)
def test_null(key, config_path):
    section, _, name = key.partition(".")
    value = "x" if key == "data.root" else 1
    assert (
        getattr(getattr(load_config(str(config_path), [f"{key}={value}"]), section), name) == value
    )
    assert (
        getattr(
            getattr(load_config(str(config_path), [f"{key}={value}", f"{key}=null"]), section), name
        )
        is None
    )


def test_a_path_may_begin_at_home(config_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    paths = ["run_dir=~/runs", "data.root=~/data", "model.weights=a~b"]
    config = load_config(str(config_path), paths)
    assert (config.run_dir, config.data.root) == ("/somewhere/runs", "/somewhere/data")
    assert config.model.weights == "a~b"
    with pytest.raises(
        ConfigError, match=r"`data.root` must begin with the name of a user after ~"
    ):
        load_config(str(config_path), ["data.root=~nobody_of_this_name/data"])


def test_null_takes_an_argument_of_the_file_out(config_path):
    config_path.write_text(
        GOOD.replace("lr: 1e-1", "lr: 1e-1, optimizer: {momentum: 0.9, nesterov: true}")
    )
    overrides = ["train.optimizer.name=AdamW", "train.optimizer.momentum=null"]
    with pytest.raises(
        ConfigError, match=r"take out what is the file's with `train.optimizer.nesterov=null`\.$"
    ):
        load_config(str(config_path), overrides)
    # What the command line gives is not the file's.
    with pytest.raises(ConfigError, match=r"train\.optimizer\.x` is not an arg") as caught:
        load_config(str(config_path), [*overrides[:1], "train.optimizer.x.y=1"])
    assert "optimizer.x=null" not in str(caught.value)
    config = load_config(str(config_path), [*overrides, "train.optimizer.nesterov=null"])
    assert (config.train.optimizer.name, config.train.optimizer.options) == ("AdamW", {})


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "frozen"])
def test_what_cannot_be_pooled_is_not(name, config_path, tmp_path):
    config = load_config(str(config_path), [f"norm.name={name}"])
    assert config.norm.sync == "none"
    (tmp_path / "resolved.yaml").write_text(dump(config.model_dump()))
    assert load_config(str(tmp_path / "resolved.yaml")) == config
    assert (
        load_config(
            str(config_path), [f"norm.name={name}", "norm.rules.x=sync_batch_norm"]
        ).norm.sync
        == "batch"
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_taken(name, config_path):
    assert (
        load_config(str(config_path), [f"train.optimizer.name={name}"]).train.optimizer.name == name
    )


SCHEDULE_OPTIONS = {
    "StepLR": {"step_size": 5, "gamma": 0.5},
    "MultiStepLR": {"milestones": [3, 6]},
    "ConstantLR": {"factor": 0.5},
    "LinearLR": {"total_iters": 9},
    "ExponentialLR": {"gamma": 0.99},
    "PolynomialLR": {"power": 2},
    "CosineAnnealingLR": {"T_max": 9},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1, "mode": "exp_range", "cycle_momentum": False},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "OneCycleLR": {"max_lr": [1.0], "total_steps": 9, "cycle_momentum": False},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_taken(name, config_path):
    values = parse(GOOD, "GOOD")
    values["train"]["schedule"] = {"name": name, **SCHEDULE_OPTIONS[name]}
    config_path.write_text(dump(values))
    schedule = load_config(str(config_path)).train.schedule
    assert (schedule.name, schedule.options) == (name, SCHEDULE_OPTIONS[name])


def test_lists_are_the_tuples_of_an_optimizer(config_path):
    config_path.write_text(
        GOOD.replace("lr: 1e-1", "lr: 1e-1, optimizer: {name: AdamW, betas: [0.9, 0.98]}")
    )
    assert load_config(str(config_path)).train.optimizer.options == {"betas": [0.9, 0.98]}


def test_a_resolved_config_is_a_config(config_path, tmp_path):
    config = load_config(
        str(config_path), ["train.optimizer.weight_decay=1e-7", "norm.rules.layer1.*=frozen"]
    )
    (tmp_path / "resolved.yaml").write_text(dump(config.model_dump()))
    assert load_config(str(tmp_path / "resolved.yaml")) == config


@pytest.mark.parametrize("source", ["digits", "digits.yaml"])
def test_packed_configs_are_found_by_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(source).data.name == "digits"


def test_a_file_goes_before_a_packed_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text(GOOD)
    assert load_config("digits.yaml").train.epochs == 2


def test_every_packed_config_is_valid_and_starts_with_its_command():
    folder = find_config("digits").parent
    for path in folder.glob("*.yaml"):
        load_config(str(path))
        assert path.read_text().startswith(f"# syncnorm train configs/{path.name}\n")


BAD_TEXTS = [
    ("", r"must be a mapping of sections, got None"),
    ("[1, 2]", r"must be a mapping of sections, got \[1, 2\]"),
    ("just words", r"must be a mapping of sections, got 'just words'"),
    ("model: {name: digits_resnet}", r"2 problems\n  `data` is missing\n  `train` is missing"),
    (GOOD.replace("1e-1", "fast"), r"`train.lr` must be a valid number, got 'fast'"),
    (GOOD.replace("1e-1", '"0.1"'), r"`train.lr` must be a valid number, got '0.1'"),
    (GOOD.replace("1e-1", "0"), r"`train.lr` must be greater than 0, got 0"),
    (GOOD.replace("1e-1", ".nan"), r"`train.lr` must be a finite number, got nan"),
    (GOOD.replace("1e-1", ".inf"), r"`train.lr` must be a finite number, got inf"),
    (GOOD.replace("1e-1", ""), r"`train.lr` must be a valid number, got None"),
    (GOOD.replace("epochs: 2", "epochs: 2.5"), r"`train.epochs` must be a valid integer, got 2.5"),
    (
        GOOD.replace("epochs: 2", "epochs: true"),
        r"`train.epochs` must be a valid integer, got True",
    ),
    (
        GOOD.replace("epochs: 2", "epoch: 2"),
        r"`train.epochs` is missing\n.*`train.epoch` is not a key.*`train.epochs`",
    ),
    (
        GOOD.replace("name: digits}", "name: [digits]}"),
        r"`data.name` must be a valid string, got \['digits'\]",
    ),
    (
        GOOD.replace("name: digits}", "name: digit}"),
        r"`data.name` must be one of .*digits.*, got 'digit'",
    ),
    (
        GOOD.replace("digits_resnet", "resnet18"),
        r"`model.name` must be one of .*got 'resnet18'.*is 'resnet18_c",
    ),
    (
        GOOD.replace("data: {name: digits}", "data: digits"),
        r"`data` must be a section of .* lines, got 'digits'",
    ),
    (GOOD + "norm: off", r"`norm` must be a section of .* lines, got 'off'"),
    (
        GOOD + "norm: {sync: all}",
        r"`norm.sync` must be 'batch', 'running', 'lagged' or 'none', got 'all'",
    ),
    (
        GOOD + "norm: {name: batch_norm, sync: lagged}",
        r"`norm`: sync must be none with name batch_norm, got 'lagged'",
    ),
    (
        GOOD + "norm: {renorm: {r_max: 2}}",
        r"`norm`: renorm must be left out with name sync_batch_norm\.",
    ),
    (
        GOOD + RENORM + "r_max: 0.5}}",
        r"`norm.renorm.r_max` must be greater than or equal to 1, got 0.5",
    ),
    (
        GOOD + RENORM + "r_steps: 9}}",
        r"`norm.renorm`: warmup_steps, r_steps and d_steps must be given together",
    ),
    (
        GOOD + RENORM + "warmup_steps: 9, r_steps: 5, d_steps: 9}}",
        r"`norm.renorm`: `r_steps` must be >= warmup_steps = 9, got 5\.",
    ),
    (
        GOOD + "norm: {name: batch_norm, sync: batch}",
        r"`norm`: sync must be none with name batch_norm, got 'batch'",
    ),
    (GOOD + "norm: {momentum: 1.5}", r"`norm.momentum` must be less than or equal to 1, got 1.5"),
    (GOOD + "launch: {workers: 0}", r"`launch.workers` must be greater than or equal to 1, got 0"),
    (GOOD + "lr: 1", r"`lr` is not a key. The nearest key is `train.lr`"),
    (GOOD + "run_dir: ''", r"`run_dir` must have at least 1 character, got ''"),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, norm_batch: 32") + "norm: {sync: running}",
        r"mine.yaml: `train.norm_batch` must be null with norm.sync running, got 32\. Only sync "
        r"batch ",
    ),
    (
        GOOD + "norm: {rules: {'a(': frozen}}",
        r"`norm.rules` must have regular expressions as keys, got 'a\(': missing",
    ),
    (
        GOOD + "norm: {rules: {'a.b': frosen}}",
        r"`norm.rules.a.b` must be 'batch_norm', .* or 'none', got 'frosen'",
    ),
    (GOOD + "norm: {rules: frozen}", r"`norm.rules` must be a mapping, got 'frozen'"),
    (
        GOOD + "norm: {momentum: high}",
        r"`norm.momentum` must be a valid number or null, got 'high'",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, autocast: float8"),
        r"`train.autocast` must be 'bfloat16' or 'float16' or null, got 'float8'",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, rates: {'a(': 0.1}"),
        r"`train.rates` must have regular expressions as keys, got 'a\(': missing",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, rates: {a.b: 0}"),
        r"`train.rates.a.b` must be greater than 0, got 0",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, recompute: ['a(']"),
        r"`train.recompute` must have regular expressions, got 'a\(': missing",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, recompute: [layer1], compile: true"),
        r"`train`: recompute must be empty with compile true, got \['layer1'\]",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, recompute: layer1"),
        r"`train.recompute` must be a valid list, got 'layer1'",
    ),
    (
        GOOD.replace("lr: 1e-1", "lr: 1e-1, decay: biases"),
        r"`train.decay` must be 'weights' or 'all', got 'biases'",
    ),
    (
        GOOD + "model.options: 3",
        r"`model.options` must be written as sections in a file: `model: {options: \.\.\.`",
    ),
    (GOOD + "norm: {renorm: {bounds: {upper: {r: 1}}}}", r"`norm.renorm.bounds` is not a key"),
    (GOOD + "data: {name: digits}", r"key 'data' is given twice \(line 5, column 1\)"),
    (GOOD + "a: !!python/name:os.system", r"tag .*os.system is not allowed"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_a_bad_file_is_one_message_that_names_file_and_key(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lrr=1",
            r"`train.lrr` is not a key. The nearest key is `train.lr`. \(from the command line\)",
        ),
        ("lr=1", r"`lr` is not a key. The nearest key is `train.lr`"),
        (
            "train.learning_rate=1",
            r"`train.learning_rate` is not a key. The nearest key is `train.lr`",
        ),
        (
            "data.batch_size=8",
            r"`data.batch_size` is not a key. The nearest key is `train.global_batch`",
        ),
        ("trian.lr=1", r"`trian` is not a key. The nearest key is `train`"),
        ("train.lr=-1", r"`train.lr` must be greater than 0, got -1 \(from the command line\)"),
        ("train.lr=", r"`train.lr` must be a valid number, got None"),
        ("train.lr.high=1", r"override 'train.lr.high=1': train.lr is not a section"),
        ("train=1", r"`train` must be a section of .* lines, got 1"),
        (
            "train.optimizer.momentm=1",
            r"`train.optimizer.momentm` is not an argument of SGD here\. The nearest key is "
            r"`train.optimizer.momentum`\. \(from the command line\)",
        ),
        (
            "train.schedule.gamma=1",
            r"`train.schedule.gamma` is not an argument of cosine here\. It takes none\. \(from",
        ),
        (
            "train.schedule.name=StepLR",
            r"`train.schedule.step_size` is missing, which StepLR needs\. Add "
            r"`train.schedule.step_size=\.\.\.`\.$",
        ),
        (
            "train.schedule.name=stepLR",
            r"`train.schedule.name` must be one of .*, got 'stepLR'\. .* is 'StepLR'",
        ),
        (
            "train.optimizer=AdamX",
            r"`train.optimizer.name` must be one of .*, got 'AdamX'\. The nearest is 'Adam",
        ),
        ("train.optimizer=3", r"`train.optimizer` must be a section of .* lines, got 3"),
        ("model=net", r"`model` must be a section .*, got 'net'\. Its name is `model.name` \(from"),
        ("train.early_stopping=3", r"The nearest key is `train.patience`"),
        ("train.weight_decay=1e-4", r"The nearest key is `train.optimizer.weight_decay`"),
        ("device=cuda", r"The nearest key is `launch.device`"),
        (
            "train.xyzzy=1",
            r"`train.xyzzy` is not a key\. All are listed by `syncnorm config schema`\. \(from",
        ),
        (
            "data.name=imagenet",
            r"`data.name` must be .*, got 'imagenet'\. \(from the command line\)$",
        ),
        (
            "train.optimizer.bettas=[0.9, 0.99]",
            r"is not an argument of SGD here\. `betas` is one of Adam, Adamax, AdamW, ",
        ),
        (
            "train.optimizer.xyzzy=1",
            r"`train.optimizer.xyzzy` is not an argument of SGD here\. \(from the command line\)$",
        ),
        (
            "train.optimizer.momentum.x=1",
            r"`train.optimizer.momentum` must be a valid number, got \{'x': 1\}",
        ),
        (
            "data.augment.flip=yes",
            r"`data.augment.flip` must be a valid boolean, got 'yes' \(from the command line\)",
        ),
        (
            "data.augment=null",
            r"`data.augment` must be a section of .* lines, got None \(from the command line\)",
        ),
        (
            "norm.rules.a(.b=frozen",
            r"`norm.rules` must have regular expressions as keys, got 'a\(.b'",
        ),
        (
            "norm.rules.=frozen",
            r"override 'norm.rules.=frozen' must have the form section.key=value",
        ),
        (
            "train.norm_batch=3",
            r"`train`: norm_batch must be a divisor of .* \(train.norm_batch from the command "
            r"line\)",
        ),
        (
            "train.seed=null",
            r"`train.seed` must be a valid integer, got None \(from the command line\)",
        ),
        ("train.lr", r"override 'train.lr' must have the form section.key=value"),
        ("=1", r"override '=1' must have the form section.key=value"),
        ("train..lr=1", r"override 'train..lr=1' must have the form section.key=value"),
        ("train.lr=[1]", r"`train.lr` must be a valid number, got \[1\] \(from the command line\)"),
        (
            "train.lr=a: b",
            r"override 'train.lr=a: b': the value must be a value or a list of values, got {'a': "
            r"'b'}. Members of a mapping are given one by one: train.lr.NAME=VALUE.",
        ),
        ("launch.workers=[4, 2]", r"`launch`: workers must be \[fewest, most\], got \[4, 2\]"),
        (
            "launch.workers=[1, 2, 3]",
            r"`launch.workers` must be a number or a pair \[fewest, most\], got \[1, 2, 3\]",
        ),
        ("launch.workers=0", r"`launch.workers` must be greater than or equal to 1, got 0"),
        ("train.lr=[", r"override 'train.lr=\[': "),
        ("train.lr=!!float 1", r"override 'train.lr=!!float 1': tag .* is not allowed"),
    ],
)
def test_a_bad_override_is_one_message_that_names_the_key(override, message, config_path):
    with pytest.raises(ConfigError, match=message):
        load_config(str(config_path), [override])


def test_a_bare_name_is_an_optimizer_without_the_arguments_of_the_file(config_path):
    options = ["train.optimizer=AdamW", "train.optimizer.betas=[0.8, 0.9]", "train.schedule=linear"]
    train = load_config(str(config_path), options).train
    assert (train.optimizer.name, train.optimizer.options) == ("AdamW", {"betas": [0.8, 0.9]})
    assert train.schedule.name == "linear"
    origin = {".".join(key): origin for key, _, origin in origins(str(config_path), options)}
    assert origin["train.optimizer.name"] == "command line"


def test_a_name_that_is_like_a_packed_one():
    with pytest.raises(
        ConfigError, match=r"no configuration 'dgits'\. .* The nearest is 'digits'\.$"
    ):
        load_config("dgits")


def test_a_missing_file_names_itself_and_what_is_packed(tmp_path):
    missing = str(tmp_path / "digits.yaml")
    with pytest.raises(
        ConfigError, match=rf"no configuration '{missing}'. Packed ones, by name: .*digits"
    ):
        load_config(missing)


def test_a_directory(tmp_path):
    with pytest.raises(ConfigError, match=f"configuration '{tmp_path}' is a directory"):
        load_config(str(tmp_path))


def test_a_device():
    with pytest.raises(ConfigError, match="configuration '/dev/null' is not a regular file"):
        load_config("/dev/null")


def test_not_text(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=rf"{path}: not UTF-8 text \(byte 7\)"):
        load_config(str(path))


def test_not_a_page(tmp_path):
    path: Path = tmp_path / "weights.yaml"
    path.write_bytes(b" " * 100_001)
    with pytest.raises(ConfigError, match=rf"{path}: larger than 100000 bytes"):
        load_config(str(path))


def test_what_may_change_when_a_run_goes_on_is_what_the_refusal_and_the_pages_name():
    others = {
        "launch": "launch.workers=7",
        "follow": "follow.every=7",
        "checkpoint": "checkpoint.keep=7",
        "run_dir": "run_dir=elsewhere",
        "name": "name=other",
        "tags": 'tags=["other"]',
        "data.root": "data.root=other",
        "data.loader": "data.loader.workers=7",
    }
    assert others.keys() == {*CHANGEABLE}
    recorded = load_config("digits").model_dump()
    assert describe_differences(load_config("digits", [*others.values()]), recorded) == ""
    assert describe_differences(load_config("digits", ["data.validation=0.5"]), recorded)
    # As a checkpoint records it, in JSON.
    options = ["model.options.least=-.inf", "model.options.most=.nan"]
    unbounded = load_config("digits", ["model.name=timm:resnet18", *options])
    recorded = json.loads(json.dumps(json_value(unbounded.model_dump()), allow_nan=False))
    assert describe_differences(unbounded, recorded) == ""
    # A record that lacks a key which is newer, and has a value that is checked.
    unbounded = load_config("digits", ["task.loss=HuberLoss", "task.options.delta=.inf"])
    recorded = json_value(unbounded.model_dump())
    del recorded["train"]["seed"]
    assert describe_differences(unbounded, recorded) == ""
    for page in ("weights.md", "train.md"):
        text = " ".join((Path(__file__).parents[2] / "docs" / page).read_text().split())
        (named,) = re.findall(r"[.:] ((?:`[a-z._]+`(?:, | and ))+`[a-z._]+`) may change,", text)
        assert {*re.findall(r"`([a-z._]+)`", named)} == {*CHANGEABLE}
