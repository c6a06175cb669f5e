"""A description of a run, in lines for people."""

import os
from collections.abc import Collection, Iterator

import jax

from gpt2_jax.architecture import PRECISIONS, GPT2Config
from gpt2_jax.kernels.choose import Kernels
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel import devices, rules
from gpt2_jax.parallel.partition import named_leaves
from gpt2_jax.terminal import counted
from gpt2_jax.training.muon import muon_leaves, stack_matrices
from gpt2_jax.training.optim import decay_mask
from gpt2_jax.training.setup import Setup
from gpt2_jax.workdir.log import duration

# The fp32 rate of one CPU core on small matrix products, measured on a two-core server. Serves
# only the hint that a configuration was made for a GPU.
CPU_CORE_FLOPS = 45e9

# What the names in kernels/choose.py mean.
KERNELS = {
    'fused': 'GPU kernels of this package',
    'hopper': 'a GPU kernel of this package for Hopper GPUs',
    'cudnn': "cuDNN's attention",
    'xla': 'compiled by XLA from model/gpt2.py',
}

# What the backward pass computes again, by model.remat.
REMAT = {
    'none': '',
    'block': '; blocks recomputed in the backward pass',
    'dots': '; blocks recomputed in the backward pass, except their matrix products',
}


def describe(setup: Setup) -> list[str]:
    """One line each on device, precision, kernels, attention, data, model, training and cost."""
    cfg, config, dataset, params = setup.model.cfg, setup.config, setup.dataset, setup.shapes.params
    train, tokens, flops = config.train, setup.tokens_per_step, setup.flops_per_token
    leaves = list(zip(jax.tree.leaves(decay_mask(params)), jax.tree.leaves(params), strict=True))
    decayed = [leaf for decays, leaf in leaves if decays]
    kept = [leaf for decays, leaf in leaves if not decays]
    n_processes = jax.process_count()
    processes = f', in {n_processes} processes' if n_processes > 1 else ''
    lines = [
        f'device     {devices.describe_device(setup.device)}; mesh data {config.mesh.data} x fsdp '
        f'{config.mesh.fsdp} x tensor {config.mesh.tensor}{processes}; jax {jax.__version__}',
        *_describe_idle(setup),
        *_describe_undivided(setup),
        f'precision  {_describe_precision(cfg, setup.kernels)}',
        *_describe_kernels(setup),
        f'data       {dataset.name}: {len(dataset.train):,} training and {len(dataset.val):,} '
        f'{"held-out training" if config.data.holdout else "validation"} tokens, '
        f'{dataset.tokenizer.name} tokenizer, vocabulary {dataset.tokenizer.vocab_size:,}',
        f'model      {count_params(params):,} parameters: '
        f'{counted(cfg.n_layer, "layers")}, {counted(cfg.n_head, "heads")}, width {cfg.n_embd}, '
        f'context {cfg.n_positions}',
        f'optimizer  {_describe_optimizer(setup)}: weight decay on {len(decayed)} leaves with '
        f'{count_params(decayed):,} parameters, none on {len(kept)} with {count_params(kept):,}',
        *_describe_average(config.optim.average),
        f'step       {train.batch_size} windows x {train.seq_len} = {tokens:,} tokens'
        + (f', in {train.grad_accum_steps} micro-batches' if train.grad_accum_steps > 1 else '')
        + f'; {counted(train.steps, "steps")} = '
        f'{_digits(tokens * train.steps / len(dataset.train))} epochs',
        _describe_evaluation(setup),
        f'cost       6 x matmul weights + 12 L D T = {flops:,} FLOPs a token, {flops * tokens:.3g} '
        f'a step; MFU = FLOPs a token x tokens/s / peak, {_describe_peak(setup)}',
    ]
    seconds = flops * tokens / (CPU_CORE_FLOPS * (os.cpu_count() or 1))
    if setup.device.platform == 'cpu' and seconds > 2:
        lines.append(
            f'hint       this configuration is made for a GPU: a step takes about {seconds:.0f} s '
            f'on this CPU, the run about {duration(seconds * train.steps)}. In minutes: '
            '--config=configs/quickstart.py'
        )
    if '\r' in getattr(dataset.tokenizer, 'alphabet', ''):
        lines.append(
            'hint       the text has carriage returns, as in the line ends of Windows: each is a '
            "token, and the model learns to write it. tr -d '\\r' makes a copy without them"
        )
    return lines


def _describe_optimizer(setup: Setup) -> str:
    """'AdamW (fused)'; with Muon also the matrices that it updates."""
    adamw = f'AdamW ({setup.kernels.optimizer})'
    if setup.config.optim.algorithm == 'adamw':
        return adamw
    stacks = jax.eval_shape(stack_matrices, muon_leaves(setup.shapes.params)).values()
    n = sum(len(stack) for stack in stacks)
    return (
        f'Muon on {n} matrices with {count_params(list(stacks)):,} parameters, {adamw} on the rest'
    )


def _describe_average(decay: float) -> Iterator[str]:
    """A line on the average of the parameters, if there is one."""
    if decay:
        yield (
            f'average    of the parameters over about the last {round(1 / (1 - decay)):,} updates: '
            'it is evaluated, sampled from and published'
        )


def _describe_idle(setup: Setup) -> Iterator[str]:
    """A line if GPUs stay idle. The simulated devices of a CPU share its cores."""
    used, there = setup.mesh.size, jax.device_count()
    if setup.device.platform != 'cpu' and used < there and not jax.config.jax_default_device:
        yield (
            f'hint       {used} of {there} devices work: --config.mesh.fsdp={there} or '
            f'--config.mesh.data={there} uses all of them'
        )


def _describe_undivided(setup: Setup) -> Iterator[str]:
    """A line for each leaf with a dimension that the mesh does not divide, with its cost."""
    shapes = ((name, leaf.shape) for name, leaf in named_leaves(setup.shapes.params).items())
    for line in rules.undivided(shapes, setup.mesh.shape):
        yield f'undivided  {line}'


def _describe_kernels(setup: Setup) -> list[str]:
    """Which code computes each part; then why not a faster one, part by part."""
    parts = setup.kernels._asdict()
    parts.pop('optimizer')  # it has a line of its own
    uses = {name: [part for part in parts if parts[part] == name] for name in KERNELS}
    text = '; '.join(
        f'{name} ({KERNELS[name]}): {_list(names, parts)}' for name, names in uses.items() if names
    )
    remat = REMAT[setup.model.cfg.remat]
    lacking = {}  # need -> (implementations, parts)
    for part, reason in setup.reasons.items():
        name, _, need = reason.partition(' needs ')
        names, wanting = lacking.setdefault(need, ({}, []))
        names[name] = None
        wanting.append(part)
    return [f'kernels    {text}{remat}'] + [
        f'           {_list(wanting, Kernels._fields)}: {" and ".join(names)} '
        f'{"need" if len(names) > 1 else "needs"} {need}'
        for need, (names, wanting) in lacking.items()
    ]


def _list(parts: list[str], all_parts: Collection[str]) -> str:
    return 'all parts' if len(parts) == len(all_parts) else ', '.join(parts)


def _describe_evaluation(setup: Setup) -> str:
    tokens, n_targets = setup.eval_tokens, len(setup.dataset.val) - 1
    part = 'all' if tokens == n_targets else f'{tokens:,} of the {n_targets:,}'
    spread = '' if tokens == n_targets else ', evenly spread'
    every = min(setup.config.eval.every, setup.config.train.steps)
    return f'evaluation {part} validation targets{spread}, every {every:,} steps'


def _digits(number: float) -> str:
    """'12.3', '0.0021': a number below 1 shows its first two digits."""
    return f'{number:.1f}' if number >= 1 else f'{number:.2g}'


def _describe_precision(cfg: GPT2Config, kernels: Kernels) -> str:
    text = (
        f'{cfg.dtype}: {PRECISIONS[cfg.dtype].meaning}; parameters, moments, softmax, LayerNorm '
        'and loss in fp32'
    )
    if cfg.compute_dtype == 'bfloat16':
        text += f'; the residual stream in {cfg.stream_dtype}'
    if kernels.fused_training:
        text += '; in training, logits in bf16'
    return text


def _describe_peak(setup: Setup) -> str:
    peak = devices.peak_flops(setup.device)
    if not peak:
        return 'and the peak of this device is unknown'
    return f'and the peak is {peak * setup.mesh.size / 1e12:,.0f} TFLOP/s (dense bf16)'
