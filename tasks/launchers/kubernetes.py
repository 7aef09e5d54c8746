"""Programs that Kubernetes starts, as a JobSet, from a work folder on a persistent volume.

One decision: a JobSet, made with kubectl. A TrainJob of Kubeflow's Trainer becomes a JobSet too, by way of a runtime
that somebody has to install first, and its fields for volumes have changed with each of its versions; a JobSet gives
the pods stable names to meet under, starts and ends them as one, and says all of it in one manifest.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from registry.cluster_records import KubernetesSettings
from registry.errors import Problem
from tasks.launchers.job import (
    ANSWER_SECONDS,
    LEFT,
    Cluster,
    Ended,
    Job,
    ProgramFailed,
    Say,
    ask,
    job_name,
    read_left,
    write_left,
)
from tasks.nodes import DEFAULT_PORT

JOB_FILE = "job.yaml"
KIND = "jobsets.jobset.x-k8s.io"
GROUP = "node"  # name of the pods' group: pods are called JOBSET-node-0-NUMBER
LOOK_SECONDS = 5.0  # between two questions
SILENCE_SECONDS = 1800.0  # without an answer, after which the run fails, and can be tried again
DELETE_SECONDS = 25.0  # Prefect kills a flow 30 s after it was asked to stop
KEPT_SECONDS = 86400  # an ended job whose flow is gone, for the next run of its recipe
HOPELESS = {"InvalidImageName", "ErrImageNeverPull", "ImagePullBackOff", "CreateContainerConfigError"}
"""Why a container waits, where waiting does not help."""
OUT_OF_MEMORY = "OOMKilled"


def problems(cluster: Cluster, where: str) -> list[Problem]:
    """What keeps this machine from starting jobs.

    Args:
        cluster: what the recipe says.
        where: the recipe's key.
    """
    settings = KubernetesSettings.model_validate(cluster.options)
    asked = _kubectl(settings.namespace, "get", KIND, "--output=name", "--request-timeout=20s")
    if asked.returncode != 0:
        rule = f"kubernetes: kubectl cannot ask for JobSets in namespace {settings.namespace}: {asked.stderr.strip()}"
        cure = "See that kubectl reaches the cluster and JobSet is installed in it, or use launcher: local."
        return [Problem(where, rule, cure)]
    return []


class Kubernetes:
    """Starts programs as JobSets.

    Args:
        cluster: with `KubernetesSettings`.
        look: seconds between two questions.
    """

    def __init__(self, cluster: Cluster, look: float = LOOK_SECONDS) -> None:
        self.home, self.look = cluster.home, look
        self.settings = KubernetesSettings.model_validate(cluster.options)

    def job_file(self, job: Job) -> str:
        """The manifest. Nothing secret is in it: a Secret of the cluster goes along by name."""
        name, settings = job_name(job.folder), self.settings
        container: dict[str, Any] = {
            "name": "program",
            "image": settings.image,
            "command": ["python", *job.part()],
            "workingDir": str(job.folder),
            "env": [{"name": key, "value": value} for key, value in self._variables(job, name).items()],
            "volumeMounts": [
                {"name": "home", "mountPath": settings.mount_path},
                {"name": "memory", "mountPath": "/dev/shm"},
            ],
        }
        container |= {"envFrom": [{"secretRef": {"name": settings.secret}}]} if settings.secret else {}
        container |= {"resources": settings.resources} if settings.resources else {}
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [
                {"name": "home", "persistentVolumeClaim": {"claimName": settings.claim}},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},  # ranks of a pod talk through it
            ],
        }
        # who fails ends all: what can be tried again is decided by the flow, as for every launcher
        spec = {"parallelism": job.machines, "completions": job.machines, "completionMode": "Indexed"}
        spec |= {"backoffLimit": 0, "template": {"spec": pod | (settings.pod or {})}}
        group = {"name": GROUP, "replicas": 1, "template": {"spec": spec}}
        manifest = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": name, "namespace": settings.namespace},
            "spec": {
                "failurePolicy": {"maxRestarts": 0},
                "ttlSecondsAfterFinished": KEPT_SECONDS,
                "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
                "replicatedJobs": [group],
            },
        }
        text: str = yaml.safe_dump(manifest, sort_keys=False, width=120)
        return text

    def _variables(self, job: Job, name: str) -> dict[str, str]:
        meeting = {"MASTER_ADDR": f"{name}-{GROUP}-0-0.{name}", "MASTER_PORT": str(DEFAULT_PORT)}
        return {"LLAMATUNER_HOME": self.home} | (meeting if job.machines > 1 else {})

    def launch(self, job: Job, say: Say) -> KubernetesJob:
        """Create a JobSet; one of an earlier run that does the same is taken over instead.

        Raises:
            ProgramFailed: Kubernetes refuses it, or does not answer.
        """
        running = KubernetesJob(job, self.settings.namespace, say, self.look)
        text = self.job_file(job)
        left, digest, there = read_left(job.folder), job.digest(text), running.read()
        if there is not None and left is not None and left["digest"] == digest:
            say(f"JobSet {running.name} was begun by an earlier run; it is taken over")
            return running
        if there is not None and not running.delete(2 * ANSWER_SECONDS):
            raise ProgramFailed("network", f"JobSet {running.name}, of an earlier run, does not end")
        job.write()
        file = job.folder / JOB_FILE
        file.write_text(text, encoding="utf-8")
        note = {"name": running.name, "namespace": self.settings.namespace, "digest": digest}
        write_left(job.folder, launcher="kubernetes", **note)
        asked = _kubectl(self.settings.namespace, "create", f"--filename={file}")
        if asked.returncode != 0:
            (job.folder / LEFT).unlink()
            raise ProgramFailed("bad_setting", f"Kubernetes refuses {file}: {asked.stderr.strip()}")
        say(f"JobSet {running.name} is created in namespace {self.settings.namespace}; {file} is what it does")
        return running


class KubernetesJob:
    """A JobSet.

    Args:
        job: what it does.
        namespace: where it is.
        say: told when the state of its pods changes.
        look: seconds between two questions.
    """

    def __init__(self, job: Job, namespace: str, say: Say, look: float) -> None:
        self.job, self.namespace, self.say, self.look = job, namespace, say, look
        self.name, self.told, self.next_look, self.heard = job_name(job.folder), "", 0.0, time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """What the cluster says of it; None: it is not there.

        Raises:
            ProgramFailed: no answer.
        """
        asked = _kubectl(self.namespace, "get", KIND, self.name, "--output=json", "--ignore-not-found")
        if asked.returncode != 0:
            raise ProgramFailed("network", f"kubectl: {asked.stderr.strip()}")
        found: dict[str, Any] | None = json.loads(asked.stdout) if asked.stdout.strip() else None
        return found

    def wait(self, seconds: float) -> Ended | None:
        """How it ended; None while it is at it after so many seconds.

        Raises:
            ProgramFailed: its image cannot be had, or Kubernetes has not answered for half an hour.
        """
        time.sleep(seconds)
        if time.monotonic() < self.next_look:
            return None
        self.next_look = time.monotonic() + self.look
        try:
            there = self.read()
            pods = self._pods() if there is not None else []
        except ProgramFailed as error:
            if time.monotonic() - self.heard > SILENCE_SECONDS:
                raise
            self._tell(f"{error}; it goes on meanwhile")
            return None
        self.heard = time.monotonic()
        if there is None:
            return Ended(-9, "", f"was ended with JobSet {self.name}, which somebody deleted")
        conditions = there.get("status", {}).get("conditions", [])
        known = {condition["type"]: condition for condition in conditions if condition["status"] == "True"}
        if "Completed" in known:
            return Ended(0)
        if "Failed" in known:
            return self._failed(pods, known["Failed"].get("message", ""))
        self._watch(pods)
        return None

    def _pods(self) -> list[dict[str, Any]]:
        label = f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}"
        asked = _kubectl(self.namespace, "get", "pods", label, "--output=json")
        if asked.returncode != 0:
            raise ProgramFailed("network", f"kubectl: {asked.stderr.strip()}")
        found: list[dict[str, Any]] = json.loads(asked.stdout)["items"]
        return found

    def _failed(self, pods: list[dict[str, Any]], message: str) -> Ended:
        """How the pods ended, of those that say so the one that was out of memory, or the first."""
        ends = [
            container["state"]["terminated"]
            for pod in pods
            for container in pod.get("status", {}).get("containerStatuses", [])
            if container.get("state", {}).get("terminated", {}).get("exitCode")
        ]
        if any(end.get("reason") == OUT_OF_MEMORY for end in ends):
            return Ended(-9, "out_of_memory", f"Kubernetes ended {self.job.module} for want of memory")
        if not ends:  # evicted, or its machine is gone
            return Ended(-9, "", f"was ended with JobSet {self.name}: {message}")
        code = int(ends[0]["exitCode"])
        return Ended(128 - code if code > 128 else code)

    def _watch(self, pods: list[dict[str, Any]]) -> None:
        """Tell what the pods do when it changes.

        Raises:
            ProgramFailed: they wait for what will not come.
        """
        states = []
        for pod in pods:
            status = pod.get("status", {})
            waiting = [each["state"].get("waiting", {}) for each in status.get("containerStatuses", [])]
            why = [f"{each['reason']}: {each.get('message', '')}" for each in waiting if each.get("reason")]
            why += [each["message"] for each in status.get("conditions", []) if each.get("reason") == "Unschedulable"]
            if any(each.get("reason") in HOPELESS for each in waiting):
                raise ProgramFailed("bad_setting", f"pod {pod['metadata']['name']} cannot start: {'; '.join(why)}")
            states.append(f"{status.get('phase', 'Pending').lower()} {'; '.join(why)}".rstrip())
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        self._tell(", ".join(f"{count} {state}" for state, count in counts.items()) or "no pods yet")

    def _tell(self, text: str) -> None:
        if text != self.told:
            self.say(f"JobSet {self.name}: {text}")
            self.told = text

    def logs(self) -> str:
        """What its pods have printed, as far as it was fetched."""
        return self.job.log.read_text(encoding="utf-8", errors="replace")

    def _fetch_logs(self) -> None:
        """Put what its pods have printed into the program's log; deleted pods tell nothing more."""
        label = f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}"
        many = [f"--max-log-requests={self.job.machines}", "--prefix"] if self.job.machines > 1 else []
        asked = _kubectl(self.namespace, "logs", label, "--tail=-1", *many, seconds=10.0)
        with open(self.job.log, "a", encoding="utf-8") as file:
            file.write(asked.stdout if asked.returncode == 0 else f"kubectl logs: {asked.stderr}")

    def cancel(self) -> None:
        """End it, unless it has ended, and delete it. What takes long is waited for by the next attempt."""
        self._fetch_logs()
        if self.delete(DELETE_SECONDS):
            (self.job.folder / LEFT).unlink(missing_ok=True)
        else:
            self.say(f"JobSet {self.name} is asked to end and has not yet")

    def delete(self, seconds: float) -> bool:
        """Delete it; whether it and its pods are gone after so many seconds."""
        return _delete(self.namespace, self.name, seconds)


def end(folder: Path) -> None:
    """Delete the JobSet that works in a folder; training saves a checkpoint first.

    Raises:
        ProgramFailed: it is not gone in time, or Kubernetes does not answer; the next attempt tries again.
    """
    left = read_left(folder)
    if left is None:
        return
    if not _delete(left["namespace"], left["name"], 2 * ANSWER_SECONDS):
        raise ProgramFailed("network", f"JobSet {left['name']}, of an earlier run, does not end")
    (folder / LEFT).unlink(missing_ok=True)


def _delete(namespace: str, name: str, seconds: float) -> bool:
    waiting = ("--ignore-not-found", "--cascade=foreground", f"--timeout={seconds:g}s")
    return _kubectl(namespace, "delete", KIND, name, *waiting, seconds=seconds + 5).returncode == 0


def _kubectl(namespace: str, *words: str, seconds: float = ANSWER_SECONDS) -> Any:
    return ask(["kubectl", f"--namespace={namespace}", *words], seconds=seconds)
