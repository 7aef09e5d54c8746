"""What a recipe says about the cluster that its programs run on. None of it changes a result.

One decision: what a cluster wants of its users is theirs to say, so both mappings take what the cluster takes; what
LLamaTuner says itself, and what it cannot do without, is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import JsonValue

from registry.errors import shown
from registry.record import Record, Text

OPTION = re.compile(r"[a-z][a-z0-9-]+")
OURS = {
    "job-name": "it finds the job again when a flow was killed",
    "nodes": "set nnodes instead",
    "ntasks": "every machine starts one task, and that one the processes",
    "ntasks-per-node": "every machine starts one task, and that one the processes; set nproc_per_node instead",
    "output": "it is the program's log, in the work folder",
    "error": "it is the program's log, in the work folder",
    "open-mode": "a job that is queued again goes on with its log",
    "signal": "it tells the job to save before its time limit",
    "requeue": "it is set already; use no-requeue: true to switch it off",
    "parsable": "it is set already",
    "array": "a step is one job",
    "wrap": "a step has a job file",
}
"""Options of sbatch that LLamaTuner sets itself → why."""


class KubernetesSettings(Record):
    """What the pods of a job look like."""

    image: Text
    """Container image with LLamaTuner in it, such as that of deployments/docker."""
    claim: Text
    """Persistent volume claim that holds LLAMATUNER_HOME; several machines need access mode ReadWriteMany."""
    mount_path: Text
    """Where it is mounted, in the job as in the process that runs the flow; LLAMATUNER_HOME lies under it."""
    namespace: Text = "default"
    """Namespace of the job."""
    resources: dict[str, dict[str, JsonValue]] | None = None
    """`limits` and `requests` of a pod, e.g. `limits: {nvidia.com/gpu: 8}`."""
    secret: Text | None = None
    """Kubernetes Secret whose keys become environment variables, such as HF_TOKEN."""
    pod: dict[str, JsonValue] | None = None
    """More of the pod's spec: nodeSelector, tolerations, priorityClassName, serviceAccountName …"""


def slurm_problems(options: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What cannot be said to sbatch: the option, the rule and the cure.

    >>> [option for option, _, _ in slurm_problems({"gres": "gpu:8", "nodes": 2, "cpus_per_task": 4, "time": 86400})]
    ['nodes', 'cpus_per_task', 'time']
    """
    for name, value in options.items():
        if not OPTION.fullmatch(name):
            cure = f"Long options without the dashes in front, e.g. {name.strip('-').replace('_', '-') or 'partition'}."
            yield name, f"{shown(name)} is no long option of sbatch", cure
        elif name in OURS:
            yield name, f"LLamaTuner sets it: {OURS[name]}", "Remove it."
        elif name == "time" and not isinstance(value, str):
            # YAML reads 24:00:00 as the number 86400, which would be as many minutes
            yield name, f"{shown(value)} is a number; YAML makes one of 24:00:00", 'Quote it: time: "24:00:00".'
        elif not isinstance(value, str | int | float) or not str(value).isprintable():
            rule = f"{shown(value)} is no text on one line, number, true or false"
            yield name, rule, "Write what sbatch takes behind the =."
