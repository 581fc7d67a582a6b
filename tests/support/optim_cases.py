"""The optimizers that are tested, with their options, and the sparse gradients they get."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nce_ext import optim
from nce_ext._ops import library

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# name -> class, options; all of them differ from the defaults enough to show in a few steps.
CASES = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, decay, maximize": ("SGD", {"lr": 0.1, "weight_decay": 0.2, "maximize": True}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.8}),
    "SGD, momentum, dampening, decay": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2}),
    "SGD, nesterov, decay": ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}),
    "SGD, momentum, dampening, maximize": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.5, "maximize": True}),
    "Adagrad": ("Adagrad", {"lr": 0.1}),
    "Adagrad, all": (
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2, "initial_accumulator_value": 0.7, "eps": 1e-2},
    ),
    "Adagrad, maximize": ("Adagrad", {"lr": 0.1, "maximize": True, "initial_accumulator_value": 0.1}),
    "Adam": ("Adam", {"lr": 0.1}),
    "Adam, global": ("Adam", {"lr": 0.1, "bias_correction": "global"}),
    "Adam, all": ("Adam", {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.2, "maximize": True}),
    "Adam, decoupled": ("Adam", {"lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "AdamW": ("AdamW", {"lr": 0.1}),
    "AdamW, all": ("AdamW", {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.5, "maximize": True}),
    "AdamW, global": ("AdamW", {"lr": 0.1, "weight_decay": 0.5, "bias_correction": "global"}),
}
ROWWISE = {
    "row-wise Adagrad": ("RowwiseAdagrad", {"lr": 0.1}),
    "row-wise Adagrad, all": (
        "RowwiseAdagrad",
        {
            "lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2, "initial_accumulator_value": 0.7, "eps": 1e-2,
            "maximize": True,
        },
    ),
}  # fmt: skip
ALL = {**CASES, **ROWWISE}
OURS_ALONE = ("bias_correction", "rounding", "generator")


def make(name: str, params, **changes):
    rule, options = ALL[name]
    return getattr(optim, rule)(params, **{**options, **changes})


def torch_twin(name: str, params, **changes):
    rule, options = CASES[name]
    options = {key: value for key, value in {**options, **changes}.items() if key not in OURS_ALONE}
    return getattr(torch.optim, rule)(params, **options)


def parameter(*size: int, dtype: torch.dtype = F32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*size, dtype=F64).to(dtype))


def sparse(classes, values: Tensor, n_classes: int, coalesced: bool = False) -> Tensor:
    """A COO gradient [n_classes, ...] of one row of values for each of classes."""
    classes = torch.as_tensor(classes, dtype=torch.int64).reshape(1, -1)
    size = (n_classes, *values.shape[1:])
    return torch.sparse_coo_tensor(classes, values, size, check_invariants=True, is_coalesced=coalesced)


def random_gradient(p: Tensor, classes) -> Tensor:
    """A gradient of the rows ``classes`` of p, which may repeat."""
    values = torch.randn(len(classes), *p.shape[1:], dtype=F64).to(p.dtype)
    return sparse(classes, values, p.shape[0])


def pair(p: torch.nn.Parameter) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """The parameter and its float64 copy for torch's optimizer."""
    return p, torch.nn.Parameter(p.detach().double().clone())


def give_all_rows(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """The same gradient for both: shuffled rows, each in two parts."""
    rows = ours.shape[0]
    ours.grad = random_gradient(ours, torch.cat([torch.randperm(rows), torch.randperm(rows)]))
    ours.grad = ours.grad.coalesce()
    truth.grad = ours.grad.to_dense().double()


def snapshot(optimizer) -> tuple:
    """Parameters and state, copied; dtypes count."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def assert_same(one, other) -> None:
    """Equal to the last bit, through dicts and lists; a NaN equals itself."""
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other or (one != one and other != other)


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizers take no backend: the kernels are theirs wherever they are there."""
    if backend == "reference":
        monkeypatch.setattr(library, "_has_cpu", False)
