"""`minillm benchmark`: measures what the options ask for, and writes and compares the results."""

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minillm_cli.benchmark.compare import (
    changes,
    comparison_table,
    fallen,
    is_results,
    read_results,
    require_comparable,
)
from minillm_cli.benchmark.measure import devices_of, measure
from minillm_cli.benchmark.options import Options
from minillm_cli.benchmark.pictures import draw_roofline, draw_scaling
from minillm_cli.benchmark.report import report
from minillm_cli.benchmark.results import Results
from minillm_cli.benchmark.scaling import measure_scaling, sweeps
from minillm_cli.benchmark.team import EngineError
from minillm_cli.console import command_line, parse, say
from minillm_core.config import RunConfig, load_config, to_dict
from minillm_core.errors import InputError, listed
from minillm_core.files import make_folder, replace_file, require_writable, user_path
from minillm_core.model.params import count_params
from minillm_core.version import __version__

FILES = ("results.json", "report.md", "roofline.png", "scaling.png")


def main() -> None:
    benchmark(parse(Options))


def benchmark(options: Options) -> None:
    """Measures, prints the report, and writes it.

    Raises:
        InputError: bad options; an engine failed; the losses of two engines differ; or a row became slower than that of
            `--against`. The last three after everything is written.
    """
    config = load_config(options.preset)
    options.check(config.model.context_length)
    earlier = None if options.against is None else read_results(options.against)
    output = None if options.out is None else Output(options.out)
    devices = devices_of([*options.engines, *options.peers])
    on_gpu = any(device["gpu"] for device in devices.values())
    cases = options.cases(config, on_gpu=on_gpu)
    results = Results(_about(options, config, devices, on_gpu=on_gpu), options.references)
    if earlier is not None:
        require_comparable(earlier, results.about, options.against)
    for case in cases:
        try:
            measure(case, [*options.engines, *options.peers], options.rounds, results, say)
        except EngineError as error:
            results.failed.append({"case": case.name, "engine": error.engine, "problem": str(error)})
        if output is not None:
            output.save(results)
    if options.scaling:
        wanted = sweeps(config, options.resolved_dtype(on_gpu=on_gpu), on_gpu=on_gpu)
        try:
            results.scaling = measure_scaling(wanted, options.engines, results, say)
        except EngineError as error:
            results.failed.append({"case": "scaling", "engine": error.engine, "problem": str(error)})
    results.complete = True
    print(report(results))
    if output is not None:
        output.save(results)
        say(f"wrote {', '.join(str(path) for path in output.written)}")
    problems = [*results.problems, *(f"{f['case']}: {f['engine']} failed" for f in results.failed)]
    if problems:
        raise InputError(listed("the benchmark found problems", problems))
    if earlier is not None:
        now = results.as_dict()
        compared = changes(earlier, now)
        print(comparison_table(compared, earlier, now))
        if slower := fallen(compared, options.tolerance):
            problem = f"{len(slower)} of {len(compared)} numbers fell by more than {options.tolerance:.0%}"
            hint = "repeat the run on a quiet machine; if the result is the same, look for the change that causes it"
            raise InputError(listed(problem, slower), where=options.against, hint=hint)


class Output:
    """The folder of the results."""

    def __init__(self, name: str):
        """Raises InputError if there is a file, or files that no benchmark has written. Nothing is changed yet."""
        self.folder = user_path(name)
        hint = "give the name of a new folder, or of one with the results of an earlier benchmark"
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError("--out is a file", expected="a folder", found="a file", where=self.folder, hint=hint)
        require_writable(self.folder / "results.json")
        self.replaces = is_results(self.folder / "results.json")
        existing = [name for name in FILES if (self.folder / name).exists()]
        if existing and not self.replaces:
            found = f"{', '.join(existing)}, and no results.json of a benchmark"
            raise InputError("--out has other files of these names", found=found, where=self.folder, hint=hint)
        self.written: list[Path] = []

    def save(self, results: Results) -> None:
        """Writes everything. Earlier results are replaced only by complete ones."""
        if self.replaces and not results.complete:
            return
        make_folder(self.folder)
        replace_file(self.folder / "results.json", results.to_json())
        replace_file(self.folder / "report.md", report(results))
        self.written = [self.folder / "report.md", self.folder / "results.json"]
        if results.rows and results.bounds:
            draw_roofline(results, self.folder / "roofline.png")
            self.written.append(self.folder / "roofline.png")
        if results.scaling is not None:
            draw_scaling(results.scaling, self.folder / "scaling.png")
            self.written.append(self.folder / "scaling.png")
        for name in FILES:
            if self.folder / name not in self.written:
                (self.folder / name).unlink(missing_ok=True)  # a picture of the earlier results


def _about(options: Options, config: RunConfig, devices: dict[str, dict[str, Any]], *, on_gpu: bool) -> dict[str, Any]:
    """What the results depend on."""
    versions: dict[str, str] = {}
    for device in devices.values():
        versions |= device["versions"]
    return {
        "minillm": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(["benchmark", *sys.argv[1:]]),
        "device": next(device["device"] for device in devices.values() if device["gpu"] == on_gpu),
        "gpu": on_gpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "devices": {name: device["device"] for name, device in devices.items()},
        "preset": options.preset,
        "n_params": count_params(config.model),
        "dtype": options.resolved_dtype(on_gpu=on_gpu),
        "rounds": options.rounds,
        "config": to_dict(config),
    }
