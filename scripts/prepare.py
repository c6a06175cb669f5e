r"""Turns text files into a folder of token shards to train on.

    python scripts/prepare.py --input book1.txt book2.txt --tokenizer char --out_dir prepared/books
    python scripts/train.py --config=configs/shakespeare.py --config.data.corpus=prepared/books

    python scripts/prepare.py --input 'web/part*.jsonl.gz' --tokenizer gpt2 \
        --val_fraction=0.001 --split_by=document --out_dir prepared/web

An input is a file, a folder (all files below it), a quoted pattern, or @FILE with one of these a
line. A file is UTF-8 text, one document, or holds a document in each line (.jsonl, .ndjson, .json)
or row (.parquet); .gz is decompressed. Files may be larger than memory. Documents are joined in the
order given; GPT-2's tokenizer puts <|endoftext|> between two of them. The folder appears whole or
not at all, and nothing is overwritten.
"""

import time

from absl import flags

from gpt2_jax import cli, prepare
from gpt2_jax.data import tokenizers
from gpt2_jax.errors import UsageError

INPUT = flags.DEFINE_multi_string(
    'input', [], 'Files, folders, patterns or @FILE: --input a b, or --input=a --input=b.'
)
TEXT_FIELD = flags.DEFINE_string(
    'text_field', 'text', 'The field of JSON Lines and Parquet files that holds the text.'
)
TOKENIZER = flags.DEFINE_enum('tokenizer', 'char', list(tokenizers.TOKENIZERS), 'What a token is.')
OUT_DIR = flags.DEFINE_string(
    'out_dir', None, 'The folder to write; it must not exist, or be empty.'
)
VAL_FRACTION = flags.DEFINE_float('val_fraction', 0.1, 'The part that is kept for validation.')
SPLIT_BY = flags.DEFINE_enum(
    'split_by',
    'corpus',
    prepare.SPLIT_BY,
    'What is kept for validation: the last characters of the corpus, whole documents evenly spread '
    'over the corpus, or the last characters of each file.',
)
SPECIAL_TOKENS = flags.DEFINE_bool(
    'special_tokens', False, 'Take <|endoftext|> in a text for the token, not for ordinary text.'
)
# 64 Mi tokens are 64 MB of characters: hashed in a fraction of a second; 100 GB are 1,500 files.
SHARD_TOKENS = flags.DEFINE_integer(
    'shard_tokens', 1 << 26, 'The largest number of tokens in a file.'
)


def main(more: list[str]) -> None:
    """Writes the folder and prints what it holds.

    `more` are arguments without a flag: of `--input a b` the flag takes a, and b is left over.
    """
    if len(INPUT.value) > 1 and more:
        raise UsageError(
            f'{more[0]!r} follows several --input flags, so the order of the texts is unclear: '
            f'give --input once, before all files, or once for each file'
        )
    if not INPUT.value or not OUT_DIR.value:
        raise UsageError(
            f'--{"out_dir" if INPUT.value else "input"} is missing: '
            f'python scripts/prepare.py --input FILES.. --tokenizer char|byte|gpt2 --out_dir DIR'
        )
    started = time.perf_counter()
    manifest = prepare.prepare(
        INPUT.value + more,
        OUT_DIR.value,
        tokenizer_name=TOKENIZER.value,
        val_fraction=VAL_FRACTION.value,
        shard_tokens=SHARD_TOKENS.value,
        text_field=TEXT_FIELD.value,
        split_by=SPLIT_BY.value,
        special_tokens=SPECIAL_TOKENS.value,
    )
    seconds = time.perf_counter() - started
    print('\n'.join(prepare.describe(manifest)))
    speed = manifest['inputs']['bytes'] / 1e6 / seconds
    print(f'wrote {OUT_DIR.value} in {seconds:.1f} s ({speed:.0f} MB/s)')


if __name__ == '__main__':
    cli.run(main)
