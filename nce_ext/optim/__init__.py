"""torch's optimizers for gradients that touch a few rows: a step costs what those rows cost, however many there are.

    loss_fn = nce_ext.NCELoss(D, V, noise, k, sparse=True)
    optimizer = nce_ext.optim.AdamW([*model.parameters(), *loss_fn.parameters()], lr=1e-3)

Constructors and defaults are torch's, and so is every step on a parameter whose gradient is dense. A parameter with
sparse gradients (COO, as the losses of this package and ``nn.Embedding(sparse=True)`` make them) is stepped row by row:
rows without a gradient, and their states, stay as they are to the last bit. What that means is each class's lazy rule;
where every row is touched at every step it is the rule of torch. Gradients whose rows repeat, of several backward
passes or of ``sparse="padded"``, are summed first, for which CUDA has to wait for the number of touched rows.

16-bit weights have float32 state here. ``rounding="stochastic"`` rounds the new weight up or down at random, so that
its expected value is right and steps smaller than the distance between two numbers are not lost; "master" keeps the
weight in float32 beside it; "nearest" is what torch does. ``generator`` is the source of the random bits.

A state holds tensors alone, of the parameter's shape, of one number a row or of none. ``state_dict`` and
torch.distributed.checkpoint (``get_state_dict``, ``set_state_dict``, also with ``flatten_optimizer_state_dict=True``)
resume a run bit for bit; a dense 16-bit parameter's state is float32 from loading until its next step. A state that is
made by hand, by a step on dense zeros, takes that of 16-bit rows only if the rate of that step was 0.
"""

from nce_ext.optim.rules import SGD, Adagrad, Adam, AdamW, RowwiseAdagrad

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RowwiseAdagrad"]
