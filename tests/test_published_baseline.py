"""The baseline of every ratio is no straw man: against mmsegmentation's own blocks, with the same weights."""

import time

import mmsegmentation
import pytest
import torch
from test_normalized import kept_for_backward

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB
from benchmarks.cases import Case
from benchmarks.features import randomise
from benchmarks.providers import providers, template

NORM, ACTIVATION = {"type": "BN"}, {"type": "ReLU"}
SLOWER, ROUNDS, ENOUGH = 1.1, 60, 5


def published_afnb(low, high, out, key, value, dropout=0.0):
    return mmsegmentation.AFNB(low, high, key, out, (1,), (1, 3, 6, 8), None, NORM, ACTIVATION)


def published_apnb(channels, out, key, value, dropout=0.0):
    return mmsegmentation.APNB(channels, key, out, (1,), (1, 3, 6, 8), None, NORM, ACTIVATION)


def plain_afnb(*channels, dropout=0.0):
    return PlainAFNB(*channels, dropout=0.0)  # mmsegmentation's blocks have none


def plain_apnb(*channels, dropout=0.0):
    return PlainAPNB(*channels, dropout=0.0)


BLOCKS = {
    "AFNB": (plain_afnb, published_afnb, (1024, 2048, 2048, 256, 256), [(1, 1024, 17, 17), (1, 2048, 17, 17)]),
    "APNB": (plain_apnb, published_apnb, (512, 512, 256, 256), [(1, 512, 33, 33)]),
}


def build(kind):
    """The plain block and mmsegmentation's, with the same random weights, and maps."""
    make_plain, make_published, channels, shapes = BLOCKS[kind]
    published, plain = make_published(*channels), make_plain(*channels)
    torch.nn.init.normal_(published.stages[0].out_project.weight, std=0.1)
    plain.load_state_dict(ak.to_dialect(published.state_dict(), "mendelxu"))
    return plain, published, [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_computes_the_same(kind):
    plain, published, maps = build(kind)
    for training in (True, False):
        got, expected = plain.train(training)(*maps), published.train(training)(*maps)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    running, counted = plain.stages[0].f_key[1][0], published.stages[0].key_project.bn
    assert running.num_batches_tracked == counted.num_batches_tracked


def step_time(block, maps, training):
    started = time.perf_counter()
    if training:
        block(*maps).sum().backward()
    else:
        with torch.no_grad():
            block(*maps)
    return time.perf_counter() - started


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_at_most_a_tenth_slower(kind, training):
    """Interleaved minima: what else the machine does lengthens single runs, hardly ever all of them."""
    plain, published, maps = build(kind)
    blocks = {"plain": plain.train(training), "published": published.train(training)}
    best = dict.fromkeys(blocks, float("inf"))
    for round_ in range(ROUNDS):
        for name, block in blocks.items():
            best[name] = min(best[name], step_time(block, maps, training))
        if round_ >= ENOUGH and best["plain"] <= SLOWER * best["published"]:
            return
    pytest.fail(f"takes {best['plain'] / best['published']:.2f} of the published block's time")


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_keeps_no_more_memory(kind):
    make_plain, make_published, channels, _ = BLOCKS[kind]
    mine, theirs = kept_for_backward(make_plain, channels), kept_for_backward(make_published, channels)
    assert mine <= theirs, f"keeps {mine / theirs:.3f} of the published block's memory"


@pytest.mark.parametrize("subject", BLOCKS)
def test_the_benchmark_holds_us_against_it_under_the_published_names(subject):
    case = Case(subject, True, (9, 11), 64, out_channels=64, low_channels=32 if subject == "AFNB" else 0)
    (peer,) = (p for p in providers(case, "standard") if p.name == "mmsegmentation")
    plain, theirs = template(case).eval(), peer.build(case).eval()
    theirs.load_state_dict(randomise(plain, 0).state_dict())
    maps = [torch.randn(1, channels, 9, 11) for channels in (case.low_channels, case.channels) if channels]
    torch.testing.assert_close(theirs(*maps), plain(*maps), rtol=1e-3, atol=1e-3)
    missing = {f"{ahead}.bias" for ahead in ("stages.0.f_key.0", "stages.0.f_query.0", "conv_bn_dropout.0")}
    expected = {name: p.shape for name, p in plain.named_parameters() if name not in missing}
    assert {name: p.shape for name, p in theirs.named_parameters()} == expected
