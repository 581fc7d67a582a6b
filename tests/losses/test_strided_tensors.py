"""Memory layouts: strided, offset, expanded and very large tensors, on both backends."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_matches, run

from nce_ext import functional
from nce_ext import noise as noises

F64 = torch.float64


def padded_rows(tensor: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """The same values as a narrow view of wider rows, NaN around them."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + left + right), torch.nan, dtype=tensor.dtype)
    view = wide[..., left : left + tensor.shape[-1]]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 5, 16, 67])
@pytest.mark.parametrize(("left", "right"), [(0, 3), (1, 0), (3, 5)])
def test_rows_inside_wider_rows(dim, left, right, dtype, backend):
    case = Case(dim=dim, dtype=dtype)
    plain = run(case, backend)
    case.weight, case.hidden = padded_rows(case.weight, left, right), padded_rows(case.hidden, left, right)
    assert not case.weight.is_contiguous()
    got = run(case, backend)
    for name in ("loss", "hidden", "weight", "bias"):
        one, other = getattr(got, name), getattr(plain, name)
        if backend == "fused":
            assert torch.equal(one, other), f"{name} depends on the alignment of the rows"
        else:
            torch.testing.assert_close(one, other)


def test_every_second_row(backend):
    case = Case(dtype=F64)
    case.weight = case.weight.repeat_interleave(2, 0)[::2]
    case.hidden = case.hidden.repeat_interleave(3, 0)[::3]
    assert case.weight.stride(0) == 2 * 16
    assert_matches(case, backend)


def test_one_hidden_vector_for_all_examples(backend):
    case = Case(lead=(7,), dtype=F64)
    case.hidden = torch.randn(1, 16, dtype=F64).expand(7, 16)
    assert case.hidden.stride(0) == 0
    hidden = case.hidden[:1].clone().requires_grad_()
    arguments = (case.weight, case.target, case.noise, 5)
    options = {"seed": case.seed, "backend": backend}
    functional.nce_loss(hidden.expand(7, 16), *arguments, **options).backward()
    separate = case.hidden.contiguous().requires_grad_()
    functional.nce_loss(separate, *arguments, **options).backward()
    torch.testing.assert_close(hidden.grad, separate.grad.sum(0, keepdim=True))


def test_hidden_of_any_strides(backend):
    values = torch.randn(4, 3, 16, dtype=F64)
    layouts = {
        "transposed leading sizes": values.transpose(0, 1).contiguous().transpose(0, 1),
        "last size first": values.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second element": values.repeat_interleave(2, -1)[..., ::2],
        "conjugate of nothing, expanded": values[:1].expand(4, 3, 16),
    }
    case = Case(lead=(4, 3), dtype=F64)
    for layout in layouts.values():
        case.hidden = layout
        assert_matches(case, backend)


def test_index_tensors_of_any_strides(backend):
    """Targets, negatives and their log q as columns, rows and expansions of larger tensors."""
    case = Case(lead=(6,), positives=0, dtype=F64)
    table = torch.randint(50, (6, 40))
    case.target = table[:, 3]
    assert_matches(case, backend)
    for negatives in (
        table[:, 10:15],
        table[:, 10::7],
        torch.randint(50, (5, 6)).t(),
        table[0, ::3],
        table[:1, 20:30].expand(6, 10),
        torch.tensor([4]).expand(9),
    ):
        assert_matches(case, backend, negatives=negatives)
        wide = -torch.rand(*negatives.shape, 2, dtype=F64)
        log_q = (-torch.rand(6, 3, dtype=F64)[:, 1], wide[..., 0])
        assert_matches(case, backend, negatives=negatives, log_q=log_q)
    several = Case(lead=(6,), positives=3, dtype=F64)
    several.target = torch.randint(50, (3, 6)).t()
    assert_matches(several, backend, remove_hits=True)


def test_other_operands_of_any_strides(backend):
    case = Case(lead=(6,), dtype=F64)
    assert_matches(case, backend, log_z=torch.randn(6, 3, dtype=F64)[:, 1])
    assert_matches(case, backend, log_z=torch.randn(1, dtype=F64).expand(6))
    assert_matches(case, backend, sample_weight=torch.rand(1, dtype=F64).expand(6))
    case.seed = torch.stack([case.seed, case.seed], 1)[:, 0]
    assert_matches(case, backend)


def test_a_bias_inside_a_larger_tensor(backend):
    case = Case(dtype=F64)
    case.bias = torch.randn(70, dtype=F64)[13:63]
    assert_matches(case, backend)


@pytest.mark.slow
@pytest.mark.parametrize("rows_apart", [2**31 + 8, 2**30 + 1])
def test_rows_more_than_2_to_31_elements_apart(rows_apart, unpoisoned, backend):
    """Only the pages that hold the rows are ever touched, so the table costs address space and no memory."""
    classes, dim = 4, 24
    case = Case(lead=(5,), dim=dim, classes=classes, dtype=torch.bfloat16, negatives=12)
    storage = torch.empty(rows_apart * (classes - 1) + dim, dtype=torch.bfloat16)
    table = storage.as_strided((classes, dim), (rows_apart, 1))
    table.copy_(case.weight)
    plain = run(case, backend)
    hidden = case.hidden.clone().requires_grad_()
    losses = functional.nce_loss(
        hidden, table, case.target, case.noise, 12, bias=case.bias, seed=case.seed, backend=backend
    )
    losses.backward()
    assert torch.equal(losses.detach(), plain.loss)
    assert torch.equal(hidden.grad, plain.hidden)


@pytest.mark.slow
def test_a_vocabulary_whose_elements_exceed_2_to_31(unpoisoned, native):
    """V * D > 2^31 with a sparse gradient: rows at the far end are read and their gradients are named rightly."""
    classes, dim = 2**24 + 16, 128
    table = torch.empty((classes, dim), dtype=torch.bfloat16)
    near_end = torch.arange(classes - 8, classes)
    rows = torch.randn(8, dim).bfloat16()
    table[near_end] = rows
    table.requires_grad_()
    hidden, target = torch.randn(8, dim), near_end
    noise = noises.Uniform(classes)
    negatives = near_end.flip(0)
    loss = functional.nce_loss(hidden, table, target, noise, 8, negatives=negatives, sparse=True, backend="fused")
    loss.backward()
    small = rows.clone().requires_grad_()
    log_q = (noise.log_prob(target), noise.log_prob(negatives))
    expected = functional.nce_loss(
        hidden, small, torch.arange(8), noises.Uniform(8), 8,
        negatives=torch.arange(8).flip(0), log_q=log_q, sparse=True, backend="fused",
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(table.grad._indices()[0], near_end)
    torch.testing.assert_close(table.grad._values(), small.grad._values(), rtol=4e-3, atol=1e-6)
