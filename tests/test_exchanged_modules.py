"""Modules inside of a block that somebody exchanged, wrapped or changed: the block computes what plain PyTorch does."""

import pytest
import torch
import torch.nn.utils.prune
from block_rule import HIGH, KEY, LOW, draw_maps
from fused_pairs import assert_equal_calls, changed_alike
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Adapted(nn.Module):
    """A layer around the one that was there, as adapters are: it has no attribute of a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


CONVOLUTIONS = ("stages.0.f_query.0", "stages.0.f_key.0", "stages.0.f_value", "stages.0.W", "conv_bn_dropout.0")


def exchange(block, path, make):
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    if not isinstance(getattr(owner, name), Adapted):  # one module may have two paths
        setattr(owner, name, make(getattr(owner, name)))


@pytest.mark.tool(
    "adapters (LoRA) around inner convolutions", "runs plain", "one or all of them; the repr names the module"
)
@pytest.mark.parametrize("paths", [*((path,) for path in CONVOLUTIONS), CONVOLUTIONS], ids=str)
def test_adapters_around_convolutions(pair, paths):
    def adapt(block):
        for path in paths:
            exchange(block, path, Adapted)
        block.double()

    fused, plain, kind = changed_alike(pair, adapt)
    assert "published forward, because of Adapted in the place of Conv2d" in repr(fused)
    assert_equal_calls(fused, plain, kind)


@pytest.mark.tool("peft LoraConfig", "runs plain", "the repr names peft's class", package="peft")
def test_lora_of_peft(pair):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["f_key.0", "f_query.0", "f_value", "W", "conv_bn_dropout.0"]

    def adapt(block):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(config, block)
        block.double().requires_grad_(True)

    fused, plain, kind = changed_alike(pair, adapt)
    assert "published forward, because of peft.tuners.lora.layer.Conv2d in the place of Conv2d" in repr(fused)
    assert_equal_calls(fused, plain, kind)


IDENTITIES = (
    "stages.0.f_query.0",
    "stages.0.f_query.1",
    "stages.0.f_key.1.0",
    "stages.0.f_query.1.1",
    "conv_bn_dropout.1",
    "conv_bn_dropout.2",
)


@pytest.mark.tool(
    "nn.Identity in the place of a module", "works", "plain where a projection loses its norm and activation"
)
@pytest.mark.parametrize("path", IDENTITIES)
def test_identities(pair, path):
    def empty(block):
        if path == "stages.0.f_query.0":
            block.stages[0].key_channels = HIGH
            block.stages[0].f_key[0] = nn.Conv2d(LOW if pair[2] == "AFNB" else HIGH, HIGH, 1)
            for name in ("f_key", "f_query"):
                getattr(block.stages[0], name)[1][0] = nn.BatchNorm2d(HIGH)
        exchange(block, path, lambda _: nn.Identity())
        block.double()

    fused, plain, kind = changed_alike(pair, empty)
    if path in ("stages.0.f_query.0", "stages.0.f_query.1"):
        assert "published forward, because of Identity in the place of" in repr(fused)
    assert_equal_calls(fused, plain, kind)


def every_convolution(function):
    def change(block):
        for module in list(block.modules()):
            if type(module) is nn.Conv2d:
                function(module)

    return change


def delete_dropout(block):
    del block.conv_bn_dropout[2]


def random_activation(block):
    block.stages[0].f_query[1][1] = nn.RReLU()


def drops_between(block):
    block.stages[0].f_query[1][1] = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.3))


def fuse_for_evaluation(block):
    block.eval()
    query = block.stages[0].f_query
    query[0], query[1][0] = nn.utils.fusion.fuse_conv_bn_eval(query[0], query[1][0]), nn.Identity()


def swap(block):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        block.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "weight_norm": (every_convolution(nn.utils.parametrizations.weight_norm), "works"),
    "spectral_norm": (every_convolution(nn.utils.parametrizations.spectral_norm), "works"),
    "spectral_norm by hooks": (every_convolution(nn.utils.spectral_norm), "runs plain"),
    "prune": (every_convolution(lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.3)), "runs plain"),
    "without its dropout": (delete_dropout, "works"),
    "RReLU": (random_activation, "works"),
    "dropout in a projection": (drops_between, "works"),
    "share_memory": (nn.Module.share_memory, "works"),
    "swap_tensors": (swap, "works"),
}


@pytest.mark.tool("torch.nn.utils.parametrizations, prune, spectral_norm", "works", "plain where they are hooks")
@pytest.mark.parametrize("change", CHANGES)
def test_what_pytorch_does_to_modules(pair, change):
    function, expected = CHANGES[change]
    fused, plain, kind = changed_alike(pair, function)
    assert ("published forward" in repr(fused.eval())) == (expected == "runs plain"), repr(fused)
    assert_equal_calls(fused, plain, kind)


@pytest.mark.tool("torch.nn.utils.fusion", "works", "convolution and norm made one for evaluation")
def test_a_fused_convolution_and_norm(pair):
    fused, plain, kind = changed_alike(pair, fuse_for_evaluation)
    assert_equal_calls(fused, plain, kind, modes=(False,))


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.tool(
    "torch.ao.quantization.prepare_qat, prepare", "runs plain", "eager mode: fake quantisation and observers"
)
@pytest.mark.parametrize("way", ["qat", "observers"])
def test_eager_quantisation(pair, way):
    quantization = pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no eager quantisation")

    def prepare(block):
        block.float().train(way == "qat")
        block.qconfig = quantization.get_default_qat_qconfig("x86") if way == "qat" else quantization.default_qconfig
        (quantization.prepare_qat if way == "qat" else quantization.prepare)(block, inplace=True)

    fused, plain, kind = changed_alike(pair, prepare)
    expected = "torch.ao.nn.qat.modules.conv.Conv2d in the place of" if way == "qat" else "Conv2d carries forward hooks"
    assert f"published forward, because of {expected}" in repr(fused)
    assert_equal_calls(fused, plain, kind, 1e-4, modes=(way == "qat",), dtype=torch.float32)


class OtherTensor(torch.Tensor):
    """A weight that computes by itself, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out if function is torch.nn.functional.conv2d or function is torch.conv2d else out


@pytest.mark.tool("tensor subclasses as weights (torchao)", "runs plain", "the repr names the class")
def test_a_weight_of_another_class(pair):
    def change(block):
        weight = block.stages[0].W.weight.detach().as_subclass(OtherTensor)
        block.stages[0].W.weight = nn.Parameter(weight)

    fused, plain, kind = changed_alike(pair, change)
    assert "published forward, because of Conv2d holds a weight of class OtherTensor" in repr(fused)
    maps = draw_maps(kind)
    torch.testing.assert_close(torch.Tensor(fused.eval()(*maps).detach()), torch.Tensor(plain.eval()(*maps).detach()))


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Counting(nn.Module):
    """What it does depends on how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * (1 + 0.01 * self.calls)


DIFFERING = {
    "noise": lambda: nn.Sequential(nn.BatchNorm2d(KEY), Noise()),
    "noise alone": lambda: nn.Sequential(Noise(), nn.ReLU()),
    "counting": lambda: nn.Sequential(nn.BatchNorm2d(KEY), Counting()),
    "counting alone": lambda: nn.Sequential(Counting(), nn.ReLU()),
    "norm behind activation": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(KEY)),
    "in place ahead of norm": lambda: nn.Sequential(nn.LeakyReLU(0.2, inplace=True), nn.BatchNorm2d(KEY)),
    "norm inside of activation": lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(KEY))),
}


@pytest.mark.tool(
    "modules that draw or count, in a projection", "runs plain", "where a pyramid block calls them twice; else as plain"
)
@pytest.mark.parametrize("what", DIFFERING)
def test_what_differs_between_the_two_calls_of_a_shared_projection(pair, what):
    def change(block):
        block.stages[0].f_query[1] = DIFFERING[what]()
        block.double()

    fused, plain, kind = changed_alike(pair, change)
    assert ("at each of two calls" in repr(fused)) == (kind == "APNB")
    assert_equal_calls(fused, plain, kind)


ATTRIBUTES = {
    "out_channels of W": lambda block: setattr(block.stages[0].W, "out_channels", 5),
    "in_channels of f_query": lambda block: setattr(block.stages[0].f_query[0], "in_channels", 5),
    "out_channels of f_query": lambda block: setattr(block.stages[0].f_query[0], "out_channels", 5),
    "key_channels as a tensor": lambda block: setattr(block.stages[0], "key_channels", torch.tensor(KEY).double()),
}


@pytest.mark.tool("attributes of convolutions that contradict their weights", "runs plain", "the weights decide")
@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_an_attribute_that_contradicts_the_weights(pair, attribute):
    """PyTorch computes by the weights."""
    fused, plain, kind = changed_alike(pair, ATTRIBUTES[attribute])
    assert "published forward, because of" in repr(fused)
    assert_equal_calls(fused, plain, kind)


def test_an_attribute_that_is_gone(pair):
    fused, plain, kind = changed_alike(pair, lambda block: delattr(block.stages[0], "key_channels"))
    assert "published forward, because of key_channels=None" in repr(fused)
    for block in (fused, plain):
        with pytest.raises(AttributeError, match="no attribute 'key_channels'"):
            block(*draw_maps(kind))
