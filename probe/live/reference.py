"""The reference page of what a training logs, made from the tables of names: `docs/training_names.md`."""

from __future__ import annotations

from probe.live.names import LIVE_KEYS, LIVE_NUMBERS, LIVE_TEXTS, MAIN
from probe.report.tags import PREFIX
from probe.results.reference import cell_text

_PAGE = """# Every name of a training

This page is made from the tables of the code (`probe.live.names`). How to read the numbers is in
[training](training.md), formulas are in [definitions](definitions.md).

## Entropies and their changes

In nats per response under these names, and in nats per token with `_tok` behind them; `_se` is the standard error,
`_ci95_low` and `_ci95_high` are the ends of the 95 % interval, `_df` are the degrees of freedom of the error, where
there is one. Logs have the numbers to look at first under the prefix `entropy_probe/`, errors and ends of the sums and
of the two curves under `entropy_probe_curves/` (their interval is 1.96 standard errors on either side), errors of
`H_orig_tok`, `deltaH1_tok` and `deltaH_true_tok` where a run has them (`entropy_probe_ground_truth/`,
`entropy_probe_prediction/`), and all others under `entropy_probe_details/`. Under the first are

{main}

{changes}

## Further numbers

{numbers}

## Texts and lists

In the history alone; they are not logged.

{texts}
"""


def reference_page() -> str:
    """The page as Markdown."""
    main = "\n".join(f"- `{PREFIX}/{name}`" for name in MAIN)
    return _PAGE.format(
        main=main, changes=_table(LIVE_KEYS), numbers=_table(LIVE_NUMBERS), texts=_table(LIVE_TEXTS)
    )


def _table(names: dict[str, str]) -> str:
    """Names with what they are."""
    rows = [f"| `{name}` | {cell_text(words)} |" for name, words in names.items()]
    return "\n".join(["| name | meaning |", "|---|---|", *rows])
