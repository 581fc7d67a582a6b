"""What the package relies on of PyTorch's undocumented names."""

from __future__ import annotations

import ast
import threading
import timeit
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

import nce_ext
from nce_ext import _private_torch

PACKAGE = Path(nce_ext.__file__).parent

# Methods of torch's classes that subclasses override, by names that PyTorch documents for it or has kept since 1.0.
OVERRIDDEN = {"_apply", "_load_from_state_dict", "_save_to_state_dict"}


def test_run_eagerly_breaks_the_graph():
    @_private_torch.run_eagerly
    def traced():
        return torch.compiler.is_compiling()

    seen = []

    @torch.compile(backend="eager")
    def compiled(x):
        seen.append(traced())
        return x + 1

    compiled(torch.zeros(1))
    assert seen == [False]


def test_parts_and_flag_of_a_coo_gradient():
    rows = torch.tensor([[1.0, 2], [3, 4]])
    gradient = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), rows, (5, 2), check_invariants=False)
    assert not gradient.is_coalesced()
    assert _private_torch.coo_classes(gradient).tolist() == [1, 3]
    _private_torch.coo_rows(gradient).mul_(2)
    assert _private_torch.flag_coalesced(gradient) is gradient
    assert gradient.is_coalesced()
    assert gradient.to_dense()[3].tolist() == [6, 8]


def test_version_counts_changes_in_place():
    tensor = torch.zeros(3)
    before = _private_torch.version(tensor)
    tensor.add_(1)
    assert _private_torch.version(tensor) == before + 1


def test_a_pass_has_an_id_and_an_end():
    assert _private_torch.backward_pass_id() == -1
    order = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            order.append(_private_torch.backward_pass_id())
            _private_torch.at_end_of_backward(lambda: order.append(x.grad is not None))
            return gradient

    x = torch.ones(2, requires_grad=True)
    y = Watched.apply(x)
    (y.sum() + y.prod()).backward()
    assert len(order) == 2
    assert order[0] >= 0
    assert order[1] is True


def test_a_pass_knows_which_nodes_it_runs():
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    of_w = torch.autograd.graph.get_gradient_edge(w).node
    runs = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x * w

        @staticmethod
        def backward(ctx, gradient):
            runs.append(_private_torch.will_run_in_this_pass(of_w))
            return gradient, gradient

    Product.apply(x, w).sum().backward()
    torch.autograd.grad(Product.apply(x, w).sum(), x)
    assert runs == [True, False]


def test_transforms_are_known_by_name():
    seen = []

    def look(x):
        seen.append((_private_torch.inside_transform(), _private_torch.inside_vmap()))
        return x.sum()

    func, x = torch.func, torch.ones(2, 3)
    for function in (look, func.grad(look), func.vmap(look), func.vmap(func.grad(look)), look):
        function(x)
    assert seen == [(False, False), (True, False), (True, True), (True, True), (False, False)]
    func.grad(lambda x: func.vmap(look)(x).sum())(x)
    func.jvp(look, (x,), (x,))
    assert seen[5:] == [(True, True), (True, False)]


def test_batched_tensors_are_known_at_every_level():
    seen = []

    def look(x, other):
        seen.append((_private_torch.is_batched(x), _private_torch.is_batched(other)))
        return x.sum()

    func, x = torch.func, torch.ones(2, 3)
    look(x, x)
    func.grad(look)(x, x)
    func.vmap(look, (0, None))(x, x)
    func.vmap(func.grad(look), (0, None))(x, x)
    func.grad(lambda x: func.vmap(look, (0, None))(x, x[0]).sum())(x)
    assert seen == [(False, False)] * 2 + [(True, False)] * 3


def test_other_threads_are_inside_no_transform():
    seen = []

    def look(x):
        thread = threading.Thread(target=lambda: seen.append(_private_torch.inside_transform()))
        thread.start()
        thread.join()
        return x

    torch.func.vmap(look)(torch.ones(2))
    assert seen == [False]


def test_tracing_is_inside_no_transform():
    @torch.compile(backend="eager", fullgraph=True)
    def traced(x):
        return x + _private_torch.inside_transform() + _private_torch.inside_vmap()

    assert traced(torch.zeros(1)) == 0


def test_asking_for_transforms_costs_less_than_a_microsecond():
    for ask in (_private_torch.inside_transform, _private_torch.inside_vmap):
        assert min(timeit.repeat(ask, number=10_000, repeat=5)) / 10_000 < 1e-6


def test_a_scheduler_sees_a_marked_step(recwarn):
    for marked in (False, True):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        if marked:
            _private_torch.mark_as_stepped(optimizer)
        recwarn.clear()
        scheduler.step()
        assert any("lr_scheduler.step()" in str(w.message) for w in recwarn) != marked


def test_the_scaler_counts_what_is_recorded():
    for found, scale in ((1.0, 4.0), (0.0, 8.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.zeros(1))
        _private_torch.record_found_inf(scaler, object(), torch.tensor([found]))
        scaler.update()
        assert scaler.get_scale() == scale


@pytest.fixture
def group():
    """A process group of this process alone, with a timeout of 7 s."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no Gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_tells_its_timeout(group):
    assert _private_torch.timeout_of(group) == timedelta(seconds=7)
    assert _private_torch.timeout_of(object()) is None


def test_ddp_asks_what_is_sparse(group):
    class TellingDDP(_private_torch.SaysWhatIsSparse, nn.parallel.DistributedDataParallel):
        def _sparse_parameters(self):
            return [self.module.weight]

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(()))

        def forward(self, ids):
            return nn.functional.embedding(ids, self.weight, sparse=True).sum() * self.scale

    def reduces_nothing(_, bucket):
        seen.append(bucket.buffer().is_sparse)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    seen = []
    model = TellingDDP(Table(), process_group=group)
    assert model._was_asked
    model.register_comm_hook(None, reduces_nothing)
    model(torch.tensor([2])).backward()
    assert sorted(seen) == [False, True]  # a bucket for the table alone, and one for the scale
    assert model.module.weight.grad.is_sparse


def test_one_dnn_multiplies_or_says_that_it_is_missing():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    try:
        product = _private_torch.one_dnn_product(a, b)
    except (AttributeError, RuntimeError):
        pytest.skip("a PyTorch without oneDNN")
    torch.testing.assert_close(product, a @ b.T)


def test_private_names_stand_in_one_file():
    """No other file reads an attribute ``_name`` of torch's objects; own ones are known by their definitions."""
    sources = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = set(OVERRIDDEN)
    for tree in sources.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    own.add(node.attr)
            elif isinstance(node, (ast.Name, ast.alias)):
                own.add(getattr(node, "id", None) or node.name.split(".")[-1])
    own |= {"_replace", "_make", "_asdict", "_fields", "_getframe"}  # of NamedTuples and sys
    for path, tree in sources.items():
        if path.name == "_private_torch.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert node.attr in own, f"{path.relative_to(PACKAGE)}:{node.lineno} uses {node.attr}"
