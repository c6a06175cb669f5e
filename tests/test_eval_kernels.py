"""Evaluation by the fused kernels, in Pallas' interpreter, against the plain model."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tiny import rough_params, shapes, tiny, tokens

from gpt2_jax.config import default_config, resolve
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.kernels import choose, embedding, launch
from gpt2_jax.kernels.norm import add_norm
from gpt2_jax.speed.benchmark import random_data
from gpt2_jax.training import fused_step, programs
from gpt2_jax.training import setup as setup_lib
from gpt2_jax.training.step import make_eval_step

# Dropout is in the configuration, and evaluation has none.
DROPOUT = dict(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
CASES = {
    'three heads': dict(n_layer=1, n_head=3, n_embd=48, n_positions=128, vocab_size=301),
    'no bias, part of the context': dict(
        n_layer=2, n_head=2, n_embd=64, n_positions=96, vocab_size=1030, bias=False, remat='block'
    ),
    'a wide head, few characters': dict(
        n_layer=1, n_head=1, n_embd=64, n_positions=64, vocab_size=65
    ),
}


@pytest.fixture(scope='module', autouse=True)
def several_tiles_a_program():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, 'HEAD_COLUMNS', 64)
        patch.setattr(embedding, 'HEAD_PARTS', 3)
        yield


def batch(model, rows=3):
    """Rows of padding at their end, as evaluation has them; 3 x 64 tokens are no 2,048."""
    length = model.cfg.n_positions // 64 * 64
    text_BT = tokens(model, batch=rows, length=length + 1)
    mask_BT = np.float32(np.arange(length) < [[length], [length // 2], [1]])
    inputs_BT = text_BT[:, :-1] * (mask_BT > 0)
    return {'inputs': inputs_BT, 'targets': text_BT[:, 1:], 'mask': mask_BT}


def evaluated(model, params, data):
    """The losses of the rows: (by the kernels, by the plain model)."""
    cfg = model.cfg
    ours = jax.jit(
        lambda params, data: fused_step.make_eval_step(cfg)(fused_step.prepare(cfg, params), data)
    )
    return ours(params, data), jax.jit(make_eval_step(model))(params, data)


@pytest.mark.parametrize('name', CASES)
def test_losses_equal_the_plain_model(name):
    model = tiny(**CASES[name], **DROPOUT)
    got_B, expected_B = evaluated(model, rough_params(model), batch(model))
    np.testing.assert_allclose(got_B, expected_B, rtol=2e-6)


def test_bf16_losses_are_near_fp32():
    """About as near as those of the plain model in bf16."""
    model = tiny(**CASES['three heads'], dtype='bfloat16')
    params, data = rough_params(model, std=0.1), batch(model)
    exact_B = np.float64(jax.jit(make_eval_step(tiny(**CASES['three heads'])))(params, data))
    errors = [abs(losses_B / exact_B - 1) for losses_B in evaluated(model, params, data)]
    assert errors[0].max() < 1.5 * errors[1].max() < 0.01


def test_the_sum_is_normalised_before_it_is_rounded():
    """A branch that bf16 loses beside x: without a gradient LayerNorm still sees it."""
    rng = np.random.default_rng(0)
    sign_ND = rng.choice([-1, 1], (4, 16))
    x_ND, branch_ND = jnp.bfloat16(256 * sign_ND), jnp.bfloat16(rng.uniform(-0.4, 0.4, (4, 16)))
    one_D = jnp.ones(16)

    def run(x_ND):
        return add_norm(x_ND, branch_ND, None, one_D, None, None, 0.0, 1e-5, 'float32')

    sum_ND, y_ND = run(x_ND)
    np.testing.assert_array_equal(sum_ND, x_ND)
    both_ND = np.float64(x_ND) + np.float64(branch_ND)
    both_ND -= both_ND.mean(-1, keepdims=True)
    expected_ND = both_ND / both_ND.std(-1, keepdims=True)
    np.testing.assert_allclose(y_ND, expected_ND, atol=1e-5)
    _, trained_ND = jax.vjp(run, x_ND)[0]  # the backward pass reads the rounded sum
    assert np.abs(trained_ND - expected_ND).max() > 1e-4


@pytest.mark.parametrize('offset', [0.0, -100.0])
@pytest.mark.parametrize('V', [5, 130, 300])
def test_the_loss_without_logits(V, offset):
    """For the first, last and other targets; all logits of published models share an offset.

    Five tiles in three parts, the last of which has one tile, or less than one, of padding alone.
    """
    rng = np.random.default_rng(0)
    x_ND, wte_VD = rng.normal(0, 1, (192, 48)), rng.normal(0, 1, (V, 48))
    x_ND[:, 0], wte_VD[:, 0] = 1, offset
    x_ND, wte_VD = np.float32(x_ND), np.float32(wte_VD)
    targets_N = np.array([0, V - 1, V // 2, *rng.integers(0, V, 189)], np.int32)
    head_VD = embedding.padded_head(jnp.array(wte_VD)).at[V:].set(1e4)
    got_N = embedding.head_nats(jnp.array(x_ND), head_VD, targets_N, V)
    logits_NV = np.float64(x_ND) @ np.float64(wte_VD).T
    logits_NV -= logits_NV.max(-1, keepdims=True)
    expected_N = np.log(np.exp(logits_NV).sum(-1)) - logits_NV[np.arange(192), targets_N]
    np.testing.assert_allclose(got_N, expected_N, rtol=1e-6, atol=4e-5 if offset else 2e-6)


def test_the_head_refuses_shapes_that_it_would_process_in_part():
    for N, D in ((96, 64), (128, 40)):
        x_ND, head_VD = jnp.zeros((N, D)), jnp.zeros((256, D))
        with pytest.raises(ValueError, match=f'got {N} rows of {D} numbers; expected .* 64 and 16'):
            embedding.head_nats(x_ND, head_VD, jnp.zeros(N, jnp.int32), 256)


def test_evaluation_lowers_for_a_gpu(monkeypatch):
    """Neither logits nor an attention pattern are in it; nothing is in fp32 before GELU."""
    monkeypatch.setattr(launch, 'interprets', lambda: False)
    sizes = dict(n_layer=1, n_head=2, n_embd=128, n_positions=128, vocab_size=1030)
    model = tiny(**sizes, dtype='bfloat16')
    prepared = jax.eval_shape(lambda params: fused_step.prepare(model.cfg, params), shapes(model))
    h100 = AbstractMesh(
        (1,), ('x',), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    )
    step = jax.jit(fused_step.make_eval_step(model.cfg))
    with use_abstract_mesh(h100):
        lowered = step.trace(prepared, batch(model)).lower(lowering_platforms=('cuda',))
    text = lowered.as_text()
    for name in ('attention_forward', 'add_norm', 'head_nats'):
        assert name in text
    assert '384x512xbf16' in text  # before GELU
    for shape in ('384x512xf32', '384x1280', '384x1152', '384x1030', '3x2x128x128'):
        assert shape not in text


def test_the_evaluation_of_a_run(monkeypatch):
    """Compiled ahead for prepared parameters; several batches, of which the last is padded."""
    config = default_config()
    config.model.update(n_layer=1, n_head=1, n_embd=32, n_positions=64, dtype='bfloat16')
    config.train.batch_size = 2
    losses = {}
    for kernels in (choose.FUSED, choose.XLA):
        monkeypatch.setattr(setup_lib, 'choose', lambda *_, kernels=kernels: (kernels, {}))
        setup = setup_lib.build(resolve(config), random_data(65, 64 * 5))
        with programs.compiling() as pool:
            evaluation = make_evaluate(setup, pool=pool)(rough_params(setup.model, std=0.1))
        losses[kernels.evaluation] = evaluation.loss
        assert evaluation.tokens == 64 * 5 - 1
    assert losses['fused'] == pytest.approx(losses['xla'], rel=1e-4)
    assert losses['fused'] != losses['xla']  # other roundings: the kernels were used


def test_the_choice_of_an_evaluation():
    """The fused kernels if they can run, else cuDNN's attention, else XLA; a setting decides."""

    def chosen(place=None, **changes):
        cfg = tiny(**dict(n_head=1, dtype='bfloat16') | changes).cfg
        kernels, reasons = choose.choose(
            cfg, 'auto', place or choose.Place('gpu', rows=3, seq_len=64)
        )
        return kernels.evaluation, reasons.get('evaluation', '')

    assert chosen() == ('fused', '')
    assert chosen(attention='cudnn')[0] == 'cudnn'
    assert chosen(kernels='xla')[0] == chosen(attention='xla')[0] == 'xla'
    assert chosen(kernels='xla', attention='cudnn')[0] == 'cudnn'
    for reason, path, options in (
        ('multiple of 64, not 65', 'cudnn', {'place': choose.Place('gpu', rows=3, seq_len=65)}),
        ('mesh.tensor = 1', 'cudnn', {'place': choose.Place('gpu', 2, 3, 64)}),
        ('gelu_new', 'cudnn', {'activation_function': 'gelu'}),
        ('128, not 24', 'cudnn', {'n_embd': 24}),
        ('bfloat16', 'xla', {'dtype': 'float32'}),
        ('an NVIDIA GPU', 'xla', {'place': choose.Place('cpu', rows=3, seq_len=64)}),
    ):
        kernels, why = chosen(**options)
        assert kernels == path
        assert reason in why
    cfg = tiny(n_head=1, dtype='bfloat16').cfg
    assert choose.evaluation_attention(cfg, 'gpu') == 'cudnn'  # of the plain model
    assert choose.evaluation_attention(cfg, 'cpu') == 'xla'


@pytest.mark.parametrize(
    ('capability', 'kernels'),
    [('9.0', 'fused'), ('12.1', 'fused'), ('8.0', 'fused'), ('7.5', 'xla'), ('gfx942', 'xla')],
)
def test_kernels_need_a_gpu_with_bfloat16(capability, kernels):
    gpu = SimpleNamespace(platform='gpu', compute_capability=capability)
    platform, cfg = choose.platform_of(gpu), tiny(n_head=1, dtype='bfloat16').cfg
    chosen, reasons = choose.choose(cfg, 'auto', choose.Place(platform, rows=32, seq_len=64))
    assert set(chosen) == {kernels, 'optax'} - ({'optax'} if kernels == 'fused' else set())
    assert choose.usable(dataclasses.replace(cfg, kernels='fused'), platform).kernels == (
        'fused' if kernels == 'fused' else 'auto'
    )
    if kernels == 'xla':
        assert reasons['norm'] == (
            'fused needs an NVIDIA GPU of compute capability 8.0 or more, but this runs on a GPU '
            f'of compute capability {capability}'
        )


@pytest.mark.parametrize(
    ('rows', 'T', 'dropout', 'attention'),
    [
        (16, 1024, 0.0, 'cudnn'),
        (15, 1024, 0.0, 'fused'),
        (64, 256, 0.0, 'fused'),
        (16, 1024, 0.1, 'fused'),
        (16, 1025, 0.0, 'cudnn'),
    ],
)
def test_the_attention_of_training_by_size(rows, T, dropout, attention):
    cfg = tiny(n_head=1, dtype='bfloat16', attn_pdrop=dropout).cfg
    chosen, _ = choose.choose(cfg, 'auto', choose.Place('gpu', rows=rows, seq_len=T))
    assert chosen.attention == attention


def test_the_platform_of_other_devices():
    assert choose.platform_of(jax.devices()[0]) == 'cpu'
    assert choose.platform_of(SimpleNamespace(platform='tpu')) == 'tpu'
