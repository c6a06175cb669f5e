"""Evaluates a checkpoint: on its own corpus, on any text, or on LAMBADA's passages.

    python scripts/evaluate.py --ckpt_dir=runs/quickstart
    python scripts/evaluate.py --ckpt_dir=runs/quickstart --step=latest --split=train

A whole split of the checkpoint's own corpus gives the same figures that training printed.

    python scripts/evaluate.py --ckpt_dir=runs/gpt2 --text=wiki.test.tokens --detokenizer=wikitext

--text names any text (file, .jsonl, .parquet, corpus by name), a prepared folder, or .bin files by
a pattern. --stride=32 gives each target more context.

    python scripts/evaluate.py --ckpt_dir=runs/gpt2 --lambada=lambada_test.jsonl

--lambada predicts the last word of each passage.
"""

import json

from absl import flags

from gpt2_jax import cli, files
from gpt2_jax.errors import UsageError
from gpt2_jax.inference import detokenizers
from gpt2_jax.progress import Progress

_CKPT_DIR = flags.DEFINE_string(
    'ckpt_dir', None, "A run's folder, or the folder of a converted model.", required=True
)
_STEP = flags.DEFINE_string('step', 'best', "The checkpoint: 'best', 'latest' or a number.")
_SPLIT = flags.DEFINE_enum(
    'split', None, ['val', 'train'], 'The split of a corpus or prepared folder; val by default.'
)
_CORPUS = flags.DEFINE_string(
    'corpus', None, "Where the checkpoint's own corpus is now, if it was moved since training."
)
_TEXT = flags.DEFINE_string(
    'text', None, "A text or tokens to score instead of the checkpoint's own corpus."
)
_LAMBADA = flags.DEFINE_string(
    'lambada', None, 'Passages whose last words are scored: a .jsonl or .parquet file.'
)
_CONTEXT = flags.DEFINE_integer(
    'context', None, 'Tokens per window; by default as trained.', lower_bound=1
)
_STRIDE = flags.DEFINE_integer(
    'stride',
    None,
    'Windows begin this many tokens apart. All but the first count only their last STRIDE tokens. '
    'By default the context: windows do not overlap.',
    lower_bound=1,
)
_DETOKENIZER = flags.DEFINE_enum(
    'detokenizer',
    'none',
    list(detokenizers.RULES),
    'The corpus whose way of spacing is undone before scoring.',
)
_TEXT_FIELD = flags.DEFINE_string(
    'text_field', 'text', 'The field of .jsonl and .parquet files that has the text.'
)
_ROWS = flags.DEFINE_integer(
    'batch_size', None, 'Windows at a time; by default as trained, 8 for texts.', lower_bound=1
)
_MAX_TOKENS = flags.DEFINE_integer(
    'max_tokens',
    None,
    'Evaluate windows with at most this many tokens, evenly spread over the text; 0: all. By '
    'default all of a text, and as in training of its own corpus.',
    lower_bound=0,
)
_PROTOCOL = flags.DEFINE_enum(
    'protocol',
    'plain',
    ['plain', 'lm_eval'],
    'plain: the text as one sequence; lm_eval: each document by itself, as lm-evaluation-harness.',
)
_JSON = flags.DEFINE_bool('json', False, 'Print the figures as one line of JSON, with all digits.')
_PLATFORM = cli.platform_flag()


def main(arguments: list[str]) -> None:
    """Calls the library once and prints the figures."""
    cli.no_more(arguments)
    for flag in (_TEXT, _LAMBADA, _CORPUS):
        if flag.value == '':
            raise UsageError(f'--{flag.name} is empty: expected a file')
    if _LAMBADA.value is not None:
        context = 'with --lambada'
        unused = [_CORPUS, _TEXT, _SPLIT, _STRIDE, _DETOKENIZER, _MAX_TOKENS, _PROTOCOL]
    elif _TEXT.value is None:
        context, unused = 'without --text', [_DETOKENIZER, _TEXT_FIELD, _PROTOCOL]
    elif _PROTOCOL.value == 'lm_eval':
        context = 'with --protocol=lm_eval'
        unused = [_CORPUS, _SPLIT, _STRIDE, _MAX_TOKENS]
    else:
        context, unused = 'with --text', [_CORPUS]
    cli.refuse(unused, context)
    with Progress('loading'):
        from gpt2_jax.inference import harness, lambada, score
        from gpt2_jax.parallel import devices
        from gpt2_jax.workdir import restore

    devices.select_platform(_PLATFORM.value)
    restored = restore.load(files.user_path(_CKPT_DIR.value), _STEP.value)
    if _CORPUS.value is not None:
        restored.config.data.corpus = _CORPUS.value
    options = {'context': _CONTEXT.value, **({'rows': _ROWS.value} if _ROWS.present else {})}
    if _LAMBADA.value is not None:
        result = lambada.score_lambada(
            restored, _LAMBADA.value, text_field=_TEXT_FIELD.value, **options
        )
    elif _TEXT.value is not None:
        options |= {'detokenizer': _DETOKENIZER.value, 'text_field': _TEXT_FIELD.value}
        if _PROTOCOL.value == 'lm_eval':
            result = harness.score_documents(restored, _TEXT.value, **options)
        else:
            options |= {'stride': _STRIDE.value, 'max_targets': _MAX_TOKENS.value or 0}
            result = score.score_text(restored, _TEXT.value, split=_SPLIT.value, **options)
    else:
        options |= {'stride': _STRIDE.value, 'max_targets': _MAX_TOKENS.value}
        with cli.corpus_hint(restored.config.data.corpus):
            result = score.score_corpus(restored, split=_SPLIT.value or 'val', **options)
    if _JSON.value:
        print(json.dumps({'step': restored.step, **result.figures()}))
    else:
        print(f'step {restored.step}, {result}')


if __name__ == '__main__':
    cli.run(main)
