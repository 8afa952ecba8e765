"""Text out of token ids as they come: whole characters, and nothing of a stop string."""

import functools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from dsv3_jax.errors import InputError
from dsv3_jax.generate.stream import IncrementalDecoder, StopStrings, TextStream
from dsv3_jax.generate.tokenizer import Tokenizer, load_tokenizer

IDS = st.lists(st.integers(0, 303), max_size=24)  # 300 and more are no token


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_files: list[Path]) -> Tokenizer:
    loaded = load_tokenizer(tiny_tokenizer_files[0].parent)
    assert loaded is not None
    return loaded


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for every byte, so that every character of several bytes lies in several tokens."""
    characters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in characters]
    written = [chr(b) if b in characters else chr(256 + others.index(b)) for b in data]
    ids = [tokenizer.backend.token_to_id(character) for character in written]
    assert None not in ids
    return [i for i in ids if i is not None]


@given(ids=IDS, cuts=st.lists(st.integers(1, 4), min_size=24, max_size=24), skip_special=st.booleans())
@settings(max_examples=300)
def test_pieces_make_the_text(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip_special: bool
) -> None:
    decode = functools.partial(tokenizer.decode, skip_special=skip_special)
    decoder, given_out, start = IncrementalDecoder(decode), "", 0
    for cut in cuts:
        given_out += decoder.feed(ids[start : start + cut])
        start += cut
        assert decode(ids).startswith(given_out)
    assert given_out + decoder.finish() == decode(ids)


def test_a_character_comes_out_when_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer.decode)
    pieces = [decoder.feed([token_id]) for token_id in byte_ids(tokenizer, "aé🙂你b".encode())]
    assert pieces == ["a", "", "é", "", "", "", "🙂", "", "", "你", "b"]
    assert decoder.finish() == ""


def test_a_real_replacement_character_is_text(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer.decode)
    text = "".join(decoder.feed([i]) for i in byte_ids(tokenizer, "a�b".encode()))
    assert text == "a�b"


def test_bytes_that_are_no_text_come_out_as_replacements(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer.decode)
    pieces = [decoder.feed([i]) for i in byte_ids(tokenizer, b"\xff\xfe\xf0\x9f\x99a\xe4\xbd")]
    # The last of them is held back until it is certain that it begins no character.
    assert pieces == ["", "�", "�", "", "", "�a", "", ""]
    assert decoder.finish() == "�"


def test_a_special_token_between_the_bytes_of_a_character(tokenizer: Tokenizer) -> None:
    first, second = byte_ids(tokenizer, "é".encode())
    for skip_special in (True, False):
        decoder = IncrementalDecoder(functools.partial(tokenizer.decode, skip_special=skip_special))
        text = "".join(decoder.feed([i]) for i in (first, 1, second)) + decoder.finish()
        assert text == ("é" if skip_special else "�<｜end▁of▁sentence｜>�")


def test_decoders_that_treat_the_first_token_differently() -> None:
    """Metaspace drops the space before the first word of what it decodes, and of that only."""
    backend = Backend(models.BPE(vocab={"▁a": 0, "▁b": 1, "c": 2}, merges=[]))
    backend.decoder = decoders.Metaspace()
    decoder = IncrementalDecoder(Tokenizer(backend).decode)
    assert [decoder.feed([i]) for i in (0, 1, 2, 1)] == ["a", " b", "c", " b"]


# Stop strings

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut_by_hand(text: str, stops: list[str]) -> str:
    """The definition: of all occurrences the one that ends first counts, and the longest of those."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return text


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(1, 5), min_size=12, max_size=12))
@settings(max_examples=500)
def test_text_is_cut_wherever_the_pieces_end(text: str, stops: list[str], cuts: list[int]) -> None:
    finder, given_out, start = StopStrings(stops), "", 0
    expected = cut_by_hand(text, stops)
    for cut in cuts:
        given_out += finder.feed(text[start : start + cut])
        start += cut
        assert expected.startswith(given_out)
    assert given_out + finder.finish() == expected
    assert finder.stopped == any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    finder = StopStrings(["\n\ndef"])
    assert finder.feed("a\n") == "a"
    assert finder.feed("\nd") == ""
    assert finder.feed("x\n") == "\n\ndx"
    assert (finder.feed("\ndef f"), finder.stopped) == ("", True)
    assert finder.feed("more") + finder.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="--stop is empty"):
        StopStrings(["a", ""])


@given(ids=IDS, stops=st.lists(st.text("a e\né", min_size=1, max_size=2), max_size=2))
@settings(max_examples=300)
def test_a_stream_takes_ids_up_to_the_one_that_completes_a_stop_string(
    tokenizer: Tokenizer, ids: list[int], stops: list[str]
) -> None:
    stream = TextStream(tokenizer.decode, stops)
    pieces = stream.feed(ids) + stream.finish()
    assert pieces == stream.text == cut_by_hand(tokenizer.decode(ids), stops)
    if stream.stopped:
        assert stream.token_ids == ids[: len(stream.token_ids)]
        assert not any(stop in tokenizer.decode(stream.token_ids[:-1]) for stop in stops)
    else:
        assert stream.token_ids == ids


def test_a_stop_string_over_the_border_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a cup of 茶 today", add_bos=False)
    stream = TextStream(tokenizer.decode, ["f 茶 t"])
    assert stream.feed(ids) + stream.finish() == "a cup o"
    assert stream.stopped
    assert stream.feed(ids) == ""
