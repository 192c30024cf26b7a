"""`DynamicEmbed`: the parameters of a table that grows, and their new rows within a whole model's.

Which key has which row is no parameter, and not of the module: it is the `qrhash.dynamic.State`,
integers, which the training step carries beside parameters and optimizer.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import copy

from qrhash import dynamic
from qrhash.dynamic.config import DynamicConfig, check_dynamic_config
from qrhash.dynamic.embedding import Parameters
from qrhash.dynamic.found import Found
from qrhash.linen.modules import projection_params, projections_of
from qrhash.linen.variables import boxed
from qrhash.operations import Projection
from qrhash.stacks import CollectionConfig
from qrhash.tables import init_table
from qrhash.types import Key


class DynamicEmbed(nn.Module):
    """Vectors of keys that come and go; see `qrhash.dynamic`.

    The parameters are named as in `qrhash.nnx.DynamicEmbed`: `table`, the keys' own rows, and of
    the compressed vectors `refused_0`, `refused_1`, ... and, for operation "project",
    `refused_kernel` and `refused_bias`.

    Attributes:
      config: the `qrhash.dynamic.DynamicConfig`.

    >>> import qrhash
    >>> refused = qrhash.EmbedConfig(qrhash.KeyDigits(32, num_tables=2), 8)
    >>> config = DynamicConfig(1000, 8, refused=refused)
    >>> state, found = dynamic.assign(dynamic.init_state(config), ["shoes", "hats"], config, 0)
    >>> vectors, variables = DynamicEmbed(config).init_with_output(jax.random.key(0), found)
    >>> vectors.shape, sorted(variables["params"])
    ((2, 8), ['refused_0', 'refused_1', 'table'])
    """

    config: DynamicConfig

    def __post_init__(self) -> None:
        check_dynamic_config(self.config)
        super().__post_init__()

    @property
    def features(self) -> int:
        """Width of the vectors."""
        return self.config.features

    def setup(self) -> None:
        """Declares the rows and the parameters of the compressed vectors."""

        def table(key: Key, config: Any, j: int) -> Any:
            value = init_table(key, config, j)
            return boxed(value, config.table_axes(j), is_large=config.large_tables[j])

        rows, refused = self.param("table", table, self.config.own, 0), self.config.refused
        if refused is None:
            self.parameters = Parameters(rows)
            return
        tables = [self.param(f"refused_{j}", table, refused, j) for j in range(refused.num_tables)]
        projection = projection_params(self, refused, "refused_")
        self.parameters = Parameters(rows, tuple(tables), projection)

    def __call__(self, inputs: Found, out_sharding: Any = None) -> jax.Array:
        """The vectors of keys; see `qrhash.dynamic.lookup`.

        Args:
          inputs: as `qrhash.dynamic.assign` or `find` gives it.
          out_sharding: where the vectors are to be, on a mesh.

        Returns:
          Vectors [*shape, features]; of a bag one for each.
        """
        return dynamic.lookup(self.parameters, inputs, self.config, out_sharding=out_sharding)


def parameters_of(params: Mapping[str, Any], config: DynamicConfig) -> Parameters:
    """The parameters of a `DynamicEmbed` as the functions of `qrhash.dynamic` take them.

    Args:
      params: {name: array} of the module, unboxed.
      config: its config.

    Raises:
      ValueError: they are those of another module.
    """
    check_dynamic_config(config)
    refused = config.refused
    tables = [] if refused is None else [f"refused_{j}" for j in range(refused.num_tables)]
    fields = () if refused is None else refused.projection_fields
    names = ["table", *tables, *(f"refused_{field}" for field in fields)]
    missing = [name for name in names if not isinstance(params, Mapping) or name not in params]
    if missing:
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            "params must be those of a DynamicEmbed, unboxed, with "
            f"{', '.join(names)}, got {found}."
        )
    projection = Projection(*(params[f"refused_{field}"] for field in fields)) if fields else None
    return Parameters(params["table"], tuple(params[name] for name in tables), projection)


def start_rows(params: Any, found: Any, config: Any) -> tuple[Any, Any]:
    """`qrhash.dynamic.start_rows` and `start_all` for the parameters of a whole model.

    Args:
      params: the parameters, unboxed; donate them, and tables are updated in place.
      found: {name of a submodule: as `assign` or `assign_all` gives it}, nested as the parameters
        are, of any of the model's `DynamicEmbed`s and `EmbedCollection`s; or, of a model that is
        one, what that gives alone.
      config: the `DynamicConfig` or `CollectionConfig`; of several, {name: config} as `found` is.

    Returns:
      The parameters; and the numbers of the rows written, in the places of the tables, with None
      for all else, as `qrhash.reset_rows` takes them.

    Raises:
      ValueError: a name that is none of the parameters' or the configs', or the parameters there
        are not those of such a module.
    """
    if isinstance(found, Found):
        started, new = dynamic.start_rows(parameters_of(params, config), found, config)
        changed, rows = {"table": started.table}, {"table": new.table}
    elif isinstance(found, Mapping) and _is_of_collection(params, config):
        projections = projections_of(params, config)
        changed, rows = dynamic.start_all(params, found, config, projections)
    elif isinstance(found, Mapping):
        changed, rows = {}, {}
        for name, each in found.items():
            of_all = isinstance(config, (DynamicConfig, CollectionConfig))
            of_name = config if of_all else _of("config", config, name)
            part = _of("params", params, name)
            changed[name], rows[name] = start_rows(part, each, of_name)
    else:
        raise ValueError(
            f"found must be what assign gives, or a mapping of such, got {type(found).__name__}."
        )
    return copy(params, changed), copy(copy(params, dict.fromkeys(params)), rows)


def _is_of_collection(params: Any, config: Any) -> bool:
    """Whether the parameters are those of one `EmbedCollection`."""
    return isinstance(config, CollectionConfig) and any(s.name in params for s in config.stacks)


def _of(argument: str, mapping: Any, name: str) -> Any:
    if not isinstance(mapping, Mapping) or name not in mapping:
        got = sorted(mapping) if isinstance(mapping, Mapping) else type(mapping).__name__
        raise ValueError(f"{argument} must have {name!r}, which found names, got {got}.")
    return mapping[name]
