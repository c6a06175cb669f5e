"""The training loss by fused kernels: what GPT2.__call__ and token_losses compute, from the same parameters."""

import jax
import jax.numpy as jnp

from gpt2_jax import kernels
from gpt2_jax.model import ACTIVATIONS, GPT2Config, dropout, dropout_seeds, embed


def _affine(x_N, params, dtype):
    """x W + b over all dimensions of x but the first."""
    kernel = params['kernel'].astype(dtype)
    y_N = jnp.tensordot(x_N, kernel, x_N.ndim - 1)
    return y_N + params['bias'].astype(dtype) if 'bias' in params else y_N


def train_losses(cfg: GPT2Config, params, tokens_BT, targets_BT, dropout_key):
    """Cross-entropy of each target in nats, with dropout: (B, T), (B, T) -> fp32 (B T,). Differentiable in `params`.

    The same masks as the open model draws for the same key. B T is a multiple of 1024, T of kernels.BLOCK.
    """
    B, T = tokens_BT.shape
    N, H, K, dtype = B * T, cfg.n_head, cfg.head_dim, cfg.compute_dtype
    seeds = dropout_seeds(cfg, dropout_key)

    def add_norm(x_ND, branch_ND, norm, seeds):
        return kernels.add_norm(x_ND, branch_ND, norm['scale'], norm.get('bias'), seeds, cfg.resid_pdrop,
                                cfg.layer_norm_epsilon)

    def block(x_ND, branch_ND, h, seeds_32):
        """`branch` is what the block before has to add; returns this block's own, not yet added."""
        x_ND, y_ND = add_norm(x_ND, branch_ND, h['ln_1'], seeds_32[0])
        qkv_N3HK = _affine(y_ND, h['attn']['c_attn'], dtype)
        import os
        if os.environ.get('FA') == 'cudnn':
            q = qkv_N3HK.reshape(B, T, 3, H, K)
            z_BTHK = jax.nn.dot_product_attention(q[:, :, 0], q[:, :, 1], q[:, :, 2], is_causal=True, implementation='cudnn')
        else:
          z_BTHK = kernels.attention(qkv_N3HK.reshape(B, T, 3, H, K), seeds_32[1], cfg.attn_pdrop)
        branch_ND = _affine(z_BTHK.reshape(N, H, K), h['attn']['c_proj'], dtype)
        x_ND, y_ND = add_norm(x_ND, branch_ND, h['ln_2'], seeds_32[2])
        h_NF = ACTIVATIONS[cfg.activation_function](_affine(y_ND, h['mlp']['c_fc'], dtype))
        return x_ND, _affine(h_NF, h['mlp']['c_proj'], dtype)

    x_BTD = embed(cfg, params['wte']['embedding'], params['wpe']['embedding'], tokens_BT, 0)
    x_ND, branch_ND = dropout(x_BTD, seeds[0], cfg.embd_pdrop).reshape(N, -1), None
    for i in range(cfg.n_layer):
        run = jax.checkpoint(block) if cfg.remat else block
        x_ND, branch_ND = run(x_ND, branch_ND, params[f'h_{i}'], seeds[3 * i:3 * i + 3])
    _, y_ND = add_norm(x_ND, branch_ND, params['ln_f'], seeds[-1])
    return kernels.head_loss(y_ND, params['wte']['embedding'].astype(dtype), targets_BT.reshape(-1))
