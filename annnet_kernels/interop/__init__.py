"""Other people's code and files: their blocks and heads are recognised, compared, replaced; their checkpoints read."""
