"""A runner and a module whose results are known functions of the learning rate and the batch sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from probe.callbacks import ProbeCallback
from probe.config.checkpoint import CheckpointConfig
from probe.config.schema import ProbeConfig
from probe.distributed.ranks import ALONE
from probe.results.result import ProbeResult
from probe.sweep.grid import Point
from probe.sweep.table import build_table
from tests.support.synthetic_run import as_result

OWN_RATE = 1e-3


class FakeModule:
    """What a sweep uses of `EntropyProbe`; every instance counts as one loading of a policy."""

    def __init__(self, config: ProbeConfig, seed: int = 42, given: Collection[str] = ()) -> None:
        self.config = self.configured = config
        self.seed, self.given = seed, given

    def reconfigure(self, config: ProbeConfig, seed: int, given: Collection[str] = ()) -> None:
        self.config = self.configured = config
        self.seed = seed


class FakeRunner:
    """What a sweep uses of `ProbeRunner`.

    Attributes:
        callbacks: what each run was asked to call.
        runs: the configurations and seeds of the runs made.
        rates: the learning rates measured after them.
        before: called with the module and the learning rate before a result is given; may raise.
    """

    def __init__(self, noise: float = 1.0, own_rate: Callable[[str], float] = lambda path: OWN_RATE) -> None:
        self.noise, self.own_rate = noise, own_rate
        self.precision, self.errors = "32-true", []
        self.ranks, self.crew, self.fabric = ALONE, None, SimpleNamespace(is_global_zero=True)
        self.callbacks: list[Sequence[ProbeCallback]] = []
        self.runs: list[tuple[ProbeConfig, int]] = []
        self.rates: list[float] = []
        self.before: Callable[[FakeModule, float], None] = lambda module, eta: None

    def launch(self) -> None:
        """There is one process."""

    def run(self, module: FakeModule, callbacks: Sequence[ProbeCallback]) -> ProbeResult:
        self.callbacks.append(callbacks)
        eta = self.own_rate(module.config.checkpoint.checkpoint_path or "")
        self.runs.append((module.config, module.seed))
        self.before(module, eta)
        return self._result(module, eta)

    def measure_at(self, module: FakeModule, learning_rate: float) -> ProbeResult:
        self.rates.append(learning_rate)
        self.before(module, learning_rate)
        return self._result(module, learning_rate)

    def _result(self, module: FakeModule, eta: float) -> ProbeResult:
        path = Path(module.config.checkpoint.checkpoint_path or "")
        step = int(path.name.rsplit("-", 1)[-1]) if "-" in path.name else None
        values = fake_values(module.config, module.seed, eta, step or 0, self.noise)
        values |= {"training_step": step, "checkpoint_path": str(path)}
        return as_result(values, path.name)


def fake_values(
    config: ProbeConfig, seed: int, eta: float, step: int = 0, noise: float = 1.0
) -> dict[str, Any]:
    """A result mapping: first order -4 eta, second 60 eta^2, third 900 eta^3 nats per token, 20 tokens."""
    batch = config.batch_config
    rng = np.random.default_rng([seed, batch.B_E, batch.B_U, step])
    rough = np.random.default_rng([seed, batch.B_E, int(eta * 1e9)])
    a, b = (noise * rng.standard_normal(2) / math.sqrt(batch.B_E)).tolist()
    update = noise * rng.standard_normal() / math.sqrt(batch.B_U)
    slope = -4.0 * math.exp(-step / 100) * (1 + update)
    values: dict[str, Any] = {
        "learning_rate": eta, "B_E": batch.B_E, "B_U": batch.B_U, "G": batch.G,
        "verdict": "trustworthy", "verdict_reasons": ["The interval is narrow.", "All is well."],
    }  # fmt: skip
    for suffix, scale in (("_tok", 1.0), ("", 20.0)):
        floor = 2e-5 * scale
        first = slope * (1 + 3 * a) * eta * scale
        higher = (60 * (1 + b) * eta**2 + 900 * eta**3) * scale
        true = slope * (1 + 3 * a + b) * eta * scale + higher + 0.2 * floor * rough.standard_normal()
        se = noise * abs(slope) * 3 * eta * scale / math.sqrt(batch.B_E)
        residual = -higher + 0.2 * floor * rough.standard_normal()
        residual_se = noise * abs(higher) / math.sqrt(batch.B_E) + 0.2 * floor
        changes = {
            "deltaH1": (first, se), "deltaH_true": (true, 1.1 * se + 0.2 * floor), "residual": (residual, residual_se),
        }  # fmt: skip
        for name, (value, error) in changes.items():
            hidden = name == "deltaH_true" and abs(value) < floor
            values[f"{name}{suffix}"] = None if hidden else value
            values[f"{name}{suffix}_se"] = None if hidden else error
            values[f"{name}{suffix}_df"] = None if hidden else 0.8 * batch.B_E
            values[f"{name}{suffix}_ci95"] = None if hidden else [value - 1.96 * error, value + 1.96 * error]
        values[f"deltaH1{suffix}_sd_U"] = 2 * abs(first) / math.sqrt(batch.B_U * batch.G)
        values[f"H_orig{suffix}"] = scale * (0.9 * math.exp(-step / 100) + 0.01 * a)
        values[f"H_orig{suffix}_se"] = noise * scale * 0.2 / math.sqrt(batch.B_E)
        values[f"eta_10{suffix}"] = 0.1 * abs(slope) / 60
    values["diagnostics"] = {
        "ESS": batch.B_E * 0.9, "w_max": 1.2, "pareto_k": None, "pareto_k_good": True, "noise_floor": 4e-4,
        "noise_floor_tok": 2e-5, "bias_flags": ["a", "b"], "derivative_mode": "jvp", "nested": {"left": "out"},
    }  # fmt: skip
    values["batch_statistics"] = {
        "avg_reward": 0.5,
        "avg_generation_length": 20.0,
        "E": {"length": {"mean": 20}},
    }
    values["estimates"] = [{"quantity": "deltaH1", "value": 1.0}]
    return values


def fake_config(**batch: Any) -> ProbeConfig:
    """A configuration with a checkpoint's name."""
    config = ProbeConfig(checkpoint=CheckpointConfig(checkpoint_path="/runs/checkpoint-60"))
    return replace(config, batch_config=replace(config.batch_config, **batch))


def record(
    eta: float = 1.0, seed: int = 1, B_E: int = 256, B_U: int = 16, G: int = 8, step: int = 60,
    noise: float = 1.0, path: str | None = None, name: str | None = None, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """One finished point."""
    point = Point(path or f"/runs/checkpoint-{step}", seed, B_U, G, B_E, None, eta)
    values = fake_values(fake_config(B_E=B_E, B_U=B_U, G=G), seed, eta * OWN_RATE, step, noise)
    return {
        "id": point.id,
        "point": asdict(point),
        "G_E": 1,
        "status": "ok",
        "error": None,
        "seconds": 1.0,
        "finished_at": "2025-01-15T14:30:25",
        "checkpoint_name": name or f"checkpoint-{step}",
        "own_learning_rate": OWN_RATE,
        "values": values | {"training_step": step} | changes,
    }


def failed(eta: float = 1.0) -> dict[str, Any]:
    """One that failed."""
    return {
        **record(eta, seed=99),
        "status": "failed",
        "error": "no",
        "values": None,
        "checkpoint_name": None,
    }


def table_of(*others: dict[str, Any], **axes: Sequence[Any]) -> pd.DataFrame:
    """The table of a grid, e.g. `table_of(eta=[1, 2], seed=[1, 2])`."""
    rows = [record(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return build_table([*rows, *others])
