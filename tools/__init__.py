"""Programs that work on the package and are no part of it: the GPU campaign, and the stand-in for a GPU's driver."""
