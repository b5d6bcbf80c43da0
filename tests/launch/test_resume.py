"""The command line of a run that goes on."""

import shlex
from pathlib import Path

from syncnorm.run.resume import choose_config, resume_command


def test_the_configuration_is_the_runs_own_where_none_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.touch()
    given = ["launch.workers=3", "train.epochs=9"]
    assert choose_config(given[0], given[1:], tmp_path) == (str(path), given)
    assert choose_config(None, [], tmp_path) == (str(path), [])
    assert choose_config("digits", given, tmp_path) == ("digits", given)


def test_the_line_can_be_pasted():
    line = resume_command(Path("my runs/digits"), ("mine", "other.part"))
    assert shlex.split(line) == [
        *["syncnorm", "train", "--resume", "my runs/digits"],
        *["--allow", "mine", "--allow", "other.part"],
    ]
