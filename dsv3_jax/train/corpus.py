"""Text files as documents, and which of them are held out."""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

from dsv3_jax.errors import InputError

HELD_OUT_ONE_IN = 32
STDLIB = "stdlib"
_NOT_OUR_OWN = ("site-packages", "dist-packages", "__pycache__")


@dataclasses.dataclass(frozen=True)
class Document:
    """One file.

    Attributes:
        name: path relative to the corpus, with slashes; it decides whether the document is held out.
        text: all of the file; encoded in UTF-8 it is the file's bytes.
    """

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to measure with, no text in both.

    Attributes:
        skipped: names of files that are not UTF-8.
    """

    train: list[Document]
    held_out: list[Document]
    skipped: list[str]


def is_held_out(name: str) -> bool:
    """True for one name in 32, by SHA-256 of the name: independent of order, machine and the other files."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_corpus(data: str | Path, pattern: str | None = None) -> Corpus:
    """Reads every file below a folder that is UTF-8; of files with the same text, the first by name is taken.

    Args:
        data: a folder, or "stdlib": the sources of the running Python's standard library.
        pattern: glob that a file's name must match; "*.py" for the standard library and "*" elsewhere if None.

    Raises:
        InputError: no such folder, or it holds nothing to train on or nothing to hold out.
    """
    root = Path(sysconfig.get_path("stdlib")) if data == STDLIB else Path(data)
    if not root.is_dir():
        raise InputError(f"--data {data}: no such folder; expected a folder of text files or {STDLIB!r}")
    documents, skipped = _read_documents(root, pattern or ("*.py" if data == STDLIB else "*"))
    train = [document for document in documents if not is_held_out(document.name)]
    held_out = [document for document in documents if is_held_out(document.name)]
    if not train:
        raise InputError(f"--data {data}: no UTF-8 text in it to train on; expected at least one file")
    if not held_out:
        # A corpus of a few files may have no name that hashes to it; there must be something to measure with.
        held_out.append(train.pop())
    if not train:
        raise InputError(f"--data {data}: only one file with text; expected two, of which one is held out")
    return Corpus(train, held_out, skipped)


def _read_documents(root: Path, pattern: str) -> tuple[list[Document], list[str]]:
    documents, skipped, seen = [], [], set()
    for name in sorted(path.relative_to(root).as_posix() for path in root.rglob(pattern) if path.is_file()):
        if any(part in _NOT_OUR_OWN for part in name.split("/")):
            continue
        try:
            content = (root / name).read_bytes()
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            skipped.append(name)
            continue
        if text and content not in seen:
            seen.add(content)
            documents.append(Document(name, text))
    return documents, skipped
