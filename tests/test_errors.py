"""Wrong input of any kind gives one line on stderr with the remedy, and never a traceback."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
import urllib.error

import jax
import pytest
import runs

from gpt2_jax.workdir import folder
from gpt2_jax.workdir.checksums import FOLDER, all_steps

STEPS = runs.SMALL['train.steps']
CONFIG = """from gpt2_jax.config import default_config


def get_config():
    config = default_config()
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A folder with files of every wrong kind, and a finished run."""
    folder = tmp_path_factory.mktemp('made')
    text = runs.write_text(folder / 'text.txt')
    (folder / 'latin1.txt').write_bytes('Ein Käse\n'.encode('latin-1') * 99)
    (folder / 'empty.txt').touch()
    (folder / 'short.txt').write_text('to be or not to be')
    (folder / 'empty').mkdir()
    (folder / 'begun' / FOLDER).mkdir(parents=True)
    (folder / 'begun' / 'config.json').touch()
    (folder / 'unfinished' / FOLDER / '10.damaged').mkdir(parents=True)
    (folder / 'unfinished' / 'config.json').touch()
    for name, line in (
        ('fine', 'pass'),
        ('typo', 'config.train.stepz = 3'),
        ('section', 'config.trian.steps = 3'),
        ('type', "config.train.steps = 'many'"),
        ('whole section', 'config.train = 3'),
        ('bug', 'config.train.steps = 1 // 0'),
    ):
        (folder / f'{name}.py').write_text(f'{CONFIG}    {line}\n    return config\n')
    (folder / 'nothing.py').write_text(f'{CONFIG}    config.train.steps = 3\n')
    (folder / 'other_name.py').write_text(f'{CONFIG}    return config\n'.replace('get_', ''))
    (folder / 'dict.py').write_text('def get_config():\n    return {"train": 3}\n')
    (folder / 'syntax.py').write_text('def get_config(:\n')
    assert runs.quiet_train(runs.make_config(text), folder / 'run')[0] == 0
    damaged = shutil.copytree(folder / 'run', folder / 'damaged') / FOLDER / str(STEPS)
    (damaged / 'params/_METADATA').write_text('{}')
    assert (
        runs.script(
            'prepare', f'--input={text}', f'--out_dir={folder}/shards', '--shard_tokens=3000'
        )[0]
        == 0
    )
    assert (
        runs.script('prepare', f'--input={text}', f'--out_dir={folder}/bytes', '--tokenizer=byte')[
            0
        ]
        == 0
    )
    (folder / 'passages.jsonl').write_text('{"text": "ba bo"}\n{"text": "ba\n')
    (folder / 'other_field.jsonl').write_text('{"body": "ba bo"}\n')
    shard = shutil.copytree(folder / 'shards', folder / 'damaged_shard') / 'train_00001.npy'
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return folder


def train(*changes, config='fine', corpus='text.txt', workdir='new'):
    """The arguments of a run in the folder `made`, written {made}."""
    settings = [f'--config.{key}={value}' for key, value in runs.SMALL.items()]
    return (
        'train',
        f'--config={{made}}/{config}.py',
        *settings,
        f'--config.data.corpus={{made}}/{corpus}',
        f'--workdir={{made}}/{workdir}',
        *changes,
    )


def evaluate(*options):
    return ('evaluate', '--ckpt_dir={made}/run', *options)


def sample(*options, run='run'):
    return ('sample', f'--ckpt_dir={{made}}/{run}', *options)


NO_DROPOUT = ('--config.model.embd_pdrop=0', '--config.model.resid_pdrop=0')  # quick to compile

# the mistake -> (script and arguments, exit code, what the line must contain)
ROWS = {
    'mistyped flag': (train('--wrkdir=x'), 2, ['wrkdir', 'workdir']),
    'mistyped flag unlike any other': (train('--qqqqqqqqqq=x'), 2, ['see --help']),
    'setting without its section': (
        train('--steps=3'),
        2,
        ['there is no flag --steps; a setting is changed by --config.train.steps=..'],
    ),
    'mistyped --config of a setting': (
        train('--confg.eval.every=3'),
        2,
        ['by --config.eval.every=.. or --config.checkpoint.every=.. or --config.log.every=..'],
    ),
    'text for a number': (
        train('--config.optim.learning_rate=fast'),
        2,
        ['--config.optim.learning_rate=fast: not a number; expected optim.learning_rate (finite'],
    ),
    'mistyped setting': (
        train('--config.train.stepz=3'),
        2,
        [
            '--config.train.stepz',
            'the nearest is train.steps (int, at least 1 and below 2147483648)',
            'train has steps, batch_size, seq_len',
        ],
    ),
    'mistyped section': (
        train('--config.trian.steps=3'),
        2,
        ['the nearest is train.steps', 'data, eval, log, mesh'],
    ),
    'section for a setting': (
        train('--config.train=3'),
        2,
        ["no setting 'train'", 'train has steps'],
    ),
    'wrong type': (
        train('--config.train.steps=many'),
        2,
        ['train.steps=many: not a whole number; expected train.steps (int, at least 1 and b'],
    ),
    'neither true nor false': (
        train('--config.model.bias=maybe'),
        2,
        ['model.bias=maybe: neither True nor False; expected model.bias (bool, True or False)'],
    ),
    'value not allowed': (
        train('--config.model.dtype=float16'),
        2,
        ["model.dtype = 'float16' is not allowed", "'float32', 'tf32', 'bfloat16'"],
    ),
    'no configuration': (('train',), 2, ['--config is missing', '--config=configs/quickstart.py']),
    'a setting without a configuration': (
        ('train', '--config.train.steps=3'),
        2,
        ['--config is missing', '--config=configs/quickstart.py'],
    ),
    'mistyped --config': (
        ('train', '--confg={made}/fine.py', '--config.train.steps=3'),
        2,
        ['there is no flag --confg; did you mean --config?'],
    ),
    'a configuration that is no Python': (
        ('train', '--config={made}/run/config.json'),
        2,
        ['run/config.json is not a Python file', '--config=configs/quickstart.py'],
    ),
    'no configuration file': (
        train(config='nowhere'),
        2,
        ['nowhere.py', 'no such file', os.getcwd()],
    ),
    'setting before the configuration': (
        ('train', '--config.train.steps=3', '--config={made}/fine.py'),
        2,
        ['--config=FILE must come before'],
    ),
    'bug in a configuration file': (
        train(config='bug'),
        2,
        ['bug.py, line 6 (config.train.steps = 1 // 0)', 'ZeroDivisionError'],
    ),
    'mistyped setting in a file': (
        train(config='typo'),
        2,
        ['typo.py, line 6 (config.train.stepz = 3)', 'the nearest is train.steps'],
    ),
    'mistyped section in a file': (
        train(config='section'),
        2,
        ['section.py, line 6', 'the nearest is train.steps'],
    ),
    'wrong type in a file': (
        train(config='type'),
        2,
        [
            "type.py, line 6 (config.train.steps = 'many'): a value of type str cannot take the "
            'place of one of type int; expected train.steps (int, at least 1 and below 2147483648)'
        ],
    ),
    'number in the place of a section': (
        train(config='whole section'),
        2,
        ['line 6 (config.train = 3): a value of type int cannot take the place of one of type C'],
    ),
    'file without get_config': (
        train(config='other_name'),
        2,
        ['other_name.py has no function get_config()'],
    ),
    'file that returns a dict': (train(config='dict'), 2, ['dict.py: get_config() must return']),
    'syntax error in a file': (train(config='syntax'), 2, ['syntax.py', 'SyntaxError', 'line 1']),
    'file that returns nothing': (
        train(config='nothing'),
        2,
        ['nothing.py: get_config() must return'],
    ),
    'argument without a flag': (
        train('train.steps=3'),
        2,
        ["unexpected argument 'train.steps=3'", '--name=value'],
    ),
    'a folder without a flag': (
        train('{made}'),
        2,
        ["unexpected argument '", "': a run's folder is given as --workdir=/"],
    ),
    'heads that do not divide the width': (
        train('--config.model.n_head=5'),
        2,
        ['model.n_embd = 32', 'n_head = 5'],
    ),
    'more devices than there are': (
        train('--config.train.batch_size=512', '--config.mesh.data=512'),
        2,
        ['= 512 devices', 'JAX sees', 'JAX_NUM_CPU_DEVICES=512'],
    ),
    'no GPU': (train('--platform=gpu'), 2, ['--platform=gpu', 'nvidia-smi', '--platform=cpu']),
    'unknown corpus': (
        train('--config.data.corpus=tinyshakespear'),
        1,
        ["no corpus called 'tinyshakespear'", "did you mean 'tinyshakespeare'?"],
    ),
    'text that is not UTF-8': (
        train(corpus='latin1.txt'),
        1,
        ['latin1.txt is not UTF-8', '0xe4 at offset 5'],
    ),
    'empty text': (train(corpus='empty.txt'), 1, ['empty.txt is empty']),
    'text too short to train': (
        train(corpus='short.txt'),
        1,
        ['too few for train.seq_len = 16', 'needs 32'],
    ),
    'text too short to evaluate': (
        train('--config.data.val_fraction=0.0'),
        1,
        ['evaluation needs at least 2 tokens'],
    ),
    'folder that was not prepared': (
        train(corpus='empty'),
        1,
        ['not a prepared one', 'scripts/prepare.py'],
    ),
    'damaged shard': (train(corpus='damaged_shard'), 1, ['train_00001.npy is damaged', 'SHA-256']),
    'shards of another tokenizer': (
        train('--config.data.tokenizer=byte', corpus='shards'),
        2,
        ["tokenizer 'char'", '--config.data.tokenizer=char'],
    ),
    'folder that cannot be made': (
        train(workdir='text.txt/run'),
        1,
        ['text.txt/run', 'Not a directory', '--workdir'],
    ),
    'folder that is a file': (
        train(workdir='text.txt'),
        2,
        ['text.txt is a file: expected the folder of a run'],
    ),
    'folder of another configuration': (
        train('--config.train.seed=1', workdir='run'),
        2,
        ['train.seed: 0 there, 1 now', '--workdir', '--fresh'],
    ),
    'out of memory': (
        train('--config.model.n_embd=3200000', *NO_DROPOUT),
        1,
        [
            'out of memory',
            'GiB',
            'train.batch_size',
            'train.grad_accum_steps',
            'seq_len',
            'model.remat',
        ],
    ),
    'out of memory for a batch': (
        train('--config.train.batch_size=2000000000'),
        1,
        ['out of memory', 'batch_size'],
    ),
    'no checkpoint': (sample(run='empty'), 1, ['empty holds no checkpoint', 'scripts/train.py']),
    'no folder': (sample(run='nowhere'), 1, ['nowhere: no such folder']),
    'folder with a wrong letter': (
        sample(run='damagd'),
        1,
        ['damagd: no such folder; did you mean', '/damaged?'],
    ),
    'file in the place of a run': (
        sample(run='text.txt'),
        1,
        ['text.txt is a file: expected the folder of a run, with', 'scripts/train.py --workdir'],
    ),
    'file in a run': (
        sample(run='run/config.json'),
        1,
        ['config.json is a file: expected the folder of a run, such as', '/run'],
    ),
    'run without a checkpoint': (
        sample(run='begun'),
        1,
        ['begun has no checkpoint yet: it saves the first one at its first evaluation'],
    ),
    'run with damaged checkpoints only': (
        sample(run='unfinished'),
        1,
        ['unfinished has no whole checkpoint: those in its checkpoints are damaged or unfinished'],
    ),
    'folder around runs': (sample(run='.'), 1, ['such as', '/damaged or', '/run']),
    'folder in a run': (
        sample(run=f'run/{FOLDER}'),
        1,
        ['checkpoints holds no checkpoint', 'the folder of a run, such as', '/run'],
    ),
    'checkpoint that is not there': (
        sample('--step=7'),
        1,
        ["no checkpoint '7'", "it has 15, 18; or give 'best' or 'latest'"],
    ),
    'damaged checkpoint': (
        sample(run='damaged'),
        1,
        [f"{STEPS} cannot be used: 'params/_METADATA' is not as it was saved", 'try --step=15'],
    ),
    'unknown character in a prompt': (
        sample('--prompt=ba Zu'),
        1,
        ["unknown character 'Z' (U+005A) at position 3", 'alphabet of 12', 'abdefgiou'],
    ),
    'two prompts': (
        sample('--prompt=ba', '--prompt_file={made}/text.txt'),
        2,
        ['--prompt and --prompt_file'],
    ),
    'two texts for the lens': (
        ('lens', 'show', '--ckpt_dir={made}/run', '--prompt=ba', '--prompt_file={made}/text.txt'),
        2,
        ['--prompt and --prompt_file'],
    ),
    'empty head': (
        ('lens', 'show', '--ckpt_dir={made}/run', '--prompt=ba', '--head='),
        2,
        ["'' is not a head", 'h_0.attn.2'],
    ),
    'no prompt file': (sample('--prompt_file={made}/nowhere'), 1, ['nowhere', 'No such file']),
    'prompt that is not UTF-8': (
        sample('--prompt_file={made}/latin1.txt'),
        2,
        ['latin1.txt is not UTF-8', 'offset 5'],
    ),
    'strict context': (
        sample('--strict_context', '--prompt=ba', '--max_new_tokens=16'),
        2,
        ['2 prompt tokens and 16 new ones', 'context of 16'],
    ),
    'negative temperature': (
        sample('--temperature=-1'),
        2,
        ['temperature = -1', '0 (greedy) or more'],
    ),
    'zero samples': (sample('--num_samples=0'), 2, ['num_samples=0', 'positive integer']),
    'missing --ckpt_dir': (('sample',), 2, ['--ckpt_dir is missing']),
    'unknown split': (evaluate('--split=test'), 2, ['split=test', 'val|train']),
    'evaluation without a checkpoint': (
        ('evaluate', '--ckpt_dir={made}/empty'),
        1,
        ['holds no checkpoint'],
    ),
    'no text to score': (
        evaluate('--text={made}/nowhere.txt'),
        1,
        ['no text file and no corpus called'],
    ),
    'documents without the field': (
        evaluate('--text={made}/other_field.jsonl'),
        1,
        ["line 1 has no text in 'text'"],
    ),
    'tokens of another tokenizer to score': (
        evaluate('--text={made}/bytes'),
        2,
        ["another tokenizer, byte of 256 tokens, than the checkpoint's, char of 12"],
    ),
    'token files for a tokenizer of characters': (
        evaluate('--text={made}/*.bin'),
        2,
        ['files of GPT-2 tokens', "'char'"],
    ),
    'split of a text': (
        evaluate('--text={made}/text.txt', '--split=train'),
        2,
        ['--split is for prepared folders'],
    ),
    'empty name of a text to score': (evaluate('--text='), 2, ['--text is empty']),
    'two things to score': (
        evaluate('--text={made}/text.txt', '--lambada={made}/passages.jsonl'),
        2,
        ['--text means nothing with --lambada'],
    ),
    'stride for passages': (
        evaluate('--lambada={made}/passages.jsonl', '--stride=4'),
        2,
        ['--stride means nothing with --lambada'],
    ),
    'de-tokenizer for its own corpus': (
        evaluate('--detokenizer=ptb'),
        2,
        ['means nothing without --text'],
    ),
    'unknown de-tokenizer': (
        evaluate('--text={made}/text.txt', '--detokenizer=penn'),
        2,
        ['detokenizer=penn', 'ptb'],
    ),
    'damaged passages': (
        evaluate('--lambada={made}/passages.jsonl'),
        1,
        ['passages.jsonl, line 2 cannot be read as JSON'],
    ),
    'passages of an unknown format': (
        evaluate('--lambada={made}/text.txt'),
        2,
        ['text.txt is not a file of passages'],
    ),
    'flag of another measurement': (
        ('benchmark', '--config={made}/fine.py', '--what=startup', '--top_k=3'),
        2,
        ['--top_k means nothing with --what=startup'],
    ),
    'seconds that are not a number': (
        ('benchmark', '--config={made}/fine.py', '--seconds=nan'),
        2,
        ['--seconds=nan', 'expected a finite number'],
    ),
    'loss that is not a number': (
        ('benchmark', '--config={made}/fine.py', '--what=time-to-loss', '--loss=nan'),
        2,
        ['--loss=nan', 'expected a finite number'],
    ),
    'memory fraction that is not a number': (
        ('plan', '--config={made}/fine.py', '--memory_fraction=nan'),
        2,
        ['--memory_fraction=nan', 'expected a finite number'],
    ),
    'no input': (('prepare', '--out_dir={made}/out'), 2, ['--input is missing']),
    'input that is not there': (
        ('prepare', '--input={made}/nowhere.txt', '--out_dir={made}/out'),
        1,
        ['nowhere.txt', 'No such file'],
    ),
    'output that is there': (
        ('prepare', '--input={made}/text.txt', '--out_dir={made}/shards'),
        1,
        ['shards exists and is not an empty folder'],
    ),
    'unknown tokenizer': (
        ('prepare', '--input={made}/text.txt', '--out_dir={made}/out', '--tokenizer=word'),
        2,
        ['tokenizer=word', 'char|byte'],
    ),
}


def check(code, err, expected, fragments, others=0):
    """stderr ends with the one line of the error, after `others` lines that are not errors."""
    # sample.py prints its device in brackets, and a slow machine how long something takes.
    lines = [line for line in err.splitlines() if not re.match(r'\[|[a-z ]+, \d+ s$', line)]
    assert code == expected, err
    assert 'Traceback' not in err
    assert len(lines) == 1 + others, err
    assert [line.startswith('error: ') for line in lines] == [False] * others + [True], err
    assert all(fragment in lines[-1] for fragment in fragments), lines[-1]


@pytest.mark.parametrize('what', ROWS)
def test_wrong_input(what, made):
    if what == 'no GPU' and jax.default_backend() != 'cpu':
        pytest.skip('there is one')
    (script, *arguments), expected, fragments = ROWS[what]
    code, _, err = runs.script(script, *(argument.format(made=made) for argument in arguments))
    check(code, err, expected, fragments)
    # Nothing is saved, and no folder is made unless memory runs out in the first step.
    assert not all_steps(made / 'new' / FOLDER)
    assert (made / 'new').exists() <= (what == 'out of memory')
    shutil.rmtree(made / 'new', ignore_errors=True)


def run_train(made, workdir, *changes):
    script, *arguments = train(*changes)
    return runs.script(
        script, *(argument.format(made=made) for argument in arguments), f'--workdir={workdir}'
    )


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and no local copy of any corpus."""

    def no_network(*args, **options):
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setattr('urllib.request.urlopen', no_network)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('GPT2_JAX_DATA_DIR', raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_corpus_that_can_neither_be_found_nor_downloaded(made, tmp_path, offline):
    code, _, err = run_train(made, tmp_path / 'run', '--config.data.corpus=tinyshakespeare')
    check(
        code,
        err,
        1,
        [
            'no local copy of tinyshakespeare',
            'Name or service not known',
            'data/tinyshakespeare/input',
            'GPT2_JAX_DATA_DIR',
            'data.corpus',
            'https://',
        ],
        others=1,  # it says that it is downloading
    )


def test_fallback_is_announced_recorded_and_kept(made, tmp_path, offline, monkeypatch):
    code, out, err = run_train(
        made,
        tmp_path / 'run',
        '--config.data.corpus=tinyshakespeare',
        '--config.data.fallback=python-topics',
        '--config.data.val_fraction=0.001',
        '--config.train.steps=1',
        '--config.eval.sample_tokens=0',
        *NO_DROPOUT,
    )
    assert code == 0
    assert "trains on 'python-topics' instead (the help texts inside Python)" in out
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['corpus']['fallback']
    assert summary['corpus']['name'] == 'python-topics'
    # With a network, too, it is evaluated on the text that it was trained on.
    monkeypatch.setattr('gpt2_jax.data.corpora._download', lambda name: made / 'text.txt')
    code, out, err = runs.script('evaluate', f'--ckpt_dir={tmp_path}/run', '--json')
    assert code == 0, err
    assert repr(summary['best_val_loss']) in out


def test_an_output_that_cannot_be_written_is_not_blamed_on_the_folder(made, tmp_path, monkeypatch):
    """As in `train.py > train.log` on a full disk, here after the folder was claimed."""
    from gpt2_jax import terminal

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(terminal, 'print', full, raising=False)
    code, _, err = run_train(made, tmp_path / 'run')
    check(code, err, 1, ['cannot write to standard output: No space left', 'the same command'])


def test_a_second_run_in_the_same_folder(made, tmp_path):
    with folder.claim(tmp_path):
        code, _, err = run_train(made, tmp_path)
        check(code, err, 1, ['another run is using', f'process {os.getpid()}', '--workdir'])
        code, _, err = run_train(made, tmp_path, '--fresh')
        check(code, err, 1, ['another run is using'])


def test_a_disk_without_room_for_a_checkpoint(made, tmp_path, monkeypatch):
    """Said before the run, or by the save that finds no room."""

    def disk(*free):
        """Free bytes at each look, the last of them from then on."""
        looks = itertools.chain(free, itertools.repeat(free[-1]))
        monkeypatch.setattr(
            'shutil.disk_usage', lambda path: types.SimpleNamespace(free=next(looks))
        )

    disk(1000)
    code, out, err = run_train(made, tmp_path)
    check(code, err, 1, ['no room for a checkpoint: it takes 0.2 MiB', '0.0 MiB', '--workdir'])
    assert 'little room' not in out
    assert not (tmp_path / 'metrics.jsonl').exists()
    disk(500_000, 500_000, 1000)  # something else fills it after the start
    code, out, err = run_train(made, tmp_path)
    assert 'little room: there will be 4 more checkpoints of 0.2 MiB' in out
    words = ['checkpoint 5 could not be saved', 'it takes 0.2 MiB', '0.0 MiB left', 'none yet']
    check(code, err, 1, words)


def test_a_run_that_lacks_its_summary_alone_needs_no_room_for_a_checkpoint(
    made, tmp_path, monkeypatch
):
    run = tmp_path / 'run'
    shutil.copytree(made / 'run', run)
    (run / 'summary.json').unlink()
    monkeypatch.setattr('shutil.disk_usage', lambda path: types.SimpleNamespace(free=1000))
    code, _, err = run_train(made, run)
    assert (code, err) == (0, '')
    assert (run / 'summary.json').exists()


@pytest.mark.parametrize(
    ('kilobytes', 'fragments'),
    [
        (1, ['the run cannot write', 'File too large']),  # the logs do not fit
        (
            30,
            [
                'checkpoint 5 could not be saved',
                'File too large',
                'there is none yet',
                'the same command',
            ],
        ),
    ],
)
def test_a_full_disk(kilobytes, fragments, made, tmp_path, monkeypatch):
    """A limit on the size of any file stands in for a full disk."""
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)  # Python would leave half of a module
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    try:
        code, _, err = run_train(made, tmp_path / 'run', '--config.log.every=1')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check(code, err, 1, fragments)
    assert not any((tmp_path / 'run' / FOLDER).iterdir())  # the failed save was removed


# A Ctrl-C arrives in a callback of the garbage collector, such as the callback of JAX.
CTRL_C_IN_A_CALLBACK = """
import gc, os, signal, time
from gpt2_jax import cli

def callback(phase, info):
    gc.callbacks.remove(callback)
    os.kill(os.getpid(), signal.SIGINT)

def main(arguments):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run(main)
"""


def test_a_ctrl_c_that_python_drops_is_sent_again():
    ended = subprocess.run(
        [sys.executable, '-c', CTRL_C_IN_A_CALLBACK], capture_output=True, text=True, timeout=50
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, '', '')
