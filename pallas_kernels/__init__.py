"""Operations of DeepSeek-V3 that are worth a kernel, each with a plain `jax.numpy` definition.

One folder an operation: the public function in `__init__.py`, its definition in `reference.py`, which is also the
path of every platform without a kernel. Nothing here knows of a model.
"""
