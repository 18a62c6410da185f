"""The compile table: what every kernel becomes on every architecture, without a GPU."""
