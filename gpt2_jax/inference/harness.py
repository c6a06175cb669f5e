r"""The protocol of lm-evaluation-harness for the loss on a text: each document by itself.

Gao et al. 2021, "A framework for few-shot language model evaluation", tasks
`loglikelihood_rolling`. On the model that scripts/convert.py exports, the harness gives the same
figures:

- A document starts from <|endoftext|>, so that its first token is a target too.
- A window has all positions of the model, and begins with the last token of the window before. The
  last window of a long document is moved back until it is full; its new targets count.
- <|endoftext|> in a text is the special token.
- Words are the parts of re.split(r'\s+', document), bytes are its UTF-8, both before de-tokenizing.
"""

import re
from collections.abc import Iterator

import numpy as np

from gpt2_jax.data.batches import Window, pad_windows
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import encode_special
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference import score
from gpt2_jax.inference.detokenizers import make_detokenizer
from gpt2_jax.inference.evaluate import (
    Sums,
    make_evaluation,
    make_jitted_eval_step,
    make_prepare,
    sum_losses,
)
from gpt2_jax.inference.texts import read_documents
from gpt2_jax.parallel import faults
from gpt2_jax.progress import Progress
from gpt2_jax.workdir.restore import Restored


def rolling_windows(ids: np.ndarray, start: int, T: int) -> Iterator[Window]:
    """The windows of a document (N,) that starts from the token `start`; each id is a target."""
    ids = np.concatenate([[start], ids])
    for first in range(1, len(ids), T):
        end = min(first + T, len(ids))
        yield Window(ids[max(0, end - T - 1) : end], end - first)


def score_documents(
    restored: Restored,
    source: str,
    *,
    detokenizer: str = 'none',
    text_field: str = 'text',
    context: int | None = None,
    rows: int = score.ROWS,
) -> score.Score:
    """Scores the documents of a file, or a text file as one document, as the harness does.

    Raises UserError for a source without text, UsageError for a tokenizer without <|endoftext|>.
    """
    tokenizer = restored.tokenizer
    if tokenizer.separator is None:
        raise UsageError(
            f'the {tokenizer.name} tokenizer has no <|endoftext|>, from which each document starts '
            'in the protocol lm_eval: use the other protocol'
        )
    windows = score.make_windows(
        restored, context=context or restored.model.cfg.n_positions, stride=None, rows=rows
    )
    documents, detokenize = read_documents(source, text_field), make_detokenizer(detokenizer)
    cut = []
    for document in documents:
        ids = encode_special(tokenizer, detokenize(document))
        cut += rolling_windows(ids, tokenizer.separator, windows.context)
    if not cut:
        raise UserError(f'{source} holds no text')
    n_tokens = sum(window.n_targets for window in cut)
    dataset = Dataset(source, tokenizer, Tokens(()), Tokens(()), '')
    with faults.memory_errors('score'), Progress('evaluated', n_tokens, 'tokens', 1) as progress:
        setup, params = score.build(restored, windows, dataset)
        sums = sum_losses(
            make_jitted_eval_step(setup),
            make_prepare(setup)(params),
            pad_windows(cut, setup.rows_per_micro_batch, windows.context),
            tokenizer.byte_lengths,
            setup.mesh,
            progress.add,
        )
    n_bytes = sum(len(document.encode()) for document in documents)
    evaluation = make_evaluation(Sums(sums.nats, sums.tokens, n_bytes), n_tokens)
    protocol = (
        f'lm_eval: {len(documents):,} documents, each starts from <|endoftext|>; context '
        f'{windows.context}, the last window full; bytes and words (re.split) of the original; '
        f'detokenizer {detokenizer}; tokenizer {tokenizer.name} ({tokenizer.vocab_size:,})'
    )
    words = sum(len(re.split(r'\s+', document)) for document in documents)
    return score.Score(source, evaluation, protocol, words)
