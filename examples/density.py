#!/usr/bin/env python
"""Energy models by noise-contrastive estimation: a picture in two dimensions, then handwritten digits.

``python examples/density.py`` fits two moons, whose true density is known, and scikit-learn's digits: held-out
log-likelihood and detection of what is no digit, beside the Gaussians that served as noise. The two trainings have as
many steps as --epochs over the digits, and half of --seconds each at most.
"""

from __future__ import annotations

import gzip
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from _data import DataError, find_file, parser, prepare, progress, require, run
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from nce_ext.density import DensityNCELoss

NOISE_RATIO = 8
BATCH = 128
LEARNING_RATE = {"two moons": 1e-2, "digits": 2e-3}
# On 1,400 digits a weaker one lets the network learn them by heart: a better held-out likelihood, a worse log Z.
WEIGHT_DECAY = {"two moons": 1e-3, "digits": 1.0}
IMPORTANCE_SAMPLES = 400_000
N_LEVELS = 17  # a pixel of a digit is 0 .. 16
SHRINKAGE = 0.1  # of a class's covariance towards that of all digits
N_TRAIN = 1400  # of 1,797 digits
EXTENT = (-2.0, 3.0, -1.75, 2.25)


class Noise(Protocol):
    """Any distribution of torch.distributions is one."""

    def sample(self, shape: tuple[int, ...]) -> Tensor: ...
    def log_prob(self, x: Tensor) -> Tensor: ...


class Energy(nn.Module):
    """log f(x) = log q(x) + net(x): what the noise is already right about need not be learned."""

    def __init__(self, noise: Noise, dim: int, width: int) -> None:
        super().__init__()
        self.noise = noise
        self.net = nn.Sequential(
            nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False)
        )
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, x: Tensor, log_q: Tensor) -> Tensor:
        return log_q + self.net(x)[:, 0]


def fit(name: str, energy: Energy, draw: Callable[[int], Tensor], seconds: float, steps: int) -> DensityNCELoss:
    """Train against fresh noise until the time or the steps are used up; returns the loss, which holds log Z."""
    noise, loss_fn = energy.noise, DensityNCELoss(NOISE_RATIO)
    optimizer = torch.optim.AdamW(
        [
            {"params": energy.parameters(), "weight_decay": WEIGHT_DECAY[name]},
            {"params": loss_fn.parameters(), "weight_decay": 0.0},
        ]
    )
    bar = progress(desc=name, unit="step")
    started = time.perf_counter()
    with bar:
        while (used := max((time.perf_counter() - started) / max(seconds, 1e-9), bar.n / steps)) < 1:
            x, x_noise = draw(BATCH), noise.sample((BATCH * NOISE_RATIO,))
            log_q, log_q_noise = noise.log_prob(x), noise.log_prob(x_noise)
            loss = loss_fn(energy(x, log_q), log_q, energy(x_noise, log_q_noise), log_q_noise)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE[name] * (1 - used)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", log_z=f"{loss_fn.log_z.item():+.3f}", refresh=False)
            bar.update()
    return loss_fn


@torch.no_grad()
def importance_log_z(energy: Energy) -> tuple[float, float]:
    """log of the mean of f / q over noise, and its standard error."""
    chunk = 10_000
    samples = [energy.noise.sample((chunk,)) for _ in range(IMPORTANCE_SAMPLES // chunk)]
    log_ratio = torch.cat([energy.net(x)[:, 0] for x in samples]).double()
    log_z = torch.logsumexp(log_ratio, 0) - math.log(len(log_ratio))
    return log_z.item(), ((log_ratio - log_z).exp().std() / math.sqrt(len(log_ratio))).item()


class Moons:
    """Two half circles of radius 1 blurred by a Gaussian: a mixture whose density is known."""

    blur = 0.1

    def __init__(self) -> None:
        angle = torch.linspace(0, math.pi, 200)
        upper = torch.stack([angle.cos(), angle.sin()], 1)
        self.centres = torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])

    def sample(self, n: int) -> Tensor:
        return self.centres[torch.randint(len(self.centres), (n,))] + self.blur * torch.randn(n, 2)

    def log_prob(self, x: Tensor) -> Tensor:
        exponent = -torch.cdist(x, self.centres).square() / (2 * self.blur**2)
        return exponent.logsumexp(1) - math.log(len(self.centres) * 2 * math.pi * self.blur**2)


@dataclass
class Toy:
    """Rows of the table, and the densities on a grid for the picture."""

    rows: list[tuple[str, float, str]]
    log_z: tuple[float, float, float]
    log_z_grid: float
    pictures: dict[str, Tensor]


def toy(seconds: float, steps: int) -> Toy:
    moons = Moons()
    x = moons.sample(10_000)
    noise = MultivariateNormal(x.mean(0), 1.2 * x.T.cov())
    energy = Energy(noise, 2, 64)
    loss_fn = fit("two moons", energy, lambda n: x[torch.randint(len(x), (n,))], seconds, steps)

    n = 200
    columns, rows = torch.linspace(*EXTENT[:2], n), torch.linspace(*EXTENT[2:], n)
    grid = torch.stack([columns.repeat(n), rows.repeat_interleave(n)], 1)
    cell = math.log((EXTENT[1] - EXTENT[0]) * (EXTENT[3] - EXTENT[2]) / (n - 1) ** 2)
    held_out = moons.sample(20_000)
    with torch.no_grad():
        log_f, log_q = energy(grid, noise.log_prob(grid)), noise.log_prob(held_out)
        learned = (energy(held_out, log_q) - loss_fn.log_z).mean().item()
        density = (log_f - loss_fn.log_z).exp()
    pictures = {"noise": noise.log_prob(grid).exp(), "energy model": density, "truth": moons.log_prob(grid).exp()}
    return Toy(
        [
            ("Gaussian, the noise", log_q.mean().item(), ""),
            ("energy model", learned, ""),
            ("truth", moons.log_prob(held_out).mean().item(), ""),
        ],
        (loss_fn.log_z.item(), *importance_log_z(energy)),
        (log_f.logsumexp(0) + cell).item(),
        {name: picture.view(n, n) for name, picture in pictures.items()},
    )


class ClassGaussians:
    """A mixture of one Gaussian a class, in coordinates in which all classes together have covariance 1."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        dim, present = x.shape[1], label.unique()
        members = [x[label == k] for k in present]
        self.weight = torch.tensor([len(member) / len(x) for member in members])
        self.mean = torch.stack([member.mean(0) for member in members])
        covariance = torch.stack([member.T.cov() for member in members])
        self.scale = torch.linalg.cholesky((1 - SHRINKAGE) * covariance + SHRINKAGE * torch.eye(dim))
        whiten = torch.linalg.inv(self.scale).transpose(1, 2)
        self.whiten = whiten.transpose(0, 1).reshape(dim, -1)  # of all classes side by side: one product serves them
        self.centre = torch.einsum("kd,kde->ke", self.mean, whiten)
        log_volume = self.scale.diagonal(dim1=1, dim2=2).log().sum(1)
        self.log_constant = self.weight.log() - log_volume - dim / 2 * math.log(2 * math.pi)

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        counts = torch.multinomial(self.weight, math.prod(shape), replacement=True).bincount(minlength=len(self.mean))
        parts = [
            mean + torch.randn(count, len(mean)) @ scale.T
            for mean, scale, count in zip(self.mean, self.scale, counts.tolist(), strict=True)
        ]
        x = torch.cat(parts)
        return x[torch.randperm(len(x))].view(*shape, -1)

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x @ self.whiten).view(len(x), *self.mean.shape) - self.centre
        return (self.log_constant - 0.5 * z.square().sum(2)).logsumexp(1)


class Whitening:
    """Pixels, made continuous by uniform noise within a level, to coordinates of mean 0 and covariance 1 and back."""

    def __init__(self, images: Tensor) -> None:
        x = images.double()
        covariance = x.T.cov() + torch.eye(x.shape[1]) / 12
        self.mean = (x.mean(0) + 0.5).float()
        scale, axes = torch.linalg.eigh(covariance)
        self.matrix = (axes / scale.sqrt()).float()
        self.log_volume = -0.5 * scale.log().sum().item()

    def __call__(self, images: Tensor) -> Tensor:
        return (images + torch.rand_like(images) - self.mean) @ self.matrix

    def bits_per_pixel(self, log_p: float) -> float:
        return -(log_p + self.log_volume) / (len(self.mean) * math.log(2))


def fashion(n: int, data: Path | None) -> Tensor:
    """Fashion-MNIST's test images, averaged down to 8 x 8 and to the digits' levels."""
    command = "apt-get install dataset-fashion-mnist"
    path = find_file("t10k-images-idx3-ubyte.gz", command, data=data, system="datasets/fashion-mnist")
    with gzip.open(path) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:n]
    small = F.adaptive_avg_pool2d(torch.from_numpy(pixels.astype(np.float32)), 8)
    return (small * (N_LEVELS - 1) / 255).round().flatten(1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The chance that a datum scores above an outsider; ties count half."""
    order = torch.sort(outside).values
    below, not_above = torch.searchsorted(order, inside), torch.searchsorted(order, inside, right=True)
    return ((below + not_above).double().mean() / (2 * len(outside))).item()


@dataclass
class Digits:
    """Rows of the tables, and the scores log p - log q by what was scored."""

    rows: list[tuple[str, float, str]]
    log_z: tuple[float, float, float]
    columns: list[str]
    detection: dict[str, list[float]]
    scores: dict[str, Tensor]
    without: str


def digits(seconds: float, steps: int, data: Path | None) -> Digits:
    source: Any = require("sklearn.datasets", "pip install scikit-learn==1.7.2").load_digits()
    images, label = torch.from_numpy(source.data).float(), torch.from_numpy(source.target)
    order = torch.randperm(len(images))
    train, held_out = images[order[:N_TRAIN]], images[order[N_TRAIN:]]
    whiten = Whitening(train)
    repeated = train.repeat(20, 1)  # so that the uniform noise within a level averages out
    noise = ClassGaussians(whiten(repeated), label[order[:N_TRAIN]].repeat(20))
    gaussian = MultivariateNormal(torch.zeros(64), torch.eye(64))
    energy = Energy(noise, 64, 128)
    loss_fn = fit("digits", energy, lambda n: whiten(train[torch.randint(len(train), (n,))]), seconds, steps)
    log_z, error = importance_log_z(energy)

    others = {
        "noise samples": noise.sample((2000,)),
        "mirrored digits": whiten(held_out.view(-1, 8, 8).flip(2).flatten(1)),
        "shuffled pixels": whiten(held_out.gather(1, torch.rand(held_out.shape).argsort(1))),
        "uniform pixels": whiten(torch.randint(N_LEVELS, (2000, 64)).float()),
    }
    without = ""
    try:
        others["Fashion-MNIST"] = whiten(fashion(2000, data))
    except DataError as missing:
        without = f"Fashion-MNIST left out: {missing}"

    @torch.no_grad()
    def scores(x: Tensor) -> list[Tensor]:
        log_q = noise.log_prob(x)
        log_f = energy(x, log_q)
        return [gaussian.log_prob(x), log_q, log_f - log_z, loss_fn.log_density_ratio(log_f, log_q)]

    of_data = scores(whiten(held_out))
    means = [score.mean().item() for score in of_data[:3]]
    names = ["one Gaussian", "a Gaussian a class, the noise", "energy model"]
    of_others = {name: scores(x) for name, x in others.items()}
    return Digits(
        [(n, m, f"{whiten.bits_per_pixel(m):10.3f}") for n, m in zip(names, means, strict=True)],
        (loss_fn.log_z.item(), log_z, error),
        ["Gaussian", "noise", "model", "model/noise"],
        {name: [auroc(*pair) for pair in zip(of_data, other, strict=True)] for name, other in of_others.items()},
        {"held-out digits": of_data[3]} | {name: other[3] for name, other in of_others.items()},
        without,
    )


def report(moons: Toy, found: Digits) -> None:
    def block(title: str, rows: list[tuple[str, float, str]], log_z: tuple[float, float, float]) -> None:
        print(f"\n{title}\n" + "\n".join(f"  {name:<32}{value:10.3f}{rest}" for name, value, rest in rows))
        print(f"  log Z: learned {log_z[0]:+.3f}, by importance sampling {log_z[1]:+.3f} +- {log_z[2]:.3f}", end="")

    block("two moons                           held-out log p (nats)", moons.rows, moons.log_z)
    print(f", on a grid {moons.log_z_grid:+.3f}")
    block("digits                         held-out log p (nats)  bits/pixel", found.rows, found.log_z)
    print(f"\n\nAUROC, held-out digits against      {''.join(f'{name:>13}' for name in found.columns)}")
    for name, values in found.detection.items():
        print(f"  {name:<34}{''.join(f'{value:13.3f}' for value in values)}")
    if found.without:
        print(f"  {found.without}")


def draw(pyplot: Any, path: Path, moons: Toy, found: Digits) -> None:
    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    highest = moons.pictures["truth"].max().item()
    for axis, (name, picture) in zip(axes, moons.pictures.items(), strict=False):
        axis.imshow(picture.numpy(), origin="lower", extent=EXTENT, vmin=0, vmax=highest, aspect="auto", cmap="magma")
        axis.set_title(f"two moons: {name}")
    for name, score in found.scores.items():
        if name in ("held-out digits", "noise samples", "mirrored digits"):
            axes[3].hist(score.numpy(), bins=40, density=True, alpha=0.5, label=name)
    axes[3].set(title="digits", xlabel="log p - log q (nats)", yticks=[])
    axes[3].legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    options = parser("Fit energy models by noise-contrastive estimation.", seconds=200.0, epochs=300).parse_args()
    pyplot = prepare(options.output)
    require("sklearn.datasets", "pip install scikit-learn==1.7.2")  # before the minutes of the first fit
    torch.manual_seed(options.seed)
    steps = options.epochs * -(-N_TRAIN // BATCH)
    moons = toy(options.seconds / 2, steps)
    found = digits(options.seconds / 2, steps, options.data)
    report(moons, found)
    draw(pyplot, options.output / "density.png", moons, found)
    print(f"\nwritten: {options.output / 'density.png'}")


if __name__ == "__main__":
    run(main)
