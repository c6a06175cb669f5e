"""The configuration: its settings, wrong values, JSON, flags, and the files in configs/."""

import ast
import dataclasses
import inspect
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.config import (
    FORMER_VALUES,
    RENAMED_KEYS,
    RENAMED_VALUES,
    SETTINGS,
    check_key,
    default_config,
    describe,
    differences,
    flatten,
    from_json,
    kind_of,
    resolve,
    to_json,
)
from gpt2_jax.data import load
from gpt2_jax.errors import UsageError
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.params import init_params
from gpt2_jax.parallel import mesh

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))


def changed(changes) -> ConfigDict:
    """The default configuration changed by {'train.steps': 3, ..}, of any type."""
    config = default_config()
    for key, value in changes.items():
        section, name = key.split('.')
        with config[section].ignore_type():
            config[section][name] = value
    return config


def test_defaults_are_locked_and_pass_their_own_tests():
    config = default_config()
    with pytest.raises(AttributeError, match='stepz'):
        config.train.stepz = 1
    with pytest.raises(AttributeError, match='trian'):
        config.trian = ConfigDict()
    assert list(flatten(config)) == list(SETTINGS)
    for key, (default, allowed, meaning) in SETTINGS.items():
        open_setting = isinstance(default, type)
        assert allowed.test(None if open_setting else default), key
        assert flatten(config)[key] == (None if open_setting else default)
        assert meaning
        assert '\n' not in meaning
        assert describe(key).startswith(f'{key} (')
    assert default_config() == config
    assert default_config() is not config


def test_resolve_fills_in_open_settings():
    config = changed({'model.n_embd': 24, 'model.n_positions': 10})
    resolved = resolve(config)
    assert (resolved.model.n_inner, resolved.train.seq_len) == (96, 10)
    assert (config.model.n_inner, config.train.seq_len) == (None, None)  # not changed in place
    given = resolve(changed({'model.n_inner': 7, 'train.seq_len': 5}))
    assert (given.model.n_inner, given.train.seq_len) == (7, 5)
    assert resolve(resolved) == resolved
    assert resolved.is_locked
    assert resolved.model.is_locked
    assert resolve(FrozenConfigDict(config)) == resolved


def test_a_configuration_with_other_settings_is_refused():
    mistyped, beside = default_config(), default_config()
    with mistyped.unlocked(), beside.unlocked():
        mistyped.train.stepz = beside.steps = 3
    for wrong, said in (
        (mistyped, 'has the unknown setting train.stepz: expected the result of default_config'),
        (beside, 'has the unknown setting steps: expected the result of default_config'),
        (ConfigDict({'train': 3}), 'lacks checkpoint.every: expected the result of default_config'),
    ):
        with pytest.raises(UsageError, match=f'the configuration {said}'):
            resolve(wrong)


def test_json_reads_back_equal():
    for config in (
        default_config(),
        changed(
            {
                'train.steps': 7,
                'optim.eps': 1e-12,
                'data.corpus': 'Texte/ä b.txt',
                'model.bias': False,
                'optim.clip_norm': 0.0,
            }
        ),
    ):
        config = resolve(config)
        again = from_json(to_json(config))
        assert again == config
        assert again.is_locked
        assert {key: type(value) for key, value in flatten(again).items()} == {
            key: type(value) for key, value in flatten(config).items()
        }
    saved = json.loads(to_json(config))
    assert saved['train']['seq_len'] == 1024
    assert sum(map(len, saved.values())) == len(SETTINGS)


@pytest.mark.parametrize(
    ('text', 'named'),
    [
        ('{"train": {"stepz": 3}}', "no setting 'train.stepz'; the nearest is train.steps"),
        ('{"train": {"steps": "many"}}', "train.steps = 'many'"),
        ('{"train": {"steps": 1.5}}', 'train.steps = 1.5'),
        ('{"train": {"steps": null}}', 'train.steps = None'),
        ('{"train": {"steps": 0}}', 'train.steps = 0'),
    ],
)
def test_wrong_json(text, named):
    with pytest.raises(UsageError) as caught:
        from_json(text)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ('key', 'value', 'rounded'),
    [
        ('optim.beta2', 1 - 1e-11, 1.0),  # the second moment would stay 0, and nothing be learnt
        ('optim.learning_rate', 1e-60, 0.0),
        ('optim.clip_norm', 1e-60, 0.0),  # every gradient would become 0
        ('optim.eps', 1e-40, 0.0),
        ('model.layer_norm_epsilon', 1e39, math.inf),
    ],
)
def test_numbers_are_allowed_as_the_device_has_them(key, value, rounded):
    with pytest.raises(UsageError) as caught:
        resolve(changed({key: value}))
    assert str(caught.value).startswith(f'{key} = {value}, in fp32 {rounded}, is not allowed; exp')
    assert resolve(changed({'data.val_fraction': 1 - 1e-11})).data.val_fraction < 1


def test_settings_of_an_older_version_are_read_and_named(capsys):
    old = json.loads(
        to_json(resolve(changed({'train.grad_accum_steps': 2, 'train.init_step': '5'})))
    )
    old['train']['accumulate'] = old['train'].pop('grad_accum_steps')
    old['train']['init_which'] = old['train'].pop('init_step')
    old['model'] |= {'kernels': 'open', 'attention': 'explicit', 'remat': True}
    del old['model']['residual_dtype']  # a setting that it did not have
    config = from_json(json.dumps(old))
    assert config.train.grad_accum_steps == 2
    assert config.train.init_step == '5'
    assert (config.model.kernels, config.model.attention) == ('xla', 'xla')
    assert config.model.remat == 'block'
    assert config.model.residual_dtype == 'compute'
    assert capsys.readouterr().err == (
        "[settings of an older version: model.attention = 'explicit' is now 'xla'; model.kernels = "
        "'open' is now 'xla'; model.remat = True is now 'block'; train.accumulate is now "
        'train.grad_accum_steps; train.init_which is now train.init_step]\n'
    )
    assert from_json(to_json(config)) == config
    assert capsys.readouterr().err == ''
    assert set(RENAMED_KEYS.values()) <= set(SETTINGS)
    for (key, old_value), new_value in RENAMED_VALUES.items():
        assert SETTINGS[key][1].test(new_value)
        assert not SETTINGS[key][1].test(old_value)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('train.steps', 0),
        ('train.steps', -1),
        ('train.steps', 1.5),
        ('train.steps', '10'),
        ('train.steps', True),
        ('train.steps', None),
        ('train.seq_len', 0),
        ('train.seq_len', 8.0),
        ('train.seed', -1),
        ('train.seed', 2**32),
        ('model.embd_pdrop', 1.0),
        ('model.embd_pdrop', -0.1),
        ('model.embd_pdrop', math.nan),
        ('optim.eps', 0.0),
        ('optim.learning_rate', '1e-3'),
        ('optim.clip_norm', -1.0),
        ('optim.clip_norm', math.nan),
        ('optim.clip_norm', math.inf),
        ('optim.eps', math.inf),
        ('optim.learning_rate', math.inf),
        ('model.layer_norm_epsilon', math.inf),
        ('model.n_layer', 10**9),
        ('model.bias', 1),
        ('model.bias', 'False'),
        ('model.dtype', 'float16'),
        ('model.attention', None),
        ('data.corpus', ''),
        ('data.fallback', None),
        ('mesh.tensor', 0),
        ('train.steps', 2**31),  # the state counts its updates in int32
        ('optim.warmup_steps', 10**12),
    ],
)
def test_wrong_values_are_named(key, value):
    with pytest.raises(UsageError) as caught:
        resolve(changed({key: value}))
    message = str(caught.value)
    _, allowed, _ = SETTINGS[key]
    assert message.startswith(f'{key} = {value!r} is not allowed; expected ')
    assert allowed.words in message
    assert kind_of(key).__name__ in message
    assert '\n' not in message


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'model.n_embd': 100}, ['model.n_embd = 100', 'multiple of model.n_head = 12']),
        ({'train.seq_len': 1025}, ['train.seq_len = 1025', 'at most model.n_positions = 1024']),
        (
            {'train.grad_accum_steps': 5},
            ['train.batch_size = 64', 'multiple of train.grad_accum_steps = 5'],
        ),
        (
            {'optim.end_learning_rate': 1e-3},
            ['optim.end_learning_rate = 0.001', 'at most optim.learning_rate = 0.0006'],
        ),
        (
            {'optim.weight_decay': 1e30},
            ['optim.weight_decay = 1e+30', 'at most 1 / optim.learning_rate = 1667'],
        ),
        (
            {'optim.weight_decay': 1e3, 'optim.algorithm': 'muon'},
            ['optim.weight_decay = 1000.0', 'at most 1 / optim.muon_learning_rate = 333.3'],
        ),
        (
            {'train.grad_accum_steps': 4, 'mesh.data': 3, 'mesh.fsdp': 2},
            ['train.batch_size / train.grad_accum_steps = 16', 'mesh.data x mesh.fsdp = 6'],
        ),
        ({'mesh.tensor': 5}, ['model.n_head = 12', 'multiple of mesh.tensor = 5']),
        (
            {'model.attention': 'cudnn', 'model.dtype': 'bfloat16'},
            ["model.attention = 'cudnn'", 'model.attn_pdrop = 0'],
        ),
        (
            {'model.attention': 'cudnn', 'model.attn_pdrop': 0.0},
            ["model.attention = 'cudnn'", "dtype = 'bfloat16'"],
        ),
    ],
)
def test_settings_that_do_not_fit_each_other(changes, named):
    with pytest.raises(UsageError) as caught:
        resolve(changed(changes))
    assert all(part in str(caught.value) for part in named)
    assert '\n' not in str(caught.value)
    limits = {
        'train.seq_len': 1024,
        'train.grad_accum_steps': 4,
        'mesh.tensor': 4,
        'mesh.data': 4,
        'mesh.fsdp': 4,
        'model.n_embd': 144,
        'optim.end_learning_rate': 6e-4,
        'optim.weight_decay': 333.0,
        'model.dtype': 'bfloat16',
        'model.attn_pdrop': 0.0,
    }
    resolve(
        changed(
            changes
            | {key: limits[key] for key in changes.keys() & limits.keys()}
            | (
                {'model.dtype': 'bfloat16', 'model.attn_pdrop': 0.0}
                if 'model.attention' in changes
                else {}
            )
        )
    )


@pytest.mark.parametrize(
    ('key', 'nearest'),
    [
        ('train.step', 'train.steps'),
        ('model.n_layers', 'model.n_layer'),
        ('modle.n_layer', 'model.n_layer'),
        ('learning_rate', 'optim.learning_rate'),
        ('train.beta2', 'optim.beta2'),
    ],
)
def test_the_nearest_setting_is_suggested_for_an_unknown_key(key, nearest):
    with pytest.raises(UsageError) as caught:
        check_key(key)
    assert f'no setting {key!r}; the nearest is {describe(nearest)}; ' in str(caught.value)


def test_descriptions_leave_room_for_the_value_in_a_line_of_300_characters():
    assert max(len(describe(key)) for key in SETTINGS) <= 220


def test_all_settings_are_listed_for_an_unknown_key():
    with pytest.raises(
        UsageError, match=r"'eval\.xyzzy'; .*; eval has every, sample_tokens, tokens$"
    ):
        check_key('eval.xyzzy')
    with pytest.raises(
        UsageError,
        match=r'the sections are checkpoint, data, eval, log, mesh, model, optim, train$',
    ):
        check_key('xyzzy.q')


@pytest.mark.parametrize(
    ('every', 'steps', 'tokens'),
    [(50, 200, 17066), (1000, 200, 68266), (10, 200, 8192), (700, 2800, 1 << 17)],
)
def test_evaluations_are_a_tenth_of_the_work_of_a_run(every, steps, tokens):
    """Unless there are many of them, or they are small. B T is 1,024."""
    config = default_config()
    config.train.update(batch_size=8, seq_len=128, steps=steps)
    config.eval.every = every
    assert resolve(config).eval.tokens == tokens
    config.eval.tokens = 0
    assert resolve(config).eval.tokens == 0


def test_a_setting_that_a_file_lacks_has_the_value_from_before_it_was_a_setting():
    assert default_config().train.order == 'keyed'
    saved = json.loads(to_json(resolve(default_config())))
    assert from_json(json.dumps(saved)).train.order == 'keyed'
    del saved['train']['order']
    assert from_json(json.dumps(saved)).train.order == 'table'
    for key, value in FORMER_VALUES.items():
        assert SETTINGS[key][1].test(value)


def test_differences_are_the_settings_that_forbid_resuming():
    old = resolve(default_config())
    assert differences(old, old) == {}
    others = {
        int: lambda value: value + 1,
        float: lambda value: value / 2 or 0.25,
        bool: lambda value: not value,
        str: lambda value: value + '!',
    }
    for key, value in flatten(old).items():
        other = others[type(value)](value)
        may_change = key.split('.')[0] in ('eval', 'checkpoint', 'log', 'mesh')
        may_change = may_change and key != 'eval.tokens'  # it decides which checkpoint is the best
        may_change |= key in ('train.probe', 'train.spike')
        new = changed(flatten(old) | {key: other})
        assert differences(old, new) == ({} if may_change else {key: (value, other)})


def test_micro_batches_may_change_without_dropout():
    """A run on fewer devices may need more of them; with dropout each has its own masks."""
    rates = dict.fromkeys(('model.embd_pdrop', 'model.attn_pdrop', 'model.resid_pdrop'), 0.0)
    old, new = (changed(rates | {'train.grad_accum_steps': n}) for n in (1, 4))
    assert differences(old, new) == {}
    for key in rates:
        old, new = (changed(rates | {key: 0.1, 'train.grad_accum_steps': n}) for n in (1, 4))
        assert differences(old, new) == {'train.grad_accum_steps': (1, 4)}


# The flags as scripts/train.py defines them; it prints the configuration instead of training.
PROGRAM = """
import sys
sys.path.insert(0, 'scripts')
import train
from absl import flags
from gpt2_jax import cli, config
cli.run(lambda arguments: print(config.to_json(config.resolve(flags.FLAGS.config))))
"""


def test_flags_of_the_script(tmp_path):
    (tmp_path / 'own.py').write_text(
        'from gpt2_jax.config import default_config\n'
        'def get_config(size="small"):\n'
        '    config = default_config()\n'
        '    config.model.n_layer = {"small": 2, "large": 24}[size]\n'
        '    config.train.steps = 77\n'
        '    return config\n'
    )
    own = tmp_path / 'own.py'
    calls = {
        (f'--config={own}',): {'model.n_layer': 2, 'train.steps': 77},
        (
            f'--config={own}:large',
            '--config.train.steps=10',
            '--noconfig.model.bias',
            '--config.optim.eps',
            '1e-6',
            '--config.train.seq_len=32',
            '--config.data.corpus=my text.txt',
            '--config.optim.clip_norm=1',
        ): {
            'model.n_layer': 24,
            'train.steps': 10,
            'model.bias': False,
            'optim.eps': 1e-6,
            'train.seq_len': 32,
            'data.corpus': 'my text.txt',
        },
        (
            f'--config={own}',
            '--config.train.stepz=10',
        ): "no setting 'train.stepz'; the nearest is train.steps (int",
        (f'--config={own}', '--config.train.steps=ten'): 'train.steps (int, at least 1 and ',
        (
            f'--config={own}',
            '--config.train.steps=0',
        ): 'train.steps = 0 is not allowed; expected int, at least 1',
    }
    running = {
        arguments: subprocess.Popen(
            [sys.executable, '-c', PROGRAM, *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for arguments in calls
    }
    for arguments, expected in calls.items():
        out, err = running[arguments].communicate(timeout=60)
        if isinstance(expected, dict):
            assert running[arguments].returncode == 0, err
            assert from_json(out) == resolve(changed(expected))
        else:
            assert running[arguments].returncode == 2
            assert out == ''
            assert err.startswith('error: ')
            assert expected in err
            assert err.count('\n') == 1


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_builds_its_model(path):
    module = runpy.run_path(str(path))
    assert module['__doc__'].strip()
    config = resolve(module['get_config']())
    model = GPT2(GPT2Config(**config.model, vocab_size=65))
    tokens = jax.ShapeDtypeStruct((2, config.train.seq_len), 'int32')
    params = jax.eval_shape(lambda: init_params(model.cfg, config.train.seed))
    logits = jax.eval_shape(model.apply, {'params': params}, tokens)
    assert logits.shape == (2, config.train.seq_len, 65)
    assert flatten(config) != flatten(resolve(default_config()))


def test_every_setting_is_read():
    """A field of GPT2Config, an argument of the function for its section, or read by its name."""
    read = {f'model.{field.name}' for field in dataclasses.fields(GPT2Config)}
    read |= {f'data.{name}' for name in inspect.signature(load.load_dataset).parameters}
    read |= {f'mesh.{name}' for name in inspect.signature(mesh.make_mesh).parameters}
    for path in (ROOT / 'gpt2_jax').rglob('*.py'):
        if path.name == 'config.py':
            continue
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            if isinstance(node, ast.Attribute):
                # config.train.steps and train.steps
                read.add('.'.join(ast.unparse(node).split('.')[-2:]))
    assert [key for key in SETTINGS if key not in read] == []


def test_a_section_is_a_signature():
    """Settings and arguments have the same names: else `**config.model` would fail."""
    fields = {field.name for field in dataclasses.fields(GPT2Config)} - {'vocab_size'}
    assert fields == set(default_config().model)
    assert set(inspect.signature(load.load_dataset).parameters) - {'notify'} == set(
        default_config().data
    )
    assert set(inspect.signature(mesh.make_mesh).parameters) == set(default_config().mesh)
    with pytest.raises(TypeError):
        GPT2Config(**default_config().model, vocab_size=2, n_ctx=3)


@pytest.mark.parametrize(
    'wrong',
    [
        {'n_layer': 1.5},
        {'vocab_size': 0},
        {'n_head': 0},
        {'n_inner': 0},
        {'n_embd': '64'},
        {'n_head': True},
    ],
)
def test_sizes_are_whole_numbers_from_1_on(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=rf'{name} = {value!r} is not allowed; expected a whole'):
        GPT2Config(**wrong)
    assert GPT2Config(**{name: np.int64(96)}) == GPT2Config(**{name: 96})


@pytest.mark.parametrize(('n_embd', 'n_head'), [(768, 5), (8, 16)])
def test_heads_share_the_width_equally(n_embd, n_head):
    """Five heads of 153 are 765 wide, which would be another model."""
    with pytest.raises(UsageError, match=rf'n_embd = {n_embd} must be a multiple of n_head'):
        GPT2Config(n_embd=n_embd, n_head=n_head)


@pytest.mark.parametrize('wrong', [{'activation_function': 'relu'}, {'dtype': 'float16'}])
def test_a_model_has_an_activation_and_a_precision_that_are_listed(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=rf'{name} = {value!r} is not allowed; expected one of '):
        GPT2Config(**wrong)
