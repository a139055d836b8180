"""Templates into pages: everything is escaped, and what is not printable is shown as its escape."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import probe
from probe.report import palette
from probe.text import printable

TEMPLATES = Path(__file__).parent / "templates"


def rendered(
    template: str, title: str, facts: Iterable[str], sections: Iterable[tuple[str, str]], **values: Any
) -> str:
    """A page of one template.

    Args:
        template: its name, without endings.
        title: of the page.
        facts: what stands below the title.
        sections: ids of its sections, with what the links to them say.
        values: what else the template shows. Every text in them is a stranger's, and is escaped.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        _environment()
        .get_template(f"{template}.html.j2")
        .render(
            title=title,
            facts=list(facts),
            sections=list(sections),
            version=probe.__version__,
            style=Markup(_palette() + _file("page.css")),
            script=Markup(script),
            # only this script runs, whatever a text has smuggled in
            script_hash=Markup(f"sha256-{digest}"),
            **values,
        )
    )


def plus_minus(text: str) -> Markup:
    r"""A text of numbers with their errors as a page shows it: no line breaks between the two.

    >>> plus_minus("<b> -1.2 +/- 0.3")
    Markup('&lt;b&gt; -1.2\xa0\xb1\xa00.3')
    """
    return Markup(str(escape(printable(text))).replace(" +/- ", "\u00a0\u00b1\u00a0"))


def _palette() -> str:
    """The colours that figures have too, for a light page; the style has those of a dark one."""
    colours = {
        "predicted": palette.PREDICTED,
        "measured": palette.MEASURED,
        "difference": palette.DIFFERENCE,
        "tracked": palette.TRACKED,
        "rises": palette.RISING,
        "falls": palette.FALLING,
    }
    listed = " ".join(f"--{name}: {colour};" for name, colour in colours.items())
    return f":root {{ {listed} }}\n"


@cache
def _file(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=False,
    )
    environment.filters["plus_minus"] = plus_minus
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _visible(value: Any) -> Any:
    """A text with its unprintable characters as escapes; markup of our own as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
