"""Losses over several processes: vocabularies in shards, in-batch negatives of all ranks, sparse gradients under DDP.

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world_size,))
    loss_fn = nce_ext.distributed.shard(loss_fn, mesh)      # each rank keeps the rows of some classes
    loss = loss_fn(hidden, target)                          # each rank's own examples; the loss of all

Every rank calls the same things in the same order. What a rank refuses ends the step on all of them with an error that
names it, before anything has changed; a rank that dies or stays away does so within the group's timeout.
"""

from nce_ext.distributed.collectives import Collectives
from nce_ext.distributed.ddp import RowSparseDDP, reduce_sparse_gradients, sparse_gradient_hook
from nce_ext.distributed.gathered import GatheredLoss, gather, gather_rows
from nce_ext.distributed.vocab_parallel.loss import ShardedLoss, shard

__all__ = [
    "Collectives",
    "GatheredLoss",
    "RowSparseDDP",
    "ShardedLoss",
    "gather",
    "gather_rows",
    "reduce_sparse_gradients",
    "shard",
    "sparse_gradient_hook",
]
