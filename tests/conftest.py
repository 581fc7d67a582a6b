"""Fixtures every test gets: a known random state, poisoned fresh memory, and the choice of backend."""

from __future__ import annotations

import os
import warnings

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the processors. What needs several threads asks for them.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

with warnings.catch_warnings():
    # Without the compiled kernels the first import says so; the tests of the reference run all the same.
    warnings.simplefilter("ignore", RuntimeWarning)
    import on_cuda
    from native import require_native

    from nce_ext import _warnings


@pytest.fixture
def native() -> None:
    require_native()


# Files whose tests of the fused backend run on a GPU as well.
ON_CUDA = (
    "test_hogwild_loss", "test_loss_gradients", "test_loss_modules", "test_nce_loss", "test_published_losses",
    "test_random_shapes", "test_strided_tensors", "test_tensorflow_losses",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        backends = ["reference", "fused"]
        if metafunc.module.__name__ in ON_CUDA and (on_cuda.available() or on_cuda.MUST_RUN):
            backends.append("cuda")
        metafunc.parametrize("backend", backends, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a test passes as ``backend``; for "cuda" the fused kernels, and the losses move everything to the GPU."""
    if request.param == "cuda":
        on_cuda.require()
        on_cuda.patch(monkeypatch)
        return "fused"
    if request.param == "fused":
        require_native()
    return request.param


@pytest.fixture
def cuda() -> torch.device:
    on_cuda.require()
    return on_cuda.DEVICE


@pytest.fixture(autouse=True)
def known_state():
    """Seed torch, poison what is allocated and not written, and put everything back.

    Deterministic mode makes ``torch.empty`` hand out NaN (or the largest integer), so an output that a kernel leaves
    unwritten fails the comparison instead of passing by luck. warn_only: other torch ops need not be deterministic.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261121)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    _warnings.forget()


@pytest.fixture
def unpoisoned(known_state):
    """For allocations so large that touching every page would cost the machine's memory."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)
