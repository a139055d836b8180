"""The tokens of U, shaded by what each adds to deltaH1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from probe.phases.state import ProbeState
from probe.report.drawing import drawn, showable
from probe.report.palette import FAINT, FALLING, RISING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESPONSES = 4
"""Responses on either side that a figure shows: those that lower the entropy most, and those that raise it most."""
LINE, MOST_LINES = 80, 3
"""Characters of a line, and lines of a response."""
WIDTH, ADVANCE = 9.6, 0.602
"""Of the figure, inches; and of a character of the font, as a share of the font's size."""
FONT_SIZE = 0.98 * 72 * WIDTH / ((LINE + 1) * ADVANCE)
"""With which a line fills the width, points."""
NEWLINE, SPACE = "\u21b5", "\u00b7"
"""What stands for the end of a line and, where a token is nothing but spaces, for a space."""


@dataclass(frozen=True)
class ShadedResponse:
    """A response of U.

    Attributes:
        head: what is said above it.
        tokens: texts of its tokens.
        changes: what each adds to deltaH1, nats per token of E.
    """

    head: str
    tokens: Sequence[str]
    changes: Sequence[float]


def shaded_responses(
    state: ProbeState, text_of: Callable[[int], str] | None, count: int = RESPONSES
) -> list[ShadedResponse]:
    """The responses of U that lower and raise the entropy most, token by token; none where nothing was attributed.

    Args:
        state: of a run.
        text_of: gives the text of a token id; None shows the ids.
        count: of responses on either side.
    """
    U, found = state.U, state.attribution
    if U is None or found is None:
        return []
    changes = found.contributions.by_token()[1]
    of_response = (changes * U.mask).sum(1)
    order = of_response.argsort()
    falling = [int(i) for i in order[:count] if of_response[i] < 0]
    rising = [int(i) for i in order.flip(0)[:count] if of_response[i] > 0]
    rows = []
    for i in (*falling, *rising):
        advantage = "" if U.advantages is None else f", advantage {float(U.advantages[i]):+.2f}"
        head = f"response {i}{advantage}: {float(of_response[i]):+.2g} nats per token"
        kept = U.mask[i].nonzero().squeeze(1)
        ids = U.completion_ids[i, kept].tolist()
        rows.append(ShadedResponse(head, [_text(one, text_of) for one in ids], changes[i, kept].tolist()))
    return rows


def tokens_figure(responses: Sequence[ShadedResponse]) -> Figure:
    """Texts of responses with every token shaded by what it adds: blue lowers the entropy, orange raises it.

    The darkest shade is the largest contribution among the tokens shown (of very many, the largest but one in a
    hundred); shades grow like the square root, so that smaller ones can be told from nothing.

    Args:
        responses: at least one.
    """
    sizes = torch.tensor([abs(x) for one in responses for x in one.changes], dtype=torch.float64)
    darkest = float(sizes.quantile(0.99)) if sizes.numel() else 0.0
    laid = [_lines(one) for one in responses]
    count = sum(1.6 + len(lines) for lines in laid)
    with drawn(1, 1, WIDTH, 1.0 + 0.27 * count) as (figure, axes):
        axis = axes[0][0]
        axis.set(xlim=(0, LINE + 1), ylim=(count + 0.3, -0.5))
        axis.set_axis_off()
        at = 0.0
        for one, lines in zip(responses, laid, strict=True):
            axis.text(0, at, one.head, fontsize=11, color=FAINT, va="center")
            for line in lines:
                at += 1.0
                _draw_line(axis, at, line, darkest)
            at += 1.6
        figure.suptitle("Tokens of U: blue lowers the entropy, orange raises it", fontsize=15)
    return figure


def _text(token: int, text_of: Callable[[int], str] | None) -> str:
    """A token as it is shown."""
    if text_of is None:
        return f"{token} "
    text = text_of(token).replace("\n", NEWLINE).replace("\t", " ")
    return showable(text.replace(" ", SPACE) if not text.strip() else text) or "\ufffd"


def _lines(response: ShadedResponse) -> list[list[tuple[int, str, float]]]:
    """Tokens with their column and contribution, cut into lines; what has no room is said to be left out."""
    lines: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for index, (token, change) in enumerate(zip(response.tokens, response.changes, strict=True)):
        shown = token if len(token) <= LINE // 2 else f"{token[: LINE // 2 - 3]}..."
        if column + len(shown) > LINE:
            if len(lines) == MOST_LINES:
                lines[-1].append((column, f" +{len(response.tokens) - index}", 0.0))
                break
            lines.append([])
            column = 0
        lines[-1].append((column, shown, change))
        column += len(shown)
    return lines


def _draw_line(axis: Axes, at: float, line: Sequence[tuple[int, str, float]], darkest: float) -> None:
    """One line of shaded tokens."""
    from matplotlib.patches import Rectangle

    for column, token, change in line:
        strength = min(abs(change) / darkest, 1.0) ** 0.5 if darkest > 0 else 0.0
        color = FALLING if change < 0 else RISING
        axis.add_patch(
            Rectangle((column, at - 0.47), len(token), 0.94, color=color, alpha=0.85 * strength, linewidth=0)
        )
        shade = "white" if strength > 0.75 else "black"
        axis.text(
            column,
            at,
            token,
            family="DejaVu Sans Mono",
            fontsize=FONT_SIZE,
            va="center_baseline",
            color=shade,
        )
