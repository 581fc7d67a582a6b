// Every operator's schema; kernels are registered at the bottom of their own files.
#include <Python.h>

#include <torch/csrc/stable/library.h>

// Arguments that several losses have, in the groups of csrc/loss_operands.h.
#define OPERANDS "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? log_z"
#define LABELS "bool uniform_labels, bool mean_candidates, int ignore_index"
#define OBJECTIVE \
  "int objective, float positive_weight, float label_smoothing, float temperature, bool correct_positive"

STABLE_TORCH_LIBRARY(nce_ext, m) {
  // Instruction set of the CPU kernels in use.
  m.def("simd_level() -> str");

  // Noise ids, int64 [rows, cols].
  m.def("sample(Tensor seed, Tensor table, int kind, int n_classes, int rows, int cols) -> Tensor");

  // Alias table, int32 [V, 4], of float64 weights [V] whose sum times scale is V 2^32.
  m.def("alias_table(Tensor weights, float scale) -> Tensor");

  // Per-example loss [B], ids int32 [B, T + k], dlogit [B, T + k], unscaled gradient of hidden [B, D]. objective is 0
  // binary, 1 softmax, 2 with negatives weighted by softmax(temperature z).
  // negatives and negative_log_q are [B, k], or [1, k] where all examples share them.
  m.def("sampled_loss(" OPERANDS
        ", Tensor? seed, Tensor table, int kind, int num_negatives, Tensor? negatives, bool remove_hits, "
        "Tensor? target_log_q, Tensor? negative_log_q, bool subtract_log_q, float offset, " LABELS ", " OBJECTIVE
        ", bool needs_hidden_grad, bool needs_row_grad, int gradient_layout) -> (Tensor, Tensor, Tensor, Tensor)");

  // What stands between the matrix products of shared negatives. logits [B, U] hold <hidden, row> of the columns and
  // become the derivatives; column_shift [U] is added to them, multiplicity [U] says how often a column counts, and
  // columns accidental_hits[b, t, 0] .. accidental_hits[b, t, 1] - 1 are masked for example b. Derivatives are
  // multiplied by example_weight [B], the loss is not. Loss [B]; of the targets ids int32 [B, T], derivatives [B, T]
  // and the part of the gradient of hidden [B, D]; and the sum of each example's derivatives [B].
  m.def("shared_loss_(Tensor(a!) logits, " OPERANDS
        ", Tensor column_shift, Tensor? multiplicity, Tensor? accidental_hits, int n_draws, Tensor? target_log_q, "
        "float offset, " LABELS ", " OBJECTIVE
        ", Tensor? example_weight, bool needs_derivatives, bool needs_hidden_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Loss over negatives that all examples share, with the matrix products around shared_loss_: implemented in
  // nce_ext/_sampled/shared.py, for every device. negatives and negative_log_q are [k]; distinct: of equal ids one
  // counts. With example_weight the loss is [1], the sum of example_weight times the examples' losses, and the
  // gradients are that sum's; else it is [B], and they are unscaled. Loss; of the targets ids and derivatives [B, T];
  // gradient of hidden [B, D]; classes [k] (-1: none), their gradient rows [k, D] and elements [k], or without
  // example_weight their derivatives [B, k]; and the sum of each example's derivatives [B].
  m.def("shared_loss(" OPERANDS
        ", Tensor negatives, bool distinct, bool remove_hits, Tensor? target_log_q, Tensor? negative_log_q, "
        "float offset, " LABELS ", " OBJECTIVE
        ", Tensor? example_weight, bool needs_hidden_grad, bool needs_row_grad, int gradient_layout) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // The weight's and bias's gradient of shared_loss, from what it returned, as row_grad does (gradient_layout 1
  // coalesced, 2 padded) or row_grad_dense (0; classes are then empty).
  m.def(
      "shared_row_grad(Tensor target_ids, Tensor target_dlogit, Tensor grad_loss, Tensor hidden, Tensor classes, "
      "Tensor rows, Tensor elements, Tensor dlogit, int n_classes, ScalarType dtype, bool with_rows, bool with_bias, "
      "int gradient_layout) -> (Tensor, Tensor, Tensor)");

  // Gradient rows of the touched classes: classes int64 [U] ascending, weight rows [U, D], bias elements [U]. Padded to
  // min(B (T + k), V) rows, whose spare ones are zero and of class 0, their number depends on no value.
  m.def(
      "row_grad(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, int n_classes, ScalarType dtype, "
      "bool with_rows, bool with_bias, bool padded) -> (Tensor, Tensor, Tensor)");

  // The same as dense tensors: weight gradient [V, D], bias gradient [V].
  m.def(
      "row_grad_dense(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, int n_classes, ScalarType dtype, "
      "bool with_rows, bool with_bias) -> (Tensor, Tensor)");

  // One step of an optimizer on rows of weight [V, D], in place: on those that classes, int64 [U] ascending, names (on
  // CUDA -1: none), or on all of them. gradient is [U, D], of weight's dtype. rule is 0 SGD, 1 Adagrad,
  // 2 row-wise Adagrad, 3 Adam; csrc/row_step.h says what the states and the numbers are. With a seed 16-bit weights
  // are rounded at random.
  m.def(
      "row_step_(Tensor(a!) weight, Tensor? classes, Tensor gradient, Tensor(b!)? first, Tensor(c!)? second, "
      "Tensor(d!)? row_steps, Tensor(e!)? decayed, Tensor(f!)? master, Tensor? gradient_scale, Tensor? seed, int rule, "
      "int step, float rate, float weight_decay, float log_decay, float momentum, float dampening, float beta1, "
      "float beta2, float eps, bool nesterov, bool maximize) -> ()");

  // row_grad and row_step_ in one: the gradient of weight's rows is applied as it is summed, and never exists. Classes
  // int64 [U] and, if with_bias, the bias's gradient [U]; on CUDA they are padded to min(B (T + k), V), classes with
  // -1.
  m.def(
      "row_grad_step_(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, Tensor(a!) weight, "
      "Tensor(b!)? first, Tensor(c!)? second, Tensor(d!)? row_steps, Tensor(e!)? decayed, Tensor(f!)? master, "
      "Tensor? gradient_scale, Tensor? seed, bool with_bias, int rule, int step, float rate, float weight_decay, "
      "float log_decay, float momentum, float dampening, float beta1, float beta2, float eps, bool nesterov, "
      "bool maximize) -> (Tensor, Tensor)");

  // Squared norm, float64 [1], of the gradient that row_grad would make.
  m.def(
      "row_grad_norm(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, int n_classes, bool with_rows, "
      "bool with_bias) -> Tensor");

  // weight[id] -= rate * grad_loss * dlogit * hidden for every pair in no order, and bias likewise: racy by design.
  m.def(
      "scatter_step_(Tensor ids, Tensor dlogit, Tensor grad_loss, Tensor hidden, Tensor(a!) weight, Tensor(b!)? bias, "
      "float rate) -> ()");
}

// Importing nce_ext._C loads the library, whose static initialisers register the operators; the module is empty.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
