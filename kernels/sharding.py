"""DTensors through the operators: the batch may be sharded over processes, all else is replicated.

As images do not mix, results that have a batch are sharded as their operands are. Gradients of
weights and biases are each process's share of a sum, which DTensor adds up where it is needed.

Importing this module imports ``torch.distributed.tensor``, which takes half a second.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import (
    expand_to_full_mesh_op_strategy,
    register_op_strategy,
)

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
    """Tell DTensor of all operators."""
    for name, (operands, results) in _SHARDED.items():
        # All numbers count: another stride makes another result.
        numbers = RuntimeSchemaInfo(static_argnum=len(operands), needs_pytree=True)
        operator = getattr(torch.ops.triton_cnn, name).default
        register_op_strategy(operator, numbers)(partial(_strategy, operands, results))


def _strategy(operands: tuple, results: tuple, schema: OpSchema) -> OpStrategy:
    """Of each axis of the mesh: sharded, or all replicated."""
    given = [isinstance(t, OpStrategy) for t in schema.args_schema[: len(operands)]]

    def choice(out: Sequence[Placement], into: Sequence[Placement]) -> list[Placement | None]:
        return [*out, *(p if is_given else None for p, is_given in zip(into, given, strict=True))]

    choices = [
        choice(results, operands),
        choice([_WHOLE] * len(results), [_WHOLE] * len(operands)),
    ]
    return expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(),
        schema,
        choices,
        input_index=len(results),
        allow_uneven_sharding=True,
    )
