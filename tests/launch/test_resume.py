"""The command line of a run that goes on."""

import shlex
from pathlib import Path

import pytest

from syncnorm.errors import ConfigError
from syncnorm.run.folder import write_config
from syncnorm.run.resume import NoConfigError, choose_config, resume_command
from syncnorm.train.config.file import check, load_config


def test_the_configuration_is_the_runs_own_where_none_is_named(tmp_path):
    write_config(load_config("digits"), tmp_path)
    given = ["launch.workers=3", "train.epochs=9"]
    for words in ((given[0], given[1:]), (None, given)):
        own = choose_config(*words, str(tmp_path))
        assert own.path == tmp_path / "config.yaml"
        assert (check(own).train.epochs, check(own).launch.workers) == (9, 3)
    assert choose_config("digits", given, str(tmp_path)).path.name == "digits.yaml"
    with pytest.raises(NoConfigError, match="must be given a configuration"):
        choose_config("train.lr=1", [], None)
    with pytest.raises(ConfigError, match="`--resume` must name a run's folder, got 'nowhere'"):
        choose_config(None, [], "nowhere")


def test_the_line_can_be_pasted():
    line = resume_command(Path("my runs/digits"), ("mine", "other.part"))
    assert shlex.split(line) == [
        *["syncnorm", "train", "--resume", "my runs/digits"],
        *["--allow", "mine", "--allow", "other.part"],
    ]
