"""The loss with its gradient, and evaluation, by fused GPU kernels.

The kernels compute what model/gpt2.py and step.py spell out, with the same dropout masks.
Arrays of rows have one row for each token: N = B T.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.kernels.attention import attention
from gpt2_jax.kernels.choose import FUSED, Kernels
from gpt2_jax.kernels.embedding import add_rows, head_loss, head_nats, padded_head
from gpt2_jax.kernels.gelu import gelu
from gpt2_jax.kernels.norm import add_norm
from gpt2_jax.model.dropout import dropout, dropout_seeds
from gpt2_jax.model.gpt2 import causal_attention, embed
from gpt2_jax.model.ops import (
    FAST,
    REMAT_POLICIES,
    cudnn_attention,
    matmul_rows,
    matmul_rows_each,
)
from gpt2_jax.training.optim import join_kernels, round_kernels


def features(cfg: GPT2Config, params, x_BTD, dropout_key, kernels: Kernels = FUSED, first_row=0):
    """The final hidden states from the embeddings: (B, T, D) -> (N, D).

    A branch is what attention or MLP adds to the residual stream, as a pair: a matrix product and
    its bias. The kernel that computes the next LayerNorm also adds the branch. A part that is 'xla'
    in `kernels` is computed by the formula of model/gpt2.py. `first_row` is the index, in the whole
    micro-batch, of the first text on this device. The dropout masks depend on it.
    """
    B, T, D = x_BTD.shape
    N, H, K = B * T, cfg.n_head, cfg.head_dim
    seeds = dropout_seeds(cfg, dropout_key, first_row)

    def add_and_norm(x_ND, branch, norm, seed):
        if seed is not None:
            seed = (*seed[:2], seed[2] * jnp.uint32(T)) if cfg.resid_pdrop else None
        if kernels.norm != 'fused':
            return xla_add_norm(cfg, x_ND, branch, norm, seed)
        scale_D, bias_D = norm['scale'], norm.get('bias')
        options = cfg.resid_pdrop, cfg.layer_norm_epsilon, cfg.compute_dtype
        return add_norm(x_ND, *branch, scale_D, bias_D, seed, *options)

    def matmul(x_N, params):
        return matmul_rows(x_N, params['kernel'], cfg.precision)

    def attention_branch(y_ND, attn, seed):
        qkv_BT3HK = matmul(y_ND, attn['c_attn']).reshape(B, T, 3, H, K)
        seed = seed if cfg.attn_pdrop else None
        bias_3HK = attn['c_attn'].get('bias')
        if kernels.attention == 'fused':
            z_BTHK = attention(qkv_BT3HK, bias_3HK, seed, cfg.attn_pdrop)
        else:
            z_BTHK = xla_attention(cfg, qkv_BT3HK, bias_3HK, seed)
        return matmul(z_BTHK.reshape(N, H, K), attn['c_proj']), attn['c_proj'].get('bias')

    def cudnn_branch(y_ND, attn):
        """`attention_branch` by cuDNN, which takes q, k and v as separate arrays.

        Three matrix products compute them, because splitting the result of one product and joining
        its gradient would take four more passes over memory. The bias of k adds the same number to
        all scores of a query, so softmax ignores it. Each row of the pattern sums to 1, so the bias
        of v is added to every z. The projection of this bias is added to the projection's own bias.
        """
        kernel_3DD = jnp.moveaxis(attn['c_attn']['kernel'].reshape(D, 3, D), 1, 0)
        bias_3HK, bias_D = attn['c_attn'].get('bias'), attn['c_proj'].get('bias')
        q_ND, k_ND, v_ND = matmul_rows_each(y_ND, tuple(kernel_3DD), cfg.precision)
        if bias_3HK is not None:
            kernel_HKD = attn['c_proj']['kernel'].astype(jnp.float32)
            q_ND = add_bias(q_ND, bias_3HK[0].reshape(D))  # cuBLAS adds a bias if it is a vector
            bias_D += jnp.tensordot(bias_3HK[2], kernel_HKD, 2, precision='highest')
        z_BTHK = cudnn_attention(*(x.reshape(B, T, H, K) for x in (q_ND, k_ND, v_ND)))
        return matmul(z_BTHK.reshape(N, H, K), attn['c_proj']), bias_D

    def block(x_ND, branch, h, seeds_3):
        """Adds the branch of the block before. Returns this block's last branch, not yet added."""
        x_ND, y_ND = add_and_norm(x_ND, branch, h['ln_1'], seeds_3[0])
        if kernels.attention == 'cudnn':
            branch = cudnn_branch(y_ND, h['attn'])
        else:
            branch = attention_branch(y_ND, h['attn'], seeds_3[1])
        x_ND, y_ND = add_and_norm(x_ND, branch, h['ln_2'], seeds_3[2])
        c_fc, c_proj = h['mlp']['c_fc'], h['mlp']['c_proj']
        h_NF, bias_F = matmul(y_ND, c_fc), c_fc.get('bias')
        if kernels.gelu == 'hopper':
            from gpt2_jax.kernels.gelu_product import gelu_product

            out_ND = gelu_product(h_NF, bias_F, c_proj['kernel'], cfg.precision)
            return x_ND, (out_ND, c_proj.get('bias'))
        if kernels.gelu == 'fused':
            h_NF = gelu(h_NF, bias_F)
        else:
            h_NF = FAST.activate(cfg.activation_function, add_bias(h_NF, bias_F))
        return x_ND, (matmul(h_NF, c_proj), c_proj.get('bias'))

    policy = REMAT_POLICIES.get(cfg.remat)
    run = jax.checkpoint(block, policy=policy) if policy else block
    x_ND, branch = dropout(x_BTD, seeds[0], cfg.embd_pdrop).reshape(N, D), (None, None)
    for i in range(cfg.n_layer):
        x_ND, branch = run(x_ND, branch, params[f'h_{i}'], seeds[3 * i : 3 * i + 3])
    return add_and_norm(x_ND, branch, params['ln_f'], seeds[-1])[1]


def embed_tokens(cfg: GPT2Config, params, tokens_BT):
    """wte[token] + wpe[position], rounded once to the dtype of the residual stream: (B, T, D)."""
    wte_VD, wpe_PD = params['wte']['embedding'], params['wpe']['embedding']
    embed_BTD, pos_embed_TD = embed(wte_VD, wpe_PD, tokens_BT, 0)
    return (embed_BTD + pos_embed_TD).astype(cfg.stream_dtype)


def add_bias(x, bias):
    """x + bias in the dtype of x; a bias of None adds nothing."""
    return x if bias is None else x + bias.astype(x.dtype)


def xla_add_norm(cfg: GPT2Config, x_ND, branch, norm, seed):
    """kernels/norm.py's add_norm, as model/gpt2.py computes it."""
    branch_ND, branch_bias_D = branch
    if branch_ND is not None:
        x_ND = x_ND + dropout(add_bias(branch_ND, branch_bias_D), seed, cfg.resid_pdrop)
    y_ND = FAST.normalize(x_ND.astype(jnp.float32), cfg.layer_norm_epsilon) * norm['scale']
    return x_ND, add_bias(y_ND, norm.get('bias')).astype(cfg.compute_dtype)


def xla_attention(cfg: GPT2Config, qkv_BT3HK, bias_3HK, seed):
    """kernels/attention.py's attention, as model/gpt2.py computes it."""
    q_BTHK, k_BTHK, v_BTHK = jnp.moveaxis(add_bias(qkv_BT3HK, bias_3HK), 2, 0)
    k_BHSK, v_BHSK = k_BTHK.swapaxes(1, 2), v_BTHK.swapaxes(1, 2)
    options = {'precision': cfg.precision, 'rate': cfg.attn_pdrop, 'seed': seed, 'ops': FAST}
    return causal_attention(q_BTHK, k_BHSK, v_BHSK, **options)


def cast_kernels(cfg: GPT2Config, params):
    """The parameters, with the leaves 'kernel' in the compute dtype."""
    return join_kernels(round_kernels(params, cfg.compute_dtype), params)


def value_and_grad(
    cfg: GPT2Config, kernels: Kernels, params, batch, dropout_key, n_targets: int, first_row=0
):
    """The summed loss of a (micro-)batch over `n_targets`, and its gradient.

    From `params` on, the arguments are those of the function of step.plain_value_and_grad. The
    leaves 'kernel' are cast to the compute dtype before differentiation. So their gradients
    stay in this dtype, as the matrix products return them, and reading them takes half the bytes.
    The gradient of the token embedding may have rows of 0 after the last row. `first_row` is as in
    `features`.
    """
    wte_VD, wpe_PD = params['wte']['embedding'], params['wpe']['embedding']
    x_BTD = embed_tokens(cfg, params, batch['inputs'])
    y_ND, pull_back = jax.vjp(
        lambda params, x_BTD: features(cfg, params, x_BTD, dropout_key, kernels, first_row),
        cast_kernels(cfg, params),
        x_BTD,
    )
    nats_N, dy_ND, dwte_VD = head_loss(y_ND, wte_VD, batch['targets'].reshape(-1), 1 / n_targets)
    grads, dx_BTD = pull_back(dy_ND)
    # The lookup's gradient is added to the head's gradient in place, which saves a table of zeros
    # and a second pass.
    dwte_VD = add_at_tokens(cfg, dwte_VD, batch['inputs'], dx_BTD)
    dwpe_TD = dx_BTD.astype(jnp.float32).sum(0)
    dwpe_PD = jnp.pad(dwpe_TD, ((0, len(wpe_PD) - len(dwpe_TD)), (0, 0)))
    embeddings = {'wte': {'embedding': dwte_VD}, 'wpe': {'embedding': dwpe_PD}}
    return nats_N.sum() / n_targets, grads | embeddings


def add_at_tokens(cfg: GPT2Config, table_VD, tokens_BT, rows_BTD):
    """The table with each of `rows` added to the row of its token: the gradient of a lookup.

    For a small vocabulary, a matrix product adds the rows. The 16,384 rows of a character model
    share 65 tokens, so one program of `add_rows` would add up thousands of rows.
    """
    V, D = table_VD.shape
    if V > 1024:
        return add_rows(table_VD, tokens_BT.reshape(-1), rows_BTD.reshape(-1, D))
    one_hot_BTV = jax.nn.one_hot(tokens_BT, V, dtype=cfg.compute_dtype)
    return table_VD + jnp.einsum(
        'BTV,BTD->VD',
        one_hot_BTV,
        rows_BTD.astype(cfg.compute_dtype),
        precision=cfg.precision,
        preferred_element_type=table_VD.dtype,
    )


def prepare(cfg: GPT2Config, params):
    """The parameters as `make_eval_step`'s function takes them, made once for all batches.

    The leaves 'kernel' are in the compute dtype, and so is 'head', the table of the head. Making
    them for each batch would take 1.6 % of the batch's time (124M, 16 x 1024 tokens, H100).
    """
    head_VD = padded_head(params['wte']['embedding'].astype(cfg.compute_dtype))
    return cast_kernels(cfg, params) | {'head': head_VD}


def make_eval_step(cfg: GPT2Config) -> Callable:
    """The function of step.make_eval_step for prepared parameters, by fused kernels."""
    cfg = dataclasses.replace(cfg, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

    def eval_step(prepared, batch):
        x_BTD = embed_tokens(cfg, prepared, batch['inputs'])
        y_ND = features(cfg, prepared, x_BTD, None)
        targets_BT = batch['targets']
        nats_N = head_nats(y_ND, prepared['head'], targets_BT.reshape(-1), cfg.vocab_size)
        return (nats_N.reshape(targets_BT.shape) * batch['mask']).sum(-1)

    return eval_step
