"""The kernel for Hopper GPUs: GELU's backward pass at the end of the product before it.

Its interpreter also raises for a barrier that completes again before anyone has waited for it, and
here for a race: two accesses to the same memory that nothing keeps apart. Products are done at once
in it, so it does not see a missing wgmma_wait.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from test_kernels import DROPOUT, XLA, check_equal, first_update

from gpt2_jax.config import default_config, resolve
from gpt2_jax.kernels import choose, launch
from gpt2_jax.parallel.devices import HOPPER_JAX, has_hopper_kernels
from gpt2_jax.parallel.mesh import make_mesh
from gpt2_jax.training.setup import place_of

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < HOPPER_JAX, reason='the interpreter of this jax cannot run it'
)

# The other parts are XLA's, because interpreted kernels take longer to compile.
KERNELS = choose.FUSED._replace(attention='xla', norm='xla', gelu='hopper')


@pytest.fixture
def gelu_product(monkeypatch):
    """Loaded here, because it cannot be with the oldest jax. Its interpreter looks for races."""
    from jax.experimental.pallas import mosaic_gpu

    from gpt2_jax.kernels import gelu_product

    strict = functools.partial(mosaic_gpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(mosaic_gpu, 'InterpretGPUParams', strict)
    return gelu_product


# Two programs share the blocks of 128 x 128. The sizes differ in blocks a program (0, 1, 3, 7 and
# 8, so that turns end with either warpgroup) and in steps of 64 columns: fewer than STAGES, and
# more.
@pytest.mark.parametrize(
    ('N', 'D', 'F', 'has_bias', 'dtype', 'tolerance'),
    [
        (128, 64, 128, True, 'float32', 1e-5),
        (384, 448, 256, False, 'bfloat16', 8e-3),
        (640, 128, 384, True, 'float32', 1e-5),
    ],
)
def test_gradients_equal_the_formula(gelu_product, N, D, F, has_bias, dtype, tolerance):
    draw = np.random.default_rng(0).normal
    x_NF, bias_F, w_FD, dout_ND = (
        jnp.asarray(draw(size=shape), dtype) for shape in ((N, F), (F,), (F, D), (N, D))
    )
    bias_F = bias_F.astype(jnp.float32) if has_bias else None

    def formula(x_NF, bias_F, w_FD):
        u_NF = x_NF if bias_F is None else x_NF + bias_F
        return jax.nn.gelu(u_NF, approximate=True) @ w_FD

    def kernel(x_NF, bias_F, w_FD):
        return gelu_product.gelu_product(x_NF, bias_F, w_FD, None)

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (x_NF, bias_F, w_FD))
    expected, pull_back = jax.vjp(formula, *exact)
    found, pull_back_found = jax.vjp(kernel, x_NF, bias_F, w_FD)
    theirs = expected, *pull_back(dout_ND.astype(jnp.float32))
    ours = found, *pull_back_found(dout_ND)
    for expected, found in zip(*map(jax.tree.leaves, (theirs, ours)), strict=True):
        largest = np.max(np.abs(expected))
        np.testing.assert_allclose(np.float32(found), expected, rtol=0, atol=tolerance * largest)


def test_gradients_equal_the_plain_model(monkeypatch):
    """With dropout, and recomputation of what the kernel reads."""
    from gpt2_jax.kernels import gelu_product

    calls, kernel = [], gelu_product.gelu_backward

    def gelu_backward(*args):
        calls.append(args)
        return kernel(*args)

    monkeypatch.setattr(gelu_product, 'gelu_backward', gelu_backward)
    sizes = dict(n_layer=1, n_head=2, n_embd=64, n_positions=128, vocab_size=301)
    ours = first_update(KERNELS, 'explicit', **DROPOUT, **sizes, remat='dots')
    check_equal(ours, first_update(**XLA, **DROPOUT, **sizes))
    assert len(calls) == 1, 'the step did not use the kernel'


def test_other_sizes_are_refused(gelu_product):
    """Without a check, the rest of an array would never be written."""
    for N, D, F in ((64, 64, 128), (128, 96, 128), (128, 64, 192)):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, D), (F, D), (N, F))]
        with pytest.raises(ValueError, match=f'got sizes {N}, {F}, {D}; expected multiples of 128'):
            jax.eval_shape(gelu_product.gelu_backward, *shapes, True)


@pytest.mark.parametrize(('N', 'D', 'has_bias'), [(16384, 384, False), (2048, 1600, True)])
def test_it_lowers_for_a_gpu(gelu_product, monkeypatch, N, D, has_bias):
    """And fits into the shared memory of an H100, which is checked then, and into its registers."""
    # 384 threads start with 168 registers each; warpgroups that ask for more in all wait forever.
    registers = gelu_product.COPY_REGISTERS + 2 * gelu_product.COMPUTE_REGISTERS
    assert registers <= 3 * 168
    monkeypatch.setattr(launch, 'interprets', lambda: False)
    monkeypatch.setattr(gelu_product, 'multiprocessors', lambda: 132)
    gelu_product.gelu_backward.clear_cache()
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((N, D), (4 * D, D), (N, 4 * D))
    ]
    device = AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    with use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=device)):
        traced = gelu_product.gelu_backward.trace(*shapes, has_bias)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    gelu_product.gelu_backward.clear_cache()
    assert 'custom_call @mosaic_gpu_v2' in text
    assert 'gelu_product' in text


def test_only_hopper_gpus_and_long_runs_take_it(monkeypatch):
    """It has instructions that only a GPU of compute capability 9.0 knows."""
    for capability, expected in (('9.0', True), ('8.9', False), ('10.0', False), (None, False)):
        assert has_hopper_kernels(SimpleNamespace(compute_capability=capability)) == expected
    with monkeypatch.context() as patch:
        patch.setattr(jax, '__version_info__', (0, 11, 1))
        assert not has_hopper_kernels(SimpleNamespace(compute_capability='9.0'))
    mesh = make_mesh(**default_config().mesh)
    config = resolve(default_config())
    config.train.steps, config.train.grad_accum_steps = 70, 3
    assert place_of(config, mesh).micro_batches == 0
    monkeypatch.setattr('gpt2_jax.training.setup.has_hopper_kernels', lambda device: True)
    assert place_of(config, mesh).micro_batches == 210
