"""How large a batch resolves a change: exact for Gaussian estimates, and what the plan promises in distribution."""

from __future__ import annotations

import math

import pytest
import torch

from probe.estimators.power import (
    FAINT,
    PROMISED,
    REACH,
    TAIL,
    Pilot,
    assurance,
    needed_size,
    needed_updates,
    resolvable,
    size_for,
)
from probe.estimators.student import student_quantile
from tests.support.tabular import draw, tabular

SEED = 5


def simulated(pilot: Pilot, k: float, multiple: float | None, draws: int, g: torch.Generator) -> float:
    """The share of successes, drawn step by step as the module says it."""
    freedom = max(pilot.df * k, 1.0)
    chi = torch.distributions.Chi2
    torch.manual_seed(int(torch.randint(2**31, (), generator=g)))
    u = pilot.se / (chi(pilot.df).sample((draws,)) / pilot.df).sqrt()
    change = pilot.value + u * torch.randn(draws)
    value = change + u / math.sqrt(k) * torch.randn(draws)
    error = u / math.sqrt(k) * (chi(freedom).sample((draws,)) / freedom).sqrt()
    m = student_quantile(freedom) if multiple is None else multiple
    return float((value.abs() >= m * error).double().mean())


@pytest.mark.parametrize("multiple", [None, 4.0])
@pytest.mark.parametrize(
    ("z", "df", "k"), [(0.0, 8.0, 30.0), (1.5, 3.0, 4.0), (2.5, 63.0, 1.0), (-4.0, 20.0, 0.5)]
)
def test_assurance_is_that_of_a_simulation(z, df, k, multiple):
    """In distribution: within four standard errors of 200,000 draws."""
    draws, pilot = 200_000, Pilot(0.02 * z, 0.02, df, 64)
    expected = assurance(pilot, 64 * k, multiple)
    found = simulated(pilot, k, multiple, draws, torch.Generator().manual_seed(SEED))
    assert abs(found - expected) <= 4 * math.sqrt(0.25 / draws)


def test_a_known_change_gives_the_textbook_size():
    """Many degrees of freedom and a change that is known: (1.96 + 0.84)^2 times the squared ratio."""
    pilot = Pilot(1.0, 1.0, 1e7, 100)
    assert size_for(pilot, 2.0) == pytest.approx(100 * (1.959964 + 0.841621) ** 2 / 4, rel=1e-3)
    assert size_for(pilot, -0.5, multiple=4.0) == pytest.approx(100 * (4 + 0.841621) ** 2 * 4, rel=1e-3)
    assert resolvable(pilot, 400) == pytest.approx((1.959964 + 0.841621) / 2, rel=1e-3)
    assert resolvable(pilot, size_for(pilot, 0.3)) == pytest.approx(0.3, rel=1e-3)


def test_a_size_has_the_power_it_was_made_for():
    for z, df, power in ((0.6, 20, 0.8), (2.2, 5, 0.8), (6.0, 63, 0.9)):
        pilot = Pilot(z, 1.0, df, 64)
        assert assurance(pilot, needed_size(pilot, power).recommended) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("df", [2.0, 10.0, 63.0])
def test_the_range_has_no_upper_end_where_the_interval_contains_zero(df):
    t = student_quantile(df)
    for factor, bounded in ((0.98, False), (1.02, True)):
        pilot = Pilot(factor * t, 1.0, df, 64)
        found = needed_size(pilot)
        assert pilot.resolved is bounded
        assert (found.high is not None) is bounded
        assert found.low < found.recommended < (found.high or math.inf)


def test_uncertain_errors_ask_for_more():
    """Both what is not known of the change and of its error enter."""
    known, unknown = (needed_size(Pilot(3.0, 1.0, df, 64)) for df in (60, 4))
    assert unknown.recommended > known.recommended > size_for(Pilot(3.0, 1.0, 60, 64), 3.0)
    assert unknown.high is None or unknown.high > known.high


def test_a_pilot_that_says_next_to_nothing_recommends_nothing():
    """Its value is faint, or the size out of reach; the lower end is known all the same."""
    for value, power, multiple in ((0.99 * FAINT, 0.8, None), (0.6, 0.95, None), (FAINT, 0.9, 4.0)):
        found = needed_size(Pilot(value, 1.0, 30, 64), power, multiple)
        assert found.recommended is None
        assert found.high is None
        assert found.low > 64
    assert needed_size(Pilot(FAINT, 1.0, 30, 64), 0.8).recommended < REACH * 64


def test_units_do_not_matter():
    one, other = needed_size(Pilot(2.5, 1.0, 20, 64)), needed_size(Pilot(-2.5e-6, 1e-6, 20, 64))
    assert (one.recommended, one.low, one.high) == pytest.approx((other.recommended, other.low, other.high))


def test_spread_over_updates():
    """A change and a spread that are known: the plain ratio; with either uncertain, more; None for one prompt."""
    sharp = Pilot(-1.0, 1e-6, 1e7, 64)
    found = needed_updates(sharp, 0.5, 100_000, 0.5)
    assert found.recommended == pytest.approx(100_000, rel=0.01)
    few = needed_updates(sharp, 0.5, 8, 0.5)
    assert few.low < 8 < few.recommended < few.high
    assert needed_updates(Pilot(-1.0, 0.4, 30, 64), 0.5, 8, 0.5).recommended > few.recommended
    assert needed_updates(Pilot(-0.1, 0.4, 30, 64), 0.5, 8, 0.5).high is None
    assert needed_updates(sharp, 0.5, 1, 0.5) is None


@pytest.mark.parametrize("sd", [math.nan, math.inf, 0.0, -1.0])
def test_a_spread_that_is_not_known_recommends_nothing(sd):
    """One prompt of U leaves NaN, which is neither above nor below anything a search compares it with."""
    assert needed_updates(Pilot(-1.0, 0.4, 30, 64), sd, 8, 0.5) is None


@pytest.mark.parametrize(
    "numbers",
    [(math.nan, 1.0, 9, 64), (math.inf, 1.0, 9, 64), (1.0, math.nan, 9, 64), (1.0, math.inf, 9, 64), (1.0, 0.0, 9, 64),
     (1.0, 1.0, math.nan, 64), (1.0, 1.0, 0.5, 64), (1.0, 1.0, 9, 0)],
)  # fmt: skip
def test_a_pilot_that_says_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="expected a finite change with an error above 0"):
        Pilot(*numbers)


def test_spread_over_updates_is_a_quantile():
    """In distribution: with the recommended size the true spread is small enough in the planned share of cases."""
    pilot, sd, B_U, draws = Pilot(0.5, 0.1, 12.0, 64), 0.4, 9, 200_000
    found = needed_updates(pilot, sd, B_U, 0.5, 0.8)
    torch.manual_seed(SEED)
    change = pilot.value + pilot.se * torch.distributions.StudentT(pilot.df).sample((draws,))
    true = sd / (torch.distributions.Chi2(B_U - 1.0).sample((draws,)) / (B_U - 1)).sqrt()
    for size, probability in ((found.recommended, 0.8), (found.low, TAIL), (found.high, 1 - TAIL)):
        share = float((true * math.sqrt(B_U / size) <= 0.5 * change.abs()).double().mean())
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / draws) + 1e-4


# ---------------------------------------------------------------- the promise


def promised(resolved: int, repetitions: int) -> bool:
    """About 80 %: between 75 and 90, with three binomial standard errors."""
    slack = 3 * math.sqrt(0.8 * 0.2 / repetitions)
    return 0.75 - slack <= resolved / repetitions <= 0.9 + slack


@pytest.mark.parametrize("df", [15, 63])
@pytest.mark.parametrize("effect", [PROMISED, 1.0, 2.0, 4.0, 8.0])
def test_a_run_of_the_recommended_size_resolves_a_gaussian_change(effect, df):
    """In distribution: pilots, recommended size, fresh run, for a change of `effect` true errors of the first pilot."""
    g = torch.Generator().manual_seed(SEED)
    repetitions, resolved = 300, 0

    def drawn(k: float) -> tuple[float, float, int]:
        """Value, standard error and degrees of freedom of a batch `k` times the pilot's."""
        n = max(round(df * k), 1)
        error = float(torch.randn(n, generator=g).square().mean().sqrt()) / math.sqrt(k)
        return effect + float(torch.randn((), generator=g)) / math.sqrt(k), error, n

    for _ in range(repetitions):
        k: float | None = None
        size: float = df + 1
        while k is None:
            value, error, n = drawn(size / (df + 1))
            pilot = Pilot(value, error, n, round(size))
            k, size = needed_size(pilot).recommended, size_for(pilot, 1.0)
        later, later_error, later_n = drawn(k / (df + 1))
        resolved += abs(later) > student_quantile(later_n) * later_error
    assert promised(resolved, repetitions)


@pytest.mark.slow
def test_a_run_of_the_recommended_size_resolves_the_change_of_a_policy():
    """In distribution, the same on an enumerated policy: deltaH_true per token."""
    space, g = tabular("light"), torch.Generator().manual_seed(SEED)
    repetitions, resolved = 120, 0
    for _ in range(repetitions):
        size, pilot_size = None, 64
        while size is None:
            found = draw(space, pilot_size, g, controls=False).estimates["per_decision"].token
            pilot = Pilot(found.value, found.se, found.df, pilot_size)
            size, pilot_size = needed_size(pilot).recommended, round(size_for(pilot, 1.0))
        low, high = draw(space, round(max(size, 30)), g, controls=False).estimates["per_decision"].token.ci95
        resolved += low > 0 or high < 0
    assert promised(resolved, repetitions)
