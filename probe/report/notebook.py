"""What a notebook, and a Python prompt, shows of results: a card, figures, and a few lines of text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from probe.digits import interval_text, with_error
from probe.report.figures import result_figures
from probe.report.words import CHANGES, answer, verdict_meaning
from probe.results.result import ProbeResult
from probe.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Figures(dict[str, "Figure"]):
    """Figures by name; a notebook shows them one below the other."""

    def _repr_html_(self) -> str:
        """Every figure as an image inside of the page."""
        return "\n".join(
            f'<p><img alt="{escape(name)}" src="data:image/png;base64,{_png(figure)}"></p>'
            for name, figure in self.items()
        )


class Results(dict[str, Any]):
    """The mapping of a run's results, see `docs/quantities.md`: a dictionary that can be looked at.

    It is equal to the plain dictionary of its items, and JSON as it is.

    >>> Results(verdict="caution", deltaH1_tok=-0.01, deltaH1_tok_se=0.001)
    Verdict: caution: the numbers can be believed, with reservations
    This update lowers the policy's entropy: predicted -0.0100 +/- 0.0010 nats per token.
    3 keys, see dict(results) and .plot()
    """

    def plot(self) -> Figures:
        """The figures of the result: prediction against measurement, and what an attribution and a comparison have."""
        return Figures(result_figures(self))

    def __repr__(self) -> str:
        return "\n".join([*result_lines(self), f"{len(self)} keys, see dict(results) and .plot()"])

    def _repr_html_(self) -> str:
        """The verdict, the answer and the changes, for a notebook."""
        return result_card(self)


class ShownResult(ProbeResult):
    """A result that a notebook can show."""

    @classmethod
    def of(cls, result: ProbeResult) -> ShownResult:
        """The same result, to be shown, with what was already worked out of it: verdict and values."""
        shown = cls.__new__(cls)
        vars(shown).update(vars(result))
        return shown

    def plot(self) -> Figures:
        """The figures of the result, see `Results.plot`."""
        return Figures(result_figures(self.values))

    def __repr__(self) -> str:
        return "\n".join([f"Result of {printable(self.checkpoint_name)}", *result_lines(self.values)])

    def _repr_html_(self) -> str:
        """The verdict, the answer and the changes, for a notebook."""
        return result_card(self.values, f"Result of {self.checkpoint_name}")


def result_lines(values: Mapping[str, Any]) -> list[str]:
    """Verdict and answer in a few lines of text."""
    word = values.get("verdict")
    verdict = f"Verdict: {word}: {verdict_meaning(word)}" if word else "No verdict"
    return [printable(line) for line in (verdict, *answer(values))]


def result_card(values: Mapping[str, Any], title: str = "") -> str:
    """A result as a piece of HTML for a notebook: no script, no style of its own, every text escaped.

    Args:
        values: of the result.
        title: what stands above it.
    """
    rows = []
    for key, label in CHANGES.items():
        for name, unit in ((f"{key}_tok", "nats per token"), (key, "nats per response")):
            if name in values:
                error, interval = values.get(f"{name}_se"), interval_text(values.get(f"{name}_ci95"))
                rows.append([key, label, with_error(values[name], error), interval, unit])
    heads = ("", "", "value +/- standard error", "95 % interval", "unit")
    lines = [*result_lines(values), *(values.get("verdict_reasons") or ())]
    return card(title, lines, heads, rows)


def card(
    title: str, lines: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
) -> str:
    """Lines and a table as a piece of HTML; every text is escaped.

    Args:
        title: above all; empty for none.
        lines: of text, the first of which stands out.
        heads: of the table.
        rows: its cells.
        caption: of the table.
    """
    parts = [f"<p><b>{_shown(title)}</b></p>"] if title else []
    parts += [
        f"<p><b>{_shown(line)}</b></p>" if k == 0 else f"<p>{_shown(line)}</p>"
        for k, line in enumerate(lines)
    ]
    return "\n".join([*parts, *([html_table(caption, heads, rows)] if rows else [])])


def html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped texts."""
    head = "".join(f"<th>{_shown(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_shown(one)}</td>' for one in row)}</tr>\n" for row in rows)
    above = f"<caption>{_shown(caption)}</caption>\n" if caption else ""
    return f"<table>\n{above}<tr>{head}</tr>\n{body}</table>"


def _shown(text: str) -> str:
    """A text of somebody else's inside of HTML."""
    return escape(printable(text))


def _png(figure: Figure) -> str:
    """A figure as a PNG file in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
