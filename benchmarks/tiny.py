"""Bits per byte of held-out files by a trained checkpoint as it is stored, next to `xz -9` and `zstd -19`.

    python benchmarks/tiny.py [--checkpoint DIR] [--data DIR|stdlib] [--length 512]

The compressors get the same bytes as one stream; `zstd` is the command of that name, left out where there is none.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from dsv3_jax.checkpoint import load_params, open_checkpoint, stored_format
from dsv3_jax.errors import InputError
from dsv3_jax.generate.tokenizer import load_tokenizer
from dsv3_jax.precision import Precision
from dsv3_jax.train.batches import pack
from dsv3_jax.train.corpus import STDLIB, read_corpus
from dsv3_jax.train.evaluate import bits_per_byte, xz_bits_per_byte

BUNDLED = Path(__file__).resolve().parent.parent / "dsv3_jax" / "tiny"


def model_bits_per_byte(folder: Path, texts: list[str], length: int) -> float:
    """Bits per byte by the checkpoint in a folder; every token is predicted from at least length / 2 before it."""
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{folder}: no tokenizer; expected tokenizer.json")
    return bits_per_byte(
        load_params(checkpoint, "stored"),
        pack(tokenizer.backend, texts),
        len("".join(texts).encode("utf-8")),
        length=length,
        context=length // 2,
        config=checkpoint.config,
        precision=Precision(weights=stored_format(checkpoint), activations="none", dtype="float32"),
    )


def zstd_bits_per_byte(data: bytes) -> float:
    """Size of `zstd -19` of the bytes as one stream, in bits per byte of them."""
    packed = subprocess.run(
        ["zstd", "-19", "--stdout"], input=data, stdout=subprocess.PIPE, check=True
    ).stdout
    return 8 * len(packed) / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--data", default=STDLIB)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    texts = [document.text for document in read_corpus(args.data).held_out]
    data = "".join(texts).encode("utf-8")
    print(f"{len(texts)} held-out files, {len(data)} bytes; bits per byte:")
    print(f"  model     {model_bits_per_byte(args.checkpoint, texts, args.length):.4f}")
    print(f"  xz -9     {xz_bits_per_byte(data):.4f}")
    if shutil.which("zstd"):
        print(f"  zstd -19  {zstd_bits_per_byte(data):.4f}")


if __name__ == "__main__":
    main()
