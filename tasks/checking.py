"""Rows through the data steps without writing anything: what `check` says about a model that is on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.fetch import converted_rows
from tasks.reading import BadRow
from tasks.rejects import Rejects
from tasks.render import RowRenderer, require_rendered
from tasks.shards import RowEncoder, require_fitting
from tasks.steps import Step


def count_usable(tokenize: Step, base: Path) -> dict[str, Any]:
    """Rows that would come out of a tokenize step, and reason → rows that rendering and tokenizing leave out.

    Rows kept back by `val_size` count as well: they go through the same steps.

    Args:
        tokenize: the step; the fetch and render steps are those it stands on.
        base: the model's folder.

    Raises:
        InputError: as the steps do.
    """
    render = tokenize.inputs["rendered"].source
    assert isinstance(render, Step)
    fetch = render.inputs["rows"].source
    assert isinstance(fetch, Step)
    renderer, encoder = RowRenderer.from_step(render, base), RowEncoder.from_step(tokenize, base)
    refused, unfit, rendered_rows, fitting = Rejects(), Rejects(), 0, 0
    for file, raw, chat in converted_rows(fetch):
        if isinstance(chat, BadRow):
            continue  # the fetch step's own
        rendered = renderer.render(chat)
        if isinstance(rendered, BadRow):
            refused.add(file, raw.place, raw.row, rendered)
            continue
        rendered_rows += 1
        encoded = encoder.encode(rendered["text"], rendered["spans"])
        if isinstance(encoded, BadRow):
            unfit.add(file, raw.place, raw.row, encoded)
        else:
            fitting += 1
    require_rendered(render, refused, rendered_rows)
    require_fitting(tokenize, unfit, fitting)
    return {"rows": fitting, "left_out": refused.counts() | unfit.counts()}
