"""What a run is, in lines for people."""

import os

import jax

from gpt2_jax.architecture import PRECISIONS
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel import devices
from gpt2_jax.training.optim import decay_mask
from gpt2_jax.training.setup import Setup
from gpt2_jax.workdir.log import duration

# fp32 rate of one CPU core on small matrix products, as measured on a two-core server. Only for the hint that a recipe
# was made for a GPU.
CPU_CORE_FLOPS = 45e9


KERNELS = {
    'xla': 'xla: those that XLA makes of model/gpt2.py',
    'fused': 'fused: training by fused_step.py, decoding by decode_kernels.py, evaluation by model.py',
}


ATTENTION = {
    ('xla', 'xla'): 'xla, as in model/gpt2.py',
    ('xla', 'cudnn'): 'cudnn',
    ('fused', 'xla'): 'fused, as in attention_kernel.py',
    ('fused', 'cudnn'): 'cudnn',
}


def describe(setup: Setup) -> list[str]:
    """What runs, in lines for people: device, precision, attention, data, model, optimizer, cost."""
    cfg, config, dataset, params = setup.model.cfg, setup.config, setup.dataset, setup.shapes.params
    train, tokens, flops = config.train, setup.tokens_per_step, setup.flops_per_token
    leaves = list(zip(jax.tree.leaves(decay_mask(params)), jax.tree.leaves(params), strict=True))
    decayed, kept = (
        [leaf for decays, leaf in leaves if decays is which] for which in (True, False)
    )
    peak = devices.peak_flops(setup.device)
    lines = [
        f'device     {devices.describe_device(setup.device)}; mesh data {config.mesh.data} x fsdp {config.mesh.fsdp} '
        f'x tensor {config.mesh.tensor}; jax {jax.__version__}',
        f'precision  {cfg.dtype}: {PRECISIONS[cfg.dtype].meaning}; parameters, moments, softmax, LayerNorm and loss in fp32'
        + ('; in training logits in bf16' if cfg.kernels == 'fused' else ''),
        f'kernels    {KERNELS[cfg.kernels]}',
        f'attention  {ATTENTION[cfg.kernels, cfg.attention]}'
        + ('; blocks recomputed in the backward pass' if cfg.remat else ''),
        f'data       {dataset.name}: {len(dataset.train):,} training and {len(dataset.val):,} '
        f'{"held-out training" if config.data.holdout else "validation"} tokens, '
        f'{dataset.tokenizer.name} tokenizer, vocabulary {dataset.tokenizer.vocab_size:,}',
        f'model      {count_params(params):,} parameters: {cfg.n_layer} layers, {cfg.n_head} heads, '
        f'width {cfg.n_embd}, context {cfg.n_positions}',
        f'optimizer  AdamW ({config.optim.implementation}): {len(decayed)} leaves with {count_params(decayed):,} '
        f'parameters are decayed, {len(kept)} with {count_params(kept):,} are not',
        f'step       {train.batch_size} windows x {train.seq_len} = {tokens:,} tokens'
        + (f', in {train.grad_accum_steps} micro-batches' if train.grad_accum_steps > 1 else '')
        + f'; {train.steps:,} steps = {tokens * train.steps / len(dataset.train):.1f} epochs',
        f'cost       6 x matmul weights + 12 L D T = {flops:,} FLOPs a token, {flops * tokens:.3g} a step; '
        'MFU = FLOPs a token x tokens/s / peak, the peak '
        + (
            f'{peak * setup.mesh.size / 1e12:,.0f} TFLOP/s (dense bf16)'
            if peak
            else 'unknown for this device'
        ),
    ]
    seconds = flops * tokens / (CPU_CORE_FLOPS * (os.cpu_count() or 1))
    if setup.device.platform == 'cpu' and seconds > 2:
        lines.append(
            f'hint       this configuration is made for a GPU: a step takes about {seconds:.0f} s on this CPU, '
            f'the run about {duration(seconds * train.steps)}. In minutes: --config=configs/quickstart.py'
        )
    return lines
