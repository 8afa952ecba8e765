"""The tokenizer of the small checkpoint that tests share: trained here, so that no file has to be stored."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS, EOS, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking }}{% endif %}"
)

CORPUS = (
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog. It's the dog's turn now.\n",
    "für größere Straßen, naïve café; 你好，世界。 こんにちは 🙂🚀\n",
    "1234567890 12345\n\n\tif x == 10:\n\t\treturn [1, 2, 3]\n",
)


def train_tokenizer(vocab_size: int = 300) -> tokenizers.Tokenizer:
    """A byte-level BPE as DeepSeek's, trained on a few lines; ids 0 to 3 are BOS, EOS, User and Assistant."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def write_tokenizer_files(folder: Path) -> list[Path]:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`; returns their paths."""
    train_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": BOS, "normalized": False},
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    return sorted(folder.glob("*.json"))
