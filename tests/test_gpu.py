"""The bf16 paths on a GPU: gradients are near those of full fp32, leaf by leaf, and so are losses.

    XLA_FLAGS= pytest tests/test_gpu.py -s

Skipped without a GPU. GPT2_JAX_GPU_TESTS=tiny runs the same checks at a tiny size on a CPU, where
the kernels are interpreted and cuDNN is left out; that tests this file and not the hardware.
"""

import functools
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import relative_errors, rough_params, tokens

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.kernels.choose import FUSED, XLA
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import fast_ops
from gpt2_jax.model.params import init_params
from gpt2_jax.parallel.devices import has_hopper_kernels
from gpt2_jax.training import fused_step
from gpt2_jax.training.optim import as_parameters
from gpt2_jax.training.programs import compiler_options, make_value_and_grad
from gpt2_jax.training.step import make_eval_step

TINY = os.environ.get('GPT2_JAX_GPU_TESTS') == 'tiny'
ON_GPU = jax.default_backend() == 'gpu'
pytestmark = pytest.mark.skipif(not ON_GPU and not TINY, reason='there is no GPU')

# The sizes of configs/shakespeare.py and of GPT-2 124M, with rows of a micro-batch.
SIZES = {
    'characters': dict(vocab_size=65, n_layer=6, n_head=6, n_embd=384, n_positions=256, rows=16),
    '124M': dict(vocab_size=50257, rows=4),
}
if TINY:
    SIZES = {
        'characters': dict(vocab_size=65, n_layer=2, n_head=2, n_embd=32, n_positions=64, rows=2),
        '124M': dict(vocab_size=1030, n_layer=1, n_head=2, n_embd=32, n_positions=64, rows=2),
    }
# (kernels, attention), with 'hopper' for GELU where it says so. cuDNN's attention has no dropout on
# the pattern.
PATHS = [
    ('xla', 'xla'),
    ('fused', 'fused'),
    ('hopper', 'fused'),
    ('xla', 'cudnn'),
    ('fused', 'cudnn'),
]
# Relative errors of a leaf's gradient. On H100 and H200 the medians were 0.007 to 0.014 and the
# worst leaf 0.017; with cuDNN's attention and no fused kernels, at 124M, 0.015 and 0.021.
MAX_MEDIAN, MAX_WORST = 0.016, 0.024


@functools.cache
def gradients(size, dtype, kernels, attention, attn_pdrop):
    """(loss, gradients) of a batch of random tokens, on the host."""
    sizes = dict(SIZES[size])
    rows, dropout = sizes.pop('rows'), {'embd_pdrop': 0.1, 'resid_pdrop': 0.1}
    cfg = GPT2Config(**sizes, **dropout, dtype=dtype, attn_pdrop=attn_pdrop)
    model = GPT2(cfg, fast_ops(attention))
    gelu = 'hopper' if kernels == 'hopper' else 'fused'
    chosen = XLA if kernels == 'xla' else FUSED._replace(attention=attention, gelu=gelu)
    text_BT = tokens(model, batch=rows, length=cfg.n_positions + 1)
    batch = {'inputs': text_BT[:, :-1], 'targets': text_BT[:, 1:]}

    @jax.jit
    def run(params, key):
        run_batch = make_value_and_grad(model, chosen)
        loss, grads = run_batch(params, batch, key, batch['targets'].size)
        return loss, as_parameters(grads, params)

    return jax.device_get(run(parameters(size), jax.random.key(1)))


@functools.cache
def parameters(size):
    """Initial weights, with biases and scales that all matter."""
    sizes = {name: value for name, value in SIZES[size].items() if name != 'rows'}
    model = GPT2(GPT2Config(**sizes))
    start = jax.jit(lambda: init_params(model.cfg, 0))()
    rough = rough_params(model, std=0.1)
    return jax.tree.map(lambda a, b: b if a.ndim == 1 else a, start, rough)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('kernels', 'attention'), PATHS)
def test_bf16_gradients_are_near_fp32(size, kernels, attention):
    if attention == 'cudnn' and not ON_GPU:
        pytest.skip('cuDNN needs a GPU')
    if kernels == 'hopper' and not has_hopper_kernels(jax.devices()[0]):
        pytest.skip('it needs a Hopper GPU')
    attn_pdrop = 0.0 if attention == 'cudnn' else 0.1
    exact_loss, exact = gradients(size, 'float32', 'xla', 'xla', attn_pdrop)
    loss, rounded = gradients(size, 'bfloat16', kernels, attention, attn_pdrop)
    errors = relative_errors(rounded, exact)
    median, worst = float(np.median(list(errors.values()))), max(errors, key=errors.get)
    print(
        f'{size}, {kernels} with {attention} attention: median {median:.4f}, '
        f'worst {errors[worst]:.4f} ({worst}), loss {loss:.5f} and {exact_loss:.5f} in fp32'
    )
    assert abs(loss - exact_loss) < 1e-3 * exact_loss
    assert median < MAX_MEDIAN
    assert errors[worst] < MAX_WORST
    if kernels != 'xla':
        assert not np.any(rounded['h_0']['attn']['c_attn']['bias'][1]), 'the bias of k moves'


@pytest.mark.parametrize('size', SIZES)
def test_bf16_scores_are_near_fp32(size):
    """As near as those of the plain model in bf16; GELU is the end of its product."""
    sizes = dict(SIZES[size])
    rows, losses = sizes.pop('rows'), {}
    text_BT = tokens(
        GPT2(GPT2Config(**sizes)), batch=rows, length=sizes.get('n_positions', 1024) + 1
    )
    batch = {'inputs': text_BT[:, :-1], 'targets': text_BT[:, 1:]}
    batch['mask'] = np.ones(batch['inputs'].shape, np.float32)
    for dtype in ('float32', 'bfloat16'):
        model = GPT2(GPT2Config(**sizes, dtype=dtype))
        losses[dtype] = jax.jit(make_eval_step(model))(parameters(size), batch)
    setup = SimpleNamespace(
        kernels=FUSED,
        config=SimpleNamespace(train=SimpleNamespace(deterministic=False)),
        device=jax.devices()[0],
    )
    prepared = jax.jit(functools.partial(fused_step.prepare, model.cfg))(parameters(size))
    step = jax.jit(
        fused_step.make_eval_step(model.cfg),
        compiler_options=compiler_options(setup, training=False),
    )
    program = step.lower(prepared, batch).compile()
    if ON_GPU:
        assert program.as_text().count('"epilogue":"BIAS_GELU"') == model.cfg.n_layer
    losses['fused'] = program(prepared, batch)
    exact_B = np.float64(losses['float32'])
    errors = {name: np.abs(np.float64(x) / exact_B - 1).max() for name, x in losses.items()}
    print(f'{size}: relative errors of the losses of {rows} texts: {errors}')
    assert errors['fused'] < max(1.5 * errors['bfloat16'], 1e-4)


@pytest.mark.skipif(not ON_GPU, reason='cuDNN needs a GPU')
def test_products_before_cudnns_attention_stay_apart():
    """The bias of q ends its product, and cuBLAS adds up the gradients of the three: see ops.py."""
    sizes = dict(SIZES['124M'])
    rows, cfg = sizes.pop('rows'), GPT2Config(**sizes, dtype='bfloat16')
    kernels = FUSED._replace(attention='cudnn')
    setup = SimpleNamespace(
        kernels=kernels,
        config=SimpleNamespace(train=SimpleNamespace(deterministic=False)),
        device=jax.devices()[0],
    )
    run = jax.jit(
        make_value_and_grad(GPT2(cfg), kernels),
        static_argnums=3,
        compiler_options=compiler_options(setup, training=True),
    )
    tokens_BT = jax.ShapeDtypeStruct((rows, cfg.n_positions), np.int32)
    params, key = jax.eval_shape(lambda: (init_params(cfg, 0), jax.random.key(0)))
    batch = {'inputs': tokens_BT, 'targets': tokens_BT}
    program = run.lower(params, batch, key, 1).compile().as_text()
    assert program.count('"epilogue":"BIAS"') == cfg.n_layer
    assert program.count('"beta":1') > 2 * cfg.n_layer
