"""The error a user can act on."""


class UserError(ValueError):
    """Something outside the program is wrong: a flag, a file, a mesh, a checkpoint.

    The message is one line that says what, what was found, what was expected and what to do.
    Command-line entry points print it alone on stderr and exit non-zero; everything else that
    is raised is a defect and keeps its traceback.
    """
