"""Inside a pass: activations, gradients, edits and readings against a GPT-2 in fp64 numpy."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import numpy_gpt2, rough_params, tiny, tokens

from gpt2_jax import lens
from gpt2_jax.data.tokenizers import CharTokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.lens import hessian, readings, sites
from gpt2_jax.lens.subject import as_subject, run
from gpt2_jax.model import gpt2 as gpt2_lib
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import FAST
from gpt2_jax.training.step import plain_value_and_grad

CLOSE = dict(rtol=2e-5, atol=2e-5)  # fp32 against fp64, for values about 1


def numpy_losses(logits_BTV, tokens_BT):
    """-log softmax(logits)[next token], fp64: (B, T - 1)."""
    logits_BTV = logits_BTV[:, :-1] - logits_BTV[:, :-1].max(-1, keepdims=True)
    log_probs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], -1)[..., 0]


@pytest.fixture(scope='module')
def model():
    return tiny()


@pytest.fixture(scope='module')
def params(model):
    return rough_params(model)


@pytest.fixture(scope='module')
def text(model):
    return tokens(model, batch=2, length=9)


@pytest.fixture(scope='module')
def whole(model, params, text):
    """Every activation."""
    return lens.capture((model, params), text)


def losses_if(change, params, cfg, tokens_BT):
    """The losses in fp64 with change(name, x) in the place of each activation."""
    return numpy_losses(numpy_gpt2(params, cfg, tokens_BT, change), tokens_BT)


# Capturing


def all_heads(cfg) -> list[str]:
    """The addresses of all heads: 'h_0.attn.0', 'h_0.attn.1', .."""
    return [f'h_{i}.attn.{head}' for i in range(cfg.n_layer) for head in range(cfg.n_head)]


@pytest.mark.parametrize('changes', [{}, dict(bias=False, n_head=4, n_inner=24, n_layer=3)])
def test_activations_equal_numpy_name_by_name(changes):
    model = tiny(**changes, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    params, tokens_BT = rough_params(model), tokens(model, batch=2, length=9)
    expected = {}
    numpy_gpt2(params, model.cfg, tokens_BT, lambda name, x: expected.setdefault(name, x))
    captured = lens.capture((model, params), tokens_BT)
    assert list(captured) == sites.all_names(model.cfg)
    assert captured.keys() == expected.keys()
    for name, x in captured.items():
        assert x.shape == expected[name].shape
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected[name], **CLOSE, err_msg=name)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(n_layer=1, remat='block'),
        dict(n_layer=1, dtype='bfloat16'),
        dict(n_layer=1, dtype='bfloat16', residual_dtype='float32'),
    ],
)
def test_capturing_changes_no_logit(changes):
    """Bit for bit, with remat and in bfloat16."""
    model = tiny(**changes)
    params, tokens_BT = rough_params(model, std=0.1), tokens(model, batch=2, length=9)
    logits_BTV = jax.jit(model.apply)({'params': params}, tokens_BT)
    captured = lens.capture((model, params), tokens_BT)
    np.testing.assert_array_equal(captured['logits'], logits_BTV)


def test_the_wing_costs_nothing_when_off(model, monkeypatch):
    """The compiled training step is the same if `tap` does not exist."""

    def step():
        gradient = plain_value_and_grad(GPT2(model.cfg, FAST))
        batch = {name: jnp.zeros((2, 12), jnp.int32) for name in ('inputs', 'targets')}
        return jax.jit(gradient).lower(rough_params(model), batch, None, 24).as_text()

    with_tap = step()
    monkeypatch.setattr(gpt2_lib, 'tap', lambda module, name, x: x)
    assert with_tap == step()


def test_patterns_are_causal_and_sum_to_one(whole):
    for pattern_BHTS in (whole['h_0.pattern'], whole['h_1.pattern']):
        np.testing.assert_allclose(pattern_BHTS.sum(-1), 1, rtol=1e-6)
        assert (np.triu(pattern_BHTS, 1) == 0).all()
        assert (np.tril(pattern_BHTS)[..., np.tril_indices(9)[0], np.tril_indices(9)[1]] > 0).all()


def test_addresses(model, params, text, whole):
    expected = {
        'h_1.attn.0': whole['h_1.z'][:, :, 0],
        'h_1.pattern.1': whole['h_1.pattern'][:, 1],
        'h_0.mlp.17': whole['h_0.mlp_post'][:, :, 17],
        'h_0.mlp': whole['h_0.mlp_out'],
        'h_0.attn': whole['h_0.attn_out'],
        'h_0.resid_pre@5': whole['h_0.resid_pre'][:, 5],
        'h_0.resid_pre@2:4': whole['h_0.resid_pre'][:, 2:4],
        'h_1.pattern.1@3': whole['h_1.pattern'][:, 1, 3],
        'pos_embed@3': whole['pos_embed'][3],
        'logits.4': whole['logits'][:, :, 4],
    }
    found = lens.capture((model, params), text, expected)
    assert list(found) == list(expected)
    for address, x in expected.items():
        np.testing.assert_array_equal(found[address], x, err_msg=address)

    def expanded(names):
        return [site.address for site in sites.expand(model.cfg, names, n_positions=9)]

    assert expanded('h_*.attn.*') == all_heads(model.cfg)
    assert expanded(['ln_f@-1', 'h_1.q']) == ['ln_f@8', 'h_1.q']
    assert len(expanded('h_0.resid_pre@*')) == 9


@pytest.mark.parametrize(
    ('address', 'said'),
    [
        ('h_2.q', 'blocks are h_0 to h_1'),
        ('h_0.nothing', "'h_0.nothing'"),
        ('h_0.attn.2', 'there is no head 2 among 2'),
        ('h_0.mlp.999', 'there is no neuron 999 among'),
        (3, '3 is not the name of an activation'),
        (None, 'None is not the name'),
        ([None], 'None is not the name'),
        ('h_0.q@9', 'the text has 9 tokens'),
        ('h_0.q@4:4', 'is empty'),
        ('h_0 q', "'h_0 q'"),
    ],
)
def test_an_address_that_names_nothing_is_reported(model, params, text, address, said):
    with pytest.raises(UsageError, match=said):
        lens.capture((model, params), text, address)


# Gradients


def test_gradients_equal_finite_differences_in_fp64(model, params, text):
    """In a random direction through every activation, and for some elements one by one."""
    gradients = lens.gradients((model, params), text)
    rng, h = np.random.default_rng(0), 1e-5
    assert list(gradients) == sites.all_names(model.cfg)
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)

        def loss(step, name=name, direction=direction):
            def change(at, x):
                return x + step * direction if at == name else x

            return losses_if(change, params, model.cfg, text).mean()

        expected = (loss(h) - loss(-h)) / (2 * h)
        found = (gradient * direction).sum()
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6), name
        assert np.abs(gradient).max() > 1e-5, name


def test_gradient_of_one_position_is_causal_and_equal_to_finite_differences(model, params, text):
    gradients = lens.gradients((model, params), text, ['h_*.resid_pre', 'h_0.attn.1'], at=-4)
    for name in ('h_0.resid_pre', 'h_1.resid_pre'):
        assert (gradients[name][:, 6:] == 0).all()
        assert (np.abs(gradients[name][:, :6]).sum(-1) > 0).all()

    def loss(step):
        def change(name, x):
            return x + step * np.eye(16)[3] * (np.arange(9) == 2)[:, None] if name == at else x

        return losses_if(change, params, model.cfg, text)[:, 5].sum()

    at = 'h_1.resid_pre'
    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert gradients[at][:, 2, 3].sum() == pytest.approx(expected, rel=2e-4)
    assert gradients['h_0.attn.1'].shape == (2, 9, 8)


def test_gradients_of_parameters_equal_those_of_training(model, params, text):
    batch = {'inputs': text[:, :-1], 'targets': text[:, 1:]}
    n_targets = batch['targets'].size
    _, expected = jax.jit(plain_value_and_grad(model))(params, batch, None, n_targets)
    found = lens.gradients((model, params), text, '*/*')
    assert len(found) == len(jax.tree.leaves(params))
    for name, gradient in found.items():
        leaf = functools.reduce(lambda node, key: node[key], name.split('/'), expected)
        np.testing.assert_allclose(gradient, leaf, rtol=1e-4, atol=1e-6)


def test_any_loss_can_be_differentiated(model, params, text):
    def third_logit(logits_BTV, tokens_BT):
        return logits_BTV[:, -1, 3].sum()

    (gradient,) = lens.gradients((model, params), text, 'logits', loss=third_logit).values()
    expected = np.zeros((2, 9, 11))
    expected[:, -1, 3] = 1
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize('at', [8, -1, 9, -10, 1.5, [1, 2]])
def test_a_position_without_a_loss_is_reported(model, params, text, at):
    with pytest.raises(UsageError, match='a loss at positions 0 to 7'):
        lens.gradients((model, params), text, 'embed', at=at)


def test_a_position_beside_a_loss_is_refused(model, params, text):
    with pytest.raises(UsageError, match='at and loss are both given'):
        lens.gradients((model, params), text, 'embed', at=2, loss=lambda logits, _: logits.sum())


@pytest.mark.parametrize(
    'function',
    [
        lambda x, *_: np.tanh(x).sum(),
        lambda x, *_: x.sum() if x.sum() > 0 else 0.0,
        lambda x, *_: x[x > 0].sum(),
    ],
)
def test_functions_that_jax_cannot_trace_are_reported(model, params, text, function):
    subject, name = (model, params), 'h_0.mlp'
    for what, call in {
        'loss': lambda: lens.gradients(subject, text, 'embed', loss=function),
        'measure': lambda: lens.ablate(subject, text, name, measure=function),
        'the edit of h_0.mlp': lambda: lens.edit(subject, text, {name: function}),
    }.items():
        with pytest.raises(UsageError, match=f'JAX cannot trace {what}: use jax.numpy in place of'):
            call()


@pytest.mark.parametrize(
    ('function', 'found'),
    [
        (lambda x, _: (x.sum(), x), 'tuple'),
        (lambda x, _: x[0, 0], r'float32\[11\]'),
        (lambda x, _: x.argmax(), r'int32\[\]'),
    ],
)
def test_a_result_that_cannot_be_used_is_reported(model, params, text, function, found):
    with pytest.raises(UsageError, match=f'loss gives {found}: expected one real number of JAX'):
        lens.gradients((model, params), text, 'embed', loss=function)
    if found == 'tuple':
        with pytest.raises(UsageError, match='measure gives tuple: expected one array of JAX'):
            lens.ablate((model, params), text, 'h_0.mlp', measure=function)


@pytest.mark.parametrize('names', [None, 5, ['embed', 5]])
def test_gradients_at_no_name_are_refused(model, params, text, names):
    with pytest.raises(UsageError, match='is not the name of an activation: expected a text'):
        lens.gradients((model, params), text, names)


# Edits


def test_replacing_an_activation_by_itself_changes_nothing(model, params, text, whole):
    """To rounding if the value comes from outside: XLA fuses differently around it."""
    logits_BTV = whole['logits']
    same = lens.edit((model, params), text, dict.fromkeys(whole, lambda x: x))['logits']
    np.testing.assert_array_equal(same, logits_BTV)
    outside = {name: whole[name] for name in ('h_0.resid_pre', 'h_1.pattern')}
    replaced = lens.edit((model, params), text, outside)['logits']
    np.testing.assert_allclose(replaced, logits_BTV, rtol=0, atol=5e-6)
    losses = lens.token_losses((model, params), text)
    for loss in lens.patch((model, params), text, text, '*').values():
        np.testing.assert_allclose(loss, losses, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ('address', 'name', 'index', 'change'),
    [
        ('h_1.attn.1', 'h_1.z', np.s_[:, :, 1], 0.25),
        ('h_0.mlp.5@3', 'h_0.mlp_post', np.s_[:, 3, 5], lambda x: 0.5 * x),
        ('h_0.pattern.0@2:5', 'h_0.pattern', np.s_[:, 0, 2:5], lambda x: 0.5 * x),
        ('h_1.resid_mid', 'h_1.resid_mid', np.s_[:], lambda x: 0.5 * x),
        ('pos_embed@4', 'pos_embed', np.s_[4], 0.25),
    ],
)
def test_edits_equal_numpy(model, params, text, address, name, index, change):
    def in_numpy(at, x):
        if at == name:
            x = x.copy()
            x[index] = change(x[index]) if callable(change) else change
        return x

    taken = lens.edit((model, params), text, {address: change}, ['logits', 'h_1.q'])
    expected = numpy_gpt2(params, model.cfg, text, in_numpy)
    np.testing.assert_allclose(taken['logits'], expected, **CLOSE)
    assert np.abs(expected - numpy_gpt2(params, model.cfg, text)).max() > 1e-3
    assert taken['h_1.q'].shape == (2, 9, 2, 8)


def test_an_edit_of_a_wrong_shape_is_reported(model, params, text):
    with pytest.raises(UserError, match=r'h_0.attn.1 has the shape \(3,\): expected \(2, 9, 8\)'):
        lens.edit((model, params), text, {'h_0.attn.1': np.zeros(3)})


@pytest.mark.parametrize('change', [None, 'word', [None], 1j, lambda x: None])
def test_an_edit_that_is_no_number_is_reported(model, params, text, change):
    with pytest.raises(UserError, match=r'the edit of h_0\.attn\.1 is .*: expected a number'):
        lens.edit((model, params), text, {'h_0.attn.1': change})


@pytest.mark.parametrize('by', ['zero', 'mean'])
def test_a_changed_score_stays_masked(model, params, text, by):
    """No token sees a later one; the mean of a key's scores is over the queries that see it."""

    def change(at, x):
        if at != 'h_0.attn_scores':
            return x
        visible = x > -np.inf
        mean = x.mean((0, 2), keepdims=True, where=visible) if by == 'mean' else 0
        return np.where(visible, mean, x)

    (found,) = lens.ablate((model, params), text, 'h_0.attn_scores', by=by).values()
    np.testing.assert_allclose(found, losses_if(change, params, model.cfg, text), **CLOSE)
    for score in (0, lambda x: 0 * x):
        taken = lens.edit((model, params), text, {'h_0.attn_scores.1': score}, 'h_0.pattern.1')
        uniform = np.tril(np.ones((9, 9))) / np.arange(1, 10)[:, None]
        np.testing.assert_allclose(taken['h_0.pattern.1'], [uniform] * 2, rtol=1e-6)


def test_edits_that_have_no_addresses_are_reported(model, params, text):
    with pytest.raises(UsageError, match=r'edits is of type list: expected \{address: '):
        lens.edit((model, params), text, ['h_0.attn.1'])


def test_a_pair_that_is_no_model_and_its_parameters_is_reported(model, params, text):
    for wrong, kinds in (
        ((params, model), r'\(dict, GPT2\)'),
        ((model, params, None), r'\(GPT2, dict, NoneType\)'),
        ((), r'\(\)'),
    ):
        with pytest.raises(UserError, match=f'cannot look into {kinds}: .* or .model, params.'):
            lens.token_losses(wrong, text)


@pytest.mark.parametrize('by', ['zero', 'mean'])
def test_ablation_equals_numpy(model, params, text, by):
    addresses = ['h_*.attn.*', 'h_1.mlp', 'h_0.mlp.3', 'pos_embed']
    found = lens.ablate((model, params), text, addresses, by=by)
    assert [*found][:4] == all_heads(model.cfg)
    for address, name, index in (
        ('h_1.attn.0', 'h_1.z', np.s_[:, :, 0]),
        ('h_1.mlp', 'h_1.mlp_out', np.s_[:]),
        ('h_0.mlp.3', 'h_0.mlp_post', np.s_[:, :, 3]),
        ('pos_embed', 'pos_embed', np.s_[:]),
    ):

        def change(at, x, name=name, index=index):
            if at == name:
                x = x.copy()
                axes = tuple(range(x[index].ndim - (name != 'h_0.mlp_post')))
                x[index] = x[index].mean(axes) if by == 'mean' else 0
            return x

        expected = losses_if(change, params, model.cfg, text)
        np.testing.assert_allclose(found[address], expected, **CLOSE, err_msg=address)
    plain = lens.token_losses((model, params), text)
    np.testing.assert_allclose(plain, losses_if(lambda _, x: x, params, model.cfg, text), **CLOSE)
    assert np.abs(found['h_1.attn.0'] - plain).max() > 1e-3


def test_patching_everything_gives_the_other_text(model, params, text):
    """From another text and from another checkpoint; one position gives that position alone."""
    other = (text + 1) % 11
    subject = model, params
    both = {'measure': lambda logits_BTV, tokens_BT: logits_BTV}
    patched = lens.patch(subject, text, other, ['h_0.resid_pre', 'h_1.resid_post@3'], **both)
    theirs = lens.capture(subject, other, 'logits')['logits']
    ours = lens.capture(subject, text, 'logits')['logits']
    np.testing.assert_array_equal(patched['h_0.resid_pre'], theirs)
    np.testing.assert_array_equal(patched['h_1.resid_post@3'][:, 3], theirs[:, 3])
    rest = [t for t in range(9) if t != 3]
    np.testing.assert_array_equal(patched['h_1.resid_post@3'][:, rest], ours[:, rest])
    donor = model, rough_params(model, seed=5)
    patched = lens.patch(subject, text, text, 'ln_f', donor=donor, **both)
    last = lens.capture(donor, text, 'ln_f')['ln_f']
    np.testing.assert_allclose(patched['ln_f'], last @ params['wte']['embedding'].T, **CLOSE)
    assert [*lens.patch(subject, text, text, 'h_*.attn.*')] == all_heads(model.cfg)


def test_texts_and_models_that_do_not_fit_are_reported(model, params, text):
    with pytest.raises(UserError, match='9 tokens cannot be patched from one of 8'):
        lens.patch((model, params), text, text[:, :-1], 'embed')
    wide = tiny(n_embd=32)
    with pytest.raises(UserError, match='embed of the donor has the shape'):
        lens.patch((model, params), text, text, 'embed', donor=(wide, rough_params(wide)))


# Readings


def test_the_last_layer_of_the_logit_lens_is_the_model(model, params, text, whole):
    logits_LBTV = lens.logit_lens((model, params), text)
    assert logits_LBTV.shape == (3, 2, 9, 11)
    np.testing.assert_array_equal(logits_LBTV[-1], whole['logits'])
    stream = whole['h_0.resid_post']
    skipped = lens.edit((model, params), text, {'h_1.resid_post': stream})
    np.testing.assert_allclose(logits_LBTV[1], skipped['logits'], **CLOSE)
    assert np.abs(logits_LBTV[0] - logits_LBTV[1]).max() > 0.1


def test_jacobian_lens_equals_jacfwd():
    model = tiny(n_embd=8, n_inner=8)
    params, text, cfg = rough_params(model), tokens(model, batch=2, length=5), model.cfg
    jacobians_LDD = lens.jacobian_lens((model, params), text)
    names = ['h_0.resid_pre', 'h_0.resid_post', 'h_1.resid_post']

    def last_stream(layer, x_BTD):
        taken = {}

        def tap(name, x):
            x = x_BTD if name == names[layer] else x
            taken[name] = x
            return x

        run(cfg, params, text, tap)
        return taken['h_1.resid_post']

    stream = lens.capture((model, params), text, names)
    np.testing.assert_array_equal(jacobians_LDD[2], np.eye(8))
    for layer, name in enumerate(names[:2]):
        jacfwd = jax.jit(jax.jacfwd(functools.partial(last_stream, layer)))
        full = jacfwd(jnp.asarray(stream[name]))
        # (B, T', D, B, T, D): both texts apart, summed over the later positions, mean over the
        # others.
        expected_DD = np.einsum('bpibqj->ij', full) / text.size
        np.testing.assert_allclose(jacobians_LDD[layer], expected_DD, rtol=1e-4, atol=1e-5)
    through = lens.logit_lens((model, params), text, jacobians_LDD)
    plain = lens.logit_lens((model, params), text)
    np.testing.assert_allclose(through[-1], plain[-1], **CLOSE)
    carried = np.einsum('ed,btd->bte', jacobians_LDD[1], stream['h_0.resid_post'])
    np.testing.assert_allclose(through[1], readings.unembed((model, params), carried), **CLOSE)


@pytest.mark.parametrize('bias', [True, False])
def test_attributions_sum_to_the_logit(bias):
    model = tiny(bias=bias, vocab_size=23)
    params, tokens_BT = rough_params(model), tokens(model, batch=2, length=7)
    source = model, params
    logits_BTV = lens.capture(source, tokens_BT, 'logits')['logits']
    chosen = np.array([3, 1, 4, 1, 5, 9, 2])
    for targets, against in ((None, None), (chosen, None), (chosen, chosen[::-1])):
        terms = lens.attribution(source, tokens_BT, targets, against)
        total_BT = sum(term.reshape(2, 7, -1).sum(-1) for term in terms.values())
        if targets is None:
            targets = np.append(tokens_BT[:, 1:], logits_BTV[:, -1:].argmax(-1), 1)
        targets = np.broadcast_to(targets, (2, 7))
        expected_BT = np.take_along_axis(logits_BTV, targets[..., None], -1)[..., 0]
        if against is not None:
            expected_BT = expected_BT - logits_BTV[:, np.arange(7), against]
        np.testing.assert_allclose(total_BT, expected_BT, rtol=0, atol=1e-5)
    assert terms['h_1.attn'].shape == (2, 7, 2)
    assert terms['h_1.mlp'].shape == (2, 7, 64)
    assert ('ln_f.bias' in terms) == bias


def test_targets_of_other_rows_are_reported(model, params, text):
    with pytest.raises(UserError, match=r'targets of shape \(3, 9\) for tokens of shape \(2, 9\)'):
        lens.attribution((model, params), text, np.zeros((3, 9), int))


def test_the_attribution_of_a_head_is_what_it_adds(model, params, text, whole):
    """Without that head's output, the LayerNorm's scale held, the logit lacks its term."""
    source = model, params
    stream, z = np.float64(whole['h_1.resid_post']), whole['h_1.z']
    written = np.einsum('btk,kd->btd', z[:, :, 1], params['h_1']['attn']['c_proj']['kernel'][1])
    scale = params['ln_f']['scale']

    def logit(x):  # of token 4
        n = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            stream.var(-1, keepdims=True) + model.cfg.layer_norm_epsilon
        )
        return (n * scale + params['ln_f']['bias']) @ params['wte']['embedding'][4]

    terms = lens.attribution(source, text, np.full(9, 4))
    np.testing.assert_allclose(
        terms['h_1.attn'][:, :, 1], logit(stream) - logit(stream - written), rtol=1e-4, atol=1e-5
    )


def test_head_scores_find_the_head_they_are_made_for():
    """Patterns made by hand: to the token before, to the same token, to the one after it."""
    model = tiny(n_head=4, n_layer=1, n_positions=12)
    half, T = 6, 12
    patterns = np.zeros((1, 4, T, T), np.float32)
    for head, back in enumerate([1, half, half - 1]):
        patterns[:, head, np.arange(T), (np.arange(T) - back).clip(0)] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, 'capturing', lambda *_: lambda *_: {'h_0.pattern': patterns})
        scores = lens.head_scores((model, rough_params(model)))
    np.testing.assert_array_equal(scores.previous, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(scores.duplicate, [[0, 1, 0, 0]])
    np.testing.assert_array_equal(scores.induction, [[0, 0, 1, 0]])
    repeated = readings.repeated_tokens(model.cfg, rows=3)
    assert repeated.shape == (3, 12)
    np.testing.assert_array_equal(repeated[:, :6], repeated[:, 6:])


@pytest.mark.parametrize('jacobians', ['x', np.zeros((2, 2)), np.zeros((4, 16, 16))])
def test_jacobians_of_another_model_are_reported(model, params, text, jacobians):
    with pytest.raises(UserError, match=r'the Jacobians have the shape .*: expected \(3, 16, 16\)'):
        lens.logit_lens((model, params), text, jacobians)


@pytest.mark.parametrize('wrong', [{'rows': 0}, {'rows': 1.5}, {'seed': -1}])
def test_head_scores_of_no_text_are_refused(model, params, wrong):
    with pytest.raises(UsageError, match='expected a whole number, at least'):
        lens.head_scores((model, params), **wrong)


# Curvature


@pytest.mark.parametrize('wrong', [{'most': 0}, {'most': 2.5}, {'seed': -1}])
def test_curvature_of_no_products_is_refused(model, params, text, wrong):
    with pytest.raises(UsageError, match='expected a whole number, at least'):
        lens.curvature((model, params), text, **wrong)


def test_the_curvature_of_a_loss_that_is_not_finite_is_nan(text):
    model = tiny(n_layer=1)
    params = rough_params(model)
    params['wte']['embedding'] *= np.inf
    ends = lens.curvature((model, params), text, by_layer=False, most=5)['all']
    assert np.isnan([ends.top, ends.bottom]).all()
    halves = hessian.lanczos(lambda v: v / 2, np.ones(3, np.float32), most=5, tolerance=0.0)
    assert halves == pytest.approx((0.5, 0.5, 1))


@pytest.mark.parametrize('size', [1e30, 1e-30])
def test_the_curvature_may_have_any_size(size):
    diagonal = np.float32(size) * np.array([1, 2, 5, 9], np.float32)
    start = np.full(4, size, np.float32)
    found = hessian.lanczos(lambda v: v * diagonal, start, most=8, tolerance=0.0)
    assert found[:2] == pytest.approx((9 * size, size), rel=1e-4)


@pytest.mark.long
def test_curvature_equals_the_full_hessian():
    model = tiny(n_layer=1, n_embd=4, n_head=2, n_positions=5, vocab_size=5, n_inner=6)
    params, text = rough_params(model, std=0.5), tokens(model, batch=1)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(flat):
        logits_BTV = GPT2(model.cfg).apply({'params': unravel(flat)}, text)
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits_BTV[:, :-1]), text[:, 1:, None], -1
        ).mean()

    hessian_PP = np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)
    hessian_PP = (hessian_PP + hessian_PP.T) / 2
    found = lens.curvature((model, params), text, tolerance=1e-6, most=200)
    assert list(found) == ['all', *sorted(params)]
    start = 0
    for name, ends in found.items():
        if name == 'all':
            block = hessian_PP
        else:
            size = sum(leaf.size for leaf in jax.tree.leaves(params[name]))
            block = hessian_PP[start : start + size, start : start + size]
            start += size
        eigenvalues, _ = np.linalg.eigh(block)
        radius = np.abs(eigenvalues).max()
        assert ends.top == pytest.approx(eigenvalues[-1], abs=1e-4 * radius), name
        assert ends.bottom == pytest.approx(eigenvalues[0], abs=1e-4 * radius), name
    assert list(lens.curvature((model, params), text, by_layer=False, most=3)) == ['all']

    vector = rough_params(model, seed=3)
    product = lens.hessian_vector((model, params), text, vector)
    expected = hessian_PP @ jax.flatten_util.ravel_pytree(vector)[0]
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(product)[0], expected, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UserError, match=r'the shapes of the parameters: .* is missing, expected'):
        lens.hessian_vector((model, params), text, {'wte': 0})


# Models and texts


def test_all_of_it_works_under_a_transfer_guard(model, params, text):
    class Moved(Exception):
        """The tokens of a text were asked for, and an array could be moved."""

    class Text:
        def __array__(self, dtype=None, copy=None):
            jnp.sin(np.ones(1))
            raise Moved

    more = {'edit': ({},), 'ablate': ('h_1.mlp_out',), 'patch': (text, 'h_1.mlp_out')}
    more['hessian_vector'] = (params,)
    with jax.transfer_guard('disallow'):
        for name in set(lens.__all__) - {'head_scores', 'shape_flow'}:
            with pytest.raises(Moved):
                getattr(lens, name)((model, params), Text(), *more.get(name, ()))
        lens.head_scores((model, params), rows=1)


def test_every_kind_of_model_is_accepted(model, params, text):
    with_tokenizer = SimpleNamespace(
        model=model, params=params, tokenizer=CharTokenizer('abcdefghijk')
    )
    expected = lens.token_losses((model, params), text[:1])
    word = ''.join('abcdefghijk'[i] for i in text[0])
    for source, given in (
        ((model.cfg, params), text[0]),
        (with_tokenizer, word),
        (as_subject(with_tokenizer), text[:1]),
        ((dataclasses.replace(model.cfg, remat='block'), params), text[:1]),
    ):
        np.testing.assert_array_equal(lens.token_losses(source, given), expected)


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ([0, 1, 11], r'token 11 at position 2 is outside the vocabulary \[0, 11\)'),
        ([0, -1], 'token -1 at position 1'),
        (np.zeros(13, int), 'a text of 13 tokens: expected 2 to 12'),
        ([1], 'a text of 1 token: expected 2'),
        (np.zeros((2, 2, 2), int), r'shape \(T,\) or \(B, T\)'),
        ([0.5, 1.0], 'tokens must be integers'),
        ([[1, 2], [3]], 'the rows differ in length'),
        (['ab', 'ba'], 'a list of texts is not a batch'),
        ('abc', 'bare parameters have no tokenizer'),
    ],
)
def test_a_text_that_does_not_fit_is_reported(model, params, given, said):
    with pytest.raises(UserError, match=said):
        lens.token_losses((model, params), given)


def test_a_context_of_one_token_is_too_short(model, params):
    cfg = dataclasses.replace(model.cfg, n_positions=1)
    params = params | {'wpe': {'embedding': params['wpe']['embedding'][:1]}}
    assert lens.capture((cfg, params), [3], 'embed')['embed'].shape == (1, 1, 16)
    with pytest.raises(UserError, match='model is 1 token: expected at least 2, one to read and t'):
        lens.token_losses((cfg, params), [3])


def test_parameters_that_do_not_fit_are_reported(model, params):
    def rejected(changed, said):
        with pytest.raises(UserError, match=said):
            lens.token_losses((model, changed), [0, 1])

    rejected({k: v for k, v in params.items() if k != 'h_1'}, 'lack h_1/attn/c_attn/bias')
    rejected(params | {'h_2': params['h_1']}, 'hold h_2/')
    rejected(
        params | {'wte': {'embedding': np.zeros((11, 8))}},
        r'wte/embedding has the shape \(11, 8\): this model needs \(11, 16\)',
    )
    with pytest.raises(UserError, match='cannot look into int'):
        lens.token_losses(3, [0, 1])
