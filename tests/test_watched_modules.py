"""Tools that act in the forwards of inner modules: offloaded weights and global hooks."""

import pytest
import torch
from block_rule import draw_maps
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def offload(module):
    """As accelerate does: parameters on ``meta``, fetched by a forward around the module's own."""
    kept = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    own = module.forward
    for name, parameter in kept.items():
        module._parameters[name] = nn.Parameter(parameter.to("meta"))

    def forward(x):
        for name, parameter in kept.items():
            module._parameters[name] = nn.Parameter(parameter)
        out = own(x)
        for name, parameter in kept.items():
            module._parameters[name] = nn.Parameter(parameter.to("meta"))
        return out

    module.forward = forward


@pytest.mark.tool("parameters on meta until a forward fetches them", "runs plain", "the repr names the module")
def test_offloaded_parameters(pair):
    fused, plain, kind = pair
    for module in list(fused.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            offload(module)
    maps = draw_maps(kind)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(*maps), plain.eval()(*maps))
    assert "published forward, because of Conv2d with a forward of its own" in repr(fused)


@pytest.mark.tool("accelerate cpu_offload, disk_offload", "runs plain", "as plain", package="accelerate")
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_offloading_of_accelerate(pair, way, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    fused, plain, kind = pair
    fused.eval(), plain.eval()
    arguments = {"offload_dir": str(tmp_path)} if way == "disk_offload" else {}
    getattr(accelerate, way)(fused, execution_device=torch.device("cpu"), **arguments)
    assert fused.stages[0].W.weight.is_meta
    maps = draw_maps(kind)
    with torch.no_grad():
        torch.testing.assert_close(fused(*maps), plain(*maps))
    assert "published forward, because of Conv2d with a forward of its own" in repr(fused)


REGISTER = {
    "forward": (nn.modules.module.register_module_forward_hook, lambda module, args, out: None),
    "forward pre": (nn.modules.module.register_module_forward_pre_hook, lambda module, args: None),
    "backward": (nn.modules.module.register_module_full_backward_hook, lambda module, grads, out_grads: None),
    "backward pre": (nn.modules.module.register_module_full_backward_pre_hook, lambda module, out_grads: None),
}


@pytest.mark.tool("global module hooks", "runs plain", "while one is registered, with a warning; every module is seen")
@pytest.mark.parametrize("which", REGISTER)
def test_global_hooks_see_every_module(pair, which):
    fused, plain, kind = pair
    register, hook = REGISTER[which]
    maps, found = [x.requires_grad_() for x in draw_maps(kind)], []
    for block in (fused, plain):
        seen = []
        handle = register(lambda module, *rest, seen=seen: seen.append(type(module).__name__) or hook(module, *rest))
        try:
            if block is fused:
                with pytest.warns(UserWarning, match=f"runs its published forward, because of global {which} hooks"):
                    out = block(*maps)
                assert f"published forward, because of global {which} hooks" in repr(block)
            else:
                out = block(*maps)
            out.sum().backward()
        finally:
            handle.remove()
        found.append([name.removeprefix("Plain") for name in seen])
    assert found[0] == found[1]
    assert len(found[0]) > 10
    assert "collapsed" in repr(fused)


@pytest.mark.tool("torch.utils.flop_counter, ModuleTracker", "works", "the block stays collapsed and is counted")
def test_the_flop_counter_counts_the_collapsed_block(pair):
    from torch.utils.flop_counter import FlopCounterMode

    fused, plain, kind = pair
    maps, counts = draw_maps(kind), []
    for block in (fused, plain):
        with FlopCounterMode(display=False) as counter:
            block(*maps)
            if block is fused:
                assert "collapsed" in repr(fused)
        counts.append(counter.get_total_flops())
    assert min(counts) > 0
    assert counts[0] != counts[1]
