"""Blocks of every dialect as others build them, with random output projections and maps for them."""

import published
import torch
from replacement_rule import randomise_output
from torch import nn

from annnet_kernels.reference import PlainAFNB, PlainAPNB

FUSION_MAPS, PYRAMID_MAPS = [(2, 6, 9, 8), (2, 10, 11, 12)], [(2, 10, 11, 12)]
BLOCKS = {
    "plain AFNB": (lambda: PlainAFNB(6, 10, 12, 8, 5, dropout=0.0), FUSION_MAPS),
    "plain APNB": (lambda: PlainAPNB(10, 10, 8, 5, dropout=0.0), PYRAMID_MAPS),
    "MendelXu AFNB": (lambda: published.AFNB(6, 10, 12, 8, 5, dropout=0.0), FUSION_MAPS),
    "MendelXu APNB": (lambda: published.APNB(10, 7, 8, 5, dropout=0.0, psp_size=(1, 4)), PYRAMID_MAPS),
    "simple fusion": (lambda: published.AFNPBlock(12, 8, 5), [(2, 6, 9, 8), (2, 12, 11, 12)]),
    "simple pyramid": (lambda: published.APNBBlock(10, 7, 8, 5, pool_sizes=(1, 4)), PYRAMID_MAPS),
}
COMPARED = [kind for kind in BLOCKS if not kind.startswith("plain")]


def build(kind):
    make, shapes = BLOCKS[kind]
    block = make().double()
    randomise_output(block)
    return nn.Sequential(block), [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def call(model, maps):
    return model[0](*maps)
