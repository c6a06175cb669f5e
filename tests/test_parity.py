"""Against transformers' GPT-2 and torch's AdamW: forward, backward, generation, export, updates.

Runs on random weights if the extra `parity` is installed:

    pip install -e '.[test,parity]' && pytest tests/test_parity.py -s
"""

import hashlib
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import rough_params, tiny, tokens

from gpt2_jax import convert
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.config import default_config
from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import ByteTokenizer, Gpt2Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.inference import harness
from gpt2_jax.inference.decoding import generate
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.huggingface import (
    ACTIVATIONS,
    export_config,
    export_params,
    import_config,
    import_params,
    read_folder,
    write_folder,
)
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.ops import activate
from gpt2_jax.training.optim import AdamW, make_optimizer
from gpt2_jax.training.programs import make_value_and_grad
from gpt2_jax.training.step import accumulate, init_state, make_train_step
from gpt2_jax.workdir import restore

os.environ['HF_HUB_OFFLINE'] = '1'  # read at import: these tests download nothing
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import make_fixture  # noqa: E402 (it imports torch and transformers)
from make_fixture import logits_and_gradients, rough_gpt2  # noqa: E402

# Warnings of torch and transformers are theirs to mend.
pytestmark = pytest.mark.filterwarnings('default')

# B and T are the size of the batch, the rest are GPT-2's settings. One case has GPT-2's depth, one
# its vocabulary.
SHAPES = [
    dict(n_layer=1, n_head=1, n_embd=16, n_positions=80, vocab_size=97, B=1, T=80),
    dict(n_layer=2, n_head=2, n_embd=32, n_positions=96, vocab_size=256, B=3, T=17),
    dict(
        n_layer=3,
        n_head=4,
        n_embd=64,
        n_positions=128,
        vocab_size=1000,
        B=2,
        T=64,
        activation_function='gelu',
    ),
    dict(
        n_layer=4,
        n_head=3,
        n_embd=48,
        n_positions=100,
        vocab_size=65,
        B=8,
        T=32,
        n_inner=100,
        layer_norm_epsilon=1e-3,
    ),
    dict(n_layer=6, n_head=8, n_embd=128, n_positions=256, vocab_size=512, B=2, T=128),
    dict(n_layer=12, n_head=12, n_embd=96, n_positions=90, vocab_size=333, B=4, T=50),
    dict(n_layer=2, n_head=4, n_embd=64, n_positions=72, vocab_size=50257, B=1, T=16),
]


def ours_of(theirs):
    """Our model and parameters, with the weights of a transformers model in memory."""
    model = GPT2(
        GPT2Config(**default_config().model.to_dict() | import_config(theirs.config.to_dict()))
    )
    return model, import_params(weights_of(theirs), model.cfg)


def weights_of(theirs) -> dict[str, np.ndarray]:
    return {
        name: parameter.detach().numpy().copy() for name, parameter in theirs.named_parameters()
    }


def greedy_by_transformers(theirs, prompt_T, n: int) -> np.ndarray:
    ids_BT = torch.from_numpy(np.int64(prompt_T))[None]
    return theirs.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=n,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )[0, len(prompt_T) :].numpy()


@pytest.mark.parametrize(
    'shape', SHAPES, ids=lambda shape: '-'.join(str(value) for value in shape.values())
)
def test_logits_gradients_and_greedy_text(shape, tmp_path):
    config = {name: value for name, value in shape.items() if name not in 'BT'}
    theirs = rough_gpt2(**config)
    tokens_BT = np.random.default_rng(1).integers(
        0, config['vocab_size'], (shape['B'], shape['T']), np.int32
    )
    logits_BTV, loss, gradients = logits_and_gradients(theirs, tokens_BT)
    theirs.save_pretrained(tmp_path)  # a file that transformers wrote
    settings, tensors = read_folder(tmp_path)
    model = GPT2(GPT2Config(**default_config().model.to_dict() | import_config(settings)))
    params = import_params(tensors, model.cfg)

    def mean_loss(params):
        logits_BTV = model.apply({'params': params}, tokens_BT)
        return token_losses(logits_BTV[:, :-1], tokens_BT[:, 1:]).mean(), logits_BTV

    (our_loss, our_logits_BTV), our_gradients = jax.jit(
        jax.value_and_grad(mean_loss, has_aux=True)
    )(params)
    logit_error = np.abs(our_logits_BTV - logits_BTV).max()
    ours = export_params(our_gradients, model.cfg)
    assert set(ours) == {f'transformer.{name}' for name in gradients}
    errors = {
        name: np.abs(ours[f'transformer.{name}'] - gradient).max() / np.abs(gradient).max()
        for name, gradient in gradients.items()
    }
    print(
        f'logits up to {np.abs(logits_BTV).max():.2f} differ by at most {logit_error:.1e}, '
        f'gradients by {max(errors.values()):.1e} of the largest in their leaf'
    )
    assert logits_BTV.std() > 0.3
    assert logit_error <= 2e-5
    assert abs(our_loss - loss) <= 2e-6 * loss
    assert max(errors.values()) <= 1e-5, errors

    prompt_T = tokens_BT[0, :5]
    text = np.concatenate(
        [
            chunk[0]
            for chunk in generate(
                model,
                params,
                prompt_T,
                max_new_tokens=64,
                sampling=Sampling(0),
                strict_context=True,
            )
        ]
    )
    assert np.array_equal(text, greedy_by_transformers(theirs, prompt_T, 64))
    assert len(set(text.tolist())) > 3  # not one token over and over


@pytest.mark.parametrize('changes', [{}, dict(bias=False, activation_function='gelu', n_inner=40)])
def test_an_exported_model_loads_in_transformers(changes, tmp_path):
    model = tiny(n_positions=80, **changes)
    params = rough_params(model, std=0.1)
    write_folder(tmp_path, export_config(model.cfg, None), export_params(params, model.cfg))
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens_BT = tokens(model)
    with torch.no_grad():
        logits_BTV = theirs(torch.from_numpy(np.int64(tokens_BT))).logits.numpy()
    assert logits_BTV.std() > 0.3
    assert np.abs(jax.jit(model.apply)({'params': params}, tokens_BT) - logits_BTV).max() <= 2e-5
    text = np.concatenate(
        [
            chunk[0]
            for chunk in generate(
                model, params, tokens_BT[0, :5], max_new_tokens=64, sampling=Sampling(0)
            )
        ]
    )
    assert np.array_equal(text, greedy_by_transformers(theirs, tokens_BT[0, :5], 64))


def test_the_fixture_is_the_output_of_its_generator(tmp_path):
    make_fixture.make(tmp_path)
    assert (tmp_path / 'config.json').read_text() == (
        make_fixture.FOLDER / 'config.json'
    ).read_text()
    # Another processor may round the golden values differently.
    for name, atol in (('model.safetensors', 0), ('golden.safetensors', 1e-6)):
        made, kept = load_file(tmp_path / name), load_file(make_fixture.FOLDER / name)
        assert made.keys() == kept.keys()
        for key, leaf in made.items():
            np.testing.assert_allclose(leaf, kept[key], rtol=0, atol=atol, err_msg=key)


def test_the_fixture_loads_in_transformers():
    """transformers accepts its layout, without prefixes and with masks, as GPT-2's."""
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        make_fixture.FOLDER, output_loading_info=True
    )
    assert not report['missing_keys'], report
    assert not report['mismatched_keys'], report
    golden = load_file(make_fixture.FOLDER / 'golden.safetensors')
    with torch.no_grad():
        logits_BTV = theirs(torch.from_numpy(np.int64(golden['tokens']))).logits.numpy()
    np.testing.assert_allclose(logits_BTV, golden['logits'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_equal_transformers(name):
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    theirs = transformers.activations.get_activation(name)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(activate(ACTIVATIONS[name], x), theirs, rtol=0, atol=1e-6)


def test_the_tokenizer_is_exported_to_transformers_and_read_back(tmp_path, monkeypatch):
    merges = 't h\nth e\nĠ the\ni n\nĠ a\n'
    tokenizer = Gpt2Tokenizer(merges)
    for name, text in tokenizer.hub_files().items():
        (tmp_path / name).write_text(text, 'utf-8')
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    text = 'the cat in the hat\n\n  and a thing — 你好, 12 thes'
    assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text).tolist()) == text

    model = tiny(vocab_size=tokenizer.vocab_size)
    write_folder(
        tmp_path, export_config(model.cfg, None), export_params(rough_params(model), model.cfg)
    )
    (tmp_path / 'merges.txt').unlink()
    theirs.save_pretrained(tmp_path)  # as tokenizer.json
    assert not (tmp_path / 'merges.txt').exists()
    with pytest.raises(UserError, match="does not hold GPT-2's merges: it is another tokenizer"):
        convert.from_hf(str(tmp_path), tmp_path / 'run')
    monkeypatch.setattr(
        convert.vocabulary, 'MERGES_SHA256', hashlib.sha256(merges.encode()).hexdigest()
    )
    convert.from_hf(str(tmp_path), tmp_path / 'run', notify=lambda text: None)
    assert restore.load(tmp_path / 'run', 'best').tokenizer == tokenizer


@pytest.mark.parametrize('kind', ['char', 'byte'])
def test_exported_characters_and_bytes_load_in_transformers(kind, tmp_path):
    """By AutoTokenizer, and never as another tokenizer."""
    text = "the cat, 'n\n\n  the hät — 你好🙂\r\t<|endoftext|>"
    tokenizer = tokenizers.make_tokenizer(kind, text)
    export(tmp_path, tokenizer, n_positions=32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text).tolist()) == text
    assert len(theirs) == tokenizer.vocab_size
    if kind == 'char':
        with pytest.raises(Exception, match='Missing'):
            theirs('Z')
    convert.from_hf(str(tmp_path / 'out'), tmp_path / 'again', notify=lambda text: None)
    assert restore.load(tmp_path / 'again', 'best').tokenizer == tokenizer


def export(folder, tokenizer, **sizes):
    """A rough model with this tokenizer as the run folder/run and the published folder/out."""
    sizes = {'n_layer': 2, 'n_head': 2, 'n_embd': 16} | sizes
    rough_gpt2(**sizes, vocab_size=tokenizer.vocab_size).save_pretrained(folder / 'in')
    (folder / 'tokenizer.json').write_text(tokenizers.to_json(tokenizer))
    quiet = {'notify': lambda text: None}
    convert.from_hf(str(folder / 'in'), folder / 'run', folder / 'tokenizer.json', **quiet)
    convert.to_hf(folder / 'run', 'best', folder / 'out', **quiet)


TASK = """
task: documents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{{{text}}}}'
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def test_lm_evaluation_harness_gives_the_same_figures(tmp_path, monkeypatch):
    """Documents of no token, of less than a window, one window, and several windows."""
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    pytest.importorskip('lm_eval.models.huggingface')  # pip install 'lm_eval[hf]'
    import lm_eval

    tokenizer = Gpt2Tokenizer('t h\nth e\nĠ the\ni n\nĠ a\n')
    export(tmp_path, tokenizer, n_positions=12)
    texts = [
        'the',
        ' the cat in\nthe  hat ',
        'abcdefghijkl',
        'in the hat, ' * 9,
        'a<|endoftext|>b é',
    ]
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (tmp_path / 'documents.yaml').write_text(TASK.format(path=path))
    theirs = lm_eval.simple_evaluate(
        model='hf',
        model_args={'pretrained': str(tmp_path / 'out'), 'dtype': 'float32'},
        tasks=['documents'],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device='cpu',
        bootstrap_iters=0,
    )['results']['documents']
    ours = harness.score_documents(restore.load(tmp_path / 'run', 'best'), str(path)).figures()
    for name in ('bits_per_byte', 'word_perplexity'):
        assert ours[name] == pytest.approx(theirs[f'{name},none'], rel=1e-6)


@pytest.mark.parametrize('kind', ['nanoGPT', 'transformers'])
def test_the_command_that_converts_a_pickle(kind, tmp_path):
    """As nanoGPT's train.py saves it, with a tied head, and as pytorch_model.bin."""
    theirs = rough_gpt2(**make_fixture.SIZES, activation_function='gelu')
    state = theirs.state_dict()
    sizes = {name: value for name, value in make_fixture.SIZES.items() if name != 'n_positions'}
    if kind == 'nanoGPT':
        model = {
            f'_orig_mod.{name}': tensor.T if re.search(r'c_\w+\.weight', name) else tensor
            for name, tensor in state.items()
        }
        torch.save(
            {
                'model': model,
                'optimizer': {'step': torch.tensor(3.0)},
                'best_val_loss': torch.tensor(1.5),
                'model_args': sizes | {'block_size': 32, 'bias': True, 'dropout': 0.0},
                'iter_num': 3,
                'config': {'compile': True},
            },
            tmp_path / 'ckpt.pt',
        )
    else:
        torch.save(state, tmp_path / 'pytorch_model.bin')
        (tmp_path / 'config.json').write_text(json.dumps(theirs.config.to_dict()))
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    command = re.search('with python -c "(.*)", and give the folder', str(caught.value))[1]
    subprocess.run([sys.executable, '-c', command], cwd=tmp_path, check=True, timeout=120)
    settings, tensors = read_folder(tmp_path)
    model, params = ours_of(theirs)
    dropout = 0.0 if kind == 'nanoGPT' else 0.1
    expected = dict(
        n_embd=24, n_positions=32, activation_function='gelu', vocab_size=64, resid_pdrop=dropout
    )
    assert expected.items() <= import_config(settings).items()
    again = import_params(tensors, model.cfg)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_import_and_export_keep_the_logits_of_transformers(tmp_path):
    theirs = rough_gpt2(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=256)
    theirs.save_pretrained(tmp_path / 'in')
    (tmp_path / 'bytes.json').write_text(tokenizers.to_json(ByteTokenizer()))
    convert.from_hf(
        str(tmp_path / 'in'), tmp_path / 'run', tmp_path / 'bytes.json', notify=lambda text: None
    )
    convert.to_hf(tmp_path / 'run', 'best', tmp_path / 'out', notify=lambda text: None)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out')
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, again(ids).logits)


LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
STEP_SIZES = dict(
    n_layer=3,
    n_head=4,
    n_embd=64,
    n_positions=64,
    vocab_size=300,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)


class Pair:
    """One model under torch's AdamW and under ours, with the settings of GPT-2's training."""

    def __init__(self, learning_rate=LEARNING_RATE, implementation='optax', eps=EPS):
        self.theirs = rough_gpt2(**STEP_SIZES)
        self.model, params = ours_of(self.theirs)
        plain = [
            name.endswith('bias') or '.ln_' in name for name, _ in self.theirs.named_parameters()
        ]
        groups = [
            {
                'params': [
                    parameter
                    for parameter, is_plain in zip(self.theirs.parameters(), plain, strict=True)
                    if is_plain == which
                ],
                'weight_decay': 0.0 if which else DECAY,
            }
            for which in (False, True)
        ]
        self.adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=eps)
        self.schedule = lambda step: learning_rate
        self.optimizer = make_optimizer(
            AdamW(self.schedule, *BETAS, eps, DECAY, CLIP), implementation
        )
        self.state = init_state(params, self.optimizer)
        self.update = jax.jit(self.optimizer.update)

    def step_by_gradients(self, gradients: dict[str, np.ndarray]) -> None:
        """Updates both by the same gradients."""
        for name, parameter in self.theirs.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        torch.nn.utils.clip_grad_norm_(self.theirs.parameters(), CLIP)
        self.adamw.step()
        updates, opt_state = self.update(
            import_params(gradients, self.model.cfg), self.state.opt_state, self.state.params
        )
        self.state = self.state.replace(
            params=jax.tree.map(np.add, self.state.params, updates), opt_state=opt_state
        )

    def differences(self) -> dict[str, np.ndarray]:
        """The distance of the parameters, element by element."""
        ours = export_params(self.state.params, self.model.cfg)
        return {name: np.abs(ours[name] - leaf) for name, leaf in weights_of(self.theirs).items()}


@pytest.mark.parametrize('implementation', ['optax', 'explicit'])
@pytest.mark.parametrize('learning_rate', [LEARNING_RATE, 0.01])
def test_updates_by_the_same_gradients(learning_rate, implementation):
    """From the first update on, with and without clipping."""
    pair, rng = Pair(learning_rate, implementation), np.random.default_rng(3)
    before = weights_of(pair.theirs)
    largest = []
    for scale in (1e-2, 1e-4, 1.0, 1e-3, 1e-2):
        pair.step_by_gradients(
            {name: np.float32(rng.normal(0, scale, leaf.shape)) for name, leaf in before.items()}
        )
        largest.append(max(leaf.max() for leaf in pair.differences().values()))
    print(
        f'learning rate {learning_rate}: parameters differ by at most {largest[0]:.1e} after '
        f'1 update, {largest[-1]:.1e} after {len(largest)}'
    )
    moved = {
        name: np.abs(leaf - before[name]).mean() for name, leaf in weights_of(pair.theirs).items()
    }
    assert min(moved.values()) > 0.5 * learning_rate
    assert max(largest) <= 1e-6


@pytest.mark.parametrize(('earlier', 'eps'), [(0, EPS), (0, 1e-5), (5, EPS)])
def test_an_update_by_the_same_batch(earlier, eps):
    """The whole step, forward, backward, clipping and AdamW, to 0.01 of the learning rate.

    Adam's first update is lr g / (|g| + eps), nearly a sign. With eps = 1e-8, an element whose g is
    rounding noise moves in a direction of its own in each framework: for instance the bias of the
    keys, whose true gradient is 0, because softmax ignores it. In that case the test leaves out
    elements below 1e-5 of the largest g in their leaf. With a larger eps, or after `earlier`
    updates by the same gradients, it leaves out none.
    """
    pair, rng = Pair(eps=eps), np.random.default_rng(3)
    for _ in range(earlier):
        pair.step_by_gradients(
            {
                name: np.float32(rng.normal(0, 3e-3, leaf.shape))
                for name, leaf in weights_of(pair.theirs).items()
            }
        )
    before = weights_of(pair.theirs)
    params = import_params(before, pair.model.cfg)  # equal to the last bit
    text_BT = np.random.default_rng(1).integers(0, STEP_SIZES['vocab_size'], (8, 33), np.int32)

    inputs, targets = (
        torch.from_numpy(np.int64(part_BT)) for part_BT in (text_BT[:, :-1], text_BT[:, 1:])
    )
    pair.theirs.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        pair.theirs(inputs).logits.flatten(0, 1), targets.flatten()
    )
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(pair.theirs.parameters(), CLIP))
    gradients = {
        name: parameter.grad.numpy().copy() for name, parameter in pair.theirs.named_parameters()
    }
    pair.adamw.step()

    train_step = jax.jit(
        make_train_step(
            accumulate(make_value_and_grad(pair.model), 1), pair.optimizer, pair.schedule, seed=0
        )
    )
    pair.state, metrics = train_step(
        pair.state.replace(params=params), {'inputs': text_BT[:, :-1], 'targets': text_BT[:, 1:]}
    )
    assert norm > 1.3 * CLIP  # so clipping is tested
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics['loss'], loss.item(), rtol=1e-6)
    compared = {
        name: np.abs(g) >= (earlier == 0 and eps == EPS) * 1e-5 * np.abs(g).max()
        for name, g in gradients.items()
    }
    errors = {
        name: leaf[compared[name]].max() / LEARNING_RATE
        for name, leaf in pair.differences().items()
    }
    moved = {
        name: np.abs(leaf - before[name])[compared[name]].mean()
        for name, leaf in weights_of(pair.theirs).items()
    }
    left_out = {name: np.sum(~compared[name] & (gradients[name] != 0)) for name in compared}
    worst = max(errors, key=errors.get)
    print(
        f'{earlier} updates, eps {eps}, one update more: apart by at most {errors[worst]:.1e} of '
        f'the learning rate, in {worst}; left out {sum(left_out.values())} of '
        f'{sum(leaf.size for leaf in before.values()):,}'
    )
    assert errors[worst] <= 0.01
    assert min(moved.values()) > 0.1 * LEARNING_RATE
    assert all(n <= (64 if name.endswith('c_attn.bias') else 25) for name, n in left_out.items()), (
        left_out
    )
