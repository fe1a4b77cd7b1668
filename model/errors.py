"""What can be wrong with a model's files."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of an unsupported kind; the message names the file and the remedy."""
