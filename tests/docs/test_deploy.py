"""What deploys syncnorm, as far as it can be checked without Docker, Kubernetes and Slurm."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.core import TyperGroup
from typer.main import get_command

from syncnorm.cli import app
from syncnorm.train.config.file import load_config
from tests.launch import commands
from tools import hashes

ROOT = Path(__file__).parents[2]
DOCKERFILE, COMPOSE = ROOT / "docker" / "Dockerfile", ROOT / "docker" / "compose.yaml"
KUBERAY, SLURM = ROOT / "launch" / "kuberay.yaml", ROOT / "launch" / "slurm.sbatch"
KUBERAY_GPU = ROOT / "launch" / "kuberay-gpu.yaml"
BIN = Path(sys.executable).parent


def check(tool: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(BIN / tool), *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def instructions() -> Iterator[tuple[str, str, str]]:
    """Stage, instruction and its text, in the Dockerfile's order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stage = ""
    for line in filter(None, text.splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        yield stage, name, " ".join(rest.split())


def test_linters_find_nothing():
    check("hadolint", "--no-color", str(DOCKERFILE))
    check("shellcheck", str(SLURM))
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


def test_the_linters_can_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /\n")
    (tmp_path / "job.sh").write_text("#!/bin/bash\necho $1\n")
    (tmp_path / "compose.yaml").write_text("services: {head: {imge: syncnorm}}\n")
    for command in (
        ["hadolint", "Dockerfile"],
        ["shellcheck", "job.sh"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
    ):
        done = subprocess.run(
            [str(BIN / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 1, command


def copied() -> list[tuple[str, str, list[str]]]:
    """Stage, origin and sources of each COPY; the origin is another stage, or empty."""
    found = []
    for stage, name, text in instructions():
        if name == "COPY":
            *words, _ = text.split()
            origin = "".join(
                word.removeprefix("--from=") for word in words if word.startswith("--from=")
            )
            found.append((stage, origin, [word for word in words if not word.startswith("--")]))
    return found


def test_every_copied_path_exists_and_reaches_the_build():
    lines = (DOCKERFILE.with_name("Dockerfile.dockerignore")).read_text().splitlines()
    assert lines[1] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    sources = {source for _, origin, sources in copied() if not origin for source in sources}
    assert sources == let_in
    assert [path for path in sorted(sources) if not (ROOT / path).exists()] == []
    # What the wheel is built from.
    assert {"pyproject.toml", "README.md", "LICENSE", "configs", "syncnorm"} <= sources


def test_dependencies_come_before_the_source_and_nothing_runs_as_root():
    base = [name + " " + text for stage, name, text in instructions() if stage == "base"]
    assert not any("COPY" in line and "syncnorm" in line for line in base)
    assert any(line.startswith("RUN pip install --require-hashes") for line in base)
    for stage in ("cpu", "cuda"):
        lines = [(name, text) for each, name, text in instructions() if each == stage]
        assert [text for name, text in lines if name == "USER"] == ["1000"]
        last_run = max(place for place, (name, _) in enumerate(lines) if name == "RUN")
        assert lines.index(("USER", "1000")) > last_run
    assert [text for _, name, text in instructions() if name == "ENTRYPOINT"] == ['["syncnorm"]']


def test_what_the_image_installs_has_pins_and_hashes():
    """Of four extras, `report` among them: runs lie in the image's volume."""
    constraints, hashed, build = (
        (DOCKERFILE.parent / name).read_text()
        for name in ("constraints.txt", "hashes.txt", "build.txt")
    )
    pins = hashes.pins(constraints)
    assert hashes.pins(hashed) == {name: pins[name] for name in pins if name != "torch"}
    pinned = {hashes.canonical(name) for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    for requirement in (
        each for name in ("train", "data", "report", "ray") for each in extras[name]
    ):
        assert hashes.canonical(re.split(r"[\[>=]", requirement)[0]) in pinned, requirement
    for requirement in project["build-system"]["requires"]:
        assert re.split("[>=]", requirement)[0] in hashes.pins(build)
    line = re.compile(r"#.*|[\w.-]+==[\w.+!]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert [each for each in (hashed + build).splitlines() if not line.fullmatch(each)] == []
    # But for torch, whose hash is the builder's to give, and the wheel that was built before.
    installs = [text for _, name, text in instructions() if name == "RUN" and "pip install" in text]
    others = [text for text in installs if "--require-hashes" not in text]
    assert all("torch" in text or text.endswith("dist/*.whl") for text in others)
    assert len(installs) - len(others) == 2


def test_versions_agree():
    pins = hashes.pins((ROOT / "docker" / "constraints.txt").read_text())
    ours = hashes.pins((ROOT / "constraints.txt").read_text())
    # Not in the image: its torch brings a triton of its own, or needs none, it makes no site, and it
    # plays no store.
    site, store = ("furo", "jupytext", "myst-parser", "sphinx"), ("aiobotocore", "boto3")
    for name in ("triton", *site, *store):
        del ours[name]
    assert {name: pins[name] for name in ours} == ours
    assert cluster()["rayVersion"] == pins["ray"]
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values())
    images = [text.split(" AS ")[0] for _, name, text in instructions() if name == "FROM"]
    # A release gives the digest of this tag.
    (image,) = (image for image in images if ":" in image)
    assert image == "python:3.11.15-slim-bookworm${BASE_DIGEST:+@$BASE_DIGEST}"


def test_the_compose_cluster_keeps_to_itself():
    compose = yaml.safe_load(COMPOSE.read_text())
    services: dict[str, Any] = compose["services"]
    assert list(services) == ["head", "worker-1", "worker-2"]
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]
    for name, service in services.items():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        path = service["environment"]["RAY_AUTH_TOKEN_PATH"]
        assert [f"/run/secrets/{secret}" for secret in service["secrets"]] == [path]
        assert service["healthcheck"]["test"] == ["CMD", "ray", "health-check"]
        assert service["volumes"] == ["runs:/runs"]
        assert service["shm_size"]
        if name != "head":
            assert service["depends_on"]["head"] == {"condition": "service_healthy"}
            assert "ports" not in service
    assert set(compose["volumes"]) == {"runs"}
    # A path that the user gives, never a token in a file of ours.
    assert compose["secrets"]["ray_token"]["file"].startswith("${RAY_AUTH_TOKEN_PATH:?")


def documents(path: Path) -> dict[str, Any]:
    """The objects of a file, by their kind and name."""
    return {
        f"{each['kind']} {each['metadata']['name']}": each
        for each in yaml.safe_load_all(path.read_text())
    }


def ray_job(path: Path = KUBERAY) -> dict[str, Any]:
    (job,) = (each for name, each in documents(path).items() if name.startswith("RayJob "))
    assert job["apiVersion"] == "ray.io/v1"
    return job["spec"]


def cluster(path: Path = KUBERAY) -> dict[str, Any]:
    return ray_job(path)["rayClusterSpec"]


def groups(path: Path) -> list[dict[str, Any]]:
    return [cluster(path)["headGroupSpec"], *cluster(path)["workerGroupSpecs"]]


# KubeRay 1.6, ray-operator/apis/ray/v1: rayjob_types.go, raycluster_types.go.
JOB_FIELDS = {"entrypoint", "runtimeEnvYAML", "backoffLimit", "rayClusterSpec"}
JOB_FIELDS |= {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_FIELDS = {"rayStartParams", "template"}
WORKERS_FIELDS = {*GROUP_FIELDS, "groupName", "replicas", "minReplicas", "maxReplicas"}


BOTH = pytest.mark.parametrize("path", [KUBERAY, KUBERAY_GPU], ids=lambda path: path.stem)


@BOTH
def test_the_ray_job_has_the_fields_of_its_definition(path):
    assert set(ray_job(path)) == JOB_FIELDS
    assert yaml.safe_load(ray_job(path)["runtimeEnvYAML"]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
    }
    assert set(cluster(path)) == CLUSTER_FIELDS
    assert cluster(path)["authOptions"] == {"mode": "token"}
    assert cluster(path)["rayVersion"] == cluster()["rayVersion"]
    assert set(cluster(path)["headGroupSpec"]) == GROUP_FIELDS
    (workers,) = cluster(path)["workerGroupSpecs"]
    assert set(workers) == WORKERS_FIELDS
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in groups(path):
        # map[string]string: a number there is refused.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@BOTH
def test_the_ray_jobs_pods_are_confined_and_share_the_runs(path):
    for group in groups(path):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert set(volumes) == set(mounts)
        assert mounts["runs"] == {"name": "runs", "mountPath": "/runs"}
        claim = volumes["runs"]["persistentVolumeClaim"]["claimName"]
        spec = documents(path)[f"PersistentVolumeClaim {claim}"]["spec"]
        assert spec["accessModes"] == ["ReadWriteMany"]


def test_the_ray_job_for_gpus_has_its_data_its_configuration_and_gpus():
    found = documents(KUBERAY_GPU)
    head, workers = groups(KUBERAY_GPU)
    pod = workers["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claim = volumes["data"]["persistentVolumeClaim"]
    assert claim["readOnly"] is True
    assert f"PersistentVolumeClaim {claim['claimName']}" in found
    assert f"ConfigMap {volumes['config']['configMap']['name']}" in found
    (container,) = pod["containers"]
    assert container["image"].endswith(":cuda")
    for which in ("requests", "limits"):
        number = container["resources"][which]["nvidia.com/gpu"]
        assert number == workers["rayStartParams"]["num-gpus"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    assert head["template"]["spec"]["volumes"] == pod["volumes"]


@BOTH
def test_the_ray_jobs_entrypoint_is_a_configuration_that_fits_the_cluster(path, tmp_path):
    python, option, module, source, *overrides = shlex.split(ray_job(path)["entrypoint"])
    assert (python, option, module) == ("python", "-m", "syncnorm.run.ray.driver")
    assert (ROOT / "syncnorm" / "run" / "ray" / "driver.py").exists()
    if source.startswith("/config/"):
        name = source.removeprefix("/config/")
        (tmp_path / name).write_text(documents(path)["ConfigMap syncnorm-config"]["data"][name])
        source = str(tmp_path / name)
    config = load_config(source, overrides)
    (workers,) = cluster(path)["workerGroupSpecs"]
    assert config.run_dir == "/runs"
    assert config.launch.fewest_workers == workers["minReplicas"]
    assert config.launch.most_workers == workers["maxReplicas"]


def documented(command: str) -> list[list[str]]:
    """The commands of docs/operate.md that begin so, as words."""
    blocks = re.findall(
        r"```console\n(.*?)```", (ROOT / "docs" / "operate.md").read_text(), flags=re.DOTALL
    )
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    begin = command.split()
    found = [line[len(begin) :] for line in lines if line[: len(begin)] == begin]
    assert found, command
    return found


def test_the_documented_commands_are_understood():
    for arguments in documented("torchrun"):
        taken = get_args_parser().parse_args(arguments)
        assert taken.training_script == "syncnorm"
        assert (
            load_config(taken.training_script_args[1], taken.training_script_args[2:]).run_dir
            == "/shared/runs"
        )
    commands_of_ours = get_command(app)
    assert isinstance(commands_of_ours, TyperGroup)
    for name, *arguments in documented("syncnorm"):
        commands_of_ours.commands[name].make_context(name, arguments)


def test_the_ray_nodes_are_understood():
    scripts = pytest.importorskip("ray.scripts.scripts")
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    composed = [[*service["entrypoint"], *service["command"]][2:] for service in services]
    grouped = [
        [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        for group in [*groups(KUBERAY), *groups(KUBERAY_GPU)]
    ]
    nodes = [scripts.start.make_context("start", arguments).params for arguments in composed]
    for arguments in grouped:
        scripts.start.make_context("start", arguments)
    head, worker = (
        scripts.start.make_context("start", arguments).params
        for arguments in documented("ray start")
    )
    assert worker["address"] == f"{head['node_ip_address']}:{head['port']}"
    assert head["dashboard_host"] == "127.0.0.1"
    # Jobs go through the agents' ports, which nothing may take before: below where Linux hands out
    # ports.
    ports = [each["dashboard_agent_listen_port"] for each in (head, worker)]
    ports += [each["dashboard_agent_listen_port"] for each in nodes]
    assert all(port < 32768 for port in ports)
    assert ports[0] != ports[1]


def _installed_torch() -> str:
    done = subprocess.run(
        [str(BIN / "python"), "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_install_lines_of_the_cpu_image_run_in_a_clean_environment(tmp_path):
    build, environment = tmp_path / "build", tmp_path / "environment"
    build.mkdir()
    venv.create(environment, with_pip=True)
    search = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # An index without packages: the CPU build of torch comes from where this environment's came
    # from.
    (tmp_path / "index").mkdir()
    variables = {**os.environ, "PATH": search, "TORCH_INDEX": (tmp_path / "index").as_uri()}
    probe = [
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(tmp_path),
        f"torch=={_installed_torch()}",
    ]
    offered = subprocess.run(
        probe, env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    if "+cpu" not in _installed_torch() or offered.returncode != 0:
        pytest.skip("pip knows no CPU build of torch here; the one for CUDA is several GB")
    lines = [
        (name, text) for stage, name, text in instructions() if stage in ("base", "wheel", "cpu")
    ]
    for name, text in lines:
        if name == "COPY" and "--from" not in text:
            *sources, to = text.split()
            for source in sources:
                target = build / (Path(source).name if to == "./" else to)
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, target)
        # apt and the user are the image's own.
        elif name == "RUN" and not re.search(r"apt-get|useradd", text):
            done = subprocess.run(
                ["sh", "-c", text],
                cwd=build,
                env=variables,
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for command in (["syncnorm", "config", "show", "digits"], ["ray", "--version"]):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    installed = subprocess.run(
        ["pip", "freeze", "--exclude", "syncnorm"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    # Every version is one that was asked for; the wheel's stage is apart in the image, not here.
    pins: dict[str, str] = {}
    for name in ("constraints.txt", "build.txt"):
        pins |= hashes.pins((ROOT / "docker" / name).read_text())
    pins["torch"] = _installed_torch()
    found = dict(line.split("==") for line in installed.stdout.splitlines())
    assert {hashes.canonical(each): version for each, version in found.items()} == {
        hashes.canonical(each): version for each, version in pins.items()
    }


# As since Slurm 22.05: not told, it gives a task one CPU.
SRUN = """#!/bin/bash
[[ " $* " == *" --cpus-per-task=$SLURM_CPUS_PER_TASK "* ]] || exit 3
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo "$SLURMD_NODENAME"
[[ $1 == requeue ]] && echo "requeue $2" >> requeued.txt
exit 0
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, ["requeue 4711"]), (signal.SIGTERM, [])]
)
def test_the_slurm_script_saves_is_queued_again_and_goes_on(tmp_path, number, requeued):
    """Slurm's two commands are stand-ins that do on this machine what Slurm would do on one machine
    of a job.
    """
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "slurm").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "slurm" / name).write_text(text)
        (tmp_path / "slurm" / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path / 'slurm'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURMD_NODENAME": "localhost",
    }
    command = ["bash", str(SLURM), "digits", "train.epochs=4"]
    with commands.started(command, tmp_path, variables) as job:
        assert job.stderr is not None
        while not (line := job.stderr.readline()).startswith("epoch 1/"):
            assert line, "the job ended"
        job.send_signal(number)
        job.communicate(timeout=commands.DEADLINE_SECONDS)
    assert job.returncode == 75
    note = tmp_path / "requeued.txt"
    assert (note.read_text().splitlines() if note.exists() else []) == requeued
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "exit.json").read_text())["status"] == "stopped"
    done = commands.run(command, tmp_path, variables)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    assert json.loads((run / "exit.json").read_text())["status"] == "done"
