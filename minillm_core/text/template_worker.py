"""The process that renders chat templates. A template comes with a model and is foreign code: it may loop for ever,
fill the memory or try to read files. Here it has little memory and time and no files, and can be killed.

Imports only the standard library and jinja2. Reads one request per line of stdin, a JSON object with `template` and
`variables`, and answers each with one line: `text`, or `refused` (the template's own words) or `failed` (an error).
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

MEMORY = 512 << 20
"""Bytes of address space; Python with jinja2 takes about 40 MB of it."""
MAX_TEXT = 20_000_000
"""Characters of a rendered text."""
TIME_LIMIT = 5
"""Seconds for one request."""


class Refused(jinja2.TemplateError):
    """A template called raise_exception."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks replies in some templates; what is inside is rendered as usual."""

    tags = {"generation"}  # noqa: RUF012 (as in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def raise_exception(message: str) -> None:
    raise Refused(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter, it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """The settings and names are those of `transformers`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = compiled(request["template"]).render(request["variables"])
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"failed": f"line {error.lineno}: {error.message}"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    if len(text) > MAX_TEXT:
        return {"failed": f"the text is longer than {MAX_TEXT:,} characters"}
    return {"text": text}


def main() -> None:
    # jinja2 loads some modules at the first text and at the first error; later, no file can be opened
    answer({"template": "{{ 'text' + 1 }}", "variables": {}})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, 3),  # stdin, stdout and stderr, which are open already
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space
            resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        signal.alarm(TIME_LIMIT + 1)  # ends this process if the one that would kill it has ended
        reply = json.dumps(answer(json.loads(line)))
        signal.alarm(0)
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
