"""A training step of fused GPU kernels: the loss with its gradient, and AdamW.

It computes what model/gpt2.py, step.py and optim.py spell out, with the same dropout masks. Arrays
of rows have one row for each token: N = B T.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.kernels.adamw import MAX_VECTORS, adamw, adamw_vectors
from gpt2_jax.kernels.attention import attention
from gpt2_jax.kernels.cross_entropy import head_loss
from gpt2_jax.kernels.gelu import gelu
from gpt2_jax.kernels.norm import add_norm
from gpt2_jax.model.dropout import dropout, dropout_seeds
from gpt2_jax.model.gpt2 import embed
from gpt2_jax.model.ops import cudnn_attention, matmul_rows
from gpt2_jax.training.optim import (
    AdamWState,
    FusedOptimizer,
    bias_correction,
    decay_mask,
    zero_moments,
)


def features(cfg: GPT2Config, params, x_BTD, dropout_key):
    """The final hidden states from the embeddings: (B, T, D) -> (N, D).

    A branch is what attention or MLP adds to the residual stream: (its product, its bias). Each
    branch is added by the kernel that also computes the next LayerNorm.
    """
    B, T, D = x_BTD.shape
    N, H, K = B * T, cfg.n_head, cfg.head_dim
    seeds = dropout_seeds(cfg, dropout_key)

    def add_and_norm(x_ND, branch, norm, seed):
        seed = seed if cfg.resid_pdrop else None
        scale_D, bias_D = norm['scale'], norm.get('bias')
        options = cfg.resid_pdrop, cfg.layer_norm_epsilon, cfg.compute_dtype
        return add_norm(x_ND, *branch, scale_D, bias_D, seed, *options)

    def matmul(x_N, params):
        return matmul_rows(x_N, params['kernel'], cfg.precision)

    def attention_branch(y_ND, attn, seed):
        qkv_BT3HK = matmul(y_ND, attn['c_attn']).reshape(B, T, 3, H, K)
        seed = seed if cfg.attn_pdrop else None
        z_BTHK = attention(qkv_BT3HK, attn['c_attn'].get('bias'), seed, cfg.attn_pdrop)
        return matmul(z_BTHK.reshape(N, H, K), attn['c_proj']), attn['c_proj'].get('bias')

    def cudnn_branch(y_ND, attn):
        """The same by cuDNN, which takes q, k and v apart.

        Three products, because cutting one apart and joining its gradient would take four more
        passes over memory. The bias of k adds the same number to all scores of a query, so softmax
        ignores it. Each row of the pattern sums to 1, so the bias of v adds itself to every z, and
        its product joins the bias of the projection.
        """
        kernel_D3HK, bias_3HK = attn['c_attn']['kernel'], attn['c_attn'].get('bias')
        q_NHK, k_NHK, v_NHK = (
            matmul_rows(y_ND, kernel_D3HK[:, i], cfg.precision) for i in range(3)
        )
        bias_D = attn['c_proj'].get('bias')
        if bias_3HK is not None:
            kernel_HKD = attn['c_proj']['kernel'].astype(jnp.float32)
            q_NHK += bias_3HK[0].astype(q_NHK.dtype)
            bias_D += jnp.tensordot(bias_3HK[2], kernel_HKD, 2, precision='highest')
        z_BTHK = cudnn_attention(*(x.reshape(B, T, H, K) for x in (q_NHK, k_NHK, v_NHK)))
        return matmul(z_BTHK.reshape(N, H, K), attn['c_proj']), bias_D

    def block(x_ND, branch, h, seeds_3):
        """Adds `branch`, from the block before, and returns this block's own, not yet added."""
        x_ND, y_ND = add_and_norm(x_ND, branch, h['ln_1'], seeds_3[0])
        if cfg.attention == 'cudnn':
            branch = cudnn_branch(y_ND, h['attn'])
        else:
            branch = attention_branch(y_ND, h['attn'], seeds_3[1])
        x_ND, y_ND = add_and_norm(x_ND, branch, h['ln_2'], seeds_3[2])
        c_fc, c_proj = h['mlp']['c_fc'], h['mlp']['c_proj']
        h_NF = gelu(matmul(y_ND, c_fc), c_fc.get('bias'))
        return x_ND, (matmul(h_NF, c_proj), c_proj.get('bias'))

    x_ND, branch = dropout(x_BTD, seeds[0], cfg.embd_pdrop).reshape(N, D), (None, None)
    for i in range(cfg.n_layer):
        run = jax.checkpoint(block) if cfg.remat else block
        x_ND, branch = run(x_ND, branch, params[f'h_{i}'], seeds[3 * i : 3 * i + 3])
    return add_and_norm(x_ND, branch, params['ln_f'], seeds[-1])[1]


def make_value_and_grad(cfg: GPT2Config) -> Callable:
    """The function of step.plain_value_and_grad, by fused kernels."""
    return functools.partial(value_and_grad, cfg)


def value_and_grad(cfg: GPT2Config, params, batch, dropout_key, n_targets: int):
    """The summed loss of a (micro-)batch over `n_targets`, and its gradient.

    The leaves 'kernel' are cast to the compute dtype before differentiation, so their gradients
    stay in that dtype, as the matrix products return them, and are read at half the bytes. The
    gradient of the token embedding may have rows of 0 after the last row.
    """

    def cast(path, leaf):
        return leaf.astype(cfg.compute_dtype) if path[-1].key == 'kernel' else leaf

    wte_VD, wpe_PD = params['wte']['embedding'], params['wpe']['embedding']
    embed_BTD, pos_embed_TD = embed(wte_VD, wpe_PD, batch['inputs'], 0)
    x_BTD = (embed_BTD + pos_embed_TD).astype(cfg.stream_dtype)
    y_ND, pull_back = jax.vjp(
        lambda params, x_BTD: features(cfg, params, x_BTD, dropout_key),
        jax.tree_util.tree_map_with_path(cast, params),
        x_BTD,
    )
    nats_N, dy_ND, dwte_VD = head_loss(y_ND, wte_VD, batch['targets'].reshape(-1), 1 / n_targets)
    grads, dx_BTD = pull_back(dy_ND)
    # The gradient of the lookup is added to the head's in place: no table of zeros, no second pass.
    dwte_VD = add_at_tokens(cfg, dwte_VD, batch['inputs'], dx_BTD)
    dwpe_TD = dx_BTD.astype(jnp.float32).sum(0)
    dwpe_PD = jnp.pad(dwpe_TD, ((0, len(wpe_PD) - len(dwpe_TD)), (0, 0)))
    embeddings = {'wte': {'embedding': dwte_VD}, 'wpe': {'embedding': dwpe_PD}}
    return nats_N.sum() / n_targets, grads | embeddings


def add_at_tokens(cfg: GPT2Config, table_VD, tokens_BT, rows_BTD):
    """The table with each of `rows` added to the row of its token: the gradient of a lookup.

    A GPU's scatter-add uses atomics, in no fixed order, so two runs differ; and the 16,384 rows of
    a character model would wait for each other at 65 places (15 of 25 ms a step in bf16 on an
    H100). For a small vocabulary a matrix product does it.
    """
    V = table_VD.shape[0]
    if V > 1024:
        return table_VD.at[tokens_BT].add(rows_BTD.astype(table_VD.dtype))
    one_hot_BTV = jax.nn.one_hot(tokens_BT, V, dtype=cfg.compute_dtype)
    return table_VD + jnp.einsum(
        'BTV,BTD->VD',
        one_hot_BTV,
        rows_BTD.astype(cfg.compute_dtype),
        precision=cfg.precision,
        preferred_element_type=table_VD.dtype,
    )


def global_norm(tree):
    """sqrt(sum of all squares), fp32, in few passes.

    Each matrix is summed by rows, all vectors are joined into one, and then these sums are summed.
    """
    leaves = jax.tree.leaves(tree)
    matrices = [leaf for leaf in leaves if leaf.size > 1 << 16]
    vectors = [leaf.reshape(-1) for leaf in leaves if leaf.size <= 1 << 16]
    parts = [jnp.square(leaf.astype(jnp.float32)).sum(-1).reshape(-1) for leaf in matrices]
    if vectors:
        parts.append(jnp.square(jnp.concatenate(vectors)))
    # Without the barrier XLA sums each part by itself: 100 small kernels for the 124M model.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(parts)).sum())


def make_optimizer(
    *,
    schedule: optax.Schedule,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> FusedOptimizer:
    """optim.make_optimizer's update, with one kernel for each matrix that reads and writes it once.

    XLA computes updates, moments and norms in several passes, and copies leaves that one pass reads
    and another overwrites: the copies alone take 1.3 of 28 ms a step (124M, H100).
    """

    def update(grads, state, params):
        norm = global_norm(grads)
        scalars = {
            'learning_rate': schedule(state.count),
            'factor': jnp.where(norm > clip_norm, clip_norm / norm, 1) if clip_norm else 1.0,
            'correct1': 1 / bias_correction(beta1, state.count + 1),
            'correct2': 1 / bias_correction(beta2, state.count + 1),
        }
        scalars_4 = jnp.stack([jnp.float32(x) for x in scalars.values()])
        leaves = list(zip(*map(jax.tree.leaves, (grads, state.m, state.v, params)), strict=True))
        decays = jax.tree.leaves(decay_mask(params))
        matrices = [i for i, is_matrix in enumerate(decays) if is_matrix]
        vectors = [i for i, is_matrix in enumerate(decays) if not is_matrix]
        new, sums = {}, []  # leaf -> (m, v, p); sums of squares of updates and parameters
        for i in matrices:
            rates = beta1, beta2, eps, weight_decay
            *new[i], partial = adamw(*leaves[i], scalars_4, rates=rates)
            sums.append(partial)
        for start in range(0, len(vectors), MAX_VECTORS):
            group = vectors[start : start + MAX_VECTORS]
            columns = map(list, zip(*(leaves[i] for i in group), strict=True))
            rates = beta1, beta2, eps, 0.0
            *together, partial = adamw_vectors(*columns, scalars_4, rates=rates)
            new |= zip(group, zip(*together, strict=True), strict=True)
            sums.append(partial)
        tree = jax.tree.structure(params)
        columns = zip(*(new[i] for i in range(len(leaves))), strict=True)
        m, v, params = (jax.tree.unflatten(tree, column) for column in columns)
        update_norm, param_norm = jnp.sqrt(jnp.concatenate(sums).sum(0))
        norms = {'grad_norm': norm, 'update_norm': update_norm, 'param_norm': param_norm}
        return params, AdamWState(state.count + 1, m, v), norms

    return FusedOptimizer(zero_moments, update)
