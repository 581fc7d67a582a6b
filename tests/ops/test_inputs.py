"""The inputs of the operators in Python carry the names that the schemas in csrc/ops.cpp give them."""

from __future__ import annotations

import inspect

import pytest
import torch

from nce_ext._ops import alias_table, row_grad, row_grad_step, row_step, sample, sampled_loss, scatter_step, shared_loss

pytestmark = pytest.mark.usefixtures("native")

INPUTS = {
    "row_grad": row_grad.RowGradInputs,
    "row_grad_step_": row_grad_step.RowGradStepInputs,
    "row_step_": row_step.RowStepInputs,
    "sampled_loss": sampled_loss.SampledLossInputs,
    "scatter_step_": scatter_step.ScatterStepInputs,
    "shared_loss": shared_loss.SharedLossInputs,
    "shared_loss_": shared_loss.SharedEpilogueInputs,
    "shared_row_grad": shared_loss.SharedRowGradInputs,
}
FUNCTIONS = {
    "sample": sample.sample,
    "alias_table": alias_table.alias_table,
    "row_grad_norm": row_grad._row_grad_norm_fake,
}


def names_in_the_schema(operator: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in getattr(torch.ops.nce_ext, operator).default._schema.arguments)


@pytest.mark.parametrize("operator", INPUTS)
def test_fields_are_the_schemas_arguments(operator):
    assert INPUTS[operator]._fields == names_in_the_schema(operator)


@pytest.mark.parametrize("operator", FUNCTIONS)
def test_parameters_are_the_schemas_arguments(operator):
    assert tuple(inspect.signature(FUNCTIONS[operator]).parameters) == names_in_the_schema(operator)


def test_the_dense_gradient_has_the_first_inputs_of_the_sparse_one():
    assert names_in_the_schema("row_grad_dense") == row_grad.RowGradInputs._fields[:-1]


def test_every_operator_is_named_here():
    schemas = {s.name.removeprefix("nce_ext::") for s in torch._C._jit_get_all_schemas() if "nce_ext::" in s.name}
    assert schemas == {*INPUTS, *FUNCTIONS, "row_grad_dense", "simd_level"}


def test_outputs_are_as_many_as_the_schemas():
    outputs = {
        "row_grad": row_grad.RowGradient,
        "sampled_loss": sampled_loss.SampledLossOutputs,
        "shared_loss": shared_loss.SharedLossOutputs,
        "shared_loss_": shared_loss.SharedEpilogueOutputs,
        "shared_row_grad": row_grad.RowGradient,
    }
    for operator, fields in outputs.items():
        returns = getattr(torch.ops.nce_ext, operator).default._schema.returns
        assert len(returns) == len(fields._fields), operator
