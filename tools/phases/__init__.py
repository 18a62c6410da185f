"""The phase table: what one training step sends to a GPU, and the least time that it can take there, without a GPU."""
