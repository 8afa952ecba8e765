"""What a router is told and what it returns."""

import dataclasses
from typing import Literal

import jax
from jax import Array

GroupScore = Literal["top2", "max"]
Scoring = Literal["sigmoid", "softmax"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How experts are scored, chosen and weighted; field names are those of `route`'s arguments."""

    top_k: int
    n_group: int
    topk_group: int
    group_score: GroupScore
    scoring: Scoring
    normalize: bool
    scale: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """Which experts every token goes to.

    Attributes:
        ids: int32 [M, K], best first.
        weights: float32 [M, K], what the experts' results are multiplied by.
        scores: float32 [M, E], of all experts, without the bias.
        normed: [M, H], the tokens behind the RMSNorm in front, in their own dtype; None where there is no norm.
    """

    ids: Array
    weights: Array
    scores: Array
    normed: Array | None
