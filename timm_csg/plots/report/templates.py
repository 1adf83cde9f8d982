"""Filling in the parts of the page: everything is escaped, except what was filled in before."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template


class Markup(str):
    """HTML that is fit to stand in the page as it is."""

    __slots__ = ()


@functools.cache
def asset(name: str) -> str:
    """A file of this package: ``page.html``, ``parts.html``, ``report.css``, ``report.js``, ``early.js``."""
    return (files(__package__) / name).read_text(encoding="utf-8")


@functools.cache
def _parts() -> dict[str, Template]:
    pieces = re.split(r"^\{# ([\w-]+) #\}\n", asset("parts.html"), flags=re.MULTILINE)
    return {name: Template(text.strip()) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def render(part: str, /, **values: object) -> Markup:
    """A part of ``parts.html`` with its values; those that are not ``Markup`` are escaped.

    Example:
        >>> render("note", text="<b>")
        '<p class="note">&lt;b&gt;</p>'
    """
    return Markup(_parts()[part].substitute({name: clean(value) for name, value in values.items()}))


def clean(value: object) -> Markup:
    """Fit to stand in the page.

    Example:
        >>> clean("a & b"), clean(Markup("<b>"))
        ('a &amp; b', '<b>')
    """
    return value if isinstance(value, Markup) else Markup(escape(str(value), quote=True))


def join(pieces: Iterable[Markup], between: str = "") -> Markup:
    """Several pieces as one; ``between`` is markup."""
    return Markup(between.join(pieces))


def fill(text: str, /, **values: object) -> Markup:
    """A sentence of ours, itself markup, with ``{names}`` for escaped values.

    Example:
        >>> fill("<b>{name}</b>", name="<i>")
        '<b>&lt;i&gt;</b>'
    """
    return Markup(text.format(**{name: clean(value) for name, value in values.items()}))


def element(tag: str, content: object, attributes: str = "") -> Markup:
    """One element; ``attributes`` is markup.

    Example:
        >>> element("td", "<", 'class="num"')
        '<td class="num">&lt;</td>'
    """
    return Markup(f"<{tag}{' ' if attributes else ''}{attributes}>{clean(content)}</{tag}>")
