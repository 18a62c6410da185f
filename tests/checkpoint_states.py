"""What the checkpoint tests load: random blocks and networks, and the states that other code bases would have saved.

The names of those are written out here, not taken from the package.
"""

import pickle
from collections import OrderedDict

import torch
from test_model import TinyBackbone

import annnet_kernels as ak

WIDTHS = {"channels": 6, "key_channels": 5, "value_channels": 5, "dropout": 0.0}

# This package's keys and PaddleSeg's, part by part, of a fusion block.
PADDLE_FUSION = {
    "stages.0.f_key.0": "stages.0.f_key._conv",
    "stages.0.f_key.1.0": "stages.0.f_key._batch_norm",
    "stages.0.f_query.0": "stages.0.f_query._conv",
    "stages.0.f_query.1.0": "stages.0.f_query._batch_norm",
    "stages.0.f_value": "stages.0.f_value",
    "stages.0.W": "stages.0.W",
    "conv_bn_dropout.0": "conv_bn._conv",
    "conv_bn_dropout.1": "conv_bn._batch_norm",
}
PADDLE_PYRAMID = {key.replace("dropout.1", "dropout.1.0"): value for key, value in PADDLE_FUSION.items()}
PADDLE_HEAD = {
    **{f"fusion.{key}": f"head.fusion.{value}" for key, value in PADDLE_FUSION.items()},
    **{f"context.2.{key}": f"head.context.1.{value}" for key, value in PADDLE_PYRAMID.items()},
    "context.0": "head.context.0._conv",
    "context.1.0": "head.context.0._batch_norm",
    "cls": "head.cls",
    "dsn.0": "head.auxlayer.conv_bn_relu._conv",
    "dsn.1.0": "head.auxlayer.conv_bn_relu._batch_norm",
    "dsn.3": "head.auxlayer.conv",
}
PADDLE_TENSORS = {"running_mean": "_mean", "running_var": "_variance"}


def randomised(module):
    """Every parameter and running statistic random."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module


def net(aux=True, classes=4):
    return randomised(ak.ANNNet(classes, TinyBackbone(), aux=aux, **WIDTHS))


def paddle_state(state, parts):
    """What PaddleSeg would have saved."""
    arrays = {}
    for key, tensor in state.items():
        part, _, name = key.rpartition(".")
        if part in parts and name != "num_batches_tracked":
            arrays[f"{parts[part]}.{PADDLE_TENSORS.get(name, name)}"] = tensor.numpy()
    return arrays


def save_paddle(arrays, path, protocol=4):
    path.write_bytes(pickle.dumps(arrays | {"StructuredToParameterName@@": {k: k for k in arrays}}, protocol))
    return path


def save(content, path):
    torch.save(content, path)
    return path


def assert_same(got, expected, skip=()):
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        if not key.endswith(skip):
            torch.testing.assert_close(got[key], tensor, rtol=0, atol=0, msg=key)


def unchanged(module):
    """A check, to be made later, that nothing of ``module`` changed."""
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    return lambda: assert_same(module.state_dict(), before)


CONTAINERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"config_dict": {"lr": 0.1}, "state_dict": state},
    "model": lambda state: {"epoch": 3, "model": state},
    "module.": lambda state: {"state_dict": OrderedDict((f"module.{key}", x) for key, x in state.items())},
    "compiled": lambda state: {f"_orig_mod.module.{key}": x for key, x in state.items()},
}


def changed(state, **changes):
    """A copy with some keys replaced; None drops one. ``__`` stands for a dot."""
    copied = dict(state)
    for name, value in changes.items():
        key = name.replace("__", ".")
        copied.pop(key, None)
        if value is not None:
            copied[key] = value
    return copied


def without(state, prefix):
    return {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
