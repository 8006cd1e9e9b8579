"""The process that renders chat templates: foreign code that loops, fills the memory or opens files does no harm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minillm_core.errors import InputError
from minillm_core.text import template_worker
from minillm_core.text.template_process import TemplateProcess, render_template
from parity_tests.conftest import ROOT

pytestmark = pytest.mark.extended

NESTED = (
    "{% set ns = namespace(n=0) %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set ns.n = 1 %}{% endfor %}{% endfor %}"
)
GROWING = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED, "took too long"),
        ("{{ 10 ** (10 ** 9) }}", "took too long"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        (GROWING, "memory"),
        ("{{ 'a' * 30000000 }}", "longer than"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "undefined|unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for message in messages %}", "line 1.*endfor"),
        ("{{ messages[0].x.y }}", "has no attribute 'x'"),
        ("{{ raise_exception('in its own words') }}", r"(?s)refuses the messages.*found: in its own words"),
    ],
)
def test_templates_that_fail(template: str, message: str) -> None:
    """An error within the time limit, and the next request works."""
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        render_template(template, {"messages": [{"role": "user"}]})
    assert time.monotonic() < start + template_worker.TIME_LIMIT + 2
    assert render_template("{{ x }}", {"x": "next"}) == "next"


def test_the_worker_opens_no_file(tmp_path: Path) -> None:
    """Even code that is out of the sandbox opens no file."""
    (tmp_path / "secret").write_text("secret")
    code = (
        "import sys, runpy, jinja2\n"
        f"jinja2.Template.render = lambda self, variables: open({str(tmp_path / 'secret')!r}).read()\n"
        f"runpy.run_path({template_worker.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input='{"template": "x", "variables": {}}\n', capture_output=True, text=True
    )
    assert "Too many open files" in done.stdout, done.stderr
    assert "secret" not in json.loads(done.stdout).get("text", "")


def test_the_worker_imports_little() -> None:
    """The standard library and jinja2, so that it starts fast."""
    code = f"import runpy, sys; runpy.run_path({template_worker.__file__!r}); print(*sys.modules)"
    found = subprocess.check_output([sys.executable, "-P", "-c", code], text=True).split()
    outside = {module.partition(".")[0] for module in found} - sys.stdlib_module_names - {"__main__"}
    assert {module for module in outside if not module.startswith("_")} <= {"jinja2", "markupsafe", "sitecustomize"}


def test_a_killed_worker_is_replaced() -> None:
    """Killed between two requests, and in the middle of one."""
    process = TemplateProcess()
    assert process.render("{{ x }}", {"x": 1}) == "1"
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.render("{{ x }}", {"x": 2}) == "2"
    pid = process._process.pid
    timer = threading.Timer(0.5, os.kill, [pid, signal.SIGKILL])
    timer.start()
    with pytest.raises(InputError, match="the process that renders the chat template ended"):
        process.render(NESTED, {})
    assert process.render("{{ x }}", {"x": 3}) == "3"
    process.close()


def test_an_interrupted_request_leaves_no_answer() -> None:
    """After Ctrl-C in the middle of a request, the next one gets its own answer."""
    process = TemplateProcess()
    process.render("first", {})
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        process.render(NESTED.replace("99999", "3000") + "second", {})
    assert process.render("third", {}) == "third"
    process.close()


def test_many_threads() -> None:
    process = TemplateProcess()
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        answers[i] = process.render("{{ x * 1000 }}", {"x": f"{i},"})

    threads = [threading.Thread(target=ask, args=[i]) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"{i}," * 1000 for i in range(40)}
    process.close()


@pytest.mark.parametrize("template", ["{{ 1 }}", NESTED])
def test_the_worker_ends_with_its_parent(template: str) -> None:
    """A parent that is killed leaves no process behind, even in the middle of an endless template."""
    code = (
        "import sys, threading, time\n"
        "from minillm_core.text.template_process import TemplateProcess\n"
        "process = TemplateProcess()\n"
        "process.render('x', {})\n"
        f"threading.Thread(target=process.render, args=[{template!r}, {{}}], daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(process._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + template_worker.TIME_LIMIT + 3
    while is_running(pid):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
