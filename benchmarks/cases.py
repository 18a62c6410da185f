"""What is measured: named shapes, data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from annnet_kernels.pyramid import POOL_SIZES, num_tokens

from . import heads, upsampled

OPERATORS = ("pyramid_pool", "asymmetric_attention")
BLOCKS = ("AFNB", "APNB")
PAIR = "AFNB + 3×3"  # with the convolution behind it in ANNNet, which a fold merges it with
MODEL = "ANNNet"
CLASSES = 19
KEY_CHANNELS = VALUE_CHANNELS = 256


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: an operator, a block or the model on maps of one size.

    Args:
        subject: one of ``OPERATORS``, ``BLOCKS``, ``PAIR``, ``MODEL``, ``heads.HEADS`` or
            ``upsampled.SUBJECTS``.
        training: forward and backward (blocks in training mode) instead of forward alone (evaluation mode).
        size: (height, width) of the feature map; of the image for the model.
        channels: of the input map (AFNB: of the high level). For the attention, of query and value.
        batch: images.
        dtype: of the maps. 16-bit blocks and models keep float32 parameters and run under autocast.
        layout: ``"nchw"`` or ``"channels_last"``.
        tags: the selections that the case belongs to.
        compiled: whether even a quick run spends the seconds that compiling a peer takes.
        out_channels, low_channels: of the blocks.
    """

    subject: str
    training: bool
    size: tuple[int, int]
    channels: int
    batch: int = 1
    dtype: str = "float32"
    layout: str = "nchw"
    tags: tuple[str, ...] = ()
    out_channels: int = 0
    low_channels: int = 0
    compiled: bool = False

    @property
    def mode(self) -> str:
        if self.subject in (*OPERATORS, *upsampled.SUBJECTS):
            return "forward + backward" if self.training else "forward"
        return "training step" if self.training else "evaluation"

    @property
    def name(self) -> str:
        widths = f"{self.low_channels}/{self.channels}" if self.low_channels else f"{self.channels}"
        widths = f"{widths}→{self.out_channels}" if self.out_channels else widths
        height, width = self.size
        return f"{self.subject} {widths}, {self.batch}×{height}×{width}, {self.dtype}, {self.layout}, {self.mode}"

    @property
    def autocast(self) -> bool:
        return self.subject not in (*OPERATORS, *upsampled.SUBJECTS) and self.dtype in ("bfloat16", "float16")

    @property
    def map_size(self) -> tuple[int, int]:
        """(height, width) of the feature map; the backbone's output stride is 8."""
        height, width = self.size
        return (-(-height // 8), -(-width // 8)) if self.subject == MODEL else self.size

    @property
    def output_values(self) -> int:
        """Elements of all outputs."""
        height, width = self.size
        if self.subject == "pyramid_pool":
            return self.batch * self.channels * num_tokens(POOL_SIZES, POOL_SIZES)
        if self.subject == MODEL:
            return self.batch * CLASSES * height * width * (2 if self.training else 1)
        if self.subject in upsampled.SUBJECTS:  # labels or indices, of 8 bytes a pixel
            pixels = upsampled.pixel_size(self.size)
            return self.batch * pixels[0] * pixels[1] * 8 // (4 if self.dtype == "float32" else 2)
        if self.subject in heads.NETWORKS:
            return 1 if self.training else self.batch * heads.CLASSES * height * width // 16
        return self.batch * (self.out_channels or VALUE_CHANNELS) * height * width

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "mode": self.mode, **asdict(self)}


def _both_modes(case: Case) -> tuple[Case, Case]:
    return replace(case, training=False), replace(case, training=True)


def pool(size: tuple[int, int], *, channels: int = 512, **options: Any) -> tuple[Case, Case]:
    return _both_modes(Case("pyramid_pool", False, size, channels, **options))


def attention(size: tuple[int, int], **options: Any) -> tuple[Case, Case]:
    return _both_modes(Case("asymmetric_attention", False, size, VALUE_CHANNELS, **options))


def apnb(size: tuple[int, int], *, channels: int = 512, **options: Any) -> tuple[Case, Case]:
    return _both_modes(Case("APNB", False, size, channels, out_channels=channels, **options))


def afnb(size: tuple[int, int], **options: Any) -> tuple[Case, Case]:
    return _both_modes(Case("AFNB", False, size, 2048, out_channels=2048, low_channels=1024, **options))


def pair(size: tuple[int, int], **options: Any) -> Case:
    return Case(PAIR, False, size, 2048, out_channels=512, low_channels=1024, **options)


def model(size: tuple[int, int], **options: Any) -> tuple[Case, Case]:
    return _both_modes(Case(MODEL, False, size, 3, **options))


def head(subject: str, size: tuple[int, int], channels: int = 3, **options: Any) -> tuple[Case, Case]:
    """A decode head, or a network with one; ``size`` is that of the image for a network, else of the map."""
    return _both_modes(Case(subject, False, size, channels, **options))


def loss(size: tuple[int, int], classes: int, **options: Any) -> tuple[Case, Case]:
    """Cross-entropy with its gradient, and argmax, of logits of this size."""
    training = Case(upsampled.LOSS, True, size, classes, **options)
    return training, Case(upsampled.ARGMAX, False, size, classes, **options)


def _quick() -> list[Case]:
    """Small maps: both operators, both blocks and the model in under two minutes on two CPU cores."""
    tags = ("quick",)
    apnb_evaluation, apnb_training = apnb((49, 49), tags=tags)
    return [
        *pool((97, 97), tags=tags),
        pool((97, 97), layout="channels_last", tags=tags)[1],
        *attention((65, 65), tags=tags),
        replace(apnb_evaluation, compiled=True),
        apnb_training,
        *afnb((33, 33), tags=tags),
        *model((129, 129), tags=tags),
        *head(heads.SEGFORMER_B0, (256, 256), tags=tags),
        *loss((33, 33), 19, batch=2, tags=tags),
    ]


def _smoke() -> list[Case]:
    """Tiny cases of both operators and a block, to see that everything runs."""
    tags = ("smoke",)
    small = (9, 11)
    return [pool(small, tags=tags)[1], attention(small, tags=tags)[1], apnb(small, tags=tags)[1]]


def _cpu() -> list[Case]:
    tags = ("cpu",)
    return [
        *pool((97, 97), tags=tags),
        *pool((97, 97), layout="channels_last", tags=tags),
        *(
            case
            for dtype in ("bfloat16", "float16")
            for layout in ("nchw", "channels_last")
            for case in pool((97, 97), dtype=dtype, layout=layout, tags=tags)
        ),
        *attention((97, 97), tags=tags),
        *attention((97, 97), layout="channels_last", tags=tags),
        *apnb((97, 97), tags=tags),
        *apnb((97, 97), layout="channels_last", tags=tags),
        *afnb((49, 49), tags=tags),
        *afnb((49, 49), layout="channels_last", tags=tags),
        pair((49, 49), tags=tags),
        *loss((65, 65), 19, batch=2, tags=tags),
        *loss((64, 64), 150, batch=2, tags=tags),
        *model((257, 257), tags=tags),
    ]


def _heads() -> list[Case]:
    tags = ("cpu", "heads")
    return [
        *head(heads.SEGFORMER_B0, (512, 512), tags=tags),
        *head(heads.SEGFORMER_B2, (512, 512), tags=tags),
        *head(heads.PSP_HEAD, (49, 49), channels=2048, batch=2, tags=tags, out_channels=19),
        *head(heads.BOTTLENECK, (128, 128), channels=heads.WIDTH, tags=tags, out_channels=heads.WIDTH),
        *head(heads.SWIN, (512, 512), tags=tags),
    ]


def _gpu() -> list[Case]:
    """Batch 8 is the batch of design targets; channels_last is the layout preferred inside the model."""
    shapes: Sequence[tuple[tuple[int, int], int, tuple[str, ...]]] = (
        ((97, 97), 8, ("gpu-first",)),
        ((128, 256), 8, ("gpu-first",)),
        ((64, 128), 8, ("gpu-rest",)),
        ((128, 256), 1, ("gpu-rest",)),
    )
    cases: list[Case] = []
    for size, batch, tags in shapes:
        first = tags == ("gpu-first",)
        for layout in ("channels_last", "nchw"):
            options: dict[str, Any] = {"batch": batch, "dtype": "bfloat16", "layout": layout}
            operator_tags = (*tags, "gpu-operators") if first else tags
            block_tags = (*tags, "gpu-blocks") if first and layout == "channels_last" else ("gpu-rest",)
            cases += [*pool(size, tags=operator_tags, **options), *attention(size, tags=operator_tags, **options)]
            cases += [*apnb(size, tags=block_tags, **options), *afnb(size, tags=block_tags, **options)]
            cases += [pair(size, tags=block_tags, **options)]
    for size, classes in (((65, 65), 19), ((97, 97), 19), ((64, 64), 150)):
        cases += loss(size, classes, batch=8, dtype="bfloat16", tags=("gpu-rest",))
    for image in ((769, 769), (512, 1024), (1024, 2048)):
        cases += model(image, batch=2, dtype="bfloat16", layout="channels_last", tags=("gpu-models",))
    return cases


def _paper() -> list[Case]:
    """The table of Zhu et al. 2019, section 4.3: one image, 2048 channels, evaluation, against the non-local block."""
    return [
        apnb(size, channels=2048, dtype=dtype, tags=(f"paper-{device}",))[0]
        for device, dtype in (("cpu", "float32"), ("gpu", "float32"), ("gpu", "bfloat16"))
        for size in ((96, 96), (128, 128), (128, 256))
    ]


def _memory() -> list[Case]:
    """Time and memory against map size, up to where the non-local block stops fitting."""
    sizes = ((32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512))
    return [apnb(size, dtype="bfloat16", layout="channels_last", tags=("sizes",))[0] for size in sizes]


CASES: tuple[Case, ...] = (*_quick(), *_smoke(), *_cpu(), *_heads(), *_gpu(), *_paper(), *_memory())


def select(tags: Sequence[str], only: Sequence[str] = ()) -> list[Case]:
    """The cases that bear one of ``tags``; with ``only``, those whose name holds one of these texts.

    Cases of heads whose package is not installed are left out.
    """
    chosen = [case for case in CASES if set(tags) & set(case.tags)]
    chosen = [case for case in chosen if case.subject not in heads.HEADS or heads.is_available(case.subject)]
    return [case for case in chosen if not only or any(text.lower() in case.name.lower() for text in only)]
