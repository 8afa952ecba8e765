"""Feed-forward parts: the dense SwiGLU MLP and the mixture of experts (paper section 2.1.2)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3_jax.model.linear import Layer, Linear, Parameters
from dsv3_jax.model.router import Router
from pallas_kernels.block_scaled_matmul import block_scaled_swiglu
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu


class MLP(nnx.Module):
    """down(silu(gate x) * up x), or a stack of such."""

    def __init__(self, make: Parameters, stack: tuple[int, ...], intermediate_size: int):
        hidden = make.config.hidden_size
        self.gate_proj = Linear(make, stack, intermediate_size, hidden)
        self.up_proj = Linear(make, stack, intermediate_size, hidden)
        self.down_proj = Linear(make, stack, hidden, intermediate_size)

    def __call__(self, x: Array, layer: Layer) -> Array:
        """[..., hidden_size] -> [..., hidden_size]."""
        gate, up = self.gate_proj, self.up_proj
        hidden = block_scaled_swiglu(
            x,
            gate.matrix(),
            up.matrix(),
            layer=layer,
            activations=gate.activations,
            scale_fmt=gate.scale_fmt,
        )
        return self.down_proj(hidden, layer)


class Experts(MLP):
    """The routed experts: MLPs stacked [*stack, n_routed_experts, ...]."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        super().__init__(make, (*stack, make.config.n_routed_experts), make.config.moe_intermediate_size)

    def __call__(self, x: Array, group_sizes: Array, row_scale: Array, layer: Layer) -> Array:
        """Every row through the expert of its group.

        Args:
            x: [R, hidden_size], sorted by expert.
            group_sizes: int32 [E].
            row_scale: float32 [R], weights of the outputs.

        Returns:
            [R, hidden_size].
        """
        down = self.down_proj
        hidden = grouped_swiglu(
            x,
            self.gate_proj.matrix(),
            self.up_proj.matrix(),
            group_sizes,
            layer=layer,
            activations=down.activations,
            scale_fmt=down.scale_fmt,
        )
        return grouped_matmul(
            hidden,
            down.matrix(),
            group_sizes,
            row_scale=row_scale,
            layer=layer,
            activations=down.activations,
            scale_fmt=down.scale_fmt,
        )


class MoE(nnx.Module):
    """Shared expert plus the routed experts' weighted sum; no token is ever dropped."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        config = make.config
        self.gate = Router(make, stack)
        self.experts = Experts(make, stack)
        self.shared_experts = MLP(make, stack, config.n_shared_experts * config.moe_intermediate_size)

    def __call__(self, x: Array, valid: Array, layer: Layer) -> tuple[Array, "Routing"]:
        """Sends every token to its experts.

        Args:
            x: [B, T, hidden_size].
            valid: bool [B, T]; padding is sent to no expert.

        Returns:
            [B, T, hidden_size], and the router's (ids [B * T, K], scores [B * T, E]).
        """
        rows = x.reshape(-1, x.shape[-1])
        ids, weights, scores = self.gate(rows, layer)
        order, group_sizes = sort_by_expert(ids, valid.reshape(-1), scores.shape[-1])
        out = self.experts(rows[order // ids.shape[1]], group_sizes, weights.reshape(-1)[order], layer)
        # A permutation is its own scatter: every (token, choice) gets its row back, then the choices are summed.
        routed = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        routed = routed.reshape(*ids.shape, -1).astype(jnp.float32).sum(axis=1).astype(x.dtype)
        return self.shared_experts(x, layer) + routed.reshape(x.shape), (ids, scores)


Routing = tuple[Array, Array]


def sort_by_expert(ids: Array, valid: Array, num_experts: int) -> tuple[Array, Array]:
    """Order in which the (token, choice) pairs stand grouped by expert.

    Args:
        ids: int32 [M, K].
        valid: bool [M]; pairs of other tokens come last and belong to no group.

    Returns:
        int32 [M * K], a permutation of the pairs t * K + k, and int32 [num_experts], the sizes of the groups.
    """
    keys = jnp.where(valid[:, None], ids, num_experts).reshape(-1)
    order = jnp.argsort(keys, stable=True)
    return order, jnp.bincount(keys, length=num_experts + 1)[:num_experts].astype(jnp.int32)
