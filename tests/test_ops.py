"""Plain and fast arithmetic are equal; the plain model can be differentiated in every way; taps."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GELU, flat, numpy_gpt2, rough_params, tiny, tokens

from gpt2_jax.architecture import padded_vocab
from gpt2_jax.kernels.norm import add_norm
from gpt2_jax.model.dropout import dropout, dropout_seeds, keep_mask
from gpt2_jax.model.gpt2 import GPT2, causal_attention
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.ops import (
    FAST,
    PLAIN,
    REMAT_POLICIES,
    activate,
    fast_activate,
    fast_logits,
    logits,
    matmul_rows_each,
)

# A head width of 32, three heads, an odd vocabulary above 1,024, texts of 21 tokens.
ODD = dict(vocab_size=1030, n_layer=1, n_head=3, n_embd=96, n_positions=21)
CASES = {
    'tiny': {},
    'odd sizes': ODD,
    'one head, exact gelu, no bias': dict(
        n_layer=1, n_head=1, activation_function='gelu', n_inner=24, n_positions=7, bias=False
    ),
    'dropout, remat': dict(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3, remat='block'),
}


def value_and_grad(model, params, text_BT):
    """Logits, loss and gradients, with dropout if the model has any."""

    def loss(params):
        key = jax.random.key(3) if model.cfg.embd_pdrop else None
        logits_BTV = model.apply({'params': params}, text_BT[:, :-1], key)
        return token_losses(logits_BTV, text_BT[:, 1:]).mean(), logits_BTV

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits_BTV), grads = jax.device_get(run(params))
    return logits_BTV, value, grads


def test_several_products_of_one_input():
    """Their values and gradients are those of single products, and each but one is a left operand.

    Which operand it is decides what XLA runs on a GPU: see matmul_rows_each.
    """
    rng = np.random.default_rng(0)
    x_ND, *kernels, a, b, c = (
        jnp.float32(rng.normal(size=shape))
        for shape in ((5, 3), (3, 2), (3, 4), (3, 2, 2), (5, 2), (5, 4), (5, 2, 2))
    )
    single = jax.vjp(lambda x, w: tuple(jnp.tensordot(x, k, 1) for k in w), x_ND, tuple(kernels))
    joined = jax.vjp(lambda x, w: matmul_rows_each(x, w, 'highest'), x_ND, tuple(kernels))
    for ours, theirs in zip(
        jax.tree.leaves((joined[0], joined[1]((a, b, c)))),
        jax.tree.leaves((single[0], single[1]((a, b, c)))),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    equations = jax.make_jaxpr(joined[1])((a, b, c)).eqns
    made_by = {out: eqn.primitive.name for eqn in equations for out in eqn.outvars}
    added = [made_by[eqn.invars[0]] for eqn in equations if eqn.primitive.name == 'add']
    assert added == ['dot_general'] * 2


def test_several_products_of_one_input_are_kept_by_remat_dots():
    """Three products forwards and six backwards: none is computed again, unlike with 'block'."""

    def loss(x_ND, kernels):
        return sum(jnp.sin(y_ND).sum() for y_ND in matmul_rows_each(x_ND, kernels, 'highest'))

    def count(policy):
        gradient = jax.grad(jax.checkpoint(loss, policy=REMAT_POLICIES[policy]), argnums=(0, 1))
        traced = jax.make_jaxpr(gradient)(jnp.ones((5, 3)), (jnp.ones((3, 4)),) * 3)
        return str(traced).count('dot_general[')

    assert (count('dots'), count('block')) == (9, 12)


LONG = ('tiny',)  # each of its sizes is one of another case


@pytest.mark.parametrize(
    'name', [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES]
)
def test_plain_and_fast_are_equal_in_fp32(name):
    """The forward pass bit for bit, gradients to 1e-6 of the largest in their leaf."""
    model = tiny(**CASES[name])
    params, text_BT = rough_params(model, std=0.2), tokens(model)
    plain, fast = (value_and_grad(model.clone(ops=ops), params, text_BT) for ops in (PLAIN, FAST))
    assert np.array_equal(plain[0], fast[0])
    assert plain[1] == fast[1]
    for leaf_name, leaf in flat(plain[2]).items():
        error = np.abs(flat(fast[2])[leaf_name] - leaf).max()
        # The bias of k has a gradient of 0, and rounding noise in its place.
        largest = np.abs(leaf).max(axis=tuple(range(1, leaf.ndim)))
        assert error <= 1e-6 * largest.max(), leaf_name


@pytest.mark.parametrize(
    'residual_dtype', ['compute', pytest.param('float32', marks=pytest.mark.long)]
)
def test_plain_and_fast_are_equal_in_bf16_to_its_rounding(residual_dtype):
    """Logits to 2^-7 of the largest, gradients to 2 % of their leaf's norm: a bf16 has 8 bits."""
    rounded = dict(dtype='bfloat16', residual_dtype=residual_dtype)
    model = tiny(**ODD | dict(embd_pdrop=0.1, resid_pdrop=0.3), **rounded)
    params, text_BT = rough_params(model, std=0.2), tokens(model)
    plain, fast = (value_and_grad(model.clone(ops=ops), params, text_BT) for ops in (PLAIN, FAST))
    assert np.abs(plain[0] - fast[0]).max() <= 2**-7 * np.abs(plain[0]).max()
    for leaf_name, leaf in flat(plain[2]).items():
        error = np.linalg.norm(flat(fast[2])[leaf_name] - leaf)
        assert error <= 0.02 * np.linalg.norm(leaf), leaf_name


def test_a_padded_table_changes_no_logit():
    """In bf16, 1,030 rows are padded to 1,152; in full fp32 there is no padding."""
    rng = np.random.default_rng(0)
    x_ND, wte_VD = (jnp.bfloat16(rng.normal(size=(n, 24))) for n in (5, 1030))
    options = dict(rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(
        fast_logits(x_ND, wte_VD, 'default'), logits(x_ND, wte_VD, 'default'), **options
    )
    for precision, columns in (('default', padded_vocab(1030)), ('highest', 1030)):
        text = str(
            jax.make_jaxpr(functools.partial(fast_logits, precision=precision))(x_ND, wte_VD)
        )
        assert f'f32[5,{columns}] = dot_general' in text


# A model small enough for a full Hessian: 189 parameters.
SMALL = dict(vocab_size=5, n_layer=1, n_head=2, n_embd=4, n_positions=3, n_inner=6)
TEXT_BT = np.array([[1, 4, 2, 3]])


@pytest.fixture(scope='module', params=['none', pytest.param('block', marks=pytest.mark.long)])
def small(request):
    """(logits of a vector of parameters, its loss, the same loss in fp64 by numpy, the vector)."""
    cfg = tiny(**SMALL, remat=request.param).cfg
    leaves, tree = jax.tree.flatten(rough_params(tiny(**SMALL), std=0.5))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def unflatten(vector):
        parts = (jnp if isinstance(vector, jax.Array) else np).split(vector, ends)
        shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, shaped)

    def small_logits(vector):
        return GPT2(cfg).apply({'params': unflatten(vector)}, TEXT_BT[:, :-1])

    def loss(vector):
        return token_losses(small_logits(vector), TEXT_BT[:, 1:]).mean()

    def loss_fp64(vector):
        (logits_TV,) = numpy_gpt2(unflatten(vector), cfg, TEXT_BT[:1, :-1])
        target_T = logits_TV[np.arange(3), TEXT_BT[0, 1:]]
        return (np.log(np.exp(logits_TV).sum(-1)) - target_T).mean()

    vector = np.concatenate([leaf.ravel() for leaf in leaves])
    assert vector.dtype == np.float32
    small_logits, loss = jax.jit(small_logits), jax.jit(loss)
    assert abs(loss(jnp.array(vector)) - loss_fp64(np.float64(vector))) < 1e-6
    return small_logits, loss, loss_fp64, jnp.array(vector)


def directions(vector, n=2):
    """Random directions of length about 1."""
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=(n, vector.size)) / np.sqrt(vector.size))


def slope(f, x, v, h=1e-5):
    """The derivative of f at x along v, by central differences."""
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def test_forward_mode_equals_finite_differences(small):
    """jax.jvp and jax.linearize."""
    _, loss, loss_fp64, x = small
    _, linear = jax.linearize(loss, x)
    for v in directions(x):
        expected = slope(loss_fp64, np.float64(x), np.float64(v))
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(jax.jvp(loss, (x,), (v,))[1], expected, rtol=1e-4)
        np.testing.assert_allclose(linear(v), expected, rtol=1e-4)


def test_forward_mode_jacobian_equals_reverse_mode(small):
    small_logits, _, _, x = small
    forward, reverse = (jax.jit(jac(small_logits))(x) for jac in (jax.jacfwd, jax.jacrev))
    assert forward.shape == (1, 3, 5, x.size)
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=1e-5 * np.abs(reverse).max())


def test_second_derivatives_equal_finite_differences(small):
    """jax.hessian: its columns are forward-over-reverse products, the jvp of the gradient."""
    _, loss, loss_fp64, x = small
    hessian = np.float64(jax.jit(jax.hessian(loss))(x))
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=1e-5 * np.abs(hessian).max())
    v, w = np.float64(directions(x))
    expected = slope(lambda y: slope(loss_fp64, y, v, 1e-4), np.float64(x), w, 1e-4)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(w @ hessian @ v, expected, rtol=1e-3)


@pytest.mark.parametrize('remat', ['none', pytest.param('dots', marks=pytest.mark.long)])
def test_gradients_of_single_texts_by_vmap(remat):
    model = GPT2(tiny(n_layer=1, remat=remat).cfg)
    params, text_BT = rough_params(model), tokens(model, batch=4)

    def loss(params, text_T):
        logits_BTV = model.apply({'params': params}, text_T[None, :-1])
        return token_losses(logits_BTV, text_T[None, 1:]).mean()

    grad = jax.jit(jax.grad(loss))
    together_B = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, text_BT)
    together = flat(jax.device_get(together_B))
    for i, text_T in enumerate(text_BT):
        for name, leaf in flat(grad(params, text_T)).items():
            atol = 1e-5 * np.abs(leaf).max()
            np.testing.assert_allclose(together[name][i], leaf, rtol=0, atol=atol, err_msg=name)


def test_fast_functions_refuse_forward_mode():
    """So the plain functions must be the default of GPT2."""
    assert GPT2(tiny().cfg).ops is PLAIN
    with pytest.raises(TypeError, match='custom_vjp'):
        jax.jvp(lambda x: FAST.normalize(x, 1e-5), (jnp.ones(3),), (jnp.ones(3),))


BLOCK_TAPS = [
    *('resid_pre', 'ln_1', 'q', 'k', 'v', 'attn_scores', 'pattern', 'z', 'attn_out'),
    *('resid_mid', 'ln_2', 'mlp_pre', 'mlp_post', 'mlp_out', 'resid_post'),
]


@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_taps_see_every_activation_and_change_nothing(remat):
    model, seen = tiny(remat=remat), {}
    params, ids_BT = rough_params(model), tokens(model)

    def look(name, x):
        assert name not in seen
        seen[name] = x.shape
        return x

    tapped = model.clone(ops=model.ops._replace(tap=look))
    logits_BTV = jax.jit(tapped.apply)({'params': params}, ids_BT)
    assert np.array_equal(logits_BTV, jax.jit(model.apply)({'params': params}, ids_BT))
    assert list(seen) == [
        'embed',
        'pos_embed',
        *(f'h_{i}.{name}' for i in range(2) for name in BLOCK_TAPS),
        'ln_f',
        'logits',
    ]
    assert seen['h_1.pattern'] == seen['h_0.attn_scores'] == (3, 2, 12, 12)
    assert seen['h_0.q'] == seen['h_0.z'] == (3, 12, 2, 8)
    assert seen['h_1.mlp_post'] == (3, 12, 64)


def test_without_a_tap_the_program_is_the_same():
    """An identity tap and no tap give XLA the same text."""
    model, ids_BT = tiny(), tokens(tiny())
    params = rough_params(model)

    def text(ops):
        def apply(params):
            return model.clone(ops=ops).apply({'params': params}, ids_BT)

        return jax.jit(apply).lower(params).as_text()

    assert text(FAST) == text(FAST._replace(tap=lambda name, x: x))


def test_a_tap_replaces_its_activation():
    """Zeroing a block's outputs leaves the model without this block."""
    model = GPT2(tiny(n_layer=1).cfg)
    params, ids_BT = rough_params(model), tokens(model)
    parts = ('h_0.attn_out', 'h_0.mlp_out')
    ops = PLAIN._replace(tap=lambda name, x: 0 * x if name in parts else x)
    empty = GPT2(dataclasses.replace(model.cfg, n_layer=0))
    got, without = (
        jax.jit(tapped.apply)({'params': params}, ids_BT)
        for tapped in (model.clone(ops=ops), empty)
    )
    np.testing.assert_array_equal(got, without)


def every_bfloat16():
    """Every bf16 number of a size from 2^-60 to 2^60, and zeros: (512, 128)."""
    bits = np.arange(2**16, dtype=np.uint16)
    exponent = (bits >> 7 & 0xFF).astype(int) - 127
    bits = np.where(np.abs(exponent) <= 60, bits, 0).astype(np.uint16)
    return jnp.array(bits.view(jnp.bfloat16).reshape(512, 128))


def check_rounded_once(got, exact, fp32_error):
    """`got` is the fp64 value `exact` rounded once to bf16, up to the error of fp32 arithmetic."""
    assert got.dtype == jnp.bfloat16
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-200)))
    half_ulp = 2.0 ** (exponent - 8)
    assert np.all(np.abs(np.float64(got) - exact) <= half_ulp + fp32_error)


@pytest.mark.parametrize('residual_dtype', ['compute', 'float32'])
def test_a_bf16_model_rounds_each_activation_once(residual_dtype):
    """Each activation, computed in fp64 from the ones before it and rounded once.

    So LayerNorm, softmax, GELU, the sum of the embeddings, scores and logits are in fp32, and the
    residual stream too if the setting says so. It runs without jit, because XLA may leave out a
    rounding between two operations.
    """
    cfg = tiny(dtype='bfloat16', residual_dtype=residual_dtype, bias=False).cfg
    params, taps = rough_params(tiny(bias=False)), {}
    ops = FAST._replace(tap=lambda name, x: taps.setdefault(name, x))
    GPT2(cfg, ops).apply({'params': params}, tokens(tiny()))
    exact = {name: np.float64(x) for name, x in taps.items()}
    for name, x in taps.items():
        fp32 = name.split('.')[-1] in ('embed', 'pos_embed', 'attn_scores', 'pattern', 'logits')
        fp32 |= '.resid_' in name and residual_dtype == 'float32'
        assert x.dtype == (jnp.float32 if fp32 else jnp.bfloat16), name

    def bf16(x):
        return np.float64(jnp.bfloat16(x))

    def norm(x, scale):
        std = np.sqrt(x.var(-1, keepdims=True) + cfg.layer_norm_epsilon)
        return (x - x.mean(-1, keepdims=True)) / std * np.float64(scale)

    def check(name, expected):
        check_rounded_once(taps[name], expected, 1e-5 * np.abs(expected).max())

    def check_fp32(name, expected):
        np.testing.assert_allclose(exact[name], expected, rtol=0, atol=2e-6 * expected.max())

    check_stream = check_fp32 if residual_dtype == 'float32' else check
    check_stream('h_0.resid_pre', exact['embed'] + exact['pos_embed'])
    for i in range(2):
        t = {name.split('.')[1]: x for name, x in exact.items() if name.startswith(f'h_{i}.')}
        block = params[f'h_{i}']
        check(f'h_{i}.ln_1', norm(t['resid_pre'], block['ln_1']['scale']))
        for part, name in enumerate('qkv'):
            kernel_DHK = block['attn']['c_attn']['kernel'][:, part]
            check(f'h_{i}.{name}', np.einsum('BTD,DHK->BTHK', t['ln_1'], bf16(kernel_DHK)))
        scores_BHTS = np.einsum('BTHK,BSHK->BHTS', t['q'], t['k']) / math.sqrt(cfg.head_dim)
        visible = t['attn_scores'] > -np.inf
        assert np.array_equal(visible, np.broadcast_to(np.tril(np.ones((12, 12))), visible.shape))
        np.testing.assert_allclose(t['attn_scores'][visible], scores_BHTS[visible], atol=2e-6)
        weights = np.exp(t['attn_scores'])
        check_fp32(f'h_{i}.pattern', weights / weights.sum(-1, keepdims=True))
        check(f'h_{i}.z', np.einsum('BHTS,BSHK->BTHK', bf16(t['pattern']), t['v']))
        projection_HKD = bf16(block['attn']['c_proj']['kernel'])
        check(f'h_{i}.attn_out', np.einsum('BTHK,HKD->BTD', t['z'], projection_HKD))
        check_stream(f'h_{i}.resid_mid', t['resid_pre'] + t['attn_out'])
        check(f'h_{i}.ln_2', norm(t['resid_mid'], block['ln_2']['scale']))
        check(f'h_{i}.mlp_pre', t['ln_2'] @ bf16(block['mlp']['c_fc']['kernel']))
        check(f'h_{i}.mlp_post', GELU['gelu_new'](t['mlp_pre']))
        check(f'h_{i}.mlp_out', t['mlp_post'] @ bf16(block['mlp']['c_proj']['kernel']))
        check_stream(f'h_{i}.resid_post', t['resid_mid'] + t['mlp_out'])
    check('ln_f', norm(exact['h_1.resid_post'], params['ln_f']['scale']))
    check_fp32('logits', exact['ln_f'] @ bf16(params['wte']['embedding']).T)


@pytest.mark.parametrize('function', [activate, fast_activate])
def test_gelu_in_bf16_is_rounded_once(function):
    """Computed in bf16, its constants and products would each add a rounding.

    That of kernels/gelu.py is computed by cuBLAS, in fp32, on GPUs alone.
    """
    x_NF = every_bfloat16()
    got, x = function('gelu_new', x_NF), np.float64(x_NF)
    check_rounded_once(got, GELU['gelu_new'](x), 4e-7 * np.abs(x))


@jax.jit
def seeds_of_sites():
    return dropout_seeds(tiny().cfg, jax.random.key(0))


def kept(n, seed, rate):
    """The elements 0 to n - 1 that dropout keeps."""
    mask = jax.jit(lambda index, seed: keep_mask(index, seed, rate))
    return np.asarray(mask(np.arange(n, dtype=np.uint32), seed))


@pytest.mark.parametrize('path', ['xla', 'fused'])
@pytest.mark.parametrize('rate', [0.1, 0.2])
def test_dropout_in_bf16_is_rounded_once(path, rate):
    """With bf16(1 - rate) as divisor, the scale would be off by 0.18 % at a rate of 0.1."""
    x_ND = every_bfloat16()
    seed = seeds_of_sites()[2]
    if path == 'fused':
        one_D, zero_ND = jnp.ones(128), jnp.zeros_like(x_ND)
        got, _ = add_norm(zero_ND, x_ND, None, one_D, None, seed, rate, 1e-5, 'float32')
    else:
        got = dropout(x_ND, seed, rate)
    keep = kept(x_ND.size, seed, rate).reshape(x_ND.shape)
    exact = np.where(keep, np.float64(x_ND) / (1 - rate), 0)
    check_rounded_once(got, exact, 2e-7 * np.abs(exact))


def test_dropout_of_the_pattern_in_bf16_is_rounded_once():
    """With q = k = 0 the pattern is 1 / (t + 1), and with v = 1 the output is its dropout."""
    T, rate = 64, 0.1
    zero_BTHK, v_BHSK = jnp.zeros((1, T, 1, T)), jnp.eye(T, dtype=jnp.bfloat16)[None, None]
    seed = seeds_of_sites()[1]
    got = causal_attention(zero_BTHK, zero_BTHK.swapaxes(1, 2), v_BHSK, rate=rate, seed=seed)
    keep = kept(T * T, seed, rate).reshape(T, T)
    exact = np.where(np.tril(keep), 1 / np.arange(1, T + 1)[:, None] / (1 - rate), 0)
    check_rounded_once(got[0, :, 0], exact, 2e-7 * exact)
