"""A comparison of runs as a page for a browser, and its pictures.

One decision: the page is one file that asks for nothing: style and pictures inside, no script, and a policy that
forbids anything else. Whatever comes from recipes, rows or models is escaped.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

from flows.comparison import Measured, Side
from tasks.number_picture import COLOURS, as_png, draw_numbers, new_figure

FIRST_LINE = '<!doctype html><meta name="generator" content="llamatuner compare">'
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
BRACKETS = "In brackets 95 % intervals, by drawing rows again; a difference is that to the first, of paired rows."
STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1c1e;--soft:#62626a;--edge:#d5d5dc;--head:#f2f2f5}
@media(prefers-color-scheme:dark){:root{--page:#131316;--ink:#ececf0;--soft:#a2a2ad;--edge:#3b3b44;--head:#1f1f25}}
body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--page);color:var(--ink);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:0 0 .5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{border:1px solid var(--edge);padding:.3rem .55rem;text-align:left;vertical-align:top}
th{background:var(--head)}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
small{color:var(--soft)}img{max-width:100%;background:#fff;border-radius:.4rem}td.a{white-space:pre-wrap;min-width:14rem}td:first-child{min-width:8rem}
b.s{padding:0 .35em;border-radius:.3em;color:#fff}
"""


def letter(number: int) -> str:
    """What a side is called: A, B, …"""
    return chr(ord("A") + number)


def comparison_page(
    sides: Sequence[Side],
    settings: Sequence[tuple[str, list[Any]]],
    numbers: Sequence[Measured],
    answers: Sequence[tuple[str, list[str | None]]],
) -> str:
    """The page: who is compared, what differs, numbers, curves and answers."""
    badges = [f'<b class="s" style="background:{COLOURS[n]}">{letter(n)}</b>' for n in range(len(sides))]
    who = [[badge, _text(s.run), _text(s.stage)] for badge, s in zip(badges, sides, strict=True)]
    parts = [
        f'{FIRST_LINE}<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width"><title>Comparison</title>',
        f"<style>{STYLE}</style></head><body><h1>Comparison</h1>",
        _table(["", "run", "stage"], who),
        "<h2>Settings that differ</h2>",
        _table(["setting", *badges], [[_text(name), *map(_text, values)] for name, values in settings])
        if settings
        else "<p>None.</p>",
        "<h2>Numbers</h2>",
        _table(["metric", "rows", *badges], [_numbers(row) for row in numbers]),
        f"<p><small>{BRACKETS}</small></p>",
        _picture(_drawn(numbers, len(sides)), "numbers with their intervals") if numbers else "",
        "<h2>Training loss</h2>",
        _picture(draw_curves(sides), "training loss of every side"),
    ]
    if answers:
        rows = [[_text(q), *(f'<td class="a">{_text(a)}</td>' for a in found)] for q, found in answers]
        parts += ["<h2>Answers</h2>", _table(["question", *badges], rows)]
    return "\n".join(parts) + "</body></html>\n"


def _text(value: Any) -> str:
    return "–" if value is None else escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{body}</table></div>'


def _numbers(row: Measured) -> list[str]:
    cells = [_text(row.metric), f'<td class="n">{row.rows:,}</td>']
    for result, difference in zip(row.results, row.differences, strict=True):
        text = "–"
        if result is not None:
            text = f"{result['value']:.4g}"
            if "low" in result:
                text += f" <small>[{result['low']:.4g}, {result['high']:.4g}]</small>"
        if difference is not None:
            what = "differs" if difference["real"] else "may be chance"
            text += f"<br>{difference['value']:+.3g}"
            if "low" in difference:
                text += f" <small>[{difference['low']:+.3g}, {difference['high']:+.3g}]</small>"
            text += f"<br>{'<b>' if difference['real'] else ''}{what}{'</b>' if difference['real'] else ''}"
        cells.append(f'<td class="n">{text}</td>')
    return cells


def _picture(png: bytes, words: str) -> str:
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{b64encode(png).decode()}">'


def _drawn(numbers: Sequence[Measured], count: int) -> bytes:
    return draw_numbers([(row.metric, row.results) for row in numbers], [letter(number) for number in range(count)])


def draw_curves(sides: Sequence[Side]) -> bytes:
    """Loss of every side over its steps, as a PNG."""
    from tasks.train.curve import smooth

    figure = new_figure(8.0, 4.0)
    axes = figure.add_subplot()
    for number, side in enumerate(sides):
        lines = [line for line in side.curve() if "loss" in line]
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        axes.plot(steps, losses, color=COLOURS[number], alpha=0.25, linewidth=1.0)
        style = ("-", "--", "-.", ":")[number % 4]
        axes.plot(steps, smooth(losses), style, color=COLOURS[number], linewidth=1.9, label=letter(number))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (thick: mean of a tenth of the run)")
    axes.grid(alpha=0.25)
    axes.legend()
    return as_png(figure)
