"""Job files for Slurm and Kubernetes: their syntax, and the commands that they make."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from diffusion_envs.runs.command_line import read
from diffusion_envs.sd15.__main__ import FAMILY

ROOT = Path(__file__).parent.parent
SLURM, KUBERNETES = ROOT / "deploy" / "slurm.sbatch", ROOT / "deploy" / "kubernetes.yaml"
SLURM_OPTIONS = {  # of the manual of sbatch that take a value; the others stand alone
    *("account", "chdir", "constraint", "cpus-per-task", "error", "export", "gpus-per-node"),
    *("job-name", "mail-type", "mail-user", "mem", "mem-per-cpu", "nodes", "ntasks-per-node"),
    *("open-mode", "output", "partition", "qos", "reservation", "signal", "time"),
}
SLURM_FLAGS = {"exclusive", "no-requeue", "requeue"}
# What stands for srun: a process of the step, which ends when scancel sends it the signal.
SRUN = """
printf '%s\\n' "$@" > "$SEEN/srun"
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=9 SLURM_NTASKS=16 SLURM_LOCALID=1
echo $$ > "$SEEN/pid"
exec "$@"
"""
PYTHON = """
printf '%s\\n' "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT" "$@" > "$SEEN/python"
[ -z "${HANGS:-}" ] && exit "${CODE:-0}"
trap 'exit "${CODE:-130}"' TERM
touch "$SEEN/hangs"
for _ in {1..600}; do sleep 0.1; done
"""
STUBS = {
    "srun": SRUN,
    "python": PYTHON,
    "scontrol": """[ "$1" = show ] && echo $'node-3\\nnode-4' || echo "$@" > "$SEEN/scontrol" """,
    "scancel": """echo "$@" > "$SEEN/scancel"; kill -TERM "$(cat "$SEEN/pid")" """,
    "torchrun": """printf '%s\\n' "$@" > "$SEEN/torchrun" """,
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job: stubs for the cluster's commands, which write what they get."""
    commands, seen = tmp_path / "bin", tmp_path / "seen"
    commands.mkdir()
    seen.mkdir()
    for name, body in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SEEN": str(seen),
        "RUN": str(tmp_path / "run"),
        "MODEL": "tiny",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[3-4]",
        "SLURM_CPUS_PER_TASK": "8",
    }


def begun(run: Path) -> None:
    """The run has settings, as after its first start."""
    run.mkdir()
    (run / "config.json").write_text("{}")


def lines(environment: Mapping[str, str], name: str) -> list[str]:
    """What a stub wrote."""
    return (Path(environment["SEEN"]) / name).read_text().splitlines()


def batch(environment: Mapping[str, str]) -> int:
    """The exit code of the batch script."""
    return subprocess.run(["bash", SLURM], env=dict(environment), check=False).returncode


def test_every_option_of_the_slurm_file_is_one_of_sbatch():
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    options = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    names = []
    for option in options:
        name, equals, value = option.removeprefix("--").partition("=")
        names.append(name)
        assert option.startswith("--"), option
        assert (name in SLURM_OPTIONS) if equals else (name in SLURM_FLAGS), option
        assert not equals or re.fullmatch(r"\S+", value), option
    assert len(set(names)) == len(names) > 5
    # sbatch reads them up to the first command
    head, _, body = text.partition("\nset -euo pipefail")
    assert head.count("\n#SBATCH") == len(options)
    assert "#SBATCH" not in body


def test_the_first_job_begins_the_run_and_later_ones_go_on_with_it(cluster):
    assert batch(cluster) == 0
    world, module, name, *words = lines(cluster, "python")
    assert world == "9 16 1 node-3 23456"
    assert (module, name) == ("-m", "diffusion_envs.sd15")
    options = read(FAMILY, words)
    assert (str(options.output), options.resume) == (cluster["RUN"], None)
    assert options.model.model == "tiny"
    begun(Path(cluster["RUN"]))
    assert batch(cluster | {"CODE": "2"}) == 2
    assert lines(cluster, "python")[3:] == ["--resume", cluster["RUN"]]
    assert "--kill-on-bad-exit=0" in lines(cluster, "srun")
    assert not (Path(cluster["SEEN"]) / "scontrol").exists()  # an error is no reason to try again


@pytest.mark.parametrize(("code", "requeued"), [("130", True), ("0", False)])
def test_a_job_whose_time_is_over_signals_its_processes_and_is_requeued(code, requeued, cluster):
    seen = Path(cluster["SEEN"])
    job = subprocess.Popen(["bash", SLURM], env=cluster | {"HANGS": "1", "CODE": code})
    try:
        for _ in range(600):
            if (seen / "hangs").exists():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # as --signal=B:TERM does
        assert job.wait(60) == int(code)
    finally:
        job.kill()
    assert lines(cluster, "scancel") == ["--signal=TERM 123456"]
    assert (seen / "scontrol").exists() is requeued
    if requeued:
        assert lines(cluster, "scontrol") == ["requeue 123456"]


def manifests() -> dict[str, dict[str, Any]]:
    """The objects of the Kubernetes file, by kind."""
    documents = [each for each in yaml.safe_load_all(KUBERNETES.read_text()) if each]
    return {each["kind"]: each for each in documents}


REQUIRED = {  # fields of what is used, and their types, in the API of Kubernetes 1.29
    "Service": {"spec.selector": dict, "spec.ports": list, "spec.clusterIP": str},
    "PersistentVolumeClaim": {"spec.accessModes": list, "spec.resources.requests.storage": str},
    "Job": {
        "spec.completionMode": str,
        "spec.completions": int,
        "spec.parallelism": int,
        "spec.backoffLimit": int,
        "spec.podReplacementPolicy": str,
        "spec.template.metadata.labels": dict,
        "spec.template.spec.subdomain": str,
        "spec.template.spec.restartPolicy": str,
        "spec.template.spec.terminationGracePeriodSeconds": int,
        "spec.template.spec.containers": list,
        "spec.template.spec.volumes": list,
    },
}
CONTAINER = {"name", "image", "env", "command", "resources", "volumeMounts"}


def fields(tree: Any, of: str = "") -> dict[str, Any]:
    """Leaves and lists of nested mappings, by dotted name; and mappings of text."""
    named: dict[str, Any] = {}
    for name, value in tree.items():
        place = f"{of}.{name}" if of else name
        inner = isinstance(value, dict) and place not in (
            "spec.selector",
            "spec.template.metadata.labels",
        )
        named |= fields(value, place) if inner else {place: value}
    return named


def test_the_objects_of_the_kubernetes_file_have_their_fields_and_fit_each_other():
    objects = manifests()
    assert objects.keys() == REQUIRED.keys()
    for kind, required in REQUIRED.items():
        made = fields(objects[kind])
        assert made.pop("apiVersion") == ("batch/v1" if kind == "Job" else "v1")
        assert made.pop("kind") == kind
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made.pop("metadata.name"))
        optional = {"spec.publishNotReadyAddresses": bool}
        assert required.keys() <= made.keys() <= (required | optional).keys()
        assert all(type(value) is (required | optional)[name] for name, value in made.items())
    job, service = objects["Job"], objects["Service"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")  # all that a Job may have
    (container,) = pod["containers"]
    assert container.keys() == CONTAINER
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"][:1]]
    assert claims == [objects["PersistentVolumeClaim"]["metadata"]["name"]]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    named = {each["name"]: each["value"] for each in container["env"]}
    assert all(isinstance(value, str) for value in named.values())  # or the API refuses them
    assert named["NODES"] == str(spec["completions"])
    assert named["GPUS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert int(named["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    for place in ("RUN", "MODEL"):
        assert named[place].startswith(mounts["data"] + "/")


def test_pods_begin_the_run_and_later_ones_go_on_with_it(cluster):
    objects = manifests()
    job, port = objects["Job"], objects["Service"]["spec"]["ports"][0]["port"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    named = {each["name"]: each["value"] for each in container["env"]}
    environment = cluster | named | {"RUN": cluster["RUN"], "MODEL": "tiny"}

    def started() -> tuple[Any, list[str]]:
        subprocess.run(container["command"], env=environment, check=True)
        told = get_args_parser().parse_args(lines(cluster, "torchrun"))
        return told, told.training_script_args

    told, words = started()
    name = job["metadata"]["name"]
    assert told.module
    assert told.training_script == "diffusion_envs.sd15"
    assert (told.nnodes, told.nproc_per_node) == (named["NODES"], named["GPUS"])
    assert (told.rdzv_backend, told.max_restarts) == ("c10d", 0)
    assert told.rdzv_endpoint == f"{name}-0.{name}:{port}"
    options = read(FAMILY, words)
    assert (str(options.output), options.updates) == (cluster["RUN"], 1000)
    begun(Path(cluster["RUN"]))
    assert started()[1] == ["--resume", cluster["RUN"]]
