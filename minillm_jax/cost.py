"""Parameter and FLOP counts of a model of any size, from the framework's abstract model: no array is allocated."""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx

from minillm_core.config import ModelConfig
from minillm_jax.model import abstract_model


def count_params(config: ModelConfig) -> int:
    """Number of parameters of the model that this framework builds."""
    return sum(math.prod(param.shape) for param in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))


def count_forward_flops(config: ModelConfig, batch: int, seq_len: int) -> int:
    """Operations of the matrix products in one forward pass, as traced by this framework (a multiply-add is 2)."""
    graphdef, state = nnx.split(abstract_model(config))
    tokens_BT = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0])(state, tokens_BT)
    return _matmul_flops(jaxpr.jaxpr)


def _matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted, _ = equation.params["dimension_numbers"][0]
            left, out = (_shape(variable) for variable in (equation.invars[0], equation.outvars[0]))
            total += 2 * math.prod(left[axis] for axis in contracted) * math.prod(out)
        for inner_jaxpr in jax.extend.core.jaxprs_in_params(equation.params):
            total += _matmul_flops(inner_jaxpr)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
