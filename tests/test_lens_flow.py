"""Shape flow: names and sizes of every operation, and totals against the model and against XLA."""

import json
import re

import jax
import numpy as np
import pytest
from tiny import tiny

from gpt2_jax import lens
from gpt2_jax.architecture import GPT2Config, flops_per_token
from gpt2_jax.config import default_config
from gpt2_jax.errors import UsageError
from gpt2_jax.lens.flow import plain_step
from gpt2_jax.lens.jaxpr import PHASES
from gpt2_jax.look import training_step
from gpt2_jax.model.params import count_params, init_params
from gpt2_jax.reports import flow as flow_report

SMALL = dict(n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=65)
CONFIGS = {
    'plain': {},
    'no bias': dict(bias=False, n_inner=500, n_layer=1),
    'remat': dict(remat='block', n_layer=3),
    'bfloat16': dict(dtype='bfloat16', n_layer=1),
    'exact GELU': dict(activation_function='gelu', n_layer=1),
    'large vocabulary': dict(vocab_size=5000, n_layer=1),
    'one head': dict(n_head=1, n_layer=1),
}
# Of XLA's own count, which has casts and the polynomials of erfc too: for the widths in use.
XLA_BOUND = 0.01
WIDE = dict(n_layer=2, n_head=6, n_embd=384, n_positions=256, vocab_size=65)


@pytest.fixture(scope='module')
def flow():
    return lens.shape_flow(GPT2Config(**SMALL), batch_size=3, seq_len=12)


@pytest.mark.parametrize('changes', CONFIGS.values(), ids=CONFIGS)
def test_totals_equal_the_parameters_and_the_count_of_xla(changes):
    cfg = GPT2Config(**WIDE | changes)
    flow = lens.shape_flow(cfg, batch_size=2, seq_len=128)
    shapes = jax.eval_shape(lambda: init_params(cfg, 0))
    assert flow.n_params == count_params(shapes)
    assert flow.flops == pytest.approx(flow.xla_flops, rel=XLA_BOUND)
    used = [operation.parameter for operation in flow.operations if operation.parameter]
    assert len([name for name in used if '(tied)' not in name]) == len(jax.tree.leaves(shapes))
    assert used.count('wte/embedding (tied)') == 1


@pytest.mark.parametrize('vocab_size', [65, 1030, 4100])
def test_the_training_step_has_names_at_any_vocabulary(vocab_size):
    """It pads the table of a large one, and takes the loss of a larger one in chunks."""
    config = default_config()
    config.model.update({name: SMALL[name] for name in SMALL if name != 'vocab_size'}, n_layer=1)
    config.train.update(batch_size=2)
    cfg = GPT2Config(**SMALL | {'n_layer': 1, 'vocab_size': vocab_size})
    flow = lens.shape_flow(cfg, batch_size=2, make_step=training_step(config))
    assert flow.n_params == count_params(jax.eval_shape(lambda: init_params(cfg, 0)))
    assert flow.xla_flops > 0


def test_products_have_the_flops_of_the_model(flow):
    """Forward plus backward, as counted by hand: 6 for each weight and token, and the attention."""
    cfg = GPT2Config(**SMALL)
    products = [o for o in flow.operations if o.name.startswith('dot_general')]
    assert sum(o.flops for o in products) == flops_per_token(cfg, 12) * 3 * 12
    forward = sum(o.flops for o in products if o.phase == 'forward')
    assert forward * 3 == sum(o.flops for o in products)


def test_dimensions_have_names(flow):
    found = {
        (o.phase, o.module, o.name.split()[0]): o
        for o in reversed(flow.operations)
        if o.name.startswith(('dot_general', 'gather', 'dynamic_slice', 'tanh', 'exp'))
    }
    for (phase, module, name), dims in {
        ('forward', 'embed', 'gather'): 'B T D',
        ('forward', 'embed', 'dynamic_slice'): 'T D',
        ('forward', 'h_0.attn.c_attn', 'dot_general'): 'B T 3 H K',
        ('forward', 'h_1.attn', 'dot_general'): 'B H T S',
        ('forward', 'h_1.attn', 'exp'): 'B H T S',
        ('forward', 'h_1.mlp', 'tanh'): 'B T F',
        ('forward', 'h_1.mlp.c_proj', 'dot_general'): 'B T D',
        ('forward', 'logits', 'dot_general'): 'B T V',
        ('backward', 'h_0.attn.c_attn', 'dot_general'): '3 H K D',
        ('backward', 'logits', 'dot_general'): 'V D',
    }.items():
        operation = found[phase, module, name]
        assert ' '.join(operation.dims) == dims, (module, name)
        sizes = [flow.sizes.get(dim) or int(dim) for dim in operation.dims]
        assert tuple(sizes) == operation.shape
    for operation in flow.operations:  # and none has a size for a name that is not its own
        for dim, size in zip(operation.dims, operation.shape, strict=True):
            letters = [flow.sizes.get(part) or int(part) for part in dim.split()]
            assert np.prod(letters, dtype=int) == size


def test_operations_come_in_the_order_of_the_pass(flow):
    phases = [operation.phase for operation in flow.operations]
    assert phases == sorted(phases, key=PHASES.index)

    def places(phase):
        names = [section.title for section in flow_report.sections(flow) if section.phase == phase]
        return names

    assert places('forward') == ['embed', 'h_0 to h_1', 'ln_f', 'logits', 'loss']
    assert places('backward')[-2:] == ['h_1 to h_0', 'embed']
    total = sum(section.total('flops') for section in flow_report.sections(flow))
    assert total == flow.flops
    assert sum(s.total('n_params') for s in flow_report.sections(flow)) == flow.n_params


def test_a_loop_counts_each_of_its_rounds():
    """Three micro-batches: three times the FLOPs of one, where XLA counts the loop's body once."""
    cfg = tiny(n_layer=1).cfg

    def make_step(sizes):
        step, (state, *_) = plain_step(sizes)
        rows, T = sizes.batch_size // sizes.grad_accum_steps, sizes.seq_len

        def accumulated(state, tokens_ABT):
            def add(total, tokens_BT):
                return jax.tree.map(jax.numpy.add, total, step(state, tokens_BT, tokens_BT)), None

            zero = jax.tree.map(jax.numpy.zeros_like, (jax.numpy.float32(0), state['params']))
            return jax.lax.scan(add, zero, tokens_ABT)[0]

        tokens_ABT = jax.ShapeDtypeStruct((sizes.grad_accum_steps, rows, T), np.int32)
        return accumulated, (state, tokens_ABT)

    flow = lens.shape_flow(cfg, batch_size=6, grad_accum_steps=3, make_step=make_step)
    one = lens.shape_flow(cfg, batch_size=2)
    products = [
        sum(o.flops for o in each.operations if o.name.startswith('dot_general'))
        for each in (flow, one)
    ]
    assert products[0] == 3 * products[1]
    once = sum(operation.flops / operation.times for operation in flow.operations)
    assert once == pytest.approx(flow.xla_flops, rel=XLA_BOUND)
    assert flow.n_params == one.n_params
    assert 'a loop counted once' in flow_report.heading(flow)


def test_formats(flow):
    data = json.loads(flow_report.to_json(flow))
    assert data['parameters'] == flow.n_params == sum(o['n_params'] for o in data['operations'])
    assert len(data['operations']) == len(flow.operations)
    markdown, page = flow_report.to_markdown(flow), flow_report.to_html(flow)
    assert f'{flow.n_params:,} parameters' in markdown
    assert f'{flow.n_params:,} parameters' in page
    sections = flow_report.sections(flow)
    for field, whole in (('n_params', flow.n_params), ('flops', flow.flops)):
        assert sum(section.total(field) for section in sections) == whole
    assert f'h_0 to h_1 (2 x {len(sections[1].operations)} operations; sums of all 2)' in page
    rows = sum(len(section.operations) for section in sections)
    tables = len(sections)
    assert (
        len(re.findall(r'^\| [a-z_]*', markdown, re.MULTILINE))
        == rows + 2 * tables + 1 + tables + 1
    )
    assert page.count('<details>') == tables
    assert page.count('<tr>') == rows + tables + tables + 1
    assert '(B, H, T, S)' in markdown
    assert 'T = 12 positions' in page


def test_a_step_of_another_shape_at_other_sizes_is_reported():
    def make_step(sizes):
        step, arguments = plain_step(sizes)
        changed = (lambda *args: (step(*args), args[1] + 1)) if sizes.batch_size == 3 else step
        return changed, arguments

    with pytest.raises(UsageError, match='other operations at other sizes'):
        lens.shape_flow(tiny(n_layer=1).cfg, batch_size=3, make_step=make_step)
