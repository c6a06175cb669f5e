"""Evaluation by the fused kernels, in Pallas' interpreter, against the plain model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tiny import rough_params, shapes, tiny, tokens

from gpt2_jax.architecture import padded_vocab
from gpt2_jax.config import default_config, resolve
from gpt2_jax.diagnostics.benchmark import random_data
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.kernels import choose, embedding, launch
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
def several_blocks_a_row():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, 'COLUMNS', 64)
        yield


def batch(model, rows=3):
    """Rows of padding at their end, as evaluation has them; 3 x 64 tokens are no 2,048."""
    length = model.cfg.n_positions // 64 * 64
    text_BT = tokens(model, batch=rows, length=length + 1)
    mask_BT = np.float32(np.arange(length) < [[length], [length // 2], [1]])
    inputs_BT = text_BT[:, :-1] * (mask_BT > 0)
    return {'inputs': inputs_BT, 'targets': text_BT[:, 1:], 'mask': mask_BT}


def evaluated(model, params, data, chunk_targets):
    """The losses of the rows: (by the kernels, by the plain model)."""
    cfg = model.cfg
    ours = jax.jit(
        lambda params, data: fused_step.make_eval_step(cfg, chunk_targets)(
            fused_step.prepare(cfg, params), data
        )
    )
    return ours(params, data), jax.jit(make_eval_step(model))(params, data)


@pytest.mark.parametrize(
    ('name', 'chunk_targets'), list(zip(CASES, (0, 32, 192), strict=True)), ids=list(CASES)
)
def test_losses_equal_the_plain_model(name, chunk_targets):
    model = tiny(**CASES[name], **DROPOUT)
    got_B, expected_B = evaluated(model, rough_params(model), batch(model), chunk_targets)
    np.testing.assert_allclose(got_B, expected_B, rtol=2e-6)


def test_bf16_losses_are_near_fp32():
    """As near as those of the plain model in bf16; an offset of all logits takes no bits."""
    model = tiny(**CASES['three heads'], dtype='bfloat16')
    params, data = rough_params(model, std=0.1), batch(model)
    exact_B = np.float64(jax.jit(make_eval_step(tiny(**CASES['three heads'])))(params, data))
    errors = [abs(losses_B / exact_B - 1) for losses_B in evaluated(model, params, data, 32)]
    assert errors[0].max() < 1.5 * errors[1].max() < 0.01


@pytest.mark.parametrize('offset', [0.0, -1000.0])
@pytest.mark.parametrize('V', [5, 130, 1030])
def test_the_loss_of_a_row_of_logits(V, offset):
    """At the first, last and other targets; columns of padding hold anything."""
    rng, padded = np.random.default_rng(0), padded_vocab(V)
    logits_NV = np.float32(rng.normal(0, 4, (4, padded)) + offset)
    logits_NV[:, V:] = 1e9
    targets_N = np.array([0, V - 1, V // 2, 1], np.int32)
    got_N = embedding.row_nats(jnp.array(logits_NV), targets_N, V)
    exact_NV = np.float64(logits_NV[:, :V])
    exact_NV -= exact_NV.max(-1, keepdims=True)
    expected_N = np.log(np.exp(exact_NV).sum(-1)) - exact_NV[np.arange(4), targets_N]
    np.testing.assert_allclose(got_N, expected_N, rtol=1e-6, atol=1e-6)


def test_evaluation_lowers_for_a_gpu(monkeypatch):
    """With fp32 logits of one chunk, and no others."""
    monkeypatch.setattr(launch, 'interprets', lambda: False)
    sizes = dict(n_layer=1, n_head=2, n_embd=128, n_positions=128, vocab_size=1030)
    model = tiny(**sizes, dtype='bfloat16')
    prepared = jax.eval_shape(lambda params: fused_step.prepare(model.cfg, params), shapes(model))
    h100 = AbstractMesh(
        (1,), ('x',), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    )
    step = jax.jit(fused_step.make_eval_step(model.cfg, 128))
    with use_abstract_mesh(h100):
        lowered = step.trace(prepared, batch(model)).lower(lowering_platforms=('cuda',))
    text = lowered.as_text()
    for name in ('attention_forward', 'add_norm', 'gelu', 'row_nats'):
        assert name in text
    assert 'tensor<128x1152xf32>' in text
    assert '384x1152' not in text
    assert 'tensor<128x1152xbf16>' not in text


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
        ('gelu_new', 'cudnn', {'activation_function': 'relu'}),
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
