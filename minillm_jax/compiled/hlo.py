"""Reads a compiled program, in XLA's text form (HLO): what it launches, what it moves, which arrays it stores.

Only the instructions of the entry computation, and of the loops, branches and calls in it, are launched and have
results in memory. What a fusion computes inside stays in registers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "sufc" for bits in (4, 8, 16, 32, 64, 128)}

NOT_LAUNCHED = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "opt-barrier"),
    *("copy-done", "async-update", "async-done"),
}
"""Operations that only name memory, or wait."""

FUSED_ATTENTION = "__cudnn$fmha"

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(rf"\b({'|'.join(BITS)})\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape operation(operands), attributes`."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    text: str
    """What follows the opening parenthesis."""

    @property
    def n_bytes(self) -> int:
        return sum(_n_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(self.shape))

    @property
    def called(self) -> list[str]:
        """The computations that this instruction runs."""
        branches = _BRANCHES.search(self.text)
        return re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(self.text)


Computation = dict[str, Instruction]
"""Instructions by name, in order; the last one is the result."""


@dataclass(frozen=True)
class Costs:
    """What a program does per call."""

    moved_bytes: int = 0
    kernels: int = 0
    fused_attention_calls: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.moved_bytes + other.moved_bytes,
            self.kernels + other.kernels,
            self.fused_attention_calls + other.fused_attention_calls,
        )

    def __mul__(self, n: int) -> "Costs":
        return Costs(n * self.moved_bytes, n * self.kernels, n * self.fused_attention_calls)


def read_costs(hlo: str) -> Costs:
    """The costs of a program. A loop counts once per iteration, and once if XLA does not know how often it runs; of the
    branches of a condition the most expensive one counts."""
    computations, entry = _parse(hlo)
    return _costs(computations, entry)


def materialised(hlo: str) -> Counter[str]:
    """The arrays that the instructions of a program leave in memory, as `f32[64,512,384]`, and by how many each."""
    computations, entry = _parse(hlo)
    arrays: Counter[str] = Counter()
    for instruction in _launched(computations, entry):
        arrays.update(f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(instruction.shape))
    return arrays


def _parse(hlo: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    computation: Computation = {}
    entry = ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            computation = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, operation, text = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", text.partition(")")[0]))
            computation[name] = Instruction(name, shape, operation, operands, text)
    return computations, entry


def _launched(computations: dict[str, Computation], name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of everything that it calls, except inside of fusions."""
    for instruction in computations[name].values():
        if instruction.operation in ("while", "conditional", "call", "async-start"):
            for called in instruction.called:
                yield from _launched(computations, called)
        elif instruction.operation not in NOT_LAUNCHED:
            yield instruction


def _costs(computations: dict[str, Computation], name: str) -> Costs:
    total = Costs()
    for instruction in computations[name].values():
        if instruction.operation in ("while", "conditional", "call", "async-start"):
            called = [_costs(computations, called) for called in instruction.called]
            trips = _TRIPS.search(instruction.text)
            total += max(called, key=lambda costs: costs.moved_bytes) * (int(trips[1]) if trips else 1)
        elif instruction.operation not in NOT_LAUNCHED:
            moved = _moved(computations, computations[name], instruction)
            total += Costs(moved, 1, int(f'custom_call_target="{FUSED_ATTENTION}' in instruction.text))
    return total


def _moved(computations: dict[str, Computation], around: Computation, instruction: Instruction) -> int:
    """Bytes that one kernel reads and writes."""
    if instruction.operation == "fusion":
        body = computations[instruction.called[0]]
        results = [list(body.values())[-1]]
        if results[0].operation == "tuple":
            results = [body[name] for name in results[0].operands]
        parameters = [inner for inner in body.values() if inner.operation == "parameter"]
        return sum(_read(body, inner) for inner in parameters) + sum(_written(body, inner) for inner in results)
    operands = [around[name] for name in instruction.operands if name in around]
    read = sum(_used(around, operand, instruction) for operand in dict.fromkeys(operands))
    return read + _written(around, instruction)


def _read(body: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's argument that its instructions read: all, or only the slices that they take of it."""
    users = [inner for inner in body.values() if parameter.name in inner.operands]
    used = 0
    for user in users:
        used += _read(body, user) if user.operation == "bitcast" else _used(body, parameter, user)
    return min(used, parameter.n_bytes)


def _used(around: Computation, operand: Instruction, user: Instruction) -> int:
    if user.operation in ("dynamic-slice", "gather", "slice") and user.operands[0] == operand.name:
        return user.n_bytes
    if user.operation in ("dynamic-update-slice", "scatter") and user.operands[0] == operand.name:
        return 0  # updated in place
    return operand.n_bytes


def _written(around: Computation, instruction: Instruction) -> int:
    """Bytes of a result, or of the part that is written if it updates an array in place."""
    while instruction.operation == "bitcast":
        instruction = around[instruction.operands[0]]
    if instruction.operation == "dynamic-update-slice":
        return around[instruction.operands[1]].n_bytes
    if instruction.operation == "scatter":
        return around[instruction.operands[2]].n_bytes
    return instruction.n_bytes


def _n_bytes(dtype: str, dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim) * BITS[dtype] // 8
