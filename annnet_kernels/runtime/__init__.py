"""What the package runs on: backends and the C++ extension, and what PyTorch is doing at the moment of a call."""
