"""The training loop: the one file that knows all the others.

    for step in range(start, steps):  update;  evaluate, sample and save where step + 1 is due

Checkpoint S means exactly S updates. The batch and the dropout masks of an update are functions of its number, so a
run that was cut off and goes on from its last checkpoint computes what it would have computed.
"""

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from gpt2_jax import batches, data, parallel, run_folder, step, tokenizers
from gpt2_jax import config as config_lib
from gpt2_jax.checkpoint import FOLDER, Checkpoints, set_aside_damaged, steps_in
from gpt2_jax.errors import DivergedError, UsageError, UserError
from gpt2_jax.evaluate import evaluate
from gpt2_jax.generate import Sampling, default_prompt, generate, stream_text
from gpt2_jax.model import GPT2, GPT2Config, count_params, flops_per_token, init_params
from gpt2_jax.optim import decay_mask, make_optimizer, make_schedule
from gpt2_jax.shards import Dataset
from gpt2_jax.writers import RunLog, duration

# fp32 rate of one CPU core on this model's small matrix products, as measured on two cores of a 2024 server. Only for
# the hint that a recipe was made for a GPU.
CPU_CORE_FLOPS = 45e9
# Small models read better a little below the temperature they were trained at.
EVAL_SAMPLING = Sampling(temperature=0.8)
MEMORY_KNOBS = ('lower --config.train.batch_size, raise --config.train.accumulate (same gradient, less memory), lower '
                '--config.train.seq_len, set --config.model.remat=True, or take a smaller model.n_layer or model.n_embd')


@dataclasses.dataclass
class Progress:
    """What the loop knows beside the state; kept in every checkpoint."""

    best_step: int | None = None
    best_val_loss: float | None = None
    final_val_loss: float | None = None
    seconds: float = 0.0  # of the process that saved and those before it


class Interrupt:
    """Remembers the first SIGTERM or Ctrl-C so that the loop can save and leave; a second one is not held back."""

    def __init__(self):
        self.signal = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.signal = signal.Signals(number)
        self.restore()

    def restore(self):
        """Gives the signals back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _describe(config: ConfigDict, model: GPT2, params, dataset: Dataset, device) -> list[str]:
    """What runs, in lines for people."""
    cfg, train = model.cfg, config.train
    leaves = list(zip(jax.tree.leaves(decay_mask(params)), jax.tree.leaves(params), strict=True))
    decayed, kept = ([leaf for decays, leaf in leaves if decays is which] for which in (True, False))
    tokens = train.batch_size * train.seq_len
    peak, flops = parallel.peak_flops(device), flops_per_token(cfg, train.seq_len)
    rounding = {'float32': 'full fp32 matrix products', 'tf32': 'TF32 matrix products where the device has them',
                'bfloat16': 'bf16 matrix products, fp32 accumulation'}[cfg.dtype]
    lines = [
        f'device      {parallel.describe_device(device)}; mesh data {config.mesh.data} x fsdp {config.mesh.fsdp} x '
        f'tensor {config.mesh.tensor}; jax {jax.__version__}',
        f'precision   {cfg.dtype}: {rounding}; parameters, moments, softmax, LayerNorm and loss in fp32',
        f'attention   {cfg.attention}' + (', recomputing blocks in the backward pass' if cfg.remat else ''),
        f'data        {dataset.name}: {len(dataset.train):,} training and {len(dataset.val):,} validation tokens, '
        f'{dataset.tokenizer.name} tokenizer, vocabulary {dataset.tokenizer.vocab_size:,}',
        f'model       {count_params(params):,} parameters: {cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, '
        f'context {cfg.n_positions}',
        f'optimizer   AdamW; {len(decayed)} leaves with {count_params(decayed):,} parameters are decayed, '
        f'{len(kept)} with {count_params(kept):,} are not',
        f'step        {train.batch_size} windows x {train.seq_len} = {tokens:,} tokens'
        + (f' in {train.accumulate} micro-batches' if train.accumulate > 1 else '')
        + f'; {train.steps:,} steps = {tokens * train.steps / len(dataset.train):.1f} epochs',
        f'FLOPs       6 x matmul weights + 12 L D T = {flops:,} a token, {flops * tokens:.3g} a step; MFU = FLOPs a token x '
        'tokens/s / peak, ' + (f'{peak / 1e12:.0f} TFLOP/s (dense bf16)' if peak else 'unknown: no peak known for this device'),
    ]
    seconds = flops * tokens / (CPU_CORE_FLOPS * (os.cpu_count() or 1))
    if device.platform == 'cpu' and seconds > 2:
        lines.append(f'hint        this recipe is made for a GPU: a step takes about {seconds:.0f} s on this CPU, the run '
                     f'about {duration(seconds * train.steps)}. For a run of minutes: --config=configs/quickstart.py')
    return lines


def _check_resumable(old: ConfigDict, new: ConfigDict, at_step: int, extend: bool, workdir: Path, say) -> None:
    """Raises UsageError naming the settings that keep a run from going on with the configuration `new`."""
    differ = config_lib.differences(old, new)
    longer = new.train.steps > old.train.steps
    if extend and longer:
        differ.pop('train.steps')
        before, after = (float(_schedule(config)(at_step)) for config in (old, new))
        say(f'extended from {old.train.steps:,} to {new.train.steps:,} steps: the cosine is laid out anew over all of them, '
            f'so the learning rate at step {at_step:,} goes from {before:.3g} to {after:.3g}')
    if differ:
        fields = '; '.join(f'{key}: {a!r} there, {b!r} now' for key, (a, b) in differ.items())
        hint = ' (a larger train.steps may go on with --extend)' if 'train.steps' in differ and longer else ''
        raise UsageError(f'the run in {workdir} has another configuration: {fields}{hint}; give the same settings to go '
                         'on, another --workdir for a new run, or --fresh to move the old one aside')


def _schedule(config: ConfigDict):
    optim = config.optim
    return make_schedule(learning_rate=optim.learning_rate, end_learning_rate=optim.end_learning_rate,
                         warmup_steps=optim.warmup_steps, steps=config.train.steps)


def train(config: ConfigDict, workdir: Path, *, extend: bool = False, fresh: bool = False,
          started: float | None = None) -> int:
    """Trains, or goes on training, in the run's folder `workdir`; returns the exit code (0, 130 or 143).

    `started` is when the process began, by time.monotonic(). Raises UserError (see there).
    """
    started = time.monotonic() if started is None else started
    config = config_lib.resolve(config)
    if fresh and (aside := run_folder.move_aside(workdir)):
        print(f'the old run was moved to {aside}')
    with run_folder.claim(workdir), parallel.memory_errors(jax.devices()[0], MEMORY_KNOBS):
        return _run(config, workdir, extend, started)


def _run(config: ConfigDict, workdir: Path, extend: bool, started: float) -> int:
    train, mesh = config.train, parallel.make_mesh(**config.mesh)
    dataset = data.load(**config.data)
    corpus = {'name': dataset.name, 'sha256': dataset.sha256, 'fallback': dataset.name == config.data.fallback}
    model = GPT2(GPT2Config(**config.model, vocab_size=dataset.tokenizer.vocab_size))
    schedule = _schedule(config)
    optim = config.optim
    optimizer = make_optimizer(schedule=schedule, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps,
                               weight_decay=optim.weight_decay, clip_norm=optim.clip_norm)

    def new_state():
        return step.init_state(init_params(model, train.seed), optimizer)

    shapes = jax.eval_shape(new_state)
    layout = parallel.shardings(mesh, shapes)
    device = mesh.devices.flat[0]
    for line in _describe(config, model, shapes.params, dataset, device):
        print(line)
    for line in set_aside_damaged(workdir / FOLDER):
        print(line)

    with Checkpoints(workdir / FOLDER) as checkpoints:
        saved, progress, sizes = steps_in(workdir / FOLDER), Progress(), {}
        start = saved[-1] if saved else 0
        if saved:
            meta = checkpoints.read_meta(start)
            _check_resumable(config_lib.from_json(meta['config']), config, start, extend, workdir, print)
            if meta['corpus']['sha256'] != corpus['sha256']:
                raise UserError(f"the run in {workdir} was trained on {meta['corpus']['name']} with SHA-256 "
                                f"{meta['corpus']['sha256'][:12]}.., but data.corpus is now {corpus['name']} with "
                                f"{corpus['sha256'][:12]}..: bring the old text back, or start anew with --fresh")
            progress, sizes = Progress(**meta['progress']), meta['log_sizes']
            if progress.best_step not in saved:  # it was lost or damaged: the next evaluation is the best so far
                progress.best_step = progress.best_val_loss = None
            if start == train.steps and (workdir / 'summary.json').exists():
                print(f'the run in {workdir} is finished: {start:,} steps, best validation loss '
                      f'{progress.best_val_loss} at step {progress.best_step}; raise train.steps with --extend to go on')
                return 0
            abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                                    shapes, layout)
            state = checkpoints.restore(start, abstract)
            print(f'going on from checkpoint {start:,} in {workdir}')
        else:
            state = jax.jit(new_state, out_shardings=layout)()
        run_folder.cut_back(workdir, sizes)
        (workdir / 'summary.json').unlink(missing_ok=True)
        run_folder.write_text(workdir / 'config.json', config_lib.to_json(config))
        run_folder.write_text(workdir / 'tokenizer.json', tokenizers.to_json(dataset.tokenizer))

        with RunLog(workdir, start, train.steps) as log:
            loop = _Loop(config, workdir, mesh, dataset, corpus, model, schedule, layout, optimizer, checkpoints, log,
                         progress, started)
            code = loop.run(state, start)
        checkpoints.wait()
    if code == 0:
        summary = loop.summary(count_params(shapes.params), device)
        run_folder.write_text(workdir / 'summary.json', json.dumps(summary, indent=1) + '\n')
        print(f'finished {train.steps:,} steps in {duration(summary["seconds_total"])}: best validation loss '
              f'{progress.best_val_loss:.4f} at step {progress.best_step:,}, final {progress.final_val_loss:.4f}; sample '
              f'with: python scripts/sample.py --ckpt_dir={workdir}')
    return code
