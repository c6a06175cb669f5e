"""Published weights in and out, as numpy arrays. Needs no torch, no transformers, no JAX.

A published GPT-2 is a folder with `config.json` and `model.safetensors`, or shards of it with an
index. Its tensors are our parameters under other names. Its kernels are (in, out) as ours are, so
nothing is transposed, and biases follow their kernels:

    wte.weight                  wte/embedding (V, D)
    wpe.weight                  wpe/embedding (n_positions, D)
    h.0.ln_1.weight             h_0/ln_1/scale (D,)
    h.0.attn.c_attn.weight      h_0/attn/c_attn/kernel: (D, 3 D) is (D, 3, H, K)
    h.0.attn.c_proj.weight      h_0/attn/c_proj/kernel: (D, D) is (H, K, D)

The 3 D columns of c_attn are ordered by q, k, v, and then by head.

nanoGPT stores kernels (out, in), as torch's Linear does. The shape of c_attn, which is never
square, tells the two formats apart. These may be present or absent: a prefix `transformer.` or
torch.compile's `_orig_mod.` before the names, the causal masks `h.0.attn.bias`, and an
`lm_head.weight` equal to wte.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt2_jax import foreign
from gpt2_jax.architecture import GPT2Config, parameter_shapes
from gpt2_jax.config import SETTINGS, kind_of
from gpt2_jax.errors import UserError
from gpt2_jax.foreign import PLAIN_NAME, Maybe, integer

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
ADDED_TOKENS, TOKENIZER = 'added_tokens.json', 'tokenizer.json'

# Our setting -> its names in a published config.json, then in nanoGPT's model_args. The first name
# that is present counts.
FIELDS = {
    'n_layer': ('n_layer', 'num_hidden_layers'),
    'n_head': ('n_head', 'num_attention_heads'),
    'n_embd': ('n_embd', 'hidden_size'),
    'n_positions': ('n_positions', 'max_position_embeddings', 'n_ctx', 'block_size'),
    'n_inner': ('n_inner',),
    'layer_norm_epsilon': ('layer_norm_epsilon',),
    'initializer_range': ('initializer_range',),
    'embd_pdrop': ('embd_pdrop', 'dropout'),
    'attn_pdrop': ('attn_pdrop', 'dropout'),
    'resid_pdrop': ('resid_pdrop', 'dropout'),
    'bias': ('bias',),
}
# Published name of an activation -> our name of the same function.
ACTIVATIONS = {
    'gelu_new': 'gelu_new',
    'gelu_pytorch_tanh': 'gelu_new',
    'gelu_fast': 'gelu_new',
    'gelu': 'gelu',
    'gelu_python': 'gelu',
}
# Fields that can turn GPT-2 into another architecture, and their values for GPT-2.
GPT2_ONLY = {
    'model_type': 'gpt2',
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'add_cross_attention': False,
    'tie_word_embeddings': True,
    'pruned_heads': {},
    'quantization_config': None,
}

# The command that converts a pickle into the files that are read here, with nanoGPT's settings.
UNPICKLE = (
    'python -c "import json, torch, safetensors.torch as st; '
    "c = torch.load('{name}', map_location='cpu', weights_only=True); "
    "st.save_file({{k: v.clone().contiguous() for k, v in c.get('model', c).items()}}, "
    "'model.safetensors'); "
    "'model_args' in c and json.dump(c['model_args'], open('config.json', 'w'))\""
)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The published config.json, and every tensor by its name in the file. Raises UserError.

    Pickles (.pt, .bin) are refused, with the command that converts them: reading a pickle runs
    whatever code it holds.
    """
    folder = Path(folder)
    if folder.is_file():
        _refuse_pickle(folder)
        raise foreign.error(folder, f'is a file: give the folder that holds {CONFIG} and {WEIGHTS}')
    if not folder.is_dir():
        raise UserError(
            f'there is no folder {foreign.escape(str(folder))}: expected {CONFIG} and {WEIGHTS} '
            'in it'
        )
    if (folder / WEIGHTS).exists():
        tensors = _read_tensors(folder / WEIGHTS)
    elif (folder / INDEX).exists():
        tensors = _read_shards(folder)
    else:
        for path in sorted(folder.iterdir()):
            _refuse_pickle(path)
        found = ', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'
        raise foreign.error(
            folder, f'has no weights: expected {WEIGHTS} (or {INDEX} and its shards), found {found}'
        )
    if not (folder / CONFIG).exists():
        raise foreign.error(
            folder / CONFIG,
            'is missing: it holds the sizes. For nanoGPT, write its model_args into it: '
            '{"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": '
            '50304, "bias": false}',
        )
    return foreign.read_json(folder / CONFIG, {}), tensors


def _refuse_pickle(path: Path) -> None:
    if path.suffix in ('.pt', '.pth', '.bin', '.ckpt', '.pkl'):
        # Only a plain name goes into the command: a quote in it would end the Python text there.
        name = path.name if re.fullmatch(r'[\w.-]+', path.name, re.ASCII) else f'FILE{path.suffix}'
        raise UserError(
            f'{foreign.escape(str(path))} is a pickle, and reading a pickle can run any code: if '
            f'you trust it and have torch, convert it with {UNPICKLE.format(name=name)}, and give '
            'the folder that this writes into'
        )


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    foreign.open_file(path).close()  # refuses pipes and devices
    remedy = 'if it was cut short, fetch it again'
    with foreign.parsing(path, 'safetensors', remedy), safe_open(path, framework='np') as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX
    weight_map = foreign.read_json(index, {'weight_map': {str: PLAIN_NAME}})['weight_map']
    tensors, files = {}, {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            problem = f'names the file {file!r}, which is not in that folder'
            raise foreign.error(index, problem, 'fetch it too')
        part = _read_tensors(folder / file)
        tensors |= part
        files |= dict.fromkeys(part, file)
    if wrong := files.items() ^ weight_map.items():
        raise foreign.error(
            index,
            'names files that hold other tensors than it lists, for instance '
            f'{foreign.show(min(wrong)[0])}: they belong to different models',
        )
    return tensors


def read_added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that a published folder adds to its tokenizer's own: {text: id}.

    They are in added_tokens.json, in the `added_tokens` of tokenizer.json, or in both. Raises
    UserError for a file that cannot be read.
    """
    added = {}
    if (folder / ADDED_TOKENS).exists():
        added |= foreign.read_json(folder / ADDED_TOKENS, {str: integer(0)})
    if (folder / TOKENIZER).exists():
        schema = {'added_tokens': Maybe([{'id': integer(0), 'content': str}])}
        listed = foreign.read_json(folder / TOKENIZER, schema).get('added_tokens') or []
        added |= {token['content']: token['id'] for token in listed}
    return added


def import_config(published: dict[str, Any]) -> dict[str, Any]:
    """Our `model` settings, and vocab_size, from a published config.json or nanoGPT's model_args.

    A field that is missing has our default, which is GPT-2's. Raises UserError, with the name of
    the field, if the model is not GPT-2.
    """
    nanogpt = 'model_type' not in published and 'block_size' in published

    def refuse(field, value, expected):
        problem = f'{field} = {foreign.show(value)} is not the GPT-2 of this package'
        return foreign.error(f'{CONFIG}:', f'{problem}; expected {expected}')

    for field, expected in GPT2_ONLY.items():
        value = published.get(field, None if field == 'model_type' and not nanogpt else expected)
        if value != expected:
            raise refuse(field, value, repr(expected))
    activation = published.get('activation_function', 'gelu' if nanogpt else 'gelu_new')
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise refuse('activation_function', activation, f'one of {", ".join(ACTIVATIONS)}')
    vocab_size = published.get('vocab_size')
    if type(vocab_size) is not int or vocab_size < 1:
        raise refuse('vocab_size', vocab_size, 'int, at least 1')
    settings = {'vocab_size': vocab_size, 'activation_function': ACTIVATIONS[activation]}
    for setting, fields in FIELDS.items():
        field = next((field for field in fields if published.get(field) is not None), None)
        if field is None:
            continue
        kind, (_, allowed, _) = kind_of(f'model.{setting}'), SETTINGS[f'model.{setting}']
        value = published[field]
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not kind or not allowed.test(value) or value == math.inf:
            raise refuse(field, value, f'{kind.__name__}, {allowed.words}')
        settings[setting] = value
    heads, width = (
        settings.get(name, SETTINGS[f'model.{name}'][0]) for name in ('n_head', 'n_embd')
    )
    if width % heads:
        raise refuse('n_embd', width, f'a multiple of n_head = {heads}')
    return settings


def export_config(cfg: GPT2Config, end_of_text: int | None) -> dict[str, Any]:
    """The published config.json of a model. `end_of_text` is the token that ends a text, if any."""
    return {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        'dtype': 'float32',
        'vocab_size': cfg.vocab_size,
        'n_layer': cfg.n_layer,
        'n_head': cfg.n_head,
        'n_embd': cfg.n_embd,
        'n_positions': cfg.n_positions,
        'n_ctx': cfg.n_positions,
        'n_inner': None if cfg.d_ff == 4 * cfg.n_embd else cfg.d_ff,
        'activation_function': cfg.activation_function,
        'layer_norm_epsilon': cfg.layer_norm_epsilon,
        'initializer_range': cfg.initializer_range,
        'embd_pdrop': cfg.embd_pdrop,
        'attn_pdrop': cfg.attn_pdrop,
        'resid_pdrop': cfg.resid_pdrop,
        'bos_token_id': end_of_text,
        'eos_token_id': end_of_text,
        # transformers has no such field; nanoGPT has, and `import_config` reads it.
        **({} if cfg.bias else {'bias': False}),
    }


def _published(cfg: GPT2Config) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """{published name: (its path in our tree, its shape there, its published shape)}."""
    table = {}
    for path, our_shape in parameter_shapes(cfg).items():
        module, _, kind = path.rpartition('/')
        shape = (math.prod(our_shape),)
        if kind in ('kernel', 'embedding'):
            n_inputs = 2 if module.endswith('attn/c_proj') else 1
            shape = math.prod(our_shape[:n_inputs]), math.prod(our_shape[n_inputs:])
        name = module.replace('h_', 'h.', 1).replace('/', '.')
        table[f'{name}.{"bias" if kind == "bias" else "weight"}'] = path, our_shape, shape
    return table


def import_params(tensors: dict[str, np.ndarray], cfg: GPT2Config) -> dict[str, Any]:
    """Our parameters, fp32, from published tensors; fp16 and bf16 are widened. Raises UserError.

    If cfg.bias is False, biases may be present if all are 0, as `export_params` writes them.
    """
    if cfg.n_layer > len(tensors):  # before a table of 10^9 layers is made
        problem = f'it has {cfg.n_layer} layers, but there are {len(tensors)} tensors'
        raise foreign.error('the weights', f'do not fit {CONFIG}: {problem}')
    table, plain = _published(cfg), _plain_names(tensors)
    head = plain.pop('lm_head.weight', None)
    if head is not None and not np.array_equal(head, plain.get('wte.weight')):
        raise UserError(
            'lm_head.weight differs from wte.weight: the output head is untied, but the head of '
            'GPT-2 is the token embedding itself'
        )
    for name, tensor in plain.items():
        if tensor.dtype.name not in ('float32', 'float16', 'bfloat16'):
            problem = f'is of {tensor.dtype.name}: expected float32, float16 or bfloat16'
            raise foreign.error(name, problem)
        if not np.isfinite(tensor).all():
            raise foreign.error(name, 'holds values that are not finite', 'fetch the file again')
    first = plain.get('h.0.attn.c_attn.weight')
    if first is not None and first.shape == (3 * cfg.n_embd, cfg.n_embd):  # (out, in)
        plain = {
            name: tensor.T if re.fullmatch(r'h\.\d+\.\w+\.c_\w+\.weight', name) else tensor
            for name, tensor in plain.items()
        }
    if not cfg.bias:
        plain = {
            name: tensor
            for name, tensor in plain.items()
            if name in table or not name.endswith('.bias') or tensor.any()
        }
    _check_names_and_shapes(plain, table)
    params = {}
    for name, (path, shape, _) in table.items():
        *parts, last = path.split('/')
        node = params
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = np.ascontiguousarray(plain[name], np.float32).reshape(shape)
    return params


def _plain_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without prefixes before their names, and without the causal masks."""
    plain = {
        re.sub(r'^(_orig_mod\.|module\.)*(transformer\.)?(_orig_mod\.)?', '', name): tensor
        for name, tensor in tensors.items()
    }
    if len(plain) < len(tensors):
        raise UserError(
            'the weights hold the same tensor twice, with and without "transformer." before its '
            'name'
        )
    masks = re.compile(r'h\.\d+\.attn\.(masked_)?bias')  # and the number that masked_ fills in
    return {name: tensor for name, tensor in plain.items() if not masks.fullmatch(name)}


def _check_names_and_shapes(plain, table) -> None:
    """Raises UserError, naming tensors that are missing, unknown or of another shape."""
    shapes = [
        f'{name} is {plain[name].shape}, expected {shape}'
        for name, (_, _, shape) in table.items()
        if name in plain and plain[name].shape != shape
    ]
    wrong = [
        _list_first('missing', sorted(table.keys() - plain.keys())),
        _list_first('not of this model', sorted(plain.keys() - table.keys())),
        _list_first('of another shape', shapes),
    ]
    if any(wrong):
        raise foreign.error('the weights', f'do not fit {CONFIG}: {"; ".join(filter(None, wrong))}')


def _list_first(title: str, entries: list[str]) -> str:
    more = f' and {len(entries) - 3} more' if entries[3:] else ''
    return f'{title}: {", ".join(entries[:3])}{more}' if entries else ''


def export_params(params, cfg: GPT2Config) -> dict[str, np.ndarray]:
    """Published tensors, fp32, under transformers' own names.

    If cfg.bias is False, all biases are present and 0, because GPT-2 has them.
    """
    tensors = {}
    for name, (path, _, shape) in _published(cfg).items():
        leaf = params
        for part in path.split('/'):
            leaf = leaf[part]
        name = f'transformer.{name}'
        tensors[name] = np.ascontiguousarray(leaf, np.float32).reshape(shape)
        if not cfg.bias and not path.startswith(('wte', 'wpe')):
            tensors[f'{name.removesuffix("weight")}bias'] = np.zeros(shape[-1], np.float32)
    return tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors into a folder that exists."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', 'utf-8')
    # save_file writes memory as it is laid out, and would scramble any order but C.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    try:
        save_file(tensors, folder / WEIGHTS, metadata={'format': 'pt'})
        # save_file's file is readable by its owner only.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    except SafetensorError as error:
        raise UserError(f'{folder / WEIGHTS} could not be written: {error}') from None
