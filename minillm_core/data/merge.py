"""Parts that several machines prepared, as one folder of prepared data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm_core.data.finish import assemble_data
from minillm_core.data.plan import plan_of
from minillm_core.data.prepare import PART, PLAN
from minillm_core.errors import InputError
from minillm_core.files import (
    beside,
    commit_folder,
    hash_files,
    lock,
    make_folder,
    named_if_it_fails,
    real_path,
    refuse_existing,
)


def merge(parts: Sequence[Path], out: Path) -> None:
    """Assembles the parts that several machines prepared: the result is that of one machine.

    Args:
        parts: their folders, in any order.

    Raises:
        InputError: `out` exists; a part is missing, is given twice, or has a different plan.
    """
    refuse_existing(out)
    found: dict[int, tuple[Path, dict[str, Any], dict[str, Any]]] = {}
    for folder in parts:
        try:
            settings: Any = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            record: Any = json.loads((folder / PART).read_text(encoding="utf-8"))
            i, n = settings.pop("part")
            settings["number of parts"] = n
            blocks = [folder / settings["blocks"] / name for name in record["blocks"]]
            plan = plan_of(settings, folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError("not a part of a preparation", found=error, where=folder, hint="check the path") from error
        first, known, _ = next(iter(found.values()), (folder, settings, record))
        apart = known.keys() - {"paths", "times", "blocks"}
        if differing := sorted(name for name in apart if settings.get(name) != known[name]):
            hint = "prepare all parts from the same inputs, with the same options and version"
            problem = f"the parts have a different {', '.join(differing)}"
            raise InputError(problem, found=f"{first} and {folder}", hint=hint)
        if i in found:
            raise InputError("a part is given twice", found=f"{found[i][0]} and {folder}", hint="give each part once")
        present = [path for path in blocks if path.is_file()]
        digests = dict(zip(present, hash_files(present, f"checking part {i + 1} of {n}"), strict=True))
        for path in blocks:
            if digests.get(path) != record["blocks"][path.name]:
                hint = "copy the part again"
                raise InputError("a block of a part is missing or damaged", where=path, hint=hint)
        found[i] = (folder, settings, record)
    if missing := [f"{i + 1}/{n}" for i in range(n) if i not in found]:
        raise InputError("parts are missing", expected=f"{n} parts", found=f"no part {', '.join(missing)}")
    in_order = [found[i] for i in range(n)]
    plan = plan_of(in_order[0][1], in_order[0][0])
    blocks = [folder / settings["blocks"] / name for folder, settings, record in in_order for name in record["blocks"]]
    bad_sources = [source for _, _, record in in_order for source in record["bad_sources"]]
    partial = beside(out, "merged")
    make_folder(partial.parent)
    with lock(beside(out, "lock")), named_if_it_fails(out):
        refuse_existing(out)
        assemble_data(plan, sorted(blocks, key=lambda path: path.name), bad_sources, partial)
        commit_folder(partial, real_path(out))
        beside(out, "lock").unlink(missing_ok=True)
