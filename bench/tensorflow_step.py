"""The same training step in TensorFlow, which has had these losses for long; only where it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from bench.cases import Problem

REQUIREMENT = "requirements/bench-tensorflow.txt"


def installed() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


class TensorFlowStep:
    """``tf.nn.nce_loss`` or ``tf.nn.sampled_softmax_loss`` with its gradients, compiled to a graph.

    The negatives are drawn with replacement from the same law as ours, and shared by the batch as ours are; the
    weights' gradient is a pair of ids and rows, as ours is.
    """

    def __init__(self, problem: Problem) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        self.tf, self.case, self.law = tf, problem.case, problem.law
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self.weight = tf.Variable(problem.weight.detach().numpy())
        self.bias = tf.Variable(tf.zeros(self.case.classes))
        self.hidden = tf.constant(problem.hidden.detach().numpy())
        self.target = tf.constant(problem.target.numpy()[:, None], dtype=tf.int64)

    def program(self, name: str) -> Callable[[], object]:
        tf, case = self.tf, self.case
        loss_of = {"nce": tf.nn.nce_loss, "softmax": tf.nn.sampled_softmax_loss}[name]
        uniform, log_uniform = tf.random.uniform_candidate_sampler, tf.random.log_uniform_candidate_sampler
        sampler = uniform if self.law == "uniform" else log_uniform

        @tf.function
        def step():
            drawn = sampler(self.target, 1, case.negatives, False, case.classes)
            with tf.GradientTape() as tape:
                tape.watch(self.hidden)
                losses = loss_of(
                    self.weight, self.bias, self.target, self.hidden, case.negatives, case.classes, sampled_values=drawn
                )
                loss = tf.reduce_mean(losses)
            of_hidden, of_weight, of_bias = tape.gradient(loss, [self.hidden, self.weight, self.bias])
            return loss, of_hidden, of_weight.values, of_weight.indices, of_bias.values

        return lambda: step()[0].numpy()

    def loss(self, name: str, ids, log_q) -> float:
        """The loss for given negatives, whose expected counts are k q; of a target and of a negative."""
        tf, case = self.tf, self.case
        counts = [tf.exp(tf.constant(q.numpy())) * case.negatives for q in log_q]
        drawn = (tf.constant(ids.numpy()), counts[0][:, None], counts[1])
        loss_of = {"nce": tf.nn.nce_loss, "softmax": tf.nn.sampled_softmax_loss}[name]
        return float(
            tf.reduce_mean(
                loss_of(
                    self.weight, self.bias, self.target, self.hidden, case.negatives, case.classes, sampled_values=drawn
                )
            )
        )
