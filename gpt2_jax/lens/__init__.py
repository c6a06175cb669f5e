"""What happens inside one forward and backward pass of your own model, as numpy arrays.

    capture, gradients     named activations, and the gradient of a loss with respect to each
    edit, ablate, patch    the same pass with activations changed, removed, or taken from elsewhere
    token_losses, logit_lens, jacobian_lens, attribution, head_scores    what the activations say
    curvature, hessian_vector    second derivatives of the loss
    shape_flow             every operation of a step: shapes, bytes, parameters, FLOPs

A model is the folder of a run, the result of `gpt2_jax.load`, or (model, params); a text is a str
or tokens. Activations are named as in sites.py: 'h_3.pattern', head 2 of block 3 is 'h_3.attn.2'.
"""

from gpt2_jax.lens.activations import capture, gradients
from gpt2_jax.lens.flow import shape_flow
from gpt2_jax.lens.hessian import curvature, hessian_vector
from gpt2_jax.lens.interventions import ablate, edit, patch
from gpt2_jax.lens.readings import (
    attribution,
    head_scores,
    jacobian_lens,
    logit_lens,
    token_losses,
)

__all__ = [
    'ablate',
    'attribution',
    'capture',
    'curvature',
    'edit',
    'gradients',
    'head_scores',
    'hessian_vector',
    'jacobian_lens',
    'logit_lens',
    'patch',
    'shape_flow',
    'token_losses',
]
