"""A training step of fused kernels: the loss and its gradient, which the open model computes, and AdamW's update."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.kernels import attention, gelu
from gpt2_jax.kernels.adamw import ADAMW_VECTORS, adamw, adamw_vectors
from gpt2_jax.kernels.cross_entropy import head_loss
from gpt2_jax.kernels.norm import add_norm
from gpt2_jax.model.dropout import dropout, dropout_seeds
from gpt2_jax.model.gpt2 import embed
from gpt2_jax.model.ops import cudnn_attention, matmul_rows
from gpt2_jax.training.optim import AdamWState, FusedOptimizer, decay_mask, zero_moments


def features(cfg: GPT2Config, params, x_BTD, dropout_key):
    """The final hidden states in training, from the embeddings: (B, T, D) -> (B T, D).

    With the same dropout masks as the open model draws for the same key.
    """
    B, T, D = x_BTD.shape
    N, H, K = B * T, cfg.n_head, cfg.head_dim
    seeds = dropout_seeds(cfg, dropout_key)

    def add_and_norm(x_ND, branch, norm, seeds):
        return add_norm(
            x_ND,
            *branch,
            norm['scale'],
            norm.get('bias'),
            seeds if cfg.resid_pdrop else None,
            cfg.resid_pdrop,
            cfg.layer_norm_epsilon,
        )

    def affine(x_N, params):
        return matmul_rows(x_N, params['kernel'], cfg.precision)

    def attend_by_cudnn(y_ND, attn):
        """What the attention adds, and its bias, by cuDNN, which wants q, k and v apart.

        Three products, because cutting up one and joining its gradient are four more passes over memory. The bias of k
        adds the same to all scores of a query, which softmax takes no notice of; that of v, as each row of the pattern
        sums to 1, adds the same to every z: to the projection's bias.
        """
        kernel_D3HK, bias_3HK = attn['c_attn']['kernel'], attn['c_attn'].get('bias')
        q_NHK, k_NHK, v_NHK = (
            matmul_rows(y_ND, kernel_D3HK[:, i], cfg.precision) for i in range(3)
        )
        bias_D = attn['c_proj'].get('bias')
        if bias_3HK is not None:
            q_NHK += bias_3HK[0].astype(q_NHK.dtype)
            bias_D += jnp.tensordot(
                bias_3HK[2], attn['c_proj']['kernel'].astype(jnp.float32), 2, precision='highest'
            )
        z_BTHK = cudnn_attention(*(x.reshape(B, T, H, K) for x in (q_NHK, k_NHK, v_NHK)))
        return affine(z_BTHK.reshape(N, H, K), attn['c_proj']), bias_D

    def block(x_ND, branch, h, seeds_3):
        """`branch` is what the block before has to add, and its bias; returns this block's own, not yet added."""
        attn, mlp = h['attn'], h['mlp']
        x_ND, y_ND = add_and_norm(x_ND, branch, h['ln_1'], seeds_3[0])
        if cfg.attention == 'cudnn':
            branch = attend_by_cudnn(y_ND, attn)
        else:
            qkv_BT3HK = affine(y_ND, attn['c_attn']).reshape(B, T, 3, H, K)
            z_BTHK = attention.attention(
                qkv_BT3HK,
                attn['c_attn'].get('bias'),
                seeds_3[1] if cfg.attn_pdrop else None,
                cfg.attn_pdrop,
            )
            branch = affine(z_BTHK.reshape(N, H, K), attn['c_proj']), attn['c_proj'].get('bias')
        x_ND, y_ND = add_and_norm(x_ND, branch, h['ln_2'], seeds_3[2])
        h_NF = gelu.gelu(affine(y_ND, mlp['c_fc']), mlp['c_fc'].get('bias'))
        return x_ND, (affine(h_NF, mlp['c_proj']), mlp['c_proj'].get('bias'))

    x_ND, branch = dropout(x_BTD, seeds[0], cfg.embd_pdrop).reshape(N, D), (None, None)
    for i in range(cfg.n_layer):
        run = jax.checkpoint(block) if cfg.remat else block
        x_ND, branch = run(x_ND, branch, params[f'h_{i}'], seeds[3 * i : 3 * i + 3])
    return add_and_norm(x_ND, branch, params['ln_f'], seeds[-1])[1]


def make_value_and_grad(cfg: GPT2Config) -> Callable:
    """step.plain_value_and_grad's function, by fused kernels."""
    return functools.partial(value_and_grad, cfg)


def value_and_grad(cfg: GPT2Config, params, batch, dropout_key, n_targets: int):
    """The summed loss of a (micro-)batch over `n_targets`, and its gradient; that of a kernel in the compute dtype.

    Kernels are cast before they are differentiated by: their gradients, which the products give in the compute dtype,
    are then read as they are, at half the bytes. That of the embedding may have rows of 0 after the last.
    """

    def cast(path, leaf):
        return leaf.astype(cfg.compute_dtype) if path[-1].key == 'kernel' else leaf

    wte_VD, wpe_PD = params['wte']['embedding'], params['wpe']['embedding']
    embed_BTD, pos_embed_TD = embed(wte_VD, wpe_PD, batch['inputs'], 0)
    x_BTD = (embed_BTD + pos_embed_TD).astype(cfg.compute_dtype)
    y_ND, pull_back = jax.vjp(
        lambda params, x_BTD: features(cfg, params, x_BTD, dropout_key),
        jax.tree_util.tree_map_with_path(cast, params),
        x_BTD,
    )
    nats_N, dy_ND, dwte_VD = head_loss(y_ND, wte_VD, batch['targets'].reshape(-1), 1 / n_targets)
    grads, dx_BTD = pull_back(dy_ND)
    # The look-up's gradient goes on top of the head's, instead of into a table of zeros that is then added.
    dwpe_TD = dx_BTD.astype(jnp.float32).sum(0)
    return nats_N.sum() / n_targets, grads | {
        'wte': {'embedding': add_rows(cfg, dwte_VD, batch['inputs'], dx_BTD)},
        'wpe': {'embedding': jnp.pad(dwpe_TD, ((0, wpe_PD.shape[0] - dwpe_TD.shape[0]), (0, 0)))},
    }


def add_rows(cfg: GPT2Config, table_VD, tokens_BT, rows_BTD):
    """The table with each row of `rows` added at its token: the gradient of a look-up, on top of another.

    For a small vocabulary it is a matrix product. A GPU does the usual scatter-add with atomics, in no fixed order, so
    that two runs differ; and 16,384 rows that all go to 65 places wait for each other (15 of 25 ms a step in bf16 on an
    H100).
    """
    V = table_VD.shape[0]
    if V > 1024:
        return table_VD.at[tokens_BT].add(rows_BTD.astype(table_VD.dtype))
    chosen_BTV = jax.nn.one_hot(tokens_BT, V, dtype=cfg.compute_dtype)
    return table_VD + jnp.einsum(
        'BTV,BTD->VD',
        chosen_BTV,
        rows_BTD.astype(cfg.compute_dtype),
        precision=cfg.precision,
        preferred_element_type=table_VD.dtype,
    )


def global_norm(tree):
    """sqrt(sum of all squares), fp32, in few passes: by rows of each matrix, all vectors in one, then their sums."""
    vectors, rows = [], []
    for leaf in jax.tree.leaves(tree):
        (rows if leaf.size > 1 << 16 else vectors).append(leaf)
    rows = [jnp.square(leaf.astype(jnp.float32)).sum(-1).reshape(-1) for leaf in rows]
    vectors = (
        [jnp.square(jnp.concatenate([leaf.reshape(-1) for leaf in vectors]))] if vectors else []
    )
    # The barrier keeps XLA from adding up each part by itself, 100 small kernels for the 124M model.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(rows + vectors)).sum())


def make_optimizer(
    *,
    schedule: optax.Schedule,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> FusedOptimizer:
    """optim.make_optimizer's with one kernel a matrix, which reads g, m, v and p once, and writes m, v and p.

    XLA computes updates, moments and norms in several passes over the same leaves, and copies what one still has to
    read and another overwrites: the copies alone are 1.3 of 28 ms a step of the 124M model on an H100.
    """

    def update(grads, state, params):
        s = (state.count + 1).astype(jnp.float32)
        norm = global_norm(grads)
        factor = jnp.where(norm > clip_norm, clip_norm / norm, 1) if clip_norm else 1.0
        scalars = jnp.stack(
            [
                jnp.float32(x)
                for x in (schedule(state.count), factor, 1 / (1 - beta1**s), 1 / (1 - beta2**s))
            ]
        )
        trees = grads, state.m, state.v, params
        leaves = list(zip(*map(jax.tree.leaves, trees), strict=True))
        decays = jax.tree.leaves(decay_mask(params))  # all but vectors
        new, sums = dict.fromkeys(range(len(leaves))), []
        for i in (i for i in new if decays[i]):
            *new[i], partial = adamw(*leaves[i], scalars, rates=(beta1, beta2, eps, weight_decay))
            sums.append(partial)
        vectors = [i for i in new if not decays[i]]
        for group in (
            vectors[i : i + ADAMW_VECTORS] for i in range(0, len(vectors), ADAMW_VECTORS)
        ):
            columns = map(list, zip(*(leaves[i] for i in group), strict=True))
            *together, partial = adamw_vectors(*columns, scalars, rates=(beta1, beta2, eps, 0.0))
            new |= zip(group, zip(*together, strict=True), strict=True)
            sums.append(partial)
        tree = jax.tree.structure(params)
        m, v, params = (
            jax.tree.unflatten(tree, column) for column in zip(*new.values(), strict=True)
        )
        update_norm, param_norm = jnp.sqrt(jnp.concatenate(sums).sum(0))
        return (
            params,
            AdamWState(state.count + 1, m, v),
            {'grad_norm': norm, 'update_norm': update_norm, 'param_norm': param_norm},
        )

    return FusedOptimizer(zero_moments, update)
