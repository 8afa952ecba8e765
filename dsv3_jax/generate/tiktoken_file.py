"""Reads a `tiktoken.model` (Kimi-K2, Moonlight) into a byte-level BPE of the `tokenizers` package.

Those checkpoints come with Python code that wraps the `tiktoken` package. None of it is run: the file holds
the tokens and their ranks, and the one thing that is only in that code, the pattern that splits a text into
words, is written down here.
"""

import base64
import binascii
import itertools
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsv3_jax.errors import InputError

# `pat_str` of tokenization_kimi.py and tokenization_moonshot.py. Oniguruma, the regex engine of `tokenizers`,
# reads `&&` in a character class as fancy-regex, the engine of `tiktoken`, does: an intersection that binds
# weaker than the union of what stands beside it.
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a `tiktoken.model`: a line for each token, base64 of its bytes, a space, its rank (its id).

    Raises:
        InputError: the file cannot be read, a line is malformed (it is named), ranks are not 0, 1, 2, ..., or
            a single byte has no token, so that not every text could be encoded.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{path}: line {number} is not a base64 token and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: ranks have gaps or repeat; expected 0 to {len(ranks) - 1}, each once")
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise InputError(f"{path}: {missing} of the 256 single bytes have no token; expected all of them")
    return ranks


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The pair of tokens that `tiktoken` joins to make `token`; None where it never makes it from parts.

    `tiktoken` joins, again and again, the neighbours whose union has the lowest rank, the leftmost of equals.
    What lies around a token cannot change the order in which its own bytes are joined, hence there is one
    such pair, and a BPE with exactly these merges in the order of their ranks gives what `tiktoken` gives.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    none = len(ranks)
    while len(parts) > 2:
        joined = [ranks.get(left + right, none) for left, right in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest == none:
            return None
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def tiktoken_backend(
    ranks: Mapping[bytes, int], added: Mapping[int, tokenizers.AddedToken]
) -> tokenizers.Tokenizer:
    """A `tokenizers` tokenizer that encodes as `tiktoken` does with Kimi's pattern.

    Args:
        ranks: id of every ordinary token, by its bytes; as `read_ranks` gives them.
        added: tokens that are found in a text before it is split, by id; ids follow on those of `ranks`. Gaps
            are filled as Kimi's code does, with `<|reserved_token_ID|>`.

    Raises:
        InputError: an added token's id is taken by an ordinary token, or its text appears twice.
    """
    character = _byte_characters()

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    ordered = sorted(ranks, key=lambda token: ranks[token])
    pairs = (last_merge(token, ranks) for token in ordered if len(token) > 1)
    merges = [(written(pair[0]), written(pair[1])) for pair in pairs if pair is not None]
    vocab = {written(token): ranks[token] for token in ordered}
    # ignore_merges: a whole word that is a token is that token, also where merging would not arrive at it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(KIMI_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ids = range(len(ranks), max(added, default=-1) + 1)
    backend.add_tokens([added.get(token_id) or _reserved(token_id) for token_id in ids])
    for token_id, token in added.items():
        if backend.token_to_id(token.content) != token_id:
            raise InputError(
                f"added_tokens_decoder: {token.content!r} cannot have id {token_id}; expected a text of its "
                f"own and an id from {len(ranks)} on, above those of tiktoken.model"
            )
    return backend


def _reserved(token_id: int) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(f"<|reserved_token_{token_id}|>", normalized=False, special=True)


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
