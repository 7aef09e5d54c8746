"""A stand-in of Slurm's commands, which really runs job files on this machine: sbatch, srun, squeue, scancel, scontrol.

It knows what a job file of ours and its launcher ask for, answers in Slurm's words, and keeps a file per job in
$STAND_IN. Beside the commands there is `slurmd`, which stands for the daemon: it runs a job, ends it when it is
cancelled, and starts it again when it is queued again.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

JOBS = Path(os.environ["STAND_IN"])
KILL_WAIT = 5.0  # seconds between SIGTERM and SIGKILL
STOPPED = ("CANCELLED", "REQUEUED")


def read(number: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((JOBS / f"{number}.json").read_text())
    return found


def write(number: str, **values: Any) -> None:
    path = JOBS / f"{number}.json"
    before = read(number) if path.exists() else {}
    temporary = JOBS / f".{number}.{os.getpid()}"
    temporary.write_text(json.dumps(before | values))
    temporary.rename(path)


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Long options in front, and what is behind them."""
    found = {}
    while words and words[0].startswith("--"):
        name, _, value = words[0][2:].partition("=")
        found[name], words = value, words[1:]
    return found, words


def sbatch(words: list[str]) -> None:
    _, (file,) = options(words)
    asked: dict[str, str] = {}
    text = Path(file).read_text()
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            asked |= options(shlex.split(line.removeprefix("#SBATCH ")))[0]
    if asked.get("partition") == "none":
        sys.exit("sbatch: error: invalid partition specified: none")
    if asked.get("partition") == "away":
        sys.exit("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)")
    number = str(100 + len(list(JOBS.glob("*.json"))))
    write(number, state="PENDING", name=asked["job-name"], file=file, text=text, asked=asked, starts=0)
    line = [sys.executable, __file__, "slurmd", number]
    nowhere = subprocess.DEVNULL
    daemon = subprocess.Popen(line, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)
    write(number, daemon=daemon.pid)
    print(number)


def slurmd(words: list[str]) -> None:
    (number,) = words
    job = read(number)
    output = job["asked"]["output"].replace("%%", "%")
    while True:
        variables = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": job["asked"]["nodes"]}
        with open(output, "ab") as log:
            batch = subprocess.Popen(
                ["bash", job["file"]], env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
            )
        write(number, state="RUNNING", batch=batch.pid, starts=read(number)["starts"] + 1)
        asked_at = None
        while batch.poll() is None or any(map(is_alive, tasks_of(number))):
            time.sleep(0.05)
            if read(number)["state"] in STOPPED:
                if asked_at is None:
                    asked_at = time.monotonic()
                    kill(number, signal.SIGTERM)
                elif time.monotonic() - asked_at > KILL_WAIT:
                    kill(number, signal.SIGKILL)
        if read(number)["state"] != "REQUEUED":
            break
    if read(number)["state"] == "RUNNING":
        write(number, state="FAILED" if batch.returncode else "COMPLETED")


def tasks_of(number: str) -> list[int]:
    return [int(path.read_text() or 0) for path in JOBS.glob(f"{number}.task-*")]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not only waited for by nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(number: str, sign: int, steps_only: bool = False) -> None:
    """A signal to the tasks of a job, and to its shell."""
    pids = tasks_of(number)
    groups = pids if steps_only else [*pids, read(number)["batch"]]
    for pid in filter(None, groups):
        try:
            os.killpg(pid, sign)
        except ProcessLookupError:
            continue


def srun(words: list[str]) -> None:
    _, line = options(words)
    # a task is Slurm's child, not that of srun, and outlives it when the job's shell and all in it are asked to end
    signal.signal(signal.SIGTERM, lambda *_: None)
    number = os.environ["SLURM_JOB_ID"]
    tasks = []
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        task = subprocess.Popen(line, env=os.environ | {"SLURM_NODEID": str(node)}, start_new_session=True)
        (JOBS / f"{number}.task-{node}").write_text(str(task.pid))
        tasks.append(task)
    while any(task.poll() is None for task in tasks):
        time.sleep(0.05)
        if any(task.poll() for task in tasks):  # --kill-on-bad-exit
            kill(number, signal.SIGTERM, steps_only=True)
    codes = [128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks]
    sys.exit(max(codes))


def squeue(words: list[str]) -> None:
    asked, _ = options(words)
    numbers = [path.stem for path in sorted(JOBS.glob("*.json"))]
    if "jobs" in asked and asked["jobs"] not in numbers:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    for number in [asked["jobs"]] if "jobs" in asked else numbers:
        job = read(number)
        state = {"REQUEUED": "COMPLETING"}.get(job["state"], job["state"])
        if job["name"] == asked.get("name", job["name"]) and ("states" in asked or state in ("PENDING", "RUNNING")):
            line = asked["format"].replace("%T", state).replace("%i", number)
            print(line.replace("%R", "(Priority)" if state == "PENDING" else "here"))


def scancel(words: list[str]) -> None:
    asked, (number,) = options(words)
    if "batch" in asked:
        os.kill(read(number)["batch"], signal.Signals[f"SIG{asked['signal']}"])
    elif "signal" in asked:
        kill(number, signal.Signals[f"SIG{asked['signal']}"], steps_only=True)
    elif read(number)["state"] in ("PENDING", "RUNNING"):
        write(number, state="CANCELLED")


def scontrol(words: list[str]) -> None:
    if words[0] == "requeue":
        write(words[1], state="REQUEUED")
    else:  # show hostnames
        print("127.0.0.1")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if rest == ["--version"]:
        print("slurm stand-in")
    else:
        globals()[command](rest)
