"""DTensors through the operators: the batch may be sharded over processes, all else is replicated.

As images do not mix, results that have a batch are sharded as their operands are. Gradients of
weights and biases are each process's share of a sum, which DTensor adds up where it is needed.

Importing this module imports ``torch.distributed.tensor``, which takes half a second.
"""

import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from ._private import register_sharding

_BATCH, _WHOLE, _SUM = Shard(0), Replicate(), Partial()

# Where the batch is sharded: each operator's tensors, and its results.
_SHARDED = {
    "conv2d": ((_BATCH, _WHOLE, _WHOLE, _BATCH), (_BATCH,)),
    "conv2d_dgrad": ((_BATCH, _WHOLE, _WHOLE), (_BATCH,)),
    "conv2d_wgrad": ((_BATCH, _BATCH), (_SUM, _SUM)),
    "conv2d_fp8": ((_BATCH, _WHOLE, _WHOLE, _WHOLE, _BATCH), (_BATCH,)),
    "conv2d_bytes": ((_BATCH, _WHOLE, _WHOLE, _WHOLE, _WHOLE), (_BATCH,)),
    "conv2d_bytes_wgrad": ((_BATCH, _BATCH, _WHOLE, _WHOLE), (_SUM, _SUM)),
    "channel_sum": ((_BATCH,), (_SUM,)),
    "relu_backward": ((_BATCH, _BATCH), (_BATCH, _SUM)),
    "max_pool2d": ((_BATCH,), (_BATCH, _BATCH, _BATCH)),
    "max_pool2d_backward": ((_BATCH, _BATCH), (_BATCH,)),
    "max_pool2d_gather": ((_BATCH, _BATCH), (_BATCH,)),
    "max_unpool2d": ((_BATCH, _BATCH), (_BATCH,)),
    "max_unpool2d_backward": ((_BATCH, _BATCH), (_BATCH,)),
    "conv2d_relu_max_pool2d": ((_BATCH, _WHOLE, _WHOLE), (_BATCH, _BATCH)),
    "conv2d_relu_max_pool2d_backward": (
        (_BATCH, _BATCH, _BATCH, _WHOLE),
        (_BATCH, _SUM, _SUM),
    ),
}


def register() -> None:
    """Tell DTensor of all operators: of each axis of the mesh, sharded or all replicated."""
    for name, (operands, results) in _SHARDED.items():
        whole = [_WHOLE] * len(results), [_WHOLE] * len(operands)
        operator = getattr(torch.ops.triton_cnn, name).default
        register_sharding(operator, [(results, operands), whole])
