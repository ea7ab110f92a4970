"""The three errors that prebake raises on purpose; each message is one sentence with the way out in it."""


class PrebakeError(Exception):
    """Base of the three, so that a caller can catch what prebake says, and nothing else."""


class RecipeError(PrebakeError):
    """What was asked for is not valid: a recipe, an override, or an argument of the command line."""


class ExportError(PrebakeError):
    """This model cannot be exported in this way."""


class ArtifactError(PrebakeError):
    """This folder cannot be replayed here, or was called against its contract."""
