from pathlib import Path

import pytest

from dsv3_jax.errors import InputError
from dsv3_jax.train.corpus import STDLIB, Corpus, is_held_out, read_corpus


def test_every_file_is_on_exactly_one_side(corpus: Corpus, text_folder: Path) -> None:
    train, held_out = ({document.name for document in side} for side in (corpus.train, corpus.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert train | held_out == {
        path.relative_to(text_folder).as_posix() for path in text_folder.rglob("*.py")
    }


def test_the_split_depends_on_the_name_alone(corpus: Corpus, text_folder: Path, tmp_path: Path) -> None:
    name = corpus.held_out[0].name
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for other in (name, corpus.train[0].name, corpus.train[1].name):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text(f"another text: {other}", encoding="utf-8")
    assert [document.name for document in read_corpus(tmp_path).held_out] == [name]


def test_one_name_in_32_is_held_out() -> None:
    share = sum(is_held_out(f"module_{number}.py") for number in range(32_000)) / 32_000
    assert 0.8 / 32 < share < 1.2 / 32


def test_reading_is_deterministic_and_exact(corpus: Corpus, text_folder: Path) -> None:
    assert read_corpus(text_folder) == corpus
    for document in corpus.train + corpus.held_out:
        content = (text_folder / document.name).read_bytes()
        assert document.text.encode() == content
        assert document.num_bytes == len(content)


def test_line_ends_and_byte_order_marks_stay(tmp_path: Path) -> None:
    content = "\ufeffone\r\ntwo\rthree\n".encode()
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"other")
    corpus = read_corpus(tmp_path)
    assert content in [document.text.encode() for document in corpus.train + corpus.held_out]


def test_files_that_are_not_utf8_are_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# größer".encode("latin-1"))
    (tmp_path / "a.py").write_text("a", encoding="utf-8")
    (tmp_path / "b.py").write_text("b", encoding="utf-8")
    corpus = read_corpus(tmp_path)
    assert corpus.skipped == ["latin.py"]
    assert {document.name for document in corpus.train + corpus.held_out} == {"a.py", "b.py"}


def test_texts_are_taken_once_and_empty_ones_not_at_all(tmp_path: Path) -> None:
    for name, text in {"a": "same", "b": "same", "c": "other", "d": ""}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    corpus = read_corpus(tmp_path)
    assert sorted(document.text for document in corpus.train + corpus.held_out) == ["other", "same"]


def test_a_pattern_chooses_files(text_folder: Path) -> None:
    corpus = read_corpus(text_folder, "file1*.py")
    names = [document.name.rsplit("/")[-1] for document in corpus.train + corpus.held_out]
    assert len(names) == 11
    assert all(name.startswith("file1") for name in names)


def test_the_standard_library_is_read_without_installed_packages() -> None:
    corpus = read_corpus(STDLIB, "a*.py")
    assert all(document.name.endswith(".py") for document in corpus.train)
    assert "ast.py" in {document.name for document in corpus.train + corpus.held_out}
    assert not any("site-packages" in document.name for document in corpus.train + corpus.held_out)


def test_no_folder_and_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_corpus(tmp_path / "absent")
    with pytest.raises(InputError, match="no UTF-8 text"):
        read_corpus(tmp_path)
    (tmp_path / "only").write_text("text", encoding="utf-8")
    with pytest.raises(InputError, match="expected two"):
        read_corpus(tmp_path)
