"""Checkpoints in Hugging Face's layout: import, export, conversion, verification."""

from typing import TYPE_CHECKING, Any

from dsv3_jax.checkpoint.folder import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from dsv3_jax.checkpoint.load import load_params, stored_format
    from dsv3_jax.checkpoint.save import save_checkpoint

__all__ = ["Checkpoint", "load_params", "open_checkpoint", "save_checkpoint", "stored_format"]


def __getattr__(name: str) -> Any:
    # Conversion and inspection of headers start without JAX, which takes a second to import.
    if name in ("load_params", "stored_format"):
        from dsv3_jax.checkpoint import load

        return getattr(load, name)
    if name == "save_checkpoint":
        from dsv3_jax.checkpoint.save import save_checkpoint

        return save_checkpoint
    raise AttributeError(name)
