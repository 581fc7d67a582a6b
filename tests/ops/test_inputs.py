"""The inputs of the operators in Python carry the names that the schemas in csrc/ops.cpp give them."""

from __future__ import annotations

import inspect

import pytest
import torch

from nce_ext._ops import alias_table, row_grad, row_grad_step, row_step, sample, sampled_loss, scatter_step, shared_loss
from nce_ext._sampled.call import Correction, Labels, Operands
from nce_ext.reference import Objective

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


def test_the_groups_of_a_call_are_those_of_the_schemas():
    """Operators take them splatted."""
    operands, labels, objective = Operands._fields, Labels._fields, ("objective", *Objective._fields[1:])
    single, shared = sampled_loss.SampledLossInputs._fields, shared_loss.SharedLossInputs._fields
    assert single[:5] == shared[:5] == operands
    assert single[-3:] == shared[-3:] == ("needs_hidden_grad", "needs_row_grad", "gradient_layout")
    for fields in (single, shared, shared_loss.SharedEpilogueInputs._fields):
        at = fields.index(labels[0])
        assert fields[at : at + 3] == labels
        assert fields[at + 3 : at + 8] == objective
    at = single.index("target_log_q")
    assert single[at : at + 4] == Correction._fields


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
