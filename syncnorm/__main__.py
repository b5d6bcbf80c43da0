"""Entry of the command `syncnorm` and of `python -m syncnorm`.

It makes Ctrl-C quiet before it imports torch, which takes seconds.
"""

import signal
import sys
import threading
from collections.abc import Sequence

from syncnorm import system

# What the extra `train` brings. Commands that need another extra name it themselves.
_TRAIN = ("numpy", "pydantic", "rich", "safetensors", "typer", "yaml")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status; 130 in the shell after Ctrl-C.

    Args:
        arguments: without the program's name; those of the process if None.
    """
    if refusal := system.refusal("the command"):
        print(f"syncnorm: {refusal}", file=sys.stderr)
        sys.exit(2)
    if arguments is None:
        system.prepare_standard_streams()
    # Python's own handler would print a traceback. A signal that a launcher ignores stays ignored.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if arguments is None:
        from syncnorm.run import env

        env.set_for_launcher(sys.argv[1:])
    try:
        from syncnorm.cli import main as run

        run(arguments)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _TRAIN:
            raise
        print(
            f"syncnorm: the command needs {name}, which is missing: pip install 'syncnorm[train]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
