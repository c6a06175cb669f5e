"""The figures of a checkpoint on its own corpus or on any other text, and their protocol."""

import math
from typing import Any, NamedTuple

import jax

from gpt2_jax import config as config_lib
from gpt2_jax.data.dataset import SPLITS, Dataset, Tokens
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference import texts
from gpt2_jax.inference.evaluate import Evaluation, make_evaluate, perplexity, show_perplexity
from gpt2_jax.parallel import faults
from gpt2_jax.progress import Progress
from gpt2_jax.terminal import counted
from gpt2_jax.training.setup import Setup, fit_to_machine
from gpt2_jax.training.setup import build as build_setup
from gpt2_jax.workdir import history
from gpt2_jax.workdir.restore import Restored

ROWS = 8  # windows at once: with GPT-2's vocabulary the logits of 1,024 tokens take 0.2 GiB


class Windows(NamedTuple):
    """How a text is cut: windows of `context` tokens that begin `stride` apart, `rows` at once.

    `max_targets` limits them to an evenly spread part of the text; 0: no limit. See
    batches.eval_batches.
    """

    context: int
    stride: int
    rows: int
    max_targets: int = 0

    def __str__(self):
        kind = (
            'each window begins with an empty context'
            if self.stride == self.context
            else 'the whole first window counts, and the end of each later one'
        )
        return f'context {self.context}, stride {self.stride} ({kind})'


class Score(NamedTuple):
    """The figures of a text and their protocol; as a string, two or three lines.

    `words` and `line_ends` count the original text; they are None if it is not known, or if only a
    part of it was evaluated.
    """

    name: str
    evaluation: Evaluation
    protocol: str
    words: int | None = None
    line_ends: int | None = None

    def perplexity_per(self, count: int) -> float:
        """exp(nats of all targets / count): per word, if `count` is the number of words."""
        nats = self.evaluation.loss * self.evaluation.tokens
        return perplexity(nats / count) if count else math.inf

    def figures(self) -> dict[str, Any]:
        """All figures with all digits, for JSON."""
        figures = {'text': self.name, **self.evaluation._asdict(), 'protocol': self.protocol}
        if self.words:
            figures |= {'words': self.words, 'word_perplexity': self.perplexity_per(self.words)}
        return figures

    def __str__(self):
        loss, perplexity, bits_per_byte, n_tokens, n_bytes, n_split = self.evaluation
        per_byte = '' if bits_per_byte is None else f'{bits_per_byte:.4f} bits per byte, '
        part = '' if n_tokens == n_split else f' ({n_split:,} in all: an evenly spread part)'
        lines = [
            f'{self.name}: loss {loss:.4f} nats per token, perplexity '
            f'{show_perplexity(perplexity)}, {per_byte}over {counted(n_tokens, "tokens")}{part} '
            f'of {counted(n_bytes, "bytes")}'
        ]
        if self.words is not None:
            words = counted(self.words, 'words')
            line = f'perplexity {show_perplexity(self.perplexity_per(self.words))} over {words}'
            lines.append(f'per word: {line} of the original text')
        if self.line_ends is not None:
            line_ends = counted(self.line_ends, 'line ends')
            both = show_perplexity(self.perplexity_per(self.words + self.line_ends))
            lines[-1] += f'; {both} with its {line_ends} counted as well'
        return '\n'.join([*lines, f'protocol: {self.protocol}'])


def make_windows(
    restored: Restored,
    *,
    context: int | None,
    stride: int | None,
    rows: int,
    max_targets: int = 0,
) -> Windows:
    """The windows to score in. By default: the context of training, and no overlap.

    Raises UsageError for numbers below 1, if `context` exceeds the positions of the model, and if
    `stride` exceeds the context.
    """
    positions = restored.model.cfg.n_positions
    context = restored.config.train.seq_len if context is None else context
    windows = Windows(context, context if stride is None else stride, rows, max_targets)
    for name, value in (('context', context), ('stride', windows.stride), ('rows', rows)):
        if value < 1:
            raise UsageError(f'{name} = {value} is not allowed: expected at least 1')
    if context > positions:
        raise UsageError(
            f'context = {context} is longer than the {positions} positions of the checkpoint: '
            f'give at most --context={positions}'
        )
    if windows.stride > context:
        raise UsageError(
            f'stride = {stride} is more than the context of {context}, so tokens would be left '
            f'out: give at most --stride={context}'
        )
    return windows


def build(
    restored: Restored, windows: Windows, dataset: Dataset | None = None
) -> tuple[Setup, dict]:
    """The setup that evaluates in these windows, and the parameters laid out on its mesh.

    It evaluates `dataset`, or the corpus of the run if that is None. Rows are rounded up to a
    multiple of the devices that share them. Raises UserError for a corpus that cannot be read.
    """
    config = fit_to_machine(restored.config, restored.model.cfg.vocab_size)
    if config.model.kernels == 'fused':
        config.model.kernels = 'auto'  # these windows may not suit the kernels of training
    share = config.mesh.data * config.mesh.fsdp
    config.train.update(
        seq_len=windows.context,
        batch_size=math.ceil(windows.rows / share) * share,
        grad_accum_steps=1,
    )
    config.eval.tokens = windows.max_targets
    setup = build_setup(config_lib.resolve(config), dataset)
    return setup, jax.device_put(restored.params, setup.layout.params)


def score_corpus(
    restored: Restored,
    *,
    split: str = 'val',
    context: int | None = None,
    stride: int | None = None,
    rows: int | None = None,
    max_targets: int | None = None,
) -> Score:
    """Scores the `split` of the corpus that the checkpoint was trained on.

    The defaults give the figures that training printed. Raises UserError if that corpus is not
    here, or has changed, and UsageError for another split than 'train' and 'val'.
    """
    if split not in SPLITS:
        raise UsageError(f'there is no split {split!r}: expected one of {", ".join(SPLITS)}')
    config, trained_on = restored.config, restored.meta['corpus']
    if trained_on['name'].startswith(history.PUBLISHED):
        raise UsageError(
            f'the checkpoint is {trained_on["name"]}, which come without their corpus: give the '
            'text to score as --text=FILE or --lambada=FILE'
        )
    if trained_on['fallback']:
        config.data.corpus = trained_on['name']
    windows = make_windows(
        restored,
        context=context,
        stride=stride,
        rows=rows or config.train.batch_size // config.train.grad_accum_steps,
        max_targets=config.eval.tokens if max_targets is None else max_targets,
    )
    with faults.memory_errors('score'):
        setup, params = build(restored, windows)
        now = setup.dataset
        if now.sha256 != trained_on['sha256']:
            raise UserError(
                f'the run was trained on {trained_on["name"]} {trained_on["sha256"][:12]}, but '
                f'data.corpus is now {now.name} {now.sha256[:12]}: restore the old text to compare '
                'figures, or score another with --text'
            )
        evaluation = _evaluate(setup, params, windows, split)
    return Score(split, evaluation, _protocol(windows, now.tokenizer))


def score_text(
    restored: Restored,
    source: str,
    *,
    split: str | None = None,
    detokenizer: str = 'none',
    text_field: str = 'text',
    context: int | None = None,
    stride: int | None = None,
    rows: int = ROWS,
    max_targets: int = 0,
) -> Score:
    """Scores any text in the tokens of the checkpoint; all tokens but the first are targets.

    `source`, `split`, `detokenizer` and `text_field` are as in texts.open_text. Raises UserError.
    """
    windows = make_windows(
        restored, context=context, stride=stride, rows=rows, max_targets=max_targets
    )
    text = texts.open_text(
        source, restored.tokenizer, split=split, detokenizer=detokenizer, text_field=text_field
    )
    dataset = Dataset(text.name, restored.tokenizer, Tokens(()), text.tokens, '')
    with faults.memory_errors('score'):
        setup, params = build(restored, windows, dataset)
        evaluation = _evaluate(setup, params, windows, 'val')
    protocol = _protocol(windows, restored.tokenizer, detokenizer)
    if evaluation.tokens < evaluation.split_tokens:
        return Score(text.name, evaluation, protocol)
    return Score(text.name, evaluation, protocol, text.words, text.lines)


def _evaluate(setup: Setup, params, windows: Windows, split: str) -> Evaluation:
    n_targets = len(getattr(setup.dataset, split)) - 1
    total = min(n_targets, windows.max_targets or n_targets)
    with Progress('evaluated', total, 'tokens', 1) as progress:
        return make_evaluate(setup, windows.stride)(params, split, progress.add)


def _protocol(windows: Windows, tokenizer: Tokenizer, detokenizer: str = 'none') -> str:
    return (
        f'{windows}; all tokens but the first are targets; detokenizer {detokenizer}; '
        f'tokenizer {tokenizer.name} ({tokenizer.vocab_size:,})'
    )
