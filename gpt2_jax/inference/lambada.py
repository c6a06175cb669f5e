"""LAMBADA (Paperno et al. 2016): the last word of a passage, predicted from the words before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import files
from gpt2_jax.data import documents
from gpt2_jax.data.batches import Window, pad_windows
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference import score
from gpt2_jax.inference.evaluate import perplexity, show_perplexity
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.loss import map_logits, token_losses
from gpt2_jax.parallel import faults, mesh, partition
from gpt2_jax.parallel.feed import Batch
from gpt2_jax.progress import Progress
from gpt2_jax.terminal import counted
from gpt2_jax.training import programs
from gpt2_jax.training.step import head_inputs
from gpt2_jax.workdir.restore import Restored


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

    def figures(self) -> dict[str, Any]:
        """All figures with all digits, for JSON."""
        return {'text': self.name, **self._asdict(), 'protocol': self.protocol}

    @property
    def protocol(self) -> str:
        """How the figures are defined, in one line."""
        return (
            f'context {self.context}, {counted(self.cropped, "passages")} cropped from the left; '
            'the last word follows the last space, and is right if each of its tokens is the '
            'likeliest; '
            'perplexity is exp(mean of -log p over passages); no stop-word filter'
        )

    def __str__(self):
        return (
            f'{self.name}: last word: accuracy {self.accuracy:.2%}, perplexity '
            f'{show_perplexity(self.perplexity)}; last token alone: accuracy '
            f'{self.token_accuracy:.2%}, perplexity {show_perplexity(self.token_perplexity)}; over '
            f'{counted(self.passages, "passages")}\n'
            f'protocol: {self.protocol}'
        )


def read_passages(path: str, tokenizer: Tokenizer, text_field: str) -> list[Window]:
    """The passages of a JSON Lines or Parquet file, each split at its last space.

    The targets of a window are the last word and the space before it. Raises UserError naming the
    passage that cannot be split or encoded.
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
        passages.append(Window(np.concatenate([prompt, answer]), len(answer)))
    if not passages:
        raise UserError(f'{path} holds no passages')
    return passages


def make_answer_step(model: GPT2, unshard: Callable, chunk_targets: int) -> Callable:
    """The function answer_step(params, batch) -> (nats_BT, right_BT).

    It gives the loss of each target, and whether the target is the likeliest token. `unshard` and
    `chunk_targets` are as in step.make_eval_step.
    """

    def answer(logits_BtV, targets_Bt):
        return token_losses(logits_BtV, targets_Bt), jnp.argmax(logits_BtV, -1) == targets_Bt

    def answer_step(params, batch: Batch):
        x_BTD, wte_VD = head_inputs(model, unshard(params), batch['inputs'])
        targets_BT, precision = batch['targets'], model.cfg.precision
        return map_logits(
            answer, x_BTD, wte_VD, targets_BT, precision, chunk_targets or targets_BT.size
        )

    return answer_step


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
    without a last word, and for a last word longer than the context.
    """
    windows = score.make_windows(restored, context=context, stride=None, rows=rows)
    passages = read_passages(path, restored.tokenizer, text_field)
    for number, passage in enumerate(passages, 1):
        if passage.n_targets > windows.context:
            raise UserError(
                f'{path}, passage {number} has a last word of {passage.n_targets} tokens, and the '
                f'context is {windows.context}'
            )
    # One shape for all batches, so that one program serves them, and no longer than the passages
    # need.
    T = min(windows.context, max(len(ids) - 1 for ids, _ in passages))
    dataset = Dataset(path, restored.tokenizer, Tokens(()), Tokens(()), '')
    figures = []
    with (
        faults.memory_errors('score'),
        Progress('scored', len(passages), 'passages', 1) as progress,
    ):
        setup, params = score.build(restored, windows, dataset)
        answer_step = mesh.one_at_a_time(
            setup.mesh,
            jax.jit(
                make_answer_step(
                    setup.model,
                    partition.make_unshard(setup.mesh),
                    programs.targets_at_once(setup, training=False),
                )
            ),
        )
        for batch in pad_windows(passages, setup.rows_per_micro_batch, T):
            results = answer_step(params, mesh.put_batch(setup.mesh, batch))
            for nats_T, right_T, mask_T in zip(
                *map(np.asarray, results), batch['mask'], strict=True
            ):
                (answer,) = np.nonzero(mask_T)
                if len(answer):  # a passage, and not padding
                    last = answer[-1]
                    figures.append(
                        (right_T[answer].all(), nats_T[answer].sum(), right_T[last], nats_T[last])
                    )
            progress.add(setup.rows_per_micro_batch)
    accuracy, nats, token_accuracy, token_nats = np.mean(figures, axis=0, dtype=np.float64).tolist()
    return LambadaScore(
        path,
        accuracy,
        perplexity(nats),
        token_accuracy,
        perplexity(token_nats),
        len(passages),
        sum(len(ids) - 1 > T for ids, _ in passages),
        windows.context,
    )
