"""TensorBoard's messages: figures and texts of a step, the settings, and the chart of the losses.

A message is a `Summary`, made from protocol buffers alone: the functions of most libraries load
TensorFlow or torch, if it is installed, which takes seconds.
"""

import textwrap
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb

# Figures that are equal at every step of a run: as charts they would be flat lines.
CONSTANT = ('tokens', 'bytes', 'split_tokens')


def figures(split: str, values: dict[str, float | None]) -> Summary:
    """One point of the chart 'SPLIT/NAME' for each figure; None stands for an unknown one."""
    known = {
        name: value for name, value in values.items() if value is not None and name not in CONSTANT
    }
    return Summary(
        value=[
            Summary.Value(tag=f'{split}/{name}', simple_value=value)
            for name, value in known.items()
        ]
    )


def text(tag: str, content: str) -> Summary:
    """A text, shown as it is: TensorBoard reads Markdown, in which indented lines are code."""
    indented = textwrap.indent(content, '    ', lambda line: True)
    return _message(tag, 'text', indented.encode())


def settings(flat_config: dict[str, Any]) -> Summary:
    """All settings of a run, for the page HParams, which compares runs."""
    return hparams_pb(flat_config)


def loss_chart() -> Summary:
    """Training and validation loss in one chart, on the page Custom Scalars."""
    losses = layout_pb2.MultilineChartContent(tag=['train/loss', 'val/loss'])
    chart = layout_pb2.Chart(title='training and validation loss', multiline=losses)
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title='losses', chart=[chart])])
    return _message('custom_scalars__config__', 'custom_scalars', layout.SerializeToString())


def _message(tag: str, plugin: str, content: bytes) -> Summary:
    """Bytes for one of TensorBoard's plugins."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    tensor = TensorProto(dtype=DT_STRING, string_val=[content])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
