"""AdamW with a warm-up-stable-decay schedule (paper section 4.2; schedule of MiniCPM, arXiv 2404.06395)."""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

WARM_UP_STEPS = 100
DECAY_FRACTION = 0.5


def learning_rate_at(step: ArrayLike, *, peak: float, num_steps: int) -> Array:
    """Linear warm-up, a plateau, and a linear decay to nothing over the second half.

    Until the decay begins it does not depend on `num_steps`: a run may be resumed with another number of steps, to
    go on longer or to begin the decay at once.

    Args:
        step: from 0.
        peak: the plateau.
        num_steps: of the whole run.

    Returns:
        float32 scalar.
    """
    warm_up = (jnp.asarray(step, jnp.float32) + 1) / WARM_UP_STEPS
    decay = (num_steps - jnp.asarray(step, jnp.float32)) / max(num_steps * DECAY_FRACTION, 1)
    return peak * jnp.clip(jnp.minimum(warm_up, decay), 0, 1)


def make_optimizer(peak: float, num_steps: int) -> optax.GradientTransformation:
    """AdamW with the paper's betas 0.9 and 0.95, weight decay 0.1 (of matrices only) and gradients clipped to 1."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda step: learning_rate_at(step, peak=peak, num_steps=num_steps),
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            mask=_is_decayed,
        ),
    )


def _is_decayed(params: dict) -> dict:
    def decayed(path: tuple, _: Array) -> bool:
        names = [key.key for key in path]
        return not any("norm" in name or name == "e_score_correction_bias" for name in names)

    return jax.tree_util.tree_map_with_path(decayed, params)
