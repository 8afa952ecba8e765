"""A folder of small text files to train on."""

from pathlib import Path

import pytest

from dsv3_jax.train.corpus import Corpus, is_held_out, read_corpus


def function_text(number: int) -> str:
    """A line of Python that a model of any size can learn the pattern of."""
    return "".join(f"def f{number}_{i}(x):\n    return x + {i}\n\n" for i in range(8))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files of Python, some of them below a folder; at least one is held out."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "inner").mkdir()
    names = [f"{'inner/' if number % 3 else ''}file{number}.py" for number in range(60)]
    for number, name in enumerate(names):
        (folder / name).write_text(function_text(number), encoding="utf-8")
    assert any(map(is_held_out, names))
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder: Path) -> Corpus:
    return read_corpus(text_folder)
