"""A stand-in of kubectl and of the cluster behind it, which really runs the command of a JobSet's containers here.

It keeps a file per JobSet in $STAND_IN. A container gets what its manifest says and what its image would have, and
nothing of the environment that kubectl was called in. A pod's name is not looked up: the machine is this one.
Secrets are in $STAND_IN/secrets.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

STATE = Path(os.environ["STAND_IN"])
GRACE = 5.0  # terminationGracePeriodSeconds


def read(name: str) -> dict[str, Any] | None:
    path = STATE / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def write(name: str, values: dict[str, Any]) -> None:
    temporary = STATE / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps(values))
    temporary.rename(STATE / f"{name}.json")


def create(file: str) -> None:
    manifest = yaml.safe_load(Path(file).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = manifest["metadata"]["name"]
    if read(name) is not None:
        sys.exit(f'Error from server (AlreadyExists): jobsets.jobset.x-k8s.io "{name}" already exists')
    if manifest["metadata"]["namespace"] == "forbidden":
        sys.exit("Error from server (Forbidden): jobsets.jobset.x-k8s.io is forbidden")
    write(name, {"manifest": manifest, "pods": [], "condition": None})
    line, nowhere = [sys.executable, __file__, "cluster", name], subprocess.DEVNULL
    subprocess.Popen(line, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def variables(container: dict[str, Any], index: int) -> dict[str, str]:
    """What a container sees."""
    found = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    secrets = json.loads((STATE / "secrets.json").read_text())
    for source in container.get("envFrom", []):
        found |= secrets[source["secretRef"]["name"]]
    found |= {each["name"]: each["value"] for each in container["env"]}
    found |= {"MASTER_ADDR": "127.0.0.1"} if "MASTER_ADDR" in found else {}
    return found | {"JOB_COMPLETION_INDEX": str(index)}


def cluster(name: str) -> None:
    """Run the pods of a JobSet, until they end, or until it is deleted."""
    job = read(name)
    assert job is not None
    (group,) = job["manifest"]["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    if container["image"] == "missing":
        state = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "missing"'}}
        pod = {"phase": "Pending", "containerStatuses": [{"state": state}]}
        write(name, job | {"pods": [{"metadata": {"name": f"{name}-node-0-0"}, "status": pod}]})
        return
    python, *words = container["command"]
    assert python == "python"
    pods = []
    for index in range(spec["completions"]):
        log = open(STATE / f"{name}.{index}.log", "wb")  # noqa: SIM115 - lives as long as the pod
        line, seen = [sys.executable, *words], variables(container, index)
        where = container["workingDir"]
        pods.append(subprocess.Popen(line, env=seen, cwd=where, stdout=log, stderr=log, start_new_session=True))
    write(name, job | {"pods": [status(name, index, pod) for index, pod in enumerate(pods)]})
    while any(pod.poll() is None for pod in pods) and not any(pod.poll() for pod in pods) and read(name):
        time.sleep(0.05)
    end(pods)
    if read(name):
        failed = any(pod.returncode for pod in pods)
        condition = {"type": "Failed" if failed else "Completed", "status": "True", "message": "jobset is done"}
        found = [status(name, index, pod) for index, pod in enumerate(pods)]
        write(name, job | {"pods": found, "condition": condition})
    (STATE / f"{name}.gone").touch()


def end(pods: list[subprocess.Popen[bytes]]) -> None:
    for sign, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        for pod in pods:
            if pod.poll() is None:
                os.killpg(pod.pid, sign)
        deadline = time.monotonic() + seconds
        while any(pod.poll() is None for pod in pods) and time.monotonic() < deadline:
            time.sleep(0.05)


def status(name: str, index: int, pod: subprocess.Popen[bytes]) -> dict[str, Any]:
    """A pod as the cluster shows it."""
    code = pod.poll()
    state: dict[str, Any] = {"running": {}}
    if code is not None:
        reason = "Error" if code else "Completed"
        state = {"terminated": {"exitCode": 128 - code if code < 0 else code, "reason": reason}}
    phase = "Running" if code is None else "Failed" if code else "Succeeded"
    found = {"phase": phase, "containerStatuses": [{"state": state}]}
    return {"metadata": {"name": f"{name}-node-0-{index}"}, "status": found}


def get(words: list[str]) -> None:
    if words[0] == "pods":
        job = read(words[1].rpartition("=")[2])
        print(json.dumps({"items": job["pods"] if job else []}))
    elif not words[1].startswith("--"):
        job = read(words[1])
        if job:
            conditions = [job["condition"]] if job["condition"] else []
            print(json.dumps(job["manifest"] | {"status": {"conditions": conditions}}))


def delete(name: str) -> None:
    if read(name) is not None:
        (STATE / f"{name}.json").unlink()
        while not (STATE / f"{name}.gone").exists() and list(STATE.glob(f"{name}.*.log")):
            time.sleep(0.05)
        (STATE / f"{name}.gone").unlink(missing_ok=True)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--namespace=")]
    if words[0] == "kubectl":
        words = words[1:]
    if words[0] == "cluster":
        cluster(words[1])
    elif words[0] == "create":
        create(words[1].partition("=")[2])
    elif words[0] == "get":
        get(words[1:])
    elif words[0] == "logs":
        job_name = words[1].rpartition("=")[2]
        print("".join(path.read_text() for path in sorted(STATE.glob(f"{job_name}.*.log"))), end="")
    elif words[0] == "delete":
        delete(words[2])
