"""The memory that a device needs for an update, by array; no JAX.

It counts the arrays that training/fused_step.py keeps. For a part that XLA compiles, memory is a
rough sum. Sizes are in bytes.
"""

from gpt2_jax.architecture import GPT2Config, padded_vocab, parameter_shapes
from gpt2_jax.kernels.choose import Kernels
from gpt2_jax.parallel import rules
from gpt2_jax.speed.case import Case, stored_elements, used_elements

BYTES = {'bfloat16': 2, 'float32': 4}
GIB = 2**30


def moment_elements(case: Case) -> int:
    """Elements of the moments that one device stores: two for a parameter, one under Muon."""
    both = 2 * sum(stored_elements(case.cfg, case.mesh))
    if case.algorithm == 'adamw':
        return both
    return both - sum(
        rules.local_size(name, shape, case.mesh)
        for name, shape in parameter_shapes(case.cfg).items()
        if name.startswith('h_') and name.endswith('kernel')
    )


def kept_by_block(cfg: GPT2Config, kernels: Kernels, T: int, tensor: int) -> dict[str, int]:
    """What a block keeps for its backward pass without remat, in bytes a token.

    The branches, the products that the residual stream adds up, are not kept. `tensor` devices
    share heads and columns.
    """
    c, s = BYTES[cfg.compute_dtype], BYTES[cfg.stream_dtype]
    D, F, H = cfg.n_embd, cfg.d_ff // tensor, cfg.n_head // tensor
    kept = {
        'resid_pre': s * D,
        'ln_1': c * D,
        'q, k, v': 3 * c * D // tensor,
        'z': c * D // tensor,
        'log-sum-exp': 4 * H,
        'resid_mid': s * D,
        'ln_2': c * D,
        'means and 1 / std': 16,
        'mlp_pre': c * F,
        'mlp_post': c * F,
    }
    if kernels.attention == 'xla':  # the pattern in fp32, and what multiplies v
        kept['log-sum-exp'] = (4 + c) * H * T
    if kernels.norm == 'xla':
        kept['normalised, fp32'] = 8 * D
    if kernels.gelu == 'xla' and c == 4:
        kept['within GELU'] = 8 * F
    return kept


def kept(cfg: GPT2Config, kernels: Kernels, T: int, tensor: int = 1) -> int:
    """Bytes a token that a block keeps until its backward pass, by model.remat."""
    arrays = kept_by_block(cfg, kernels, T, tensor)
    if cfg.remat == 'none':
        return sum(arrays.values())
    branch = BYTES[cfg.compute_dtype] * cfg.n_embd
    inputs = arrays['resid_pre'] + (branch if kernels.fused_training else 0)
    if cfg.remat == 'block':
        return inputs
    products = arrays['q, k, v'] + branch + arrays['mlp_pre']
    if kernels.attention == 'fused':
        products += arrays['z'] + arrays['log-sum-exp']
    return inputs + products


def memory(case: Case, kernels: Kernels) -> tuple[dict[str, int], str]:
    """What a device holds when it holds most, by array; and when that is.

    It may hold most at one of three moments: at the head, where the logits are; in the backward
    pass of the last block; or at the end of the backward pass, where all gradients are.
    """
    cfg, N, mesh = case.cfg, case.tokens, case.mesh
    c, s, D, F = BYTES[cfg.compute_dtype], BYTES[cfg.stream_dtype], cfg.n_embd, cfg.d_ff
    (own_kernels, own_others), tensor = stored_elements(cfg, mesh), mesh['tensor']
    kernels_used, others_used = used_elements(cfg, mesh)
    stored, used = own_kernels + own_others, kernels_used + others_used
    vocab = padded_vocab(cfg.vocab_size) // (1 if cfg.vocab_size % tensor else tensor)
    casts = kernels_used * c if c == 2 or mesh['fsdp'] > 1 else 0
    # The fused update writes a shard's matrices in the compute dtype; gathered, they are new.
    rounds = kernels.fused_training and kernels.optimizer == 'fused' and mesh['fsdp'] > 1
    always = {
        'parameters': 4 * stored,
        'moments': 4 * moment_elements(case),
        'average of the parameters': 4 * stored if case.averages else 0,
        'matrices of the shard, rounded': own_kernels * c if rounds else 0,
        'parameters as used': casts + (4 * others_used if mesh['fsdp'] > 1 else 0),
        'gradients of other micro-batches': 4 * used if case.micro_batches > 1 else 0,
    }
    activations = N * (cfg.n_layer * kept(cfg, kernels, case.seq_len, tensor) + (s + c) * D + 8)
    logits = N * vocab * (c if kernels.loss == 'fused' else 8)
    table = vocab * D
    head = {
        'activations': activations,
        'logits': logits,
        # The embedding in the compute dtype; its gradient, as summed and as scaled.
        'the head and its gradient': table * (c + 8),
        'gradient of the activations': N * D * (4 + c),
    }
    backward = {
        'activations': activations,
        'the head and its gradient': table * 4,
        'gradient of the activations': N * (2 * c * F // tensor + (s + c) * D),
    }
    if cfg.remat != 'none':
        again = sum(kept_by_block(cfg, kernels, case.seq_len, tensor).values())
        backward['a block computed again'] = N * again
    gradients = kernels_used * (c if kernels.fused_training else 4) + 4 * others_used
    if case.devices > 1:
        gradients += used * BYTES[case.reduce_dtype]
    moments = {
        'at the head': head,
        'in the last block': backward,
        'at the end of the backward pass': {'gradients': gradients},
    }
    when = max(moments, key=lambda name: sum(moments[name].values()))
    return {name: size for name, size in (always | moments[when]).items() if size}, when
