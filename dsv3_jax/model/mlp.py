"""Feed-forward parts: the dense SwiGLU MLP and the mixture of experts (paper section 2.1.2)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from dsv3_jax.model.linear import Layer, Linear, Parameters
from dsv3_jax.model.router import Router
from pallas_kernels.block_scaled_matmul import block_scaled_swiglu
from pallas_kernels.group_rows import Grouping, group_rows
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, row_tile
from pallas_kernels.normalize import Norm
from sharding import sum_over_tensor


class MLP(nnx.Module):
    """down(silu(gate x) * up x), or a stack of such."""

    def __init__(self, make: Parameters, stack: tuple[int, ...], intermediate_size: int):
        hidden = make.config.hidden_size
        self.gate_proj = Linear(make, stack, intermediate_size, hidden)
        self.up_proj = Linear(make, stack, intermediate_size, hidden)
        self.down_proj = Linear(make, stack, hidden, intermediate_size)

    def __call__(
        self, x: Array, layer: Layer, *, norm: Norm | None = None, residual: Array | None = None
    ) -> Array:
        """[..., hidden_size] -> [..., hidden_size]: MLP(norm(x)) + residual; without it, a device's part."""
        gate, up = self.gate_proj, self.up_proj
        hidden = block_scaled_swiglu(
            x,
            gate.matrix(),
            up.matrix(),
            layer=layer,
            activations=gate.activations,
            scale_fmt=gate.scale_fmt,
            norm=norm,
            implementation=gate.implementation,
        )
        return (
            self.down_proj(hidden, layer)
            if residual is None
            else self.down_proj.onto(residual, hidden, layer)
        )


class Experts(MLP):
    """The routed experts: MLPs stacked [*stack, n_routed_experts, ...]."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        super().__init__(make, (*stack, make.config.n_routed_experts), make.config.moe_intermediate_size)

    def grouped(self, x: Array, grouping: Grouping, layer: Layer) -> Array:
        """Every row through the expert of its group.

        Args:
            x: [R, hidden_size], sorted by expert.
            grouping: how the rows lie.

        Returns:
            [R, hidden_size].
        """
        down = self.down_proj
        hidden = grouped_swiglu(
            x,
            self.gate_proj.matrix(),
            self.up_proj.matrix(),
            grouping.sizes,
            visits=grouping.visits,
            layer=layer,
            activations=down.activations,
            scale_fmt=down.scale_fmt,
            implementation=down.implementation,
        )
        return grouped_matmul(
            hidden,
            down.matrix(),
            grouping.sizes,
            visits=grouping.visits,
            layer=layer,
            activations=down.activations,
            scale_fmt=down.scale_fmt,
            implementation=down.implementation,
        )


class MoE(nnx.Module):
    """Shared expert plus the routed experts' weighted sum; no token is ever dropped."""

    def __init__(self, make: Parameters, stack: tuple[int, ...]):
        config = make.config
        self.gate = Router(make, stack)
        self.experts = Experts(make, stack)
        self.shared_experts = MLP(make, stack, config.n_shared_experts * config.moe_intermediate_size)

    def __call__(self, x: Array, valid: Array, layer: Layer, norm: Norm) -> tuple[Array, "Routing"]:
        """x + MoE(norm(x)): every token goes to its experts.

        Args:
            x: [B, T, hidden_size].
            valid: bool [B, T]; padding is sent to no expert.

        Returns:
            [B, T, hidden_size], and the router's (ids [B * T, K], scores [B * T, E]).
        """
        rows = x.reshape(-1, x.shape[-1])
        routed, normed = self.gate.routed(rows, layer, norm)
        num_tokens, num_choices = routed.ids.shape
        num_experts = routed.scores.shape[-1]
        grouping = group_rows(
            routed.ids,
            valid.reshape(-1),
            num_groups=num_experts,
            row_tile=row_tile(num_tokens * num_choices, num_experts),
            implementation=self.gate.implementation,
        )
        out = self.experts.grouped(_take(normed, grouping.tokens), grouping, layer)
        chosen = _take(out, grouping.position).astype(jnp.float32)
        # Weighted here and not in the experts' kernel: that would first have to sort the weights as well.
        combined = (chosen * routed.weights[..., None]).sum(axis=1).astype(x.dtype)
        total = self.shared_experts(normed, layer) + combined
        return x + sum_over_tensor(total).reshape(x.shape), (routed.ids, routed.scores)


Routing = tuple[Array, Array]


def _take(rows: Array, index: Array) -> Array:
    """rows[index], int32 [...] that are in bounds: indexing by brackets would check them, in operations of its own."""
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(index.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return lax.gather(
        rows, index[..., None], dimensions, (1, rows.shape[1]), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS
    )
