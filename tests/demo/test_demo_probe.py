"""The probe on the demo policy: prediction and measurement agree, from Python as documented and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.readme_demo import BLOCK, layout, shown
from probe import OfflineEntropyProbe
from probe.cli.main import main
from probe.config.files import read_config_file

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def demo(demo_cache, tmp_path, monkeypatch):
    """An empty folder to work in, with the demo policy in the cache and the repository's configurations."""
    monkeypatch.setenv("ENTROPY_PROBE_CACHE", str(demo_cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    return tmp_path


def quickstart(dtype="float32", **rework):
    config = read_config_file("quickstart")
    config["checkpoint"]["dtype"] = dtype
    quiet = {"detailed_logging": {"enabled": False}, "trainer": {"logger": False}}
    return OfflineEntropyProbe({**config, **quiet, "probe_rework": rework}).run_mixed_probe()


def test_prediction_and_measurement_agree(demo):
    """The effect stands far above its standard error, and the prediction is within its interval."""
    results = quickstart()
    assert results["deltaH_true"] < -6 * results["deltaH_true_se"]
    assert abs(results["residual"]) < 3 * results["deltaH_true_se"]
    assert results["diagnostics"]["ESS"] > 0.9 * results["B_E"]
    assert results["diagnostics"]["bias_flags"] == []
    assert abs(results["diagnostics"]["on_policy_z"]) < 4
    assert results["settings"]["checkpoint"] == {}


def test_the_report_in_the_readme_is_laid_out_like_that_of_the_demo(demo, capsys):
    """Its numbers are those of one machine; `benchmarks/readme_demo.py` renews them."""
    assert main(["demo"]) == 0
    (block,) = BLOCK.findall((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    printed, progress = capsys.readouterr()
    assert layout(block)[0].startswith("nats per token | nats per response")
    assert layout(block) == layout(shown(printed))
    assert "demo policy" not in printed + progress  # which was reused


def test_the_difference_on_the_same_responses_shrinks_like_eta_squared(demo):
    small, large = (
        quickstart("float64", weighting="matched", learning_rate=7e-4 * k) for k in (1 / 16, 1 / 4)
    )
    # per token: per response the cubic term is of the same size at these steps
    assert 13 < large["residual_tok"] / small["residual_tok"] < 20


def test_documented_python_calls(demo):
    """Configuration file, dictionary with sections switched, batch size study, diagnostics: as a script would."""
    probe = OfflineEntropyProbe.from_config_file("configs/test_deltaH1.yaml")
    results = probe.run_mixed_probe()
    assert f"{results['deltaH1']:.8f}"
    assert f"{abs(results['deltaH1'] - results['deltaH_true']):.8f}"
    assert results["bars_dot"] * results["learning_rate"] == pytest.approx(results["deltaH1"])

    config = yaml.safe_load(Path("configs/test_deltaH1.yaml").read_text())
    config["detailed_logging"] = {
        "enabled": True,
        "level": "debug",
        "log_sequences": True,
        "log_tokens": True,
        "log_raw_tensors": True,
    }
    OfflineEntropyProbe(config).run_mixed_probe("demo")
    assert list(Path("lightning_logs").glob("20*/*.json.gz"))

    config = yaml.safe_load(Path("configs/detailed_logging_example.yaml").read_text())
    config["probe_rework"]["compute_delta_h1"] = False
    config["importance"]["enabled"] = True
    results = OfflineEntropyProbe(config).run_mixed_probe()
    assert "deltaH_true" in results
    assert "deltaH1" not in results

    config["probe_rework"]["compute_delta_h1"] = True
    for B_E in (16, 32):
        config["batch_config"]["B_E"] = B_E
        results = OfflineEntropyProbe(config).run_mixed_probe()
        assert results["B_E"] == B_E
        assert 0 < results["diagnostics"]["ESS"] <= B_E
        assert results["diagnostics"]["w_max"] >= 1 >= results["diagnostics"]["w_min"]
        assert results["batch_statistics"]["avg_generation_length"] > 1
        assert 0 <= results["batch_statistics"]["avg_reward"] <= 1


def test_a_wheel_installed_elsewhere_runs_the_demo(demo, tmp_path):
    source = tmp_path / "source"  # building writes beside the sources
    skipped = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(REPOSITORY, source, symlinks=True, ignore=skipped)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("entropy_probe-*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    assert (target / "probe" / "configs" / "quickstart.yaml").is_file()
    assert not (target / "callbacks").exists()  # users' repositories have a `callbacks` of their own
    environment = {**os.environ, "PYTHONPATH": str(target)}
    work = tmp_path / "work"
    work.mkdir()
    where = [sys.executable, "-c", "import probe; print(probe.__file__)"]
    found = subprocess.run(where, cwd=work, env=environment, capture_output=True, text=True, check=True)
    assert str(target) in found.stdout
    done = subprocess.run(
        [sys.executable, str(target / "bin" / "entropy-probe"), "demo"],
        cwd=work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "deltaH_true" in done.stdout
    assert "tensorboard --logdir lightning_logs" in done.stdout
    version = subprocess.run(
        [sys.executable, str(target / "bin" / "entropy-probe"), "--version"],
        cwd=work, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert version.stdout.startswith("entropy-probe ")
    assert len(list((work / "lightning_logs").glob("20*/*"))) == 3
