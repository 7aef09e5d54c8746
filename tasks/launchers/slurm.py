"""Programs that Slurm starts, by sbatch and srun, from a work folder that all machines see at the same place.

One decision: the job writes its own exit code into the work folder, so its end is known without Slurm's accounting and
after Slurm has forgotten it. squeue says the rest: that it waits, that it runs, that it was killed.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from registry.errors import Problem
from tasks.launchers.job import (
    LEFT,
    PROJECT,
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

JOB_FILE, EXIT, STARTED = "job.sbatch", "exit", "started"
COMMANDS = ("sbatch", "squeue", "scancel")
LOOK_SECONDS = 10.0  # between two questions to squeue; the files of the work folder are looked at more often
SETTLE_SECONDS = 20.0  # until a shared file system shows what an ended job has written
CANCEL_SECONDS = 25.0  # to end, after which it is left to Slurm; Prefect kills a flow 30 s after it was asked to stop
LONGEST_END_SECONDS = 120.0  # Slurm gives a program 30 s between SIGTERM and SIGKILL, where nobody set KillWait higher
SILENCE_SECONDS = 1800.0  # without an answer of squeue, after which the run fails, and can be tried again
WARNING_SECONDS = 120  # before the time limit
UNHEARD = ("no answer within", "Unable to contact", "timed out")  # of ours and sbatch's words: the controller is away
UNKNOWN = "UNKNOWN"  # a job that Slurm has forgotten
ENDED = {UNKNOWN, "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "TIMEOUT"}
# of another job or machine: what the flow runs under must not steer the job
NOT_OURS = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "CUDA_VISIBLE_DEVICES"}

MEETING = """\
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
"""
# Slurm warns this shell before the time limit. The program then gets SIGTERM (not by way of srun, which would make
# SIGKILL of it), saves and ends; a job that came a checkpoint further is queued again, and goes on there.
SCRIPT = """\

cd {folder} || exit 1
rm -f exit
touch started
export LLAMATUNER_HOME={home}
export PYTHONPATH={project}"${{PYTHONPATH:+:$PYTHONPATH}}"
{meeting}[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
time_is_up=
trap 'time_is_up=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 {line} &
step=$!
wait "$step"
code=$?
while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
if [ "$code" -ne 0 ] && [ -n "$time_is_up" ] && [ -n "$(find scratch -name whole.json -newer started)" ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit
fi
echo "$code" > exit.new && mv exit.new exit
exit "$code"
"""


@dataclass(frozen=True)
class State:
    """What squeue says of a job."""

    word: str
    """Slurm's, in capitals."""
    where: str = ""
    """Its machines, or why it waits."""


def problems(where: str) -> list[Problem]:
    """What keeps this machine from starting jobs.

    Args:
        where: the recipe's key.
    """
    for name in COMMANDS:
        asked = ask([name, "--version"])
        if asked.returncode != 0:
            rule = f"slurm: {name} does not work here: {asked.stderr.strip() or asked.stdout.strip()}"
            return [Problem(where, rule, "Start the run where sbatch works, or use launcher: local.")]
    asked = ask(["squeue", "--noheader", "--format=%i"])
    if asked.returncode != 0:
        rule = f"slurm: squeue gets no answer: {asked.stderr.strip()}"
        return [Problem(where, rule, "See that Slurm's controller is up, or use launcher: local.")]
    return []


class Slurm:
    """Starts programs by sbatch.

    Args:
        cluster: with options of sbatch, `long-name: value`; true: the option alone, false: not.
        look: seconds between two questions to squeue.
        settle: seconds until the files of an ended job are seen.
    """

    def __init__(self, cluster: Cluster, look: float = LOOK_SECONDS, settle: float = SETTLE_SECONDS) -> None:
        self.cluster, self.look, self.settle = cluster, look, settle

    def job_file(self, job: Job) -> str:
        """What sbatch is given. Nothing secret is in it: the environment of the run goes along by sbatch itself."""
        ours = {
            "job-name": job_name(job.folder),
            "nodes": job.machines,
            "ntasks-per-node": 1,
            "output": str(job.log).replace("%", "%%"),
            "open-mode": "append",
            "requeue": True,
            "signal": f"B:USR1@{WARNING_SECONDS}",
        }
        asked = (ours | dict(self.cluster.options)).items()
        lines = [_directive(name, value) for name, value in asked if value is not False]
        folder, home = shlex.quote(str(job.folder)), shlex.quote(self.cluster.home)
        meeting = MEETING if job.machines > 1 else ""
        parts = {"folder": folder, "home": home, "project": shlex.quote(str(PROJECT)), "meeting": meeting}
        parts |= {"line": shlex.join([sys.executable, *job.part()])}
        return "".join(f"{line}\n" for line in ("#!/bin/bash", *lines)) + SCRIPT.format(**parts)

    def _job(self, job: Job, number: str, say: Say) -> SlurmJob:
        return SlurmJob(job, number, say, self.look, self.settle)

    def launch(self, job: Job, say: Say) -> SlurmJob:
        """Submit a job; one of an earlier run that does the same is taken over instead.

        Raises:
            ProgramFailed: sbatch refused it.
        """
        text = self.job_file(job)
        left, digest = read_left(job.folder), job.digest(text)
        if left:
            number = left.get("id") or _find(job_name(job.folder))
            known = self._job(job, number, say) if number else None
            if known and left["digest"] == digest and known.can_be_followed():
                say(f"Slurm job {number} was begun by an earlier run; it is taken over")
                write_left(job.folder, **(left | {"id": number}))
                return known
            end(job.folder)
        job.write()
        for name in (EXIT, STARTED):
            (job.folder / name).unlink(missing_ok=True)
        file = job.folder / JOB_FILE
        file.write_text(text, encoding="utf-8")
        write_left(job.folder, launcher="slurm", name=job_name(job.folder), digest=digest)
        asked = ask(["sbatch", "--parsable", str(file)], environment() | dict(job.environment))
        if any(words in asked.stderr for words in UNHEARD):  # it may be submitted: the next attempt looks for its name
            raise ProgramFailed("network", f"sbatch: {asked.stderr.strip()}")
        if asked.returncode != 0:
            (job.folder / LEFT).unlink()
            raise ProgramFailed("bad_setting", f"sbatch refuses {file}: {asked.stderr.strip()}")
        number = asked.stdout.strip().partition(";")[0]
        write_left(job.folder, launcher="slurm", name=job_name(job.folder), digest=digest, id=number)
        say(f"Slurm job {number} is submitted; {file} is what it does")
        return self._job(job, number, say)


class SlurmJob:
    """A submitted job.

    Args:
        job: what it does.
        number: Slurm's.
        say: told when its state changes.
        look, settle: see `Slurm`.
    """

    def __init__(self, job: Job, number: str, say: Say, look: float, settle: float) -> None:
        self.job, self.number, self.say, self.look, self.settle = job, number, say, look, settle
        self.told, self.next_look, self.heard = State(""), 0.0, time.monotonic()
        self.gone_since: float | None = None

    def wait(self, seconds: float) -> Ended | None:
        """How it ended; None while it is at it after so many seconds.

        Raises:
            ProgramFailed: Slurm has not answered for half an hour; the next attempt takes the job over.
        """
        time.sleep(seconds)
        code, now = self._exit_code(), time.monotonic()
        if code == 0:
            return Ended(0)
        if now < self.next_look and (code is None or self.gone_since is not None):
            return None
        state = self._state()
        over = state is not None and state.word in ENDED
        # an exit code: Slurm says in a moment whether it was for want of memory; none: it may be on its way
        self.gone_since = (self.gone_since or now) if over or code is not None else None
        self.next_look = now + (self.look if self.gone_since is None else min(self.look, 1.0))
        waited = 0.0 if self.gone_since is None else now - self.gone_since
        if (over and code is not None) or waited > self.settle:
            return self._ending(state.word if state and over else "FAILED", code)
        return None

    def _exit_code(self) -> int | None:
        """What the job wrote at its end; negative for a signal, as Python has it."""
        file = self.job.folder / EXIT
        if not file.exists():
            return None
        code = int(file.read_text(encoding="ascii"))
        return 128 - code if code > 128 else code

    def _ending(self, word: str, code: int | None) -> Ended:
        words = f"was ended with Slurm job {self.number}: {word}"
        if word == "OUT_OF_MEMORY":
            return Ended(code or -9, "out_of_memory", f"{self.job.module} {words}")
        if word == "COMPLETED":
            return Ended(code or 0)
        return Ended(-9, "", words) if code is None else Ended(code)

    def _state(self) -> State | None:
        """Slurm's answer, told when it changes; None where there is none."""
        state, trouble = look(self.number)
        if state is not None:
            self.heard = time.monotonic()
        elif time.monotonic() - self.heard > SILENCE_SECONDS:
            raise ProgramFailed("network", f"squeue has not answered for half an hour: {trouble}")
        shown = state or State("silent", f"(squeue: {trouble}); it goes on meanwhile")
        if shown != self.told and shown.word not in ENDED:
            self.say(f"Slurm job {self.number}: {shown.word.lower()} {shown.where}".rstrip())
            self.told = shown
        return state

    def can_be_followed(self) -> bool:
        """Whether it is still at it, or has said how it ended."""
        state, _ = look(self.number)
        return self._exit_code() is not None or state is None or state.word not in ENDED

    def logs(self) -> str:
        """What it has printed: Slurm writes it into the work folder."""
        return self.job.log.read_text(encoding="utf-8", errors="replace")

    def cancel(self) -> None:
        """End it, unless it has ended. What takes longer than a flow has to end is waited for by the next attempt."""
        if self._exit_code() is not None or cancel(self.number, CANCEL_SECONDS):
            (self.job.folder / LEFT).unlink(missing_ok=True)
        else:
            self.say(f"Slurm job {self.number} is asked to end and has not yet; see squeue")


def end(folder: Path) -> None:
    """End the job that works in a folder; training saves a checkpoint first.

    Raises:
        ProgramFailed: it is not gone in time, or Slurm does not answer; the next attempt tries again.
    """
    left = read_left(folder)
    if left is None:
        return
    number = left.get("id") or _find(left["name"])
    if number and not cancel(number, LONGEST_END_SECONDS):
        raise ProgramFailed("network", f"Slurm job {number}, of an earlier run, does not end; try `scancel {number}`")
    (folder / LEFT).unlink(missing_ok=True)


def cancel(number: str, seconds: float) -> bool:
    """Ask a job to end; whether it has, after so many seconds."""
    deadline, asked = time.monotonic() + seconds, False
    while True:
        state, _ = look(number)
        if state is not None and state.word in ENDED:
            return True
        if time.monotonic() > deadline:
            return False
        asked = asked or ask(["scancel", number], environment()).returncode == 0
        time.sleep(0.5)


def look(number: str) -> tuple[State | None, str]:
    """What squeue says of a job; None and why where it says nothing."""
    asked = ask(["squeue", "--noheader", "--states=all", "--format=%T|%R", f"--jobs={number}"], environment())
    if asked.returncode == 0:
        word, _, where = asked.stdout.strip().partition("|")
        return State(word or UNKNOWN, where), ""
    if "invalid job id" in asked.stderr.lower():
        return State(UNKNOWN), ""
    return None, asked.stderr.strip()


def _find(name: str) -> str | None:
    """The number of a job that was submitted when its flow died, before it could be noted."""
    asked = ask(["squeue", "--noheader", "--me", "--format=%i", f"--name={name}"], environment())
    return next(iter(asked.stdout.split()), None)


def environment() -> dict[str, str]:
    """This process's environment for Slurm's commands, without what another job or machine put there."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_OURS and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }


def _directive(name: str, value: object) -> str:
    """A line of options for sbatch, which reads quotes as a shell does."""
    return f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"
