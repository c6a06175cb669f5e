"""Text from a model: the choice of the next token, one prefill, cached decoding, and streaming.

    prompt -> prefill (one pass over the padded prompt) -> logits, cache -> decode (a compiled loop) -> tokens

The prompt is padded to a power of two, or to the context, and its true length is an argument: a short one costs little,
and a few compilations serve every length. What the padding writes into the cache is masked, and overwritten before it
could be seen.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError
from gpt2_jax.inference.sampling import Sampling, sample_token
from gpt2_jax.kernels.support import unmet_needs
from gpt2_jax.model.gpt2 import GPT2, init_cache

# Tokens decoded per call: text appears, and stop strings are looked for, this often. Longer saves round trips to the
# device, shorter streams more smoothly.
CHUNK = 16
MIN_PREFILL = (
    64  # shorter prompts are padded to this: they would be no faster, and each length compiled anew
)


def set_up(model: GPT2, kernels: str, dtype: str) -> GPT2:
    """The model to generate with. `kernels` is 'xla', 'fused' (see decode.py), or 'auto': fused on an NVIDIA
    GPU in bfloat16, which they are made for, else open. `dtype` is as the setting model.dtype; '': the model's own.

    Raises UsageError where fused ones are asked for without a GPU.
    """
    cfg = dataclasses.replace(model.cfg, dtype=dtype or model.cfg.dtype)
    need = next(unmet_needs('decoding', cfg, jax.default_backend()), None)
    if kernels == 'fused' and need:
        raise UsageError(f'the fused kernels of decoding need {need}; else give --kernels=xla')
    if kernels == 'auto':
        kernels = 'xla' if need else 'fused'
    return GPT2(dataclasses.replace(cfg, kernels=kernels), model.ops)


@functools.partial(jax.jit, static_argnames='model')
def cast_params(model: GPT2, params):
    """The parameters as prefill reads them, and as decode does; made once, and not at every token.

    Matrices in the compute dtype, embeddings and LayerNorms in fp32: the model that is trained and evaluated.
    """
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.astype(model.cfg.compute_dtype) if path[1].key in ('attn', 'mlp') else leaf
        ),
        params,
    )
    if model.cfg.kernels == 'xla':
        return params, params
    from gpt2_jax.kernels import decode

    return params, decode.cast_params(model.cfg, params)


@functools.partial(jax.jit, static_argnames='model')
def prefill(model: GPT2, params, tokens_BT, length):
    """The logits after the first `length` tokens, and a cache that holds them. T may be more."""
    x_BTD, cache = model.apply(
        {'params': params}, tokens_BT, init_cache(model.cfg, tokens_BT.shape[0]), method='features'
    )
    last_BD = jax.lax.dynamic_index_in_dim(x_BTD, length - 1, axis=1, keepdims=False)
    return model.apply({'params': params}, last_BD, method='head'), cache


@functools.partial(
    jax.jit, static_argnames=('model', 'sampling'), donate_argnames=('logits_BV', 'cache')
)
def decode(model: GPT2, weights, logits_BV, cache, pos, keys_B, done, sampling: Sampling):
    """Chooses and feeds back CHUNK tokens, of which the first stands at position `pos`.

    `done` counts the tokens drawn before: token i of a row depends on that row's key and i alone. Returns the tokens
    (B, CHUNK), the logits after them, and the cache. Tokens past the context are drawn too, and of no use: a loop of
    fixed length runs on a GPU without asking the host after each token whether to go on.

    With model.kernels = 'fused' this is done by decode.py, but for choices it does not cover (top_p).
    """
    keys_CB = jax.vmap(lambda i: jax.vmap(jax.random.fold_in, (0, None))(keys_B, done + i))(
        jnp.arange(CHUNK)
    )

    def pick(logits_BV, tokens_CB, i):
        return tokens_CB.at[i].set(sample_token(logits_BV, keys_CB[i], sampling))

    def step(token_B, cache, pos):
        x_B1D, cache = model.apply(
            {'params': weights}, token_B[:, None], cache, pos, method='features'
        )
        return model.apply({'params': weights}, x_B1D[:, 0], method='head'), cache

    if model.cfg.kernels == 'fused':
        from gpt2_jax.kernels import decode, sample

        step = functools.partial(decode.next_logits, model.cfg, weights)
        if sampling.top_p == 1 and logits_BV.shape[1] <= sample.MAX_VOCAB:
            pick = sample.make_sampler(keys_CB, logits_BV.shape[1], sampling.temperature, sampling.top_k)

    def one(i, carry):
        logits_BV, cache, tokens_CB = carry
        tokens_CB = pick(logits_BV, tokens_CB, i)
        return *step(tokens_CB[i], cache, pos + i), tokens_CB

    carry = logits_BV, cache, jnp.zeros(keys_CB.shape, jnp.int32)
    logits_BV, cache, tokens_CB = jax.lax.fori_loop(0, CHUNK, one, carry)
    return tokens_CB.T, logits_BV, cache


def decode_chunks(model: GPT2, params, prompt, max_new_tokens, num_samples, seed, sampling, notify):
    """Chunks of tokens that the device may still be at work on, each with how many of its columns count."""
    context = model.cfg.n_positions
    params, weights = cast_params(model, params)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num_samples))
    text = [(np.tile(np.asarray(prompt, np.int32), (num_samples, 1)), len(prompt))]
    pos, done, told = context + 1, 0, False  # no cache yet
    while done < max_new_tokens:
        if pos >= context:
            text_BT = np.concatenate([np.asarray(part)[:, :n] for part, n in text], axis=1)
            if text_BT.shape[1] >= context:
                text_BT = text_BT[:, -max(context // 2, 1) :]
                if not told:
                    notify(
                        f'the context of {context} tokens is full: going on from its last {text_BT.shape[1]}'
                    )
                    told = True
            pos = text_BT.shape[1]
            text = [(text_BT, pos)]
            padding = min(max(2 ** (pos - 1).bit_length(), MIN_PREFILL), context) - pos
            logits_BV, cache = prefill(model, params, np.pad(text_BT, ((0, 0), (0, padding))), pos)
        # At least one: a context of a single token is full at once, and begins anew for each.
        n = max(1, min(CHUNK, max_new_tokens - done, context - pos))
        tokens_BC, logits_BV, cache = decode(
            model, weights, logits_BV, cache, pos, keys_B, done, sampling
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
    sampling: Sampling = Sampling(),
    strict_context: bool = False,
    notify: Callable[[str], None] = print,
) -> Iterator[np.ndarray]:
    """Continues `prompt` (T,) `num_samples` times; yields int32 (num_samples, n) as tokens are decoded.

    Sample i depends on (params, prompt, sampling, seed, i) alone. GPT-2's learned positions cannot slide, so when the
    context is full generation goes on from its last half with a fresh prefill, and `notify` is told so once.
    Raises UsageError for an empty prompt, and, with `strict_context`, where prompt and text do not fit the context.
    """
    context = model.cfg.n_positions
    if not len(prompt):
        raise UsageError('the prompt is empty: give at least one token to go on from')
    if strict_context and len(prompt) + max_new_tokens > context:
        raise UsageError(
            f'{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit the context of '
            f'{context} (strict_context): lower max_new_tokens, shorten the prompt, or let it restart'
        )
    chunks = decode_chunks(
        model, params, prompt, max_new_tokens, num_samples, seed, sampling, notify
    )
    chunk = next(chunks, None)
    while chunk is not None:
        # Fetched when the next has been dispatched: the device works on while the caller has this one.
        (tokens_BC, n), chunk = chunk, next(chunks, None)
        yield np.asarray(tokens_BC)[:, :n]
