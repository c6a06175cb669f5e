"""Tokens from a model: one prefill of the prompt, then cached decoding in compiled chunks.

    prompt -> prefill (one pass over the padded prompt) -> logits, cache -> decode (a loop) ->
    tokens

The prompt is padded to a power of two, or to the context, and its true length is an argument: a
short prompt costs little, and a few compilations serve every length. The keys and values of the
padding are masked, and overwritten before a query could see them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError
from gpt2_jax.inference.sampling import AS_PREDICTED, Sampling, sample_token
from gpt2_jax.kernels.choose import Place, platform_of, unmet_needs
from gpt2_jax.model.gpt2 import GPT2, init_cache
from gpt2_jax.terminal import counted

# Tokens decoded per call: text appears, and stop strings are looked for, this often. A longer chunk
# saves round trips to the device, a shorter one streams more smoothly.
CHUNK = 16
# Tokens in one pass of the loop that a GPU runs for a chunk. It waits 2 us between passes (H100).
UNROLL = 4
# Shorter prompts are padded to this length: unpadded they would be no faster, and each length would
# need a compilation of its own.
MIN_PREFILL = 64


def with_kernels(model: GPT2, kernels: str, dtype: str) -> GPT2:
    """The same model with the kernels and the precision to decode with.

    `kernels` is 'xla', 'fused' (see kernels/decode.py), or 'auto': fused if this machine and this
    model can use them, otherwise xla. `dtype` is a value of the setting model.dtype, or '' for
    the model's own. Raises UsageError if fused kernels are asked for and cannot run here.
    """
    cfg = dataclasses.replace(model.cfg, dtype=dtype or model.cfg.dtype)
    need = next(unmet_needs('decoding', 'fused', cfg, Place(platform_of(jax.devices()[0]))), None)
    if kernels == 'fused' and need:
        raise UsageError(f'the fused kernels of decoding need {need}; otherwise give --kernels=xla')
    if kernels == 'auto':
        kernels = 'xla' if need else 'fused'
    return GPT2(dataclasses.replace(cfg, kernels=kernels), model.ops)


def cast_params(model: GPT2, params):
    """The parameters as `decode` reads them, cast once instead of at every token.

    Matrices are in the compute dtype, embeddings and LayerNorms in fp32, as in training and
    evaluation. None if `decode` reads them as they are.
    """
    if model.cfg.kernels == 'fused':
        from gpt2_jax.kernels import decode

        return decode.cast_params(model.cfg, params)
    if model.cfg.compute_dtype == 'float32':
        return None  # a program would copy them
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.astype(model.cfg.compute_dtype) if path[1].key in ('attn', 'mlp') else leaf
        ),
        params,
    )


@functools.partial(jax.jit, static_argnames='model')
def prefill(model: GPT2, params, tokens_BT, length):
    """What `decode` starts from after the first `length` of T tokens; padding may follow.

    Returns the parameters of `cast_params`, the logits (B, V) and the cache, from one program: the
    host would take 2 ms to start a second program and to pass it the parameters (GPT-2 124M).
    """
    x_BTD, cache = model.apply(
        {'params': params}, tokens_BT, init_cache(model.cfg, tokens_BT.shape[0]), method='features'
    )
    last_BD = jax.lax.dynamic_index_in_dim(x_BTD, length - 1, axis=1, keepdims=False)
    logits_BV = model.apply({'params': params}, last_BD, method='head')
    return cast_params(model, params), logits_BV, cache


@functools.partial(
    jax.jit, static_argnames=('model', 'sampling'), donate_argnames=('logits_BV', 'cache')
)
def decode(model: GPT2, weights, logits_BV, cache, pos, done, seed, sampling: Sampling):
    """Draws and feeds back CHUNK tokens, the first of them at position `pos`.

    `done` counts the tokens drawn before: the noise of token i of a row depends on the seed, the
    row and i alone. Returns the tokens (B, CHUNK), the logits after them, and the cache. The loop
    has a fixed length, so that a GPU never waits for the host; tokens past the context are drawn
    too, and the caller drops them.

    With model.kernels = 'fused', kernels/decode.py computes the logits and kernels/sample.py
    draws the token, except with top_p, which it does not support.
    """
    fold_each = jax.vmap(jax.random.fold_in, (None, 0))
    keys_B = fold_each(jax.random.key(seed), jnp.arange(len(logits_BV)))
    keys_CB = jax.vmap(fold_each, (0, None), 1)(keys_B, done + jnp.arange(CHUNK))

    def pick(logits_BV, tokens_CB, at_2):
        token_B = sample_token(logits_BV, keys_CB[at_2[0]], sampling)
        token_B = token_B.astype(jnp.int32)  # int64 under JAX_ENABLE_X64
        return tokens_CB.at[at_2[0]].set(token_B), at_2 + 1

    def step(token_B, cache, at_2):
        # Under JAX_DISABLE_JIT the model checks the positions of the tokens to drop, too.
        pos = jnp.minimum(at_2[1], model.cfg.n_positions - 1)
        x_B1D, cache = model.apply(
            {'params': weights}, token_B[:, None], cache, pos, method='features'
        )
        return model.apply({'params': weights}, x_B1D[:, 0], method='head'), cache

    unroll = 1
    if model.cfg.kernels == 'fused':
        from gpt2_jax.kernels import decode, launch, sample

        unroll = 1 if launch.interprets() else UNROLL  # compiling it would take tests long
        step = functools.partial(decode.next_logits, model.cfg, weights)
        if sampling.top_p == 1 and logits_BV.shape[1] <= sample.MAX_VOCAB:
            pick = sample.make_sampler(
                keys_CB, logits_BV.shape[1], sampling.divisor, sampling.top_k
            )

    def one(_, carry):
        logits_BV, cache, tokens_CB, at_2 = carry
        tokens_CB, next_2 = pick(logits_BV, tokens_CB, at_2)
        return *step(tokens_CB[at_2[0]], cache, at_2), tokens_CB, next_2

    at_2 = jnp.array([0, pos], jnp.int32)  # the next token of the chunk, and its position
    tokens_CB = jax.lax.empty(keys_CB.shape, jnp.int32)  # the loop writes all of them
    carry = logits_BV, cache, tokens_CB, at_2
    logits_BV, cache, tokens_CB, _ = jax.lax.fori_loop(0, CHUNK, one, carry, unroll=unroll)
    return tokens_CB.T, logits_BV, cache


def decode_chunks(model: GPT2, params, prompt, max_new_tokens, num_samples, seed, sampling, notify):
    """Yields (tokens_BC, n): a chunk that the device may still compute, and its valid columns."""
    context, half = model.cfg.n_positions, max(model.cfg.n_positions // 2, 1)
    if len(prompt) > context:
        notify(f'the prompt has {len(prompt)} tokens: the model sees its last {context} only')
    text_BT = np.tile(np.asarray(prompt[-context:], np.int32), (num_samples, 1))
    text = [(text_BT, text_BT.shape[1])]
    pos, done, notified = context + 1, 0, False  # no cache yet
    while done < max_new_tokens:
        if pos > context:  # the last token of the text has no position
            text_BT = np.concatenate([np.asarray(part)[:, :n] for part, n in text], axis=1)
            if text_BT.shape[1] > context:
                text_BT = text_BT[:, -half:]
                if not notified:
                    notify(
                        f'the context of {counted(context, "tokens")} is full: continuing from its '
                        f'last {half}'
                    )
                    notified = True
            pos = text_BT.shape[1]
            text = [(text_BT, pos)]
            padding = min(max(2 ** (pos - 1).bit_length(), MIN_PREFILL), context) - pos
            # Explicit transfers to the device work under JAX_TRANSFER_GUARD=disallow.
            padded = jax.device_put((np.pad(text_BT, ((0, 0), (0, padding))), np.int32(pos)))
            cast, logits_BV, cache = prefill(model, params, *padded)
            weights = jax.device_put(params) if cast is None else cast
        # One token more than there are positions: the last is drawn from a full context.
        n = min(CHUNK, max_new_tokens - done, context - pos + 1)
        at = jax.device_put((np.int32(pos), np.int32(done), np.uint32(seed)))
        tokens_BC, logits_BV, cache = decode(
            model, weights, logits_BV, cache, *at, sampling=sampling
        )
        pos, done = pos + n, done + n
        text.append((tokens_BC, n))
        yield text[-1]


def generate(
    model: GPT2,
    params,
    prompt,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int = 0,
    sampling: Sampling = AS_PREDICTED,
    strict_context: bool = False,
    notify: Callable[[str], None] = print,
) -> Iterator[np.ndarray]:
    """Continuations of `prompt` (T,), in chunks: an iterator of int32 (num_samples, n).

    Sample i depends on (params, prompt, sampling, seed, i) alone. Every token is drawn given all
    tokens before it; of a long prompt, given its last n_positions tokens. GPT-2's learned positions
    cannot slide, so when no position is left, the context restarts from its last half with a fresh
    prefill; `notify` is called the first time. Raises UsageError, before the first chunk, for a
    prompt that is empty or not a row of tokens and, with `strict_context`, if the context would
    restart.
    """
    context = model.cfg.n_positions
    # One token more than there are positions: the last one is not fed to the model.
    if strict_context and len(prompt) + max_new_tokens > context + 1:
        raise UsageError(
            f'{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit the context of '
            f'{context} (strict_context): lower max_new_tokens, shorten the prompt, or let it '
            'restart'
        )
    prompt = check_prompt(prompt, model.cfg.vocab_size)
    return _fetch(
        decode_chunks(model, params, prompt, max_new_tokens, num_samples, seed, sampling, notify)
    )


def check_prompt(prompt, vocab_size: int) -> np.ndarray:
    """The prompt as an array (T,). Raises UsageError for anything but tokens of the vocabulary.

    The lookup of an embedding would silently take a token outside the vocabulary for the nearest
    one in it.
    """
    if isinstance(prompt, str):
        raise UsageError('the prompt is a text: expected its tokens, tokenizer.encode(text)')
    tokens = np.asarray(prompt)
    if not tokens.size:
        raise UsageError('the prompt is empty: give at least one token to continue from')
    if tokens.ndim != 1 or tokens.dtype.kind not in 'iu':
        raise UsageError(
            f'the prompt is {tokens.dtype} {tokens.shape}: expected integers (T,); num_samples '
            'continues one prompt several times'
        )
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if outside.size:
        raise UsageError(
            f'token {tokens[outside[0]]} at position {outside[0]} of the prompt is outside the '
            f'vocabulary [0, {vocab_size})'
        )
    return tokens


def _fetch(chunks) -> Iterator[np.ndarray]:
    """The tokens of `decode_chunks` on the host, each chunk after the next one was dispatched.

    So the device always has work.
    """
    chunk = next(chunks, None)
    while chunk is not None:
        (tokens_BC, n), chunk = chunk, next(chunks, None)
        yield np.asarray(tokens_BC)[:, :n]
