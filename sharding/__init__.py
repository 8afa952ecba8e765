"""Where arrays lie on a mesh of devices. Knows axis names and rules, no model."""

from sharding.rules import AXES, WEIGHT_RULES, partition_spec, tree_shardings
from sharding.tensor import TENSOR, gather_columns, over_tensor, sum_over_tensor

__all__ = [
    "AXES",
    "TENSOR",
    "WEIGHT_RULES",
    "gather_columns",
    "over_tensor",
    "partition_spec",
    "sum_over_tensor",
    "tree_shardings",
]
