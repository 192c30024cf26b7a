"""The devices of a run: one, a mesh of several, or those of several processes."""

import math
import socket
import time
from contextlib import suppress

import jax
from jax.sharding import AxisType, Mesh

from qrhash import MeshLayout
from qrhash.batches import check_batch
from qrhash.ctr.errors import UserError
from qrhash.ctr.run.display import Display
from qrhash.ctr.settings import Settings

AXES = ("data", "model")


def connect(settings: Settings, display: Display) -> None:
    """Makes this process one of `settings.num_processes`, if there is a coordinator.

    Raises:
      UserError: the options do not fit each other; the coordinator does not answer in time.
    """
    address, number = settings.coordinator, settings.process_id
    given = [option is not None for option in (address, settings.num_processes, number)]
    if not any(given):
        return
    if not all(given) or address is None or number is None or settings.num_processes is None:
        raise UserError("--coordinator, --num-processes and --process-id go together.")
    if number >= settings.num_processes:
        raise UserError(
            f"process_id must be below num_processes={settings.num_processes}, got {number}."
        )
    host, port = _host_and_port(address)
    if settings.output_dir is None:
        raise UserError("Several processes need one --output-dir that all of them see.")
    if number > 0:
        _wait_for(host, port, settings.coordinator_timeout)
    # JAX itself ends the process where another one is missing.
    display.line(
        f"waiting up to {settings.coordinator_timeout} s for {settings.num_processes} processes to "
        f"meet at {address}"
    )
    try:
        jax.distributed.initialize(
            address,
            settings.num_processes,
            number,
            initialization_timeout=settings.coordinator_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Not all of {settings.num_processes} processes met at {address} within "
            f"{settings.coordinator_timeout} s: {str(error).splitlines()[0]}"
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    with suppress(UnicodeError):  # Of a host such as a..b, which would end in the socket
        if host.encode("idna") and port.isdecimal() and 0 < int(port) < 2**16:
            return host, int(port)
    raise UserError(
        f"coordinator must be host:port, of a port from 1 to {2**16 - 1}, got {address!r}."
    )


def _wait_for(host: str, port: int, seconds: int) -> None:
    """Returns when the coordinator answers: JAX would end the process where it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.2)
    raise UserError(
        f"The coordinator at {host}:{port} does not answer within {seconds} s: is process 0 "
        "running, and is the address right?"
    )


def make_layout(settings: Settings) -> MeshLayout | None:
    """How tables and batches are split over the mesh that the settings name, if they do.

    Raises:
      UserError: the mesh cannot be made, or the batch not be split over it.
    """
    if settings.mesh is None:
        if jax.process_count() > 1:
            raise UserError("Several processes need a --mesh over all their devices.")
        return None
    sizes = mesh_sizes(settings.mesh)
    mesh = _make_mesh(settings.mesh, sizes)
    layout = MeshLayout(mesh=mesh, exchange=settings.exchange)
    try:
        check_batch(settings.batch_size, layout)
    except ValueError as error:
        raise UserError(f"--batch-size and --mesh do not fit: {error}") from error
    return layout


def mesh_sizes(text: str) -> dict[str, int]:
    """Axis -> size, of a text such as "data=2,model=4".

    Raises:
      UserError: it does not read so.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES:
            raise UserError(f"mesh has the axes {' and '.join(AXES)}, got {name!r} in {text!r}.")
        if name in sizes or not size.isdecimal() or int(size) == 0:
            raise UserError(f"mesh must be sizes such as data=2,model=4, got {text!r}.")
        sizes[name] = int(size)
    return sizes


def _make_mesh(text: str, sizes: dict[str, int]) -> Mesh:
    wanted, devices = math.prod(sizes.values()), jax.devices()
    if wanted > len(devices) or (jax.process_count() > 1 and wanted < len(devices)):
        of = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        hint = ""
        if devices[0].platform == "cpu":
            hint = (
                " To try a mesh on a CPU, set XLA_FLAGS="
                f"--xla_force_host_platform_device_count={wanted}."
            )
        raise UserError(f"The mesh {text} is of {wanted} devices, got {len(devices)}{of}.{hint}")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices[:wanted]
    )
