"""The state of a run in one safetensors file, from which it goes on as if it had never stopped."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dsv3_jax.errors import InputError
from dsv3_jax.train.step import TrainState

STATE_FILE = "training_state.safetensors"


def save_state(folder: Path, state: TrainState) -> None:
    """Writes the state into a folder; the file of an earlier step is there until this one is complete."""
    scratch = folder / f"{STATE_FILE}.partial"
    try:
        save_file({name: np.asarray(leaf) for name, leaf in _named_leaves(state)}, scratch)
        scratch.replace(folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / STATE_FILE}: cannot be written ({error})") from error


def load_state(folder: Path, like: TrainState) -> TrainState:
    """Reads a state.

    Args:
        like: a state of the same run, from which the structure is taken.

    Raises:
        InputError: there is none, it cannot be read, or it is of another model.
    """
    path = folder / STATE_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected the state of an earlier run") from error
    named = _named_leaves(like)
    wrong = [name for name, leaf in named if name not in tensors or tensors[name].shape != leaf.shape]
    if wrong or len(tensors) != len(named):
        raise InputError(
            f"{path}: does not fit the config; expected the state of the same model", tuple(wrong)
        )
    leaves = [jnp.asarray(tensors[name]) for name, _ in named]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named_leaves(state: TrainState) -> list[tuple[str, jax.Array]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
