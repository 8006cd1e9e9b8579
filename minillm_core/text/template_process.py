"""Renders chat templates in a process of its own (`template_worker.py`), which is started when it is first needed."""

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from minillm_core.errors import InputError
from minillm_core.text import template_worker
from minillm_core.text.template_worker import TIME_LIMIT


class TemplateEndedError(InputError):
    """The process that renders templates ended, or was too slow. Nothing is known about the messages."""


class TemplateProcess:
    """One process, for any number of threads. If it had to be killed, the next call starts a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, variables: Mapping[str, Any], where: object = None) -> str:
        """The text of a template.

        Raises:
            InputError: the template refuses these variables, has an error, or takes too much time or memory.
        """
        request = json.dumps({"template": template, "variables": dict(variables)})
        with self._lock:
            line = self._ask(request, where)
        answer: dict[str, str] = json.loads(line)
        if "refused" in answer:
            hint = "change the messages as it says"
            raise InputError("the chat template refuses the messages", found=answer["refused"], where=where, hint=hint)
        if "failed" in answer:
            hint = "correct the template, or get it again"
            raise InputError("the chat template has an error", found=answer["failed"][:500], where=where, hint=hint)
        return answer["text"]

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _ask(self, request: str, where: object) -> str:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(TIME_LIMIT, end)
        timer.start()
        line = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            timer.cancel()
            if not line.endswith("\n"):  # also after Ctrl-C: its answer would be taken for that of the next request
                self.close()
        if not line.endswith("\n"):
            problem = f"the chat template took too long (more than {TIME_LIMIT} s)"
            if not late.is_set():
                problem = "the process that renders the chat template ended"
            raise TemplateEndedError(problem, where=where, hint="correct the template, or get it again")
        return line


def _start() -> "subprocess.Popen[str]":
    # by its path, so that it imports nothing of this package; -P: nor a file of that name in the same folder;
    # in a process group of its own: Ctrl-C is for the parent
    return subprocess.Popen(
        [sys.executable, "-P", template_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
        process_group=0,
    )


_shared = TemplateProcess()
atexit.register(_shared.close)


def render_template(template: str, variables: Mapping[str, Any], where: object = None) -> str:
    """`TemplateProcess.render` of the process that the whole program shares."""
    return _shared.render(template, variables, where)
