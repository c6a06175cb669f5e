"""GPT-2 as a pure function of its parameters, in Flax linen.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), on the decoder of
Vaswani et al. 2017, "Attention Is All You Need". The model knows no files, no flags and no sharding.

Shapes stand in the names, one letter a dimension:

    B batch        T time (query position)      S source (key position)     D model width (n_embd)
    H heads        K head width = D / H         F feed-forward width        V vocabulary     L layers

The parameter tree has GPT-2's own names. Kernels are stored (in, out) as published, with the head axes
kept apart, so reading published weights is a reshape and never a transpose:

    wte/embedding (V, D)     wpe/embedding (n_positions, D)     ln_f/{scale, bias} (D,)
    h_i/ln_1, h_i/ln_2       {scale, bias} (D,)
    h_i/attn/c_attn          kernel (D, 3, H, K), bias (3, H, K)      h_i/attn/c_proj   (H, K, D), (D,)
    h_i/mlp/c_fc             kernel (D, F), bias (F,)                 h_i/mlp/c_proj    (F, D), (D,)
"""

import dataclasses
import functools
import math
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# One layer's keys and values of every position seen so far, (k_BHSK, v_BHSK); a cache is one pair per layer. Heads come
# before positions: decoding reads each head's keys in one piece.
Cache = tuple[tuple[jax.Array, jax.Array], ...]

# GPT-2 was trained with the tanh approximation ('gelu_new'); 'gelu' is the exact one, as in nanoGPT.
ACTIVATIONS = {
    'gelu_new': functools.partial(nn.gelu, approximate=True),
    'gelu': functools.partial(nn.gelu, approximate=False),
}

# What each value of `dtype` computes in, and how its matrix products round. HIGHEST keeps every bit of
# fp32 on a GPU too, where the default would silently be TF32 (10 mantissa bits).
PRECISIONS = {
    'float32': (jnp.float32, lax.Precision.HIGHEST),
    'tf32': (jnp.float32, lax.Precision.HIGH),
    'bfloat16': (jnp.bfloat16, lax.Precision.DEFAULT),
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The architecture, in GPT-2's own terms. Defaults live in `config.default_config()`, and only there."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None
    activation_function: str
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float
    layer_norm_epsilon: float
    initializer_range: float
    bias: bool
    dtype: str
    remat: bool
    attention: str
    kernels: str

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_ff(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @property
    def compute_dtype(self) -> jnp.dtype:
        return PRECISIONS[self.dtype][0]

    @property
    def precision(self) -> lax.Precision:
        return PRECISIONS[self.dtype][1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_N, kernel, precision):
    """x W over the last dimensions of x: (N, *inputs), (*inputs, *outputs) -> (N, *outputs).

    The gradients are dx = dy W^T and dW = x^T dy. Left to itself, JAX takes (dy^T x)^T for the latter, with transposed
    copies where a side has several dimensions: 37.8 against 35.1 ms of CPU time a step (4 layers, 128 wide, 12 x 64).
    """
    return jnp.tensordot(x_N, kernel, x_N.ndim - 1, precision=precision)


def _product_forward(x_N, kernel, precision):
    return product(x_N, kernel, precision), (x_N, kernel)


def _product_backward(precision, saved, dy_N):
    x_N, kernel = saved
    outputs = tuple(range(1 - dy_N.ndim, 0))
    dx_N = jnp.tensordot(dy_N, kernel, (outputs, outputs), precision=precision)
    return dx_N, jnp.tensordot(x_N, dy_N, (0, 0), precision=precision)


product.defvjp(_product_forward, _product_backward)


class Affine(nn.Module):
    """y = x W + b over the last dimensions of x, W ~ N(0, std), b = 0.  (B, T, *inputs) -> (B, T, *outputs).

    B and T are merged for the product: XLA then computes the gradient of W without transposed copies of x and y,
    which made a training step a quarter faster on a CPU (90 to 66 ms at 4 layers, 128 wide, 12 x 64).
    """

    cfg: GPT2Config
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self, x):
        dtype = self.cfg.compute_dtype
        kernel = self.param('kernel', nn.initializers.normal(self.std), (*self.inputs, *self.outputs)).astype(dtype)
        x_N = x.reshape(-1, *self.inputs).astype(dtype)
        y_N = product(x_N, kernel, self.cfg.precision)
        if self.cfg.bias:
            y_N = y_N + self.param('bias', nn.initializers.zeros, self.outputs).astype(dtype)
        return y_N.reshape(*x.shape[:2], *self.outputs)


def dropout_seeds(cfg: GPT2Config, key):
    """What the mask of each place with dropout is drawn from: (two random words, the place's number).

    Places: 0 the embeddings; then, layer by layer, the attention pattern, what attention adds, and what the MLP adds.
    """
    words_2 = jax.random.bits(key, (2,), jnp.uint32)
    return [(words_2, jnp.uint32(place)) for place in range(1 + 3 * cfg.n_layer)]


def mix(x):
    """A number that hangs on every bit of x, uint32 (the constants are Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(index, seeds, rate: float):
    """Which elements dropout keeps: True with probability 1 - rate, a hash of seeds (words, place) and `index`.

    A few multiplications, because JAX's generator, made for more, costs as much as the layers around it; and because
    any kernel can draw the same mask again, anywhere.
    """
    (a, b), place = seeds
    place = place * jnp.uint32(0x9E3779B9)  # a step for each place that spreads them over all of the range
    return mix(index ^ mix(a + place)) * (mix(b ^ place) | 1) >= jnp.uint32(rate * 2**32)


def dropout(x, seeds, rate: float):
    """Zeroes each element with probability `rate`, and scales the rest by 1 / (1 - rate); `seeds` None: nothing.

    Of more than 2^32 elements (350 attention patterns of GPT-2) those that many apart have one mask.
    """
    if seeds is None or not rate:
        return x
    strides = [math.prod(x.shape[axis + 1:]) % 2**32 for axis in range(x.ndim)]
    index = sum(lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride) for axis, stride in
                enumerate(strides))
    return jnp.where(keep_mask(index, seeds, rate), x / (1 - rate), 0)


def residual_std(cfg: GPT2Config) -> float:
    """Spread of the projections that write to the residual stream: 0.02 / sqrt(2 L) (GPT-2, section 2.3).

    The stream is a sum of 2 L such writes, so this keeps its variance independent of the depth.
    """
    return cfg.initializer_range / math.sqrt(2 * cfg.n_layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalize(x, epsilon: float):
    """(x - mean(x)) r with r = (var(x) + epsilon)^(-1/2), over the last axis. (..., D) -> (..., D).

    For n = normalize(x):  dx = r (dn - mean(dn) - n mean(dn n)). Left to itself, JAX goes back through each operation
    of the forward pass, with more sums and more passes: 25.2 against 23.2 ms a step on a CPU (4 layers, 128 wide,
    12 x 64).
    """
    return _normalize_forward(x, epsilon)[0]


def _normalize_forward(x, epsilon):
    mean = x.mean(-1, keepdims=True)
    r = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)
    return (x - mean) * r, (x, mean, r)


def _normalize_backward(epsilon, saved, dn):
    x, mean, r = saved
    n = (x - mean) * r
    return (r * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)),)


normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis (Ba et al. 2016, eq. 4).

    The statistics are taken in fp32 whatever the compute dtype. (..., D) -> (..., D).
    """

    cfg: GPT2Config

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        y = normalize(x.astype(jnp.float32), self.cfg.layer_norm_epsilon) * scale
        if self.cfg.bias:
            y = y + self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.cfg.compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum_f32(equation: str, a, b, precision):
    """An einsum with an fp32 result, whose gradient takes its products in the operands' dtype too.

    Left to itself, JAX multiplies the fp32 cotangent with a bf16 operand in fp32, at a fraction of the speed.
    """
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _einsum_f32_forward(equation, a, b, precision):
    return einsum_f32(equation, a, b, precision), (a, b)


def _einsum_f32_backward(equation, precision, operands, g):
    _, pull_back = jax.vjp(lambda a, b: jnp.einsum(equation, a, b, precision=precision), *operands)
    return pull_back(g.astype(operands[0].dtype))


einsum_f32.defvjp(_einsum_f32_forward, _einsum_f32_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_keys(q_BTHK, k_BHSK, precision):
    """q k^T of each head, in fp32: (B, H, T, S). Its gradients are products in the operands' dtype, as einsum_f32's."""
    return jnp.einsum('BTHK,BHSK->BHTS', q_BTHK, k_BHSK, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mix_values(pattern_BHTS, v_BHSK, precision):
    """pattern v of each head: (B, T, H, K)."""
    return jnp.einsum('BHTS,BHSK->BHTK', pattern_BHTS, v_BHSK, precision=precision).swapaxes(1, 2)


def _sum_queries(a_BTHK, b_BHTS, precision):
    """sum_t b_ts a_tk: (B, H, S, K), the gradient in the keys or the values.

    XLA's fast products on a CPU sum over the last axis of what stands first. The smaller one is transposed to stand
    there: 21.1 ms a step, and 23.1 with the products as JAX derives them (4 layers, 128 wide, 12 x 64).
    """
    return jnp.einsum('BHKT,BHTS->BHKS', a_BTHK.transpose(0, 2, 3, 1), b_BHTS, precision=precision).swapaxes(2, 3)


def _dot_keys_backward(precision, saved, g_BHTS):
    q_BTHK, k_BHSK = saved
    g_BHTS = g_BHTS.astype(q_BTHK.dtype)
    dq_BHTK = jnp.einsum('BHTS,BHSK->BHTK', g_BHTS, k_BHSK, precision=precision)
    return dq_BHTK.swapaxes(1, 2), _sum_queries(q_BTHK, g_BHTS, precision)


def _mix_values_backward(precision, saved, dz_BTHK):
    pattern_BHTS, v_BHSK = saved
    dpattern_BHTS = jnp.einsum('BTHK,BHSK->BHTS', dz_BTHK, v_BHSK, precision=precision)
    return dpattern_BHTS, _sum_queries(dz_BTHK, pattern_BHTS, precision)


dot_keys.defvjp(lambda q, k, precision: (dot_keys(q, k, precision), (q, k)), _dot_keys_backward)
mix_values.defvjp(lambda pattern, v, precision: (mix_values(pattern, v, precision), (pattern, v)), _mix_values_backward)


def explicit_attention(q_BTHK, k_BHSK, v_BHSK, pos, seeds, rate, precision):
    """Causal scaled dot-product attention, every step in the open (Vaswani et al. 2017, eq. 1).

        scores = q k^T / sqrt(K)        pattern = softmax(scores where s <= pos + t, else -inf)        z = pattern v

    Query t stands at position pos + t and sees the keys at positions s <= pos + t: without a cache pos is 0 and
    S = T; with one, S is the whole cache and what lies beyond the query is masked, written or not. The softmax is
    in fp32; `seeds` and `rate` are those of the pattern's dropout. Returns z_BTHK.
    """
    T, S, K = q_BTHK.shape[1], k_BHSK.shape[2], q_BTHK.shape[-1]
    scores_BHTS = dot_keys(q_BTHK, k_BHSK, precision) / math.sqrt(K)
    visible_TS = jnp.arange(S) <= pos + jnp.arange(T)[:, None]
    scores_BHTS = jnp.where(visible_TS, scores_BHTS, -jnp.inf)
    pattern_BHTS = dropout(jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BHSK.dtype), seeds, rate)
    return mix_values(pattern_BHTS, v_BHSK, precision)


class CausalSelfAttention(nn.Module):
    """q, k, v = x W_qkv;  out = concat_heads(attention(q, k, v)) W_o  (Vaswani et al. 2017, section 3.2.2)."""

    cfg: GPT2Config

    @nn.compact
    def __call__(self, x_BTD, layer_cache, pos, seeds_3):
        cfg, heads = self.cfg, (self.cfg.n_head, self.cfg.head_dim)
        qkv_BT3HK = Affine(cfg, (cfg.n_embd,), (3, *heads), cfg.initializer_range, name='c_attn')(x_BTD)
        # Not slices: their gradients are padded and added (on a CPU 1.67 against 1.58 ms for attention and projection).
        q_BTHK, k_BTHK, v_BTHK = (part.squeeze(2) for part in jnp.split(qkv_BT3HK, 3, axis=2))
        if cfg.attention == 'cudnn' and layer_cache is None:
            z_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation='cudnn')
        else:
            k_BHSK, v_BHSK = k_BTHK.swapaxes(1, 2), v_BTHK.swapaxes(1, 2)
            if layer_cache is not None:
                k_BHSK, v_BHSK = layer_cache = tuple(
                    lax.dynamic_update_slice_in_dim(old, new, pos, axis=2)
                    for old, new in zip(layer_cache, (k_BHSK, v_BHSK), strict=True))
            z_BTHK = explicit_attention(q_BTHK, k_BHSK, v_BHSK, pos, seeds_3[0], cfg.attn_pdrop, cfg.precision)
        out_BTD = Affine(cfg, heads, (cfg.n_embd,), residual_std(cfg), name='c_proj')(z_BTHK)
        return dropout(out_BTD, seeds_3[1], cfg.resid_pdrop), layer_cache


class MLP(nn.Module):
    """out = gelu(x W_fc + b_fc) W_proj + b_proj  (Vaswani et al. 2017, eq. 2, with GELU, Hendrycks & Gimpel 2016)."""

    cfg: GPT2Config

    @nn.compact
    def __call__(self, x_BTD, seeds):
        cfg = self.cfg
        h_BTF = ACTIVATIONS[cfg.activation_function](
            Affine(cfg, (cfg.n_embd,), (cfg.d_ff,), cfg.initializer_range, name='c_fc')(x_BTD))
        out_BTD = Affine(cfg, (cfg.d_ff,), (cfg.n_embd,), residual_std(cfg), name='c_proj')(h_BTF)
        return dropout(out_BTD, seeds, cfg.resid_pdrop)


class Block(nn.Module):
    """x = x + attn(ln_1(x));  x = x + mlp(ln_2(x)): LayerNorm first, a clean residual path (GPT-2, section 2.3)."""

    cfg: GPT2Config

    @nn.compact
    def __call__(self, x_BTD, layer_cache, pos, seeds_3):
        attn_BTD, layer_cache = CausalSelfAttention(self.cfg, name='attn')(
            LayerNorm(self.cfg, name='ln_1')(x_BTD), layer_cache, pos, seeds_3)
        x_BTD = x_BTD + attn_BTD
        x_BTD = x_BTD + MLP(self.cfg, name='mlp')(LayerNorm(self.cfg, name='ln_2')(x_BTD), seeds_3[2])
        return x_BTD, layer_cache


def add_rows(cfg: GPT2Config, table_VD, tokens_BT, rows_BTD):
    """The table with each row of `rows` added at its token: the gradient of a look-up, on top of another.

    For a small vocabulary it is a matrix product. A GPU does the usual scatter-add with atomics, in no fixed order, so
    that two runs differ; and 16,384 rows that all go to 65 places wait for each other (15 of 25 ms a step in bf16 on an
    H100).
    """
    V = table_VD.shape[0]
    if V > 1024:
        return table_VD.at[tokens_BT].add(rows_BTD.astype(table_VD.dtype))
    chosen_BTV = jax.nn.one_hot(tokens_BT, V, dtype=cfg.compute_dtype)
    return table_VD + jnp.einsum('BTV,BTD->VD', chosen_BTV, rows_BTD.astype(cfg.compute_dtype), precision=cfg.precision,
                                 preferred_element_type=table_VD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(cfg: GPT2Config, table_VD, tokens_BT):
    """table[tokens], (B, T, D)."""
    return table_VD[tokens_BT]


look_up.defvjp(lambda cfg, table_VD, tokens_BT: (table_VD[tokens_BT], (jnp.zeros_like(table_VD), tokens_BT)),
               lambda cfg, saved, g_BTD: (add_rows(cfg, *saved, g_BTD), None))


def embed(cfg: GPT2Config, wte_VD, wpe_PD, tokens_BT, pos):
    """wte[token] + wpe[position] for tokens at positions pos, pos + 1, ..: (B, T, D)."""
    wpe_TD = lax.dynamic_slice_in_dim(wpe_PD, pos, tokens_BT.shape[1])
    return (look_up(cfg, wte_VD, tokens_BT) + wpe_TD).astype(cfg.compute_dtype)


class GPT2(nn.Module):
    """x = wte[token] + wpe[position];  x = block_i(x), i < L;  logits = ln_f(x) wte^T."""

    cfg: GPT2Config

    def setup(self):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        self.wte = nn.Embed(cfg.vocab_size, cfg.n_embd, embedding_init=init)
        self.wpe = nn.Embed(cfg.n_positions, cfg.n_embd, embedding_init=init)
        block = nn.remat(Block) if cfg.remat else Block
        self.h = [block(cfg) for _ in range(cfg.n_layer)]
        self.ln_f = LayerNorm(cfg)

    def __call__(self, tokens_BT, dropout_key=None):
        """Logits of the next token at every position: int (B, T) -> fp32 (B, T, V). Without a key, no dropout."""
        x_BTD, _ = self.features(tokens_BT, dropout_key=dropout_key)
        return self.head(x_BTD)

    def features(self, tokens_BT, cache: Cache | None = None, pos=0, dropout_key=None):
        """The final hidden states, and the cache with these tokens' keys and values written in.

        With a cache the tokens stand at positions pos .. pos + T - 1 and see what was written before.
        Raises ValueError where T is longer than the learned positions. Returns x_BTD, cache (or None).
        """
        cfg, T = self.cfg, tokens_BT.shape[1]
        if cfg.n_positions < T:
            raise ValueError(f'a sequence of {T} tokens is longer than n_positions = {cfg.n_positions}')
        seeds = [None] * (1 + 3 * cfg.n_layer) if dropout_key is None else dropout_seeds(cfg, dropout_key)
        x_BTD = embed(cfg, self.wte.embedding, self.wpe.embedding, tokens_BT, pos)
        x_BTD = dropout(x_BTD, seeds[0], cfg.embd_pdrop)
        layers = []
        for i, block in enumerate(self.h):
            x_BTD, layer_cache = block(x_BTD, cache and cache[i], pos, seeds[1 + 3 * i:4 + 3 * i])
            layers.append(layer_cache)
        return self.ln_f(x_BTD), cache and tuple(layers)

    def head(self, x_BTD):
        """Logits through the tied token embedding, accumulated in fp32: (..., D) -> (..., V)."""
        wte_VD, V = self.wte.embedding.astype(self.cfg.compute_dtype), self.cfg.vocab_size
        if V > 1024:
            # 50,257 is odd, and the fast matrix products need multiples of 8: with rows of zeros up to a multiple of
            # 128 the head is several times faster on a GPU. The logits of the padding are cut off.
            wte_VD = jnp.pad(wte_VD, ((0, -V % 128), (0, 0)))
        return einsum_f32('...D,VD->...V', x_BTD, wte_VD, self.cfg.precision)[..., :V]


def init_params(model: GPT2, seed: int):
    """Freshly drawn fp32 parameters; a pure function of the seed."""
    cfg = dataclasses.replace(model.cfg, attention='explicit')  # the same, and traced where no cuDNN is
    ends_key, blocks_key = jax.random.split(jax.random.key(seed))
    params = GPT2(dataclasses.replace(cfg, n_layer=0)).init(ends_key, jnp.zeros((1, 1), jnp.int32))['params']
    x_BTD = jnp.zeros((1, 1, cfg.n_embd), cfg.compute_dtype)
    # All blocks at once, for as long as that takes beside their slices: drawing 26 matrices one by one takes a GPU six
    # seconds to compile, this three. The barrier keeps XLA from drawing again for each slice.
    blocks = lax.optimization_barrier(jax.vmap(lambda key: Block(cfg).init(key, x_BTD, None, 0, (None,) * 3)['params'])(
        jax.random.split(blocks_key, cfg.n_layer)))
    return params | {f'h_{i}': jax.tree.map(operator.itemgetter(i), blocks) for i in range(cfg.n_layer)}


def init_cache(cfg: GPT2Config, batch: int) -> Cache:
    """An empty cache for `batch` sequences of up to n_positions tokens."""
    shape = (batch, cfg.n_head, cfg.n_positions, cfg.head_dim)
    return tuple((jnp.zeros(shape, cfg.compute_dtype), jnp.zeros(shape, cfg.compute_dtype)) for _ in range(cfg.n_layer))


def count_params(params) -> int:
    """The number of parameters, the tied head counted once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flops_per_token(cfg: GPT2Config, seq_len: int) -> int:
    """Model FLOPs of one training token, forward and backward (Chowdhery et al. 2022, PaLM, appendix B).

    6 for each weight that multiplies a token (the tied head counts, the two embedding look-ups do not), and
    12 L D T for the two attention products, with no discount for the causal half.
    """
    D, F = cfg.n_embd, cfg.d_ff
    matmul_weights = cfg.n_layer * (4 * D * D + 2 * D * F) + cfg.vocab_size * D
    return 6 * matmul_weights + 12 * cfg.n_layer * D * seq_len
