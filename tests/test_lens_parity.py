"""Every named activation against transformers' GPT-2, module by module, on weights as published.

Runs where the extra `parity` is installed:  pip install -e '.[test,parity]'
"""

import os

import numpy as np
import pytest

from gpt2_jax import lens
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.config import default_config
from gpt2_jax.lens import sites
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.huggingface import config_from_hf, import_params, read_folder

os.environ['HF_HUB_OFFLINE'] = '1'  # read at import: nothing here is fetched
torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from make_fixture import rough_gpt2  # noqa: E402 (it imports both)

# Warnings of torch and transformers are not this project's to mend.
pytestmark = pytest.mark.filterwarnings('default')

SHAPE = dict(n_layer=3, n_head=4, n_embd=64, n_positions=96, vocab_size=300)


def activations_of(theirs, tokens_BT) -> dict[str, np.ndarray]:
    """The activations of a model of transformers, by our names, from hooks on its modules."""
    found = {}
    B, T = tokens_BT.shape
    heads = theirs.config.n_head, theirs.config.n_embd // theirs.config.n_head

    def output(name):
        def hook(module, given, result):
            found[name] = result[0] if isinstance(result, tuple) else result

        return hook

    def given_to(name):
        def hook(module, given):
            found[name] = given[0]

        return hook

    body = theirs.transformer
    body.wte.register_forward_hook(output('embed'))
    body.wpe.register_forward_hook(output('pos_embed'))
    body.ln_f.register_forward_hook(output('ln_f'))
    for i, block in enumerate(body.h):
        block.register_forward_pre_hook(given_to(f'h_{i}.resid_pre'))
        block.ln_1.register_forward_hook(output(f'h_{i}.ln_1'))
        block.attn.c_attn.register_forward_hook(output(f'h_{i}.qkv'))
        block.attn.c_proj.register_forward_pre_hook(given_to(f'h_{i}.z'))
        block.attn.register_forward_hook(output(f'h_{i}.attn_out'))
        block.ln_2.register_forward_pre_hook(given_to(f'h_{i}.resid_mid'))
        block.ln_2.register_forward_hook(output(f'h_{i}.ln_2'))
        block.mlp.c_fc.register_forward_hook(output(f'h_{i}.mlp_pre'))
        block.mlp.act.register_forward_hook(output(f'h_{i}.mlp_post'))
        block.mlp.register_forward_hook(output(f'h_{i}.mlp_out'))
        block.register_forward_hook(output(f'h_{i}.resid_post'))
    with torch.no_grad():
        result = theirs(torch.from_numpy(np.int64(tokens_BT)), output_attentions=True)
    found['logits'] = result.logits
    for i, pattern_BHTS in enumerate(result.attentions):
        found[f'h_{i}.pattern'] = pattern_BHTS
        qkv_BT3HK = found.pop(f'h_{i}.qkv').reshape(B, T, 3, *heads)
        found |= {f'h_{i}.{name}': qkv_BT3HK[:, :, j] for j, name in enumerate('qkv')}
        found[f'h_{i}.z'] = found[f'h_{i}.z'].reshape(B, T, *heads)
    found['pos_embed'] = found['pos_embed'].reshape(T, -1)
    return {name: x.numpy() for name, x in found.items()}


def test_activations_equal_those_of_transformers_name_by_name(tmp_path):
    theirs = rough_gpt2(**SHAPE, attn_implementation='eager')
    theirs.save_pretrained(tmp_path)
    settings, tensors = read_folder(tmp_path)
    model = GPT2(GPT2Config(**default_config().model.to_dict() | config_from_hf(settings)))
    params = import_params(tensors, model.cfg)
    tokens_BT = np.random.default_rng(1).integers(0, SHAPE['vocab_size'], (2, 40), np.int32)

    ours = lens.capture((model, params), tokens_BT)
    expected = activations_of(theirs, tokens_BT)
    scores = [name for name in sites.all_names(model.cfg) if name.endswith('attn_scores')]
    assert set(ours) == {*expected, *scores}
    for name, x in expected.items():
        np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=2e-5, err_msg=name)
    for name in scores:  # which transformers does not hand out: the pattern is their softmax
        e = np.exp(ours[name] - ours[name].max(-1, keepdims=True))
        pattern = expected[name.replace('attn_scores', 'pattern')]
        np.testing.assert_allclose(e / e.sum(-1, keepdims=True), pattern, rtol=1e-4, atol=1e-6)
