"""This package's blocks inside of other frameworks. Each module imports its framework, so import it only to use it."""
