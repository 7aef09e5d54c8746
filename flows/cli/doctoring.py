"""`doctor`."""

from __future__ import annotations

from dataclasses import asdict

from flows.cli.output import DONE, FAILED, people, print_json
from registry.home import Home

STYLES = {"good": "green", "mended": "yellow", "bad": "bold red"}


def check_home(as_json: bool) -> int:
    """Check the home and mend what can be; the exit code, 1 if somebody has to do something."""
    from flows.doctor import examine

    console, home, found = people(as_json), Home.open(), []

    def say(text: str) -> None:
        console.print(f"  {text}", markup=False, soft_wrap=True)

    for finding in examine(home, say):
        found.append(finding)
        console.print(f"{finding.state:<7}", style=STYLES[finding.state], end="")
        console.print(f"{finding.check:<10} {finding.text}", markup=False, soft_wrap=True)
    bad = any(finding.state == "bad" for finding in found)
    if as_json:
        print_json({"status": "bad" if bad else "good", "findings": [asdict(finding) for finding in found]})
    return FAILED if bad else DONE
