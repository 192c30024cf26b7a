"""The Flax linen modules: hold the arrays of features and call the pure core.

The parameters are named as in `qrhash.nnx`, `table_0`, `table_1`, ... and, for operation
"project", `kernel` and `bias`, so that either module's parameters fit the other's:

    nnx.update(nnx_module, nn.unbox(variables)["params"])                  # linen -> nnx
    variables = {"params": nnx.to_pure_dict(nnx.state(nnx_module, nnx.Param))}  # nnx -> linen

For training whose cost goes by the batch and not by the tables, `large_tables` finds them:

    variables = model.init(key, ids)
    large = qrhash.linen.large_tables(variables["params"])
    loss, grads = qrhash.value_and_grad(loss_fn, large)(nn.unbox(variables["params"]), batch)

A `DynamicEmbed` takes what `qrhash.dynamic.assign` has found of its keys, and before that step its
new rows are started:

    state, found = qrhash.dynamic.assign(state, keys, config, step)
    params, new = qrhash.linen.start_rows(params, {"embed": found}, config)
    opt_state = qrhash.reset_rows(tx, opt_state, params, new)

So does an `EmbedCollection` with dynamic features what `qrhash.dynamic.assign_all` has found.
"""

from qrhash.linen.dynamic import DynamicEmbed, parameters_of, start_rows
from qrhash.linen.modules import EmbedCollection, MultiHashEmbed, params_from_tables
from qrhash.linen.variables import Table, large_tables

__all__ = [
    "DynamicEmbed",
    "EmbedCollection",
    "MultiHashEmbed",
    "Table",
    "large_tables",
    "parameters_of",
    "params_from_tables",
    "start_rows",
]
