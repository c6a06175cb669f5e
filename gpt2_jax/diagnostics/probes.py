"""Probes: what the model is like at chosen steps of its training, measured on a fixed text.

A probe runs between two updates, in programs of its own, and changes nothing: a run with probes has
the parameters, bit for bit, of the run without. Everything goes into one file of the run's folder,
`probes.npz`, which numpy opens. P probes, L layers, H heads, R rows of T tokens; N parameter
arrays, A activations; 41 bins:

    steps (P,)            updates done before each probe
    tokens (R, T)         the probe text: the beginning of the validation text
    loss (P, R, T - 1)    nats of each token but the first
    rank (P, L + 1, R, T - 1)
                          the number of tokens that come before the right one if the final LayerNorm
                          and the output head read the residual stream before the first block, and
                          after each
    entropy (P, L, H)     of the attention pattern, in nats, mean over the positions of the text
    previous, duplicate, induction (P, L, H)
                          scores of lens.head_scores, on random repeated tokens
    tensors, sizes (N,)   names and sizes of the parameter arrays
    weight, gradient, update (P, N)
                          Euclidean norms: of the parameters; of the gradient of the loss on up to
                          64 tokens of the probe text; of the update that led here (nan at step 0)
    ratio (P, N)          update / weight
    activations (A,)      names, as in gpt2_jax.lens
    rms, kurtosis (P, A)  of the elements of an activation; the kurtosis of a normal one is 3
    dead (P, L)           the share of MLP units whose input to the activation function is never
                          above 0
    curvature (P,)        the largest eigenvalue of the Hessian of that loss, by three steps of
                          Lanczos' method: a lower bound, up to a third below
    weight_bins, gradient_bins (P, N, 41), activation_bins (P, A, 41)
                          how many of up to 65,536 evenly spaced elements lie in each bin
    edges (40,)           of the bins, in units of the rms of the elements; the first and the last
                          bin hold everything beyond
"""

import dataclasses
import math
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import files
from gpt2_jax.lens.hessian import lanczos
from gpt2_jax.lens.readings import repeated_tokens, residual_stream
from gpt2_jax.lens.subject import as_numpy, leaf_shapes, next_token_losses
from gpt2_jax.model.gpt2 import GPT2, LayerNorm
from gpt2_jax.model.ops import FAST
from gpt2_jax.parallel.hosts import is_first
from gpt2_jax.parallel.mesh import on_one_device
from gpt2_jax.terminal import counted
from gpt2_jax.training.programs import compile_in_background
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import TrainState
from gpt2_jax.workdir.history import PROBES, read_probes
from gpt2_jax.workdir.log import Logger
from gpt2_jax.workdir.storage import is_log_spaced

ROWS, MOST_TOKENS = 4, 128  # of the probe text, and of the random repeated text
# Tokens of the gradient, and products with the Hessian for the curvature.
GRADIENT_TOKENS, CURVATURE_PRODUCTS = 64, 3
# A finite difference of gradients stands for the product with the Hessian, in fp32: a program with
# second derivatives takes three times as long to compile. The vector has norm 1.
DIFFERENCE = 2e-3
EDGES = np.linspace(-5, 5, 40)
BIN_ELEMENTS = 65_536
SCORES = ('previous', 'duplicate', 'induction')


def activation_names(n_layer: int) -> list[str]:
    """The activations whose distributions are recorded."""
    parts = ('attn_out', 'mlp_post', 'mlp_out', 'resid_post')
    return ['h_0.resid_pre', *(f'h_{i}.{part}' for i in range(n_layer) for part in parts), 'ln_f']


class Measure:
    """Measures a model: `measure(params)` gives a probe, but for `update` and `ratio`.

    Compiles on the threads of `pool` as soon as it is made, if there is one.
    """

    def __init__(self, setup: Setup, pool: Executor | None = None):
        self.setup = setup
        # Rematerialisation changes no value, and a fused attention never writes its pattern.
        self.cfg = dataclasses.replace(
            setup.model.cfg, remat='none', attention='xla', kernels='xla'
        )
        self.tokens_RT = probe_text(setup)
        T = self.tokens_RT.shape[1]
        repeated = repeated_tokens(self.cfg, ROWS)[:, :T] if T >= 4 else self.tokens_RT
        self.half = repeated.shape[1] // 2
        # One program for both texts; what is padded comes after all that is looked at.
        padded = np.pad(repeated, ((0, 0), (0, T - repeated.shape[1])))
        self.all_tokens = np.concatenate([self.tokens_RT, padded])
        self.gradient_tokens = self.tokens_RT[: max(1, GRADIENT_TOKENS // T), :GRADIENT_TOKENS]
        # The device of `on_one_device`, whatever jax.default_device is.
        place = jax.sharding.SingleDeviceSharding(setup.mesh.local_devices[0])
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            setup.shapes.params,
        )
        self._looking = compile_in_background(
            pool, jax.jit(self._look), lambda: (params, self.all_tokens)
        )
        # On a CPU, a few gradients of 64 tokens cost less if their program is not optimised.
        options = {'xla_backend_optimization_level': 0} if setup.device.platform == 'cpu' else {}
        gradient = jax.jit(self._gradient, compiler_options=options)
        self._gradient_at = compile_in_background(
            pool, gradient, lambda: (params, self.gradient_tokens)
        )

    def __call__(self, params) -> dict[str, np.ndarray]:
        """The arrays of one probe, without their first axis; see the head of this file."""
        # A probe is too little work for a mesh.
        params = on_one_device(self.setup.mesh, params)
        found, taken = self._looking(params, self.all_tokens)
        gradient = self._gradient_at(params, self.gradient_tokens)
        curvature = self.curvature(params, gradient)
        weights = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        gradients = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
        taken = [as_numpy(taken[name]) for name in activation_names(self.cfg.n_layer)]
        return {
            **{name: np.asarray(value) for name, value in found.items()},
            'weight': norms(weights),
            'gradient': norms(gradients),
            'rms': norms(taken) / np.sqrt([x.size for x in taken]),
            'kurtosis': np.array([kurtosis(x) for x in taken]),
            'curvature': np.float64(curvature),
            'weight_bins': np.stack([bins(x) for x in weights]),
            'gradient_bins': np.stack([bins(x) for x in gradients]),
            'activation_bins': np.stack([bins(x) for x in taken]),
        }

    def curvature(self, params, gradient) -> float:
        """The largest eigenvalue of the Hessian, from below; nan if the gradient is not finite."""
        # On the host: to compile a handful of small programs would cost more than they save.
        params_P, gradient_P = flat(params), flat(gradient)
        if not 0 < np.abs(gradient_P).max() < np.inf:
            return float('nan')

        def product(v_P):
            there = like(params, params_P + np.float32(DIFFERENCE) * np.asarray(v_P))
            gradient_there_P = flat(self._gradient_at(there, self.gradient_tokens))
            return (gradient_there_P - gradient_P) / np.float32(DIFFERENCE)

        return lanczos(product, gradient_P, CURVATURE_PRODUCTS, 0.0).top

    def constants(self) -> dict[str, np.ndarray]:
        """The arrays that all probes of a run share."""
        leaves = leaf_shapes(self.setup.shapes.params)
        return {
            'tokens': self.tokens_RT,
            'tensors': np.array(list(leaves)),
            'sizes': np.array([math.prod(shape) for shape in leaves.values()]),
            'activations': np.array(activation_names(self.cfg.n_layer)),
            'edges': EDGES,
        }

    def _look(self, params, all_tokens):
        """(figures, {name: activation}) of the probe text and the repeated one."""
        cfg, rows, taken = self.cfg, len(self.tokens_RT), {}
        model = GPT2(cfg, FAST._replace(tap=lambda name, x: taken.setdefault(name, x)))
        logits_BTV = model.apply({'params': params}, all_tokens)

        def of_all(names):
            return jnp.stack([taken[name] for name in names])

        layers, query, half = range(cfg.n_layer), np.arange(self.half, 2 * self.half), self.half
        # One small program for all layers compiles sooner than one for each.
        streams_LRTD = of_all(residual_stream(cfg))[:, :rows]
        patterns_LBHTS = of_all(f'h_{i}.pattern' for i in layers)
        mlp_LRTF = of_all(f'h_{i}.mlp_pre' for i in layers)[:, :rows]
        found = {
            'loss': next_token_losses(logits_BTV[:rows], all_tokens[:rows]),
            # Layer by layer: the logits of all at once would need gigabytes for GPT-2.
            'rank': jax.lax.map(
                lambda x_RTD: ranks(cfg, params, x_RTD, all_tokens[:rows]), streams_LRTD
            ),
            'entropy': -jax.scipy.special.xlogy(patterns_LBHTS, patterns_LBHTS)
            .sum(-1)[:, :rows]
            .mean((1, 3)),
            'dead': (mlp_LRTF.max((1, 2)) <= 0).mean(-1),
        }
        for name, back in zip(SCORES, (1, half, half - 1), strict=True):
            found[name] = patterns_LBHTS[:, rows:, :, query, query - back].mean((1, 3))
        return found, {name: taken[name][:rows] for name in activation_names(cfg.n_layer)}

    def _gradient(self, params, tokens):
        """The gradient of the mean loss of a text, in fp32."""
        cfg = dataclasses.replace(self.cfg, dtype='float32')

        def loss(params):
            logits_BTV = GPT2(cfg, FAST).apply({'params': params}, tokens)
            return next_token_losses(logits_BTV, tokens).mean()

        return jax.grad(loss)(params)


def flat(tree) -> np.ndarray:
    """All elements of a tree in a row: (P,)."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def like(tree, x_P: np.ndarray):
    """The tree whose elements, in a row, are x: the inverse of `flat`."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = zip(leaves, np.split(x_P, ends), strict=True)
    return treedef.unflatten([part.reshape(leaf.shape) for leaf, part in parts])


def probe_text(setup: Setup) -> np.ndarray:
    """The beginning of the validation text, int32 (R, T): up to ROWS rows of up to MOST_TOKENS."""
    val = setup.dataset.val
    T = min(setup.config.train.seq_len, MOST_TOKENS, len(val))
    R = max(1, min(ROWS, len(val) // T))
    return val.read(0, R * T).astype(np.int32).reshape(R, T)


def ranks(cfg, params, x_RTD, tokens_RT):
    """How many tokens are put before the right one if the stream ends as x: (R, T - 1)."""
    y_RTD = LayerNorm(cfg).apply({'params': params['ln_f']}, x_RTD[:, :-1])
    logits_RTV = GPT2(cfg).apply({'params': params}, y_RTD, method='head')
    right_RT1 = jnp.take_along_axis(logits_RTV, tokens_RT[:, 1:, None], -1)
    return (logits_RTV > right_RT1).sum(-1)


def norms(arrays: list[np.ndarray]) -> np.ndarray:
    """The Euclidean norm of each array, summed in fp64."""
    return np.array([np.sqrt(np.square(x, dtype=np.float64).sum()) for x in arrays])


def kurtosis(x: np.ndarray) -> float:
    """mean((x - mean)^4) / var^2; nan if nothing varies."""
    centred = x.astype(np.float64) - x.mean(dtype=np.float64)
    square = np.square(centred)
    variance = square.mean()
    return float(np.square(square).mean() / variance**2) if variance > 0 else float('nan')


def bins(x: np.ndarray) -> np.ndarray:
    """How many elements lie in each bin of EDGES in units of their rms: int32 (41,)."""
    x = x.ravel()[:: max(1, x.size // BIN_ELEMENTS)][:BIN_ELEMENTS].astype(np.float32)
    rms = np.sqrt(np.square(x, dtype=np.float64).mean())
    if not 0 < rms < np.inf:
        return np.zeros(len(EDGES) + 1, np.int32)
    width = EDGES[1] - EDGES[0]
    place = x * np.float32(1 / (rms * width)) - np.float32(EDGES[0] / width) + 1
    place = np.clip(np.floor(place, out=place), 0, len(EDGES), out=place).astype(np.int32)
    return np.bincount(place, minlength=len(EDGES) + 1).astype(np.int32)


class Probe:
    """The hook that probes at steps 0, 1, 2, 4, .. 512 and then every `every`; see loop.Hook."""

    def __init__(self, setup: Setup, workdir: Path, log: Logger, measure: Measure):
        self.setup, self.every = setup, setup.config.train.probe
        self.workdir, self.log, self.measure = workdir, log, measure
        self.seconds, self.count = 0.0, 0
        self._before = None  # (step, a copy of the parameters), for the norm of the next update

    def due(self, step: int) -> bool:
        """Also one update before a probe: the parameters are copied there."""
        return any(is_log_spaced(at, self.every) for at in (step, step + 1))

    def begin(self, start: int, state: TrainState) -> None:
        """Before the first update of this process.

        Step 0 is probed after update 1, from a copy of its parameters: by then the update has been
        compiled, which would have to wait for the programs of the probes.
        """
        if start == 0 or is_log_spaced(start + 1, self.every):
            self._before = start, jax.tree.map(jnp.copy, state.params)

    def __call__(self, step: int, state: TrainState) -> None:
        began = time.monotonic()
        if step == 1:
            self._probe(0, self._before[1], np.full(len(jax.tree.leaves(state.params)), np.nan))
        if is_log_spaced(step, self.every):
            self._probe(step, state.params, self._updates(step, state.params))
        self._before = None
        if is_log_spaced(step + 1, self.every):
            # The next update overwrites the state.
            self._before = step, jax.tree.map(jnp.copy, state.params)
        self.seconds += time.monotonic() - began

    def _probe(self, step: int, params, updates: np.ndarray) -> None:
        arrays = self.measure(params)
        arrays |= {'update': updates, 'ratio': updates / np.maximum(arrays['weight'], 1e-30)}
        if is_first():
            append(self.workdir, step, arrays, self.measure.constants())
        self.log.figures(step, 'probe', figures(arrays, self.measure.constants()))
        self.count += 1

    def _updates(self, step: int, params) -> np.ndarray:
        """The norm of the update that led to `step`, for each parameter array."""
        if self._before is None or self._before[0] != step - 1:
            return np.full(len(jax.tree.leaves(params)), np.nan)
        both = (on_one_device(self.setup.mesh, tree) for tree in (params, self._before[1]))
        changes = zip(*map(jax.tree.leaves, both), strict=True)
        return norms([np.asarray(after) - np.asarray(before) for after, before in changes])

    def cost(self, seconds: float) -> str:
        """What the probes of this process cost, out of its `seconds`."""
        return (
            f'{counted(self.count, "probes")} took {self.seconds:.1f} s, '
            f'{100 * self.seconds / seconds:.1f} % of the time of this process; they are in '
            f'{self.workdir / PROBES}'
        )


def append(workdir: Path, step: int, arrays: dict, constants: dict) -> None:
    """Adds a probe to the file, which is written again in one piece. Raises OSError."""
    before = read_probes(workdir) or {}
    new = {'steps': np.int64(step), **arrays}
    joined = {
        name: np.concatenate([before[name], value[None]]) if before else value[None]
        for name, value in new.items()
    }
    _write(workdir, constants | joined)


def cut_back(workdir: Path, start: int) -> None:
    """Removes the probes after step `start`, so that a resumed run records each step once."""
    probes = read_probes(workdir)
    if probes is None:
        return
    kept = probes['steps'] <= start if start else np.zeros(len(probes['steps']), bool)
    if not kept.any():
        (workdir / PROBES).unlink()
    elif not kept.all():
        n = len(kept)
        shared = ('tokens', 'tensors', 'sizes', 'activations', 'edges')
        _write(
            workdir,
            {
                name: value if name in shared or len(value) != n else value[kept]
                for name, value in probes.items()
            },
        )


def _write(workdir: Path, arrays: dict[str, np.ndarray]) -> None:
    with files.new_file(workdir / PROBES) as file:
        np.savez(file, **arrays)


def figures(arrays: dict[str, np.ndarray], constants: dict[str, Any]) -> dict[str, float]:
    """A probe as figures for TensorBoard."""
    found = {'curvature': arrays['curvature']}
    if arrays['loss'].size:  # windows of one token have none
        found['loss'] = arrays['loss'].mean()
        for i, layer in enumerate(arrays['rank']):
            found[f'rank/{"embed" if i == 0 else f"h_{i - 1}"}'] = layer.mean()
    for name in ('entropy', 'previous', 'duplicate', 'induction'):
        for i, heads in enumerate(arrays[name]):
            found |= {f'{name}/h_{i}.attn.{head}': value for head, value in enumerate(heads)}
    for i, share in enumerate(arrays['dead']):
        found[f'dead/h_{i}.mlp'] = share
    for name in ('weight', 'gradient', 'update', 'ratio'):
        found |= {
            f'{name}/{tensor}': value
            for tensor, value in zip(constants['tensors'], arrays[name], strict=True)
        }
    for name in ('rms', 'kurtosis'):
        found |= {
            f'{name}/{activation}': value
            for activation, value in zip(constants['activations'], arrays[name], strict=True)
        }
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}
