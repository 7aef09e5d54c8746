"""Make `.venv` and install the locked packages, once; say what is happening.

One decision: standard library only and syntax that old Pythons can read, so that the first thing a stranger runs works
or says in one sentence why it cannot.
"""

import hashlib
import os
import subprocess
import sys
import time
import venv

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(PROJECT, ".venv")
LOCK = os.path.join(PROJECT, "requirements.lock")
STAMP = os.path.join(VENV, "installed.txt")
LOG = os.path.join(VENV, "install.log")
OLDEST = (3, 11)


def wanted():
    # type: () -> str
    """What the environment must have been made from."""
    digest = hashlib.sha256(sys.version.encode())
    for name in (LOCK, os.path.join(PROJECT, "pyproject.toml")):
        with open(name, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def installed():
    # type: () -> bool
    """Whether the environment is there and was made from these files."""
    try:
        with open(STAMP) as file:
            return file.read() == wanted()
    except OSError:
        return False


def pip(python, arguments, total):
    # type: (str, list, int) -> None
    """Run pip, count what it collects, keep its words in the log."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"] + arguments
    live = sys.stdout.isatty()
    count, began, last = 0, time.time(), 0.0
    with open(LOG, "a") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        assert child.stdout is not None
        for line in child.stdout:
            log.write(line)
            if line.startswith("Collecting "):
                count += 1
                if live or time.time() - last > 15:
                    last = time.time()
                    text = "  {:>3} of {} packages, {:.0f} s: {}".format(
                        count, total, time.time() - began, line.split()[1]
                    )
                    sys.stdout.write("\r{:<78.78}".format(text) if live else text + "\n")
            elif line.startswith("Installing collected") and total > 1:
                sys.stdout.write(("\r" if live else "") + "{:<78}\n".format("  all here, putting them into place …"))
            sys.stdout.flush()
        code = child.wait()
    if code != 0:
        with open(LOG) as log:
            sys.stdout.writelines(log.readlines()[-15:])
        sys.exit("pip failed with exit code {}; everything it said is in {}".format(code, LOG))


def main():
    # type: () -> None
    """Make the environment unless it is there."""
    if sys.version_info[:2] < OLDEST:
        found = sys.version.split()[0]
        sys.exit("Python {} is too old, 3.11 or newer is needed; name one with PYTHON=python3.12 make …".format(found))
    if installed():
        return
    began = time.time()
    print("making .venv and installing (once; about 2 minutes, mostly downloads)")
    sys.stdout.flush()
    python = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin", "python")
    if not os.path.exists(python):
        venv.create(VENV, with_pip=True)
    with open(LOCK) as file:
        total = sum(1 for line in file if "==" in line)
    pip(python, ["-r", LOCK], total)
    pip(python, ["--no-deps", "-e", PROJECT], 1)
    with open(STAMP, "w") as file:
        file.write(wanted())
    print("installed in {:.0f} s".format(time.time() - began))


if __name__ == "__main__":
    main()
