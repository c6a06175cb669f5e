"""The decoding kernels, in Pallas' interpreter, against the plain formulas."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tiny import flat, rough_params, shapes, tiny, tokens

from gpt2_jax.inference import decoding
from gpt2_jax.inference.decoding import CHUNK
from gpt2_jax.inference.sampling import Sampling, sample_token
from gpt2_jax.kernels import decode, sample
from gpt2_jax.model.gpt2 import init_cache


# Block sizes with which tiny models have several blocks of everything.
def small_linear(B, D, N, width, merges):
    return decode.LinearSizes(1, 2, 16, 1, 1) if B == 1 else decode.LinearSizes(16, 16, 16, 1, 1)


def small_attend(B, width):
    """One block is longer than the context with many rows. A wide model has no splits."""
    if B == 1:
        return decode.AttendSizes(2, 1, 3 if width < 32 else 1)
    return decode.AttendSizes(4 if B <= 16 else 32, 1, 1)


SMALL = dict(linear_sizes=small_linear, attend_sizes=small_attend, COLUMNS=8)
MODULE = {name: decode if hasattr(decode, name) else sample for name in SMALL}
GPU_SIZES = {name: getattr(module, name) for name, module in MODULE.items()}


@pytest.fixture(scope='module', autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(MODULE[name], name, value)
        jax.clear_caches()
        yield
    jax.clear_caches()


def empty_cache(model, batch, value):
    """A cache with a value at every position."""
    cache = jax.eval_shape(lambda: init_cache(model.cfg, batch))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), cache)


def decoded(model, params, ids_BT):
    """Logits at every position, one token at a time, from a cache of NaN that must not be seen."""
    step = jax.jit(decode.next_logits, static_argnums=0)
    weights = jax.jit(functools.partial(decode.cast_params, model.cfg))(params)
    cache = empty_cache(model, len(ids_BT), np.nan)
    logits = []
    for pos in range(ids_BT.shape[1]):
        at_2 = jnp.array([0, pos])
        logits_BV, cache = step(model.cfg, weights, ids_BT[:, pos], cache, at_2)
        logits.append(logits_BV)
    return np.stack(logits, axis=1)


@pytest.mark.parametrize(
    ('batch', 'changes'),
    [
        (1, dict(n_embd=24, n_layer=1)),
        (3, dict(n_embd=24, n_layer=1)),
        (20, dict(n_embd=48, n_head=4, n_layer=1)),
        (1, dict(bias=False, activation_function='gelu', n_embd=32, n_layer=1)),
        (2, dict(bias=False, activation_function='gelu', n_embd=6, n_inner=40, n_layer=1)),
    ],
)
def test_logits_at_every_position(batch, changes):
    model = tiny(**changes)
    params, ids_BT = rough_params(model), tokens(model, batch)
    expected = np.asarray(jax.jit(model.apply)({'params': params}, ids_BT))
    np.testing.assert_allclose(
        decoded(model, params, ids_BT), expected, rtol=0, atol=2e-6 * np.abs(expected).max()
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ('batch', 'residual_dtype', 'bound'), [(3, 'compute', 1.2), (1, 'float32', 0.7)]
)
def test_bfloat16_is_as_near_to_fp32_as_the_plain_model(batch, residual_dtype, bound):
    """And nearer by far with the residual stream in fp32."""
    exact, plain = tiny(n_embd=24), tiny(n_embd=24, dtype='bfloat16')
    model = tiny(n_embd=24, dtype='bfloat16', residual_dtype=residual_dtype)
    params, ids_BT = rough_params(model), tokens(model, batch)
    expected = exact.apply({'params': params}, ids_BT)
    rounding = np.abs(plain.apply({'params': params}, ids_BT) - expected)
    got = np.abs(decoded(model, params, ids_BT) - expected)
    assert 0 < got.max() < 1.5 * rounding.max()
    assert np.sqrt(np.square(got).mean()) < bound * np.sqrt(np.square(rounding).mean())


@pytest.mark.parametrize('kernels', ['xla', 'fused'])
def test_only_matrices_are_rounded(kernels):
    """So that the model that writes text is the model that is evaluated."""
    model = tiny(dtype='bfloat16', kernels=kernels)
    for name, leaf in flat(decoding.cast_params(model, rough_params(model))).items():
        exact = {'wte', 'wpe', 'ln_1', 'ln_2', 'ln_f'} & set(name.split('/'))
        if kernels == 'fused':  # which has LayerNorms in its matrices, and biases apart
            exact = not name.endswith('kernel')
        assert leaf.dtype == (jnp.float32 if exact else jnp.bfloat16), name


def test_parameters_in_fp32_are_not_copied():
    model = tiny(kernels='xla')
    assert decoding.cast_params(model, rough_params(model)) is None


def test_tokens_past_the_context_write_at_the_last_position_only():
    model = tiny(n_embd=24, n_layer=1)  # of three texts: a program that the test above has compiled
    weights = jax.jit(functools.partial(decode.cast_params, model.cfg))(rough_params(model))
    cache = empty_cache(model, 3, 1)
    _, after = jax.jit(decode.next_logits, static_argnums=0)(
        model.cfg, weights, jnp.array([1, 2, 3]), cache, jnp.array([0, 14])
    )
    for leaf in jax.tree.leaves(jax.device_get(after)):
        assert np.all(leaf[:, :, :-1] == 1)
        assert not np.any(leaf[:, :, -1] == 1)


kth_largest = jax.jit(sample._kth_largest, static_argnums=(1, 2))


def kept(x, k):
    """The elements that reach the threshold, from the blocks that the kernel sees."""
    padded = np.concatenate([x, np.full(-len(x) % 8, -np.inf, np.float32)]).reshape(-1, 8)
    return x >= kth_largest([*padded], k, k)[0]


def rows():
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 3, 61).astype(np.float32)
    apart = np.float32(2.0) ** rng.integers(-100, 100, 61) * np.sign(normal)
    near = np.nextafter(np.full(61, -1, np.float32), np.float32(0), dtype=np.float32)
    near[::3] = -1
    masked = np.where(rng.random(61) < 0.5, -np.inf, normal).astype(np.float32)
    return {
        'normal': normal,
        'negative': -np.abs(normal) - 1,
        'ties': np.round(normal),
        'equal': np.ones_like(normal),
        'far apart': np.float32(apart),
        'neighbours': near,
        'masked': masked,
        'zeros': np.float32([-0.0, 0.0] * 30),
    }


@pytest.mark.parametrize('name', rows())
def test_the_kth_largest(name):
    x = rows()[name]
    for k in (1, 2, 7, 30, len(x) - 1):
        kth = jax.lax.top_k(x, k)[0][-1]
        assert np.array_equal(kept(x, k) & (x > -np.inf), (x >= kth) & (x > -np.inf)), k


@pytest.mark.parametrize(
    'sampling',
    [
        Sampling(0),
        Sampling(),
        Sampling(0.5, 3),
        Sampling(1.0, 7),
        Sampling(1.0, 59),
        Sampling(1.0, 99),
        Sampling(1e-38),
        Sampling(1e-38, 3),
        Sampling(3.0, 1),
    ],
)
def test_drawn_tokens_equal_the_plain_sampler(sampling):
    logits_BV = jnp.stack([np.resize(x, 60) for x in rows().values()] * 4)
    keys_B = jax.random.split(jax.random.key(3), len(logits_BV))
    keys_CB = jnp.stack([keys_B[::-1], keys_B, keys_B[::-1]])  # the interpreter clamps an index
    pick = sample.make_sampler(keys_CB, 60, sampling.divisor, sampling.top_k)
    at_2, tokens_CB = jnp.array([1, 20]), jnp.full(keys_CB.shape, -1, jnp.int32)
    got, next_2 = pick(logits_BV, tokens_CB, at_2)
    assert next_2.tolist() == [2, 21]
    assert np.all(got[::2] == -1)
    assert np.array_equal(got[1], sample_token(logits_BV, keys_B, sampling))


@pytest.mark.parametrize(
    ('samples', 'n_layer', 'sampling'),
    [
        (1, 2, Sampling(0)),
        (1, 1, Sampling(2.0)),
        (3, 1, Sampling(2.0, 5)),
        (2, 1, Sampling(2.0, 7, 0.9)),
    ],
)
def test_generated_text_equals_the_plain_model(samples, n_layer, sampling):
    """Also across chunks and past the context."""

    def text(kernels):
        model = tiny(n_layer=n_layer, n_positions=2 * CHUNK + 3, kernels=kernels)
        chunks = decoding.generate(
            model,
            rough_params(model, seed=13, std=0.6),
            [3, 1, 4],
            max_new_tokens=3 * CHUNK,
            num_samples=samples,
            seed=5,
            sampling=sampling,
            notify=lambda note: None,
        )
        return np.concatenate(list(chunks), axis=1)

    expected = text('xla')
    assert expected.shape == (samples, 3 * CHUNK)
    assert len(np.unique(expected)) > 3
    assert np.array_equal(text('fused'), expected)


@pytest.mark.parametrize('width', [48, 768, 1024, 1152, 1600])
def test_blocks_of_any_matrix_are_powers_of_two(width):
    """Also of small vocabularies in a wide model."""
    for B in (1, 2, 16, 17, 33, 200):
        for N in (5, 65, 527, 528, width, 3 * width, 4 * width, 8 * width, 50257):
            for D in (width, 4 * width):
                for size in GPU_SIZES['linear_sizes'](B, D, N, width, merges=False)[:4]:
                    assert isinstance(size, int)
                    assert size.bit_count() == 1


@pytest.mark.parametrize(
    ('capability', 'kilobytes'), [('9.0', 227), ('8.0', 163), ('8.9', 99), ('12.0', 99)]
)
def test_blocks_fit_the_shared_memory(capability, kilobytes, monkeypatch):
    """XLA refuses a program that needs more: all stages but one hold a block of each input."""
    calls = []

    def call(kernel, *, in_specs, stages, **options):
        calls.append((in_specs[0], stages))
        return lambda ins: dict(y=None)

    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, 'devices', lambda: [device])
    monkeypatch.setattr(decode, 'call', call)
    monkeypatch.setattr(decode, 'linear_sizes', GPU_SIZES['linear_sizes'])
    cfg = tiny(n_embd=768, n_head=12, dtype='bfloat16').cfg
    for B, N, D in itertools.product((1, 8, 16, 17, 200), (65, 768, 3072, 50257), (768, 3072)):
        inputs = GPU_SIZES['linear_sizes'](B, D, N, 768, merges=False).inputs
        for dtype in ('bfloat16', 'float32'):
            x_BD = jax.ShapeDtypeStruct((B, D), jnp.dtype(dtype))
            w_ND = jax.ShapeDtypeStruct((N, D), jnp.dtype('bfloat16'))
            decode.linear.__wrapped__(cfg, x_BD, {'kernel': w_ND})
            specs, stages = calls.pop()
            rows, outs = (specs[name].block_shape[0] for name in 'xw')
            held = inputs * (rows * x_BD.dtype.itemsize + outs * 2)
            assert B == 1 or stages > 1
            assert (stages - 1) * held <= kilobytes * 1024


@pytest.mark.parametrize(
    ('batch', 'residual_dtype', 'x64'),
    [(1, 'compute', False), (5, 'float32', False), (32, 'compute', True)],
)
def test_lowers_for_a_gpu(batch, residual_dtype, x64):
    """At the size of GPT-2, with the block sizes of a GPU; none is needed."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(x64):
        for name, value in GPU_SIZES.items():
            patch.setattr(MODULE[name], name, value)
        patch.setattr(jax, 'default_backend', lambda: 'gpu')
        jax.clear_caches()
        model = tiny(
            50257,
            n_embd=768,
            n_head=12,
            n_layer=1,
            n_positions=1024,
            dtype='bfloat16',
            residual_dtype=residual_dtype,
            kernels='fused',
        )
        weights = jax.eval_shape(lambda params: decoding.cast_params(model, params), shapes(model))
        cache = jax.eval_shape(lambda: init_cache(model.cfg, batch))
        logits_BV = jax.ShapeDtypeStruct((batch, 50257), jnp.float32)
        h100 = AbstractMesh(
            (1,), ('x',), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
        )
        with use_abstract_mesh(h100):
            traced = decoding.decode.trace(
                model, weights, logits_BV, cache, 5, 0, 7, Sampling(1.0, 200)
            )
            text = traced.lower(lowering_platforms=('cuda',)).as_text()
        jax.clear_caches()
    assert text.count('_attend_kernel')
    assert text.count('_select_kernel')
    assert text.count('_sample_kernel')
    # Five for the layer, the head, and two for the draw.
    assert text.count('custom_call @__gpu$xla.gpu.triton') == 8
