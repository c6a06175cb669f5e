"""The logs of a run: whole whatever happens to them, readable on a terminal, light to load."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import runs
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gpt2_jax import cli
from gpt2_jax.terminal import printable
from gpt2_jax.workdir.log import GrowingFile, Logger


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self):
        return True


def test_the_logs_load_neither_torch_nor_tensorflow(tmp_path):
    """Where these are installed, their import takes seconds."""
    for name in ('torch', 'tensorflow'):
        (tmp_path / f'{name}.py').write_text('')
    program = (
        f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import gpt2_jax.workdir.log; '
        "sys.exit(bool({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.parametrize('how', ['removed', 'replaced'])
def test_a_log_that_is_removed_while_it_is_written(how, tmp_path, capsys):
    with Logger(tmp_path, 0, 9, {}) as log:
        log.record(1, 'train', {'loss': 1.0})
        log.sample(1, 'text')
        shutil.rmtree(tmp_path / 'tensorboard')
        for name in ('metrics.jsonl', 'samples.txt'):
            (tmp_path / name).unlink()
            if how == 'replaced':
                (tmp_path / name).write_text('other')
        log.record(2, 'train', {'loss': 2.0})
        log.flush()
        log.record(3, 'train', {'loss': 3.0})
        log.flush()
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3]
    assert (tmp_path / 'samples.txt').read_text() == '=== step 1 ===\ntext\n\n'
    found = runs.events(tmp_path)
    assert {key: n for key, n in found.items() if key[1]} == {
        ('sample', 1): 1,
        **{('train/loss', step): 1 for step in (1, 2, 3)},
    }
    assert capsys.readouterr().out.count('it is written again, complete') == 3


def test_what_tensorboard_shows(tmp_path):
    """Settings and layout once, samples as they are, losses in one chart, no flat lines."""
    settings = {'train.steps': 9, 'model.bias': True, 'data.corpus': 'a'}
    for start in (0, 3):
        with Logger(tmp_path, start, 9, settings) as log:
            log.record(start + 1, 'val', {'loss': 1.5, 'mfu': None, 'tokens': 5, 'bytes': 5})
            log.sample(start + 1, '# no title\n\n  end')
    found = {}
    for step, value in runs.event_values(tmp_path):
        found.setdefault(value.tag, []).append((step, value))
    assert {tag: [step for step, _ in values] for tag, values in found.items()} == {
        '_hparams_/session_start_info': [0],
        'custom_scalars__config__': [0],
        'val/loss': [1, 4],
        'sample': [1, 4],
    }
    (_, hparams), (_, layout), (_, sample) = (
        found[tag][0] for tag in list(found) if tag != 'val/loss'
    )
    content = HParamsPluginData.FromString(hparams.metadata.plugin_data.content)
    written = content.session_start_info.hparams
    assert {name: written[name].WhichOneof('kind') for name in written} == {
        'train.steps': 'number_value',
        'model.bias': 'bool_value',
        'data.corpus': 'string_value',
    }
    assert written['train.steps'].number_value == 9
    (chart,) = Layout.FromString(layout.tensor.string_val[0]).category[0].chart
    assert list(chart.multiline.tag) == ['train/loss', 'val/loss']
    assert sample.metadata.plugin_data.plugin_name == 'text'
    assert sample.tensor.string_val[0] == b'    # no title\n    \n      end'


def test_a_log_that_is_cut_short_while_it_is_written(tmp_path, capsys):
    with Logger(tmp_path, 0, 9, {}) as log:
        log.record(1, 'train', {'loss': 1.0})
        (tmp_path / 'metrics.jsonl').write_text('')
        log.record(2, 'train', {'loss': 2.0})
        log.flush()
        log.flush()
    assert json.loads((tmp_path / 'metrics.jsonl').read_text())['step'] == 2
    assert capsys.readouterr().out.count('metrics.jsonl was cut short by another program') == 1


def test_in_a_folder_that_was_moved_no_log_is_written_again(tmp_path):
    (tmp_path / 'run').mkdir()
    with Logger(tmp_path / 'run', 0, 9, {}) as log:
        (tmp_path / 'run').rename(tmp_path / 'old')
        (tmp_path / 'run').mkdir()
        log.record(1, 'train', {'loss': 1.0})
    assert not any((tmp_path / 'run').iterdir())
    assert (tmp_path / 'old/metrics.jsonl').read_text()


def test_an_error_at_closing_is_raised_once_all_are_closed(tmp_path, monkeypatch):
    """A network file system may report only then that a log could not be written."""
    closed, really_close = [], GrowingFile.close

    def close(file):
        really_close(file)
        closed.append(file)
        raise OSError(122, 'Disk quota exceeded')

    monkeypatch.setattr(GrowingFile, 'close', close)
    with pytest.raises(OSError, match='quota'), Logger(tmp_path, 0, 9, {}):
        pass
    assert len(closed) == 3


def test_what_a_run_is_busy_with(tmp_path, monkeypatch, capsys):
    """A terminal has one line, which moves while nothing else does; a log has lines."""
    with Logger(tmp_path, 0, 9, {}) as log:
        log.work('compiling')
        log.progress(2, 9, 1.5, 1000.0, 70.0)
    assert capsys.readouterr().out == (
        'compiling\nstep 2/9: loss 1.500, 1,000 tokens/s, 1 min 10 s left\n'
    )
    monkeypatch.setattr(sys, 'stdout', Terminal())
    with Logger(tmp_path, 0, 9, {}) as log:
        log.work('compiling')
    shown = sys.stdout.getvalue()
    assert 'compiling' in shown
    assert '0:00:00' in shown


@pytest.mark.parametrize('tail', ['\x1b]0;title\x07', '\x1b[2J', '\x9b31m', '\r', '\u202e'])
def test_a_terminal_does_not_obey_a_sample(tail, tmp_path, monkeypatch):
    """The file keeps the text as it is."""
    text = f'To be,\n\tor ü {tail} not'
    monkeypatch.setattr(sys, 'stdout', Terminal())
    with Logger(tmp_path, 0, 9, {}) as log:
        log.sample(1, text)
    assert (tmp_path / 'samples.txt').read_bytes().decode() == f'=== step 1 ===\n{text}\n\n'
    shown = sys.stdout.getvalue()
    assert text.replace(tail, tail.encode('unicode_escape').decode()).expandtabs() in shown
    assert tail not in shown or tail == '\r'  # rich moves the cursor itself


def test_text_is_changed_for_a_terminal_alone():
    text = '\x1b[2J\n\t\u3000a\u00a0b \N{FAMILY}\u200d'
    assert printable(text, io.StringIO()) == text
    assert printable(text, None) == text
    assert printable(text, Terminal()) == text.replace('\x1b', r'\x1b')


def test_a_terminal_does_not_obey_the_progress_of_scripts(monkeypatch):
    """A folder's name may hold them."""
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    cli.notify('step 2 of runs/\x1b[2Ja')
    assert terminal.getvalue() == '[step 2 of runs/\\x1b[2Ja]\n'
