"""Gradients that stay known to be coalesced: across threads, swapped parameters and tracing."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import nce_ext
from nce_ext._ops.coo import CoalescedGradients, coo, made_coalesced
from nce_ext._ops.sampled_loss import SampledLossInputs

pytestmark = pytest.mark.usefixtures("native")

V, D, B, K = 50, 8, 16, 4


def make_loss(seed: int = 0) -> nce_ext.NCELoss:
    torch.manual_seed(seed)
    return nce_ext.NCELoss(D, V, nce_ext.noise.Unigram(range(1, V + 1)), K, sparse=True)


def trained(seed: int, steps: int = 20) -> torch.Tensor:
    """Weight after a few steps; everything random comes from the seed."""
    generator = torch.Generator().manual_seed(seed)
    loss_fn = nce_ext.NCELoss(D, V, nce_ext.noise.Uniform(V), K, sparse=True)
    with torch.no_grad():
        loss_fn.weight.copy_(torch.randn(V, D, generator=generator))
    optimizer = nce_ext.optim.Adagrad(loss_fn.parameters(), lr=0.1)
    for _ in range(steps):
        hidden = torch.randn(B, D, generator=generator).requires_grad_()
        target = torch.randint(V, (B,), generator=generator)
        optimizer.zero_grad()
        loss_fn(hidden, target, generator=generator).backward()
        assert loss_fn.weight.grad is not None
        assert loss_fn.weight.grad.is_coalesced()
        assert loss_fn.bias is None or loss_fn.bias.grad.is_coalesced()
        optimizer.step()
    return loss_fn.weight.detach()


def test_eight_threads_train_as_each_would_alone():
    alone = [trained(seed) for seed in range(8)]
    got: list[torch.Tensor | BaseException | None] = [None] * 8

    def work(seed: int) -> None:
        try:
            got[seed] = trained(seed)
        except BaseException as error:
            got[seed] = error

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for seed in range(8):
        assert isinstance(got[seed], torch.Tensor), got[seed]
        assert torch.equal(got[seed], alone[seed])


def test_the_memory_of_gradients_is_safe_under_threads():
    """Many threads add and take at once; an iteration over what others change would raise."""
    gradients, errors = CoalescedGradients(), []

    def work() -> None:
        try:
            for _ in range(300):
                classes = torch.arange(3)
                gradients.add(classes, 2)
                gradients.take(classes)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_only_the_last_gradients_are_held():
    gradients = CoalescedGradients()
    classes = [torch.arange(3) for _ in range(gradients.AT_MOST + 3)]
    for each in classes:
        gradients.add(each, 1)
    assert [gradients.take(each) for each in classes] == [False] * 3 + [True] * gradients.AT_MOST
    assert not any(gradients.take(each) for each in classes)


def test_a_gradient_is_known_as_often_as_it_was_made():
    gradients, classes = CoalescedGradients(), torch.arange(3)
    gradients.add(classes, 2)
    assert [gradients.take(classes) for _ in range(3)] == [True, True, False]
    gradients.add(classes, 1)
    assert not gradients.take(classes[:2])


def test_a_hook_is_registered_once():
    loss_fn = make_loss()
    for _ in range(3):
        made_coalesced.watch(loss_fn.weight)
    assert len(loss_fn.weight._post_accumulate_grad_hooks) == 1


def test_what_does_not_ascend_is_not_flagged():
    weight = torch.nn.Parameter(torch.zeros(V, D))
    weight.grad = coo(torch.tensor([3, 1]), torch.ones(2, D), (V, D), False)
    made_coalesced.flag(weight)
    assert not weight.grad.is_coalesced()


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_parameters_can_be_swapped_after_a_step(swapping):
    loss_fn = make_loss()
    hidden, target = torch.randn(B, D), torch.randint(V, (B,))
    weight = loss_fn.weight
    for dtype in (torch.float32, torch.float64, torch.float32):
        loss_fn.to(dtype)
        assert loss_fn.weight is weight
        assert loss_fn.weight.dtype == dtype
        loss_fn(hidden.to(dtype), target).backward()
        assert loss_fn.weight.grad.is_coalesced()
        loss_fn.zero_grad(set_to_none=True)


def test_backward_is_traced_without_a_compiler_at_work():
    """Fake tensors have no address; before torch 2.12 backward sees them where is_compiling() is False."""
    loss_fn = make_loss()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        weight, bias = (mode.from_tensor(p.detach()).requires_grad_() for p in (loss_fn.weight, loss_fn.bias))
        hidden = torch.empty(B, D).requires_grad_()
        target = torch.zeros(B, dtype=torch.int64)
        inputs = SampledLossInputs(
            hidden=hidden, weight=weight, bias=bias, target=target[:, None], log_z=None,
            seed=torch.zeros(2, dtype=torch.int64), table=torch.empty(V, 4, dtype=torch.int32),
            kind=loss_fn.noise.kind, num_negatives=K, negatives=None, remove_hits=False, target_log_q=None,
            negative_log_q=None, subtract_log_q=True, offset=0.0, uniform_labels=False, mean_candidates=False,
            ignore_index=-100, objective=0, positive_weight=1.0, label_smoothing=0.0, temperature=0.0,
            correct_positive=True, needs_hidden_grad=True, needs_row_grad=True, gradient_layout=1,
        )  # fmt: skip
        made_coalesced.watch(weight)
        torch.ops.nce_ext.sampled_loss(*inputs)[0].sum().backward()
        assert not torch.compiler.is_compiling()
        assert weight.grad.layout == bias.grad.layout == torch.sparse_coo
