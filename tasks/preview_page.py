"""Rows as training will see them, as a page for a browser.

One decision: the page is one file that asks for nothing: style inside, no script, no address, and a policy that forbids
both. Rows are strangers' text, so every piece of them passes through `visible`, which escapes it and shows what cannot
be seen.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from tasks.preview import ADDED, CONTROL, NO_TOKEN, TYPED, SeenRow, TokenPiece

FIRST_LINE = '<!doctype html><meta name="generator" content="llamatuner preview">'
MOST_PIECES = 20_000  # of one row: a megabyte of page
MOST_CHARACTERS = 4_000  # of text without tokens, which may be a whole book
CLASSES = {CONTROL: "c", TYPED: "y", ADDED: "a", NO_TOKEN: "x"}
JOINERS = "\u200c\u200d"  # format characters without which emoji and Persian fall apart
SIGNS = {  # signs are not copied along with the text
    " ": "<i> </i>",
    "\n": '<u class="w">↵</u>\n',
    "\t": '<u class="w">⇥</u>\t',
}
SHAPELESS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp")  # Unicode categories

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c1c1e;--soft:#62626a;--edge:#d5d5dc;--card:#fff;
--t0:#ededf2;--t1:#dedee6;--g0:#c4efcb;--g1:#9fdfac;--green:#0b4f1d;--bound:#0003;--dot:#0007;
--control:#7a1fa2;--red:#b3141d;--redback:#fdecec;--amber:#8a5200}
@media(prefers-color-scheme:dark){:root{--page:#131316;--ink:#ececf0;--soft:#a2a2ad;--edge:#3b3b44;--card:#1a1a1f;
--t0:#26262d;--t1:#34343d;--g0:#123f20;--g1:#1d5c30;--green:#cdf7d6;--bound:#fff3;--dot:#fff8;
--control:#dd9cf7;--red:#ff8a8a;--redback:#3a1a1c;--amber:#f0b764}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:62rem;background:var(--page);color:var(--ink);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0}
p{margin:.4rem 0}dl{display:grid;grid-template-columns:auto 1fr;gap:.15rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}dd{margin:0}ul{margin:0;padding:0;list-style:none}
article{border:1px solid var(--edge);border-radius:.5rem;background:var(--card);margin:.9rem 0;padding:.7rem .8rem}
article.refused{border-color:var(--red);background:var(--redback)}
.file,.count{color:var(--soft);font-size:.85rem}.red{color:var(--red)}.amber{color:var(--amber)}a{color:inherit}
pre{margin:.6rem 0 0;font:.88rem/1.75 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
pre b,.key b{font-weight:inherit;background:var(--t0);box-shadow:inset 1px 0 var(--bound);padding:.12em 0}
pre b:nth-of-type(even){background:var(--t1)}
pre b.t,.key b.t{background:var(--g0);color:var(--green)}pre b.t:nth-of-type(even){background:var(--g1)}
b.c,b.a{color:var(--control)!important;font-weight:600!important}b.a{font-style:italic;padding:.12em .3em!important}
b.y{color:var(--red)!important;text-decoration:underline wavy;text-underline-offset:.2em}
.x{color:var(--soft);text-decoration:line-through}b.m{padding:.12em .18em!important}
pre i{background:radial-gradient(circle,var(--dot) .07em,transparent .1em) center no-repeat}
u{text-decoration:none;color:var(--soft);font-style:normal}u.w{user-select:none;-webkit-user-select:none}
u.h{font-size:.72em;border:1px solid;border-radius:.3em;padding:0 .25em}
.key{font-size:.85rem;display:flex;flex-wrap:wrap;gap:.3rem 1.1rem}
.key b,.key .x,.key u{font-family:ui-monospace,monospace}
.key b{padding:.12em .35em!important}
@media(max-width:30rem){body{padding:.6rem}article{padding:.55rem}pre{font-size:.82rem}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
KEY = (
    "<b>not trained</b>",
    '<b class="t">trained</b>',
    '<b class="c">control token</b>',
    '<b class="y">typed: text that looks like one</b>',
    '<b class="a">added</b> not in the text',
    '<b class="m"></b> more of the character before',
    '<span class="x">no token</span> cut off, or unknown to the tokenizer',
    '<span><u class="w">↵</u> line end</span>',
    '<span><u class="h">U+200B</u> unseen character</span>',
)


class StageRows(NamedTuple):
    """What is shown of one stage."""

    name: str
    rows: Sequence[SeenRow]
    more: bool
    """Whether its data sets have rows that are not shown."""


def preview_page(title: str, stages: Sequence[StageRows]) -> str:
    """The page.

    Args:
        title: of the page: the recipe's name.
        stages: rows with their `pieces`, by stage.
    """
    head = (
        f'{FIRST_LINE}<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}: rows as training sees them</title><style>{STYLE}</style></head>"
    )
    key = "".join(f"<span>{sample}</span>" for sample in KEY)
    lines = [
        head,
        f"<body><h1>{visible(title)}</h1>",
        "<p>Rows as training sees them, cut into tokens. Point at a token for its id.</p>",
        f'<div class="key">{key}</div>',
    ]
    for number, stage in enumerate(stages):
        lines.append(_summary(stage, number))
    for number, stage in enumerate(stages):
        lines.append(f"<h2>{visible(stage.name)}</h2>")
        lines += [_card(row, f"r{number}-{place}") for place, row in enumerate(stage.rows)]
    return "\n".join([*lines, "</body></html>", ""])


def _summary(stage: StageRows, number: int) -> str:
    """Counts of a stage and links to its refused rows."""
    used = [row for row in stage.rows if row.refused is None]
    tokens, trained = sum(len(row.input_ids or ()) for row in used), sum(row.trained_tokens for row in used)
    share = f" ({100 * trained / tokens:.0f} %)" if tokens else ""
    more = "; there are more, see <code>--rows</code>" if stage.more else ""
    facts = [
        ("shown", f"{_count(len(stage.rows), 'text')}{more}"),
        ("used", f"{_count(len(used), 'text')}: {_count(tokens, 'token')}, {trained:,} trained{share}"),
    ]
    refused: dict[tuple[str, str], list[str]] = {}
    for place, row in enumerate(stage.rows):
        if row.refused and row.stands_for_row:
            link = f'<a href="#r{number}-{place}">{visible(row.place)}</a>'
            refused.setdefault((row.step, row.refused.reason), []).append(link)
    for (step, reason), links in refused.items():
        shown = ", ".join(links[:20]) + (", …" if len(links) > 20 else "")
        what = f"{_count(len(links), 'row')} by {visible(step)}: {visible(reason)} ({shown})"
        facts.append(("refused", f'<span class="red">{what}</span>'))
    lost = Counter(name for row in used for name in row.lost)
    if lost:
        what = ", ".join(f"{visible(name)} of {_count(count, 'text')}" for name, count in lost.items())
        facts.append(("the template drops", f'<span class="amber">{what}</span>'))
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts)
    return f"<h2>{visible(stage.name)}: summary</h2><dl>{listed}</dl>"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _card(row: SeenRow, anchor: str) -> str:
    """One text."""
    part = f", {visible(row.part)}" if row.part else ""
    lines = [f"<h3>{visible(row.place)}{part}</h3>", f'<div class="file">{visible(row.file)}</div>']
    if row.refused:
        reason = f"refused by {visible(row.step)}: {visible(row.refused.reason)}: {visible(row.refused.detail)}"
        lines.append(f'<p class="red">{reason}</p>')
        if row.text is not None:
            lines.append(f"<pre>{_clipped(row.text)}</pre>")
    else:
        counts = f"{_count(len(row.input_ids or ()), 'token')}, {row.trained_tokens:,} trained"
        lines.append(f'<div class="count">{counts}</div>')
        if row.lost:
            names = ", ".join(visible(name) for name in row.lost)
            lines.append(f'<div class="amber">the template drops: {names}</div>')
        lines.append(f"<pre>{_tokens(row.pieces)}</pre>")
    kind = ' class="refused"' if row.refused else ""
    return f'<article id="{anchor}"{kind}>{"".join(lines)}</article>'


def _tokens(pieces: Sequence[TokenPiece]) -> str:
    shown = "".join(_piece(piece) for piece in pieces[:MOST_PIECES])
    rest = len(pieces) - MOST_PIECES
    return shown + (f'\n<u class="h">{_count(rest, "token")} more not shown</u>' if rest > 0 else "")


def _piece(piece: TokenPiece) -> str:
    if piece.token is None:
        return f'<span class="x" title="no token">{_clipped(piece.text)}</span>'
    names = ["t"] if piece.trained else []
    names += [CLASSES[piece.kind]] if piece.kind in CLASSES else []
    text = piece.name if piece.kind == ADDED else piece.text
    names += [] if text else ["m"]
    kind = f' class="{" ".join(names)}"' if names else ""
    return f'<b{kind} title="{piece.token}">{visible(text)}</b>'


def _clipped(text: str) -> str:
    rest = len(text) - MOST_CHARACTERS
    return visible(text[:MOST_CHARACTERS]) + (
        f' <u class="h">{_count(rest, "character")} more not shown</u>' if rest > 0 else ""
    )


def visible(text: str) -> str:
    """Text as HTML that shows every character: spaces as dots, line ends as ↵, what has no shape by its number.

    >>> visible("<b>")
    '&lt;b&gt;'
    """
    return text.translate(_SIGNS)


class _Signs(dict[int, str]):
    """Code point → HTML, found once for each character met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character in SIGNS:
            found = SIGNS[character]
        elif unicodedata.category(character) in SHAPELESS and character not in JOINERS:
            found = f'<u class="h">U+{code:04X}</u>'
        else:
            found = escape(character)
        self[code] = found
        return found


_SIGNS = _Signs()
