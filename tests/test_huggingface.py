"""Published weights in and out: a golden fixture, every layout, and every refusal."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import flat, rough_params, shapes, tiny

from gpt2_jax import config, convert
from gpt2_jax.architecture import PRESETS, GPT2Config
from gpt2_jax.config import default_config
from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import ByteTokenizer, CharTokenizer, Gpt2Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.huggingface import (
    export_config,
    export_params,
    import_config,
    import_params,
    read_folder,
    write_folder,
)
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.params import count_params
from gpt2_jax.workdir import checkpoints as checkpoints_lib
from gpt2_jax.workdir import restore

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / 'tests/fixtures/tiny_gpt2'
LETTERS = CharTokenizer(''.join(map(chr, range(48, 112))))  # 64, like the fixture's vocabulary


def model_of(published: dict) -> GPT2:
    return GPT2(GPT2Config(**default_config().model.to_dict() | import_config(published)))


def equal(tree, other) -> bool:
    a, b = flat(tree), flat(other)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


@pytest.fixture
def published():
    """The fixture's config.json and tensors."""
    return read_folder(FIXTURE)


def test_the_fixture_gives_the_golden_logits_and_gradients(published):
    settings, tensors = published
    golden = load_file(FIXTURE / 'golden.safetensors')
    model = model_of(settings)

    def loss(params):
        logits_BTV = model.apply({'params': params}, golden['tokens'])
        return token_losses(logits_BTV[:, :-1], golden['tokens'][:, 1:]).mean(), logits_BTV

    (value, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        import_params(tensors, model.cfg)
    )
    assert np.std(golden['logits']) > 0.3
    assert np.abs(logits_BTV - golden['logits']).max() <= 2e-5
    assert abs(value - golden['loss']) <= 2e-6
    ours = export_params(gradients, model.cfg)
    theirs = {
        name.removeprefix('gradient.'): leaf
        for name, leaf in golden.items()
        if name.startswith('gradient.')
    }
    assert {f'transformer.{name}' for name in theirs} == set(ours)
    assert len(theirs) == 2 * 12 + 4
    for name, gradient in theirs.items():
        largest = np.abs(gradient).max()
        assert largest > 1e-4, name
        assert np.abs(ours[f'transformer.{name}'] - gradient).max() <= 1e-5 * largest, name


def test_the_fixture_is_small():
    assert sum(path.stat().st_size for path in FIXTURE.iterdir()) < 200_000


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(bias=False, activation_function='gelu'),
        dict(n_inner=16, n_layer=1),
        dict(
            n_head=1,
            layer_norm_epsilon=1e-6,
            initializer_range=0.01,
            embd_pdrop=0.2,
            attn_pdrop=0.3,
            resid_pdrop=0.4,
        ),
    ],
)
def test_import_of_export_is_bit_equal(changes, tmp_path):
    model = tiny(**changes)
    params = rough_params(model)
    write_folder(tmp_path, export_config(model.cfg, None), export_params(params, model.cfg))
    settings, tensors = read_folder(tmp_path)
    again = model_of(settings)
    assert again.cfg == model.cfg or (again.cfg.n_inner, model.cfg.n_inner) == (None, 64)
    assert equal(import_params(tensors, again.cfg), params)
    assert (tmp_path / 'model.safetensors').stat().st_mode == (
        tmp_path / 'config.json'
    ).stat().st_mode


def test_exported_tensors_have_the_published_names_and_shapes():
    model = tiny(n_layer=1, bias=False)
    tensors = export_params(rough_params(model), model.cfg)
    D, F, V = 16, 64, 11
    block = {
        'ln_1.weight': (D,),
        'ln_1.bias': (D,),
        'ln_2.weight': (D,),
        'ln_2.bias': (D,),
        'attn.c_attn.weight': (D, 3 * D),
        'attn.c_attn.bias': (3 * D,),
        'attn.c_proj.weight': (D, D),
        'attn.c_proj.bias': (D,),
        'mlp.c_fc.weight': (D, F),
        'mlp.c_fc.bias': (F,),
        'mlp.c_proj.weight': (F, D),
        'mlp.c_proj.bias': (D,),
    }
    expected = {
        'wte.weight': (V, D),
        'wpe.weight': (12, D),
        'ln_f.weight': (D,),
        'ln_f.bias': (D,),
    } | {f'h.0.{name}': shape for name, shape in block.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f'transformer.{name}': shape for name, shape in expected.items()
    }
    assert all(tensor.any() != name.endswith('bias') for name, tensor in tensors.items())


def test_transposed_arrays_are_written_as_they_read(tmp_path):
    """safetensors writes memory in its order, whatever the array's strides are."""
    array = np.float32(np.arange(6)).reshape(3, 2).T
    write_folder(tmp_path, {}, {'x': array})
    assert np.array_equal(load_file(tmp_path / 'model.safetensors')['x'], array)


VARIANTS = {
    'prefix': lambda tensors: {f'transformer.{name}': tensor for name, tensor in tensors.items()},
    'no buffers': lambda tensors: {
        name: tensor for name, tensor in tensors.items() if '.attn.bias' not in name
    },
    'masked_bias': lambda tensors: (
        tensors | {f'h.{i}.attn.masked_bias': np.float32(-1e4) for i in range(2)}
    ),
    'head': lambda tensors: tensors | {'lm_head.weight': tensors['wte.weight'].copy()},
    'compiled': lambda tensors: (
        {f'_orig_mod.transformer.{name}': tensor for name, tensor in tensors.items()}
        | {'_orig_mod.lm_head.weight': tensors['wte.weight']}
    ),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_names_and_extras(published, variant):
    settings, tensors = published
    cfg = model_of(settings).cfg
    assert len(tensors) == 28 + 2  # two masks
    assert equal(import_params(VARIANTS[variant](tensors), cfg), import_params(tensors, cfg))


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_half_precision_is_widened(published, dtype, tmp_path):
    settings, tensors = published
    cfg = model_of(settings).cfg
    halves = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save_file(halves, tmp_path / 'model.safetensors')
    shutil.copy(FIXTURE / 'config.json', tmp_path)
    wide = {name: tensor.astype(np.float32) for name, tensor in halves.items()}
    assert not np.array_equal(wide['wte.weight'], tensors['wte.weight'])
    assert equal(import_params(read_folder(tmp_path)[1], cfg), import_params(wide, cfg))


def shard(folder: Path, tensors) -> dict:
    names = sorted(tensors)
    files = {
        'model-00001-of-00002.safetensors': names[::2],
        'model-00002-of-00002.safetensors': names[1::2],
    }
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {
        'metadata': {},
        'weight_map': {name: file for file, part in files.items() for name in part},
    }
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    shutil.copy(FIXTURE / 'config.json', folder)
    return index


def test_shards(published, tmp_path):
    settings, tensors = published
    shutil.copy(FIXTURE / 'model.safetensors', tmp_path)  # it exists, but outside the folder
    tmp_path = tmp_path / 'sharded'
    tmp_path.mkdir()
    index = shard(tmp_path, tensors)
    again, read = read_folder(tmp_path)
    assert again == settings
    assert equal(read, tensors)
    for change, words in [
        (
            {'wte.weight': '../model.safetensors'},
            r"is '\.\./model\.safetensors', expected the plain name of a file",
        ),
        ({'wte.weight': 'gone.safetensors'}, "names the file 'gone.safetensors', which is not in"),
        ({'more.weight': 'model-00001-of-00002.safetensors'}, "for instance 'more.weight'"),
    ]:
        broken = {'weight_map': index['weight_map'] | change}
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(broken))
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match='weight_map is 3, expected an object'):
        read_folder(tmp_path)


def as_nanogpt(params, cfg) -> dict[str, np.ndarray]:
    """A state dict of nanoGPT: kernels (out, in), the head beside the embedding, and a mask."""
    tensors = {
        name: np.ascontiguousarray(tensor.T)
        if '.c_' in name and name.endswith('weight')
        else tensor
        for name, tensor in export_params(params, cfg).items()
        if cfg.bias or not name.endswith('bias')
    }
    tensors['lm_head.weight'] = tensors['transformer.wte.weight'].copy()
    tensors['transformer.h.0.attn.bias'] = np.tril(np.ones((1, 1, 12, 12), np.float32))
    return {f'_orig_mod.{name}': tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    'changes', [dict(bias=False), dict(bias=True), dict(bias=False, n_inner=16)]
)
def test_nanogpt(changes, tmp_path):
    """With n_inner = n_embd three of four kernels are square, and only c_attn tells the layout."""
    model = tiny(
        activation_function='gelu',
        embd_pdrop=0.2,
        attn_pdrop=0.2,
        resid_pdrop=0.2,
        layer_norm_epsilon=1e-5,
        **changes,
    )
    params = rough_params(model)
    save_file(as_nanogpt(params, model.cfg), tmp_path / 'model.safetensors')
    args = dict(
        n_layer=2,
        n_head=2,
        n_embd=16,
        block_size=12,
        vocab_size=11,
        dropout=0.2,
        bias=changes['bias'],
    )
    (tmp_path / 'config.json').write_text(json.dumps(args | {'n_inner': changes.get('n_inner')}))
    settings, tensors = read_folder(tmp_path)
    assert model_of(settings).cfg == model.cfg
    assert equal(import_params(tensors, model.cfg), params)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'model_type': 'gptj'}, "model_type = 'gptj' .* expected 'gpt2'"),
        ({'model_type': None}, "model_type = None .* expected 'gpt2'"),
        ({'scale_attn_weights': False}, 'scale_attn_weights = False .* expected True'),
        (
            {'scale_attn_by_inverse_layer_idx': True},
            'scale_attn_by_inverse_layer_idx = True .* expected False',
        ),
        ({'add_cross_attention': True}, 'add_cross_attention = True .* expected False'),
        ({'tie_word_embeddings': False}, 'tie_word_embeddings = False .* expected True'),
        ({'pruned_heads': {'0': [1]}}, r'pruned_heads = an object of 1 .* expected {}'),
        ({'quantization_config': {'bits': 4}}, 'quantization_config = .* expected None'),
        (
            {'activation_function': 'relu'},
            "activation_function = 'relu' .* expected one of gelu_new, ",
        ),
        ({'vocab_size': None}, 'vocab_size = None .* expected int'),
        ({'n_layer': '2'}, "n_layer = '2' .* expected int, at least 1"),
        ({'n_layer': True}, 'n_layer = True .* expected int, at least 1'),
        ({'n_embd': 25}, 'n_embd = 25 .* expected a multiple of n_head = 3'),
        ({'attn_pdrop': 1}, 'attn_pdrop = 1.0 .* expected float, at least 0 and below 1'),
        ({'activation_function': ['gelu_new']}, r'activation_function = a list of 1 .* one of'),
        ({'activation_function': 'a\x1b[2J'}, r"activation_function = 'a\\x1b\[2J' .* one of"),
        ({'layer_norm_epsilon': 10**400}, r'layer_norm_epsilon = 10+\.\. .* expected float'),
        ({'layer_norm_epsilon': float('inf')}, 'layer_norm_epsilon = inf .* expected float'),
        ({'model_type': 'x' * 10**6}, r"model_type = 'x+'?\.\. .* expected 'gpt2'"),
        ({'n_head': 0}, 'n_head = 0 .* expected int, at least 1'),
        ({'bias': 'no'}, "bias = 'no' .* expected bool"),
    ],
)
def test_another_architecture_is_refused_by_its_field(published, change, words):
    settings, _ = published
    with pytest.raises(UserError, match=f'^config.json: {words}'):
        import_config(settings | change)


def test_a_vocabulary_may_have_one_token(published):
    assert model_of(published[0] | {'vocab_size': 1}).cfg.vocab_size == 1


def test_fields_without_effect_are_ignored(published):
    settings, _ = published
    assert (
        model_of(settings).cfg
        == model_of(
            settings
            | dict(
                reorder_and_upcast_attn=True,
                use_cache=False,
                torch_dtype='float16',
                activation_function='gelu_pytorch_tanh',
                embd_pdrop=0.1,
                n_inner=None,
                tie_word_embeddings=True,
            )
        ).cfg
    )
    assert import_config(settings | {'resid_pdrop': 0})['resid_pdrop'] == 0.0


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda t: t.pop('h.1.ln_1.weight'), 'fit config.json: missing: h.1.ln_1.weight$'),
        (
            lambda t: [t.pop(f'h.1.ln_{i}.{kind}') for i in (1, 2) for kind in ('weight', 'bias')],
            'missing: h.1.ln_1.bias, h.1.ln_1.weight, h.1.ln_2.bias and 1 more$',
        ),
        (
            lambda t: t.update({'h.2.ln_1.weight': t['h.1.ln_1.weight']}),
            'not of this model: h.2.ln_1.weight$',
        ),
        (
            lambda t: t.update({'wpe.weight': t['wpe.weight'][:-1]}),
            r'of another shape: wpe.weight is \(31, 24\), expected \(32, 24\)$',
        ),
        (
            # One layer is transposed.
            lambda t: t.update({'h.1.attn.c_attn.weight': t['h.1.attn.c_attn.weight'].T}),
            r'h.1.attn.c_attn.weight is \(72, 24\), expected \(24, 72\)$',
        ),
        (
            lambda t: t.clear(),
            'fit config.json: it has 2 layers, but there are 0 tensors$',
        ),
        (
            lambda t: t.update({'lm_head.weight': t['wte.weight'] + 1e-6}),
            'the output head is untied',
        ),
        (lambda t: t.update({'lm_head.weight': t['wte.weight'][:-1]}), 'the output head is untied'),
        (
            lambda t: t.update({'ln_f.bias': t['ln_f.bias'].astype(np.int8)}),
            'ln_f.bias is of int8: expected float32',
        ),
        (lambda t: t.update({'transformer.ln_f.bias': t['ln_f.bias']}), 'the same tensor twice'),
        (
            lambda t: t.update({'ln_f.bias': t['ln_f.bias'] + np.float32('inf')}),
            'ln_f.bias holds values that are not finite',
        ),
        (
            lambda t: t.update({'\x1b]0;x\x07' + 'y' * 500: t['ln_f.bias']}),
            r'not of this model: \\x1b\]0;x\\x07y+\.\.$',
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(published, change, words):
    settings, tensors = published
    change(tensors)
    with pytest.raises(UserError, match=words) as caught:
        import_params(tensors, model_of(settings).cfg)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300


def test_a_billion_layers_are_refused_at_once(published):
    settings, tensors = published
    with pytest.raises(UserError, match='n_layer = 1000000000 is not the GPT-2 of this package'):
        import_params(tensors, model_of(settings | {'n_layer': 10**9}).cfg)


@pytest.mark.parametrize(
    ('file', 'content'),
    [
        ('config.json', '[' * 5000),
        ('config.json', '{"vocab_size": NaN}'),
        ('config.json', '{"a": "\\ud800"}'),
        ('config.json', '{"layer_norm_epsilon": ' + '9' * 5000 + '}'),
        ('config.json', None),
        ('model.safetensors.index.json', '[' * 5000),
        ('model.safetensors.index.json', '{}'),
        ('model.safetensors.index.json', '{"weight_map": {"wte.weight": "a\\u0000b"}}'),
        ('model.safetensors.index.json', '{"weight_map": {"wte.weight": ["a"]}}'),
        ('model.safetensors', None),
    ],
)
def test_files_that_cannot_be_parsed(file, content, tmp_path):
    """Whatever a file holds, or if it is a pipe (None), the result is one short line."""
    for name in ('config.json', 'model.safetensors'):
        if file != f'{name}.index.json':
            shutil.copy(FIXTURE / name, tmp_path)
    if content is None:
        (tmp_path / file).unlink()
        os.mkfifo(tmp_path / file)
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    assert str(tmp_path / file)[-100:] in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 300


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    header = json.dumps({'x': {'dtype': 'F4', 'shape': [2], 'data_offsets': [0, 1]}}).encode()
    data = len(header).to_bytes(8, 'little') + header + b'\0'
    (tmp_path / 'model.safetensors').write_bytes(data)
    with pytest.raises(UserError, match='cannot be read as safetensors'):
        read_folder(tmp_path)


def test_a_model_without_biases_drops_zeros_only(published):
    settings, tensors = published
    cfg = model_of(settings | {'bias': False}).cfg
    with pytest.raises(
        UserError, match=r'not of this model: h.0.attn.c_attn.bias, .* and 10 more$'
    ):
        import_params(tensors, cfg)
    zeros = {name: tensor * (not name.endswith('.bias')) for name, tensor in tensors.items()}
    assert not [name for name in flat(import_params(zeros, cfg)) if name.endswith('bias')]


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match='there is no folder'):
        read_folder(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'has no weights: .* found nothing$'):
        read_folder(tmp_path)
    (tmp_path / 'tf_model.h5').touch()
    with pytest.raises(UserError, match=r'has no weights: .* found tf_model.h5$'):
        read_folder(tmp_path)
    for content, words in (
        (b'', 'cannot be read as safetensors'),
        (b'junk' * 99, 'cannot be read as safetensors'),
        ((FIXTURE / 'model.safetensors').read_bytes()[:-1], 'cut short'),
    ):
        (tmp_path / 'model.safetensors').write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path)
    shutil.copy(FIXTURE / 'model.safetensors', tmp_path)
    with pytest.raises(UserError, match=r'is a file: give the folder'):
        read_folder(tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=r'config.json is missing: .* model_args .*"block_size"'):
        read_folder(tmp_path)
    for content, words in (
        ('{', 'cannot be read as JSON'),
        ('[]', 'it is a list of 0, expected an object'),
    ):
        (tmp_path / 'config.json').write_text(content)
        with pytest.raises(UserError, match=words):
            read_folder(tmp_path)


@pytest.mark.parametrize('name', ['ckpt.pt', 'pytorch_model.bin'])
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path, name):
    (tmp_path / name).write_bytes(b'')
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match='is a pickle') as caught:
            read_folder(path)
        line = re.search('python -c "(.*)", and give', str(caught.value))[1]
        compile(line, 'line', 'exec')
        assert f"torch.load('{name}'" in line
        assert 'weights_only=True' in line


def test_a_name_of_a_pickle_cannot_add_to_the_command(tmp_path):
    (tmp_path / "x', f=print('$(id)').bin").touch()
    with pytest.raises(UserError, match=r"torch\.load\('FILE\.bin'"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('gpt2', 124_439_808),
        ('gpt2-medium', 354_823_168),
        ('gpt2-large', 774_030_080),
        ('gpt2-xl', 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(name, count):
    settings = default_config().model
    settings.update(PRESETS[name])
    assert count_params(shapes(GPT2(GPT2Config(**settings, vocab_size=50257)))) == count
    assert len(PRESETS) == 4


@pytest.mark.long
def test_a_published_folder_becomes_a_run_that_samples_and_is_exported_again(tmp_path):
    """By the scripts, once; their library calls are tested below."""
    (tmp_path / 'letters.json').write_text(tokenizers.to_json(LETTERS))

    def script(name, *flags):
        done = subprocess.run(
            [sys.executable, ROOT / f'scripts/{name}.py', *flags],
            cwd=tmp_path,
            timeout=120,
            capture_output=True,
            text=True,
        )
        # sample.py describes its device in a line with '['; a busy machine says what takes long.
        said = [line for line in done.stderr.splitlines() if not line.startswith(('[', 'loading'))]
        assert (done.returncode, said) == (0, []), done.stderr
        return done.stdout

    out = script('convert', f'--from_hf={FIXTURE}', '--ckpt_dir=run', '--tokenizer=letters.json')
    assert 'wrote run: 16,800 parameters' in out
    assert len(list(tmp_path.iterdir())) == 2
    text = script(
        'sample', '--ckpt_dir=run', '--prompt=ABC', '--max_new_tokens=20', '--temperature=0'
    ).rstrip('\n')
    script('convert', '--ckpt_dir=run', '--to_hf=out')
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        'config.json',
        'model.safetensors',
        'gpt2_jax_tokenizer.json',
        'tokenizer.json',
        'tokenizer_config.json',
    }
    told = subprocess.run(
        [sys.executable, ROOT / 'scripts/sample.py', '--ckpt_dir=out'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stderr
    assert 'out holds no checkpoint' in told
    assert 'it holds published weights: scripts/convert.py --from_hf=out --ckpt_dir=DIR' in told

    (settings, tensors), (again, tensors_again) = (
        read_folder(FIXTURE),
        read_folder(tmp_path / 'out'),
    )
    model = model_of(settings)
    params = import_params(tensors, model.cfg)
    assert model_of(again).cfg == model.cfg
    assert equal(import_params(tensors_again, model.cfg), params)
    ids = LETTERS.encode('ABC').tolist()
    apply = jax.jit(model.apply)
    for at in range(3, 23):  # padded to one length: one compilation
        padded = np.pad(ids, (0, 23 - len(ids)))[None]
        ids.append(int(apply({'params': params}, padded)[0, at - 1].argmax()))
    assert text == LETTERS.decode(ids)


def convert_fixture(folder, **options):
    notes = []
    convert.from_hf(str(folder), **options, notify=notes.append)
    return ' '.join(notes)


def test_a_converted_run_is_a_run_like_any_other(tmp_path):
    source = shutil.copytree(FIXTURE, tmp_path / 'source')
    (source / convert.OUR_TOKENIZER).write_text(tokenizers.to_json(LETTERS))
    convert_fixture(source, ckpt_dir=tmp_path / 'run')
    restored = restore.load(tmp_path / 'run', 'best')
    assert (restored.step, restored.tokenizer, restored.meta['corpus']['fallback']) == (
        0,
        LETTERS,
        False,
    )
    assert config.from_json((tmp_path / 'run/config.json').read_text()) == restored.config
    assert tokenizers.from_json((tmp_path / 'run/tokenizer.json').read_text()) == LETTERS
    with pytest.raises(UserError, match='run exists and is not an empty folder'):
        convert_fixture(source, ckpt_dir=tmp_path / 'run')
    with pytest.raises(UserError, match='out exists and is not an empty folder'):
        (tmp_path / 'out').write_text('')
        convert.to_hf(tmp_path / 'run', 'best', tmp_path / 'out')
    with pytest.raises(UserError, match="no checkpoint '7'"):
        convert.to_hf(tmp_path / 'run', '7', tmp_path / 'out2')
    assert {path.name for path in tmp_path.iterdir()} == {
        'source',
        'run',
        'out',
    }  # nothing half-written


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints_lib.Checkpoints, 'save', full_disk)
    (tmp_path / 'bytes.json').write_text(tokenizers.to_json(LETTERS))
    with pytest.raises(UserError, match='run: No space'):
        convert_fixture(FIXTURE, ckpt_dir=tmp_path / 'run', tokenizer_file=tmp_path / 'bytes.json')
    assert [path.name for path in tmp_path.iterdir()] == ['bytes.json']


def test_the_tokenizer_must_fit(tmp_path, monkeypatch):
    options = dict(ckpt_dir=tmp_path / 'run', tokenizer_file=tmp_path / 'tokenizer.json')
    with pytest.raises(
        UserError, match=r'has no tokenizer: expected .*merges.txt.*--tokenizer=FILE'
    ):
        convert_fixture(FIXTURE, ckpt_dir=tmp_path / 'run')
    options['tokenizer_file'].write_text(tokenizers.to_json(ByteTokenizer()))
    with pytest.raises(UserError, match='for 64 tokens, but the byte tokenizer has 256'):
        convert_fixture(FIXTURE, **options)
    for content, words in (
        ('{}', 'damaged'),
        ('{', 'cannot be read as JSON'),
        ('3', 'it is 3, expected an object'),
        ('{"model": {}}', "'model' has no 'merges'"),
        ('{"model": {"merges": ["a b", ["c", "d"]]}}', "does not hold GPT-2's merges"),
    ):
        options['tokenizer_file'].write_text(content)
        with pytest.raises(UserError, match=words):
            convert_fixture(FIXTURE, **options)
    options['tokenizer_file'].write_text(tokenizers.to_json(CharTokenizer(LETTERS.alphabet[:60])))
    assert 'last 4 rows of wte belong to no token' in convert_fixture(FIXTURE, **options)
    kept = restore.load(tmp_path / 'run', 'best').params['wte']['embedding']
    assert np.array_equal(kept, read_folder(FIXTURE)[1]['wte.weight'][:60])
    for file, content in (
        ('added_tokens.json', {'<pad>': 60, '<x>': 61}),
        ('tokenizer.json', {'added_tokens': [{'id': 60, 'content': '<pad>', 'special': True}]}),
    ):
        folder = shutil.copytree(FIXTURE, tmp_path / f'with {file}')
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"adds tokens to its tokenizer: '<pad>' \(60\)"):
            convert_fixture(folder, **options | {'ckpt_dir': tmp_path / 'none'})
    monkeypatch.setattr(convert, 'MAX_PADDING', 3)
    with pytest.raises(UserError, match='for 64 tokens, but the char tokenizer has 60'):
        convert_fixture(FIXTURE, **options)


def test_gpt2s_tokenizer_is_exported_as_published_and_read_back(tmp_path, monkeypatch):
    merges = 't h\nth e\nĠ the\n'  # 260 tokens with <|endoftext|>
    monkeypatch.setattr(
        convert.vocabulary, 'MERGES_SHA256', hashlib.sha256(merges.encode()).hexdigest()
    )
    tokenizer = Gpt2Tokenizer(merges)
    model = tiny(vocab_size=tokenizer.vocab_size)
    source = tmp_path / 'source'
    source.mkdir()
    write_folder(
        source, export_config(model.cfg, None), export_params(rough_params(model), model.cfg)
    )
    (source / 'merges.txt').write_text(f'#version: 0.2\n{merges}')
    convert_fixture(source, ckpt_dir=tmp_path / 'run')
    assert restore.load(tmp_path / 'run', 'best').tokenizer == tokenizer
    convert.to_hf(tmp_path / 'run', 'latest', tmp_path / 'out', notify=lambda text: None)
    assert (tmp_path / 'out/merges.txt').read_bytes() == (source / 'merges.txt').read_bytes()
    vocab = json.loads((tmp_path / 'out/vocab.json').read_text('utf-8'))
    assert vocab['Ġthe'] == 258
    assert vocab['<|endoftext|>'] == 259
    assert sorted(vocab.values()) == list(range(260))
    about = json.loads((tmp_path / 'out/config.json').read_text())
    assert about['bos_token_id'] == about['eos_token_id'] == 259
    assert (
        json.loads((tmp_path / 'out/tokenizer_config.json').read_text())['tokenizer_class']
        == 'GPT2Tokenizer'
    )
    (tmp_path / 'out/merges.txt').unlink()
    pairs = [line.split(' ') for line in merges.splitlines()]
    # transformers writes its own file in two forms.
    for i, form in enumerate((pairs, merges.splitlines())):
        (tmp_path / 'out/tokenizer.json').write_text(
            json.dumps({'model': {'type': 'BPE', 'merges': form}})
        )
        convert_fixture(tmp_path / 'out', ckpt_dir=tmp_path / f'again{i}')
        assert restore.load(tmp_path / f'again{i}', 'best').tokenizer == tokenizer


class FakeHub:
    """The fixture as huggingface_hub shows it: SHA-256 for large files, SHA-1 for small ones."""

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, []
        self.siblings = [self._about(path) for path in sorted(folder.iterdir())]

    def _about(self, path):
        data = path.read_bytes()
        lfs = (
            types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            if path.suffix == '.safetensors'
            else None
        )
        blob_id = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        return types.SimpleNamespace(rfilename=path.name, lfs=lfs, blob_id=blob_id)

    def HfApi(self):
        return self

    def model_info(self, name, *, files_metadata, timeout):
        assert files_metadata
        assert timeout
        if name != 'gpt2':
            raise ConnectionError('no\nway')
        return types.SimpleNamespace(sha='c0ffee', siblings=self.siblings)

    def hf_hub_download(self, name, file, *, revision):
        self.asked.append((name, file, revision))
        return str(self.folder / file)


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    cache = shutil.copytree(FIXTURE, tmp_path / 'cache')
    (tmp_path / 'letters.json').write_text(tokenizers.to_json(LETTERS))
    hub = FakeHub(cache)
    options = dict(ckpt_dir=tmp_path / 'run', tokenizer_file=tmp_path / 'letters.json')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
    monkeypatch.chdir(tmp_path)
    assert '16,800' in convert_fixture('gpt2', **options)
    assert hub.asked == [
        ('gpt2', 'config.json', 'c0ffee'),
        ('gpt2', 'model.safetensors', 'c0ffee'),
    ]
    for name in ('config.json', 'model.safetensors'):
        data = (cache / name).read_bytes()
        (cache / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f'{name} is not the file that the hub publishes'):
            convert_fixture('gpt2', **options)
        (cache / name).write_bytes(data)
    files = 'config.json, model.safetensors, vocab.json, merges.txt'
    how = f'{files} from https://huggingface.co/gpt3/tree/main'
    with pytest.raises(
        UserError, match=rf'no folder gpt3, and it .* the hub \(ConnectionError: no way\)\. .*{how}'
    ):
        convert_fixture('gpt3', **options)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # not installed
    with pytest.raises(UserError, match=rf"install huggingface_hub: .*'\.\[hub\]'.*{how}"):
        convert_fixture('gpt3', **options)
    with pytest.raises(UserError, match=r'there is no folder gpt3: expected'):
        convert_fixture('./gpt3', **options)  # a path, not a name


def test_neither_torch_nor_transformers_is_needed():
    # None in sys.modules makes an import fail.
    program = (
        'import sys; '
        'sys.modules.update(dict.fromkeys(["torch", "transformers", "huggingface_hub"])); '
        'import gpt2_jax.convert'
    )
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ('flags', 'words'),
    [((), '--from_hf=DIR to read'), (('--from_hf=a', '--to_hf=b'), 'either --from_hf=DIR')],
)
def test_one_direction_at_a_time(flags, words):
    done = subprocess.run(
        [sys.executable, ROOT / 'scripts/convert.py', '--ckpt_dir=c', *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count('\n') == 1
