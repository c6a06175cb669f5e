"""The documentation holds: every command runs or says that it does not, and every name exists."""

import ast
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import runs
import together
from absl import flags

from gpt2_jax import cli, config
from gpt2_jax.convert import OUR_TOKENIZER
from gpt2_jax.data import tokenizers

ROOT = Path(__file__).parents[1]
README, ARCHITECTURE = ROOT / 'README.md', ROOT / 'docs' / 'architecture.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md'))]
NOT_RUN = '# not run'
INSTALL = ('pip install -e .', 'pip install -e ".[test]"', 'pytest tests/')  # run by .ci/run

# The shape of tests/fixtures/tiny_gpt2, so that all commands share a few compiled programs.
CHARACTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n.,:;\'?!-"('
SIZES = {
    'model.n_layer': 2,
    'model.n_head': 3,
    'model.n_embd': 24,
    'model.n_positions': 32,
    'model.embd_pdrop': 0,
    'model.attn_pdrop': 0,
    'model.resid_pdrop': 0,
    'model.bias': True,
    'model.dtype': 'float32',
    'model.kernels': 'xla',
    'model.attention': 'xla',
    'data.tokenizer': 'char',
    'train.steps': 2,
    'train.batch_size': 4,
    'train.grad_accum_steps': 1,
    'train.probe': 0,
    'optim.implementation': 'optax',
    'optim.algorithm': 'adamw',
    'optim.average': 0,
    'optim.learning_rate': 1e-3,
    'optim.end_learning_rate': 1e-4,
    'optim.warmup_steps': 0,
    'optim.beta2': 0.99,
    'optim.weight_decay': 0.1,
    'eval.every': 2,
    'eval.sample_tokens': 0,
}
SETTINGS = [f'--config.{key}={value}' for key, value in SIZES.items()]
ONE_LAYER = ['--config.model.n_layer=1']  # quick to compile: no run of the README has that shape
# The last value of a flag counts: these come after the flags of a command and make it quick.
SHRUNKEN = {
    'train': SETTINGS,
    'benchmark': [*SETTINGS, '--windows=1', '--seconds=0'],
    'sample': ['--max_new_tokens=4', '--num_samples=1'],
    'evaluate': ['--batch_size=4'],
    'prepare': ['--tokenizer=char'],
    'convert': [],
    'lens report': ['--skip=jacobian,ablation,backward,curvature,shapes'],
    'lens show': [],
    'plan': [],
    'steps': ['--by_step=2'],  # find: up to the last step of the shrunken run
}


def commands(page: str) -> list[tuple[str, bool]]:
    """The commands in the ```bash blocks of a page, and whether each is to run."""
    found = []
    for block in re.findall(r'^```bash\n(.*?)^```', page, re.MULTILINE | re.DOTALL):
        for line in block.replace('\\\n', ' ').splitlines():
            line, marker, _ = line.partition(NOT_RUN)
            if line.strip() and not line.startswith('#'):
                found.append((line.strip(), not marker))
    return found


def split(command: str, variables: dict[str, str]) -> list[str]:
    """The words of a simple command, with $NAME replaced as a shell does."""
    for name, value in variables.items():
        command = re.sub(rf'\${name}\b', value, command)
    words = shlex.split(command)
    while words and re.match(r'[A-Z]\w*=', words[0]):  # JAX_PLATFORMS=cpu python ..
        words.pop(0)
    return words


def shrink(words: list[str]) -> tuple[str, list[str]]:
    """The name of a script and its flags at a shrunken size, for `python scripts/NAME.py FLAGS`."""
    name, arguments = Path(words[1]).stem, words[2:]
    shrunken = SHRUNKEN[f'lens {arguments[0]}' if name == 'lens' else name]
    if name in ('train', 'benchmark') and not any('data.corpus' in word for word in arguments):
        arguments = [*arguments, '--config.data.corpus=book1.txt']
    return name, [*arguments, *shrunken]


def run(words: list[str], page: Path) -> None:
    """Runs `python scripts/NAME.py FLAGS [> FILE]` at a shrunken size; it must succeed."""
    target = None
    if '>' in words:
        *words, _, target = words
    name, arguments = shrink(words)
    if name == 'train' and page == README:
        arguments += ONE_LAYER
    code, out, err = runs.script(name, *arguments)
    assert code == 0, f'{shlex.join(words)} ends with {code}: {err}'
    if target:
        Path(target).parent.mkdir(exist_ok=True)
        Path(target).write_text(out, 'utf-8')


def run_together(commands: list[list[str]], folder: Path) -> None:
    """Runs several `python scripts/train.py FLAGS` at once, in processes of their own."""
    address = f'127.0.0.1:{together.free_port()}'
    arguments = [
        [re.sub(r'127\.0\.0\.1:\d+', address, word) for word in shrink(words)[1]]
        for words in commands
    ]
    with together.Starter(folder) as starter:
        group = starter.start(arguments)
        codes = group.wait()
        assert codes == [0] * len(commands), '\n'.join(map(group.output, range(len(commands))))


def check_flags(words: list[str], monkeypatch) -> None:
    """Parses the flags of a command that is not run, and checks the values of its settings."""

    def parse(main):
        cli._parse(sys.argv)
        if 'config' in flags.FLAGS:
            config.resolve(flags.FLAGS['config'].value)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(cli, 'run', parse)
        assert runs.script(Path(words[1]).stem, *words[2:])[0] == 0


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with all files that the pages name, and the run of the README's first line."""
    folder = tmp_path_factory.mktemp('docs')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    text = CHARACTERS + runs.write_text(folder / 'verse.txt', words=900).read_text('utf-8')
    for name in ('book1.txt', 'book2.txt', 'verse.txt'):
        (folder / name).write_text(text, 'utf-8')
    document = json.dumps({'text': text}) + '\n'
    (folder / 'web.jsonl').write_text(document, 'utf-8')
    (folder / 'passages.jsonl').write_text(json.dumps({'text': 'so be it'}) + '\n', 'utf-8')
    published = folder / 'downloads' / 'gpt2'
    shutil.copytree(ROOT / 'tests' / 'fixtures' / 'tiny_gpt2', published)
    tokenizer = tokenizers.make_tokenizer('char', text)
    assert tokenizer.vocab_size == 64
    (published / OUR_TOKENIZER).write_text(tokenizers.to_json(tokenizer), 'utf-8')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (line, _), *_ = commands(README.read_text('utf-8'))
        run(split(line.partition('&&')[2], {}), README)
    return folder


@pytest.mark.parametrize(
    'page',
    [README, *(pytest.param(page, marks=pytest.mark.long) for page in PAGES[1:])],
    ids=lambda page: page.name,
)
def test_every_command_runs_or_says_that_it_does_not(page, folder, tmp_path, monkeypatch):
    work, variables, background = tmp_path / 'work', {}, []
    shutil.copytree(folder, work, symlinks=True)
    monkeypatch.chdir(work)
    for line, is_run in commands(page.read_text('utf-8')):
        if assigned := re.fullmatch(r"(\w+)='([^']*)'", line):
            variables[assigned[1]] = assigned[2]
            continue
        for command in line.split(' && '):
            words = split(command, variables)
            if words[0] == 'python':
                assert (ROOT / words[1]).is_file(), line
            if words[-1] == '&':
                background.append(words[:-1])
            elif background:
                run_together([*background, words], tmp_path)
                background = []
            elif words[0] == 'python' and words[1].startswith('scripts/'):
                run(words, page) if is_run else check_flags(words, monkeypatch)
            elif page == README and command in INSTALL:
                check_installation(words)
            else:
                assert not is_run, f'{page.name}: mark this line with "{NOT_RUN}": {line}'
                check_installation(words)


def test_cluster_scripts_have_settings_that_exist(monkeypatch):
    """What srun and Kubernetes start in docs/scale.md: the flags exist, the mesh fits the batch."""
    page = (ROOT / 'docs' / 'scale.md').read_text('utf-8').replace('\\\n', ' ')
    blocks = re.findall(r'^```(?:sh|yaml)\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    commands = [
        re.search(r'python scripts/train\.py\s+(?:--\S+\s+)+', block)[0] for block in blocks
    ]
    assert len(commands) == 2
    monkeypatch.chdir(ROOT)
    for command in commands:
        words = command.replace('$JOB_COMPLETION_INDEX', '1').split()
        check_flags(words, monkeypatch)
        assert any('mesh.data' in word for word in words)


def check_installation(words: list[str]) -> None:
    """The extras of pip are in setup.py, and the paths of pytest exist."""
    setup = (ROOT / 'setup.py').read_text('utf-8')
    for word in words[1:]:
        if extras := re.fullmatch(r'\.\[([\w,]+)\]', word):
            for extra in extras[1].split(','):
                assert f"'{extra}': " in setup, f'setup.py has no extra {extra}'
        elif word.startswith('tests/'):
            assert (ROOT / word).exists(), word


def test_commands_are_found():
    page = (
        "a\n```bash\n# comment\nX='1 2'\npython scripts/a.py --b \\\n    --c  # not run\n\n"
        'pip install x\n```\n```python\nignored\n```\n'
    )
    assert commands(page) == [
        ("X='1 2'", True),
        ('python scripts/a.py --b      --c', False),
        ('pip install x', True),
    ]
    assert split('A=1 python "x y" $X', {'X': '--p --q'}) == ['python', 'x y', '--p', '--q']


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_are_nowhere_else(page):
    """A command in a block of another kind would never be checked."""
    outside = re.sub(r'^```bash\n.*?^```', '', page.read_text('utf-8'), flags=re.M | re.S)
    assert not re.findall(r'^\s*(?:\$ )?python scripts/.*', outside, re.MULTILINE)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', page.read_text('utf-8'))
    for link in links:
        if not link.startswith('https://'):
            assert (page.parent / link).exists(), f'{page.name} links to {link}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_lines_are_at_most_100_columns_long(page):
    lines = page.read_text('utf-8').splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith('|')]


def test_the_readme_is_short_and_keeps_its_lines():
    text = README.read_text('utf-8')
    assert len(text.splitlines()) <= 100
    assert text.index('scripts/train.py') < text.index(
        '\npip install -e ".[test]" && pytest tests/\n'
    )
    (claimed,) = re.findall(r'\| gpt2_jax \|.*?\| ([\d,]+) \|', text)
    lines = sum(path.read_text('utf-8').count('\n') for path in (ROOT / 'gpt2_jax').rglob('*.py'))
    assert abs(lines / int(claimed.replace(',', '')) - 1) < 0.2, f'README: {lines} lines by now'


def test_the_map_has_every_file_once():
    map_of_files = ARCHITECTURE.read_text('utf-8').partition('## Where to make a change')[0]
    listed = re.findall(r'^\| `([\w/]+\.py)` \|', map_of_files, re.MULTILINE)
    package = {
        path.relative_to(ROOT / 'gpt2_jax').as_posix()
        for path in (ROOT / 'gpt2_jax').rglob('*.py')
        if path.name != '__init__.py'
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == package, 'docs/architecture.md: one line for each file of the package'


def test_each_change_has_its_one_file():
    table = ARCHITECTURE.read_text('utf-8').partition('## Where to make a change')[2]
    rows = re.findall(r'^\| [^|]+ \| `([\w/]+\.py)` \|$', table.partition('\n## ')[0], re.MULTILINE)
    assert len(rows) == 13
    assert all((ROOT / 'gpt2_jax' / file).is_file() for file in rows)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Named by the path in the repository, the package, scripts/ or tests/."""
    for name in re.findall(r'`([\w./-]+\.py)`', page.read_text('utf-8')):
        folders = ('.', 'gpt2_jax', 'scripts', 'tests', 'tests/faults')
        places = [ROOT / folder / name for folder in folders]
        assert any(place.is_file() for place in places), f'{page.name} names {name}'


def test_the_backward_page_quotes_its_test():
    """Its tables hold every line of the passes by hand in tests/test_backward.py, and no other."""
    source = (ROOT / 'tests' / 'test_backward.py').read_text('utf-8')
    page = (ROOT / 'docs' / 'backward.md').read_text('utf-8')
    quoted = re.findall(r'^\| .* \| `([^`]+)` \|$', page, re.MULTILINE)
    assert len(quoted) == len(re.findall(r'^\| (?!---|mathematics)', page, re.MULTILINE))
    lines = []
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and (
            function.name == 'softmax' or function.name.endswith('_backward')
        ):
            lines += [ast.get_source_segment(source, line) for line in function.body[1:]]
    assert quoted == lines
