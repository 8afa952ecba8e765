"""Where arrays lie on a mesh of devices. Knows axis names and rules, no model."""

from sharding.rules import AXES, WEIGHT_RULES, partition_spec, tree_shardings

__all__ = ["AXES", "WEIGHT_RULES", "partition_spec", "tree_shardings"]
