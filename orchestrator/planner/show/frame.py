"""The frame of a page that opens offline: its document, sections, and numbers with a formula a click away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from orchestrator.planner.show import charts

SCRIPT = """
const root = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)');
document.getElementById('theme').onclick = () => {
  const now = root.dataset.theme || (dark.matches ? 'dark' : 'light');
  root.dataset.theme = now === 'dark' ? 'light' : 'dark';
};
document.getElementById('all').onclick = event => {
  const open = event.target.dataset.open !== 'yes';
  document.querySelectorAll('details').forEach(d => { d.open = open; });
  event.target.dataset.open = open ? 'yes' : 'no';
  event.target.textContent = open ? 'hide formulas' : 'all formulas';
};
"""


def html_document(title: str, heading: str, body: str) -> str:
    css = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body><main>"
        f'<header><h1>{heading}</h1><span class="buttons"><button id="all">all formulas</button> '
        '<button id="theme">theme</button></span></header>'
        f"{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, body: str, soft: str = "") -> str:
    note = f'<p class="soft">{escape(soft)}</p>' if soft else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def both(draw: Callable[[float], str]) -> str:
    """A drawing for a wide screen, and one for a phone."""
    return f'<div class="wide">{draw(charts.WIDE)}</div><div class="narrow">{draw(charts.NARROW)}</div>'


def number(value: str, name: str, formula: str) -> str:
    return (
        f'<details><summary><span class="value">{escape(value)}</span><span class="soft name">{escape(name)}</span></summary>'
        f'<div class="formula">{escape(formula)}</div></details>'
    )


def formula_list(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """(css colour, name, value, formula) as a list, each with its formula a click away."""
    items = [
        f'<li><details><summary><span class="key f-{css}"></span><span class="name">{escape(name)}</span>'
        f'<span class="num">{escape(value)}</span></summary><div class="formula">{escape(formula)}</div></details></li>'
        for css, name, value, formula in rows
    ]
    return f'<ul class="parts">{"".join(items)}</ul>'
