"""AFNB and APNB on row shards of one map over a process group."""

from .sharding import Traffic, shard_rows, traffic, unshard_rows

__all__ = ["Traffic", "shard_rows", "traffic", "unshard_rows"]
