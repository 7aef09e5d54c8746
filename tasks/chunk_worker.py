"""The program of one data worker: chunks in on standard input, answers out on standard output.

One decision: a request is one line of JSON and, behind it, the bytes it announces; nothing is pickled, and a worker
that is killed loses the chunk it was at and nothing else. A worker ends when its input does, so it cannot outlive the
run by more than a chunk. (PR_SET_PDEATHSIG would end it with the *thread* that started it, and threads come and go.)
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any, BinaryIO

from registry.errors import InputError
from tasks.chunks import Maker, make_chunk
from tasks.program import classify


def answer(request: dict[str, Any], payload: bytes, makers: dict[str, Maker]) -> dict[str, Any]:
    """Do one request; what went wrong is an answer too."""
    try:
        if "settings" in request:
            makers[request["name"]] = Maker.load(request["run"], request["settings"])
        return {"result": make_chunk(makers[request["name"]], request["task"], payload, request["target"])}
    except InputError as error:
        problems = [[problem.where, problem.rule, problem.cure] for problem in error.problems]
        return {"problems": problems, "title": error.title}
    except Exception as error:  # noqa: BLE001 - every failure is told to the step, whatever it is
        kind, message = classify(error)
        return {"kind": kind, "message": message}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    makers: dict[str, Maker] = {}
    gc.disable()  # rows by the thousand set it off again and again, and find nothing: half of a chunk's time
    while line := requests.readline():
        request = json.loads(line)
        payload = requests.read(request["payload"])
        answers.write(json.dumps(answer(request, payload, makers), ensure_ascii=False).encode() + b"\n")
        answers.flush()
        if "settings" in request:
            gc.freeze()  # what was loaded stays
        gc.collect()


class _WithoutPandas:
    """Pyarrow imports pandas where it is installed, to ask whether a list is one of its own: 0.25 s for nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "pandas":
            raise ImportError("data workers do without pandas")


def main() -> None:
    """Serve; what libraries print goes to standard error, so that it cannot get between the answers."""
    sys.meta_path.insert(0, _WithoutPandas())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
