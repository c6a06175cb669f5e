"""The fused kernels, in Pallas' interpreter: what model.py, step.py and optim.py spell out, value and gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tiny import flat, rough_params, shapes, tiny, tokens

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.config import default_config, resolve
from gpt2_jax.errors import UsageError
from gpt2_jax.kernels import cross_entropy, gelu, launch, norm
from gpt2_jax.kernels.cross_entropy import head_loss
from gpt2_jax.kernels.support import unmet_needs
from gpt2_jax.train import train
from gpt2_jax.training import fused_step
from gpt2_jax.training.optim import apply_update, make_optimizer, make_schedule
from gpt2_jax.training.programs import make_value_and_grad
from gpt2_jax.training.step import init_state, make_train_step, token_losses

# Three heads and a width that is no power of two; two blocks of queries; an odd vocabulary, in more than one block.
SIZE = dict(n_head=3, n_embd=48, n_positions=128, vocab_size=301)
DROPOUT = dict(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
ROWS = 4
SCHEDULE = make_schedule(learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=2, steps=50)
OPEN, FUSED = (
    dict(kernels='xla', implementation='explicit'),
    dict(kernels='fused', implementation='fused'),
)


@pytest.fixture(scope='module', autouse=True)
def several_rows_a_program():
    """As on a GPU, where rows are many more than programs, and a vocabulary has several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, 'NORM_PROGRAMS', 64)
        patch.setattr(gelu, 'GELU_PROGRAMS', 16)
        patch.setattr(cross_entropy, 'COLUMNS', 64)
        yield


def optimizer(implementation, clip_norm=0.1):
    make = (
        fused_step.make_optimizer
        if implementation == 'fused'
        else functools.partial(make_optimizer, implementation=implementation)
    )
    return make(
        schedule=SCHEDULE, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=clip_norm
    )


def batch(model, rows=ROWS, seed=1):
    text_BT = tokens(model, batch=rows, length=model.cfg.n_positions + 1, seed=seed)
    return {'inputs': text_BT[:, :-1], 'targets': text_BT[:, 1:]}


def first_update(kernels, implementation, grad_accum_steps=1, rows=ROWS, **changes):
    """Gradients (AdamW's first m is a tenth of them) and metrics of one update from rough parameters."""
    model = tiny(**SIZE | changes, kernels=kernels)
    adamw = optimizer(implementation, clip_norm=0)
    state = init_state(rough_params(tiny(**SIZE | changes | {'attention': 'xla'}), std=0.1), adamw)
    update = jax.jit(
        make_train_step(
            make_value_and_grad(model), adamw, SCHEDULE, seed=3, grad_accum_steps=grad_accum_steps
        )
    )
    state, metrics = update(state, batch(model, rows))
    return flat(state.opt_state.m), metrics


def check_equal(ours, theirs, tolerance):
    (gradients, metrics), (expected, expected_metrics) = ours, theirs
    for name, leaf in expected.items():
        # A bias of k changes nothing: its gradient is 0, or what rounding makes of it.
        k_bias = (
            np.max(np.abs(expected[name.replace('bias', 'kernel')])) if 'c_attn/bias' in name else 0
        )
        assert np.max(np.abs(gradients[name] - leaf)) < tolerance * max(
            np.max(np.abs(leaf)), k_bias
        ), name
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    'changes',
    [
        {'n_layer': 1},
        DROPOUT,
        {'n_layer': 1, 'bias': False, 'remat': True, **DROPOUT},
        {'n_layer': 1, 'dtype': 'bfloat16', **DROPOUT},
    ],
    ids=['plain', 'dropout', 'remat', 'bf16'],
)
def test_gradients_equal_the_open_model(changes):
    """The same masks too: with dropout, loss and gradients would differ by a tenth."""
    tolerance = 0.06 if 'dtype' in changes else 1e-5
    check_equal(first_update(**FUSED, **changes), first_update(**OPEN, **changes), tolerance)


def test_cudnn_attention_between_the_kernels(monkeypatch):
    """Its three products, and the biases moved about, with XLA's attention in the place of cuDNN's."""
    monkeypatch.setattr(
        fused_step,
        'cudnn_attention',
        functools.partial(jax.nn.dot_product_attention, is_causal=True),
    )
    check_equal(
        first_update(**FUSED, attention='cudnn', n_layer=1), first_update(**OPEN, n_layer=1), 1e-5
    )


@pytest.mark.parametrize('implementation', ['explicit', 'optax'])
def test_other_optimizers(implementation):
    """They too take the gradients of the kernels, with the rows that pad the vocabulary."""
    after = []
    for kernels in ('xla', 'fused'):
        model, adamw = (
            tiny(**SIZE, n_layer=1, bias=False, kernels=kernels),
            optimizer(implementation),
        )
        update = jax.jit(
            make_train_step(make_value_and_grad(model), adamw, SCHEDULE, seed=3, grad_accum_steps=1)
        )
        state, metrics = update(init_state(rough_params(model, std=0.1), adamw), batch(model))
        after.append((flat(state.params), metrics['grad_norm']))
    (expected, expected_norm), (ours, norm) = after
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-5)
    for name, leaf in expected.items():
        np.testing.assert_allclose(ours[name], leaf, atol=0.01 * SCHEDULE(0), err_msg=name)


def test_micro_batches():
    one, two = (first_update(**FUSED, grad_accum_steps=k, rows=2 * ROWS, n_layer=1) for k in (1, 2))
    check_equal(two, one, 1e-5)


def test_updates_equal_the_explicit_optimizer():
    """Through warmup, clipping and decay, from the same gradients; and the norms that come with them."""
    ours, theirs = (optimizer(name) for name in ('fused', 'explicit'))
    params = rough_params(tiny(**SIZE, n_layer=1))
    state, (theirs_params, theirs_state) = (
        (params, ours.init(params)),
        (params, theirs.init(params)),
    )
    rng, (update, expected_update) = (
        np.random.default_rng(0),
        (jax.jit(functools.partial(apply_update, optimizer)) for optimizer in (ours, theirs)),
    )
    for _ in range(4):
        grads = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.1, leaf.shape)), params)
        *state, norms = update(grads, state[1], state[0])
        theirs_params, theirs_state, expected = expected_update(grads, theirs_state, theirs_params)
        for name, leaf in flat(theirs_params).items():
            np.testing.assert_allclose(
                flat(state[0])[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name
            )
        assert set(norms) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(norms[name], value, rtol=1e-5, err_msg=name)
        assert norms['grad_norm'] > 0.1  # clipped


@pytest.mark.parametrize('changes', [{}, DROPOUT])
def test_it_compiles_for_a_gpu_as_far_as_that_goes_without_one(monkeypatch, changes):
    monkeypatch.setattr(launch, 'interprets', lambda: False)
    model = tiny(**SIZE | dict(n_head=2, n_embd=128, dtype='bfloat16', kernels='fused') | changes)
    update = jax.jit(
        make_train_step(
            make_value_and_grad(model), optimizer('fused'), SCHEDULE, seed=0, grad_accum_steps=1
        )
    )
    state = jax.eval_shape(lambda: init_state(rough_params(model), optimizer('fused')))
    h100 = AbstractMesh(
        (1,), ('x',), abstract_device=AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    )
    with use_abstract_mesh(h100):
        text = update.trace(state, batch(model)).lower(lowering_platforms=('cuda',)).as_text()
    for name in (
        'attention_forward',
        'attention_backward_keys',
        'attention_backward_queries',
        'add_norm',
        'gelu',
        'softmax_gradient',
        'adamw',
        'adamw_vectors',
    ):
        assert name in text
    assert shapes(model)


def test_where_the_kernels_do_not_go(tmp_path):
    """One line that says what is in the way; and never a run that only seems to use them."""
    (tmp_path / 'text.txt').write_text('abcdefgh' * 200)

    def config(**changes):
        config = default_config()
        config.model.update(
            n_layer=1, n_head=2, n_embd=128, n_positions=128, dtype='bfloat16', kernels='fused'
        )
        config.optim.implementation = 'fused'
        config.data.corpus = str(tmp_path / 'text.txt')
        config.train.batch_size = 16
        for key, value in changes.items():
            section, name = key.split('__')
            config[section][name] = value
        return resolve(config)

    def needs(**changes):
        changed = config(**changes)
        cfg = GPT2Config(**changed.model)
        rows, n_devices = changed.train.batch_size, max(changed.mesh.values())
        sizes = dict(n_devices=n_devices, rows=rows, seq_len=changed.train.seq_len)
        return list(unmet_needs('training', cfg, 'gpu', **sizes))

    assert needs() == []
    for key, value, says in (
        ('model__dtype', 'float32', 'bfloat16'),
        ('model__activation_function', 'gelu', 'gelu_new'),
        ('model__n_embd', 96, 'a head width n_embd / n_head = 16, 32, 64 or 128, not 48'),
        ('train__seq_len', 96, 'seq_len to be a multiple of 64, not 96'),
        ('train__batch_size', 24, 'a multiple of 2,048 tokens, not 24 rows x 128'),
        ('mesh__data', 2, 'one device'),
    ):
        assert re.search(says, needs(**{key: value})[0])
    for changes, says in (
        ({}, r"^model.kernels = 'fused' needs an NVIDIA GPU, .* cpu; else"),
        ({'model__kernels': 'xla'}, r"^optim.implementation = 'fused' needs an NVIDIA GPU"),
    ):
        with pytest.raises(UsageError, match=says):
            train(config(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_every_logit_matters_to_the_loss():
    """Of vocabularies below, at and above the sizes of blocks, far from 0, with the target in any block."""

    def loss(x_ND, wte_VD, targets_N):
        return 0.3 * token_losses(x_ND @ wte_VD.T, targets_N).sum()

    rng = np.random.default_rng(0)
    for V in (5, 128, 384, 5000):
        x_ND, wte_VD = (np.float32(rng.normal(0, 3, (n, 16))) for n in (8, V))
        targets_N = rng.integers(0, V, 8)
        targets_N[:2] = 0, V - 1
        nats_N, *gradients = jax.jit(head_loss)(x_ND, wte_VD, targets_N, 0.3)
        expected = jax.grad(loss, (0, 1))(x_ND, wte_VD, targets_N)
        for gradient, theirs in zip(gradients, expected, strict=True):
            padding = [(0, len(gradient) - len(theirs)), (0, 0)]
            np.testing.assert_allclose(
                gradient, np.pad(theirs, padding), atol=1e-5 * np.abs(theirs).max()
            )
        logits_NV = np.float64(x_ND) @ wte_VD.T
        expected_N = np.log(
            np.exp(logits_NV - logits_NV.max(-1, keepdims=True)).sum(-1)
        ) + logits_NV.max(-1)
        np.testing.assert_allclose(
            nats_N, expected_N - logits_NV[np.arange(8), targets_N], rtol=1e-4, atol=1e-4
        )
    assert jnp.isfinite(nats_N).all()


def test_the_target_is_read_before_it_is_overwritten():
    """The gradient takes the memory of the logits, on a GPU; the interpreter has two arrays, and sees nothing of it."""
    call = jax.make_jaxpr(
        lambda logits, targets: cross_entropy._softmax_gradient(logits, targets, 300)
    )(jnp.zeros((8, 384)), jnp.zeros(8, jnp.int32)).eqns[-1]
    kernel = call.params['jaxpr']
    _, logits, gradient, _ = kernel.invars
    reads, writes = (
        [i for i, eqn in enumerate(kernel.eqns) if ref in eqn.invars] for ref in (logits, gradient)
    )
    assert call.params['input_output_aliases'] == ((1, 0),)
    assert [out.aval.shape for out in kernel.eqns[reads[0]].outvars] == [
        ()
    ]  # one number: the target's, and no loop
    assert reads[0] < min(writes)


def test_gradients_are_not_scaled_in_bfloat16():
    """The number of targets has more bits than that: gradients as a whole would be off by up to 0.4 %."""
    rng = np.random.default_rng(0)
    x_ND, wte_VD = jnp.bfloat16(rng.normal(0, 1, (64, 32))), np.float32(rng.normal(0, 1, (300, 32)))
    targets_N = rng.integers(0, 300, 64)
    one, third = (jax.jit(head_loss)(x_ND, wte_VD, targets_N, scale)[1:] for scale in (1.0, 1 / 3))
    for whole, part in zip(one, third, strict=True):
        whole, part = np.float64(whole), np.float64(part)
        assert abs(3 * (whole * part).sum() / (whole * whole).sum() - 1) < 3e-4


def test_logits_far_from_0_in_bfloat16():
    """As published models have them, all near -100: what they have in common must not cost the bits of the rest."""
    rng = np.random.default_rng(0)
    x_ND, wte_VD = (
        np.float32(rng.normal(0, 1, (256, 64))),
        np.float32(rng.normal(0, 0.3, (2000, 64))),
    )
    common_D = rng.normal(0, 1, 64)
    wte_VD += np.float32(
        -100 * common_D / (x_ND @ common_D).std() / 3
    )  # rows of logits around 0 +- 33
    x_ND = np.float32(jnp.bfloat16(x_ND))
    targets_N = rng.integers(0, 2000, 256)
    logits_NV = np.float64(x_ND) @ np.float64(wte_VD).T
    expected_N = np.log(
        np.exp(logits_NV - logits_NV.max(-1, keepdims=True)).sum(-1)
    ) + logits_NV.max(-1)
    expected_N -= logits_NV[np.arange(256), targets_N]
    nats_N = jax.jit(head_loss)(jnp.bfloat16(x_ND), wte_VD, targets_N, 1.0)[0]
    assert np.abs(logits_NV).max() > 60
    assert abs(np.mean(nats_N - expected_N)) < 0.003
    assert np.max(np.abs(nats_N - expected_N)) < 0.06
