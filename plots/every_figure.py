"""Every figure of a study that the runs in a folder allow: its scripts, one after the other."""

from common.cli import UsageError


def draw_every(scripts, args):
    """Calls script.main(args) of each; says what could not be drawn. Raises the first UsageError when all raise one."""
    lacking = []
    for script in scripts:
        try:
            script.main(args)
        except UsageError as error:
            lacking.append(str(error))
    if len(lacking) == len(scripts):
        raise UsageError(lacking[0])
    for text in lacking:
        print(f"not drawn: {text.partition(': ')[2] or text}")
