"""Sessions: `oldest` and `newest` run the tests with the oldest and the newest JAX, `lint` checks style and types."""

import nox

nox.options.default_venv_backend = "venv"
OLDEST = ("jax==0.10.2", "flax==0.12.8", "optax==0.2.8")


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The whole suite with the oldest packages that pyproject.toml admits."""
    session.install(*OLDEST, "-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python=["3.12", "3.13", "3.14"])
def newest(session: nox.Session) -> None:
    """The quick part with the newest packages that this Python gets."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("pytest", "-n", "2", "-m", "not slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
