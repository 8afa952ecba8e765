"""The device that a program is compiled for, which need not be the one that traces it."""

import jax


def target() -> tuple[str, str]:
    """Platform and device kind that is compiled for: of the mesh in force (`jax.set_mesh`), else the default device.

    A mesh may consist of devices that are not there (`jax.experimental.topologies`), which is how a program is
    compiled ahead of time for another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind
