"""`syncnorm.fit`: a run from a program, from torchrun and from a notebook."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm.errors import ConfigError
from syncnorm.train.checkpoint.store import CheckpointStore
from tests.launch import commands
from tests.launch.fit_program import CONFIG

ROOT = Path(__file__).parents[2]
PROGRAM = ["-m", "tests.launch.fit_program"]


def run_program(what: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Run the program in a folder; what it printed as JSON, and its standard error."""
    done = commands.run([sys.executable, *PROGRAM, what], folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The newest weights of a run."""
    snapshot, _, _ = CheckpointStore(Path(folder) / "checkpoints").newest()
    assert snapshot is not None
    return snapshot.tensors["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_program("whole", folder)


def test_the_result_says_how_the_run_ended(whole):
    folder, results, _ = whole
    result = results["two"]
    assert result["is_done"]
    assert (result["step"], result["reason"]) == (15, "all epochs done")
    assert list(result["metrics"]) == ["validation", "test"]
    assert (
        json.loads((folder / result["folder"] / "exit.json").read_text())["metrics"]
        == (result["metrics"])
    )


def test_two_workers_are_one(whole):
    folder, results, _ = whole
    one, two = (weights(folder / results[name]["folder"]) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-12)


def test_the_configuration_says_that_objects_were_given(whole):
    folder, results, _ = whole
    text = (folder / results["two"]["folder"] / "config.yaml").read_text()
    for what in ("model", "dataset", "task"):
        assert f"name: given:{what}" in text


def test_nobody_else_can_resume_with_objects_of_a_program(whole):
    folder, results, _ = whole
    run = folder / results["two"]["folder"]
    command = [*commands.SYNCNORM, "train", str(run / "config.yaml"), "--resume", str(run)]
    done = commands.run(command, folder)
    assert done.returncode == 2
    assert done.stderr.startswith("syncnorm: `model.name` is 'given:model': a program gave ")


def test_callbacks_see_each_point_on_every_worker(whole):
    folder, results, _ = whole
    first, second = (folder / f"points-{rank}.txt" for rank in range(2))
    assert first.read_text() == second.read_text()
    points = [line.split() for line in first.read_text().splitlines()]
    assert points[0] == ["start", "0"]
    assert [p[1] for p in points if p[0] == "step"] == [str(n) for n in range(1, 16)]
    epoch = [p[0] for p in points[1:8]]
    assert epoch == ["step"] * 5 + ["evaluation", "epoch"]
    assert [p[1] for p in points if p[0] == "evaluation"] == ["validation"] * 3 + ["test"]
    assert points[-1] == ["end", "validation", "test"]
    last = float(points[-2][2])
    assert last == results["two"]["metrics"]["test"]["distance"]


def test_a_callback_stops_a_run_which_goes_on_bit_for_bit(tmp_path):
    results, _ = run_program("stop", tmp_path)
    stopped, resumed = results["stopped"], results["resumed"]
    # The word travels with the next step.
    assert (stopped["is_done"], stopped["step"]) == (False, 7)
    assert stopped["reason"] == "it is good enough; saved"
    assert resumed["folder"] == stopped["folder"]
    assert resumed["is_done"]
    whole, gone_on = (
        weights(tmp_path / results["whole"]["folder"]),
        weights(tmp_path / resumed["folder"]),
    )
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)
    assert resumed["metrics"] == results["whole"]["metrics"]


def test_ctrl_c_saves_and_is_a_keyboard_interrupt(tmp_path):
    _, err = run_program("interrupt", tmp_path)
    last = err.splitlines()[-1]
    assert re.match(r"stopped after step \d+: asked to stop by SIGINT; saved\. To go on: ", last)
    assert "Traceback" not in err
    (run,) = (tmp_path / "runs").iterdir()
    # The command line does not know the program's model.
    assert last.endswith(f"the same call of syncnorm.fit with resume='runs/{run.name}'")
    assert json.loads((run / "exit.json").read_text())["status"] == "stopped"


def test_workers_that_are_spawned_get_what_is_given(tmp_path, whole):
    results, err = run_program("threads", tmp_path)
    assert results["spawned"]["metrics"] == whole[1]["two"]["metrics"]
    failed, refused = [line for line in err.splitlines() if line.startswith(("failed", "refused"))]
    assert failed.startswith("failed: RunError: worker ")
    assert "RuntimeError: the callback is broken" in failed
    assert refused.startswith("refused: ConfigError: callbacks cannot be sent to the workers: ")
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_under_torchrun_the_program_is_a_worker(tmp_path, whole):
    done = commands.run([*commands.TORCHRUN, *PROGRAM, "torchrun"], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line)["torchrun"] for line in done.stdout.splitlines()]
    assert lines[0] == lines[1]
    assert lines[0]["metrics"] == whole[1]["two"]["metrics"]


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({**CONFIG, "trian": {}}, {}, "`trian` is not a key"),
        (CONFIG, {"overrides": {"train.lr.x": 1}}, r"override 'train.lr.x': train.lr is not a sec"),
        (CONFIG, {"model": 3}, "`model` must be a network, or a callable that makes one, got int"),
        (CONFIG, {"dataset": [1]}, "`dataset` must be a Splits or a Dataset, or a callable that"),
        (CONFIG, {"task": "classify"}, "`task` must be an object with `loss` and `metrics`, or a"),
        (
            CONFIG,
            {"callbacks": [print]},
            "`callbacks` must be a list of Callback objects, got buil",
        ),
        (CONFIG, {"callbacks": syncnorm.Callback()}, "must be a list of Callback objects, got Cal"),
        (CONFIG, {}, "`data` is missing"),
        ("no_such_config", {}, "no configuration 'no_such_config'"),
        (
            CONFIG,
            {"overrides": {"data.name": "mine:load"}},
            "`data.name` must name a callable of a",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(
    config, more, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = {"dataset": lambda root: None, "model": nn.Linear(1, 1)}
    if "`data` is" in message or "data.name" in message:
        del given["dataset"]
    with pytest.raises(ConfigError, match=message):
        syncnorm.fit(config, **{**given, **more})
    assert list(tmp_path.iterdir()) == []


def test_the_program_of_the_page_runs(tmp_path):
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "fit.md").read_text(), flags=re.DOTALL
    )
    (tmp_path / "program.py").write_text(program)
    done = commands.run([sys.executable, "-m", "program"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.match(r"runs/fit-\d+-\d+ ", done.stdout)
    assert "'validation': {'accuracy': " in done.stdout


NOTEBOOK = """
import torch
from torch import nn
import syncnorm

class Net(nn.Module):
    def __init__(self, in_channels, num_classes, norm_layer):
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3)
        self.norm = norm_layer(8)
        self.last = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean((2, 3)))

short = {"train.epochs": 1, "train.global_batch": 256, "launch.workers": 1}
result = syncnorm.fit("digits", short, model=Net)
print(result.folder, result.is_done, result.metrics["test"]["accuracy"])
"""


def test_a_class_is_sent_whose_attributes_have_names_of_torchs_modules():
    """In a process without the class: cloudpickle sends what is in `__main__` as code."""
    code = (
        "import pickle, torch\n"
        "from syncnorm.run.given import Given\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.relu(x) if self.ops else self.classes\n"
        "given = pickle.loads(pickle.dumps(Given({'given:model': Net})))\n"
        "given.give()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_second_thread_is_refused(monkeypatch):
    """Workers find their run by the environment of the process."""
    from syncnorm.run import fit

    with fit._alone(), pytest.raises(ConfigError, match="by one thread of a program at a time"):
        syncnorm.fit("digits")


def test_what_is_not_installed_is_named():
    code = (
        "import sys; sys.modules['pydantic'] = None; import syncnorm\n"
        "for name in ('fit', 'load'):\n"
        "    try: getattr(syncnorm, name)\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert said.splitlines() == [
        f"syncnorm.{name} needs pydantic. Install it with: pip install 'syncnorm[train]'"
        for name in ("fit", "load")
    ]


def test_in_a_notebook_the_progress_is_below_the_cell(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = notebook.cells[0].outputs
    shown = next(o for o in outputs if o.output_type == "display_data")
    assert "epoch 1  step 6  loss " in shown.data["text/plain"]
    assert " 6/6 steps  loss " in shown.data["text/plain"]
    assert "<progress value='6' max='6'>" in shown.data["text/html"]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    folder, is_done, accuracy = printed.split()
    assert is_done == "True"
    end = json.loads((tmp_path / folder / "exit.json").read_text())
    assert end["metrics"]["test"]["accuracy"] == float(accuracy)
