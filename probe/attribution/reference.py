"""The reference page of predictors and interventions, made from their registries: `docs/interventions.md`."""

from __future__ import annotations

from probe.attribution.interventions import INTERVENTIONS
from probe.attribution.predictors import PREDICTORS

_PAGE = """# Predictors and interventions

This page is made from the registries of the code (`probe.attribution`). What is done with them, and what the numbers
mean, is in [attribution](attribution.md).

## Predictors

What the league table ranks against the exact contributions of the tokens. A new one is one function with a decorator
(`probe/attribution/predictors/registry.py`).

{predictors}

## Interventions

What `entropy-probe whatif --interventions` takes, alone or composed with `+`, with options and published defaults.
A new one is one function with a decorator too (`probe/attribution/interventions/registry.py`).

{interventions}
"""


def reference_page() -> str:
    """The page as Markdown."""
    predictors = [
        f"| `{one.name}` | {_cell(one.claim)} | {_cell(one.source)} |" for one in PREDICTORS.values()
    ]
    interventions = [
        f"| `{one.name}` | {_options(one.options)} | {_cell(one.claim)} | {_cell(one.source)} |"
        for one in INTERVENTIONS.values()
    ]
    return _PAGE.format(
        predictors="\n".join(["| name | claim and score | source |", "|---|---|---|", *predictors]),
        interventions="\n".join(
            ["| name | options | what it does | source |", "|---|---|---|---|", *interventions]
        ),
    )


def _options(options: dict[str, object]) -> str:
    """Options with their defaults."""
    return ", ".join(f"`{key}={value}`" for key, value in options.items())


def _cell(words: str) -> str:
    """Words for a cell: a bar would end it."""
    return words.replace("|", r"\|")
