"""Published weights into the folder of a run, and a checkpoint into a published folder."""

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gpt2_jax import config as config_lib
from gpt2_jax import files, foreign
from gpt2_jax.architecture import VOCAB_MULTIPLE, GPT2Config
from gpt2_jax.data import tokenizers, vocabulary
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import Gpt2Tokenizer, Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.model import huggingface
from gpt2_jax.model.params import count_params
from gpt2_jax.training.setup import build
from gpt2_jax.training.step import init_state
from gpt2_jax.workdir import checkpoints as checkpoints_lib
from gpt2_jax.workdir import checksums, history, restore

# Not `tokenizer.json`: transformers would read that in a form of its own.
OUR_TOKENIZER = 'gpt2_jax_tokenizer.json'
# In the tokenizer.json of transformers each merge is 'left right', or a pair.
MERGE = foreign.Check(
    'a merge of two tokens',
    lambda v: (
        isinstance(v, str)
        or (isinstance(v, list) and len(v) == 2 and all(isinstance(part, str) for part in v))
    ),
)
MAX_PADDING = VOCAB_MULTIPLE - 1  # rows of wte that may belong to no token
HUB_FILES = (huggingface.CONFIG, huggingface.WEIGHTS, 'vocab.json', 'merges.txt')
HUB_SECONDS = 10  # to wait for an answer


def from_hf(
    source: str,
    ckpt_dir: Path,
    tokenizer_file: str | None = None,
    notify: Callable[[str], None] = print,
) -> None:
    """Writes published weights, from a folder or from the hub, as the folder of a run at step 0.

    The tokenizer comes from `tokenizer_file`, or from the published folder. Raises UserError for
    weights, a configuration or a tokenizer that cannot be read or do not fit each other.
    """
    folder = files.user_path(source)
    is_name = not folder.exists() and re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', source)
    folder = download(source) if is_name else folder
    published, tensors = huggingface.read_folder(folder)
    settings = huggingface.import_config(published)
    vocab_size, tokenizer = settings.pop('vocab_size'), read_tokenizer(folder, tokenizer_file)
    config = config_lib.default_config()
    config.model.update(settings)
    config.data.tokenizer = tokenizer.name
    config = config_lib.resolve(config)
    params = huggingface.import_params(tensors, GPT2Config(**config.model, vocab_size=vocab_size))
    _refuse_added_tokens(folder, tokenizer)
    padding = vocab_size - tokenizer.vocab_size
    if not 0 <= padding <= MAX_PADDING:
        raise UserError(
            f'the weights of {source} are for {vocab_size:,} tokens, but the {tokenizer.name} '
            f'tokenizer has {tokenizer.vocab_size:,}: give the tokenizer they were trained with as '
            '--tokenizer=FILE'
        )
    if padding:
        notify(
            f'the last {padding} rows of wte belong to no token and are dropped: they were padding'
        )
        params['wte']['embedding'] = params['wte']['embedding'][: tokenizer.vocab_size]
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(leaf)
    # Converted weights have no corpus. This placeholder identity stops train.py from resuming the
    # folder as a run.
    origin = Dataset(
        history.PUBLISHED + source, tokenizer, Tokens(()), Tokens(()), digest.hexdigest()
    )
    setup = build(config, origin)
    meta = {
        'config': config_lib.to_json(config),
        'tokenizer': tokenizers.to_json(tokenizer),
        'progress': {},
        'log_sizes': {},
        'corpus': {
            'asked_for': source,
            'name': origin.name,
            'sha256': origin.sha256,
            'fallback': False,
        },
    }
    with (
        files.new_folder(ckpt_dir) as partial,
        checkpoints_lib.Checkpoints(partial / checksums.FOLDER) as checkpoints,
    ):
        checkpoints.save(0, init_state(params, setup.optimizer), meta, None)
        (partial / 'config.json').write_text(meta['config'], 'utf-8')
        (partial / 'tokenizer.json').write_text(meta['tokenizer'], 'utf-8')
        checkpoints.wait()
    notify(
        f'wrote {ckpt_dir}: {count_params(params):,} parameters in fp32, {tokenizer.name} '
        'tokenizer\n'
        f'sample from it: python scripts/sample.py --ckpt_dir={shlex.quote(str(ckpt_dir))}'
    )


def to_hf(ckpt_dir: Path, which: str, out: Path, notify: Callable[[str], None] = print) -> None:
    """Writes a checkpoint ('best', 'latest' or a step) in the published form, with its tokenizer.

    Raises UserError for a checkpoint that cannot be read or a folder that cannot be written.
    """
    restored = restore.load(ckpt_dir, which)
    cfg, tokenizer = restored.model.cfg, restored.tokenizer
    texts = tokenizer.hub_files()
    about = {'model_max_length': cfg.n_positions, 'clean_up_tokenization_spaces': False}
    if isinstance(tokenizer, Gpt2Tokenizer):
        special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>')
        about |= {'tokenizer_class': 'GPT2Tokenizer', 'add_prefix_space': False, **special}
    else:
        about['tokenizer_class'] = 'PreTrainedTokenizerFast'
        texts[OUR_TOKENIZER] = tokenizers.to_json(tokenizer)
    texts['tokenizer_config.json'] = json.dumps(about)
    with files.new_folder(out) as partial:
        huggingface.write_folder(
            partial,
            huggingface.export_config(cfg, tokenizer.separator),
            huggingface.export_params(restored.params, cfg),
        )
        for name, text in texts.items():
            (partial / name).write_text(text, 'utf-8')
    if not cfg.bias:
        notify(
            'the model has no biases, but GPT-2 has: zeros were written, which changes no output'
        )
    notify(
        f'wrote {out}: step {restored.step}, {count_params(restored.params):,} parameters in fp32, '
        f'{tokenizer.name} tokenizer'
    )


def read_tokenizer(folder: Path, file: str | None) -> Tokenizer:
    """The tokenizer in `file`, ours as JSON or GPT-2's merges, or else the one in `folder`."""
    names = [OUR_TOKENIZER, *vocabulary.NAMES, 'tokenizer.json']
    path = (
        files.user_path(file)
        if file
        else next((folder / name for name in names if (folder / name).exists()), None)
    )
    if path is None:
        raise UserError(
            f'{folder} has no tokenizer: expected {" or ".join(names)} there; or give one as '
            '--tokenizer=FILE, such as the tokenizer.json of a run or of a prepared folder'
        )
    if path.suffix != '.json':
        return Gpt2Tokenizer(vocabulary.read_merges(path))
    text = foreign.read_text(path)
    content = foreign.parse_json(text, path, {'model': foreign.Maybe({'merges': [MERGE]})})
    if content.get('model') is None:
        return tokenizers.from_json(text, path)
    merges = ''.join(
        f'{merge if isinstance(merge, str) else " ".join(merge)}\n'
        for merge in content['model']['merges']
    )
    if hashlib.sha256(merges.encode()).hexdigest() != vocabulary.MERGES_SHA256:
        raise UserError(f"{path} does not hold GPT-2's merges: it is another tokenizer")
    return Gpt2Tokenizer(merges)


def _refuse_added_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError if the folder adds tokens after the last token of our tokenizer.

    Their rows of wte look like padding, but a model without them has lost part of its training.
    """
    added = huggingface.read_added_tokens(folder)
    lost = {text: number for text, number in added.items() if number >= tokenizer.vocab_size}
    if lost:
        names = ', '.join(f'{text!r} ({number})' for text, number in list(lost.items())[:3])
        more = f' and {len(lost) - 3} more' if len(lost) > 3 else ''
        raise foreign.error(
            folder,
            f'adds tokens to its tokenizer: {names}{more}',
            f'the {tokenizer.name} tokenizer cannot add tokens, so this model cannot be imported',
        )


def download(name: str) -> Path:
    """Downloads a model of the hub into the hub's own cache; returns its folder.

    Each file is checked by the hash that the hub publishes. Raises UserError that says how else
    to get the files.
    """
    otherwise = (
        f'Otherwise fetch {", ".join(HUB_FILES)} from https://huggingface.co/{name}/tree/main into '
        'a folder, and give that folder'
    )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f'there is no folder {name}; to read it as a name on the hub, install huggingface_hub: '
            f"pip install -e '.[hub]'. {otherwise}"
        ) from None
    try:
        info = huggingface_hub.HfApi().model_info(name, files_metadata=True, timeout=HUB_SECONDS)
        wanted = (*HUB_FILES, huggingface.ADDED_TOKENS)
        listed = {file.rfilename: file for file in info.siblings if file.rfilename in wanted}
        paths = {
            file: Path(huggingface_hub.hf_hub_download(name, file, revision=info.sha))
            for file in listed
        }
    except Exception as error:  # no network, no such model, a proxy: the library has many errors
        text = ' '.join(str(error).split())[:200]
        raise UserError(
            f'there is no folder {name}, and it could not be downloaded from the hub '
            f'({type(error).__name__}: {text}). {otherwise}'
        ) from None
    for file, path in paths.items():
        if not _is_published(path, listed[file]):
            raise UserError(
                f'{path} is not the file that the hub publishes: delete it and run this again'
            )
    return paths[huggingface.CONFIG].parent if paths else Path(name)


def _is_published(path: Path, file: Any) -> bool:
    """Whether a file has the hash in the hub's list: SHA-256 for large files, git's for others."""
    if file.lfs:
        return files.sha256(path) == file.lfs.sha256
    data = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest() == file.blob_id
