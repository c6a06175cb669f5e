"""The model against plain numpy and Flax: forward, gradients, cache, dropout, initial values."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GELU, flat, numpy_gpt2, rough_params, shapes, tiny, tokens

from gpt2_jax.architecture import GPT2Config, flops_per_token
from gpt2_jax.config import default_config
from gpt2_jax.model.dropout import dropout_seeds, keep_mask
from gpt2_jax.model.gpt2 import (
    GPT2,
    MLP,
    CausalSelfAttention,
    LayerNorm,
    causal_attention,
    init_cache,
)
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.ops import activate, matmul_rows
from gpt2_jax.model.params import count_params, init_params

CLOSE = dict(rtol=2e-5, atol=2e-5)  # fp32 against fp64, for values about 1


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(bias=False, activation_function='gelu', n_head=4, n_inner=24, n_layer=3),
        dict(vocab_size=1030, n_layer=1),
    ],
)
def test_forward_equals_numpy(changes):
    # Without a key, dropout is off whatever its rates.
    model = tiny(**changes, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    params, tokens_BT = rough_params(model), tokens(model, length=9)
    logits_BTV = jax.jit(model.apply)({'params': params}, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    expected_BTV = numpy_gpt2(params, model.cfg, tokens_BT)
    assert np.std(expected_BTV) > 0.5
    np.testing.assert_allclose(logits_BTV, expected_BTV, **CLOSE)


@pytest.mark.parametrize(('inputs', 'outputs'), [((5,), (7,)), ((2, 3), (4,)), ((5,), (3, 2, 4))])
def test_gradients_of_matmul_rows(inputs, outputs):
    rng = np.random.default_rng(0)
    sizes = (6, *inputs), inputs + outputs, (6, *outputs)
    x_N, kernel, dy_N = (np.float32(rng.normal(size=size)) for size in sizes)
    y_N, pull_back = jax.vjp(lambda x, w: matmul_rows(x, w, 'highest'), x_N, kernel)
    expected_N, theirs = jax.vjp(
        lambda x, w: jnp.tensordot(x, w, len(inputs), precision='highest'), x_N, kernel
    )
    np.testing.assert_array_equal(y_N, expected_N)
    for ours, expected in zip(pull_back(dy_N), theirs(dy_N), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_causality_by_gradient():
    model = tiny()
    params, tokens_BT = rough_params(model), tokens(model, batch=1)
    mix_V = np.random.default_rng(0).normal(size=11)

    # A row of wpe enters at its own position only, as the input embedding there.
    def outputs_T(wpe):
        return model.apply({'params': params | {'wpe': {'embedding': wpe}}}, tokens_BT)[0] @ mix_V

    gradient_TSD = np.asarray(jax.jit(jax.jacrev(outputs_T))(params['wpe']['embedding']))
    sees_TS = np.any(gradient_TSD != 0, axis=-1)
    assert np.isfinite(gradient_TSD).all()
    assert np.array_equal(sees_TS, np.tril(np.ones((12, 12), bool)))


@pytest.mark.parametrize(('T', 'S', 'pos'), [(7, 7, 0), (1, 9, 4), (3, 9, 5)])
def test_attention_equals_fused_and_loop(T, S, pos):
    B, H, K = 2, 3, 4
    rng = np.random.default_rng(0)
    q_BTHK, k_BSHK, v_BSHK = (rng.normal(0, 2, (B, n, H, K)).astype(np.float32) for n in (T, S, S))
    explicit = jax.jit(lambda *args: causal_attention(*args))
    z_BTHK = explicit(q_BTHK, k_BSHK.swapaxes(1, 2), v_BSHK.swapaxes(1, 2), pos)
    causal = (
        dict(is_causal=True)
        if S == T
        else dict(mask=(np.arange(S) <= pos + np.arange(T)[:, None])[None, None])
    )
    fused = jax.jit(
        lambda *args: jax.nn.dot_product_attention(*args, implementation='xla', **causal)
    )
    np.testing.assert_allclose(z_BTHK, fused(q_BTHK, k_BSHK, v_BSHK), rtol=1e-5, atol=1e-6)

    for b, t, h in np.ndindex(B, T, H):
        scores = [
            math.exp(sum(q_BTHK[b, t, h] * k_BSHK[b, s, h]) / math.sqrt(K))
            for s in range(pos + t + 1)
        ]
        expected_K = sum(score * v_BSHK[b, s, h] for s, score in enumerate(scores)) / sum(scores)
        np.testing.assert_allclose(z_BTHK[b, t, h], expected_K, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('bias', [True, False])
def test_layer_norm_equals_flax_and_numpy(bias):
    rng = np.random.default_rng(0)
    # Variances from 1e-6, so that epsilon counts.
    x = np.float32(rng.normal(3, 1, (5, 16)) * 10.0 ** np.arange(-3, 2)[:, None])
    params = {'scale': np.float32(rng.normal(1, 1, 16))}
    if bias:
        params['bias'] = np.float32(rng.normal(0, 1, 16))
    cfg = tiny(bias=bias).cfg
    y = LayerNorm(cfg).apply({'params': params}, x)
    eps = cfg.layer_norm_epsilon
    flax = nn.LayerNorm(epsilon=eps, use_bias=bias, use_fast_variance=False)
    np.testing.assert_allclose(y, flax.apply({'params': params}, x), **CLOSE)
    x = x.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    np.testing.assert_allclose(y, x * params['scale'] + params.get('bias', 0), **CLOSE)


def test_activations_equal_their_formulas():
    x = np.linspace(-6, 6, 101)
    for name, formula in GELU.items():
        np.testing.assert_allclose(activate(name, jnp.float32(x)), formula(x), rtol=1e-5, atol=2e-6)
    # The lines above tell the two apart.
    assert np.abs(GELU['gelu'](x) - GELU['gelu_new'](x)).max() > 1e-4


def test_remat_changes_nothing():
    def loss(params, seed, remat):
        model = tiny(**small, attn_pdrop=0.2, resid_pdrop=0.3, remat=remat)
        logits_BTV = model.apply({'params': params}, tokens_BT[:, :-1], jax.random.key(seed))
        return token_losses(logits_BTV, tokens_BT[:, 1:]).mean()

    small = dict(n_layer=1, bias=False)
    params, tokens_BT = rough_params(tiny(**small)), tokens(tiny())
    run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    loss_off, gradients_off = run(params, 7, 'none')
    for remat in ('block', 'dots'):
        loss_on, gradients_on = run(params, 7, remat)
        np.testing.assert_allclose(loss_on, loss_off, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            gradients_on,
            gradients_off,
        )
    assert abs(run(params, 8, 'block')[0] - loss_on) > 1e-3, 'dropout is off'
    products = {
        remat: str(jax.make_jaxpr(jax.grad(loss), static_argnums=2)(params, 7, remat)).count(
            '= dot_general['
        )
        for remat in ('none', 'block', 'dots')
    }
    # Recomputed: the products of a block but the last one; and of these, attention's two.
    assert products['block'] == products['none'] + 5
    assert products['dots'] == products['none'] + 2


def test_cached_equals_full_at_every_position():
    model = tiny()
    params, tokens_BT = rough_params(model), tokens(model)
    full_BTV = jax.jit(model.apply)({'params': params}, tokens_BT)

    @jax.jit
    def feed(cache, tokens_BT, pos):
        x_BTD, cache = model.apply({'params': params}, tokens_BT, cache, pos, method='features')
        return model.apply({'params': params}, x_BTD, method='head'), cache

    for sizes in ([1] * 12, [5] + [1] * 7, [11, 1], [5, 5, 1, 1]):
        # Whatever an earlier text left in the cache must not be seen.
        cache, pos = jax.tree.map(lambda leaf: leaf + 100, init_cache(model.cfg, batch=3)), 0
        for size in sizes:
            logits_BTV, cache = feed(cache, tokens_BT[:, pos : pos + size], pos)
            np.testing.assert_allclose(logits_BTV, full_BTV[:, pos : pos + size], **CLOSE)
            pos += size
        assert pos == 12


def test_parameter_tree():
    cfg = tiny(n_layer=3, n_head=4, n_embd=8, n_inner=20, n_positions=6).cfg
    block = {
        'ln_1/scale': (8,),
        'ln_1/bias': (8,),
        'ln_2/scale': (8,),
        'ln_2/bias': (8,),
        'attn/c_attn/kernel': (8, 3, 4, 2),
        'attn/c_attn/bias': (3, 4, 2),
        'attn/c_proj/kernel': (4, 2, 8),
        'attn/c_proj/bias': (8,),
        'mlp/c_fc/kernel': (8, 20),
        'mlp/c_fc/bias': (20,),
        'mlp/c_proj/kernel': (20, 8),
        'mlp/c_proj/bias': (8,),
    }
    expected = {
        'wte/embedding': (11, 8),
        'wpe/embedding': (6, 8),
        'ln_f/scale': (8,),
        'ln_f/bias': (8,),
    }
    expected |= {f'h_{i}/{name}': shape for i in range(3) for name, shape in block.items()}
    leaves = flat(shapes(GPT2(cfg)))
    assert {name: leaf.shape for name, leaf in leaves.items()} == expected
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype('float32')}

    no_bias = flat(shapes(tiny(bias=False)))
    assert set(no_bias) == {name for name in flat(shapes(tiny())) if not name.endswith('bias')}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(tiny(dtype='bfloat16')))} == {
        jnp.dtype('float32')
    }


def test_published_parameter_counts():
    published = {
        (12, 12, 768): 124_439_808,
        (24, 16, 1024): 354_823_168,
        (36, 20, 1280): 774_030_080,
        (48, 25, 1600): 1_557_611_200,
    }
    for (L, H, D), count in published.items():
        settings = default_config().model.to_dict() | dict(n_layer=L, n_head=H, n_embd=D)
        F, V, P = 4 * D, 50257, 1024
        layer = 4 * D + D * 3 * D + 3 * D + D * D + D + 2 * D * F + F + D
        assert count == V * D + P * D + 2 * D + L * layer
        if L == 12:  # the defaults are this model
            assert settings == default_config().model.to_dict()
            assert count_params(shapes(GPT2(GPT2Config(**settings, vocab_size=V)))) == count


def test_initial_values():
    L = 2
    model = tiny(vocab_size=65, n_layer=L, n_embd=64, n_positions=64)
    init = jax.jit(lambda seed: init_params(model.cfg, seed))
    params = init(3)
    groups = {}
    for name, leaf in flat(params).items():
        groups.setdefault(re.sub(r'h_\d+/', '', name), []).append(np.asarray(leaf))
    assert len(groups) == 16
    for name, leaves in groups.items():
        values = np.concatenate([leaf.ravel() for leaf in leaves])
        if name.endswith(('bias', 'scale')):
            assert np.all(values == name.endswith('scale')), name
            continue
        std, n = 0.02 / math.sqrt(2 * L) if 'c_proj' in name else 0.02, len(values)
        assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * n), name
        assert abs(values.mean()) < 5 * std / math.sqrt(n), name
        kurtosis = np.mean((values / std) ** 4)  # of a normal distribution that is not truncated
        assert abs(kurtosis - 3) < 5 * math.sqrt(96 / n), name
        assert not any(np.array_equal(leaves[0], other) for other in leaves[1:]), name
    for seed, same in ((3, True), (4, False)):
        pair = [tree['h_0']['mlp']['c_fc']['kernel'] for tree in (init(seed), params)]
        assert np.array_equal(*pair) == same

    tokens_BT = tokens(model, batch=4)
    losses_BT = token_losses(
        jax.jit(model.apply)({'params': params}, tokens_BT[:, :-1]), tokens_BT[:, 1:]
    )
    assert abs(losses_BT.mean() - math.log(65)) < 0.05


B, T = 64, 16
x_BTD = np.tile(np.eye(T, dtype=np.float32), (B, 1, 1))


def check_dropout(output, expected, rate):
    """Each element is 0 or expected / (1 - rate), drawn separately for each row and site."""
    output, expected = np.asarray(output), np.broadcast_to(expected, output.shape)
    dropped = output == 0
    assert np.all(expected != 0)
    np.testing.assert_allclose(
        output[~dropped], expected[~dropped] / (1 - rate), rtol=1e-4, atol=1e-6
    )
    assert abs(dropped.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / dropped.size)
    for axis in range(dropped.ndim):
        shares = dropped.mean(axis)  # 0 or 1 if all indices of the axis shared one mask
        assert shares.std() < 1.5 * math.sqrt(rate * (1 - rate) / dropped.shape[axis])


def on_and_off(module, params, *args, sites):
    """The module's outputs with the seeds of that many dropout sites, and without."""
    seeds = dropout_seeds(tiny(n_layer=1).cfg, jax.random.key(5))
    on, off = (seeds[0], None) if sites == 1 else (seeds[1 : 1 + sites], [None] * sites)
    return jax.jit(
        lambda: tuple(module.apply({'params': params}, *args, which) for which in (on, off))
    )()


def test_dropout_of_the_pattern():
    model = tiny(n_head=1, n_embd=T, n_positions=T, attn_pdrop=0.3, bias=False)
    # q = k = 0 and v = x = 1: the output is the pattern, 1 / (t + 1) for s <= t.
    kernel = np.zeros((T, 3, 1, T), np.float32)
    kernel[:, 2, 0] = np.eye(T)
    params = {'c_attn': {'kernel': kernel}, 'c_proj': {'kernel': np.eye(T, dtype=np.float32)[None]}}
    (pattern_BTS, _), _ = on_and_off(
        CausalSelfAttention(model.cfg), params, x_BTD, None, 0, sites=3
    )
    t, s = np.tril_indices(T)
    check_dropout(np.asarray(pattern_BTS)[:, t, s], 1 / (t + 1), 0.3)


def test_dropout_of_branches():
    model = tiny(n_embd=T, resid_pdrop=0.2)
    block = rough_params(model)['h_0']
    (out_BTD, _), (whole_BTD, _) = on_and_off(
        CausalSelfAttention(model.cfg), block['attn'], x_BTD, None, 0, sites=3
    )
    check_dropout(out_BTD, whole_BTD, 0.2)
    check_dropout(*on_and_off(MLP(model.cfg), block['mlp'], x_BTD, sites=1), 0.2)


def test_dropout_of_the_embeddings():
    model = tiny(n_layer=1, n_embd=T, n_positions=T, embd_pdrop=0.4)
    # Blocks that add nothing.
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes(model))
    params['wte']['embedding'] += 1
    params['ln_f']['scale'] += 1
    x_BTD, _ = jax.jit(
        lambda: model.apply(
            {'params': params}, tokens(model, B), method='features', dropout_key=jax.random.key(5)
        )
    )()
    # LayerNorm maps the two values, 0 and 1 / 0.6, to a negative and a positive one.
    check_dropout(np.asarray(x_BTD) > 0, 0.6, 0.4)


def test_masks_are_independent():
    """Elements of any two sites, keys or positions are kept together as often as by chance."""
    rate, n = 0.3, 1 << 16
    index = np.arange(n, dtype=np.uint32)
    cfg, keys = tiny(n_layer=2).cfg, map(jax.random.key, range(3))
    seeds = [seed for key in keys for seed in dropout_seeds(cfg, key)]
    assert len(seeds) == 3 * 7
    masks = [np.asarray(keep_mask(index, seed, rate)) for seed in seeds]
    masks += [np.roll(masks[0], lag) for lag in (1, 2, 64, 256, 4096)]
    spread = rate * (1 - rate) / math.sqrt(n)
    for i, mask in enumerate(masks):
        assert abs(mask.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
        for other in masks[:i]:
            assert abs(np.mean(mask & other) - mask.mean() * other.mean()) < 5 * spread


def test_bfloat16():
    model = tiny()
    params, tokens_BT = rough_params(model), tokens(model)
    exact, rounded = (
        np.asarray(jax.jit(tiny(dtype=dtype).apply)({'params': params}, tokens_BT))
        for dtype in ('float32', 'bfloat16')
    )
    assert rounded.dtype == np.float32
    assert 1e-3 < np.abs(rounded - exact).max() < 0.1 * exact.std()
    assert np.mean(rounded.view(np.uint32) & 0xFFFF != 0) > 0.9  # the head sums in fp32


def test_a_residual_stream_in_fp32():
    """It makes the errors of 12 layers in bf16 smaller, and changes nothing in fp32."""
    params, tokens_BT = rough_params(tiny(n_layer=12), std=0.1), tokens(tiny())

    def logits(**precision):
        model = tiny(n_layer=12, **precision)
        return np.asarray(model.apply({'params': params}, tokens_BT))

    exact = logits()
    np.testing.assert_array_equal(logits(residual_dtype='float32'), exact)
    error, smaller = (
        np.sqrt(np.square(logits(dtype='bfloat16', residual_dtype=name) - exact).mean())
        for name in ('compute', 'float32')
    )
    assert 0 < smaller < 0.85 * error


def matrix_products(model, tokens_BT) -> list[str]:
    """Every matrix product of the forward and backward pass in XLA's input."""
    run = jax.jit(
        jax.value_and_grad(lambda params: model.apply({'params': params}, tokens_BT).sum())
    )
    return [
        line for line in run.lower(shapes(model)).as_text().splitlines() if 'dot_general' in line
    ]


@pytest.mark.parametrize(
    ('dtype', 'element', 'precision'),
    [('float32', 'f32', 'HIGHEST'), ('tf32', 'f32', 'HIGH'), ('bfloat16', 'bf16', 'DEFAULT')],
)
def test_every_matrix_product_has_the_precision_of_the_setting(dtype, element, precision):
    """By default a GPU takes TF32 for fp32 products, and fp32 for a bf16 with an fp32 operand."""
    model = tiny(dtype=dtype)
    products = matrix_products(model, tokens(model))
    assert len(products) == 3 * (2 * 6 + 1)  # each with two gradients
    for line in products:
        assert re.search(
            rf'precision = \[{precision}, {precision}\] : '
            rf'\(tensor<[\dx]+x{element}>, tensor<[\dx]+x{element}>\)',
            line,
        ), line


def test_flops_per_token_counts_every_matrix_product():
    model = tiny(n_inner=24, n_layer=3)
    tokens_BT, flops = tokens(model), 0
    for line in matrix_products(model, tokens_BT):
        contracted = map(int, re.search(r'contracting_dims = \[([\d, ]+)\]', line)[1].split(','))
        left, out = (
            list(map(int, shape.split('x')))
            for shape in re.findall(r'tensor<([\dx]+)xf32>', line)[::2]
        )
        flops += 2 * math.prod(out) * math.prod(left[i] for i in contracted)  # 2 m n k
    assert flops == flops_per_token(model.cfg, 12) * tokens_BT.size


@pytest.mark.parametrize('shape', [(3,), (1, 3, 4)])
def test_tokens_of_another_shape_are_refused(shape):
    model = tiny()
    with pytest.raises(ValueError, match=r'tokens of shape .*: expected \(B, T\)'):
        jax.eval_shape(model.apply, {'params': shapes(model)}, np.zeros(shape, np.int32))


def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match='13 tokens is longer than n_positions = 12'):
        jax.eval_shape(model.apply, {'params': shapes(model)}, np.zeros((1, 13), np.int32))
    cache, ids_BT = init_cache(model.cfg, 1), np.zeros((1, 3), np.int32)
    for pos in (10, np.int64(10), jnp.int32(10)):
        with pytest.raises(ValueError, match='3 tokens, from position 10 on, is longer than n_pos'):
            model.apply({'params': rough_params(model)}, ids_BT, cache, pos, method='features')


@pytest.mark.parametrize(('rate', 'key', 'taken'), [(0.0, 1, 2), (0.5, None, 2), (0.5, 1, 0)])
def test_a_fast_attention_is_not_taken_where_the_pattern_has_dropout(rate, key, taken):
    """It has none. Both layers take it, or neither."""
    calls = []

    def attention(q_BTHK, k_BTHK, v_BTHK):
        calls.append(q_BTHK.shape)
        return v_BTHK

    model = tiny(attn_pdrop=rate)
    model = model.clone(ops=model.ops._replace(attention=attention))
    key = None if key is None else jax.random.key(key)
    jax.eval_shape(lambda p: model.apply({'params': p}, tokens(model), key), shapes(model))
    assert len(calls) == taken
