"""The real mmsegmentation: its head with replaced blocks, and ours in its configuration."""

import copy
import pickle
import subprocess
import sys

import mmsegmentation
import pytest
import torch
from checkpoint_states import randomised
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from replacement_rule import assert_round_trip, randomise_output

import annnet_kernels as ak
from annnet_kernels.blocks import folding
from annnet_kernels.interop import replace

FUSED = "annnet_kernels.integrations.mmseg.FusedANNHead"
BLOCKS = ["fusion", "context"]


def build_head(**options):
    head = mmsegmentation.build_head(**options).double()
    randomise_output(head)
    return head


def features():
    return [torch.randn(2, channels, 9, 7, dtype=torch.float64) for channels in (1, 1, 6, 10)]


def labels():
    return [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 4, (1, 36, 28)))) for _ in range(2)]


def own_loss(maps, targets, seed):
    """mmsegmentation's training loss; the head's dropout draws the same at every call."""

    def run(head):
        torch.manual_seed(seed)
        return head.loss(maps, targets, {})["loss_ce"]

    return run


def test_training_with_its_own_loss_equals_never_having_replaced():
    assert_round_trip(build_head(), own_loss(features(), labels(), 3), BLOCKS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_replaced_head_equals_the_original(training):
    head, maps, targets = build_head().train(training), features(), labels()
    twin = copy.deepcopy(head)
    assert list(ak.replace_blocks(head).replaced) == BLOCKS
    for module in (head, twin):
        own_loss(maps, targets, 5)(module).backward()
    for (name, p), q in zip(head.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for (name, b), c in zip(head.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(head.eval()(maps), twin.eval()(maps))


def test_its_code_is_known_and_agrees_when_compared(monkeypatch):
    assert all("mmseg, known code" in how for how in ak.replace_blocks(build_head()).replaced.values())
    monkeypatch.setattr(replace, "is_published", lambda *_: False)
    assert all("mmseg, compared" in how for how in ak.replace_blocks(build_head()).replaced.values())


def test_a_changed_copy_of_its_block_is_refused():
    class Forgetful(mmsegmentation.APNB):
        def forward(self, feats):
            context = torch.stack([stage(feats, feats) for stage in self.stages], dim=0).sum(dim=0)
            return self.bottleneck(torch.cat([feats, context], 1))

    head = build_head()
    head.context.__class__ = Forgetful
    report = ak.replace_blocks(head)
    assert list(report.replaced) == ["fusion"]
    assert "computes something else: the output differs by" in report.skipped["context"]


def test_the_published_network_is_replaced_and_predicts_the_same():
    model = mmsegmentation.build_model().eval()
    randomise_output(model)
    x = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = model(x, mode="tensor")
        assert list(ak.replace_blocks(model).replaced) == [f"decode_head.{name}" for name in BLOCKS]
        got = model(x, mode="tensor")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


OPTIONS = {
    "query_scales": ({"query_scales": (2,)}, "query_downsample is MaxPool2d"),
    "two query scales": ({"query_scales": (1, 1)}, "2 stages (query_scales or sizes)"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_cannot_be_fused_is_left_alone_or_refused_with_its_reason(name):
    options, reason = OPTIONS[name]
    report = ak.replace_blocks(build_head(**options))
    assert list(report.skipped) == BLOCKS
    assert all(reason in why for why in report.skipped.values()), str(report)
    with pytest.raises(ValueError, match="FusedANNHead: expected two blocks that can be fused") as error:
        build_head(type=FUSED, **options)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("bottleneck", "reason"),
    [
        (None, "could not be compared: TypeError"),
        (torch.nn.Identity(), "not built as expected: bottleneck holds nothing"),
    ],
    ids=["none", "empty"],
)
def test_a_block_without_its_bottleneck_is_left_alone(bottleneck, reason):
    head = build_head()
    head.fusion.bottleneck = bottleneck
    report = ak.replace_blocks(head)
    assert list(report.replaced) == ["context"]
    assert reason in report.skipped["fusion"]


CONFIGURED = {
    "LeakyReLU and pool sizes": {"act_cfg": {"type": "LeakyReLU"}, "key_pool_scales": (1, 2)},
    "no norm, as in its own unit test": {"norm_cfg": None},
    "GN": {"norm_cfg": {"type": "GN", "num_groups": 1}},
    "no activation": {"act_cfg": None},
}


@pytest.mark.parametrize("kind", [FUSED, "ANNHead"])
@pytest.mark.parametrize("name", CONFIGURED)
def test_other_configurations_train_as_published(name, kind):
    twin, maps, targets = build_head(**CONFIGURED[name]), features(), labels()
    head = build_head(type=kind, **CONFIGURED[name])
    head.load_state_dict(twin.state_dict())
    if kind == "ANNHead":
        assert list(ak.replace_blocks(head).replaced) == BLOCKS
    assert "collapsed" in repr(head.fusion)
    for module in (head, twin):
        own_loss(maps, targets, 5)(module).backward()
    for (name, p), q in zip(head.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(head.eval()(maps), twin.eval()(maps))


def test_our_head_is_one_word_in_a_configuration():
    theirs, maps, targets = build_head(), features(), labels()
    for word in (FUSED, "FusedANNHead"):  # the first imports and registers it
        ours = build_head(type=word)
        assert type(ours) is ak.FusedANNHead
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        loss = own_loss(maps, targets, 7)
        torch.testing.assert_close(loss(ours), loss(theirs))
        assert "collapsed" in repr(ours.fusion)
        assert "collapsed" in repr(ours.context)


def test_importing_the_package_does_not_import_mmsegmentation():
    code = "import sys, annnet_kernels; from annnet_kernels import *; assert not {'mmseg', 'mmcv'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def our_logits(net, maps):
    return net.cls(net.context(net.fusion(*maps[2:])))


class Backbone(torch.nn.Module):
    channels = (6, 10)


def test_its_checkpoint_loads_into_our_network_and_ours_into_its_head(tmp_path):
    head, maps = randomised(build_head(dropout_ratio=1e-9)), features()
    state = {f"decode_head.{key}": tensor for key, tensor in head.state_dict().items()}
    torch.save(
        {"meta": {"dataset": "city"}, "state_dict": state | {"backbone.stem.0.weight": torch.ones(1)}},
        tmp_path / "a.pth",
    )
    net = ak.ANNNet.from_checkpoint(tmp_path / "a.pth", backbone=Backbone(), dropout=0.0).double()
    assert net.checkpoint_report.unused == ["backbone.stem.0.weight"]
    ak.load_checkpoint(net, tmp_path / "a.pth")  # again, now in float64
    torch.testing.assert_close(our_logits(net.eval(), maps), head.eval()(maps), rtol=1e-6, atol=1e-7)
    report = ak.load_checkpoint(head.context, tmp_path / "a.pth")
    assert report.dialect == "mmseg"

    randomised(net)  # with biases that mmsegmentation's head has no place for
    state = ak.to_dialect(net.state_dict(), "mmseg")
    head.load_state_dict({key.removeprefix("decode_head."): tensor for key, tensor in state.items()}, strict=True)
    for training in (False, True):
        torch.testing.assert_close(
            our_logits(net.train(training), maps), head.train(training)(maps), rtol=1e-6, atol=1e-7
        )
    torch.testing.assert_close(our_logits(net.eval(), maps), head.eval()(maps), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "original"])
def test_our_checkpoint_loads_into_its_head_with_biases_in_the_running_means(replaced, tmp_path):
    net, head = (
        randomised(ak.ANNNet(4, Backbone(), channels=8, key_channels=5, value_channels=5)).double(),
        build_head(),
    )
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    if replaced:
        ak.replace_blocks(head)
    report = ak.load_checkpoint(head, tmp_path / "ours.pth")
    assert report.folded["fusion.stages.0.f_key.0.bias"] == "fusion.stages.0.key_project.bn.running_mean"
    assert "folded context.0.bias into bottleneck.bn.running_mean" in str(report)
    assert all(key.startswith("dsn.") for key in report.unused)
    maps = features()
    torch.testing.assert_close(head.eval()(maps), our_logits(net.eval(), maps), rtol=1e-6, atol=1e-7)


def running_statistics(head):
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return head.eval()


def merges(head, maps, monkeypatch):
    """How often a call without gradients merges AFNB and convolution, and what it returns."""
    calls, real = [], folding.merged_forward
    monkeypatch.setattr(folding, "merged_forward", lambda *a: calls.append(a) or real(*a))
    with torch.no_grad():
        out = head(maps)
    monkeypatch.undo()
    return len(calls), out


@pytest.mark.parametrize("act_cfg", [{"type": "ReLU"}, {"type": "ReLU6"}], ids=["ReLU", "ReLU6"])
@pytest.mark.parametrize("kind", [FUSED, "ANNHead"])
def test_a_folded_head_merges_its_afnb_with_the_bottleneck(kind, act_cfg, monkeypatch):
    head = running_statistics(build_head(type=kind))
    head.bottleneck.activate = torch.nn.ReLU6() if act_cfg["type"] == "ReLU6" else head.bottleneck.activate
    twin, maps = copy.deepcopy(head), features()
    expected = twin(maps).detach()
    if kind == "ANNHead":
        ak.replace_blocks(head)
    assert merges(head, maps, monkeypatch)[0] == 0
    assert ak.fold_for_inference(head).folded["fusion"] == "merged with the convolution behind it"
    count, got = merges(head, maps, monkeypatch)
    assert count == 1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert head.state_dict().keys() == twin.state_dict().keys()
    assert merges(copy.deepcopy(head), maps, monkeypatch)[0] == 0
    head.train().eval()
    count, got = merges(head, maps, monkeypatch)
    assert count == 0
    torch.testing.assert_close(got, expected)


def drop(head):
    head.dropout.train()


def hook_the_bottleneck(head):
    head.bottleneck.register_forward_hook(lambda *_: None)


def other_convolution(head):
    head.bottleneck.conv = copy.deepcopy(head.bottleneck.conv)


@pytest.mark.parametrize("change", [drop, hook_the_bottleneck, other_convolution])
def test_what_a_merge_would_skip_is_called(change, monkeypatch):
    head, maps = running_statistics(build_head(type=FUSED)), features()
    ak.fold_for_inference(head)
    assert merges(head, maps, monkeypatch)[0] == 1
    change(head)
    assert merges(head, maps, monkeypatch)[0] == 0


def test_only_the_published_head_and_bottleneck_merge():
    class Deep(mmsegmentation.ANNHead):
        def forward(self, inputs):
            low, high = self._transform_inputs(inputs)
            fused = self.fusion(low, high)
            return self.cls_seg(self.context(self.bottleneck(fused) + self.bottleneck(high)))

    class Loud(type(build_head().bottleneck)):
        def forward(self, x, activate=True, norm=True):
            return 2 * super().forward(x, activate, norm)

    subclassed, wrapped = build_head().eval(), build_head().eval()
    subclassed.__class__, wrapped.bottleneck.__class__ = Deep, Loud
    for head in (subclassed, wrapped):
        expected = head(maps := features()).detach()
        ak.replace_blocks(head)
        assert ak.fold_for_inference(head).folded["fusion"] == "alone"
        with torch.no_grad():
            torch.testing.assert_close(head(maps), expected)


def test_a_head_around_replaced_blocks_is_pickled_and_restored():
    head, maps = running_statistics(build_head()), features()
    original, expected = type(head), head(maps).detach()
    ak.replace_blocks(head)
    assert isinstance(head, original)
    assert type(head) is not original
    torch.testing.assert_close(pickle.loads(pickle.dumps(head))(maps), expected)
    ak.restore_blocks(head)
    assert type(head) is original
    torch.testing.assert_close(head(maps), expected)


def test_our_head_needs_no_dropout(monkeypatch):
    head, maps = running_statistics(build_head(type=FUSED, dropout_ratio=0)), features()
    expected = head(maps).detach()
    ak.fold_for_inference(head)
    count, got = merges(head, maps, monkeypatch)
    assert count == 1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def fused_head(**options):
    torch.manual_seed(11)
    head = mmsegmentation.build_head(type=FUSED, **options).double()
    randomise_output(head)
    return head


def with_void(samples):
    for sample in samples:
        data = sample.gt_sem_seg.data
        data[torch.rand(data.shape) < 0.2] = 255
    return samples


LOSS = {"type": "CrossEntropyLoss", "loss_weight": 0.7}


@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"avg_non_ignore": True}, {"reduction": "sum"}, {"reduction": "none", "loss_name": "loss_pixels"}]
)
def test_losses_and_accuracy_without_full_resolution_are_mmsegmentations(changes, align_corners):
    head = fused_head(loss_decode=LOSS | changes, align_corners=align_corners)
    assert head.why_plain_loss() is None
    assert "loss without logits of full resolution" in repr(head)
    logits, targets = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True), with_void(labels())
    ours, plain = head.loss_by_feat(logits, targets), mmsegmentation.ANNHead.loss_by_feat(head, logits, targets)
    assert ak.last_backend("upsampled_cross_entropy") is not None
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        assert ours[name].shape == expected.shape
        torch.testing.assert_close(ours[name].double(), expected.double(), msg=lambda m, name=name: f"{name}: {m}")
    (name,) = set(ours) - {"acc_seg"}
    gradients = [torch.autograd.grad(losses[name].sum(), logits)[0] for losses in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss_decode": LOSS | {"use_sigmoid": True}}, "uses sigmoids or masks"),
        ({"loss_decode": LOSS | {"class_weight": [1.0, 2.0, 3.0, 4.0]}}, "has class weights"),
        ({"loss_decode": [LOSS, LOSS | {"loss_name": "loss_again"}]}, "loss_decode is ModuleList"),
        ({"sampler": {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 10}}, "the sampler OHEMPixelSampler"),
    ],
)
def test_other_losses_stay_mmsegmentations_and_say_so(changes, reason):
    head = fused_head(**{"loss_decode": LOSS} | changes)
    assert reason in head.why_plain_loss()
    assert reason in repr(head)
    logits, targets = torch.randn(2, 4, 9, 7, dtype=torch.float64), labels()
    ours, plain = head.loss_by_feat(logits, targets), mmsegmentation.ANNHead.loss_by_feat(head, logits, targets)
    for name, expected in plain.items():
        assert torch.equal(ours[name], expected)
