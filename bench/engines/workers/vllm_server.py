"""Starts vLLM's server: a script for the interpreter that has vLLM.

Its argument is JSON: the configuration, as in a worker's first request, and the address to listen on. The configuration
is checked against the installed version first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import protocol  # beside this file
import vllm_worker


def main() -> None:
    protocol.end_with_parent()
    configuration = json.loads(sys.argv[1])
    address = configuration.pop("address")
    try:
        engine = vllm_worker.checked(**configuration)
    except protocol.Refused as error:
        sys.exit(str(error))
    # not the command `vllm`, which requires the package name vllm: builds for some hardware have another
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments({**engine, **address})]
    os.execv(sys.executable, command)


def arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """Convert keyword arguments to command-line options."""
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield f"--{name}"
            yield value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
