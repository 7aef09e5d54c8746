"""Which launcher starts a step's programs, and whose job is still in its folder."""

from __future__ import annotations

from pathlib import Path

from registry.errors import Problem
from tasks.launchers import kubernetes, slurm
from tasks.launchers.job import Cluster, Launcher, read_left
from tasks.launchers.local import Local

CLUSTERS: dict[str, type[slurm.Slurm] | type[kubernetes.Kubernetes]] = {
    "slurm": slurm.Slurm,
    "kubernetes": kubernetes.Kubernetes,
}
ENDS = {"slurm": slurm.end, "kubernetes": kubernetes.end}


def launcher_for(cluster: Cluster | None) -> Launcher:
    """The launcher of a cluster; None: this machine."""
    return CLUSTERS[cluster.launcher](cluster) if cluster else Local()


def end_left(folder: Path, launcher: str | None = None) -> bool:
    """End the job that a run which died has left in a folder.

    Args:
        folder: work folder of the step.
        launcher: may take its own job over, which then stays.

    Returns:
        Whether a job that may be taken over is still in the folder.

    Raises:
        ProgramFailed: it does not end, or its cluster does not answer.
    """
    left = read_left(folder)
    if left is None:
        return False
    if left["launcher"] == launcher:
        return True
    ENDS[left["launcher"]](folder)
    return False


def cluster_problems(cluster: Cluster, where: str) -> list[Problem]:
    """What keeps this machine from starting jobs there.

    Args:
        cluster: what the recipe says.
        where: the recipe's key.
    """
    return slurm.problems(where) if cluster.launcher == "slurm" else kubernetes.problems(cluster, where)
