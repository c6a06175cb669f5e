"""GPT-2 as a pure function of its parameters, in Flax linen.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), builds on the
decoder of Vaswani et al. 2017, "Attention Is All You Need". The name of an array ends in its shape,
one letter for each dimension:

    B batch        T time (query position)      S source (key position)     D model width (n_embd)
    H heads        K head width = D / H         F feed-forward width        V vocabulary
    L layers       P positions (n_positions)

`seeds_3` holds the dropout seeds of one block: one for the attention pattern, one for the output of
attention, and one for the output of the MLP. Each is None if there is no dropout.

The parameter tree uses GPT-2's own names. Kernels are stored (in, out) as published, with the head
axes kept apart, so that reading published weights takes a reshape and never a transpose:

    wte/embedding (V, D)     wpe/embedding (P, D)     ln_f/{scale, bias} (D,)
    h_i/ln_1, h_i/ln_2       {scale, bias} (D,)
    h_i/attn/c_attn          kernel (D, 3, H, K), bias (3, H, K)
    h_i/attn/c_proj          kernel (H, K, D), bias (D,)
    h_i/mlp/c_fc             kernel (D, F), bias (F,)
    h_i/mlp/c_proj           kernel (F, D), bias (D,)

Every module takes `ops`, the functions that do its arithmetic: matmul (x W), normalize (LayerNorm
without scale and bias), scores (q k^T), mix (pattern v), activate (GELU) and logits (x wte^T);
attention, if a fused kernel is used; and tap. The default, `PLAIN`, has one formula a line.
Training passes `FAST`, which computes the same values faster (see ops.py).
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.model.dropout import dropout, dropout_seeds
from gpt2_jax.model.ops import PLAIN, REMAT_POLICIES, Ops

# The keys and values of all positions so far: one (k_BHSK, v_BHSK) for each layer. The head axis
# comes before the position axis, so that the keys of one head are contiguous in memory.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


def tap(module: nn.Module, name: str, x):
    """Names the activation x: 'h_3.pattern' in block 3, 'logits' outside the blocks. Returns x.

    If `ops.tap` is set, it is called with this name and x, and its result replaces x. A fused
    `ops.attention` never forms 'attn_scores' and 'pattern', so they cannot be tapped.
    """
    if module.ops.tap is None:
        return x
    block = [part for part in module.path[:1] if part.startswith('h_')]
    return module.ops.tap('.'.join([*block, name]), x)


class Linear(nn.Module):
    """y = x W + b over the last axes of x: (B, T, *inputs) -> (B, T, *outputs).

    Initially W is normal with mean 0 and standard deviation `std`, and b = 0.
    """

    cfg: GPT2Config
    ops: Ops
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self, x):
        cfg, dtype = self.cfg, self.cfg.compute_dtype
        init = nn.initializers.normal(self.std)
        kernel = self.param('kernel', init, (*self.inputs, *self.outputs), jnp.float32)
        y = self.ops.matmul(x.astype(dtype), kernel.astype(dtype), len(self.inputs), cfg.precision)
        if cfg.bias:
            bias = self.param('bias', nn.initializers.zeros, self.outputs, jnp.float32)
            y = y + bias.astype(dtype)
        return y


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis, in fp32.

    Ba et al. 2016, equation 4. (B, T, D) -> (B, T, D).
    """

    cfg: GPT2Config
    ops: Ops = PLAIN

    @nn.compact
    def __call__(self, x_BTD):
        shape = x_BTD.shape[-1:]  # (D,)
        y_BTD = self.ops.normalize(x_BTD.astype(jnp.float32), self.cfg.layer_norm_epsilon)
        y_BTD = y_BTD * self.param('scale', nn.initializers.ones, shape, jnp.float32)
        if self.cfg.bias:
            y_BTD = y_BTD + self.param('bias', nn.initializers.zeros, shape, jnp.float32)
        return y_BTD.astype(self.cfg.compute_dtype)


def causal_attention(
    q_BTHK,
    k_BHSK,
    v_BHSK,
    pos=0,
    *,
    precision='highest',
    rate=0.0,
    seed=None,
    ops=PLAIN,
    tap=lambda name, x: x,
):
    """Causal scaled dot-product attention, step by step (Vaswani et al. 2017, equation 1).

        scores = q k^T / sqrt(K), and -inf if the key comes after the query
        pattern = softmax(scores)
        z = dropout(pattern) v

    Query t is at position pos + t and sees the keys at positions s <= pos + t. Without a cache,
    pos is 0 and S = T. With a cache, S = n_positions, and the mask also hides slots that are not
    filled yet. `ops.scores` returns fp32, so softmax and dropout are computed in fp32. An entry is
    dropped with probability `rate`, by random numbers from `seed`. Returns z_BTHK.
    """
    T, S, K = q_BTHK.shape[1], k_BHSK.shape[2], q_BTHK.shape[3]
    scores_BHTS = ops.scores(q_BTHK, k_BHSK, precision) / math.sqrt(K)
    visible_TS = jnp.arange(S) <= pos + jnp.arange(T)[:, None]
    scores_BHTS = tap('attn_scores', jnp.where(visible_TS, scores_BHTS, -jnp.inf))
    pattern_BHTS = tap('pattern', jax.nn.softmax(scores_BHTS, axis=-1))
    pattern_BHTS = dropout(pattern_BHTS, seed, rate).astype(v_BHSK.dtype)
    return ops.mix(pattern_BHTS, v_BHSK, precision)


class CausalSelfAttention(nn.Module):
    """q, k, v = x W_qkv;  out = concat_heads(attention(q, k, v)) W_o;  (B, T, D) -> (B, T, D).

    Vaswani et al. 2017, section 3.2.2. With a cache, the keys and values are written into it first.
    Returns (out, the layer's cache).
    """

    cfg: GPT2Config
    ops: Ops = PLAIN

    @nn.compact
    def __call__(self, x_BTD, layer_cache, pos, seeds_3):
        cfg, ops = self.cfg, self.ops
        D, HK = (cfg.n_embd,), (cfg.n_head, cfg.head_dim)  # axes of a Linear: (D,) and (H, K)
        qkv = Linear(cfg, ops, D, (3, *HK), cfg.initializer_range, name='c_attn')
        parts = jnp.split(qkv(x_BTD), 3, axis=2)
        q_BTHK, k_BTHK, v_BTHK = (
            tap(self, name, part.squeeze(2)) for name, part in zip('qkv', parts, strict=True)
        )
        pattern_dropout = cfg.attn_pdrop > 0 and seeds_3[0] is not None
        if ops.attention and layer_cache is None and not pattern_dropout:
            z_BTHK = ops.attention(q_BTHK, k_BTHK, v_BTHK)
        else:
            k_BHSK, v_BHSK = k_BTHK.swapaxes(1, 2), v_BTHK.swapaxes(1, 2)
            if layer_cache is not None:
                k_BHSK, v_BHSK = layer_cache = write_cache(layer_cache, (k_BHSK, v_BHSK), pos)
            options = dict(precision=cfg.precision, rate=cfg.attn_pdrop, seed=seeds_3[0], ops=ops)
            z_BTHK = causal_attention(
                q_BTHK, k_BHSK, v_BHSK, pos, tap=partial(tap, self), **options
            )
        z_BTHK = tap(self, 'z', z_BTHK)
        out_BTD = Linear(cfg, ops, HK, D, residual_std(cfg), name='c_proj')(z_BTHK)
        return dropout(out_BTD, seeds_3[1], cfg.resid_pdrop), layer_cache


class MLP(nn.Module):
    """out = gelu(x W_fc + b_fc) W_proj + b_proj;  (B, T, D) -> (B, T, D).

    Vaswani et al. 2017, equation 2, with GELU (Hendrycks & Gimpel 2016), in fp32, in place of ReLU.
    """

    cfg: GPT2Config
    ops: Ops = PLAIN

    @nn.compact
    def __call__(self, x_BTD, seed):
        cfg, ops = self.cfg, self.ops
        D, F = (cfg.n_embd,), (cfg.d_ff,)  # axes of a Linear: (D,) and (F,)
        h_BTF = Linear(cfg, ops, D, F, cfg.initializer_range, name='c_fc')(x_BTD)
        h_BTF = ops.activate(cfg.activation_function, tap(self, 'mlp_pre', h_BTF))
        h_BTF = tap(self, 'mlp_post', h_BTF)
        out_BTD = Linear(cfg, ops, F, D, residual_std(cfg), name='c_proj')(h_BTF)
        return dropout(out_BTD, seed, cfg.resid_pdrop)


class Block(nn.Module):
    """x = x + attn(ln_1(x));  x = x + mlp(ln_2(x)).

    LayerNorm comes first, so that the residual stream x itself is never normalised (GPT-2, section
    2.3). Returns (x, the layer's cache).
    """

    cfg: GPT2Config
    ops: Ops = PLAIN

    @nn.compact
    def __call__(self, x_BTD, layer_cache, pos, seeds_3):
        cfg, ops = self.cfg, self.ops
        attn = CausalSelfAttention(cfg, ops, name='attn')
        x_BTD = tap(self, 'resid_pre', x_BTD)
        y_BTD = tap(self, 'ln_1', LayerNorm(cfg, ops, name='ln_1')(x_BTD))
        y_BTD, layer_cache = attn(y_BTD, layer_cache, pos, seeds_3)
        x_BTD = tap(self, 'resid_mid', x_BTD + tap(self, 'attn_out', y_BTD))
        y_BTD = tap(self, 'ln_2', LayerNorm(cfg, ops, name='ln_2')(x_BTD))
        y_BTD = tap(self, 'mlp_out', MLP(cfg, ops, name='mlp')(y_BTD, seeds_3[2]))
        return tap(self, 'resid_post', x_BTD + y_BTD), layer_cache


class GPT2(nn.Module):
    """x = wte[token] + wpe[position];  x = block_i(x) for i < L;  logits = ln_f(x) wte^T."""

    cfg: GPT2Config
    ops: Ops = PLAIN

    def setup(self):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        self.wte = nn.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=init)
        self.wpe = nn.Embed(cfg.n_positions, cfg.n_embd, embedding_init=init)
        policy = REMAT_POLICIES.get(cfg.remat)
        block = nn.remat(Block, policy=policy) if policy else Block
        self.h = [block(cfg, self.ops) for _ in range(cfg.n_layer)]
        self.ln_f = LayerNorm(cfg, self.ops)

    def __call__(self, tokens_BT, dropout_key=None):
        """Logits of the next token at every position: int (B, T) -> fp32 (B, T, V).

        Without a key there is no dropout. Raises ValueError as `features` does.
        """
        x_BTD, _ = self.features(tokens_BT, dropout_key=dropout_key)
        return self.head(x_BTD)

    def features(self, tokens_BT, cache: Cache | None = None, pos=0, dropout_key=None):
        """The final hidden states x_BTD, and the cache with the keys and values of these tokens.

        With a cache, the tokens are at positions pos .. pos + T - 1 and see all tokens before
        them. Without one, the second result is None. Raises ValueError if the tokens end after
        n_positions, or have another number of axes; a traced `pos` cannot be checked.
        """
        if tokens_BT.ndim != 2:
            raise ValueError(f'tokens of shape {tokens_BT.shape}: expected (B, T)')
        cfg, T = self.cfg, tokens_BT.shape[1]
        first = 0 if isinstance(pos, jax.core.Tracer) else int(pos)
        if first + T > cfg.n_positions:
            start = f', from position {first} on,' if first else ''
            raise ValueError(
                f'a sequence of {T} tokens{start} is longer than n_positions = {cfg.n_positions}'
            )
        seeds = dropout_seeds(cfg, dropout_key)  # one for the embeddings, then three a block
        embed_BTD, pos_embed_TD = embed(self.wte.embedding, self.wpe.embedding, tokens_BT, pos)
        x_BTD = tap(self, 'embed', embed_BTD) + tap(self, 'pos_embed', pos_embed_TD)
        x_BTD = dropout(x_BTD.astype(cfg.stream_dtype), seeds[0], cfg.embd_pdrop)
        layers = []
        for i, block in enumerate(self.h):
            x_BTD, layer_cache = block(x_BTD, cache and cache[i], pos, seeds[1 + 3 * i : 4 + 3 * i])
            layers.append(layer_cache)
        return tap(self, 'ln_f', self.ln_f(x_BTD)), cache and tuple(layers)

    def head(self, x_BTD):
        """Logits through the tied token embedding, summed in fp32: (..., D) -> (..., V)."""
        wte_VD = self.wte.embedding.astype(self.cfg.compute_dtype)
        return tap(self, 'logits', self.ops.logits(x_BTD, wte_VD, self.cfg.precision))


def embed(wte_VD, wpe_PD, tokens_BT, pos):
    """Embeddings of tokens at positions pos, pos + 1, ..: wte[token] BTD and wpe[position] TD."""
    wte_VD = jnp.asarray(wte_VD)  # traced tokens cannot index numpy parameters
    return wte_VD[tokens_BT], lax.dynamic_slice_in_dim(wpe_PD, pos, tokens_BT.shape[1])


def residual_std(cfg: GPT2Config) -> float:
    """Initial std of the projections that write to the residual stream: 0.02 / sqrt(2 L).

    Then the 2 L writes add up to about the same variance at any depth L (GPT-2, section 2.3). 0.02
    is `initializer_range`.
    """
    return cfg.initializer_range / math.sqrt(2 * cfg.n_layer)


def init_cache(cfg: GPT2Config, batch: int) -> Cache:
    """An empty cache for `batch` sequences of up to n_positions tokens."""
    shape = batch, cfg.n_head, cfg.n_positions, cfg.head_dim
    zeros = jnp.zeros(shape, cfg.compute_dtype)
    return tuple((zeros, zeros) for _ in range(cfg.n_layer))


def write_cache(layer_cache, new, pos):
    """One layer's (k_BHSK, v_BHSK) with `new` (k_BHTK, v_BHTK) at positions pos .. pos + T - 1."""
    return tuple(
        lax.dynamic_update_slice_in_dim(old_BHSK, new_BHTK, pos, axis=2)
        for old_BHSK, new_BHTK in zip(layer_cache, new, strict=True)
    )
