"""LAMBADA (Paperno et al. 2016): the last word of a passage, predicted from the words before it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import files
from gpt2_jax.data import documents
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference import score
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.parallel import faults, mesh, partition
from gpt2_jax.training.step import Batch, token_losses
from gpt2_jax.workdir.restore import Restored


class Passage(NamedTuple):
    """Tokens (N,) of a passage; the last `n_answer` are its last word and the space before it."""

    ids: np.ndarray
    n_answer: int


class LambadaScore(NamedTuple):
    """The figures over all passages.

    The probability of a word is the product of the probabilities of its tokens, each given all
    tokens before it. `accuracy` is the share of passages in which every token of the last word is
    the likeliest one; `perplexity` is exp(mean over passages of -log p(last word)).
    `token_accuracy` and `token_perplexity` count the last token alone: if the word has several
    tokens, the model has already seen the beginning of the word. `cropped` passages were longer
    than the context.
    """

    name: str
    accuracy: float
    perplexity: float
    token_accuracy: float
    token_perplexity: float
    passages: int
    cropped: int
    context: int

    def __str__(self):
        return (
            f'{self.name}: last word: accuracy {self.accuracy:.2%}, perplexity '
            f'{self.perplexity:.4f}; last token alone: accuracy {self.token_accuracy:.2%}, '
            f'perplexity {self.token_perplexity:.4f}; over {self.passages:,} passages\n'
            f'protocol: context {self.context}, {self.cropped:,} passages cropped from the left; '
            'the last word follows the last space, and is right if each of its tokens is the '
            'likeliest; perplexity is exp(mean of -log p over passages); no stop-word filter'
        )


def read_passages(path: str, tokenizer: Tokenizer, text_field: str) -> list[Passage]:
    """The passages of a JSON Lines or Parquet file, each split at its last space.

    Raises UserError naming the passage that cannot be split or encoded.
    """
    path = str(files.user_path(path))
    if documents.file_kind(path) == documents.TEXT:
        raise UsageError(
            f'{path} is not a file of passages: expected {", ".join(documents.KINDS)}, with a '
            f'passage in the field {text_field!r} of each line or row'
        )
    passages = []
    for number, document in enumerate(documents.read(path, text_field), 1):
        before, _, word = ''.join(document).rstrip().rpartition(' ')
        if not before:
            raise UserError(
                f'{path}, passage {number} is {word!r:.40}: expected at least two words with a '
                'space between them'
            )
        try:
            prompt, answer = tokenizer.encode(before), tokenizer.encode(f' {word}')
        except UserError as error:
            raise UserError(f'{path}, passage {number}: {error}') from None
        passages.append(Passage(np.concatenate([prompt, answer]), len(answer)))
    if not passages:
        raise UserError(f'{path} holds no passages')
    return passages


def make_answer_step(model: GPT2, unshard: Callable = lambda params: params):
    """The function answer_step(params, batch) -> (nats_BT, right_BT).

    It gives the loss of each target, and whether the target is the likeliest token.
    """

    def answer_step(params, batch: Batch):
        logits_BTV = model.apply({'params': unshard(params)}, batch['inputs'])
        right_BT = jnp.argmax(logits_BTV, -1) == batch['targets']
        return token_losses(logits_BTV, batch['targets']), right_BT

    return answer_step


def _pad(passages: list[Passage], B: int, T: int) -> dict[str, np.ndarray]:
    """Inputs and targets, int32 (B, T): the last T + 1 tokens of each passage, then zeros.

    The model is causal, so the padding changes no token before it.
    """
    inputs, targets = np.zeros((2, B, T), np.int32)
    for row, (ids, _) in enumerate(passages):
        window = ids[-(T + 1) :]
        inputs[row, : len(window) - 1], targets[row, : len(window) - 1] = window[:-1], window[1:]
    return {'inputs': inputs, 'targets': targets}


def score_lambada(
    restored: Restored,
    path: str,
    *,
    text_field: str = 'text',
    context: int | None = None,
    rows: int = score.ROWS,
) -> LambadaScore:
    """Scores the passages of a file, each in a context of its own.

    A passage longer than the context is truncated on the left. Raises UserError for a passage
    without an answer, and for a last word longer than the context.
    """
    windows = score.make_windows(restored, context=context, stride=None, rows=rows)
    passages = read_passages(path, restored.tokenizer, text_field)
    longest = max(passages, key=lambda passage: passage.n_answer)
    if longest.n_answer > windows.context:
        raise UserError(
            f'{path} has a last word of {longest.n_answer} tokens, and the context is '
            f'{windows.context}'
        )
    # One shape for all batches, so that one program serves them, and no longer than the passages
    # need.
    T = min(windows.context, max(len(ids) - 1 for ids, _ in passages))
    dataset = Dataset(path, restored.tokenizer, Tokens(()), Tokens(()), '')
    figures = []
    with faults.memory_errors('score'):
        setup, params = score.build(restored, windows, dataset)
        answer_step = mesh.one_at_a_time(
            setup.mesh, jax.jit(make_answer_step(setup.model, partition.make_unshard(setup.mesh)))
        )
        for first in range(0, len(passages), rows):
            some = passages[first : first + rows]
            results = answer_step(params, mesh.put_batch(setup.mesh, _pad(some, rows, T)))
            for (ids, n_answer), nats_T, right_T in zip(
                some, *map(np.asarray, results), strict=False
            ):
                end = min(len(ids) - 1, T)
                answer = slice(end - n_answer, end)
                figures.append(
                    (right_T[answer].all(), nats_T[answer].sum(), right_T[end - 1], nats_T[end - 1])
                )
    accuracy, nats, token_accuracy, token_nats = np.mean(figures, axis=0, dtype=np.float64).tolist()
    return LambadaScore(
        path,
        accuracy,
        math.exp(min(nats, 700)),
        token_accuracy,
        math.exp(min(token_nats, 700)),
        len(passages),
        sum(len(ids) - 1 > T for ids, _ in passages),
        windows.context,
    )
