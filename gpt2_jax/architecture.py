"""The settings that make a GPT-2: sizes, rates, activation, precision. Imports no JAX."""

import dataclasses
import numbers
from typing import NamedTuple

from gpt2_jax.errors import UsageError


class Precision(NamedTuple):
    """What a setting of `dtype` means for activations and, in JAX's words, for matrix products."""

    compute_dtype: str
    matmul_precision: str
    meaning: str


# 'highest' keeps every bit of fp32 on GPUs too: JAX's default there is TF32 (10 mantissa bits).
PRECISIONS = {
    'float32': Precision('float32', 'highest', 'full fp32 matrix products'),
    'tf32': Precision('float32', 'high', 'TF32 matrix products, if the device has them'),
    'bfloat16': Precision('bfloat16', 'default', 'bf16 matrix products, accumulated in fp32'),
}

# activation_function -> the function of flax.linen, and its arguments. GPT-2 was trained with the
# tanh approximation, 'gelu_new'; 'gelu' is exact, as in nanoGPT.
ACTIVATIONS = {
    'gelu_new': ('gelu', {'approximate': True}),
    'gelu': ('gelu', {'approximate': False}),
}

# The four published sizes (Radford et al. 2019, table 2): config.model.update(PRESETS['gpt2-xl']).
PRESETS = {
    'gpt2': {'n_layer': 12, 'n_head': 12, 'n_embd': 768},
    'gpt2-medium': {'n_layer': 24, 'n_head': 16, 'n_embd': 1024},
    'gpt2-large': {'n_layer': 36, 'n_head': 20, 'n_embd': 1280},
    'gpt2-xl': {'n_layer': 48, 'n_head': 25, 'n_embd': 1600},
}

# Tensor cores need sizes that are multiples of 8, and 50,257 is odd: a padded vocabulary grows to a
# multiple of this.
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The architecture, in the names of the published config.json. The defaults are GPT-2's (124M).

    `attention` and `kernels` choose implementations (kernels/choose.py); the modules of
    model/gpt2.py read neither. Raises UsageError for a size that is too small or no whole number,
    if heads cannot share the width equally, and for an activation function or a precision that this
    file does not list.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = 'gelu_new'
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bias: bool = True
    # fp32 works on every device and is the faster choice on CPUs. GPU configurations set bfloat16.
    dtype: str = 'float32'
    # In bf16 the residual stream takes half the memory and traffic; 'float32' rounds logits less.
    residual_dtype: str = 'compute'
    remat: str = 'none'
    attention: str = 'auto'
    kernels: str = 'auto'

    def __post_init__(self):
        for name in ('vocab_size', 'n_positions', 'n_embd', 'n_layer', 'n_head', 'n_inner'):
            size = getattr(self, name)
            if size is None and name == 'n_inner':
                continue
            low = int(name != 'n_layer')  # params.py draws the rest of a model without layers
            if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < low:
                raise UsageError(
                    f'{name} = {size!r} is not allowed; expected a whole number from {low} on'
                )
        # Heads of a rounded width would make another model, silently.
        if self.n_embd % self.n_head:
            raise UsageError(f'n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}')
        for name, known in (('activation_function', ACTIVATIONS), ('dtype', PRECISIONS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f'{name} = {getattr(self, name)!r} is not allowed; expected one of '
                    f'{", ".join(map(repr, known))}'
                )

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def d_ff(self) -> int:
        """F, the width of the feed-forward layer."""
        return self.n_inner or 4 * self.n_embd

    @property
    def compute_dtype(self) -> str:
        """The dtype of activations and of the operands of matrix products."""
        return PRECISIONS[self.dtype].compute_dtype

    @property
    def stream_dtype(self) -> str:
        """The dtype of the residual stream."""
        return self.compute_dtype if self.residual_dtype == 'compute' else self.residual_dtype

    @property
    def precision(self) -> str:
        """The `precision` argument of JAX's matrix products."""
        return PRECISIONS[self.dtype].matmul_precision


def parameter_shapes(cfg: GPT2Config) -> dict[str, tuple[int, ...]]:
    """{'h_0/mlp/c_fc/kernel': (D, F), ..}: the parameter tree of model/gpt2.py, by path."""
    D, F, H, K = cfg.n_embd, cfg.d_ff, cfg.n_head, cfg.head_dim
    block = {
        'ln_1/scale': (D,),
        'ln_1/bias': (D,),
        'attn/c_attn/kernel': (D, 3, H, K),
        'attn/c_attn/bias': (3, H, K),
        'attn/c_proj/kernel': (H, K, D),
        'attn/c_proj/bias': (D,),
        'ln_2/scale': (D,),
        'ln_2/bias': (D,),
        'mlp/c_fc/kernel': (D, F),
        'mlp/c_fc/bias': (F,),
        'mlp/c_proj/kernel': (F, D),
        'mlp/c_proj/bias': (D,),
    }
    shapes = {'wte/embedding': (cfg.vocab_size, D), 'wpe/embedding': (cfg.n_positions, D)}
    for i in range(cfg.n_layer):
        shapes |= {f'h_{i}/{name}': shape for name, shape in block.items()}
    shapes |= {'ln_f/scale': (D,), 'ln_f/bias': (D,)}
    return {name: shape for name, shape in shapes.items() if cfg.bias or not name.endswith('bias')}


def padded_vocab(vocab_size: int) -> int:
    """The next multiple of VOCAB_MULTIPLE."""
    return vocab_size + -vocab_size % VOCAB_MULTIPLE


def matmul_weights(cfg: GPT2Config) -> int:
    """The weights that multiply a token: the tied head counts, the embedding lookups do not."""
    D, F = cfg.n_embd, cfg.d_ff
    return cfg.n_layer * (4 * D * D + 2 * D * F) + cfg.vocab_size * D


def flops_per_token(cfg: GPT2Config, seq_len: int) -> int:
    """Model FLOPs of one training token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 for each of the `matmul_weights`, and 12 L D T for the two products of attention, without a
    discount for the causal half.
    """
    return 6 * matmul_weights(cfg) + 12 * cfg.n_layer * cfg.n_embd * seq_len
