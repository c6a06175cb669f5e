"""A training run from beginning to end, in the order in which things happen.

training/setup.py builds the tokens, the model and the optimizer (training/optim.py) from the
configuration, training/programs.py makes the train step (training/step.py) from them, and
training/loop.py runs it on the batches of data/batches.py.
"""

import contextlib
import functools
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from ml_collections import ConfigDict

from gpt2_jax import config as config_lib
from gpt2_jax import files, foreign
from gpt2_jax.data import tokenizers
from gpt2_jax.data.batches import eval_batches, train_batch
from gpt2_jax.diagnostics import probes
from gpt2_jax.diagnostics.describe import describe
from gpt2_jax.errors import UsageError
from gpt2_jax.hooks import Evaluate, ExplainSpikes, Sample, Save, diverged, finish_last_step
from gpt2_jax.inference.evaluate import make_evaluate
from gpt2_jax.parallel import feed, hosts
from gpt2_jax.parallel.devices import keep_freed_memory
from gpt2_jax.parallel.faults import estimate_memory, memory_errors
from gpt2_jax.parallel.mesh import own_rows
from gpt2_jax.progress import Progress
from gpt2_jax.terminal import counted, say
from gpt2_jax.training import loop
from gpt2_jax.training.meter import Meter, RunProgress
from gpt2_jax.training.programs import abstract_state, compile_train_step, compiling
from gpt2_jax.training.setup import Setup, build
from gpt2_jax.training.start import (
    check_pretrained,
    checkpoint_meta,
    corpus_identity,
    initial_state,
    where_to_start,
)
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir import folder, storage
from gpt2_jax.workdir.checkpoints import Checkpoints
from gpt2_jax.workdir.checksums import FOLDER, quarantine
from gpt2_jax.workdir.log import Logger, duration


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    extend: bool = False,
    fresh: bool = False,
    started: float | None = None,
    hooks: Sequence[loop.Hook] = (),
) -> int:
    """Trains, or resumes training, in the folder `workdir`.

    Returns 0, or 128 + the number of the signal that stopped the run. `extend` allows a larger
    train.steps than before, and `fresh` first moves an old run aside. `started` is the time at
    which the process began, by time.monotonic(). `hooks` are called after evaluation and sampling
    and before saving. Outside the main thread of the process, a signal does not save the run. A
    run on one device uses jax.default_device, if that is one of jax.devices(). Raises UserError for
    wrong input, and if a loss is not finite; finished checkpoints stay untouched.

    In a run of several processes (see parallel/hosts.py), every process calls this function with
    the same arguments, and `workdir` is a folder that they share. Process 0 prints and writes the
    logs.
    """
    started = time.monotonic() if started is None else started
    config, workdir = config_lib.resolve(config), files.user_path(workdir)
    check_hooks(hooks)
    # Only process 0 prints. A process that is lost and memory that runs out are errors of one line.
    with hosts.one_voice(), hosts.lost_processes(), memory_errors('train'):
        keep_freed_memory()  # a script has done so already, and a notebook has not
        setup = build(config)
        check_before_start(setup, workdir, fresh)
        kept = storage.Kept(config.checkpoint.keep, config.checkpoint.keep_every)
        with (
            storage.without_warnings(),
            claim(workdir, fresh) as check_claim,
            Checkpoints(workdir / FOLDER, check_claim, kept) as checkpoints,
            compiling() as pool,
        ):
            return run_in_folder(setup, workdir, checkpoints, pool, extend, started, hooks)


def check_hooks(hooks: Sequence[loop.Hook]) -> None:
    """Raises UsageError unless `hooks` is a list of hooks: objects with due(step) and a call."""
    for hook in hooks if isinstance(hooks, Sequence) else [hooks]:
        is_hook = callable(hook) and callable(getattr(hook, 'due', None))
        if not is_hook or isinstance(hook, type):
            raise UsageError(
                f'hooks holds {foreign.show(hook)}: expected a list of objects with due(step) and '
                'a call (step, state), as in training/loop.py'
            )
    if not isinstance(hooks, Sequence):
        raise UsageError(f'hooks = {foreign.show(hooks)}: expected a list, [hook]')


def check_before_start(setup: Setup, workdir: Path, fresh: bool) -> None:
    """Raises UserError for data or weights that training cannot use.

    It is called before any folder is touched. One training and one validation batch are made only
    for the errors that they raise, and not sent to the device, which may still be starting. Weights
    to start from are checked here only with `fresh`, which moves the old run aside; otherwise
    start.initial_state checks them.
    """
    if fresh:
        check_pretrained(setup, workdir)
    lo, hi = own_rows(setup.mesh, setup.config.train.batch_size)
    train_batch(setup.dataset.train, step=0, lo=lo, hi=hi, **setup.batch_options)
    next(eval_batches(setup.dataset.val, batch_size=1, seq_len=setup.config.train.seq_len))


@contextlib.contextmanager
def claim(workdir: Path, fresh: bool) -> Iterator[Callable[[], None]]:
    """Locks the run's folder for this run, and moves damaged checkpoints aside.

    Yields a function that raises UserError if the folder was moved or replaced since. In a run of
    several processes, the first claims the folder, and the others wait until it has.
    """
    if not hosts.is_first():
        hosts.barrier('the folder is claimed')
        yield lambda: None
        return
    if fresh and (aside := folder.move_aside(workdir)):
        say(f'the old run was moved to {aside}')
    with folder.claim(workdir) as check_claim:
        with Progress('verifying the checkpoints'):
            reports = quarantine(workdir / FOLDER)
        for report in reports:
            say(report)
        hosts.barrier('the folder is claimed')
        yield check_claim


def run_in_folder(
    setup: Setup,
    workdir: Path,
    checkpoints: Checkpoints,
    pool: Executor,
    extend: bool,
    started: float,
    hooks: Sequence[loop.Hook],
) -> int:
    """The run in a claimed folder, after damaged checkpoints were set aside: see `train`."""
    config, steps = setup.config, setup.config.train.steps
    # start: the step of the newest usable checkpoint, or 0 for a new run. progress: the losses and
    # times so far. log_sizes: how many bytes of each log were written up to step `start`.
    start, progress, log_sizes = where_to_start(setup, workdir, checkpoints, extend)
    check_processes(setup, workdir, start)
    if start == steps and (workdir / 'summary.json').exists():
        say_already_finished(setup, workdir, progress)
        return 0

    # Compiled side by side, in the order of their first use. The update is traced before anything
    # asks a GPU for its memory: until the GPU is ready for use, the answer takes up to 0.7 s.
    train_step = compile_train_step(setup, pool)
    say_setup(setup, workdir, checkpoints, start)
    measure = probes.Measure(setup, pool) if config.train.probe else None
    state = state_at(setup, checkpoints, start)
    evaluate = make_evaluate(setup, pool=pool)  # last: the first update does not wait for it
    if hosts.is_first():
        prepare_folder(setup, workdir, start, log_sizes)

    with (
        Logger(workdir, start, steps, config_lib.flatten(config), writes=hosts.is_first()) as log,
        loop.interrupts() as interrupt,
        feed.train_batches(
            setup.mesh, setup.dataset.train, start=start, stop=steps, **setup.batch_options
        ) as batches,
    ):
        spikes = ExplainSpikes(config.train.spike, workdir, log)
        log.work('compiling the update and the evaluation')
        meter = Meter(
            setup,
            log,
            progress,
            start=start,
            started=started,
            diverged=functools.partial(diverged, checkpoints, workdir),
            watch=spikes.watch,
        )
        evaluation = Evaluate(evaluate, meter, log, interrupt)
        sampling = Sample(meter, log, interrupt)
        meta = functools.partial(checkpoint_meta, setup, workdir, progress)
        probe = probes.Probe(setup, workdir, log, measure) if measure else None
        saving = Save(checkpoints, meter, log, meta, evaluation, interrupt)
        # A signal may have stopped the run earlier, between an update and its evaluation or sample.
        # Finish that work first. If a signal interrupts it again, it stays in progress.unfinished,
        # and no step is trained.
        finish_last_step(start, state, evaluation, sampling, checkpoints)
        if start == 0 and saving.due(0):
            saving(0, state)
        if probe:
            probe.begin(start, state)
        done = start
        if not progress.unfinished:
            # For each batch: an update, the meter, then the hooks in this order. A signal ends the
            # loop after the current step, which is saved.
            done = loop.run(
                train_step,
                state,
                batches,
                start=start,
                meter=meter,
                hooks=[evaluation, sampling, *filter(None, [probe]), spikes, *hooks, saving],
                interrupt=interrupt,
            )
        spikes.explain()  # spikes in metrics that were fetched after the last hooks
    with Progress('saving the last checkpoint'):
        checkpoints.wait()
    if probe and probe.count:
        say(probe.cost(time.monotonic() - started))

    if interrupt.seen:
        name = interrupt.seen.name
        say(f'stopped by {name} at step {done:,}, which is saved; the same command resumes')
        return 128 + interrupt.seen
    finish(meter, workdir)
    return 0


def check_processes(setup: Setup, workdir: Path, start: int) -> None:
    """Raises UsageError unless all processes of the run train the same model in one folder."""
    settings = config_lib.flatten(setup.config)
    different = hosts.differing(
        {f'{key} = {value!r} in this process': value for key, value in settings.items()}
        | {
            f'the text of {setup.config.data.corpus}': setup.dataset.sha256,
            f'the folder {workdir}, which all must share': (folder.owner(workdir), start),
        }
    )
    if different:
        raise UsageError(f'not the same in all processes of this run: {"; ".join(different)}')


def say_already_finished(setup: Setup, workdir: Path, progress: RunProgress) -> None:
    """Says that the run needs no further update, and writes settings that were deleted."""
    say(
        f'the run in {workdir} is finished: {counted(setup.config.train.steps, "steps")}, best '
        f'validation loss {progress.best_val_loss:.4f} at step {progress.best_step:,}; raise '
        'train.steps with --extend to continue, or start again with --fresh'
    )
    if hosts.is_first():
        write_settings(setup, workdir, missing_only=True)


def say_setup(setup: Setup, workdir: Path, checkpoints: Checkpoints, start: int) -> None:
    """Says what will be trained and by which code, its memory, and which checkpoints are kept."""
    config, n_local = setup.config, len(setup.mesh.local_devices)
    memory = estimate_memory(setup.shapes, setup.layout, setup.device, n_local)
    resuming = [f'resuming from checkpoint {start:,} in {workdir}'] if start else []
    kept = checkpoints.describe_kept(
        setup.shapes, config.train.steps, config.checkpoint.every, config.eval.every
    )
    say('\n'.join([*describe(setup), *memory, *resuming, *kept]))


def state_at(setup: Setup, checkpoints: Checkpoints, start: int) -> TrainState:
    """The state to start from: checkpoint `start`, or at step 0 the initial state.

    Raises UserError if the disk has no room to save it.
    """
    if start:
        with Progress(f'reading checkpoint {start:,}'):
            state = checkpoints.restore(start, abstract_state(setup))
    else:
        state = initial_state(setup)
    if start < setup.config.train.steps:
        # After the state is made, which fails first if memory is short.
        checkpoints.check_room(state)
    return state


def prepare_folder(setup: Setup, workdir: Path, start: int, log_sizes: dict[str, int]) -> None:
    """Cuts the logs back to where the run starts, and writes what sampling and resuming need."""
    for report in folder.cut_back(workdir, log_sizes):
        say(report)
    probes.cut_back(workdir, start)
    (workdir / 'summary.json').unlink(missing_ok=True)
    write_settings(setup, workdir)


def write_settings(setup: Setup, workdir: Path, missing_only: bool = False) -> None:
    """Writes config.json and tokenizer.json; with `missing_only`, those that were deleted."""
    for name, text in (
        ('config.json', config_lib.to_json(setup.config)),
        ('tokenizer.json', tokenizers.to_json(setup.dataset.tokenizer)),
    ):
        if not (missing_only and (workdir / name).exists()):
            files.write_text(workdir / name, text)


def finish(meter: Meter, workdir: Path) -> None:
    """Writes summary.json, and says how the run ended."""
    progress, summary = meter.progress, meter.summary(corpus_identity(meter.setup))
    if hosts.is_first():
        files.write_text(workdir / 'summary.json', json.dumps(summary, indent=1) + '\n')
    say(
        f'finished {counted(meter.steps, "steps")} in {duration(summary["seconds_total"])}: best '
        f'validation loss {progress.best_val_loss:.4f} at step {progress.best_step:,}, final '
        f'{progress.final_val_loss:.4f}\n'
        f'sample from it: python scripts/sample.py --ckpt_dir={shlex.quote(str(workdir))}'
    )
