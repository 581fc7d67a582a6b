"""The density example on a few seconds' budget, and its errors of one line."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = "pip install -r requirements/examples.txt"


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _data

    return _data


@pytest.fixture
def density(monkeypatch):
    pytest.importorskip("tqdm", reason=COMMAND)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import density

    return density


@pytest.fixture
def program(data, density, monkeypatch):
    """Run the program with these arguments in this process; returns its exit status."""

    def run(*arguments: str | Path) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["density.py", *map(str, arguments)])
        try:
            data.run(density.main)
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def test_the_program_prints_its_table_and_draws(density, monkeypatch, program, tmp_path, capsys):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package, reason=COMMAND)
    monkeypatch.setattr(density, "IMPORTANCE_SAMPLES", 20_000)
    assert program("--epochs", "5", "--output", tmp_path / "made", "--data", tmp_path) == 0
    assert (tmp_path / "made" / "density.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert len(re.findall(r"log Z: learned [+-]\d+\.\d+, by importance sampling [+-]\d", printed)) == 2
    rows = dict(re.findall(r"^  (\S.*?) {2,}(-?\d.*)$", printed, re.MULTILINE))
    assert {"truth", "one Gaussian", "energy model", "noise samples", "shuffled pixels"} <= rows.keys()
    assert all(0 <= float(value) <= 1 for value in rows["shuffled pixels"].split())
    assert float(rows["energy model"].split()[0]) > float(rows["one Gaussian"].split()[0])


def test_the_program_starts_as_a_user_starts_it():
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "density.py"), "--seconds", "-1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "must be at least 0, got -1" in result.stderr


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("sklearn", "pip install scikit-learn=="),
        ("tqdm", "pip install tqdm"),
        ("matplotlib", "pip install matplotlib"),
    ],
)
def test_a_missing_package_is_one_line_with_its_install_command(
    package, command, program, monkeypatch, tmp_path, capsys
):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for other in {"sklearn", "matplotlib"} - {package}:
        pytest.importorskip(other, reason=COMMAND)
    assert program("--seconds", "0", "--output", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith(f"density.py: error: {package} is not installed: {command}")


def test_an_output_folder_that_cannot_be_is_one_line(program, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason=COMMAND)
    (tmp_path / "file").write_text("")
    assert program("--seconds", "0", "--output", tmp_path / "file" / "folder") == 1
    assert "error: cannot write to " in capsys.readouterr().err


def test_two_moons_are_learned(density, monkeypatch):
    monkeypatch.setattr(density, "IMPORTANCE_SAMPLES", 50_000)
    torch.manual_seed(0)
    found = density.toy(math.inf, 600)
    gaussian, model, true = (value for _, value, _ in found.rows)
    assert gaussian + 0.2 < model < true
    learned, sampled, error = found.log_z
    assert abs(sampled - found.log_z_grid) < 4.5 * error + 0.01  # the grid leaves out what lies beyond its edge
    assert abs(learned - sampled) < 0.2
    cell = (5 / 199) * (4 / 199)
    assert found.pictures["truth"].sum() * cell == pytest.approx(1, abs=1e-3)


def test_the_noise_of_the_digits_has_the_density_it_is_drawn_from(density):
    """log_prob against torch's own mixture; the mean of the samples against that of the mixture."""
    torch.manual_seed(0)
    label = torch.arange(600) % 3
    x = torch.randn(600, 4) * (1 + label[:, None]) + label[:, None]
    noise = density.ClassGaussians(x, label)
    parts = torch.distributions.MultivariateNormal(noise.mean, scale_tril=noise.scale)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(noise.weight), parts)
    torch.testing.assert_close(noise.log_prob(x), mixture.log_prob(x))
    samples = noise.sample((20_000,))
    error = (samples.mean(0) - mixture.mean) / (mixture.variance / 20_000).sqrt()
    assert error.abs().max() < 4.5
    assert samples.var(0) == pytest.approx(mixture.variance, rel=0.1)


def test_bits_per_pixel(density):
    """A uniform density over the levels costs log2 of their number, whatever the whitening."""
    torch.manual_seed(0)
    images = torch.randint(17, (500, 6)).float()
    whiten = density.Whitening(images)
    assert whiten.bits_per_pixel(-6 * math.log(17) - whiten.log_volume) == pytest.approx(math.log2(17))
    assert whiten.log_volume == pytest.approx(torch.linalg.slogdet(whiten.matrix.double()).logabsdet.item(), abs=1e-4)
    white = whiten(images.repeat(200, 1))
    assert white.mean(0).abs().max() < 0.02
    torch.testing.assert_close(white.T.cov(), torch.eye(6), atol=0.02, rtol=0)


def test_auroc_is_that_of_the_rank_test(density):
    stats = pytest.importorskip("scipy.stats", reason=COMMAND)
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 9, 101), rng.integers(0, 7, 57)  # with ties
    expected = stats.mannwhitneyu(inside, outside).statistic / (101 * 57)
    assert density.auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(expected)
