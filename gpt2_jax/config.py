"""Every setting, once: its default, what it may be, and what it means.

A configuration is an `ml_collections.ConfigDict` made by `default_config()`, changed by a file in `configs/` and
by flags, checked by `resolve()`, saved with the run by `to_json()` and read back, equal, by `from_json()`.
"""

import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from gpt2_jax.architecture import ACTIVATIONS, PRECISIONS, GPT2Config
from gpt2_jax.errors import UsageError


class Allowed(NamedTuple):
    """The values a setting may take: in words, for errors, and as a test."""

    words: str
    test: Callable[[Any], bool]


def at_least(low) -> Allowed:
    """Numbers from `low` on."""
    return Allowed(f'at least {low}', lambda value: value >= low)


def below(low, high) -> Allowed:
    """Numbers from `low` (included) to `high` (excluded)."""
    return Allowed(f'at least {low} and below {high}', lambda value: low <= value < high)


def above(low) -> Allowed:
    """Numbers over `low`."""
    return Allowed(f'above {low}', lambda value: value > low)


def one_of(*values) -> Allowed:
    """One of these values."""
    return Allowed(f'one of {", ".join(map(repr, values))}', lambda value: value in values)


def or_none(allowed: Allowed) -> Allowed:
    """`allowed`, or left open."""
    return Allowed(
        f'{allowed.words}, or left open', lambda value: value is None or allowed.test(value)
    )


NAME = Allowed('a text that is not empty', bool)
SWITCH = Allowed('True or False', lambda value: True)
TEXT = Allowed('any text', lambda value: True)

GPT2 = GPT2Config()  # the defaults of the model section

# key -> (default, allowed values, meaning). The model's defaults are GPT-2's own (the 124M model); the optimizer's
# are those with which models of that size are commonly trained (Brown et al. 2020, appendix B).
SETTINGS = {
    # -- model: names and numbers of the published config.json
    'model.n_layer': (GPT2.n_layer, at_least(1), 'number of blocks (L)'),
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
        'gelu_new: tanh GELU, as GPT-2; gelu: exact',
    ),
    'model.embd_pdrop': (GPT2.embd_pdrop, below(0, 1), 'dropout on the embeddings'),
    'model.attn_pdrop': (GPT2.attn_pdrop, below(0, 1), 'dropout on the attention pattern'),
    'model.resid_pdrop': (
        GPT2.resid_pdrop,
        below(0, 1),
        'dropout on what attention and MLP add to the residual stream',
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
    'model.bias': (
        GPT2.bias,
        SWITCH,
        'biases in the affine maps and LayerNorms, as GPT-2 has them',
    ),
    'model.dtype': (
        GPT2.dtype,
        one_of(*PRECISIONS),
        'of the matrix products; parameters, softmax, LayerNorm and loss are fp32 in each case',
    ),
    'model.remat': (
        GPT2.remat,
        SWITCH,
        'recompute each block in the backward pass: less memory, a third more work',
    ),
    'model.attention': (
        GPT2.attention,
        one_of('xla', 'cudnn'),
        'explicit: every step in the open; cudnn: the fused GPU kernel (bfloat16, attn_pdrop 0)',
    ),
    'model.kernels': (
        GPT2.kernels,
        one_of('xla', 'fused'),
        'of training and decoding: open: every step as in model.py; '
        'fused: the GPU kernels, which compute the same (one device)',
    ),
    # -- data
    'data.corpus': (
        'tinyshakespeare',
        NAME,
        'a corpus name, a text file, a folder made by scripts/prepare.py, or '
        "GPT-2 tokens of llm.c or nanoGPT as a pattern that ends in .bin (validation: 'val' in the name)",
    ),
    'data.tokenizer': (
        'char',
        one_of('char', 'byte', 'gpt2'),
        'how text becomes tokens; must match prepared ones',
    ),
    'data.val_fraction': (
        0.1,
        below(0, 1),
        'the last part of a text, kept for validation; a folder has its own split',
    ),
    'data.holdout': (
        0.0,
        below(0, 1),
        'the last part of the training text, to validate on instead of training on it: '
        'to choose recipes without a look at the validation text',
    ),
    'data.fallback': (
        '',
        TEXT,
        'corpus to take, announced, where the one asked for can be had nowhere; empty: none',
    ),
    # -- training
    'train.steps': (5000, at_least(1), 'updates in all'),
    'train.batch_size': (
        64,
        at_least(1),
        'windows per update, over all devices and micro-batches (B)',
    ),
    'train.seq_len': (int, or_none(at_least(1)), 'tokens per window (T); left open: n_positions'),
    'train.grad_accum_steps': (
        1,
        at_least(1),
        'micro-batches an update is worked off in: less memory, the same gradient',
    ),
    'train.seed': (0, below(0, 2**32), 'of initialisation, data order and dropout'),
    'train.init_from': (
        '',
        TEXT,
        'the folder of a run to start from, as scripts/convert.py writes one; empty: random',
    ),
    'train.init_step': ('best', NAME, "the checkpoint there: 'best', 'latest' or a step"),
    'train.init_optimizer': (
        False,
        SWITCH,
        'go on with the optimizer of that checkpoint too, under a new schedule',
    ),
    # -- optimizer
    'optim.implementation': (
        'optax',
        one_of('optax', 'explicit', 'fused'),
        'of AdamW, clipping and schedule: '
        'optax has them; explicit: written out from their equations; fused: as GPU kernels',
    ),
    'optim.learning_rate': (6e-4, above(0), 'peak of the schedule'),
    'optim.end_learning_rate': (
        6e-5,
        at_least(0),
        'where the cosine ends; a tenth of the peak, as GPT-3',
    ),
    'optim.warmup_steps': (
        100,
        at_least(0),
        'updates of linear warmup; a run that is shorter only warms up',
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
    # -- evaluation, on the whole validation split
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
    # -- checkpoints
    'checkpoint.every': (
        1000,
        at_least(1),
        'updates between saves; improvements and the last update are saved too',
    ),
    # -- logging
    'log.every': (10, at_least(1), 'updates between records in metrics.jsonl and on the console'),
    # -- devices: the mesh is data x fsdp x tensor
    'mesh.data': (1, at_least(1), 'devices that share the rows of a batch'),
    'mesh.fsdp': (1, at_least(1), 'devices that share rows, and hold the parameters in pieces'),
    'mesh.tensor': (1, at_least(1), 'devices that share heads and feed-forward columns'),
}

# A run may go on with other values of these sections: none of them changes an update.
RESUMABLE_SECTIONS = ('eval', 'checkpoint', 'log', 'mesh')


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


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'model.n_layer': 12, ..} in the order of SETTINGS."""
    return {key: config[key.split('.')[0]][key.split('.')[1]] for key in SETTINGS}


def describe(key: str) -> str:
    """One setting in words: its type, allowed values, and meaning."""
    default, allowed, meaning = SETTINGS[key]
    kind = default if isinstance(default, type) else type(default)
    return f'{key} ({kind.__name__}, {allowed.words}): {meaning}'


def check_key(key: str) -> None:
    """Raises UsageError, naming the nearest settings, where `key` ('train.steps') is not one."""
    if key in SETTINGS:
        return
    last = key.split('.')[-1]
    near = difflib.get_close_matches(key, SETTINGS, n=1) or [
        full for full in SETTINGS if difflib.get_close_matches(last, [full.split('.')[-1]])
    ]
    section = key.split('.')[0]
    names = [full for full in SETTINGS if full.startswith(section + '.')] or sorted(
        {k.split('.')[0] for k in SETTINGS}
    )
    hint = f'the nearest is {describe(near[0])}; ' if near else ''
    raise UsageError(f'there is no setting {key!r}; {hint}those that exist: {", ".join(names)}')


def resolve(config: ConfigDict) -> ConfigDict:
    """The configuration with open settings filled in, checked, and locked.

    Raises UsageError with one line that names the setting, its value and what is allowed.
    """
    config = config.copy_and_resolve_references()
    flat = flatten(config)
    for key, value in flat.items():
        default, allowed, _ = SETTINGS[key]
        kind = default if isinstance(default, type) else type(default)
        if not (
            type(value) is kind or (value is None and isinstance(default, type))
        ) or not allowed.test(value):
            raise UsageError(
                f'{key} = {value!r} is not allowed; expected {kind.__name__}, {allowed.words} '
                f'({SETTINGS[key][2]})'
            )
    model, train, mesh = config.model, config.train, config.mesh
    with config.unlocked():
        model.n_inner = model.n_inner or 4 * model.n_embd
        train.seq_len = train.seq_len or model.n_positions
    rows = train.batch_size // train.grad_accum_steps
    wrong = {
        f'model.n_embd = {model.n_embd} must be a multiple of model.n_head = {model.n_head}': model.n_embd
        % model.n_head,
        f'train.seq_len = {train.seq_len} must be at most model.n_positions = {model.n_positions}': train.seq_len
        > model.n_positions,
        f'train.batch_size = {train.batch_size} must be a multiple of train.grad_accum_steps = {train.grad_accum_steps}': train.batch_size
        % train.grad_accum_steps,
        f'optim.end_learning_rate = {config.optim.end_learning_rate} must be at most optim.learning_rate = '
        f'{config.optim.learning_rate}': config.optim.end_learning_rate
        > config.optim.learning_rate,
        f'the {rows} rows of a micro-batch must be a multiple of mesh.data x mesh.fsdp = {mesh.data * mesh.fsdp}': rows
        % (mesh.data * mesh.fsdp),
        f'model.n_head = {model.n_head} must be a multiple of mesh.tensor = {mesh.tensor}': model.n_head
        % mesh.tensor,
        "model.attention = 'cudnn' needs model.attn_pdrop = 0 and model.dtype = 'bfloat16': the fused kernel knows no "
        'dropout of the pattern and no fp32': model.attention == 'cudnn'
        and (model.attn_pdrop > 0 or model.dtype != 'bfloat16'),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(message)
    return config.lock()


def to_json(config: ConfigDict) -> str:
    """The configuration as JSON, one setting a line."""
    return json.dumps(config.to_dict(), indent=1) + '\n'


def from_json(text: str) -> ConfigDict:
    """The configuration that `to_json` wrote; raises UsageError where a key or value is none of ours."""
    config = default_config()
    for section, values in json.loads(text).items():
        for name, value in values.items():
            key = f'{section}.{name}'
            check_key(key)
            try:
                config[section][name] = value
            except (TypeError, ValueError):
                raise UsageError(
                    f'{key} = {value!r} is not allowed; expected {describe(key)}'
                ) from None
    return resolve(config)


def differences(old: ConfigDict, new: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} of the settings that differ and that a resumed run may not change."""
    old, new = flatten(old), flatten(new)
    return {
        key: (old[key], new[key])
        for key in SETTINGS
        if old[key] != new[key] and key.split('.')[0] not in RESUMABLE_SECTIONS
    }
