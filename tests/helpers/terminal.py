"""A pseudo-terminal that a test can read."""

import os
import select
import termios


class Terminal:
    """A terminal of 80 columns, to be written to, and what has been written to it since one last looked."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.stream = os.fdopen(slave, "w")

    def shown(self) -> str:
        self.stream.flush()
        shown = b""
        while select.select([self._master], [], [], 0)[0]:
            shown += os.read(self._master, 1 << 16)
        return shown.decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)
