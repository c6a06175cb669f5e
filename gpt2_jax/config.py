"""Every setting, once: its default, its allowed values, its meaning.

`default_config()` makes a configuration, an `ml_collections.ConfigDict`. A file in `configs/` and
flags change it, `resolve()` checks it, `to_json()` saves it with the run, and `from_json()` reads
it back.
"""

import difflib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from gpt2_jax import foreign
from gpt2_jax.architecture import ACTIVATIONS, PRECISIONS, GPT2Config
from gpt2_jax.errors import UsageError
from gpt2_jax.foreign import Check, one_of


def at_least(low) -> Check:
    """Numbers >= `low`."""
    return Check(f'at least {low}', lambda value: value >= low)


def below(low, high) -> Check:
    """Numbers >= `low` and < `high`."""
    return Check(f'at least {low} and below {high}', lambda value: low <= value < high)


def above(low) -> Check:
    """Numbers > `low`."""
    return Check(f'above {low}', lambda value: value > low)


def or_none(allowed: Check) -> Check:
    """`allowed`, or None for a setting that `resolve` fills in."""
    return Check(
        f'{allowed.words}, or left open', lambda value: value is None or allowed.test(value)
    )


NAME = Check('a text that is not empty', bool)
SWITCH = Check('True or False', lambda value: True)
TEXT = Check('any text', lambda value: True)

# An evaluation without eval.tokens. A forward pass takes a third of the work of an update, so the
# evaluations take about a tenth of a run.
MIN_EVAL_TOKENS, MAX_EVAL_TOKENS = 1 << 13, 1 << 17

GPT2 = GPT2Config()  # the defaults of the model section

# key -> (default, allowed values, meaning). The model's defaults are GPT-2's own (124M). The
# optimizer's are common for models of this size (Brown et al. 2020, appendix B). A type as default:
# left open.
SETTINGS = {
    # -- model: names and numbers of the published config.json
    'model.n_layer': (GPT2.n_layer, below(1, 10_000), 'number of blocks (L)'),
    'model.n_head': (GPT2.n_head, at_least(1), 'attention heads in a block (H)'),
    'model.n_embd': (GPT2.n_embd, at_least(1), 'width of the residual stream (D)'),
    'model.n_inner': (
        int,
        or_none(at_least(1)),
        'width of the feed-forward layer (F); left open: 4 n_embd',
    ),
    'model.n_positions': (GPT2.n_positions, at_least(1), 'learned positions: the longest context'),
    'model.activation_function': (
        GPT2.activation_function,
        one_of(*ACTIVATIONS),
        'gelu_new: tanh GELU, as in GPT-2; gelu: exact',
    ),
    'model.embd_pdrop': (GPT2.embd_pdrop, below(0, 1), 'dropout on the embeddings'),
    'model.attn_pdrop': (GPT2.attn_pdrop, below(0, 1), 'dropout on the attention pattern'),
    'model.resid_pdrop': (
        GPT2.resid_pdrop,
        below(0, 1),
        'dropout on the outputs of attention and MLP, before they join the residual stream',
    ),
    'model.layer_norm_epsilon': (
        GPT2.layer_norm_epsilon,
        above(0),
        'added to the variance in LayerNorm',
    ),
    'model.initializer_range': (
        GPT2.initializer_range,
        above(0),
        'standard deviation of the initial weights',
    ),
    'model.bias': (GPT2.bias, SWITCH, 'biases in the linear layers and LayerNorms, as in GPT-2'),
    'model.dtype': (
        GPT2.dtype,
        one_of(*PRECISIONS),
        'precision of the matrix products; parameters, softmax, LayerNorm and loss are always fp32',
    ),
    'model.residual_dtype': (
        GPT2.residual_dtype,
        one_of('compute', 'float32'),
        'precision of the residual stream; compute: as the activations; '
        'float32: under bfloat16, nearer to fp32 and slower',
    ),
    'model.remat': (
        GPT2.remat,
        one_of('none', 'block', 'dots'),
        'what the backward pass computes again; none: nothing; block: each block, for the least '
        'memory and a third more work; dots: all of a block but its matrix products',
    ),
    'model.attention': (
        GPT2.attention,
        one_of('auto', 'xla', 'cudnn', 'fused'),
        "xla: as in model/gpt2.py; cudnn: cuDNN's GPU kernel (bfloat16, attn_pdrop 0); fused: this "
        "package's; auto: the fastest that model.kernels allows",
    ),
    'model.kernels': (
        GPT2.kernels,
        one_of('auto', 'xla', 'fused'),
        'for training and decoding; auto: for each part the fastest that can run here; xla: every '
        'step as in model/gpt2.py; fused: GPU kernels that compute the same',
    ),
    # -- data
    'data.corpus': (
        'tinyshakespeare',
        NAME,
        'a corpus name, a text file, a folder made by scripts/prepare.py, or GPT-2 tokens of llm.c '
        "or nanoGPT as a pattern that ends in .bin ('val' as a word of a name: validation)",
    ),
    'data.tokenizer': (
        'char',
        one_of('char', 'byte', 'gpt2'),
        'how text becomes tokens; must match the tokens of a prepared folder',
    ),
    'data.val_fraction': (
        0.1,
        below(0, 1),
        'the last part of a text, kept for validation; a prepared folder has its own split',
    ),
    'data.holdout': (
        0.0,
        below(0, 1),
        'the last part of the training text: validate on it instead of training on it, '
        'to choose settings without reading the validation text',
    ),
    'data.fallback': (
        '',
        TEXT,
        'the corpus to take instead, with an announcement, if data.corpus can neither be found nor '
        'downloaded; empty: none',
    ),
    # -- training
    'train.steps': (5000, below(1, 2**31), 'updates in total'),
    'train.batch_size': (
        64,
        at_least(1),
        'windows per update, over all devices and micro-batches (B)',
    ),
    'train.seq_len': (int, or_none(at_least(1)), 'tokens per window (T); left open: n_positions'),
    'train.grad_accum_steps': (
        1,
        at_least(1),
        'micro-batches per update: less memory, the same gradient',
    ),
    'train.seed': (0, below(0, 2**32), 'seed of initialisation, data order and dropout'),
    'train.order': (
        'keyed',
        one_of('keyed', 'table'),
        'order of the windows of an epoch; keyed: a permutation computed window by window; table: '
        'the order of older runs, which takes memory for a table of all windows',
    ),
    'train.init_from': (
        '',
        TEXT,
        'the folder of a run to start from, as scripts/convert.py writes one; empty: random',
    ),
    'train.init_step': ('best', NAME, "its checkpoint: 'best', 'latest' or a number"),
    'train.init_optimizer': (
        False,
        SWITCH,
        'keep the optimizer state of that checkpoint too, under a new schedule',
    ),
    'train.probe': (
        0,
        at_least(0),
        'probe the model at steps 0, 1, 2, 4, .. 512, then every so many updates, into probes.npz; '
        '0: no probes',
    ),
    'train.spike': (
        0.0,
        at_least(0),
        'explain an update whose loss or gradient norm is more than so many standard deviations '
        'above those before it, and continue; 0: never',
    ),
    'train.deterministic': (
        False,
        SWITCH,
        'on a GPU: the same bits from the same seed on any GPU of that kind, for 1 to 5 % of the '
        'time; without it, on the machine that compiled the programs',
    ),
    'train.reduce_dtype': (
        'float32',
        one_of('float32', 'bfloat16'),
        'dtype in which fused kernels send and add gradients between devices',
    ),
    # -- optimizer
    'optim.implementation': (
        'auto',
        one_of('auto', 'optax', 'explicit', 'fused'),
        "AdamW with clipping; optax: the library's; explicit: its equations written out; fused: "
        'GPU kernels; auto: fused on a GPU, else optax',
    ),
    'optim.algorithm': (
        'adamw',
        one_of('adamw', 'muon'),
        'muon: the matrices of the blocks by Muon, embeddings, biases and LayerNorms by AdamW; '
        'adamw: all by AdamW',
    ),
    'optim.learning_rate': (6e-4, above(0), 'peak of the schedule'),
    'optim.end_learning_rate': (
        6e-5,
        at_least(0),
        'where the schedule ends; a tenth of the peak in GPT-3',
    ),
    'optim.decay': (
        'cosine',
        one_of('cosine', 'linear'),
        'how the learning rate falls from its peak to its end',
    ),
    'optim.hold': (
        0.0,
        below(0, 1),
        'share of the updates after the warmup that keep the peak, before it falls',
    ),
    'optim.warmup_steps': (
        100,
        below(0, 2**31),
        'updates of linear warmup; a shorter run only warms up',
    ),
    'optim.beta1': (0.9, below(0, 1), 'decay of the first moment'),
    'optim.beta2': (0.95, below(0, 1), 'decay of the second moment'),
    'optim.eps': (1e-8, above(0), 'added to the root of the second moment'),
    'optim.weight_decay': (
        0.1,
        at_least(0),
        'decoupled decay of the matrices, times the learning rate',
    ),
    'optim.clip_norm': (1.0, at_least(0), 'largest global gradient norm; 0: no clipping'),
    'optim.muon_learning_rate': (
        3e-3,
        above(0),
        "peak of Muon's schedule, which has the form of AdamW's; an element changes by 0.2 of it",
    ),
    'optim.muon_beta': (0.95, below(0, 1), "decay of Muon's mean gradient"),
    'optim.average': (
        0.0,
        below(0, 1),
        'decay of a moving average of the parameters, which is evaluated, sampled from and '
        'published in their place; 0: none',
    ),
    # -- evaluation, on the validation split
    'eval.every': (
        250,
        at_least(1),
        'updates between evaluations; the last update is always evaluated',
    ),
    'eval.sample_tokens': (
        300,
        at_least(0),
        'length of the sample printed at each evaluation; 0: none',
    ),
    'eval.tokens': (
        int,
        or_none(at_least(0)),
        'tokens of an evaluation: windows evenly spread over the split; 0: the whole split; left '
        'open: a third of the training tokens between two evaluations, from '
        f'{MIN_EVAL_TOKENS:,} to {MAX_EVAL_TOKENS:,}',
    ),
    # -- checkpoints
    'checkpoint.every': (
        1000,
        at_least(1),
        'updates between saves; improvements and the last update are saved too',
    ),
    'checkpoint.keep': (
        'latest',
        one_of('latest', 'log', 'all'),
        'latest: the last two checkpoints and the best; log: also steps 0, 1, 2, 4, .. 512, then '
        'every keep_every; all: step 0 and every checkpoint',
    ),
    'checkpoint.keep_every': (
        1000,
        at_least(1),
        "updates between the checkpoints that 'log' keeps after step 512",
    ),
    # -- logging
    'log.every': (10, at_least(1), 'updates between records in metrics.jsonl and on the console'),
    # -- devices: the mesh is data x fsdp x tensor
    'mesh.data': (1, at_least(1), 'devices that share the rows of a batch'),
    'mesh.fsdp': (1, at_least(1), 'devices that share rows and shard the parameters'),
    'mesh.tensor': (1, at_least(1), 'devices that share heads and feed-forward columns'),
}

EXPECTED_CONFIG = 'the result of default_config() in gpt2_jax.config, with other values'

# Renamed settings and values, so that config.json of an older version can be read.
# old key -> new key
RENAMED_KEYS = {
    'train.accumulate': 'train.grad_accum_steps',
    'train.init_which': 'train.init_step',
}
# (key, old value) -> new value
RENAMED_VALUES = {
    ('model.kernels', 'open'): 'xla',
    ('model.attention', 'explicit'): 'xla',
    ('model.remat', False): 'none',
    ('model.remat', True): 'block',
}

# What a setting that config.json does not have yet was before it was a setting.
FORMER_VALUES = {'train.order': 'table'}

# The device computes with the numbers of these sections, in fp32.
IN_FP32 = ('model.', 'optim.')

# A run may resume with other values of these: none of them changes an update. eval.tokens is not
# among them: losses over other tokens would not tell which checkpoint is the best.
RESUMABLE = {'train.probe', 'train.spike'} | {
    key
    for key in SETTINGS
    if key.startswith(('eval.', 'checkpoint.', 'log.', 'mesh.')) and key != 'eval.tokens'
}


def default_config() -> ConfigDict:
    """All settings at their defaults; locked, so that a misspelt key is an error."""
    config = ConfigDict()
    for key, (default, _, _) in SETTINGS.items():
        section, name = key.split('.')
        value = config_dict.placeholder(default) if isinstance(default, type) else default
        if section not in config:
            config[section] = ConfigDict()
        config[section][name] = value
    return config.lock()


def keys_of(config: ConfigDict) -> set[str]:
    """The settings that a configuration has: {'model.n_layer', ..}."""
    keys = set()
    for section, values in config.to_dict().items():
        keys |= {f'{section}.{name}' for name in values} if isinstance(values, dict) else {section}
    return keys


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'model.n_layer': 12, ..} in the order of SETTINGS."""
    return {key: config[key.split('.')[0]][key.split('.')[1]] for key in SETTINGS}


def kind_of(key: str) -> type:
    """The type that the values of a setting have."""
    default = SETTINGS[key][0]
    return default if isinstance(default, type) else type(default)


def describe(key: str) -> str:
    """One setting in words: its type, allowed values, and meaning."""
    _, allowed, meaning = SETTINGS[key]
    return f'{key} ({_kind_words(kind_of(key))}, {allowed.words}): {meaning}'


def _kind_words(kind: type) -> str:
    return 'finite float' if kind is float else kind.__name__


def check_key(key: str) -> None:
    """Raises UsageError, naming the nearest setting, if `key` ('train.steps') is not a setting."""
    if key in SETTINGS:
        return
    last = key.split('.')[-1]
    near = (
        [full for full in SETTINGS if full.split('.')[-1] == last]
        or difflib.get_close_matches(key, SETTINGS, n=1)
        or [full for full in SETTINGS if difflib.get_close_matches(last, [full.split('.')[-1]])]
    )
    section = key.split('.')[0]
    if names := [full.split('.')[1] for full in SETTINGS if full.startswith(section + '.')]:
        known = f'{section} has {", ".join(names)}'
    else:
        known = f'the sections are {", ".join(sorted({k.split(".")[0] for k in SETTINGS}))}'
    hint = f'the nearest is {describe(near[0])}; ' if near else ''
    raise UsageError(foreign.cut(f'there is no setting {foreign.show(key)}; {hint}{known}'))


def resolve(config: ConfigDict) -> ConfigDict:
    """The configuration with open settings filled in, checked, and locked.

    Raises UsageError with one line that names the setting, its value and what is allowed.
    """
    if not isinstance(config, ConfigDict):
        raise UsageError(
            f'the configuration is of type {type(config).__name__}: expected {EXPECTED_CONFIG}'
        )
    if wrong := keys_of(config) ^ SETTINGS.keys():
        about = 'lacks' if min(wrong) in SETTINGS else 'has the unknown setting'
        raise UsageError(f'the configuration {about} {min(wrong)}: expected {EXPECTED_CONFIG}')
    config = ConfigDict(config.to_dict())  # a copy that can be changed, also of a frozen one
    flat = flatten(config)
    for key, value in flat.items():
        (default, allowed, meaning), kind = SETTINGS[key], kind_of(key)
        right_type = type(value) is kind or (value is None and isinstance(default, type))
        if right_type and kind in (int, float) and value is not None:
            right_type = math.isfinite(value) if kind is float else abs(value) < 2**63
        is_allowed, rounding = right_type and allowed.test(value), ''
        if is_allowed and kind is float and key.startswith(IN_FP32):
            with np.errstate(over='ignore'):
                rounded = float(np.float32(value))
            if abs(rounded) < np.finfo(np.float32).tiny:  # XLA flushes subnormal numbers
                rounded = 0.0
            is_allowed = math.isfinite(rounded) and allowed.test(rounded)
            # 0 often means something else, such as no clipping.
            is_allowed = is_allowed and bool(rounded) == bool(value)
            rounding = f', in fp32 {rounded},'
        if not is_allowed:
            expected = f'{_kind_words(kind)}, {allowed.words} ({meaning})'
            problem = f'{key} = {foreign.show(value)}{rounding} is not allowed; expected {expected}'
            raise UsageError(foreign.cut(problem))
    model, train = config.model, config.train
    with config.unlocked():
        model.n_inner = model.n_inner or 4 * model.n_embd
        train.seq_len = train.seq_len or model.n_positions
        if config.eval.tokens is None:
            config.eval.tokens = usual_eval_tokens(config)
    for problem in _conflicts(config):
        raise UsageError(problem)
    return config.lock()


def usual_eval_tokens(config: ConfigDict) -> int:
    """What eval.tokens is if it is left open; `config` is resolved otherwise."""
    train = config.train
    between = min(config.eval.every, train.steps) * train.batch_size * train.seq_len
    return min(max(between // 3, MIN_EVAL_TOKENS), MAX_EVAL_TOKENS)


def _conflicts(config: ConfigDict) -> Iterator[str]:
    """Settings that do not fit each other, in words; the first one is reported."""
    model, train, optim, mesh = config.model, config.train, config.optim, config.mesh
    rows, shares = train.batch_size // train.grad_accum_steps, mesh.data * mesh.fsdp
    if model.n_embd % model.n_head:
        yield (f'model.n_embd = {model.n_embd} must be a multiple of model.n_head = {model.n_head}')
    if train.seq_len > model.n_positions:
        yield (
            f'train.seq_len = {train.seq_len} must be at most '
            f'model.n_positions = {model.n_positions}'
        )
    if train.batch_size % train.grad_accum_steps:
        yield (
            f'train.batch_size = {train.batch_size} must be a multiple of '
            f'train.grad_accum_steps = {train.grad_accum_steps}'
        )
    if optim.end_learning_rate > optim.learning_rate:
        yield (
            f'optim.end_learning_rate = {optim.end_learning_rate} must be at most '
            f'optim.learning_rate = {optim.learning_rate}'
        )
    for rate in ('learning_rate', 'muon_learning_rate')[: 1 + (optim.algorithm == 'muon')]:
        if (decay := optim[rate] * optim.weight_decay) > 1:
            yield (
                f'optim.weight_decay = {optim.weight_decay} must be at most 1 / optim.{rate} = '
                f'{1 / optim[rate]:.4g}: an update would take {decay:.3g} times each weight from it'
            )
    if rows % shares:
        yield (
            f'train.batch_size / train.grad_accum_steps = {rows} must be a multiple of '
            f'mesh.data x mesh.fsdp = {shares}'
        )
    if model.n_head % mesh.tensor:
        yield f'model.n_head = {model.n_head} must be a multiple of mesh.tensor = {mesh.tensor}'
    if model.attention == 'cudnn' and (model.attn_pdrop > 0 or model.dtype != 'bfloat16'):
        yield (
            "model.attention = 'cudnn' needs model.attn_pdrop = 0 and model.dtype = 'bfloat16': "
            "cuDNN's kernel supports neither dropout of the pattern nor fp32"
        )
    if (model.kernels, model.attention) == ('fused', 'xla'):
        yield (
            "model.attention = 'xla' contradicts model.kernels = 'fused': set model.kernels = "
            "'auto', or model.attention to 'auto', 'fused' or 'cudnn'"
        )


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON, one setting a line."""
    return json.dumps(config.to_dict(), indent=1) + '\n'


def from_json(
    text: str, source: str | os.PathLike = 'the configuration', remedy: str = ''
) -> ConfigDict:
    """The configuration that `to_json` wrote, in this version or an older one.

    One line on stderr names the settings that were renamed since. Raises UsageError for a key or a
    value that is not allowed, and UserError, which names `source`, for text that is not such JSON.
    The latter ends with `remedy`.
    """
    config, renamed = default_config(), []
    config.update_from_flattened_dict(FORMER_VALUES)
    sections = foreign.parse_json(text, source, {str: {}}, remedy)
    for section, values in sections.items():
        for name, value in values.items():
            old_key = f'{section}.{name}'
            key = RENAMED_KEYS.get(old_key, old_key)
            check_key(key)
            if key != old_key:
                renamed.append(f'{old_key} is now {key}')
            new_value = value
            if isinstance(value, str | bool) and (key, value) in RENAMED_VALUES:
                new_value = RENAMED_VALUES[key, value]
                renamed.append(f'{key} = {value!r} is now {new_value!r}')
            new_section, new_name = key.split('.')
            try:
                config[new_section][new_name] = new_value
            except (TypeError, ValueError, OverflowError):
                problem = f'{key} = {foreign.show(value)} is not allowed; expected {describe(key)}'
                raise UsageError(foreign.cut(problem)) from None
    if (config.model.kernels, config.model.attention) == ('fused', 'xla'):  # once allowed
        config.model.attention = 'fused'
        renamed.append("model.attention = 'xla' with fused kernels is now 'fused'")
    if renamed:
        print(f'[settings of an older version: {"; ".join(renamed)}]', file=sys.stderr)
    return resolve(config)


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} of the changed settings that a resumed run must keep."""
    old, new = flatten(old), flatten(new)
    resumable = set(RESUMABLE)
    if not any(new[f'model.{name}'] for name in ('embd_pdrop', 'attn_pdrop', 'resid_pdrop')):
        # Other micro-batches: the same rows, added up in another order. Dropout would draw its
        # masks for each of them.
        resumable.add('train.grad_accum_steps')
    return {
        key: (old[key], new[key])
        for key in SETTINGS
        if old[key] != new[key] and key not in resumable
    }
