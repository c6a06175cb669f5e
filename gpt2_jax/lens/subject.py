"""What is looked at: a model with its parameters, and a text as tokens, both checked here.

Every function of the package takes as its first argument one of:

    'runs/quickstart'          the folder of a run or of a converted model: its best checkpoint
    gpt2_jax.load(..)          anything with .model and .params, and .tokenizer for texts
    (model, params)            a GPT2 or a GPT2Config, and its parameters

and as its second a text (str), or tokens: int (T,) or (B, T). A folder is read again at every call.
"""

import codecs
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import files
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import PLAIN
from gpt2_jax.model.params import param_shapes
from gpt2_jax.parallel.partition import named_leaves
from gpt2_jax.terminal import counted
from gpt2_jax.workdir import restore, storage


class Subject(NamedTuple):
    """A model to look into: `cfg` without remat, which changes no value; `params` on the device."""

    cfg: GPT2Config
    params: Any
    tokenizer: Tokenizer | None


def load(path: str | Path, step: str = 'best') -> restore.Restored:
    """`restore.load` without the warnings of Orbax."""
    with storage.without_warnings():
        return restore.load(files.user_path(path), step)


def as_subject(source) -> Subject:
    """The model that `source` stands for. Raises UserError if the parameters do not fit it."""
    if isinstance(source, Subject):
        return source
    if isinstance(source, str | Path):
        source = load(source)
    is_pair = isinstance(source, tuple) and len(source) == 2
    if is_pair and isinstance(source[0], GPT2 | GPT2Config):
        (model, params), tokenizer = source, None
    elif hasattr(source, 'model') and hasattr(source, 'params'):
        model, params = source.model, source.params
        tokenizer = getattr(source, 'tokenizer', None)
    else:
        raise UserError(
            f'cannot look into {_kind(source)}: expected the folder of a run, the result of '
            'gpt2_jax.load, or (model, params)'
        )
    cfg = dataclasses.replace(model if isinstance(model, GPT2Config) else model.cfg, remat='none')
    check_params(cfg, params)
    return Subject(cfg, jax.device_put(params), tokenizer)


def _kind(source) -> str:
    """The type of a wrong source in words: 'int', '(dict, GPT2)'."""
    if isinstance(source, tuple):
        return f'({", ".join(type(part).__name__ for part in source)})'
    return type(source).__name__


def leaf_shapes(params) -> dict[str, tuple[int, ...]]:
    """{'h_0/attn/c_attn/kernel': (D, 3, H, K), ..}."""
    return {name: tuple(np.shape(leaf)) for name, leaf in named_leaves(params).items()}


def check_params(cfg: GPT2Config, params) -> None:
    """Raises UserError unless `params` has exactly the leaves of the model, with their shapes."""
    expected, found = leaf_shapes(param_shapes(cfg)), leaf_shapes(params)
    for name in [*expected, *found]:
        if name not in found:
            raise UserError(f'the parameters lack {name}, which this model needs')
        if name not in expected:
            raise UserError(f'the parameters hold {name}, which this model does not have')
        if found[name] != expected[name]:
            raise UserError(
                f'the parameter {name} has the shape {found[name]}: this model needs '
                f'{expected[name]}'
            )


def as_tokens(subject: Subject, text, *, least: int = 1) -> np.ndarray:
    """The tokens of a text, int32 (B, T); a single text is a batch of one.

    Raises UserError for a text of fewer than `least` tokens or more than n_positions, and for
    tokens outside the vocabulary.
    """
    cfg = subject.cfg
    if isinstance(text, str):
        if subject.tokenizer is None:
            raise UserError('bare parameters have no tokenizer: give tokens in place of a text')
        text = subject.tokenizer.encode(text)
    try:
        tokens = np.asarray(text)
    except ValueError:  # of numpy, for rows of different lengths
        raise UserError(
            'tokens must be integers of shape (T,) or (B, T); the rows differ in length'
        ) from None
    if tokens.dtype.kind == 'U':
        raise UserError(
            'a list of texts is not a batch, whose rows have one length: give one text, or tokens'
        )
    if tokens.dtype.kind not in 'iu' or tokens.ndim not in (1, 2):
        raise UserError(
            f'tokens must be integers of shape (T,) or (B, T); got {tokens.dtype} {tokens.shape}'
        )
    if cfg.n_positions < least:
        raise UserError(
            f'the context of this model is {counted(cfg.n_positions, "tokens")}: expected at '
            f'least {least}, one to read and the next'
        )
    tokens_BT = np.atleast_2d(tokens)
    T = tokens_BT.shape[1]
    if not least <= T <= cfg.n_positions or not tokens_BT.size:
        raise UserError(
            f'a text of {counted(T, "tokens")}: expected {least} to {cfg.n_positions}, the context '
            'of the model'
        )
    outside = (tokens_BT < 0) | (tokens_BT >= cfg.vocab_size)
    if outside.any():
        b, t = np.argwhere(outside)[0]
        raise UserError(
            f'token {tokens_BT[b, t]} at position {t} is outside the vocabulary '
            f'[0, {cfg.vocab_size})'
        )
    return tokens_BT.astype(np.int32)


def check_whole(name: str, value, least: int) -> None:
    """Raises UsageError unless the argument `name` is a whole number, at least `least`."""
    if not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f'{name} = {value!r}: expected a whole number, at least {least}')


def run(cfg: GPT2Config, params, tokens_BT, tap=None):
    """The logits (B, T, V) of the plain model, with `tap` called at every named activation."""
    return GPT2(cfg, PLAIN._replace(tap=tap)).apply({'params': params}, tokens_BT)


def call_traced(name: str, function: Callable, *arrays):
    """What a function of the caller gives for arrays that JAX traces.

    Raises UsageError if it needs their values, as numpy does.
    """
    try:
        return function(*arrays)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        raise UsageError(
            f'JAX cannot trace {name}: use jax.numpy in place of numpy, jnp.where in place of '
            'x[mask], and no if, float() or int() of an array'
        ) from None


def next_token_losses(logits_BTV, tokens_BT):
    """The loss of each next token in nats, -log softmax(logits at t)[token t + 1]: (B, T - 1)."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    return -jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]


def as_numpy(x) -> np.ndarray:
    """A numpy array, read-only unless it had to be copied; bfloat16 becomes float32, exactly."""
    x = np.asarray(x)
    return np.array(x, np.float32) if x.dtype.name in ('bfloat16', 'float16') else x


def token_text(subject: Subject, token: int) -> str:
    """A token for people: its text, stray bytes as \\xe2, or <17> without a tokenizer."""
    if subject.tokenizer is None:
        return f'<{token}>'
    data = subject.tokenizer.decode_bytes([token])
    return data.decode('utf-8', 'backslashreplace') or f'<{token}>'


def token_texts(subject: Subject, tokens_T) -> list[str]:
    """`token_text` of each token, but a character of several tokens stands whole at the last."""
    if subject.tokenizer is None:
        return [token_text(subject, int(token)) for token in tokens_T]
    decoder = codecs.getincrementaldecoder('utf-8')('backslashreplace')
    texts = [decoder.decode(subject.tokenizer.decode_bytes([token])) for token in tokens_T]
    texts[-1] += decoder.decode(b'', True)
    return texts
