"""Makes one-line breaks in a copy of the package, and lists those that no test sees.

    python tests/mutate.py --count=200 --seed=0
    python tests/mutate.py --files='model/*.py' --count=0           # every break of these files
    python tests/mutate.py --only='model/ops.py:53:22 -1 -> 0'      # one break again
    python tests/mutate.py --count=200 --jobs=64 --minutes=9        # on many cores, in time

A break changes an operator, a comparison, a constant, an axis or a dtype, or drops a line. The
tests of its file (TESTS) run on it in order, and stop at the first that fails: the break is seen.
Tests that run longer than the limit count as failed. A survivor is a missing test, or a change
without effect; EQUIVALENT lists breaks of the second kind that need no look.

Each job has its share of the cores, and changes a temporary copy of the package; git is not needed.
The test files also run without any break. Each result is a line, when it comes. The last lines are
the breaks that survived and, after Ctrl-C or if --minutes are over, those without a result. The
exit status is 2 if a test fails without a break, otherwise 1 if a break survived or has no result.
"""

import argparse
import ast
import collections
import dataclasses
import fnmatch
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ('model', 'kernels', 'training', 'data', 'inference')

# Pattern of files -> their tests, those most likely to see a break first, slow ones last. All
# patterns that match a file count, in this order.
TESTS = {
    'model/gpt2.py': 'model ops backward generate huggingface lens',
    'model/ops.py': 'ops model backward step',
    'model/dropout.py': 'model ops step kernels',
    'model/loss.py': 'loss model step score',
    'model/params.py': 'model step config',
    'model/huggingface.py': 'huggingface faults/readers',
    'kernels/choose.py': 'kernels eval_kernels decode_kernels errors',
    'kernels/launch.py': 'kernels decode_kernels',
    'kernels/decode.py': 'decode_kernels',
    'kernels/sample.py': 'decode_kernels',
    'kernels/gelu_product.py': 'gelu_product',
    'kernels/[!ds]*.py': 'kernels eval_kernels ops',
    'training/optim.py': 'optim explicit_optim kernels step',
    'training/muon.py': 'muon kernels',
    'training/step.py': 'step backward model loss evaluate',
    'training/fused_step.py': 'kernels eval_kernels explicit_optim gelu_product',
    'training/fused_optim.py': 'kernels explicit_optim parallel',
    'training/setup.py': 'step train config errors resume parallel',
    'training/programs.py': 'step train benchmark resume parallel',
    'training/meter.py': 'train benchmark resume faults/readers',
    'training/start.py': 'resume finetune checkpoint errors faults/readers',
    'training/loop.py': 'train resume',
    'data/batches.py': 'batches step parallel permutation',
    'data/bin_files.py': 'token_files faults/readers',
    'data/dataset.py': 'shards token_files corpora texts',
    'data/id_files.py': 'shards token_files verified',
    'data/load.py': 'shards token_files corpora errors score',
    'data/vocabulary.py': 'vocabulary bpe huggingface foreign',
    'data/tokenizers.py': 'tokenizers bpe shards generate faults/readers',
    'data/documents.py': 'documents shards texts faults/readers',
    'data/corpora.py': 'corpora foreign errors',
    'data/shards.py': 'shards foreign errors faults/readers',
    'inference/detokenizers.py': 'detokenizers score',
    'inference/texts.py': 'texts score',
    'inference/evaluate.py': 'evaluate score loss resume parallel',
    'inference/decoding.py': 'generate decode_kernels lens_library errors',
    'inference/sampling.py': 'generate decode_kernels',
    'inference/streaming.py': 'generate errors',
    'inference/harness.py': 'score',
    'inference/lambada.py': 'score faults/readers',
    'inference/score.py': 'score errors',
}
# (pattern of 'file:source line  [old -> new]', reason): breaks that change speed, a message or a
# type hint.
EQUIVALENT = (
    (
        r'kernels/.*(WARPS|STAGES|PROGRAMS|_ROWS|_OUTS|_INPUTS|_ATTEND|COLUMNS|BLOCK)\b.* = ',
        'speed',
    ),
    (r'.*\b(warps|stages|num_warps|num_stages)=', 'speed'),
    (r'.*optimization_barrier', 'speed'),
    (r'.*jax\.jit', 'the same values, compiled in other pieces'),
    (r'.*precision=', 'matrix products of a CPU are always in full fp32'),
    (r'.*(foreign\.error|problem =|remedy =|more =)', 'the words of a message'),
    (r'kernels/attention.*\[masked -> True\]', 'speed: a mask where every key is visible'),
    (r'kernels/decode.*BlockSpec.*lambda b, h, s: \(0,\)', 'a block of an array with one element'),
    (r'kernels/decode.*(LinearSizes|AttendSizes)\(', 'speed'),
    (r'kernels/decode.*out is None -> True', 'what a GPU writes beyond the end of an array'),
    (r'kernels/sample.*part \*', 'speed: a guess between two bounds, used if it lies there'),
    (r'.*strict=True.*\[True -> False\]', 'a check of two lengths that are equal'),
    (r'inference/score.*lines\[-1\] \+=.*\[- -> \]', 'the last of two lines is the second'),
    (r'data/.*n_bytes=', 'the published size of a file that no test downloads'),
    (r'inference/decoding.*padding = ', 'speed: how far a prompt is padded'),
    (r'data/bin_files.*OTHER_MAGICS = ', 'the end of a range of dates'),
    (r'data/corpora.*def _repeated', 'the length of a text without end'),
    (r"model/huggingface.*replace\('h_'", "no name has 'h_' twice"),
)

OPERATORS = {
    ast.Add: ('+', '-'),
    ast.Sub: ('-', '+'),
    ast.Mult: ('*', '/'),
    ast.Div: ('/', '*'),
    ast.FloorDiv: ('//', '*'),
    ast.Mod: ('%', '//'),
    ast.Pow: ('**', '*'),
    ast.BitXor: ('^', '|'),
    ast.BitOr: ('|', '&'),
    ast.BitAnd: ('&', '|'),
    ast.LShift: ('<<', '>>'),
    ast.RShift: ('>>', '<<'),
    ast.And: ('and', 'or'),
    ast.Or: ('or', 'and'),
    ast.Lt: ('<', '<='),
    ast.LtE: ('<=', '<'),
    ast.Gt: ('>', '>='),
    ast.GtE: ('>=', '>'),
    ast.Eq: ('==', '!='),
    ast.NotEq: ('!=', '=='),
    ast.Is: ('is', 'is not'),
    ast.IsNot: ('is not', 'is'),
    ast.In: ('in', 'not in'),
    ast.NotIn: ('not in', 'in'),
}
DTYPES = {
    'float32': 'bfloat16',
    'bfloat16': 'float32',
    'float64': 'float32',
    'int32': 'int16',
    'uint32': 'int32',
    'int64': 'int32',
    'uint16': 'int16',
}


@dataclasses.dataclass(frozen=True)
class Break:
    """One change of a file of the package: the text from `start` to `stop` becomes `new`."""

    file: str
    line: int
    column: int
    start: int
    stop: int
    old: str
    new: str

    def __str__(self):
        old = ' '.join(self.old.split())
        old = old if len(old) <= 60 else f'{old[:57]}..'
        return f'{self.file}:{self.line}:{self.column} {old} -> {self.new}'


def find_breaks(file: str) -> Iterator[Break]:
    """Every break of a file, in the order of its lines."""
    source = (ROOT / 'gpt2_jax' / file).read_text('utf-8')
    lines = source.splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))

    def offset(line, column):  # ast counts columns in bytes
        return begins[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def make(start, stop, new):
        line, column = source.count('\n', 0, start) + 1, start - source.rfind('\n', 0, start)
        return Break(file, line, column, start, stop, source[start:stop], new)

    def span(node):
        start = offset(node.lineno, node.col_offset)
        return start, offset(node.end_lineno, node.end_col_offset)

    def operator(left, right, kind):
        """The operator between two operands, which brackets and line ends may surround."""
        old, new = OPERATORS[kind]
        start, stop = span(left)[1], span(right)[0]
        found = re.search(rf'(?<![\w*/<>=!]){re.escape(old)}(?![\w*/<>=])', source[start:stop])
        if found:
            yield make(start + found.start(), start + found.end(), new)

    tree = ast.parse(source)
    skipped = set()  # annotations, and the words of messages
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ('annotation', 'returns')]
        parts += [node] if isinstance(node, ast.JoinedStr | ast.Raise) else []
        for part in filter(None, parts):
            skipped.update(map(id, ast.walk(part)))

    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            found += operator(node.left, node.right, type(node.op))
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                found += operator(left, right, type(node.op))
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
                found += operator(left, right, type(op))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            start, (operand, _) = span(node)[0], span(node.operand)
            found.append(make(start, operand, ''))
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            found.append(make(*span(node), changed(node.value)))
        elif isinstance(node, ast.Attribute) and node.attr in DTYPES:
            stop = span(node)[1]
            found.append(make(stop - len(node.attr), stop, DTYPES[node.attr]))
        elif isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)
        ):
            found.append(make(*span(node), 'pass'))
        elif isinstance(node, ast.If) and not node.orelse:
            found.append(make(*span(node.test), 'False'))
        elif isinstance(node, ast.IfExp):
            found.append(make(*span(node.test), 'True'))
    yield from sorted(set(found), key=lambda b: (b.start, b.stop))


def changed(value) -> str:
    """Another constant of the same kind."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    return repr(value * 1.1 or 1.0)


def reason_to_skip(b: Break) -> str | None:
    """Why a break is known to change nothing that a test could see."""
    line = (ROOT / 'gpt2_jax' / b.file).read_text('utf-8').splitlines()[b.line - 1]
    text = f'{b.file}:{line}  [{b.old} -> {b.new}]'
    return next((why for pattern, why in EQUIVALENT if re.match(pattern, text)), None)


def tests_of(file: str) -> list[str]:
    """The test files of a file, each once."""
    matching = [names for pattern, names in TESTS.items() if fnmatch.fnmatch(file, pattern)]
    paths = []
    for name in ' '.join(matching).split():
        folder, _, name = name.rpartition('/')
        paths.append(str(Path('tests', folder, f'test_{name}.py')))
    return [path for path in dict.fromkeys(paths) if (ROOT / path).exists()]


def copy_tree(folder: Path) -> None:
    """The package with everything that its tests read, without what a test or a user left there."""
    left_out = shutil.ignore_patterns('__pycache__', '.*', '*.egg-info')
    for name in ('gpt2_jax', 'tests', 'scripts', 'configs', 'docs'):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    for path in ROOT.iterdir():
        if path.suffix in ('.toml', '.md', '.py', '.cfg') or path.name == 'LICENSE':
            shutil.copy(path, folder)


def run_tests(folder: Path, tests: list[str], seconds: float) -> str | None:
    """The first test that fails, or None. A run of over `seconds` counts as failed."""
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')]),
        'PYTHONDONTWRITEBYTECODE': '1',
        'JAX_PLATFORMS': 'cpu',
    }
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-x',
        '-n',
        '0',
        '--long',
        '-p',
        'no:cacheprovider',
    ]
    process = subprocess.Popen(
        [*command, '--basetemp', folder.parent / 'tests', *tests],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that a test started
        process.communicate()
        return f'a limit of {seconds:.0f} s'
    if process.returncode in (0, 5):  # 5: no test was collected
        return None
    failed = re.search(r'^(?:FAILED|ERROR) (\S+)', printed, re.MULTILINE)
    return failed[1] if failed else f'exit status {process.returncode}: {printed[-300:]}'


def draw(arguments: argparse.Namespace) -> list[Break]:
    """The breaks that the flags ask for."""
    files = sorted(
        str(path.relative_to(ROOT / 'gpt2_jax'))
        for package in PACKAGES
        for path in (ROOT / 'gpt2_jax' / package).glob('*.py')
    )
    files = [file for file in files if fnmatch.fnmatch(file, arguments.files)]
    breaks = [b for file in files for b in find_breaks(file)]
    if arguments.only:
        return [b for b in breaks if str(b) in arguments.only]
    breaks = [b for b in breaks if reason_to_skip(b) is None]
    random.Random(arguments.seed).shuffle(breaks)
    return breaks[: arguments.count or None]


@dataclasses.dataclass
class Job:
    """Tests to run with a break, or without any: `result` is a line, once there is one."""

    tests: list[str]
    broken: Break | None = None
    result: str | None = None

    def __str__(self):
        return str(self.broken or f'without any break, {self.tests[0]}')


def run_jobs(jobs: Iterator[Job], cores: list[int], seconds: float, deadline: float) -> None:
    """Runs jobs on `cores`, in a copy of the package, until none is left or the time is over."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, cores)  # of this thread and the processes that it starts
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent:
        folder = Path(parent, 'gpt2_jax')
        copy_tree(folder)
        for job in jobs:
            began = time.monotonic()
            limit = min(seconds, deadline - began)
            if limit <= 0:
                return
            if b := job.broken:
                path = folder / 'gpt2_jax' / b.file
                source = path.read_text('utf-8')
                path.write_text(source[: b.start] + b.new + source[b.stop :], 'utf-8')
            seen_by = run_tests(folder, job.tests, limit)
            if b:
                path.write_text(source, 'utf-8')
            if seen_by and time.monotonic() > deadline:
                return  # the time of all jobs was over, not that of this one
            job.result = f'seen by {seen_by}' if seen_by else 'SURVIVED' if b else 'passes'
            print(f'{job}: {job.result}, {time.monotonic() - began:.0f} s', flush=True)


def in_turn(jobs: list[Job]) -> Iterator[Job]:
    """The jobs one by one, for several threads."""
    left, lock = iter(jobs), threading.Lock()

    def following():
        with lock:
            return next(left, None)

    return iter(following, None)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--count', type=int, default=200, help='breaks to draw; 0: all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--files', default='*', help="pattern of files, such as 'model/*.py'")
    parser.add_argument('--only', action='append', help='a break, as it is printed; repeatable')
    parser.add_argument('--list', action='store_true', help='print the breaks and run nothing')
    parser.add_argument(
        '--jobs', type=int, default=1, help='breaks at a time; they share the cores'
    )
    parser.add_argument('--seconds', type=float, default=900, help='limit for the tests of a break')
    parser.add_argument('--minutes', type=float, default=math.inf, help='limit for everything')
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    breaks = draw(arguments)
    if unknown := set(arguments.only or ()) - set(map(str, breaks)):
        parser.error(f'there is no such break: {sorted(unknown)[0]!r}; --list prints them')
    if arguments.list:
        print(*breaks, sep='\n')
        return 0
    files = dict.fromkeys(test for b in breaks for test in tests_of(b.file))
    whole, broken = [Job([path]) for path in files], [Job(tests_of(b.file), b) for b in breaks]
    jobs = in_turn(whole + broken)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [0]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        shares = (
            cores[i :: arguments.jobs] or [cores[i % len(cores)]] for i in range(arguments.jobs)
        )
        done = [pool.submit(run_jobs, jobs, share, arguments.seconds, deadline) for share in shares]
        try:
            for each in done:
                each.result()  # raises what it raised
        except KeyboardInterrupt:
            print('stopping: the tests that run may end', flush=True)
            collections.deque(jobs, maxlen=0)  # takes all that are left

    survivors = [job for job in broken if job.result == 'SURVIVED']
    without = [job for job in broken if job.result is None]
    failed = [job for job in whole if job.result != 'passes']
    print(f'{len(broken)} breaks: {len(survivors)} survived, {len(without)} have no result')
    for words, some in (('survived', survivors), ('no result', without)):
        for job in some:
            print(f'{words}: --only={shlex.quote(str(job))}')
    for job in failed:
        print(f'{job}: {job.result or "no result"}')
    return 2 if failed else 1 if survivors or without else 0


if __name__ == '__main__':
    sys.exit(main())
