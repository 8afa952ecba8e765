"""`Tokenizer` against what the files say, against `tiktoken`, and on the real tokenizer of DeepSeek-R1."""

import base64
import gzip
import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import InputError
from dsv3_jax.generate.tiktoken_file import KIMI_PATTERN, last_merge, read_ranks, tiktoken_backend
from dsv3_jax.generate.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from tests.tiny import ASSISTANT, BOS, CORPUS, EOS, USER, train_tokenizer, write_tokenizer_files

TEXTS = (
    "Hello, world! It's DON'T we'll",
    "def f(x):\n    return {'a': x ** 2}\n\n\n  # ok  \r\n\t",
    "中文English混合 汉字abc 北京市 Pascal 〇〡",
    "HTTPServer camelCase XMLHttpRequest ÀÉÎ ǅ ʰ",
    "1234567 12 ３４５６ ⅣⅤ ²³",
    "naïve café e\u0301 Straße ｆｕｌｌ",
    "🙂🚀👩‍👩‍👧‍👦 ☃\ufe0f �",
    " \u00a0\u2003x \u200b\u0085y \u3000 z   ",
    "ｱｲｳ カタカナ ひらがな 한국어 ไทย हिन्दी العربية",
    "",
    " ",
    "\n",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_files: list[Path]) -> Tokenizer:
    loaded = load_tokenizer(tiny_tokenizer_files[0].parent)
    assert loaded is not None
    return loaded


def folder_with(folder: Path, *, adds_bos: bool = False, **fields: object) -> Path:
    """A folder with these fields of the config changed; `adds_bos`: the post-processor adds BOS."""
    write_tokenizer_files(folder)
    if adds_bos:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return folder


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@given(text=st.text())
@settings(max_examples=200)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


def test_special_tokens_in_a_text_become_their_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{BOS}{USER}a{ASSISTANT}{EOS}", add_bos=False)
    assert ids == [0, 2, *tokenizer.encode("a", add_bos=False), 3, 1]
    assert tokenizer.decode(ids) == f"{BOS}{USER}a{ASSISTANT}{EOS}"
    assert tokenizer.decode(ids, skip_special=True) == "a"


def test_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (BOS, 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, 1)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([0, 299, 300, 5000]) == tokenizer.decode([0, 299])


@pytest.mark.parametrize("adds_bos", [False, True], ids=["plain file", "post-processor adds BOS"])
@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_there_is_one_bos_where_the_config_says_so(
    tmp_path: Path, adds_bos: bool, add_bos_token: bool | None
) -> None:
    tokenizer = loaded(folder_with(tmp_path, adds_bos=adds_bos, add_bos_token=add_bos_token))
    a = tokenizer.encode("a", add_bos=False)
    assert 0 not in a
    wanted = adds_bos if add_bos_token is None else add_bos_token
    assert tokenizer.encode("a") == ([0, *a] if wanted else a)
    assert tokenizer.encode("a", add_bos=True) == [0, *a]
    assert tokenizer.encode(f"{BOS}a") == [0, *a]
    assert tokenizer.encode(f"{BOS}a", add_bos=True) == [0, *a]


def test_no_bos_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = loaded(folder_with(tmp_path, bos_token=None, add_bos_token=None, eos_token=None))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)
    with pytest.raises(InputError, match="no BOS"):
        tokenizer.encode("a", add_bos=True)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    write_tokenizer_files(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox jumps over the lazy dog"
    assert loaded(tmp_path).decode(loaded(tmp_path).encode(text, add_bos=False)) == text


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="character 1"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bos_token": "<nowhere>"}, "bos_token is '<nowhere>'"),
        ({"eos_token": {"content": 7}}, "eos_token is 7"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ({"bos_token": None}, "add_bos_token is true"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is malformed"),
        ({"chat_template": 3}, "chat_template is malformed"),
    ],
)
def test_a_malformed_config_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: {message}"):
        load_tokenizer(folder_with(tmp_path, **fields))


def test_a_malformed_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_gives_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [(None, (1, 7)), ({}, (1, 7)), ({"eos_token_id": 9}, (1, 7, 9)), ({"eos_token_id": [9, 7]}, (1, 7, 9))],
)
def test_eos_ids_of_all_files_count(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tokenizer: Tokenizer,
    generation_config: dict[str, object] | None,
    expected: tuple[int, ...],
) -> None:
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    config = ModelConfig(**{**vars(tiny_config), "eos_token_id": (7,)})
    assert eos_token_ids(tmp_path, config, tokenizer) == expected
    assert eos_token_ids(tmp_path, config, None) == tuple(i for i in expected if i != 1)


def test_a_malformed_generation_config_is_refused(tmp_path: Path, tiny_config: ModelConfig) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        eos_token_ids(tmp_path, tiny_config, None)


# tiktoken.model


def byte_ranks(*tokens: bytes) -> dict[bytes, int]:
    """Ranks of the 256 bytes and then of `tokens`."""
    return {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + list(tokens))}


def byte_table() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def trained_ranks(size: int) -> dict[bytes, int]:
    """Ranks of a BPE that is trained on Kimi's words."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(KIMI_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *TEXTS] * 4, trainer)
    table = byte_table()
    return {bytes(table[c] for c in token): rank for token, rank in backend.get_vocab().items()}


def write_tiktoken(folder: Path, ranks: dict[bytes, int], **config: object) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tiktoken_file_encodes_as_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks(600)
    names = {len(ranks): "[BOS]", len(ranks) + 1: "[EOS]", len(ranks) + 4: "<|im_end|>"}
    decoder = {str(token_id): {"content": name, "special": True} for token_id, name in names.items()}
    tokenizer = loaded(
        write_tiktoken(
            tmp_path,
            ranks,
            tokenizer_class="TikTokenTokenizer",
            bos_token="[BOS]",
            eos_token="[EOS]",
            added_tokens_decoder=decoder,
        )
    )
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), len(ranks) + 5)}
    reference = tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in (*TEXTS, *CORPUS, "a[BOS]b<|im_end|>", f"x<|reserved_token_{len(ranks) + 2}|>y"):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == reference.n_vocab == len(ranks) + 5
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(ranks), len(ranks) + 1)
    assert tokenizer.add_bos_token is False


@pytest.mark.parametrize("seed", range(20))
def test_any_ranks_merge_as_in_tiktoken(seed: int) -> None:
    """Ranks that no training would give: tokens that rank before their parts, or split in several ways."""
    tiktoken = pytest.importorskip("tiktoken")
    rng = random.Random(seed)
    words = ["".join(p) for n in range(2, 6) for p in itertools.product("ab", repeat=n)]
    tokens = [word.encode() for word in rng.sample(words, 25)]
    ranks = byte_ranks(*tokens)
    reference = tiktoken.Encoding("ab", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens={})
    backend = tiktoken_backend(ranks, {})
    for _ in range(200):
        text = "".join(rng.choices("ab", k=rng.randint(1, 16)))
        assert backend.encode(text).ids == reference.encode(text), text


def test_pattern_splits_every_character_as_tiktoken() -> None:
    """Each character between letters, with all neighbours joined where they are in one word."""
    tiktoken = pytest.importorskip("tiktoken")
    # Latin, Greek, marks, punctuation, numbers, symbols, kana, Han, Hangul, full width.
    blocks = [
        (0, 0x530),
        (0x2000, 0x2C00),
        (0x2E80, 0x3400),
        (0x9FA0, 0xA000),
        (0xAC00, 0xAC20),
        (0xFE00, 0xFFF0),
    ]
    characters = [chr(c) for low, high in blocks for c in range(low, high)]
    joined = {f"a{c}".encode() for c in characters} | {f"{c}b".encode() for c in characters} | {b"ab"}
    pieces = {token[:n] for token in joined for n in range(2, len(token) + 1)} - {
        bytes([b]) for b in range(256)
    }
    pieces |= {c.encode() for c in characters if len(c.encode()) > 1} | {c.encode()[:2] for c in characters}
    ranks = byte_ranks(*sorted({piece for piece in pieces if len(piece) > 1}, key=lambda p: (len(p), p)))
    reference = tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens={})
    backend = tiktoken_backend(ranks, {})
    texts = [f"a{c}b {c} {c}{c}\n{c}中{c}1" for c in characters]
    assert [e.ids for e in backend.encode_batch(texts)] == reference.encode_batch(texts)


def test_last_merge_takes_the_leftmost_of_equals() -> None:
    ranks = byte_ranks(b"ab", b"ba", b"aba")
    assert last_merge(b"aba", ranks) == (b"ab", b"a")
    assert last_merge(b"aba", byte_ranks(b"ba", b"ab", b"aba")) == (b"a", b"ba")
    assert last_merge(b"abc", byte_ranks(b"abc")) is None
    assert last_merge(b"a", ranks) is None
    # A whole word is its token, though nothing merges to it.
    assert tiktoken_backend(byte_ranks(b"abc"), {}).encode("abc").ids == [256]


def test_tokens_that_are_not_special_stay_in_the_text(tmp_path: Path) -> None:
    decoder = {"256": {"content": "[BOS]"}, "257": {"content": "<think>", "special": False}}
    tokenizer = loaded(write_tiktoken(tmp_path, byte_ranks(), added_tokens_decoder=decoder))
    ids = tokenizer.encode("[BOS]<think>a")
    assert ids == [256, 257, ord("a")]
    assert tokenizer.decode(ids, skip_special=True) == "<think>a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("YQ== 0\nnot base64! 1\n", "line 2 is not a base64 token and its rank"),
        ("YQ== zero\n", "line 1 is not a base64 token"),
        ("YQ== 0\nYg== 2\n", "ranks have gaps or repeat"),
        ("YQ== 0\nYg== 1\n", "254 of the 256 single bytes"),
    ],
)
def test_a_malformed_tiktoken_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tiktoken.model"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"tiktoken\.model: {message}"):
        read_ranks(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "QWenTokenizer"}, "tokenizer_class is 'QWenTokenizer'"),
        ({"added_tokens_decoder": {"3": {"content": "[BOS]"}}}, r"'\[BOS\]' cannot have id 3"),
        ({"added_tokens_decoder": {"256": {"content": "x"}, "257": {"content": "x"}}}, "'x' cannot have id"),
        ({"added_tokens_decoder": {"256": "[BOS]"}}, "added_tokens_decoder is malformed"),
    ],
)
def test_an_unknown_tiktoken_config_is_refused(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_tiktoken(tmp_path, byte_ranks(), **config))


def test_tokenizer_json_stands_above_tiktoken_model(tmp_path: Path) -> None:
    write_tiktoken(tmp_path, byte_ranks())
    train_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert loaded(tmp_path).vocab_size == 300


# The real tokenizer


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = os.environ.get("DSV3_REAL_FACTS")
    if not facts:
        pytest.skip("DSV3_REAL_FACTS is not set: no real tokenizer at hand")
    folder = tmp_path_factory.mktemp("real")
    with gzip.open(Path(facts) / "tokenizer" / "tokenizer.json.gz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    shutil.copy(Path(facts) / "tokenizer" / "tokenizer_config.json", folder)
    return folder


def test_the_real_tokenizer(real_folder: Path) -> None:
    tokenizer = loaded(real_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (0, 1, 128815)
    assert tokenizer.encode("Hello") == [0, 19923]
    assert tokenizer.encode("Hello", add_bos=False) == [19923]
    ids = tokenizer.encode("<｜User｜>Hello<｜Assistant｜><think>", add_bos=False)
    assert ids == [128803, 19923, 128804, 128798]
    assert tokenizer.decode([0, *ids, 1], skip_special=True) == "<｜User｜>Hello<｜Assistant｜><think>"
    for text in (*TEXTS, *CORPUS):
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


def test_real_merges_follow_from_ranks(real_folder: Path) -> None:
    """Were DeepSeek's vocabulary stored as a tiktoken.model, its 127,741 merges would come out, in order."""
    model = json.loads((real_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    table = byte_table()
    characters = {byte: character for character, byte in table.items()}
    vocab = {token: rank for token, rank in model["vocab"].items() if set(token) <= table.keys()}
    ranks = {bytes(table[c] for c in token): rank for token, rank in vocab.items()}
    pairs = [
        last_merge(token, ranks) for token in sorted(ranks, key=lambda token: ranks[token]) if len(token) > 1
    ]
    merges = [" ".join("".join(characters[byte] for byte in part) for part in pair) for pair in pairs if pair]
    assert merges == model["merges"]
