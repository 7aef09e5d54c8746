"""How the programs of a plan will be started: what keeps a cluster from it, and the exact command or job file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import Problem
from registry.home import Home
from tasks.artifacts import Store
from tasks.launchers.choice import CLUSTERS, cluster_problems
from tasks.launchers.job import LEFT, SPEC, Job, command, read_left
from tasks.locks import is_free
from tasks.program import Spec
from tasks.steps import LocalFolder, Step
from tasks.training import launch_of

if TYPE_CHECKING:
    from flows.planning import PlannedStep

UNKNOWN_KEY = "KEY"


def cluster_problems_of(lines: Sequence[PlannedStep]) -> list[Problem]:
    """What keeps the clusters of a plan from doing what is not done.

    Args:
        lines: of the plan.
    """
    problems: list[Problem] = []
    asked = []
    for line in lines:
        cluster = line.step.cluster
        if cluster is None or line.state == "cached":
            continue
        if cluster not in asked:
            asked.append(cluster)
            problems += cluster_problems(cluster, "launcher")
        if cluster.launcher == "kubernetes":
            mounted = Path(cluster.options["mount_path"])
            sources = [wanted.source for wanted in line.step.inputs.values()]
            needed = [Path(cluster.home), *(each.path for each in sources if isinstance(each, LocalFolder))]
            for path in (path for path in needed if not path.is_relative_to(mounted)):
                rule = f"{path} is not under mount_path {mounted}, so a pod would not see it"
                problems.append(Problem("kubernetes.mount_path", rule, "Put it there: home, models and data files."))
    return list(dict.fromkeys(problems))


def jobs_without_run(home: Home) -> list[str]:
    """Jobs of clusters whose flow has died, a phrase each: their next run takes them over."""
    found = []
    for folder in sorted(path.parent for path in home.work.glob(f"*/{LEFT}")):
        left, key = read_left(folder), folder.name.rpartition("-")[2]
        # whoever follows a job holds the lock of its step's key
        followed = any(not is_free(lock) for lock in home.locks.glob(f"{key}*.lock"))
        if left is not None and not followed:
            number = f" ({left['id']})" if "id" in left else ""
            found.append(f"{left['launcher']} job {left['name']}{number} works in work/{folder.name}")
    return found


def launch_text(line: PlannedStep, store: Store) -> str:
    """What starts the program of a training step: the command line, the file for sbatch, or the manifest.

    Args:
        line: of the plan.
        store: whose work folders are meant; while a step waits for an earlier one, its folder has no key in its name.
    """
    step = line.step
    folder = store.work_folder(step.kind, line.key or UNKNOWN_KEY)
    module, processes, nodes = launch_of(step)
    if step.cluster is None:
        return shlex.join(command(module, folder / SPEC, processes, nodes)) + "\n"
    launcher = CLUSTERS[step.cluster.launcher](step.cluster)
    return launcher.job_file(Job(module, _no_spec(step), folder, processes, nodes))


def _no_spec(step: Step) -> Spec:
    """In place of what the program is told, which no job file holds."""
    return Spec(step.identity, step.runtime, {}, "", "", "", "")
