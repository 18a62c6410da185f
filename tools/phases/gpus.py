"""What a phase table assumes of a GPU: how fast it moves bytes and makes products."""

from __future__ import annotations

from dataclasses import dataclass

_TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """One product of an architecture.

    Args:
        bandwidth: bytes/s.
        products: FLOP/s by the kind of product: ``bfloat16``, ``tf32`` and ``ieee``, float32 without tensor cores.
        source: where the rates come from.
    """

    name: str
    arch: int
    bandwidth: float
    products: dict[str, float]
    source: str

    def seconds(self, size: int, flop: int, kind: str) -> float:
        """The least time of something that moves ``size`` bytes and makes ``flop`` of this kind.

        Kinds that end in ``x3`` make every product of float32 from three shorter ones.
        """
        rate = self.products[kind.removesuffix("x3")] / (3 if kind.endswith("x3") else 1)
        return max(size / self.bandwidth, flop / rate)


def _rates(bfloat16: float, tf32: float, ieee: float) -> dict[str, float]:
    return {
        "bfloat16": bfloat16 * _TERA,
        "bf16": bfloat16 * _TERA,
        "float16": bfloat16 * _TERA,
        "tf32": tf32 * _TERA,
        "ieee": ieee * _TERA,
    }


GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("H200", 90, 4.3 * _TERA, _rates(790, 494, 67), "bandwidth and bfloat16 measured, the others published"),
        Gpu("A100 80GB", 80, 2.039 * _TERA, _rates(312, 156, 19.5), "published"),
        Gpu("RTX 4090", 89, 1.008 * _TERA, _rates(165.2, 82.6, 82.6), "published"),
        Gpu("B200", 100, 8.0 * _TERA, _rates(2250, 1100, 75), "published"),
    )
}
"""By architecture. Published rates are the vendor's, dense, with float32 sums."""
