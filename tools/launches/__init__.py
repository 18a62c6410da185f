"""Launches and host time of a step of the blocks, ours and plain, without a GPU: ``make launches``."""
