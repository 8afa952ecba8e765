"""What operations raise; imported without JAX, so that a command line can tell it from a mistake of its own."""


class ImplementationError(ValueError):
    """An implementation asked for by name that does not exist here or does not take the arguments."""
