"""Rows through the data steps without writing anything: what `check` says about a model that is on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.preview import rows_seen, steps_behind
from tasks.rejects import Rejects
from tasks.render import require_rendered
from tasks.shards import require_fitting
from tasks.steps import Step


def count_usable(tokenize: Step, base: Path) -> dict[str, Any]:
    """Rows that would come out of a tokenize step, and reason → rows that rendering and tokenizing leave out.

    Rows kept back by `val_size` count as well: they go through the same steps.

    Args:
        tokenize: the step; the fetch and render steps are those it stands on; their files are on this disk.
        base: the model's folder.

    Raises:
        InputError: as the steps do.
    """
    rejects = {"render": Rejects(), "tokenize": Rejects()}
    fitting, files = 0, []
    for seen in rows_seen(tokenize, base, {}):
        files.append(seen.file)
        if seen.refused is None:
            fitting += 1
        elif seen.step in rejects and seen.stands_for_row:
            rejects[seen.step].add(seen.file, seen.place, seen.row, seen.refused)
    refused, unfit = rejects["render"], rejects["tokenize"]
    rendered = fitting + len(unfit.rows)
    read = rendered + len(refused.rows)
    require_rendered(steps_behind(tokenize)[1], list(dict.fromkeys(files)), refused, read, rendered)
    require_fitting(tokenize, unfit, fitting)
    return {"rows": fitting, "left_out": refused.counts() | unfit.counts()}
